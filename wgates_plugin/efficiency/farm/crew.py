"""Workers, each in a process of its own beside its bench, and the crew that they make up."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from wgates_plugin.efficiency.bench import Bench, Taken, Trust
from wgates_plugin.efficiency.farm.settings import Farm
from wgates_plugin.efficiency.samples.file import SampleFile
from wgates_plugin.efficiency.samples.record import Source
from wgates_plugin.efficiency.sampling import Proposals
from wgates_plugin.errors import MeasurementError, WGatesError
from wgates_plugin.latency.environment import describe_environment

logger = logging.getLogger("wgates_plugin")


class _Worker:
    """Lives in a process of its own, beside its bench."""

    def about(self, make_bench: Callable[[], Bench]) -> dict[str, Any]:
        """Sets up; not in the constructor, where Ray takes any error for a death."""
        bench = self.bench = make_bench()
        return {
            "reference_ms": bench.reference_ms,
            "reference": dict(bench.about),
            "environment": {**describe_environment(), **bench.environment},
            "identity": dict(getattr(bench.reference, "identity", {})),
        }

    def take(
        self, widths: tuple[int, ...], seconds: float, trust: Trust | None, profile: bool
    ) -> Taken:
        return self.bench.take(widths, seconds, trust=trust, profile=profile)


@dataclass
class _Hand:
    """A worker as this process sees it; `busy` with widths, or still setting up without."""

    name: str
    actor: Any
    source: Source | None = None
    busy: tuple[int, ...] | None = None


class Crew:
    """All workers: hands out widths, takes in samples, replaces the dead."""

    def __init__(
        self,
        ray: ModuleType,
        make_bench: Callable[[], Bench],
        farm: Farm,
        file: SampleFile,
        how: tuple[float, Trust | None, bool],
    ) -> None:
        self.ray, self.file, self.how = ray, file, how
        self.make_bench = ray.put(make_bench)  # once in shared memory, however many workers
        self.restarts_left = farm.restarts
        self.options = farm.reserved
        self.pending: dict[Any, _Hand] = {}
        self.again: deque[tuple[int, ...]] = deque()
        self.idle: list[_Hand] = []
        self.environment: dict[str, Any] | None = None
        for number in range(farm.workers):
            self._hire(f"worker-{number}")

    def _hire(self, name: str) -> None:
        actor = self.ray.remote(_Worker).options(**self.options).remote()
        self.pending[actor.about.remote(self.make_bench)] = _Hand(name, actor)

    def work(
        self, plan: Callable[[], Proposals]
    ) -> Iterator[tuple[tuple[int, ...], Taken, Source]]:
        """Yields (widths, taken, source) as samples come in, until no widths are left.

        Workers that are not set up by then are not waited for: other jobs may hold their place.

        Args:
            plan: asked once a worker is known: what is in the file already depends on its machine.
        """
        proposals: Proposals | None = None
        while self.pending:
            (done,), _ = self.ray.wait(list(self.pending), num_returns=1)
            hand = self.pending.pop(done)
            try:
                result = self._result(done)
            except self.ray.exceptions.RayActorError as error:
                self._bury(hand, error)
            else:
                if hand.source is None:
                    hand.source = self._source(hand, result)
                    proposals = proposals or plan()
                else:
                    assert hand.busy is not None
                    widths, hand.busy = hand.busy, None
                    yield widths, result, hand.source
                self.idle.append(hand)
            if proposals is not None:
                self._hand_out(proposals)
                if self.idle and not self._measuring:
                    return

    @property
    def _measuring(self) -> bool:
        return any(hand.busy is not None for hand in self.pending.values())

    def _hand_out(self, proposals: Proposals) -> None:
        """Those without work stay idle: a death may yet give them some, or a fit for which all that
        measure are waited for."""
        while self.idle:
            if not self.again and self._measuring and proposals.about_to_fit:
                return
            widths = self.again.popleft() if self.again else proposals.next()
            if widths is None:
                return
            hand = self.idle.pop()
            hand.busy = widths
            self.pending[hand.actor.take.remote(widths, *self.how)] = hand

    def _result(self, done: Any) -> Any:
        try:
            return self.ray.get(done)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, WGatesError):
                raise error.cause from error
            raise

    def _source(self, hand: _Hand, about: Mapping[str, Any]) -> Source:
        ours = self.file.header["identity"]
        theirs = {n: value for n, value in about["identity"].items() if n != "device_name"}
        if theirs and theirs != ours:
            names = [n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)]
            raise MeasurementError(
                f"farm: {hand.name} runs another runtime than the sample file "
                f"({', '.join(f'{n}: {theirs.get(n)!r}, file {ours.get(n)!r}' for n in names)}); "
                "install the same versions everywhere"
            )
        environment = about["environment"]
        if self.environment is None:
            self.environment = self.file.environment = environment
        elif not self.file.compares(environment, self.environment):
            raise MeasurementError(
                f"farm: {hand.name} is no machine like the first one ({environment}, the first is "
                f"{self.environment}); use identical ones"
            )
        return self.file.source(
            about["reference_ms"],
            reference=about["reference"],
            environment=environment,
            worker=hand.name,
        )

    def _bury(self, hand: _Hand, error: Exception) -> None:
        logger.warning("farm: %s died (%s)", hand.name, str(error).partition("\n")[0])
        if hand.busy is not None:
            self.again.append(hand.busy)
        if self.restarts_left:
            self.restarts_left -= 1
            self._hire(hand.name)
        elif not self.pending and not self.idle:
            last = "while it was set up" if hand.busy is None else f"on widths {list(hand.busy)}"
            raise MeasurementError(
                f"farm: all workers died, the last one {last}; {len(self.file)} samples are kept in "
                f"`{self.file.path}`. Look into the workers' logs, then start again: sampling goes "
                "on where it was"
            ) from error

    def dismiss(self) -> None:
        for hand in [*self.pending.values(), *self.idle]:
            with suppress(Exception):  # dead already
                self.ray.kill(hand.actor)
