"""What cross-validation leaves behind: predictions of measurements that a fit had not seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from wgates_plugin.efficiency.lpnet.data import LatencyData, folds
from wgates_plugin.errors import ConfigError

COVERAGE = 0.9
"""Share of measurements that an interval holds, unless another is asked for."""

_FOLDS = 5


@dataclass(frozen=True)
class HeldOut:
    """Each of N measurements as predicted by a fit on the other parts of the data.

    Attributes:
        widths: (N, G). measured_ms, predicted_ms, deviation_ms: (N,).
        part: (N,) number of the part that was left out.
    """

    widths: Tensor
    measured_ms: Tensor
    predicted_ms: Tensor
    deviation_ms: Tensor
    part: Tensor

    def __post_init__(self) -> None:
        count = len(self.measured_ms)
        if not count or any(len(getattr(self, field.name)) != count for field in fields(self)):
            raise ValueError("held-out arrays are empty or of different lengths")

    def __len__(self) -> int:
        return len(self.measured_ms)

    @property
    def errors(self) -> Tensor:
        """Relative, without sign: (N,)."""
        return (self.predicted_ms - self.measured_ms).abs() / self.measured_ms

    @property
    def scores(self) -> Tensor:
        """Errors over the deviations that were expected: (N,)."""
        return (self.predicted_ms - self.measured_ms).abs() / self.deviation_ms

    @property
    def most_coverage(self) -> float:
        """The largest coverage that so many measurements can promise: n / (n + 1)."""
        return len(self) / (len(self) + 1)

    def quantile(self, coverage: float) -> float:
        """The score that a share `coverage` of new measurements stays under.

        Raises:
            ConfigError: `coverage` is not between 0 and 1.
        """
        return _quantile(self.scores, coverage)

    def covered(self, coverage: float) -> float:
        """Share of measurements inside intervals that were made without their part."""
        inside = 0
        for number in self.part.unique().tolist():
            mine = self.part == number
            rest = self.scores[~mine]
            # As few as may be left cannot promise much; all of them then make the interval.
            rank = min(math.ceil((len(rest) + 1) * coverage), len(rest))
            inside += int((self.scores[mine] <= rest.sort().values[rank - 1]).sum())
        return inside / len(self)

    def interval(self, coverage: float) -> tuple[Tensor, Tensor]:
        """Lower and upper ends in ms, (N,) each."""
        half = self.quantile(coverage) * self.deviation_ms
        return self.predicted_ms - half, self.predicted_ms + half

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Measured against predicted, with the 90 % interval where there are enough for one, as JSON."""
        known = self.interval(COVERAGE) if self.most_coverage >= COVERAGE else None
        return interval_rows(name, self.measured_ms, self.predicted_ms, known)

    def tensors(self) -> dict[str, Tensor]:
        """All that `from_tensors` needs."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> HeldOut:
        """Raises KeyError or ValueError where the tensors are not whole."""
        return cls(*(tensors[field.name] for field in fields(cls)))


def interval_rows(
    name: str, measured_ms: Tensor, predicted_ms: Tensor, interval: tuple[Tensor, Tensor] | None
) -> list[dict[str, Any]]:
    """One row of the set `name` for each network (N,), as reports show them; no ends are None."""
    none = [None] * len(measured_ms)
    ends = [none, none] if interval is None else [end.tolist() for end in interval]
    columns = (measured_ms.tolist(), predicted_ms.tolist(), *ends)
    return [
        {"measured_ms": m, "predicted_ms": p, "low_ms": low, "high_ms": high, "set": name}
        for m, p, low, high in zip(*columns, strict=True)
    ]


class CrossValidates(Protocol):
    """A structure that can say what it would predict had parts of the data not been there."""

    def without(self, data: LatencyData, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]: ...


def cross_validated(learned: CrossValidates, data: LatencyData, *, seed: int) -> HeldOut:
    """Leave out each of five random parts in turn."""
    parts = folds(data.widths, parts=_FOLDS, seed=seed)
    predicted, deviation = learned.without(data, parts)
    number = torch.empty(len(data), dtype=torch.int64)
    for index, part in enumerate(parts):
        number[part] = index
    return HeldOut(data.widths, data.latency_ms, predicted, deviation, number)


def _quantile(scores: Tensor, coverage: float) -> float:
    if not 0.0 < coverage < 1.0:
        raise ConfigError("LPNet", [f"coverage: got {coverage!r}, expected between 0 and 1"])
    rank = math.ceil((len(scores) + 1) * coverage)
    if rank > len(scores):
        raise ConfigError(
            "LPNet",
            [
                f"coverage: {coverage:g} cannot be promised from {len(scores)} measurements; ask for "
                f"at most {len(scores) / (len(scores) + 1):.3g}, or measure more"
            ],
        )
    return float(scores.sort().values[rank - 1])
