"""What open gates say about their channels, before any learns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FADING = 0.5
"""What a round's sum counts in the next: an open channel gains merit as others close beside it."""

CLOSED = 1e-12
"""What is left of a closed channel's: the order among its like, behind all that are open."""


class GateMerits:
    """Mean squared gradient of open gates (ours).

    A gate multiplies all that is cut with its channel, so that its gradient is the first-order change
    of the loss without the channel (Molchanov et al., "Importance Estimation for Neural Network
    Pruning", CVPR 2019, eq. 8), the BatchNorm's part and depthwise weights included. In a trained
    network its mean is close to 0; its square is, up to one factor for all channels, the empirical
    Fisher information, and so the second-order loss of closing the gate (LeCun et al., "Optimal
    Brain Damage", 1989): comparable between layers.

    That holds for one channel that closes, not for many at once. So those of least merit close in
    several rounds, and the others are measured anew without them.

    Args:
        steps: training steps to measure for, in all rounds together.
    """

    def __init__(self, steps: int, rounds: int = 1) -> None:
        self.steps, self.rounds, self.done = steps, rounds, 0
        self._sum: Tensor | None = None

    @property
    def wanted(self) -> bool:
        """Whether another step is to be measured."""
        return self.done < self.steps

    @property
    def round(self) -> int:
        """How many rounds are over."""
        return self.rounds * self.done // self.steps if self.wanted else self.rounds

    def add(self, gradient: Tensor, opened: Tensor) -> None:
        """One step's gradient (total_units,); that of gates which are not `opened` (0/1) says nothing."""
        square = gradient.detach().cpu().double().square() * opened.cpu()
        self._sum = square if self._sum is None else self._sum + square
        self.done += 1

    def close(self, opened: Tensor) -> None:
        """Go on with what is `opened` (0/1); the others stay behind it, in the order they have."""
        assert self._sum is not None
        self._sum = self._sum * torch.where(opened.cpu() > 0, FADING, CLOSED)

    def mean(self) -> Tensor | None:
        """(total_units,) float64 on the CPU, relative to the largest; None before the first step.

        Relative, because rules that decide by them know no scale of the loss.
        """
        return None if self._sum is None else self._sum / self._sum.max().clamp_min(1e-300)

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "rounds": self.rounds,
            "done": self.done,
            "sum": self._sum,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.rounds = int(state["steps"]), int(state["rounds"])
        self.done = int(state["done"])
        self._sum = None if state["sum"] is None else state["sum"].cpu()
