"""Measuring sub-networks on a farm: the counterpart of `collect` in one process."""

from __future__ import annotations

import time
from collections.abc import Callable

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.bench import Bench, Trust
from wgates_plugin.efficiency.farm.cluster import connected
from wgates_plugin.efficiency.farm.crew import Crew
from wgates_plugin.efficiency.farm.settings import Farm
from wgates_plugin.efficiency.samples.file import SampleFile
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
from wgates_plugin.latency.base import Measurement


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
    with connected(farm) as ray:
        crew = Crew(ray, make_bench, farm, file, (seconds_per_sample, trust, profile))
        try:
            for widths, taken, source in crew.work(
                lambda: Proposals(file, space, count, grid, seed, active)
            ):
                inside += taken.inference_seconds
                keep(file, widths, taken, source, on_sample)
        finally:
            crew.dismiss()
    check_enough(file, count, grid)
    return SamplingCost(time.perf_counter() - started, inside, farm.workers)
