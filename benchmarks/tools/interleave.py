"""Contenders timed in turn, in alternating order, so that a drifting machine is fair to all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wgates_plugin.latency.measurement import half_interquartile_range

Job = Callable[[], object]
Contender = Callable[[], Job]
"""Prepares one fresh run, untimed, and returns the job to be timed."""


def at_once(job: Job) -> Contender:
    """A contender that needs no preparation and runs the same job every time."""
    return lambda: job


def interleave(
    contenders: Mapping[str, Contender],
    *,
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each contender's job in each of `rounds` rounds: name -> (rounds,).

    Even rounds run in the order given, odd ones in reverse. Garbage is collected before a job and
    not during it.

    Args:
        warmup: untimed rounds before the first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-warmup, rounds):
        order = list(contenders)
        if number % 2:
            order.reverse()
        taken = {name: _once(contenders[name], clock) for name in order}
        if number < 0:
            continue
        for name in contenders:
            seconds[name].append(taken[name])
        if on_round is not None:
            on_round(number, taken)
    return seconds


def _once(contender: Contender, clock: Callable[[], float]) -> float:
    job = contender()
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        start = clock()
        job()
        return clock() - start
    finally:
        if was_enabled:
            gc.enable()


def compare(seconds: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """How `seconds` (rounds,) stand against `reference` (rounds,) of the same rounds.

    `ratio` is the median of the pairwise ratios, `ratio_spread` half their interquartile range,
    `ratio_of_minima` the ratio of the two least times.

    Example:
        >>> compare([2.0, 4.4, 3.0], [1.0, 2.0, 2.0])["ratio"]
        2.0
    """
    ratios = [mine / other for mine, other in zip(seconds, reference, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratio_spread": half_interquartile_range(ratios),
        "ratio_of_minima": min(seconds) / min(reference),
        "median_seconds": statistics.median(seconds),
        "minimum_seconds": min(seconds),
        "rounds": len(ratios),
    }
