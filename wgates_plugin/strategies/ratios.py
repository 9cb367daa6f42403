"""Channel ratios: how many channels of each scope may stay, and what that asks of each group.

A scope is a set of groups ranked against each other: one group when pruning is local, all groups
when it is global, groups of equal structure when it is isomorphic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wgates_plugin.channels import ChannelGroup, ChannelSpace
from wgates_plugin.efficiency.base import Budget, Limit


@dataclass(frozen=True)
class Scope:
    """Groups (by name) ranked together.

    Attributes:
        units: their units before anything was removed.
        ratios: share of these to remove after each step; entry 0 is the untouched network.
    """

    groups: tuple[str, ...]
    units: int
    ratios: tuple[float, ...]

    def keep(self, step: int) -> int:
        """Units that stay after `step`, 0 or more."""
        # 10 * (1 - 0.9) is a little less than 1 in floating point.
        return math.floor(self.units * (1.0 - self.ratios[step]) + 1e-9)


class UnitsModel:
    """How many units some groups keep: an efficiency model, widths (..., G) -> (...)."""

    unit = "units"

    def __init__(self, space: ChannelSpace, groups: Sequence[str]) -> None:
        self.name = "channels of " + (groups[0] if len(groups) == 1 else f"{len(groups)} groups")
        self.weights = torch.tensor(
            [1.0 / g.ties if g.name in groups else 0.0 for g in space.groups], dtype=torch.float64
        )

    def __call__(self, widths: Tensor) -> Tensor:
        return (widths.double() * self.weights).sum(-1)


def make_scopes(
    space: ChannelSpace,
    ratios_of: Callable[[ChannelGroup], tuple[object, tuple[float, ...]]],
) -> list[Scope]:
    """Scopes in the order of their first group.

    Args:
        ratios_of: group -> (key of its scope, ratio after each step); the first group of a scope
            speaks for all of it.
    """
    members: dict[object, list[ChannelGroup]] = {}
    ratios: dict[object, tuple[float, ...]] = {}
    for group in space.groups:
        key, mine = ratios_of(group)
        members.setdefault(key, []).append(group)
        ratios.setdefault(key, mine)
    return [
        Scope(tuple(g.name for g in groups), sum(g.units for g in groups), ratios[key])
        for key, groups in members.items()
    ]


def structure_of(group: ChannelGroup, network: nn.Module) -> tuple[tuple[str, str], ...]:
    """What isomorphic groups have in common: kinds and sides of their members, in order."""
    found = dict(network.named_modules())
    return tuple((type(found[slot.module]).__name__, slot.role) for slot in group.slots)


def ratio_widths(
    space: ChannelSpace, scores: Tensor, scopes: Iterable[Scope], step: int, grid: int = 1
) -> tuple[int, ...]:
    """Widths (G,) after `step`: in each scope the best scores stay, above every group's floor.

    On a grid each group is rounded down, as torch-pruning's `round_to` does, but not to nothing.
    """
    index_of = {name: index for index, name in enumerate(space.names)}
    widths = list(space.full_widths)
    for scope in scopes:
        mine = [index_of[name] for name in scope.groups if name in index_of]
        # Groups that are down to one unit have left the space, and keep it.
        spare = scope.keep(step) - (len(scope.groups) - len(mine))
        for index, units in zip(mine, _share(space, scores, mine, spare, grid), strict=True):
            group = space.groups[index]
            allowed = group.allowed_widths(grid)
            fitting = [width for width in allowed if width <= units * group.ties]
            widths[index] = fitting[-1] if fitting else allowed[0]
    return tuple(widths)


def _share(
    space: ChannelSpace, scores: Tensor, mine: Sequence[int], keep: int, grid: int
) -> list[int]:
    """Units for each of these groups: its least ones first, the rest by score over all of them."""
    least = [space.groups[g].allowed_widths(grid)[0] // space.groups[g].ties for g in mine]
    rest: list[tuple[float, int]] = []
    for place, index in enumerate(mine):
        ordered = scores.detach()[space.unit_slice(index)].double().sort(descending=True).values
        rest += [(-value, place) for value in ordered[least[place] :].tolist()]
    counts = list(least)
    # Sorting is stable and groups come in order, so equal scores are decided by the first group.
    for _, place in sorted(rest, key=lambda item: item[0])[: max(0, keep - sum(least))]:
        counts[place] += 1
    return counts


def ratio_budget(space: ChannelSpace, scopes: Iterable[Scope], step: int, grid: int = 1) -> Budget:
    """The ratios as limits on units, one per scope: what gates learn under."""
    limits = []
    least = torch.tensor(space.least_widths(grid), dtype=torch.float64)
    for scope in scopes:
        present = [name for name in scope.groups if name in space.names]
        if present:
            model = UnitsModel(space, present)
            keep = scope.keep(step) - (len(scope.groups) - len(present))
            limits.append(Limit(model, max(float(keep), float(model(least)))))
    return Budget.of(*limits)
