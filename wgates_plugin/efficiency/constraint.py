"""How hard a budget presses on the gates.

`min task loss subject to violation <= 0` by an augmented Lagrangian (Nocedal and Wright, Numerical
Optimization, section 17.4), one dual step per training step (ours); the weighted sums of the W-Gates
paper stay selectable.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from wgates_plugin.errors import ConfigError


class Constraint(Protocol):
    """Turns relative violations (K,) into pressures (K,), the derivative of the penalty."""

    def pressure(self, violations: Tensor) -> Tensor: ...

    def update(self, violations: Tensor) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class AugmentedLagrangian:
    """Pressure `max(0, lambda + mu * v)`, and dual ascent `lambda <- max(0, lambda + rate * v)`."""

    def __init__(self, count: int, *, rate: float = 0.5, curvature: float = 10.0) -> None:
        self.rate, self.curvature = rate, curvature
        self.multipliers = torch.zeros(count, dtype=torch.float64)

    def pressure(self, violations: Tensor) -> Tensor:
        return (self.multipliers + self.curvature * violations.detach()).clamp_min(0)

    def update(self, violations: Tensor) -> None:
        step = self.rate * violations.detach().to(self.multipliers)
        self.multipliers = (self.multipliers + step).clamp_min(0)

    def state_dict(self) -> dict[str, Any]:
        return {"multipliers": self.multipliers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.multipliers = state["multipliers"].double()


class Weighted:
    """The paper's weighted sum: `alpha * cost`, or `alpha * log(1 + cost)`, cost relative to target.

    It trades accuracy against cost and promises no target.
    """

    def __init__(self, count: int, *, alpha: float = 1.0, logarithmic: bool = False) -> None:
        self.count, self.alpha, self.logarithmic = count, alpha, logarithmic

    def pressure(self, violations: Tensor) -> Tensor:
        relative_cost = violations.detach() + 1.0
        slope = 1.0 / (1.0 + relative_cost) if self.logarithmic else torch.ones_like(relative_cost)
        return self.alpha * slope

    def update(self, violations: Tensor) -> None:
        """A weighted sum has nothing to adapt."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


CONSTRAINTS = ("augmented-lagrangian", "linear", "log")


def make_constraint(form: str, count: int, *, alpha: float = 1.0) -> Constraint:
    """The constraint called `form` for `count` limits; `alpha` weighs the paper's forms.

    Raises:
        ConfigError: unknown form; the message lists the known ones.
    """
    if form == "augmented-lagrangian":
        return AugmentedLagrangian(count)
    if form in ("linear", "log"):
        return Weighted(count, alpha=alpha, logarithmic=form == "log")
    raise ConfigError("constraint", [f"`{form}` is unknown; known: {', '.join(CONSTRAINTS)}"])
