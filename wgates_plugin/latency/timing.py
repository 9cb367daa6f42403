"""Honest timing: candidate and reference interleaved, per-round minima, a median of ratios.

Both get blocks of the same number of inferences: the least of many draws lies lower than the least
of few, so blocks of equal duration would flatter the faster one.

An inference during which the scheduler took the processor away says nothing about the network. It is
recognised by the process's involuntary context switches; on one thread it counts with the processor
time it used instead of the wall's, otherwise it is taken again.

On a shared machine a lone median drifts by 6-26 % between minutes, because the machine does. Two
networks timed within the same few milliseconds drift together, so their ratio holds to about 1 %.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from wgates_plugin.errors import MeasurementError
from wgates_plugin.latency.base import Session
from wgates_plugin.latency.environment import describe_environment
from wgates_plugin.latency.measurement import Measurement, half_interquartile_range

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

_BLOCK_MS = 15.0
_LONGEST_BLOCK_MS = 60.0
_FEWEST_AT_LENGTH = 3
_WARMUP_SECONDS = 0.1
_MOST_PER_BLOCK = 2000
_PATIENCE = 4


_around: list[Callable[[], AbstractContextManager[None]]] = []


@contextmanager
def measuring_within(context: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Every `measure` of this process inside happens within a fresh `context()`.

    For what keeps others off the machine meanwhile: two networks under load do not slow down alike.
    """
    _around.append(context)
    try:
        yield
    finally:
        _around.remove(context)


@contextmanager
def _undisturbed() -> Iterator[None]:
    with ExitStack() as stack:
        for context in _around:
            stack.enter_context(context())
        yield


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
    processor_ns: Callable[[], int] = time.thread_time_ns,
    switches: Callable[[], int] | None = None,
) -> Measurement:
    """Time one inference of `session`.

    Each round runs a block of inferences of the candidate and one of the reference, in alternating
    order, and keeps the least time of each block. Both blocks hold the same number of inferences:
    as many as the faster session does in about 15 ms, but no more than the slower one does in
    60 ms (three are allowed in any case).

        ratio = median_i(candidate_i / reference_i),  latency_ms = ratio * reference_ms
        drift = median_i(reference_i) / reference_ms

    Without a reference, `latency_ms` is the median of the candidate's minima; this is how a
    reference is calibrated.

    Args:
        reference: another session, on the same runtime and settings.
        reference_ms: its calibrated latency; by default the median of its minima in this very
            measurement.
        seconds: rounds are added until their inferences took this long together, the reference's
            included.
        min_rounds: least number of rounds, however long they take.
        warmup: most untimed inferences of each session beforehand; slow ones get fewer, but two at
            the least.
        identity: the runtime's `identity`; by default what the session carries.
        environment: by default `describe_environment()`.
        clock_ns: the clock, in nanoseconds.
        processor_ns: processor time of the calling thread, in nanoseconds.
        switches: counts involuntary context switches; by default the operating system's count,
            where it has one.

    Raises:
        MeasurementError: an argument makes no sense, or a time is not finite and positive.
    """
    _check_arguments(reference, reference_ms, seconds, min_rounds, warmup)
    clock = _Clock(clock_ns, processor_ns, switches or involuntary_switches)
    started = clock_ns()
    sessions = [session] if reference is None else [session, reference]
    with _undisturbed(), _no_garbage_collection(), _paired(session, reference):
        warmed = [_warm_up(each, warmup, clock) for each in sessions]
        for each in sessions:
            getattr(each, "forget", _nothing)()
        count = _block_length([estimate for _, estimate in warmed])
        minima: list[list[float]] = [[] for _ in sessions]
        clock.spent_ms, clock.inferences, clock.disturbed = 0.0, 0, 0
        while len(minima[0]) < min_rounds or clock.spent_ms < seconds * 1e3:
            order = list(range(len(sessions)))
            if len(minima[0]) % 2:
                order.reverse()
            for index in order:
                minima[index].append(_least_of_block(sessions[index], count, clock))
    samples = tuple(minima[0])
    reference_samples = tuple(minima[1]) if reference is not None else ()
    reference_ms, ratio, spread, drift = _compared(samples, reference_samples, reference_ms)
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
        reference_ms=reference_ms,
        drift=drift,
        median_ms=statistics.median(samples),
        minimum_ms=min(samples),
        rounds=len(samples),
        warmup=warmed[0][0],
        disturbed=clock.disturbed,
        inference_seconds=clock.spent_ms / 1e3,
        seconds=(clock_ns() - started) / 1e9,
        identity=dict(identity),
        environment=dict(environment),
        inferences=clock.inferences,
    )


