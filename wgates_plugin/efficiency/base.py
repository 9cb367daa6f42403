"""What a network of given widths costs, and how much it may cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from wgates_plugin.errors import ConfigError, TargetError


@runtime_checkable
class EfficiencyModel(Protocol):
    """Widths (..., G) -> cost (...), one number per row.

    Laws: differentiable in the widths almost everywhere; the unit is stated; batches are rows on
    their own; nothing is promised about monotonicity. Costs are positive.
    """

    name: str
    unit: str

    def __call__(self, widths: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Limit:
    """`model(widths) <= target`, both in the model's unit.

    Raises:
        ConfigError: `model` is a class, or no model at all.
        TargetError: `target` is no positive number.
    """

    model: EfficiencyModel
    target: float

    def __post_init__(self) -> None:
        _check_model(self.model)
        check_target(self.target, self.model.unit)


@dataclass(frozen=True)
class Budget:
    """One or more limits that must all hold.

    Example:
        >>> import torch
        >>> class Total:
        ...     name, unit = "total", "channels"
        ...     def __call__(self, widths): return widths.sum(-1)
        >>> Budget.of(Limit(Total(), 10.0)).violations(torch.tensor([8.0, 4.0]))
        tensor([0.2000])
    """

    limits: tuple[Limit, ...]

    @classmethod
    def of(cls, *limits: Limit) -> Budget:
        if not limits:
            raise TargetError("budget: no limit given; give at least one")
        return cls(limits)

    def violations(self, widths: Tensor) -> Tensor:
        """Relative excess over each limit: widths (..., G) -> (..., K); above 0 breaks it."""
        return torch.stack(
            [limit.model(widths) / limit.target - 1.0 for limit in self.limits], dim=-1
        )

    def excess(self, widths: Tensor) -> Tensor:
        """The worst relative excess: widths (..., G) -> (...)."""
        return self.violations(widths).max(dim=-1).values

    def scaled(self, factors: Sequence[float]) -> Budget:
        """The same limits with each target multiplied by its factor."""
        pairs = zip(self.limits, factors, strict=True)
        return Budget(tuple(Limit(limit.model, limit.target * factor) for limit, factor in pairs))

    def describe(self, widths: Tensor) -> str:
        """Costs against targets, readable."""
        return ", ".join(
            f"{limit.model.name} {float(limit.model(widths)):.4g} of {limit.target:.4g} "
            f"{limit.model.unit}"
            for limit in self.limits
        )


def measured_grid(efficiency: object) -> int:
    """The channel multiple on which all measurements of a model, or of a budget's models, lie.

    A latency model knows no other widths, and a runtime may be slower at those. 1 where nothing is
    said, as by a model that counts.
    """
    models: list[object] = [efficiency]
    if isinstance(efficiency, Budget):
        models = [limit.model for limit in efficiency.limits]
    grids = [getattr(model, "grid", 1) for model in models]
    return math.lcm(*(grid for grid in grids if isinstance(grid, int) and grid >= 1))


def _check_model(model: object) -> None:
    """Refuse what predicts no cost.

    Raises:
        ConfigError: says what to give instead.
    """
    if isinstance(model, type):
        name = model.__name__
        raise ConfigError(
            "Limit",
            [
                f"model is the class `{name}`; a limit needs one made for your network: "
                f"`Limit({name}(space), target)` with `space = trace(model, example_inputs)`"
                if name in ("MacsModel", "ParametersModel")
                else f"model is the class `{name}`; give an object of it"
            ],
        )
    if not isinstance(model, EfficiencyModel):
        raise ConfigError(
            "Limit",
            [
                f"model is of type `{type(model).__name__}`; it needs `name`, `unit` and a call that "
                "turns widths into costs, as `LPNet`, `MacsModel(space)` and "
                "`ParametersModel(space)` have"
            ],
        )


def check_target(value: object, unit: str) -> float:
    """A target as a positive finite float.

    Raises:
        TargetError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TargetError(f"target {value!r}: not a number; give a positive number of {unit}")
    if not math.isfinite(value) or value <= 0:
        raise TargetError(f"target {value}: must be a positive finite number of {unit}")
    return float(value)
