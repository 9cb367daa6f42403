"""What open gates say about their channels, before any is closed."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class GateMerits:
    """Mean squared gradient of open gates (ours).

    A gate multiplies all that is cut with its channel, so that its gradient is the first-order change
    of the loss without the channel (Molchanov et al., "Importance Estimation for Neural Network
    Pruning", CVPR 2019, eq. 8), the BatchNorm's part and depthwise weights included. In a trained
    network its mean is close to 0; its square is, up to one factor for all channels, the empirical
    Fisher information, and so the second-order loss of closing the gate (LeCun et al., "Optimal
    Brain Damage", 1989): comparable between layers.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.done = steps, 0
        self._sum: Tensor | None = None

    @property
    def wanted(self) -> bool:
        """Whether another step is to be measured."""
        return self.done < self.steps

    def add(self, gradient: Tensor) -> None:
        """One step's gradient (total_units,), on any device."""
        square = gradient.detach().cpu().double().square()
        self._sum = square if self._sum is None else self._sum + square
        self.done += 1

    def mean(self) -> Tensor | None:
        """(total_units,) float64 on the CPU, relative to the largest; None before the first step.

        Relative, because rules that decide by them know no scale of the loss.
        """
        return None if self._sum is None else self._sum / self._sum.max().clamp_min(1e-300)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "done": self.done, "sum": self._sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.done = int(state["steps"]), int(state["done"])
        self._sum = None if state["sum"] is None else state["sum"].cpu()
