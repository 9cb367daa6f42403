"""All that one job measures on one runtime: the baseline, LPNet's samples, and single candidates."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from wgates_plugin.calling import ExampleInputs
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.bench import QUIET, Bench, Trust, quietest
from wgates_plugin.efficiency.common_drift import MOST_COMMON_DRIFT, common_drift
from wgates_plugin.efficiency.farm import BenchRecipe, Farm, collect_on_farm
from wgates_plugin.efficiency.light_reference import kept_light_bench, light_bench
from wgates_plugin.efficiency.lpnet import LPNet
from wgates_plugin.efficiency.samples.file import SampleFile
from wgates_plugin.efficiency.sampling import Active, SamplingCost, collect
from wgates_plugin.latency import get_runtime
from wgates_plugin.latency.base import Family, Measurement, RuntimeSettings, Session
from wgates_plugin.latency.grid import probe_grid
from wgates_plugin.latency.timing import measure
from wgates_plugin.targets import LatencyTarget

logger = logging.getLogger("wgates_plugin")

DRIFT_SAMPLES = 5
"""After so many, the drift that they have in common is looked at."""


class LatencyStudy:
    """Latency of one network's sub-networks, in milliseconds of the baseline's clock.

    The untouched network is measured once; from then on everything that is judged is timed
    interleaved with it, and the ratio counts. A machine that speeds up or slows down in between
    changes both alike. Samples for LPNet are timed against a lighter network, itself timed against
    the untouched one.
    """

    def __init__(
        self,
        network: nn.Module,
        space: ChannelSpace,
        example_inputs: ExampleInputs,
        target: LatencyTarget,
    ) -> None:
        settings = RuntimeSettings(
            threads=target.threads, device=target.device, precision=target.precision
        )
        self._options = dict(target.options)
        self.runtime = get_runtime(target.runtime, settings, **target.options)
        self.network, self.space, self.example_inputs = network, space, example_inputs
        self.identity = self.runtime.identity(example_inputs)
        self.reference_ms: float | None = None
        self.samples: SampleFile | None = None
        self.visited: SampleFile | None = None
        self._reference: Session | None = None
        self._family: Family | None = None
        self._light: tuple[int, Bench] | None = None

    @property
    def reference(self) -> Session:
        """The untouched network, loaded on first use and kept."""
        if self._reference is None:
            self._reference = self.runtime.load(self.network, self.example_inputs)
        return self._reference

    @property
    def family(self) -> Family:
        if self._family is None:
            self._family = self.runtime.family(self.network, self.space, self.example_inputs)
        return self._family

    def farm(self, workers: int) -> Farm:
        """So many workers that measure like this one.

        Raises:
            ConfigError: there is not room for them.
        """
        here = getattr(self.runtime, "runs_here", True)
        return Farm.of(workers, self.runtime.settings, runs_here=here)

    def baseline(self, seconds: float) -> Measurement:
        """Calibrate: latency of the untouched network on its own."""
        found = quietest(lambda: measure(self.reference, seconds=seconds))
        self.reference_ms = found.latency_ms
        for file in (self.samples, self.visited):
            if file is not None:  # a new clock for all: ratios stay
                file.clock_ms = self.reference_ms
        if self._light is not None:
            self._light[1].close()
            self._light = None
        return found

    def probe(self) -> dict[str, Any]:
        """The runtime's channel grid, as JSON."""
        return asdict(probe_grid(self.runtime))

    def open_files(self, samples: Path, visited: Path, *, known: Collection[int] = ()) -> None:
        """Start or continue the file of random samples and that of widths the job came by.

        Args:
            known: sources of samples that the job's LPNet has learned from. They count, and all that
                was visited does, in whatever environment a job is resumed: it goes on with that LPNet.
        """
        assert self.reference_ms is not None
        self.open_samples(samples)
        self.visited = SampleFile.open(visited, self.space, self.identity)
        assert self.samples is not None
        for file, sources in ((self.samples, known), (self.visited, self.visited.sources)):
            if again := set(sources) & set(file.set_aside()):
                logger.warning(
                    "samples `%s`: the job goes on in another environment (%s); what was measured "
                    "before counts on, by its ratio to the untouched network",
                    file.path, file.differences(),
                )  # fmt: skip
                file.allowed = file.allowed | again
        self.visited.clock_ms = self.reference_ms

    def open_samples(self, path: Path) -> SampleFile:
        """Start or continue the file of random samples.

        Where no baseline was taken yet, that of the file's samples goes on.
        """
        self.samples = SampleFile.open(path, self.space, self.identity)
        if self.reference_ms is None and (last := self.samples.last_clock()) is not None:
            self.reference_ms = last
        self.samples.clock_ms = self.reference_ms
        return self.samples

    def at(
        self, widths: Sequence[int], seconds: float, *, trust: Trust | None = None
    ) -> Measurement:
        """Latency of the network resized to `widths` (G,); remembered as visited.

        Timed against the untouched network; a doubted measurement is taken again. Each call stands for
        itself: its drift is not compared with that of others.
        """
        assert self.reference_ms is not None
        assert self.visited is not None
        bench = self._dense_bench()
        taken = bench.take(widths, seconds, trust=trust or Trust(QUIET), profile=False)
        source = self.visited.source(bench.reference_ms)
        for found, why in taken.rejected:
            self.visited.add(widths, found, source, why=why)
        self.visited.add(widths, taken.found, source)
        return taken.found

    def _dense_bench(self) -> Bench:
        assert self.reference_ms is not None
        return Bench(self.family, self.reference, self.reference_ms)

    def _light_bench(self, grid: int, seconds: float) -> Bench:
        """The bench for samples; a calibration in the file goes on, so that its clock does."""
        assert self.reference_ms is not None
        assert self.samples is not None
        if self._light is not None and self._light[0] == grid:
            return self._light[1]
        widths = self.space.half_widths(grid)
        bench = kept_light_bench(self.samples, self.family, widths, self.reference_ms)
        if bench is None:
            bench = light_bench(
                self.family,
                self.space,
                self.reference,
                self.reference_ms,
                grid=grid,
                seconds=seconds,
            )
        if self._light is not None:
            self._light[1].close()
        self._light = (grid, bench)
        return bench

    def of_file(self, path: Path, network: nn.Module, seconds: float) -> Measurement:
        """Latency of the exported artefact of `network`, run from the file."""
        session = self.runtime.load_delivered(path, network, self.example_inputs)
        try:
            return quietest(
                lambda: measure(
                    session,
                    reference=self.reference,
                    reference_ms=self.reference_ms,
                    seconds=seconds,
                )
            )
        finally:
            session.close()

    def sample(
        self,
        *,
        count: int,
        grid: int,
        seed: int,
        seconds_per_sample: float,
        light: bool = True,
        trust: Trust | None = None,
        active: Active | None = None,
        profile: bool = True,
        farm: Farm | None = None,
        on_sample: Callable[[int, Measurement], None] | None = None,
        retime: bool = False,
    ) -> SamplingCost:
        """Bring the samples up to `count` measured sub-networks.

        Args:
            light: time them against the network at about half widths rather than the untouched one.
            farm: measure on its workers, each beside a light reference of its own.
            retime: measure the untouched network again where the first samples all drift alike: it
                was the baseline then that met another speed of the machine. Not where a target was
                derived from that baseline.
        """
        assert self.samples is not None
        assert self.reference_ms is not None
        farm = (farm or Farm()).at_hand()
        if retime and farm.workers == 1:
            return self._sample_retimed(
                count=count,
                grid=grid,
                seed=seed,
                seconds_per_sample=seconds_per_sample,
                light=light,
                trust=trust,
                active=active,
                profile=profile,
                on_sample=on_sample,
            )
        if self.samples.distinct >= count:
            return SamplingCost(0.0, 0.0)
        calibration = max(1.0, 4 * seconds_per_sample)
        if farm.workers > 1:
            recipe = BenchRecipe(
                self.network,
                self.space,
                self.example_inputs,
                self.runtime.name,
                self.runtime.settings,
                self.reference_ms,
                grid,
                self._options,
                calibration,
            )
            collected = functools.partial(collect_on_farm, self.samples, self.space, recipe, farm)
        else:
            bench = self._light_bench(grid, calibration) if light else self._dense_bench()
            collected = functools.partial(collect, self.samples, self.space, bench)
        return collected(
            count=count,
            grid=grid,
            seed=seed,
            seconds_per_sample=seconds_per_sample,
            trust=trust,
            active=active,
            profile=profile,
            on_sample=on_sample,
        )

    def _sample_retimed(self, *, count: int, seconds_per_sample: float, **how: Any) -> SamplingCost:
        """`sample` with a look at the common drift after the first few."""
        assert self.samples is not None
        there = len(self.samples.samples)
        first = min(count, self.samples.distinct + DRIFT_SAMPLES)
        cost = self.sample(count=first, seconds_per_sample=seconds_per_sample, **how)
        drift = common_drift([sample.drift for sample in self.samples.samples[there:]])
        if abs(drift - 1.0) > MOST_COMMON_DRIFT:
            before = self.reference_ms
            found = self.baseline(max(2.0, 4 * seconds_per_sample))
            logger.warning(
                "the first samples all drift, by %+.1f %%: the untouched network was timed while "
                "the machine had another speed; timed again, %.4g ms instead of %.4g ms",
                100 * (drift - 1.0), found.latency_ms, before,
            )  # fmt: skip
            # Written now: it is the clock from here on, whatever else is measured.
            self.samples.source(found.latency_ms)
        rest = self.sample(count=count, seconds_per_sample=seconds_per_sample, **how)
        return SamplingCost(
            cost.seconds + rest.seconds, cost.inference_seconds + rest.inference_seconds
        )

    def tie(self, seconds: float) -> dict[int, float]:
        """What samples of other sittings are to be multiplied by, from source to factor.

        Their references are timed against the untouched network again, as they were then. Two
        networks do not slow down alike on a machine with other work to do: an error of that one
        ratio is an error of all its samples.
        """
        assert self.samples is not None
        assert self.reference_ms is not None
        sources = {sample.source: self.samples.sources[sample.source] for sample in self.samples}
        ratios: dict[tuple[int, ...], float] = {}
        factors = {}
        for number, source in sources.items():
            widths = tuple(source.reference.get("widths", ()))
            if not widths or source.dense_ms == self.reference_ms:
                continue
            if widths not in ratios:
                light = self.family.session(widths)
                try:
                    found = quietest(
                        functools.partial(measure, light, reference=self.reference, seconds=seconds)
                    )
                finally:
                    light.close()
                ratios[widths] = found.ratio
            factors[number] = ratios[widths] * source.dense_ms / source.reference_ms
        return factors

    def fit(self, *, seed: int, structure: str = "layers", prior: LPNet | None = None) -> LPNet:
        """LPNet from the samples and from everything visited since."""
        widths, latencies_ms, layers_ms = self._seen()
        return LPNet.fit(
            self.space,
            widths,
            latencies_ms,
            layers_ms=layers_ms,
            structure=structure,
            seed=seed,
            prior=prior,
            identity=self.identity,
        )

    def refit(self, lpnet: LPNet) -> LPNet:
        """`lpnet` trained further on everything seen by now."""
        widths, latencies_ms, layers_ms = self._seen()
        return lpnet.refit(widths, latencies_ms, layers_ms=layers_ms)

    def _seen(
        self,
    ) -> tuple[list[tuple[int, ...]], list[float], list[dict[str, float] | None]]:
        assert self.samples is not None
        every = [
            (sample, file.latency_of(sample))
            for file in (self.samples, self.visited)
            if file is not None
            for sample in file.usable
        ]
        return (
            [sample.widths for sample, _ in every],
            [latency_ms for _, latency_ms in every],
            [sample.layers_ms for sample, _ in every],
        )
