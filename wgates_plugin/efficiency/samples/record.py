"""One line of a sample file: where latencies were taken, and one latency with its raw times."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wgates_plugin.latency.measurement import Measurement

if TYPE_CHECKING:
    from wgates_plugin.channels import ChannelSpace

_DIGITS = 5
"""Of raw times: clocks repeat to about 1 %, and five digits lose a thousandth of that."""
_AGREES = 1e-4
_MACHINE = (
    "cpu", "cpu_capability", "machine", "os", "python", "cores", "gpu", "cuda", "cudnn",
    "device_name",
)  # fmt: skip


def comparable(environment: Mapping[str, Any], library: str | None = None) -> dict[str, Any]:
    """What of an environment moves latency: two samples compare when this is equal for both.

    The machine, Python, torch (which exports or runs the network) and the runtime's `library`;
    versions of what merely happens to be installed do not count.
    """
    libraries = environment.get("libraries") or {}
    versions = {name: libraries.get(name) for name in ("torch", library) if name}
    return {**{name: environment.get(name) for name in _MACHINE}, "libraries": versions}


def rounded(value: float, digits: int = _DIGITS) -> float:
    """`value` to so many significant digits.

    Example:
        >>> rounded(12.345678), rounded(0.00012345678)
        (12.346, 0.00012346)
    """
    return float(f"{value:.{digits}g}")


@dataclass(frozen=True)
class Source:
    """Where samples come from: a machine, a worker on it, and what everything was timed against.

    Attributes:
        id: number within the file; samples name it.
        environment: `describe_environment()` of the worker, and the device's name.
        reference_ms: latency of the reference network in the clock of the untouched one; the
            `latency_ms` of a sample is its `ratio` times this.
        reference: what network the reference is and how it was calibrated, as plain JSON values.
        worker: name of the process that measured.
    """

    id: int
    environment: dict[str, Any]
    reference_ms: float
    reference: dict[str, Any]
    worker: str

    @property
    def dense_ms(self) -> float:
        """The clock: latency of the untouched network by which `reference_ms` is given."""
        return float(self.reference.get("dense_ms", self.reference_ms))

    def to_json(self) -> dict[str, Any]:
        return {"type": "source", **vars(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Source:
        """Raises ValueError or KeyError where a field is missing or wrong."""
        source = cls(*(value[name] for name in cls.__dataclass_fields__))
        if type(source.id) is not int or not isinstance(source.worker, str):
            raise ValueError("`id` must be an integer and `worker` a name")
        if not isinstance(source.environment, dict) or not isinstance(source.reference, dict):
            raise ValueError("`environment` and `reference` must be objects")
        if not isinstance(source.environment.get("libraries") or {}, dict):
            raise ValueError("`libraries` of the environment must be an object")
        _positive("reference_ms", source.reference_ms)
        _positive("dense_ms", source.reference.get("dense_ms", source.reference_ms))
        return source


@dataclass(frozen=True)
class Sample:
    """Latency of the network at some widths, with the raw times it came from.

    Attributes:
        widths: kept channels of every group, (G,).
        source: id of the source it belongs to.
        latency_ms, ratio, ratio_spread, drift, disturbed: as in `Measurement`.
        candidate_ms, reference_ms: least time of each round, (rounds,), five digits.
        layers_ms: layer name -> ms by the runtime's own profile; None where it was not taken.
        repeat: the same widths were measured before.
        why: why the sample is not trusted; None for one that counts.
    """

    widths: tuple[int, ...]
    source: int
    latency_ms: float
    ratio: float
    ratio_spread: float
    drift: float
    candidate_ms: tuple[float, ...]
    reference_ms: tuple[float, ...]
    disturbed: int
    layers_ms: dict[str, float] | None = None
    repeat: bool = False
    why: str | None = None

    @classmethod
    def of(
        cls,
        widths: Sequence[int],
        found: Measurement,
        source: Source,
        *,
        layers_ms: Mapping[str, float] | None = None,
        repeat: bool = False,
        why: str | None = None,
    ) -> Sample:
        """The lasting part of a measurement that was taken against the reference of `source`."""
        if layers_ms is not None:
            layers_ms = {name: rounded(ms) for name, ms in layers_ms.items()}
        return cls(
            tuple(int(width) for width in widths),
            source.id,
            rounded(found.ratio * source.reference_ms, 7),
            rounded(found.ratio, 7),
            rounded(found.ratio_spread),
            rounded(found.drift * found.reference_ms / source.reference_ms),
            tuple(rounded(ms) for ms in found.samples_ms),
            tuple(rounded(ms) for ms in found.reference_samples_ms),
            found.disturbed,
            layers_ms,
            repeat,
            why,
        )

    def recomputed(self, source: Source) -> dict[str, float]:
        """`ratio`, `latency_ms` and `drift` from the raw times alone."""
        pairs = zip(self.candidate_ms, self.reference_ms, strict=True)
        ratio = statistics.median(mine / other for mine, other in pairs)
        return {
            "ratio": ratio,
            "latency_ms": ratio * source.reference_ms,
            "drift": statistics.median(self.reference_ms) / source.reference_ms,
        }

    def check(self, source: Source) -> None:
        """Raises ValueError where a figure contradicts the raw times it came from."""
        for name, derived in self.recomputed(source).items():
            claimed = getattr(self, name)
            _positive(name, claimed)
            if not math.isclose(claimed, derived, rel_tol=_AGREES):
                raise ValueError(f"`{name}` is {claimed!r} where its times give {derived:.7g}")

    def to_json(self) -> dict[str, Any]:
        value = {"type": "sample" if self.why is None else "rejected", **vars(self)}
        for name, default in (("layers_ms", None), ("repeat", False), ("why", None)):
            if value[name] == default:
                del value[name]
        return value

    @classmethod
    def from_json(
        cls, value: Mapping[str, Any], sources: Mapping[int, Source], space: ChannelSpace | None
    ) -> Sample:
        """Read a line and recompute it from its raw times.

        Args:
            space: of the network that was measured, to check the widths with; None if not known.

        Raises:
            ValueError, KeyError, TypeError, ArithmeticError: a field is missing, wrong, impossible
                for the network or contradicts the raw times.
        """
        known = set(cls.__dataclass_fields__)
        if unknown := set(value) - known - {"type"}:
            raise ValueError(f"`{min(unknown)}` is unknown")
        fields = {name: item for name, item in value.items() if name in known}
        for name in ("widths", "candidate_ms", "reference_ms"):
            if not isinstance(fields[name], list):
                raise ValueError(f"`{name}` must be a list")
            fields[name] = tuple(fields[name])
        sample = cls(**fields)
        if (value["type"] == "rejected") != (sample.why is not None):
            raise ValueError("a rejected sample, and no other, says `why`")
        if not all(type(width) is int and width > 0 for width in sample.widths):
            raise ValueError("`widths` must be positive integers")
        if space is not None:
            if len(sample.widths) != len(space.groups):
                raise ValueError(f"{len(sample.widths)} widths for {len(space.groups)} groups")
            space.check_widths(sample.widths)
        if type(sample.source) is not int or sample.source not in sources:
            raise ValueError(f"no line before names source {sample.source!r}")
        if type(sample.disturbed) is not int or sample.disturbed < 0:
            raise ValueError("`disturbed` must be a count")
        if not sample.candidate_ms or len(sample.candidate_ms) != len(sample.reference_ms):
            raise ValueError("candidate and reference need one time per round each")
        for ms in (*sample.candidate_ms, *sample.reference_ms):
            _positive("a round's time", ms)
        if type(sample.repeat) is not bool or not isinstance(sample.why, str | None):
            raise ValueError("`repeat` must be true or false, and `why` a text")
        if not isinstance(sample.layers_ms, dict | None):
            raise ValueError("`layers_ms` must be an object")
        for name, ms in (sample.layers_ms or {}).items():
            if not _is_number(ms) or ms < 0:
                raise ValueError(f"`layers_ms` of `{name}` is {ms!r}")
        if not _is_number(sample.ratio_spread) or sample.ratio_spread < 0:
            raise ValueError(f"`ratio_spread` is {sample.ratio_spread!r}")
        sample.check(sources[sample.source])
        return sample


def _is_number(value: Any) -> bool:
    """Raises OverflowError on an integer beyond all floats."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _positive(name: str, value: Any) -> None:
    if not _is_number(value) or value <= 0:
        raise ValueError(f"`{name}` is {value!r}, expected a positive number")
