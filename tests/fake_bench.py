"""Sub-networks whose latency is a formula: no test depends on the machine's clock."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wgates_plugin import ChannelSpace
from wgates_plugin.efficiency import MacsModel
from wgates_plugin.efficiency.bench import Bench
from wgates_plugin.latency.environment import describe_environment
from wgates_plugin.latency.measurement import Measurement
from wgates_plugin.latency.timing import measure
from wgates_plugin.latency_study import LatencyStudy

IDENTITY = {"runtime": "staircase"}
REFERENCE_MS = 2.0


def staircase_ms(space: ChannelSpace, widths: Sequence[int]) -> float:
    """A runtime that works in blocks of 4 channels: exact MACs at widths rounded up, and a floor."""
    blocks = [
        min(math.ceil(w / 4) * 4, g.channels) for w, g in zip(widths, space.groups, strict=True)
    ]
    return 0.2 + 1e-4 * float(MacsModel(space)(torch.tensor(blocks)))


class SteadySession:
    """Claims a time by a clock of its own; a list of times is gone through again and again."""

    def __init__(self, *latencies_ms: float) -> None:
        self.latencies_ms, self.runs = latencies_ms, 0
        self.identity = dict(IDENTITY)
        self.closed = False

    def run(self) -> None: ...

    def outputs(self) -> list[Tensor]:
        return []

    def elapsed_ms(self) -> float:
        self.runs += 1
        return self.latencies_ms[(self.runs - 1) % len(self.latencies_ms)]

    def close(self) -> None:
        self.closed = True


class SteadyFamily:
    def __init__(self, space: ChannelSpace, time_ms: Callable[..., float] = staircase_ms) -> None:
        self.space, self.time_ms = space, time_ms
        self.sessions: list[SteadySession] = []

    def session(self, widths: Sequence[int]) -> SteadySession:
        self.sessions.append(SteadySession(self.time_ms(self.space, widths)))
        return self.sessions[-1]


def measured(latency_ms: float) -> Measurement:
    return measure(
        SteadySession(latency_ms),
        reference=SteadySession(REFERENCE_MS),
        reference_ms=REFERENCE_MS,
        seconds=0.0,
        min_rounds=2,
    )


def steady_bench(space: ChannelSpace) -> Bench:
    return Bench(SteadyFamily(space), SteadySession(REFERENCE_MS), REFERENCE_MS)


def steady_studies(monkeypatch: pytest.MonkeyPatch, *, floor: float = 0.0) -> None:
    """All studies measure a share of the untouched network's time: `floor`, and the rest by channels."""

    def time_ms(space: ChannelSpace, widths: Sequence[int]) -> float:
        return REFERENCE_MS * (floor + (1 - floor) * sum(widths) / sum(space.full_widths))

    family = property(lambda study: SteadyFamily(study.space, time_ms))
    monkeypatch.setattr(LatencyStudy, "family", family)
    monkeypatch.setattr(LatencyStudy, "reference", SteadySession(REFERENCE_MS))


@dataclass
class FarmBench:
    """Makes a worker's bench. The worker that meets `deadly` while `marker` is absent dies there."""

    space: ChannelSpace
    marker: Path | None = None
    deadly: tuple[int, ...] | None = None
    always: bool = False
    cpu: str | None = None

    def __call__(self) -> Bench:
        bench = steady_bench(self.space)
        bench.environment = describe_environment()
        if self.cpu is not None:
            bench.environment["cpu"] = self.cpu
        make = bench.family.session

        def session(widths: Sequence[int]) -> SteadySession:
            if tuple(widths) == self.deadly and (self.always or not self.marker.exists()):
                if self.marker is not None:
                    self.marker.write_text(str(os.getpid()))
                os._exit(1)
            return make(widths)

        bench.family.session = session
        return bench
