"""Sampling on several identical machines or devices at once, through Ray.

One actor per worker measures; this process alone plans and writes the file. What a dying worker was
measuring is given to another, so that a death costs one sample's time and no sample.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.bench import Bench, Taken, Trust
from wgates_plugin.efficiency.light_reference import light_bench
from wgates_plugin.efficiency.sample_file import SampleFile
from wgates_plugin.efficiency.sample_record import Source
from wgates_plugin.efficiency.sampling import (
    Active,
    Proposals,
    SamplingCost,
    check_enough,
    check_space,
    check_they_differ,
    collect,
    keep,
)
from wgates_plugin.errors import (
    ConfigError,
    MeasurementError,
    MissingExtraError,
    WGatesError,
    first_line,
)
from wgates_plugin.latency.base import Measurement, RuntimeSettings, require
from wgates_plugin.latency.environment import describe_environment, usable_cores

if TYPE_CHECKING:
    from wgates_plugin.calling import ExampleInputs

logger = logging.getLogger("wgates_plugin")

_STORE_BYTES = 256 * 2**20
"""Shared memory of a Ray started here: it carries one network, not a data set."""

_NODE_NAMES = {"num_cpus": "CPU", "num_gpus": "GPU"}
"""What an actor asks for -> what a node calls it, where that is another name."""


@dataclass(frozen=True)
class BenchRecipe:
    """Everything a worker needs to set up its own bench; it travels in memory, never as a file.

    Attributes:
        options: the runtime's own keyword arguments.
        dense_ms: latency of the untouched network where the job began. It is the clock of all
            workers: identical machines differ by the minute, their ratios do not.
        seconds: timed inference of the calibration of the light reference.
    """

    network: nn.Module
    space: ChannelSpace
    example_inputs: ExampleInputs
    runtime: str
    settings: RuntimeSettings
    dense_ms: float
    grid: int
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 2.0

    def __call__(self) -> Bench:
        from wgates_plugin.latency import get_runtime

        runtime = get_runtime(self.runtime, self.settings, **self.options)
        family = runtime.family(self.network, self.space, self.example_inputs)
        dense = runtime.load(self.network, self.example_inputs)
        try:
            bench = light_bench(
                family, self.space, dense, self.dense_ms, grid=self.grid, seconds=self.seconds
            )
        finally:
            dense.close()
        name = runtime.identity(self.example_inputs)["device_name"]
        bench.environment = {**bench.environment, "device_name": name}
        return bench


@dataclass(frozen=True)
class Farm:
    """How sampling is spread.

    Attributes:
        workers: processes that measure, one per machine or device. On one machine, two that share
            cores disturb each other's times: give each its own.
        restarts: times that dead workers are replaced, all of them together.
        resources: what Ray reserves for each worker, such as {"num_gpus": 1}; by default one core.
    """

    workers: int = 1
    restarts: int = 3
    resources: Mapping[str, float] | None = None

    @property
    def reserved(self) -> dict[str, float]:
        return dict(self.resources or {"num_cpus": 1})

    def at_hand(self) -> Farm:
        """This farm; where Ray is not installed, this process alone, with a warning."""
        if self.workers > 1:
            try:
                _ray()
            except MissingExtraError as error:
                logger.warning("%s; this process samples alone", error)
                return Farm()
        return self

    @classmethod
    def of(cls, workers: int, settings: RuntimeSettings, *, runs_here: bool = True) -> Farm:
        """As many workers with these settings, each with cores, or a GPU, of its own.

        Args:
            runs_here: whether networks run on this machine rather than on a device beside it.

        Raises:
            ConfigError: this machine has fewer; not where Ray is on a cluster.
        """
        if workers == 1:
            return cls()
        on_gpu = settings.device.startswith("cuda")
        if ":" in settings.device:
            problem = f"device `{settings.device}`: {workers} workers take a GPU each; write `cuda`"
            raise ConfigError("farm", [problem])
        if not runs_here:
            there, what = 1, "device to measure on"
        elif on_gpu:
            there, what = torch.cuda.device_count(), "GPUs"
        else:
            there = usable_cores() // settings.threads
            what = f"times {settings.threads} free cores"
        if workers > there and not _on_cluster():
            raise ConfigError(
                "farm",
                [
                    f"workers: got {workers}, this machine has {there} {what}, and workers that share "
                    "one disturb each other's times; ask for at most that many, or connect Ray to "
                    "a cluster (RAY_ADDRESS)"
                ],
            )
        cores = settings.threads if runs_here else 1
        resources = {"num_cpus": float(cores), **({"num_gpus": 1.0} if on_gpu else {})}
        return cls(workers, resources=resources)


def collect_on_farm(
    file: SampleFile,
    space: ChannelSpace,
    make_bench: Callable[[], Bench],
    farm: Farm,
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
    """`collect`, on as many workers as `farm` has: for equal seeds, the same widths.

    Ray is taken as found when it is connected already (to a cluster, say), else started here on
    this machine and stopped again. With one worker, or without Ray, this process measures.
    Samples count that compare with the workers' machines; where this one is of another kind, they
    are set aside when the file is opened here again, unless their sources are allowed.

    Args:
        make_bench: sets up a worker's bench, in the worker; a `BenchRecipe`.

    Raises:
        MeasurementError: as in `collect`; or no worker is left alive. What was measured is kept.
        ConfigError: Ray has no room for all workers, or cannot be reached.
    """
    if farm.at_hand().workers == 1:
        bench = make_bench()
        try:
            return collect(
                file,
                space,
                bench,
                count=count,
                grid=grid,
                seed=seed,
                seconds_per_sample=seconds_per_sample,
                trust=trust,
                active=active,
                profile=profile,
                on_sample=on_sample,
            )
        finally:
            bench.close()
    started = time.perf_counter()
    check_they_differ(file)
    check_space(space, count, grid)
    inside = 0.0
    with _connected(farm) as ray:
        crew = _Crew(ray, make_bench, farm, file, (seconds_per_sample, trust, profile))
        try:
            for widths, taken, source in crew.work(
                lambda: Proposals(file, space, count, grid, seed, active)
            ):
                inside += taken.inference_seconds
                keep(file, widths, taken, source)
                if on_sample is not None:
                    on_sample(file.distinct, taken.found)
        finally:
            crew.dismiss()
    check_enough(file, count, grid)
    return SamplingCost(time.perf_counter() - started, inside, farm.workers)


def _on_cluster() -> bool:
    """Whether Ray is told, or connected, to what is more than this machine."""
    ray = sys.modules.get("ray")
    return "RAY_ADDRESS" in os.environ or bool(ray is not None and ray.is_initialized())


def _ray() -> ModuleType:
    return require("ray", extra="ray", purpose="sampling on several workers")


@contextmanager
def _connected(farm: Farm) -> Iterator[ModuleType]:
    """Ray with room for the farm; one that was connected before stays so afterwards."""
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, farm)
    try:
        _check_room(ray, farm)
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: ModuleType, farm: Farm) -> None:
    """Start Ray here, or find the cluster that RAY_ADDRESS names.

    Raises:
        ConfigError: the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked for a report
    quiet = {"include_dashboard": False, "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS")
    if address is None:  # a cluster has cores and memory as it has them
        cores = farm.reserved.get("num_cpus", 1)
        ray.init(
            num_cpus=math.ceil(farm.workers * cores), object_store_memory=_STORE_BYTES, **quiet
        )
        return
    try:
        ray.init(**quiet)
    except Exception as error:  # of many types: nobody there, no address, a client that is missing
        raise ConfigError(
            "farm",
            [
                f"RAY_ADDRESS: no cluster can be reached at `{address}` ({first_line(error)}); "
                "start it, or unset RAY_ADDRESS to measure on this machine"
            ],
        ) from error


def _check_room(ray: ModuleType, farm: Farm) -> None:
    """Warn where some workers have no place on the nodes that are there.

    Raises:
        ConfigError: none has: all would wait, for ever where no node is to come.
    """
    wanted = {_NODE_NAMES.get(n, n): amount for n, amount in farm.reserved.items() if amount}
    room = sum(
        min(
            (int(node["Resources"].get(n, 0.0) / amount + 1e-6) for n, amount in wanted.items()),
            default=farm.workers,
        )
        for node in ray.nodes()
        if node["Alive"]
    )
    if room < farm.workers:
        each = ", ".join(f"{name} {amount:g}" for name, amount in wanted.items())
        found = f"got {farm.workers} of {each} each, Ray has room for {room}"
        if not room:
            raise ConfigError("farm", [f"workers: {found}; connect it to a machine that has them"])
        logger.warning("farm: workers: %s; the others wait for a place", found)


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


class _Crew:
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
