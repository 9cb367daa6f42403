"""One place to measure at: a family, the reference it is timed against, and when to doubt a time."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wgates_plugin.efficiency.samples.file import DENSE
from wgates_plugin.latency.base import Family, Measurement, Session
from wgates_plugin.latency.environment import describe_environment
from wgates_plugin.latency.layer_times import PROFILED_RUNS
from wgates_plugin.latency.timing import measure

logger = logging.getLogger("wgates_plugin")


QUIET = 0.015
"""Most that a measurement's ratio spreads by, relative, where nothing else runs on the machine."""

QUIET_ATTEMPTS = 4

PROFILES = 3
"""Samples in a row without layer times after which none are asked for."""


def quietest(take: Callable[[], Measurement]) -> Measurement:
    """The first measurement that is not disturbed, or of several the one that was least.

    Networks do not slow down alike beside other work, so a disturbed ratio is not only wide but
    wrong. The choice is by spread and never by the latency found. What the others took is its
    `discarded_seconds`.
    """
    taken = [take()]
    while taken[-1].relative_spread > QUIET and len(taken) < QUIET_ATTEMPTS:
        time.sleep(taken[-1].seconds)  # let it pass
        taken.append(take())
    kept = min(taken, key=lambda found: found.relative_spread)
    inside = sum(found.inference_seconds for found in taken)
    return dataclasses.replace(kept, discarded_seconds=inside - kept.inference_seconds)


@dataclass(frozen=True)
class Trust:
    """When a measurement is doubted and taken again.

    Attributes:
        most_spread: of the ratio. Two networks timed within the same milliseconds hold their ratio
            to about 1 %; at five times that, something else was running.
        most_disturbed: share of inferences from which the processor was taken away. Each round
            keeps its least time, so a minority does no harm; with a majority there may have been
            no quiet inference in a round.
        most_drift: relative distance of the drift from that of its neighbours. A machine's speed
            moves by 6-26 % within minutes, but in steps: one sample off by itself met a step in
            its middle, and its rounds mix two machines.
        neighbours: measurements before this one whose median drift it is compared with. An odd
            few: after a real step most of them are new within three measurements. With 0, drift
            is never doubted.
        repeats: further attempts at a doubted measurement. More would spend on one noisy minute
            what several samples cost.
    """

    most_spread: float = 0.05
    most_disturbed: float = 0.5
    most_drift: float = 0.1
    neighbours: int = 5
    repeats: int = 2

    def doubt(self, found: Measurement, drifts: Sequence[float]) -> str | None:
        """Why `found` is not to be trusted after neighbours with these `drifts`; None if it is."""
        if found.ratio_spread > self.most_spread * found.ratio:
            share = found.relative_spread
            return f"the ratio spreads by {share:.1%}, trusted up to {self.most_spread:.1%}"
        disturbed = disturbed_share(found)
        if disturbed > self.most_disturbed:
            return (
                f"{disturbed:.0%} of inferences disturbed, trusted up to {self.most_disturbed:.0%}"
            )
        near = list(drifts)[-self.neighbours :]
        if self.neighbours and len(near) >= min(3, self.neighbours):
            usual = statistics.median(near)
            if abs(found.drift / usual - 1.0) > self.most_drift:
                return f"drift {found.drift:.3f} among neighbours at {usual:.3f}"
        return None


MUCH_DISTURBED = 0.1
"""Share of inferences; from here on figures come with a word of warning."""


def disturbed_share(found: Measurement) -> float:
    """Disturbed inferences over all timed ones, whose number follows from the time they took."""
    beside = found.reference_samples_ms
    networks = 2 if beside else 1
    pair_ms = found.median_ms + (statistics.median(beside) if beside else 0.0)
    times = max(found.rounds, found.inference_seconds * 1e3 / pair_ms)
    return found.disturbed / (networks * times)


@dataclass(frozen=True)
class Taken:
    """A sample as measured, with the attempts that were not trusted and why."""

    found: Measurement
    rejected: tuple[tuple[Measurement, str], ...] = ()
    layers_ms: dict[str, float] | None = None

    @property
    def inference_seconds(self) -> float:
        """Time inside timed inferences: of all attempts, and of the profile (s)."""
        every = (self.found, *(found for found, _ in self.rejected))
        profiled = PROFILED_RUNS * sum((self.layers_ms or {}).values()) / 1e3
        return sum(found.inference_seconds for found in every) + profiled


@dataclass
class Bench:
    """A family of sub-networks beside the session they are timed against.

    Attributes:
        reference_ms: the reference's latency in the clock of the untouched network.
        about: what the reference is and how it was calibrated, for the sample file.
        environment: of this process, the device's name included.
        drifts: of the latest measurements here, the doubted ones included.
        profiles: times in a row that the family may give none of the layers' own times before it is
            asked for no more.
    """

    family: Family
    reference: Session
    reference_ms: float
    about: Mapping[str, Any] = field(default_factory=lambda: dict(DENSE))
    environment: dict[str, Any] = field(default_factory=describe_environment)
    drifts: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    profiles: int = PROFILES

    def take(
        self, widths: Sequence[int], seconds: float, *, trust: Trust | None = None, profile: bool
    ) -> Taken:
        """Latency at `widths` (G,), again while it is doubted; the least spread counts in the end.

        Args:
            seconds: timed inference of one attempt, the reference's included.
            profile: take the layers' own times too, where the family can.
        """
        trust = trust or Trust()
        session = self.family.session(widths)
        attempts: list[tuple[Measurement, str]] = []
        found = None
        try:
            for _ in range(1 + trust.repeats):
                found = measure(
                    session,
                    reference=self.reference,
                    reference_ms=self.reference_ms,
                    seconds=seconds,
                )
                why = trust.doubt(found, self.drifts)
                self.drifts.append(found.drift)
                if why is None:
                    break
                attempts.append((found, why))
                found = None
        finally:
            session.close()
        if found is None:
            least = min(attempts, key=lambda attempt: attempt[0].relative_spread)
            attempts.remove(least)
            found = least[0]
            logger.info(
                "widths %s: measured %d times and still doubted (%s); the least spread is kept",
                list(widths), 1 + trust.repeats, least[1],
            )  # fmt: skip
        return Taken(found, tuple(attempts), self._layers(widths) if profile else None)

    def _layers(self, widths: Sequence[int]) -> dict[str, float] | None:
        layer_times = getattr(self.family, "layer_times_ms", None)
        if layer_times is None or not self.profiles:
            return None
        found: dict[str, float] = {}
        try:
            found = dict(layer_times(widths))
        except Exception as error:  # says nothing about the latency, which is measured already
            logger.warning("widths %s: no layer times (%r)", list(widths), error)
        self.profiles = PROFILES if found else self.profiles - 1
        if not self.profiles:
            logger.warning("no layer times %d times in a row; samples go on without them", PROFILES)
        return found or None

    def close(self) -> None:
        self.reference.close()
