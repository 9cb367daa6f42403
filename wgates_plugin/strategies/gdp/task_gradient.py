"""What the task says of each gate, averaged over the steps so far (ours)."""

from __future__ import annotations

import torch
from torch import Tensor

MEMORY = 0.05
"""Share of the phase over which the gates' gradient and its size are averaged, 10 steps at least."""

WIDEST = 30.0
"""Bound on a gate's curvature over the mean of all, and on its inverse."""

LARGEST_PUSH = 5.0
"""Bound on a gate's gradient over the mean size of all: one batch's outlier opens no gate alone."""


class TaskGradient:
    """Running means of the gates' gradient, of its size, and of what closing each gate would cost.

    Args:
        steps: of the phase.

    Attributes:
        mean: of the gradient, (total_units,). size: of the gradient's mean size.
        fisher: mean square of `g dL/dg`, (total_units,), which estimates what closing a gate costs the
            task (Fisher information, as in Theis et al., arXiv 1801.05787).
    """

    def __init__(self, units: int, steps: int, device: torch.device) -> None:
        self._steps = steps
        self.mean = torch.zeros(units, device=device)
        self.fisher = torch.zeros(units, device=device)
        self.size = 0.0

    def add(self, gradient: Tensor, gates: Tensor, learning: Tensor, step: int) -> None:
        """Take in the gradient of `gates` at `step`; its size is that of those `learning` (bool).

        All (total_units,).
        """
        size = float(gradient[learning].abs().mean()) if bool(learning.any()) else 0.0
        new = 1.0 / min(step + 1.0, max(10.0, MEMORY * self._steps))
        self.size += new * (size - self.size)
        self.mean = self.mean + new * (gradient - self.mean)
        loss_at_stake = (gradient * gates).square()
        self.fisher = self.fisher + new * (loss_at_stake - self.fisher)

    def push(self) -> Tensor:
        """The mean gradient over its mean size, (total_units,): about 1 in size."""
        relative = self.mean / max(self.size, 1e-30)
        return relative.clamp(-LARGEST_PUSH, LARGEST_PUSH)

    def curvature(self, learning: Tensor) -> Tensor:
        """The metric of the proximal step, (total_units,), 1 for a gate like most of those `learning`.

        In this metric gates close in the order of cost saved per loss caused. A plain step would take
        the dearest channels first, whatever they are worth: behind a BatchNorm the loss cannot feel
        that all gates of a group fall alike.
        """
        if not bool(learning.any()):
            return torch.ones_like(self.fisher)
        middle = float(self.fisher[learning].mean())
        return (self.fisher / max(middle, 1e-30)).clamp(1.0 / WIDEST, WIDEST)
