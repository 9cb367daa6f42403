"""What one score per unit says: how many are open, which widths that makes, who ranks before whom;
and what is said of groups, unit by unit."""

from __future__ import annotations

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace


def widths_of(space: ChannelSpace, scores: Tensor, grid: int = 1) -> tuple[int, ...]:
    """Widths (G,) that scores (total_units,) stand for: positive ones counted, rounded up.

    Rounding up to the grid keeps the spare channels on the same step of the latency staircase, and
    keeps every group at its floor or above.
    """
    counts = positive_counts(space, scores)
    return tuple(
        group.round_up(count * group.ties, grid)
        for group, count in zip(space.groups, counts, strict=True)
    )


def positive_counts(space: ChannelSpace, scores: Tensor) -> list[int]:
    positive = (scores.detach() > 0).cpu()
    return [int(positive[space.unit_slice(g)].sum()) for g in range(len(space.groups))]


def open_mask(space: ChannelSpace, scores: Tensor, grid: int = 1) -> Tensor:
    """0/1 (total_units,): what the plan of these scores would leave, so that what trains stays."""
    mask = torch.zeros_like(scores)
    for index, width in enumerate(widths_of(space, scores, grid)):
        group, start = space.groups[index], space.offsets[index]
        order = torch.argsort(scores[space.unit_slice(index)], descending=True, stable=True)
        mask[start + order[: width // group.ties]] = 1.0
    return mask


def ranks_within(space: ChannelSpace, merits: Tensor) -> Tensor:
    """Rank of each unit within its group as a share of it, (total_units,) in [0, 1)."""
    return torch.cat(
        [
            torch.argsort(torch.argsort(merits[space.unit_slice(g)])) / group.units
            for g, group in enumerate(space.groups)
        ]
    )


def per_unit(space: ChannelSpace, by_group: Tensor) -> Tensor:
    """A value per group (G,) -> per unit (total_units,)."""
    return by_group.repeat_interleave(torch.tensor([group.units for group in space.groups]))
