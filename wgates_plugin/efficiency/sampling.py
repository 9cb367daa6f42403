"""Measuring sub-networks for LPNet: which widths, and an append-only file of what was seen."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.errors import FileFormatError, MeasurementError
from wgates_plugin.files import append_line, write_text
from wgates_plugin.latency.base import Family, Measurement, Session
from wgates_plugin.latency.timing import measure

LEAST_SAMPLES = 8
"""Fewer measurements than this fit no LPNet."""


def draw_widths(space: ChannelSpace, grid: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Random widths on the grid: one overall share, and each group a little off it.

    The overall share covers everything from the floors to the full network; independent shares per
    group alone would all cost about the same.
    """
    share = rng.uniform(0.05, 1.0)
    spread = rng.uniform(0.0, 0.5)
    widths = []
    for allowed in space.allowed_widths(grid):
        wanted = np.clip(share * np.exp(spread * rng.standard_normal()), 0.0, 1.0) * allowed[-1]
        widths.append(min(allowed, key=lambda w: (abs(w - wanted), w)))
    return tuple(widths)


@dataclass
class SampleFile:
    """Measured widths of one network on one runtime: a header line, then one JSON line per sample.

    A broken last line (a crash in mid-write) is dropped; anything else that does not parse, another
    network or another runtime is refused.
    """

    path: Path
    header: dict[str, Any]
    widths: list[tuple[int, ...]] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)

    @classmethod
    def open(
        cls, path: str | Path, space: ChannelSpace, identity: dict[str, Any], reference_ms: float
    ) -> SampleFile:
        """Continue the file at `path`, or start it.

        Raises:
            FileFormatError: corrupt, for another network, or taken on another runtime.
        """
        path = Path(path)
        header = {
            "kind": "latency-samples",
            "version": 1,
            "fingerprint": space.fingerprint,
            "identity": identity,
            "reference_ms": reference_ms,
        }
        if not path.exists():
            write_text(path, json.dumps(header, allow_nan=False) + "\n")
            return cls(path, header)
        file = cls.load(path)
        if file.header["fingerprint"] != space.fingerprint:
            raise FileFormatError(
                f"samples `{path}`: measured on another network (fingerprint "
                f"{file.header['fingerprint']}, this one has {space.fingerprint}); use another file"
            )
        if file.header["identity"] != json.loads(json.dumps(identity)):
            raise FileFormatError(
                f"samples `{path}`: measured on {file.header['identity']}, this is {identity}; "
                "use another file per runtime and machine"
            )
        wrong = [w for w in file.widths if len(w) != len(space.groups)]
        if wrong:
            raise FileFormatError(
                f"samples `{path}`: a sample has {len(wrong[0])} widths for {len(space.groups)} "
                "groups; delete the file and sample again"
            )
        return file

    @classmethod
    def load(cls, path: str | Path) -> SampleFile:
        path = Path(path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            header = json.loads(lines[0])
            if header["kind"] != "latency-samples" or header["version"] != 1:
                raise KeyError("kind")
        except (OSError, UnicodeDecodeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise FileFormatError(
                f"samples `{path}`: no readable header ({error!r}); delete the file and sample again"
            ) from error
        file = cls(path, header)
        for number, line in enumerate(lines[1:], 2):
            try:
                record = json.loads(line)
                widths = tuple(int(width) for width in record["widths"])
                measurement = Measurement.from_json(record["measurement"])
            except (KeyError, TypeError, ValueError, MeasurementError) as error:
                if _is_torn(line):
                    continue  # cut off in mid-write; the sample is simply taken again
                raise FileFormatError(
                    f"samples `{path}` line {number}: not a sample ({error!r}); remove that line"
                ) from error
            file.widths.append(widths)
            file.measurements.append(measurement)
        return file

    def add(self, widths: Sequence[int], measurement: Measurement) -> None:
        append_line(self.path, {"widths": list(widths), "measurement": measurement.to_json()})
        self.widths.append(tuple(widths))
        self.measurements.append(measurement)

    @property
    def latencies_ms(self) -> list[float]:
        return [measurement.latency_ms for measurement in self.measurements]

    def __len__(self) -> int:
        return len(self.widths)


def _is_torn(line: str) -> bool:
    """A line that is no complete JSON value, as an interrupted write leaves it."""
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


@dataclass(frozen=True)
class SamplingCost:
    """Wall time of a sampling run, and how much of it was spent inside timed inference (s)."""

    seconds: float
    inference_seconds: float

    @property
    def share_in_inference(self) -> float:
        return self.inference_seconds / self.seconds if self.seconds else 0.0


def collect(
    file: SampleFile,
    space: ChannelSpace,
    family: Family,
    reference: Session,
    *,
    count: int,
    grid: int,
    seed: int,
    seconds_per_sample: float = 0.5,
    on_sample: Callable[[int, Measurement], None] | None = None,
) -> SamplingCost:
    """Measure random widths until the file holds `count` samples; no widths twice.

    Where the grid leaves fewer different widths than that, all that turn up are measured.
    The n-th sample depends on `seed` and n alone, so that an interrupted run goes on where it was.
    """
    started, inside = time.perf_counter(), 0.0
    seen = set(file.widths)
    attempt = 0
    while len(file) < count:
        rng = np.random.default_rng([seed, attempt])
        attempt += 1
        widths = draw_widths(space, grid, rng)
        if widths in seen:
            if attempt < 50 * count + 1000:
                continue
            if len(file) >= LEAST_SAMPLES:
                break  # a coarse grid on a narrow network has no more to show
            raise MeasurementError(
                f"sampling: only {len(file)} different widths on a grid of {grid}, at least "
                f"{LEAST_SAMPLES} are needed; use a finer grid or lower floors"
            )
        seen.add(widths)
        measurement = measure_widths(
            family, widths, reference, file.header["reference_ms"], seconds_per_sample
        )
        inside += measurement.inference_seconds
        file.add(widths, measurement)
        if on_sample is not None:
            on_sample(len(file), measurement)
    return SamplingCost(time.perf_counter() - started, inside)


def measure_widths(
    family: Family,
    widths: Sequence[int],
    reference: Session,
    reference_ms: float,
    seconds: float,
) -> Measurement:
    """Latency at `widths`, interleaved with the reference."""
    session = family.session(widths)
    try:
        return measure(session, reference=reference, reference_ms=reference_ms, seconds=seconds)
    finally:
        session.close()
