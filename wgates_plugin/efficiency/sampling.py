"""Which sub-networks are measured for LPNet, and the measuring of them in one process."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.bench import Bench, Taken, Trust
from wgates_plugin.efficiency.lpnet import LEAST_SAMPLES
from wgates_plugin.efficiency.lpnet.data import common_multiple, grid_of
from wgates_plugin.efficiency.samples.file import SampleFile as SampleFile
from wgates_plugin.efficiency.samples.record import Source
from wgates_plugin.errors import MeasurementError
from wgates_plugin.latency.base import Measurement


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


@dataclass(frozen=True)
class Active:
    """After a covering part, measure where the predictor is least sure.

    Attributes:
        fit: brings the predictor up to the file.
        uncertainty: widths (N, G), float64 -> relative standard deviation of the prediction (N,).
        covering: samples drawn over the whole space first; a predictor that has seen less knows
            too little of what it does not know.
        candidates: random widths that one choice is made from.
        towards: further candidates, asked for before each batch: widths that the optimiser goes to.
        refit_every: samples per batch; the predictor is brought up to the file before each.
        apart: least distance of two picks of one batch, as the mean over groups of the
            difference over the channel count. What makes one uncertain makes its twin uncertain.
    """

    fit: Callable[[SampleFile], object]
    uncertainty: Callable[[Tensor], Tensor]
    covering: int = 40
    candidates: int = 300
    towards: Callable[[], Sequence[Sequence[int]]] = tuple
    refit_every: int = 8
    apart: float = 0.05


@dataclass
class Proposals:
    """Widths to measure next, none twice; the n-th of the covering part depends on seed and n alone.

    A pure plan: what it proposes must be measured by the caller and put into the file.
    """

    file: SampleFile
    space: ChannelSpace
    count: int
    grid: int
    seed: int
    active: Active | None = None
    _seen: set[tuple[int, ...]] = field(init=False)
    _attempt: int = 0
    _exhausted: bool = False
    _batch: deque[tuple[int, ...]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._seen = set(self.file.widths)

    def next(self) -> tuple[int, ...] | None:
        """Widths (G,), or None when the file will hold `count` of them or there are no others."""
        if len(self._seen) >= self.count or self._exhausted:
            return None
        widths = self._least_sure() if self._learns else self._covering()
        if widths is None:
            self._exhausted = True
        else:
            self._seen.add(widths)
        return widths

    @property
    def about_to_fit(self) -> bool:
        """Whether `next` will learn from the file: all that was proposed should be in it by then, and
        nothing be timed beside it."""
        return self._learns and not self._batch and len(self._seen) < self.count

    @property
    def _learns(self) -> bool:
        active = self.active
        return active is not None and len(self._seen) >= min(active.covering, self.count)

    def _covering(self) -> tuple[int, ...] | None:
        while self._attempt < 50 * self.count + 1000:
            rng = np.random.default_rng([self.seed, self._attempt])
            self._attempt += 1
            widths = draw_widths(self.space, self.grid, rng)
            if widths not in self._seen:
                return widths
        return None  # a coarse grid on a narrow network has no more to show

    def _least_sure(self) -> tuple[int, ...] | None:
        if not self._batch:
            assert self.active is not None
            self.active.fit(self.file)
            self._batch.extend(self._next_batch(self.active))
        return self._batch.popleft() if self._batch else self._covering()

    def _next_batch(self, active: Active) -> list[tuple[int, ...]]:
        """The least sure candidates first, each well away from those before it.

        Where too few are far enough from each other, the batch is shorter.
        """
        rng = np.random.default_rng([self.seed, len(self._seen), 1])
        drawn = [draw_widths(self.space, self.grid, rng) for _ in range(active.candidates)]
        given = [self.space.check_widths(widths) for widths in active.towards()]
        candidates = [w for w in dict.fromkeys([*given, *drawn]) if w not in self._seen]
        if not candidates:
            return []
        rows = torch.tensor(candidates, dtype=torch.float64)
        unsure = active.uncertainty(rows)
        if unsure.shape != (len(rows),) or not torch.isfinite(unsure).all():
            raise MeasurementError(
                f"active sampling: `uncertainty` gave shape {tuple(unsure.shape)} for "
                f"{len(rows)} widths, or a number that is not finite; return one per row"
            )
        shares = rows / torch.tensor(self.space.full_widths, dtype=torch.float64)
        picked: list[int] = []
        for index in unsure.argsort(descending=True, stable=True).tolist():
            apart = [float((shares[index] - shares[other]).abs().mean()) for other in picked]
            if all(distance >= active.apart for distance in apart):
                picked.append(index)
            if len(picked) == active.refit_every:
                break
        return [candidates[index] for index in picked]


@dataclass(frozen=True)
class SamplingCost:
    """Wall time of a sampling run, and how much of it its workers together spent inside timed
    inference (s)."""

    seconds: float
    inference_seconds: float
    workers: int = 1

    @property
    def share_in_inference(self) -> float:
        """Of the time that all workers had."""
        there = self.seconds * self.workers
        return self.inference_seconds / there if there else 0.0


def collect(
    file: SampleFile,
    space: ChannelSpace,
    bench: Bench,
    *,
    count: int,
    grid: int,
    seed: int,
    seconds_per_sample: float = 0.5,
    trust: Trust | None = None,
    active: Active | None = None,
    profile: bool = True,
    on_sample: Callable[[int, Measurement], None] | None = None,
) -> SamplingCost:
    """Measure sub-networks until the file holds `count` different usable ones.

    Where the grid leaves fewer different widths than that, all that turn up are measured.
    The n-th sample depends on `seed` and n alone (in the covering part, where there is an
    `active`), so that an interrupted run goes on where it was.

    Raises:
        MeasurementError: there are too few different widths to fit anything, or all latencies are
            the same. What was measured stays in the file.
    """
    started, inside = time.perf_counter(), 0.0
    check_they_differ(file)
    check_space(space, count, grid)
    proposals = Proposals(file, space, count, grid, seed, active)
    source = file.source(bench.reference_ms, reference=bench.about, environment=bench.environment)
    while (widths := proposals.next()) is not None:
        taken = bench.take(widths, seconds_per_sample, trust=trust, profile=profile)
        inside += taken.inference_seconds
        keep(file, widths, taken, source, on_sample)
    check_enough(file, count, grid)
    return SamplingCost(time.perf_counter() - started, inside)


def keep(
    file: SampleFile,
    widths: Sequence[int],
    taken: Taken,
    source: Source,
    on_sample: Callable[[int, Measurement], None] | None,
) -> None:
    """Append a sample, and before it the attempts that were not trusted; then tell `on_sample`.

    Raises:
        MeasurementError: all latencies so far are the same; the sample is in the file.
    """
    for found, why in taken.rejected:
        file.add(widths, found, source, why=why)
    file.add(widths, taken.found, source, layers_ms=taken.layers_ms)
    check_they_differ(file)
    if on_sample is not None:
        on_sample(file.distinct, taken.found)


def different_widths(space: ChannelSpace, grid: int) -> int:
    """How many networks there are on a grid."""
    return math.prod(len(widths) for widths in space.allowed_widths(grid))


def check_space(space: ChannelSpace, count: int, grid: int) -> None:
    """Raises MeasurementError, before anything is measured, where the grid leaves too few widths."""
    there = different_widths(space, grid)
    if there < min(count, LEAST_SAMPLES):
        raise _too_few(there, grid)


def check_enough(file: SampleFile, count: int, grid: int) -> None:
    """Raises MeasurementError where the space has too few different widths for a fit."""
    if file.distinct < min(count, LEAST_SAMPLES):
        raise _too_few(file.distinct, grid)


def _too_few(there: int, grid: int) -> MeasurementError:
    return MeasurementError(
        f"sampling: only {there} different widths on a grid of {grid}, at least {LEAST_SAMPLES} "
        "are needed; use a finer grid or lower floors"
    )


def mixed_grids(space: ChannelSpace, rows: Sequence[Sequence[int]], grid: int | None) -> list[str]:
    """What to say where kept widths (N, G) lie on another grid than the one asked for now."""
    there = grid_of(space, rows)
    here = None if grid is None else common_multiple(space, space.allowed_widths(grid))
    if there is None or here is None or there == here:
        return []
    return [
        f"the {len(rows)} kept samples are on multiples of {there} channels, new ones on multiples "
        f"of {here}; LPNet learns from both. To keep them apart, use another --samples-file"
    ]


def check_they_differ(file: SampleFile) -> None:
    """Refuse a file in which many different widths all took exactly the same time.

    Raises:
        MeasurementError: a clock that stands still, or a runtime that never saw the widths.
    """
    if file.distinct >= LEAST_SAMPLES and len(set(file.latencies_ms)) == 1:
        raise MeasurementError(
            f"sampling: {file.distinct} different widths in `{file.path}` all took exactly "
            f"{file.latencies_ms[0]:.6g} ms; the clock stands still or the runtime does not see "
            "the widths. Check both; what was measured is kept, sample into another file"
        )
