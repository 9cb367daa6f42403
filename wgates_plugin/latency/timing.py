"""Honest timing: candidate and reference interleaved, per-round minima, a median of ratios.

On a shared machine a lone median drifts by 6-26 % between minutes, because the machine does. Two
networks timed within the same few milliseconds drift together, so their ratio holds to about 1 %.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from wgates_plugin.errors import MeasurementError
from wgates_plugin.latency.base import Session
from wgates_plugin.latency.environment import describe_environment
from wgates_plugin.latency.measurement import Measurement, half_interquartile_range

_BLOCK_MS = 15.0
_WARMUP_SECONDS = 0.5
_MOST_PER_BLOCK = 2000


def measure(
    session: Session,
    *,
    reference: Session | None = None,
    reference_ms: float | None = None,
    seconds: float = 1.0,
    min_rounds: int = 8,
    warmup: int = 5,
    identity: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> Measurement:
    """Time one inference of `session`.

    Each round runs a block of inferences (about 15 ms, at least one) of the candidate and of the
    reference, in alternating order, and keeps the least time of each block:

        ratio = median_i(candidate_i / reference_i),  latency_ms = ratio * reference_ms

    Without a reference, `latency_ms` is the median of the candidate's minima; this is how a
    reference is calibrated.

    Args:
        reference: another session, on the same runtime and settings.
        reference_ms: its calibrated latency; by default the median of its minima in this very
            measurement.
        seconds: rounds are added until their inferences took this long together, the reference's
            included.
        min_rounds: least number of rounds, however long they take.
        warmup: most untimed inferences of each session beforehand; slow ones get fewer.
        identity: the runtime's `identity`; by default what the session carries.
        environment: by default `describe_environment()`.
        clock_ns: the clock, in nanoseconds.

    Raises:
        MeasurementError: an argument makes no sense, or a time is not finite and positive.
    """
    _check_arguments(reference, reference_ms, seconds, min_rounds, warmup)
    started = clock_ns()
    sessions = [session] if reference is None else [session, reference]
    with _no_garbage_collection():
        warmed = [_warm_up(each, warmup, clock_ns) for each in sessions]
        counts = [_block_length(estimate) for _, estimate in warmed]
        minima: list[list[float]] = [[] for _ in sessions]
        spent_ms = 0.0
        while len(minima[0]) < min_rounds or spent_ms < seconds * 1e3:
            order = list(range(len(sessions)))
            if len(minima[0]) % 2:
                order.reverse()
            for index in order:
                times = _block(sessions[index], counts[index], clock_ns)
                minima[index].append(min(times))
                spent_ms += sum(times)
    samples = tuple(minima[0])
    reference_samples = tuple(minima[1]) if reference is not None else ()
    if reference is None:
        reference_ms = statistics.median(samples)
        ratio = 1.0
        spread = half_interquartile_range(samples) / reference_ms
    else:
        if reference_ms is None:
            reference_ms = statistics.median(reference_samples)
        ratios = [mine / other for mine, other in zip(samples, reference_samples, strict=True)]
        ratio = statistics.median(ratios)
        spread = half_interquartile_range(ratios)
    if identity is None:
        identity = getattr(session, "identity", {})
    if environment is None:
        environment = describe_environment()
    return Measurement(
        latency_ms=ratio * reference_ms,
        ratio=ratio,
        ratio_spread=spread,
        samples_ms=samples,
        reference_samples_ms=reference_samples,
        reference_ms=float(reference_ms),
        median_ms=statistics.median(samples),
        minimum_ms=min(samples),
        rounds=len(samples),
        warmup=warmed[0][0],
        inference_seconds=spent_ms / 1e3,
        seconds=(clock_ns() - started) / 1e9,
        identity=dict(identity),
        environment=dict(environment),
    )


def _check_arguments(
    reference: Session | None,
    reference_ms: float | None,
    seconds: float,
    min_rounds: int,
    warmup: int,
) -> None:
    problems = []
    if reference_ms is not None:
        if reference is None:
            problems.append("`reference_ms` is given without a `reference`")
        if not (math.isfinite(reference_ms) and reference_ms > 0):
            problems.append(f"`reference_ms` is {reference_ms!r}, expected a positive number")
    if not (math.isfinite(seconds) and seconds >= 0):
        problems.append(f"`seconds` is {seconds!r}, expected a number of at least 0")
    if min_rounds < 1:
        problems.append(f"`min_rounds` is {min_rounds}, expected at least 1")
    if warmup < 1:
        problems.append(f"`warmup` is {warmup}, expected at least 1")
    if problems:
        raise MeasurementError("measure: " + "; ".join(problems))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _warm_up(session: Session, most: int, clock_ns: Callable[[], int]) -> tuple[int, float]:
    """Run until warm; returns the number of runs and the least time seen, ms."""
    times: list[float] = []
    while len(times) < most and sum(times) < _WARMUP_SECONDS * 1e3:
        times += _block(session, 1, clock_ns)
    return len(times), min(times)


def _block_length(estimate_ms: float) -> int:
    return max(1, min(_MOST_PER_BLOCK, math.ceil(_BLOCK_MS / estimate_ms)))


def _block(session: Session, count: int, clock_ns: Callable[[], int]) -> list[float]:
    """Times of `count` inferences in a row, ms."""
    active = getattr(session, "active", nullcontext)
    elapsed_ms = getattr(session, "elapsed_ms", None)
    times: list[float] = []
    with active():
        for _ in range(count):
            if elapsed_ms is not None:
                times.append(float(elapsed_ms()))
                continue
            start = clock_ns()
            session.run()
            times.append((clock_ns() - start) / 1e6)
    wrong = [value for value in times if not (math.isfinite(value) and value > 0)]
    if wrong:
        raise MeasurementError(
            f"measure: one inference took {wrong[0]!r} ms; expected a finite positive time, check "
            "the session's clock and that it waits for the device to finish"
        )
    return times
