"""Closing the loop: widths are decided by prediction and settled by measurement."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget, EfficiencyModel, Limit
from wgates_plugin.efficiency.lpnet import LPNet
from wgates_plugin.errors import InfeasibleTargetError, PlanError
from wgates_plugin.latency_study import LatencyStudy
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies.budgeting import fit_to_budget, holds

CLOSE_ENOUGH = 0.03
"""A held latency within this share of the aim is not worth another attempt."""


@dataclass(frozen=True)
class Settled:
    """Widths that were measured, and the record of every attempt on the way."""

    widths: tuple[int, ...]
    measured_ms: float
    held: bool
    attempts: list[dict[str, Any]]


def settle(
    study: LatencyStudy,
    lpnet: LPNet,
    scores: Tensor,
    widths: Sequence[int],
    *,
    target_ms: float,
    others: Sequence[Limit] = (),
    margin: float,
    attempts: int,
    grid: int,
    seconds: float,
    bounded: Callable[[LPNet], EfficiencyModel] = lambda lpnet: lpnet,
    stage: str = "plan",
    learned: bool = False,
) -> Settled:
    """Find widths near `widths` that were *measured* under the target, and not far under it.

    Each attempt decides by LPNet, scaled to be exact at the last measured network, measures, and
    refits on what was seen. What looks held is measured twice, and the mean counts. Latency does not
    depend on weights, so no training is needed for this.

    Args:
        scores: merit of each unit (total_units,).
        target_ms, margin: the aim is `target_ms * (1 - margin)`.
        bounded: what of a prediction is held to the aim; the prediction itself by default.
        stage: the attempts' name in the record.
        learned: a network has learned at `widths`, and every step away from them costs some of it: they
            are measured as they are, and stay where half of the margin is left and no more than
            `CLOSE_ENOUGH` is given away.
    """
    space, aim = study.space, target_ms * (1.0 - margin)
    as_learned = target_ms * (1.0 - margin / 2)
    local, best, log = lpnet, None, []
    measured: dict[tuple[int, ...], float] = {}
    current = tuple(widths)
    for attempt in range(2 * attempts):
        untouched = learned and attempt == 0 and _within(others, widths)
        if not untouched:
            budget = Budget((Limit(bounded(local), aim), *others))
            current = _fitted(space, scores, current, budget, grid)
        if current in measured:
            break
        predicted = float(local(torch.tensor(current, dtype=torch.float64)))
        limit = as_learned if untouched else aim
        each = [study.at(current, seconds).latency_ms]
        if each[0] <= limit:
            # Widths are chosen for being under it, by a lucky measurement too: once more, loaded anew.
            each.append(study.at(current, seconds).latency_ms)
        found = statistics.fmean(each)
        measured[current] = found
        held = found <= limit
        if held and (best is None or found > measured[best]):
            best = current
        log.append(
            {
                "stage": stage,
                "predicted_ms": predicted,
                "measured_ms": found,
                "each_ms": each,
                "verdict": "held" if held else "over",
            }
        )
        close = held and found >= aim * (1.0 - CLOSE_ENOUGH)
        if close or (best is not None and attempt + 1 >= attempts):
            break
        lpnet = study.refit(lpnet)
        local = lpnet.corrected(current, found)
    chosen = best or min(measured, key=lambda widths: measured[widths])
    return Settled(chosen, measured[chosen], best is not None, log)


def _fitted(
    space: ChannelSpace, scores: Tensor, widths: Sequence[int], budget: Budget, grid: int
) -> tuple[int, ...]:
    try:
        return fit_to_budget(space, scores, widths, budget, grid)
    except InfeasibleTargetError:
        # The floors were measured to fit, so the prediction is at fault, not the target.
        return space.least_widths(grid)


def _within(limits: Sequence[Limit], widths: Sequence[int]) -> bool:
    return not limits or holds(Budget(tuple(limits)), widths)


def trimmed(
    plan: PruningPlan,
    scores: Tensor,
    budget: Budget,
    grid: int,
) -> PruningPlan:
    """A plan inside `plan` that keeps the budget: channels only go, none come back.

    Where no step is left, it is `plan` itself.
    """
    space, here = capped(plan.space, plan.widths), plan.mask.to(scores.device)
    # The cap keeps out what is gone; merits are counted from the lowest score there is.
    present = torch.where(here, scores, scores[here].min())
    try:
        widths = fit_to_budget(space, present, plan.widths, budget, grid)
    except InfeasibleTargetError:
        # A prediction only; measured again, one step narrower everywhere may well do.
        widths = tuple(
            max([w for w in group.allowed_widths(grid) if w < width], default=width)
            for group, width in zip(plan.space.groups, plan.widths, strict=True)
        )
    return subset(plan, scores, widths)


def subset(plan: PruningPlan, scores: Tensor, widths: Sequence[int]) -> PruningPlan:
    """The highest scores among the channels that `plan` keeps, at `widths` (G,)."""
    return PruningPlan.top(plan.space, _present_first(plan, scores), widths, **plan.note)


def _present_first(plan: PruningPlan, scores: Tensor) -> Tensor:
    """Scores with the channels that went already behind all that are still there."""
    merits = scores.double().clamp(min=torch.finfo(torch.float64).min)
    return torch.where(plan.mask.to(scores.device), merits, -torch.inf)


def capped(space: ChannelSpace, widths: Sequence[int]) -> ChannelSpace:
    """The same space with every group's cap at `widths` (G,)."""
    groups = tuple(
        dataclasses.replace(group, cap=width, floor=min(group.floor, width))
        for group, width in zip(space.groups, widths, strict=True)
    )
    return ChannelSpace(groups, space.layers, space.excluded)


def relative_plan(inner: PruningPlan, outer: PruningPlan, space: ChannelSpace) -> PruningPlan:
    """`inner`, in the numbering of the network that `outer` left behind (its `space`).

    A group that `outer` cut to one unit may be missing from `space`, or have become a depthwise
    convolution with units of another kind there: it has nothing left to choose and stays as it is. So
    may one whose branch a step after the cut has taken out: nothing of it is left to cut.

    Raises:
        PlanError: `inner` keeps a channel that `outer` removed, or the networks do not match.
    """
    kept = {group.name: tuple(range(group.units)) for group in space.groups}
    units = {group.name: group.units for group in space.groups}
    for name, first, second in zip(outer.space.names, outer.kept, inner.kept, strict=True):
        place = {unit: index for index, unit in enumerate(first)}
        missing = [unit for unit in second if unit not in place]
        if missing:
            raise PlanError(f"group `{name}`: unit {missing[0]} is gone already")
        gone_with_its_branch = name not in units and outer.note.get("after")
        if second == first or gone_with_its_branch:
            continue
        if units.get(name) != len(first):
            raise PlanError(
                f"group `{name}`: has {units.get(name)} units in the smaller network, the plan "
                f"left {len(first)}; trace the network that the plan left behind"
            )
        kept[name] = tuple(place[unit] for unit in second)
    return PruningPlan(space, tuple(kept[name] for name in space.names))
