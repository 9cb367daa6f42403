"""The mathematics of a binary gate: pure functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace


def binary_step(scores: Tensor) -> Tensor:
    """`1[s > 0]` with the gradient of a piecewise polynomial, `max(0, 2 - 4|s|)`.

    The surrogate is Bi-Real Net's (Liu et al., ECCV 2018, section 3.3) moved from sign to a 0/1 step;
    it integrates to 1 and vanishes outside [-1/2, 1/2].

    Example:
        >>> s = torch.tensor([-0.25, 0.0, 0.25, 1.0], requires_grad=True)
        >>> binary_step(s).sum().backward(); s.grad
        tensor([1., 2., 1., 0.])
    """
    step: Tensor = _BinaryStep.apply(scores)
    return step


class _BinaryStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        ctx.save_for_backward(scores)
        return (scores > 0).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (scores,) = ctx.saved_tensors
        return grads[0] * surrogate(scores)


def surrogate(scores: Tensor) -> Tensor:
    """The derivative that stands in for the step's: `max(0, 2 - 4|s|)`."""
    return (2 - 4 * scores.abs()).clamp_min(0)


def squash(raw: Tensor) -> Tensor:
    """Keep scores within (-1/2, 1/2), where the surrogate lives: `tanh(2 r) / 2`, slope 1 at 0 (ours)."""
    return 0.5 * torch.tanh(2 * raw)


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


def per_unit(space: ChannelSpace, by_group: Tensor) -> Tensor:
    """Gradient by width (G,) -> by gate (total_units,): a unit stands for `ties` channels."""
    repeats = torch.tensor([group.units for group in space.groups])
    ties = torch.tensor([float(group.ties) for group in space.groups])
    return (by_group * ties).repeat_interleave(repeats)
