"""From one step to the next: the records of the smaller network, and what is known of its units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.plan import PruningPlan


def space_after(
    plan: PruningPlan, first: ChannelSpace, trace: DependencyTrace, ignored: Sequence[Any]
) -> ChannelSpace:
    """The records of the network that `plan` left, under the floors and caps of the `first` one.

    Args:
        trace: of the smaller network. ignored: layers whose outputs stay.

    Raises:
        TraceError: nothing is left to prune.
    """
    # A group that is down to one unit has nothing left to choose.
    open_ones = {g for g, kept in zip(plan.space.names, plan.kept, strict=True) if kept[1:]}
    closed = [name for name in first.names if name not in open_ones]
    space = trace.space(ignored_layers=[*ignored, *closed])
    limits = {group.name: group for group in first.groups}
    groups = tuple(
        replace(
            group,
            floor=min(limits[group.name].floor, group.channels),
            cap=min(limits[group.name].cap, group.channels),
        )
        for group in space.groups
        if group.name in limits
    )
    return replace(space, groups=groups)


def merits_after(merits: Tensor, plan: PruningPlan, after: ChannelSpace) -> Tensor:
    """The merits of the units that stayed, in the numbering of the smaller network.

    `merits`: (total_units,) of the plan's space.
    """
    before = plan.space
    kept = dict(zip(before.names, plan.kept, strict=True))
    starts = dict(zip(before.names, before.offsets, strict=False))
    return torch.cat(
        [merits[starts[name] + torch.tensor(kept[name]).to(merits.device)] for name in after.names]
    )
