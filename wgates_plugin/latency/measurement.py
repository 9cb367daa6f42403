"""Measurement: what a timing leaves behind, with its samples, spread and surroundings."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wgates_plugin.errors import FileFormatError, MeasurementError

_KIND = "measurement"
_VERSION = 2
_NUMBERS = (
    "latency_ms",
    "ratio",
    "ratio_spread",
    "reference_ms",
    "drift",
    "median_ms",
    "minimum_ms",
    "inference_seconds",
    "seconds",
    "discarded_seconds",
)
_MAY_BE_ZERO = ("ratio_spread", "discarded_seconds")
_SERIES = ("samples_ms", "reference_samples_ms")
_COUNTS = ("rounds", "warmup", "disturbed", "inferences")
_RECORDS = ("identity", "environment")
_OPTIONAL = ("inferences", "discarded_seconds")


def half_interquartile_range(values: Sequence[float]) -> float:
    """Half the distance between the quartiles of `values`; 0.0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return (upper - lower) / 2.0


@dataclass(frozen=True)
class Measurement:
    """One latency and everything needed to judge it.

    Times are wall times (the device's, where the session has a clock of its own), with one
    exception: an inference on a single CPU thread from which the scheduler took the processor
    away enters the samples with the processor time it used.

    With a reference network timed in the same rounds, round i gives the pair
    `samples_ms[i]`, `reference_samples_ms[i]`, and `latency_ms = ratio * reference_ms`.
    Without one, `ratio` and `drift` are 1, `reference_samples_ms` is empty and
    `latency_ms == reference_ms`.

    Attributes:
        latency_ms: the claimed figure, milliseconds per inference.
        ratio: median over rounds of candidate time over reference time.
        ratio_spread: half the interquartile range of these ratios (of the samples over their
            median when there was no reference).
        samples_ms: least candidate time of each round, shape (rounds,).
        reference_samples_ms: least reference time of each round, shape (rounds,) or (0,).
        reference_ms: calibrated latency of the reference, or the median of its samples.
        drift: median of `reference_samples_ms` over `reference_ms`: how much slower than at its
            calibration the reference ran here, which `latency_ms` leaves out.
        median_ms: median of `samples_ms`. minimum_ms: their minimum.
        rounds: rounds taken. warmup: untimed inferences of the candidate before them.
        disturbed: inferences, the reference's included, during which the processor was taken
            away. On one CPU thread they count with the processor time they used; otherwise they
            are taken again, and count only in a block where hardly any was left alone.
        inference_seconds: wall time inside timed inferences, the reference's included.
        seconds: time from start to end of the measurement.
        identity: what was measured on: `Runtime.identity`.
        environment: the machine and the libraries: `describe_environment`.
        inferences: timed ones, the reference's included; None where a record does not tell.
        discarded_seconds: wall time inside the timed inferences of attempts that other work on the
            machine disturbed and that this one was kept instead of.

    Raises:
        MeasurementError: a time is not finite and positive, or the record contradicts itself.
    """

    latency_ms: float
    ratio: float
    ratio_spread: float
    samples_ms: tuple[float, ...]
    reference_samples_ms: tuple[float, ...]
    reference_ms: float
    drift: float
    median_ms: float
    minimum_ms: float
    rounds: int
    warmup: int
    disturbed: int
    inference_seconds: float
    seconds: float
    identity: dict[str, Any]
    environment: dict[str, Any]
    inferences: int | None = None
    discarded_seconds: float = 0.0

    @property
    def relative_spread(self) -> float:
        """Spread of the ratio over the ratio."""
        return self.ratio_spread / self.ratio

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise MeasurementError(
                "measurement: " + "; ".join(problems) + "; discard it and measure again"
            )

    def _problems(self) -> list[str]:
        problems = []
        for name in _NUMBERS:
            value = getattr(self, name)
            least = "at least 0" if name in _MAY_BE_ZERO else "positive"
            if not math.isfinite(value) or value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
                problems.append(f"`{name}` is {value!r}, expected a finite number, {least}")
        for name in _SERIES:
            if any(not math.isfinite(value) or value <= 0 for value in getattr(self, name)):
                problems.append(f"`{name}` holds a time that is not finite and positive")
        if self.rounds < 1 or len(self.samples_ms) != self.rounds:
            problems.append(f"{len(self.samples_ms)} samples for {self.rounds} rounds")
        if len(self.reference_samples_ms) not in (0, self.rounds):
            problems.append(
                f"{len(self.reference_samples_ms)} reference samples for {self.rounds} rounds"
            )
        for name in ("warmup", "disturbed"):
            if getattr(self, name) < 0:
                problems.append(f"`{name}` is {getattr(self, name)}")
        blocks = len(self.samples_ms) + len(self.reference_samples_ms)
        if self.inferences is not None and self.inferences < blocks:
            problems.append(f"`inferences` is {self.inferences} for {blocks} blocks of them")
        if not problems:
            seen = self.reference_samples_ms
            drift = statistics.median(seen) / self.reference_ms if seen else 1.0
            claims = {
                "latency_ms": (self.latency_ms, self.ratio * self.reference_ms),
                "drift": (self.drift, drift),
                "median_ms": (self.median_ms, statistics.median(self.samples_ms)),
                "minimum_ms": (self.minimum_ms, min(self.samples_ms)),
            }
            problems = [
                f"`{name}` is {claimed!r} where its samples give {derived!r}"
                for name, (claimed, derived) in claims.items()
                if not math.isclose(claimed, derived, rel_tol=1e-6)
            ]
        return problems

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values; `from_json` is its inverse."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values.update({name: list(values[name]) for name in _SERIES})
        unknown = [name for name in _OPTIONAL if values[name] is None]
        values = {name: value for name, value in values.items() if name not in unknown}
        return {"kind": _KIND, "version": _VERSION, **values}

    @classmethod
    def from_json(cls, value: Any) -> Measurement:
        """Read what `to_json` wrote.

        Raises:
            FileFormatError: a field is missing, unknown, of another type, or not believable.
        """
        if not isinstance(value, Mapping) or value.get("kind") != _KIND:
            raise FileFormatError("measurement: the JSON is no measurement; measure again")
        if value.get("version") != _VERSION:
            raise FileFormatError(
                f"measurement: version {value.get('version')!r}, this package reads {_VERSION}; "
                "measure again"
            )
        fields = {name: item for name, item in value.items() if name not in ("kind", "version")}
        known = {field.name for field in dataclasses.fields(cls)}
        problems = [f"`{name}` is missing" for name in sorted(known - {*fields, *_OPTIONAL})]
        problems += [f"`{name}` is unknown" for name in sorted(set(fields) - known)]
        problems += _type_problems({name: fields[name] for name in known & set(fields)})
        if not problems:
            try:
                return cls(**{**fields, **{name: tuple(fields[name]) for name in _SERIES}})
            except MeasurementError as error:
                problems = [str(error)]
        raise FileFormatError(
            "measurement: " + "; ".join(sorted(problems)) + "; the file is corrupt, measure again"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _type_problems(fields: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, value in fields.items():
        if name in _SERIES:
            wrong = not isinstance(value, list) or not all(_is_number(item) for item in value)
            expected = "a list of numbers"
        elif name in _COUNTS:
            wrong, expected = not isinstance(value, int) or isinstance(value, bool), "an integer"
        elif name in _RECORDS:
            wrong, expected = not isinstance(value, dict), "an object"
        else:
            wrong, expected = not _is_number(value), "a number"
        if wrong:
            problems.append(f"`{name}` is {value!r}, expected {expected}")
    return problems
