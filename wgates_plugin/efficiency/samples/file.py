"""The append-only file of latency samples: JSON lines, checked when read, never executed."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.samples.lines import (
    check_header,
    complete_lines,
    content_of,
    new_header,
    read_header,
)
from wgates_plugin.efficiency.samples.record import Sample, Source, comparable
from wgates_plugin.efficiency.samples.writer import SampleWriter, claimed
from wgates_plugin.errors import FileFormatError, MeasurementError
from wgates_plugin.files import create_text
from wgates_plugin.latency.environment import describe_environment
from wgates_plugin.latency.measurement import Measurement

logger = logging.getLogger("wgates_plugin")

DENSE = {"network": "untouched"}
"""The reference of a source whose samples were timed against the untouched network."""

_NO_SAMPLE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a line of any content may raise while it is read and recomputed."""


@dataclass
class SampleFile:
    """Measured widths of one network on one runtime.

    A header line, then `source` lines (a machine and its reference) and `sample` lines, of which
    `rejected` is a kind. Samples of machines, or of versions of libraries, that do not compare with
    the present ones stay in the file and out of everything used for fitting: `widths`,
    `latencies_ms`, `layers_ms`, `usable` and the length. Another runtime, or another version of the
    runtime's own library, needs another file.

    One process at a time writes: from `open` on until `close`, until the object is gone, or until
    the process ends. It may be used in a `with` statement.

    Attributes:
        environment: the present one, as `here` describes it.
        sources: id -> source. samples: all that count, of every source. rejected: those that do not.
        allowed: ids of sources that are used although their environment is another.
        clock_ms: latency of the untouched network that `latencies_ms` are given by. Sources of
            another clock are brought to this one by their ratios; None leaves each its own.
        ties: source id -> what its latencies are multiplied by, see `LatencyStudy.tie`.
    """

    path: Path
    header: dict[str, Any]
    environment: dict[str, Any]
    sources: dict[int, Source] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    rejected: list[Sample] = field(default_factory=list)
    allowed: frozenset[int] = frozenset()
    clock_ms: float | None = None
    ties: dict[int, float] = field(default_factory=dict)
    _writer: SampleWriter = field(kw_only=True, repr=False, compare=False)

    @classmethod
    def open(
        cls,
        path: str | Path,
        space: ChannelSpace,
        identity: Mapping[str, Any],
        *,
        environment: Mapping[str, Any] | None = None,
        allow: Collection[int] = (),
    ) -> SampleFile:
        """Continue the file at `path`, or start it; a torn last line is cut off.

        Args:
            identity: the runtime's `identity`.
            environment: of this process; by default `describe_environment()`.
            allow: ids of sources whose samples count whatever their environment.

        Raises:
            FileFormatError: corrupt, of version 1, for another network, or of another runtime.
            FileInUseError: another process has it open for writing; `load` reads it all the same.
        """
        path, kept = Path(path), _kept(identity)
        here = {
            **(describe_environment() if environment is None else environment),
            "device_name": identity.get("device_name"),
        }
        if not path.exists():
            create_text(path, new_header(space, kept))
        mine = claimed(path)
        file = cls._read(path, here, (space, kept))
        file._writer.begin(mine)
        if missing := set(allow) - set(file.sources):
            raise FileFormatError(
                f"samples `{path}`: source {min(missing)} is allowed but not in the file; it has "
                f"{', '.join(map(str, file.sources)) or 'none'}"
            )
        file.allowed = frozenset(allow)
        if aside := file.set_aside():
            logger.info(
                "samples `%s`: %d of %d were taken in another environment and are set aside: %s",
                path, sum(aside.values()), len(file.samples), file.differences(),
            )  # fmt: skip
        return file

    @classmethod
    def load(cls, path: str | Path, *, environment: Mapping[str, Any] | None = None) -> SampleFile:
        """Read the file and leave it as it is, a torn last line included.

        Raises:
            FileFormatError: names the line, what is wrong with it and what to do.
        """
        return cls._read(Path(path), environment or describe_environment(), None)

    @classmethod
    def check(cls, path: str | Path, space: ChannelSpace, identity: Mapping[str, Any]) -> None:
        """Refuse what `open` would; the file is left as it is.

        Raises:
            FileFormatError: no such file, corrupt, for another network, or of another runtime.
        """
        cls._read(Path(path), describe_environment(), (space, _kept(identity)))

    @classmethod
    def _read(
        cls,
        path: Path,
        environment: Mapping[str, Any],
        expected: tuple[ChannelSpace, Mapping[str, Any]] | None,
    ) -> SampleFile:
        content = content_of(path)
        lines = complete_lines(content)
        header = read_header(path, lines)
        if expected is not None:
            check_header(path, header, *expected)
        space = None if expected is None else expected[0]
        writer = SampleWriter(path, len(content))
        file = cls(path, header, dict(environment), _writer=writer)
        for number, line in enumerate(lines[1:], 2):
            try:
                file._take(json.loads(line), space)
            except _NO_SAMPLE as error:
                raise FileFormatError(
                    f"samples `{path}` line {number}: not a sample ({error!r}); "
                    "remove that line, or delete the file and sample again"
                ) from error
        return file

    def _take(self, value: Any, space: ChannelSpace | None) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}, expected an object")
        kind = value.get("type")
        if kind == "source":
            source = Source.from_json(value)
            if source.id in self.sources:
                raise ValueError(f"source {source.id} is there already")
            self.sources[source.id] = source
        elif kind in ("sample", "rejected"):
            sample = Sample.from_json(value, self.sources, space)
            (self.samples if kind == "sample" else self.rejected).append(sample)
        else:
            raise ValueError(f"type {kind!r}, expected source, sample or rejected")

    # Writing

    def close(self) -> None:
        """Let other processes write to the file. What it holds can still be read here."""
        self._writer.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def source(
        self,
        reference_ms: float,
        *,
        reference: Mapping[str, Any] = DENSE,
        environment: Mapping[str, Any] | None = None,
        worker: str = "main",
    ) -> Source:
        """The source with these facts; it is written when the file has none such."""
        own = self.environment if environment is None else {"device_name": None, **environment}
        if own["device_name"] is None:
            own = {**own, "device_name": self.environment.get("device_name")}
        wanted = (float(reference_ms), json.loads(json.dumps(reference)), worker)
        for known in self.sources.values():
            same = (known.reference_ms, known.reference, known.worker) == wanted
            if same and self.compares(known.environment, own):
                return known
        source = Source(max(self.sources, default=-1) + 1, dict(own), wanted[0], wanted[1], worker)
        self._writer.append(source.to_json())
        self.sources[source.id] = source
        return source

    def add(
        self,
        widths: Sequence[int],
        found: Measurement,
        source: Source | None = None,
        *,
        layers_ms: Mapping[str, float] | None = None,
        why: str | None = None,
    ) -> Sample:
        """Append one measurement; with `why`, as one that is not trusted.

        Args:
            source: by default this process, with the untouched network as its reference.

        Raises:
            FileInUseError: another process writes the file, or wrote it since it was read.
            FileFormatError: it cannot be written, as on a full disk; it is as it was before.
            MeasurementError: the measurement had no reference, so its raw times give no ratio; or
                they give another than it claims.
        """
        if not found.reference_samples_ms:
            raise MeasurementError(
                "samples: a measurement without a reference cannot be kept; measure against one"
            )
        if source is None:
            source = self.source(found.reference_ms, environment=found.environment)
        widths = tuple(int(width) for width in widths)
        repeat = why is None and any(other.widths == widths for other in self.usable)
        sample = Sample.of(widths, found, source, layers_ms=layers_ms, repeat=repeat, why=why)
        try:
            sample.check(source)
        except ValueError as error:
            raise MeasurementError(
                f"samples `{self.path}`: {error}; the measurement contradicts itself, take it again"
            ) from error
        self._writer.append(sample.to_json())
        (self.samples if why is None else self.rejected).append(sample)
        return sample

    # Reading

    def _comparable(self, environment: Mapping[str, Any]) -> dict[str, Any]:
        return comparable(environment, self.header["identity"].get("library"))

    def compares(self, first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
        """Whether latencies taken in these two environments belong together."""
        return self._comparable(first) == self._comparable(second)

    def _usable_ids(self) -> set[int]:
        here = self._comparable(self.environment)
        return {
            number
            for number, source in self.sources.items()
            if number in self.allowed or self._comparable(source.environment) == here
        }

    @property
    def usable(self) -> list[Sample]:
        """Trusted samples of environments equal to the present one, and of allowed sources."""
        ids = self._usable_ids()
        return [sample for sample in self.samples if sample.source in ids]

    def last_clock(self) -> float | None:
        """Latency of the untouched network, ms, as the newest usable source has it."""
        ids = self._usable_ids()
        known = [source.dense_ms for number, source in self.sources.items() if number in ids]
        return known[-1] if known else None

    def set_aside(self) -> dict[int, int]:
        """Source id -> number of its samples that are kept but not used."""
        ids = self._usable_ids()
        others = [sample.source for sample in self.samples if sample.source not in ids]
        return {number: others.count(number) for number in sorted(set(others))}

    def differences(self) -> str:
        """In what the environments of the sources set aside differ from the present one."""
        here = self._comparable(self.environment)
        found = []
        for number in self.set_aside():
            there = self._comparable(self.sources[number].environment)
            facts = [f"{n} {there[n]!r}, here {here[n]!r}" for n in here if there[n] != here[n]]
            found.append(f"source {number}: {'; '.join(facts)}")
        return " | ".join(found)

    @property
    def widths(self) -> list[tuple[int, ...]]:
        return [sample.widths for sample in self.usable]

    @property
    def latencies_ms(self) -> list[float]:
        return [self.latency_of(sample) for sample in self.usable]

    def latency_of(self, sample: Sample) -> float:
        """Milliseconds of a sample by the file's clock."""
        dense_ms = self.sources[sample.source].dense_ms
        latency_ms = sample.latency_ms * self.ties.get(sample.source, 1.0)
        if self.clock_ms is None or self.clock_ms == dense_ms:
            return latency_ms
        return latency_ms * self.clock_ms / dense_ms

    @property
    def layers_ms(self) -> list[dict[str, float] | None]:
        """Layer name -> ms for every usable sample; None where it was not profiled."""
        return [sample.layers_ms for sample in self.usable]

    @property
    def distinct(self) -> int:
        """Different widths among the usable samples."""
        return len(set(self.widths))

    def __len__(self) -> int:
        return len(self.usable)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.usable)


def _kept(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What of a runtime's identity the header holds. The chip is part of the environment: its samples
    are kept apart, not refused."""
    kept = {name: value for name, value in identity.items() if name != "device_name"}
    found: dict[str, Any] = json.loads(json.dumps(kept))
    return found
