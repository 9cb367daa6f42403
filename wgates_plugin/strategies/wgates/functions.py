"""The mathematics of a binary gate: pure functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.strategies.unit_scores import per_unit


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


def by_gate(space: ChannelSpace, by_width: Tensor) -> Tensor:
    """Gradient by width (G,) -> by gate (total_units,): a unit stands for `ties` channels."""
    ties = torch.tensor([float(group.ties) for group in space.groups])
    return per_unit(space, by_width * ties)