def _compared(
    samples: Sequence[float], reference_samples: Sequence[float], reference_ms: float | None
) -> tuple[float, float, float, float]:
    """(reference_ms, ratio, its spread, drift); a candidate without a reference is its own."""
    if not reference_samples:
        reference_ms = statistics.median(samples)
        return reference_ms, 1.0, half_interquartile_range(samples) / reference_ms, 1.0
    seen_ms = statistics.median(reference_samples)
    reference_ms = seen_ms if reference_ms is None else float(reference_ms)
    ratios = [mine / other for mine, other in zip(samples, reference_samples, strict=True)]
    ratio, spread = statistics.median(ratios), half_interquartile_range(ratios)
    return reference_ms, ratio, spread, seen_ms / reference_ms


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


class _Clock:
    """Times single inferences and notices which of them were disturbed."""

    def __init__(
        self,
        clock_ns: Callable[[], int],
        processor_ns: Callable[[], int],
        switches: Callable[[], int],
    ) -> None:
        self.now_ns, self.processor_ns, self.switches = clock_ns, processor_ns, switches
        self.spent_ms = 0.0
        self.inferences = 0
        self.disturbed = 0

    def time(self, session: Session) -> tuple[float, bool]:
        """(milliseconds of one inference, whether the figure is undisturbed)."""
        elapsed_ms = getattr(session, "elapsed_ms", None)
        before = self.switches()
        worked = self.processor_ns()
        start = self.now_ns()
        if elapsed_ms is not None:
            took = float(elapsed_ms())
        else:
            session.run()
            took = (self.now_ns() - start) / 1e6
        if not (math.isfinite(took) and took > 0):
            raise MeasurementError(
                f"measure: one inference took {took!r} ms; expected a finite positive time, check "
                "the session's clock and that it waits for the device to finish"
            )
        self.spent_ms += took
        self.inferences += 1
        if self.switches() == before or getattr(session, "timed_elsewhere", False):
            return took, True
        self.disturbed += 1
        if not _runs_in_calling_thread(session):
            return took, False
        worked_ms = (self.processor_ns() - worked) / 1e6
        return (min(took, worked_ms) if worked_ms > 0 else took), True


def _runs_in_calling_thread(session: Session) -> bool:
    identity = getattr(session, "identity", {})
    return identity.get("threads") == 1 and identity.get("device") == "cpu"


def involuntary_switches() -> int:
    """How often the scheduler took a processor from this process; 0 where that is not counted."""
    if resource is None:
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw)


def _warm_up(session: Session, most: int, clock: _Clock) -> tuple[int, float]:
    """Run until warm; returns the number of runs and the least time seen, ms.

    A first run that takes all the time by itself may have compiled or loaded what later ones find
    ready: it is not counted.
    """
    enough = _WARMUP_SECONDS * 1e3
    with _active(session):
        times = [clock.time(session)[0]]
        apart = times[0] if times[0] >= enough else 0.0
        while len(times) < most and sum(times) - apart < enough:
            times.append(clock.time(session)[0])
    return len(times), min(times)


def _nothing() -> None: ...


def _block_length(estimates_ms: Sequence[float]) -> int:
    """Inferences per block, one number for all sessions, from the time each of them takes."""
    wanted = math.ceil(_BLOCK_MS / min(estimates_ms))
    bearable = max(_FEWEST_AT_LENGTH, int(_LONGEST_BLOCK_MS / max(estimates_ms)))
    return max(1, min(_MOST_PER_BLOCK, wanted, bearable))


def _least_of_block(session: Session, count: int, clock: _Clock) -> float:
    """Least time of `count` undisturbed inferences in a row, ms.

    On a machine so busy that hardly any is left alone, the least of all is what there is.
    """
    quiet: list[float] = []
    every: list[float] = []
    with _active(session):
        while len(quiet) < count and len(every) < _PATIENCE * count:
            took, undisturbed = clock.time(session)
            every.append(took)
            if undisturbed:
                quiet.append(took)
    return min(quiet or every)


def _paired(session: Session, reference: Session | None) -> AbstractContextManager[None]:
    if reference is None or not hasattr(session, "paired"):
        return nullcontext()
    context: AbstractContextManager[None] = session.paired(reference)
    return context


def _active(session: Session) -> AbstractContextManager[None]:
    context: AbstractContextManager[None] = getattr(session, "active", nullcontext)()
    return context
