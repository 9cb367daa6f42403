"""What a line of the scoreboard is before it is filled in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tools.records import read_record


@dataclass(frozen=True)
class Claim:
    """One line of the scoreboard before it is filled in.

    Attributes:
        better: "lower" or "higher".
        most: an upper end as well, for what must lie within a band.
        source: where the value is read, under benchmarks/, and what to know about it.
        value: reads the value from a results folder; None when the result is not there.
        interval: reads how sure that is, for what is shown with a 95 % interval.
    """

    name: str
    bar: float | None
    better: str
    source: str
    value: Callable[[Path], float | None]
    most: float | None = None
    interval: Callable[[Path], tuple[float, float] | None] | None = None


def number(benchmark: str, *keys: str) -> Callable[[Path], float | None]:
    """Reader of one number in the record of `benchmark`."""

    def read(folder: Path) -> float | None:
        record = read_record(folder, benchmark)
        value = None if record is None else record["numbers"]
        for key in keys:
            value = None if value is None else value.get(key)
        return None if value is None else float(value)

    return read
