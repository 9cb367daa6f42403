"""Plans from a criterion's scores: ranked within a scope, cut where the budget says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget
from wgates_plugin.errors import ConfigError
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies import budgeting
from wgates_plugin.strategies.criteria.scores import Importance, criterion_scores
from wgates_plugin.strategies.ratios import structure_of
from wgates_plugin.training.engine import LossFunction
from wgates_plugin.training.evaluation import cross_entropy

SCOPES = ("global", "local", "isomorphic")


def plan_by_criterion(
    network: nn.Module,
    space: ChannelSpace,
    criterion: str | Importance,
    budget: Budget,
    grid: int = 1,
    data: Iterable[Any] | None = None,
    *,
    scope: str = "global",
    loss: LossFunction = cross_entropy,
    seed: int = 0,
    batches: int | None = None,
) -> PruningPlan:
    """A plan that keeps `budget`, with the channels that a torch-pruning criterion rates highest.

    Args:
        criterion: a name from `CRITERIA`, or an importance of torch-pruning or of yours.
        data: batches (inputs, targets), for criteria that need gradients.
        scope: "global" ranks all groups together, their scores first brought to mean 1 in each (LAMP
            is made comparable by its own rule); "local" takes the same share from every group;
            "isomorphic" ranks groups of equal structure together, and takes the same share of each
            such set (Fang et al., ECCV 2024).
        loss: of logits and targets, a mean over the batch.
        seed: of `random`, and of what data draw at random.
        batches: that are taken of the data; None takes all. "hessian" runs every image by itself.

    Raises:
        ConfigError: an unknown or refused criterion or scope, no number of batches, or data are
            missing.
        PlanError: the criterion says nothing about a group. InfeasibleTargetError: the budget.
    """
    plan, _ = decide_by_criterion(
        network,
        space,
        criterion,
        budget,
        grid,
        data,
        scope=scope,
        loss=loss,
        seed=seed,
        batches=batches,
    )
    return plan


def decide_by_criterion(
    network: nn.Module,
    space: ChannelSpace,
    criterion: str | Importance,
    budget: Budget,
    grid: int,
    data: Iterable[Any] | None,
    *,
    scope: str,
    loss: LossFunction,
    seed: int,
    batches: int | None,
) -> tuple[PruningPlan, Tensor]:
    """`plan_by_criterion`, and the scores (total_units,) it ranked by; arguments as there.

    Scores are comparable between groups as the scope compares them: a channel may be exchanged
    for one of another group by them.
    """
    if scope not in SCOPES:
        raise ConfigError("criterion", [f"scope `{scope}`: known: {', '.join(SCOPES)}"])
    budgeting.check_feasible(space, budget, grid)
    scores = criterion_scores(
        network, space, criterion, data, loss=loss, seed=seed, batches=batches
    )
    name = criterion if isinstance(criterion, str) else type(criterion).__name__
    if scope == "local":
        ranks = _within_groups(space, scores, _ranks)
        uniform = budgeting.uniform_widths(space, budget, grid)
        widths = budgeting.fit_to_budget(space, ranks, uniform, budget, grid)
        return PruningPlan.top(space, ranks, widths, strategy=name), ranks
    if name != "lamp" and not isinstance(criterion, tp.importance.LAMPImportance):
        scores = _within_groups(space, scores, lambda mine: mine / mine.mean().clamp_min(1e-12))
    if scope == "isomorphic":
        scores = _ranks_among_equals(network, space, scores)
    start = budgeting.threshold_widths(space, scores, budget, grid)
    return budgeting.plan_for_budget(space, scores, start, budget, grid, strategy=name), scores


def _within_groups(
    space: ChannelSpace, scores: Tensor, change: Callable[[Tensor], Tensor]
) -> Tensor:
    parts: Sequence[Tensor] = [
        change(scores[space.unit_slice(index)]) for index in range(len(space.groups))
    ]
    return torch.cat(list(parts))


def _ranks_among_equals(network: nn.Module, space: ChannelSpace, scores: Tensor) -> Tensor:
    """Ranks of units (total_units,) among all groups of their group's structure.

    One threshold over such ranks takes the same share of each set of groups.
    """
    sets: dict[object, list[int]] = {}
    for index, group in enumerate(space.groups):
        units = space.unit_slice(index)
        mine = sets.setdefault(structure_of(group, network), [])
        mine += range(units.start, units.stop)
    ranks = torch.empty_like(scores)
    for units_of_set in sets.values():
        ranks[units_of_set] = _ranks(scores[units_of_set])
    return ranks


def _ranks(scores: Tensor) -> Tensor:
    """1 for the best of (n,) down to 1/n; equal scores are decided by the lower number."""
    ranks = torch.empty_like(scores)
    order = scores.argsort(descending=True, stable=True)
    ranks[order] = 1.0 - torch.arange(len(scores), dtype=scores.dtype) / len(scores)
    return ranks
