"""Sampling on several workers."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from fake_bench import (
    IDENTITY,
    REFERENCE_MS,
    FarmBench,
    SteadyFamily,
    SteadySession,
    staircase_ms,
)
from networks import example, tiny

from wgates_plugin import ChannelSpace, trace
from wgates_plugin.efficiency.farm import BenchRecipe, Farm, cluster, collect_on_farm
from wgates_plugin.efficiency.farm import settings as farm_settings
from wgates_plugin.efficiency.samples.file import SampleFile
from wgates_plugin.efficiency.sampling import Active
from wgates_plugin.errors import ConfigError, MeasurementError
from wgates_plugin.latency import RuntimeSettings, get_runtime
from wgates_plugin.latency_study import LatencyStudy
from wgates_plugin.targets import LatencyTarget

OPTIONS: dict[str, Any] = {"grid": 1, "seed": 3, "seconds_per_sample": 0.0}


@pytest.fixture(scope="module")
def space() -> ChannelSpace:
    return trace(tiny("plain"), example())


@pytest.fixture
def file(space: ChannelSpace, tmp_path: Path) -> SampleFile:
    return SampleFile.open(tmp_path / "samples.jsonl", space, IDENTITY)


@pytest.fixture
def alone(space: ChannelSpace, tmp_path: Path) -> SampleFile:
    """What one process samples."""
    found = SampleFile.open(tmp_path / "alone.jsonl", space, IDENTITY)
    collect_on_farm(found, space, FarmBench(space), Farm(), count=10, **OPTIONS)
    return found


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One Ray for all tests here: starting it takes the longest."""
    module = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # for `fake_bench` in the workers
        module.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2**27
        )
    yield module
    module.shutdown()


def test_workers_get_cores_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(farm_settings, "usable_cores", lambda: 6)
    monkeypatch.setattr(farm_settings, "on_cluster", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Farm.of(1, RuntimeSettings(threads=64)) == Farm()
    assert Farm.of(3, RuntimeSettings(threads=2)) == Farm(3, resources={"num_cpus": 2.0})
    with pytest.raises(ConfigError, match="got 4, this machine has 3 times 2 free cores"):
        Farm.of(4, RuntimeSettings(threads=2))
    found = Farm.of(2, RuntimeSettings(device="cuda"))
    assert found.resources == {"num_cpus": 1.0, "num_gpus": 1.0}
    with pytest.raises(ConfigError, match="got 3, this machine has 2 GPUs"):
        Farm.of(3, RuntimeSettings(device="cuda"))
    with pytest.raises(ConfigError, match="write `cuda`"):
        Farm.of(2, RuntimeSettings(device="cuda:1"))
    with pytest.raises(ConfigError, match="got 2, this machine has 1 device to measure on"):
        Farm.of(2, RuntimeSettings(threads=16), runs_here=False)
    monkeypatch.setattr(farm_settings, "on_cluster", lambda: True)
    assert Farm.of(40, RuntimeSettings()).workers == 40


def test_without_ray_one_process_samples(
    space: ChannelSpace,
    file: SampleFile,
    alone: SampleFile,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    collect_on_farm(file, space, FarmBench(space), Farm(workers=4), count=10, **OPTIONS)
    assert file.widths == alone.widths
    assert caplog.text.count("wgates-plugin[ray]") == 1


def test_without_ray_the_baseline_is_looked_at_again_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    network = tiny("plain")
    space = trace(network, example())
    study = LatencyStudy(network, space, example(), LatencyTarget(fraction=1.0, runtime="eager"))
    study._family, study._reference = SteadyFamily(space), SteadySession(REFERENCE_MS)
    study.reference_ms = 1.1 * REFERENCE_MS
    study.open_samples(tmp_path / "samples")
    study.sample(count=8, farm=Farm(workers=2), retime=True, profile=False, **OPTIONS)
    assert study.reference_ms == pytest.approx(REFERENCE_MS)
    assert caplog.text.count("this process samples alone") == 1


def check_complete(file: SampleFile, alone: SampleFile, space: ChannelSpace) -> None:
    again = SampleFile.open(file.path, space, IDENTITY)
    assert sorted(again.widths) == sorted(alone.widths)
    for widths, latency_ms in zip(again.widths, again.latencies_ms, strict=True):
        assert latency_ms == pytest.approx(staircase_ms(space, widths))


def test_two_workers_measure_the_same_widths(
    ray: Any, space: ChannelSpace, file: SampleFile, alone: SampleFile
) -> None:
    counts: list[int] = []
    cost = collect_on_farm(
        file, space, FarmBench(space), Farm(workers=2), count=10,
        on_sample=lambda n, _: counts.append(n), **OPTIONS,
    )  # fmt: skip
    check_complete(file, alone, space)
    assert counts == list(range(1, 11))
    assert cost.inference_seconds > 0
    assert cost.workers == 2
    assert {source.worker for source in file.sources.values()} <= {"worker-0", "worker-1"}
    assert ray.is_initialized()  # a Ray that was there stays


def test_nothing_is_timed_beside_a_fit(ray: Any, space: ChannelSpace, file: SampleFile) -> None:
    known: list[int] = []
    active = Active(
        fit=lambda found: known.append(found.distinct),
        uncertainty=lambda rows: torch.arange(len(rows), dtype=torch.float64),
        covering=8,
        refit_every=4,
        apart=0.0,
    )
    collect_on_farm(
        file, space, FarmBench(space), Farm(workers=2), count=16, active=active, **OPTIONS
    )
    assert known == [8, 12]
    assert file.distinct == 16


def test_a_killed_workers_sample_goes_to_another(
    ray: Any, space: ChannelSpace, file: SampleFile, alone: SampleFile, tmp_path: Path
) -> None:
    bench = FarmBench(space, marker=tmp_path / "died", deadly=alone.widths[4])
    collect_on_farm(file, space, bench, Farm(workers=2, restarts=1), count=10, **OPTIONS)
    assert (tmp_path / "died").exists()
    check_complete(file, alone, space)


def test_workers_that_ray_has_no_room_for_are_refused(
    ray: Any, space: ChannelSpace, file: SampleFile
) -> None:
    farm = Farm(workers=2, resources={"num_gpus": 1.0})
    with pytest.raises(ConfigError, match="got 2 of GPU 1 each, Ray has room for 0"):
        collect_on_farm(file, space, FarmBench(space), farm, count=10, **OPTIONS)


@pytest.mark.parametrize(
    ("farm", "room"),
    [
        (Farm(workers=3), "got 3 of CPU 1 each, Ray has room for 2"),
        (Farm(workers=2, resources={"num_cpus": 2.0}), "got 2 of CPU 2 each, Ray has room for 1"),
    ],
)
def test_those_that_ray_has_room_for_do_the_work(
    ray: Any,
    space: ChannelSpace,
    file: SampleFile,
    alone: SampleFile,
    caplog: pytest.LogCaptureFixture,
    farm: Farm,
    room: str,
) -> None:
    collect_on_farm(file, space, FarmBench(space), farm, count=10, **OPTIONS)
    assert room in caplog.text
    check_complete(file, alone, space)


def test_a_worker_without_a_place_is_not_waited_for(
    ray: Any, space: ChannelSpace, file: SampleFile, alone: SampleFile
) -> None:
    """Another job has one of the two cores, and keeps it."""

    class Other:
        def there(self) -> None: ...

    other = ray.remote(Other).options(num_cpus=1).remote()
    try:
        ray.get(other.there.remote())
        fits: list[int] = []
        active = Active(
            fit=lambda found: fits.append(found.distinct),
            uncertainty=lambda rows: torch.arange(len(rows), dtype=torch.float64),
            covering=8,
        )
        collect_on_farm(
            file, space, FarmBench(space), Farm(workers=2), count=10, active=active, **OPTIONS
        )
    finally:
        ray.kill(other)
    assert fits == [8]
    assert file.distinct == 10
    assert file.widths[:8] == alone.widths[:8]
    assert len(file.sources) == 1


def test_a_cluster_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nMore of it.")

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = cast(Any, SimpleNamespace(init=nobody, is_initialized=lambda: False))
    monkeypatch.setattr(cluster, "installed_ray", lambda: ray)
    words = r"`10.0.0.1:6379` \(Could not find any running Ray instance.\); start it"
    with pytest.raises(ConfigError, match=words), cluster.connected(Farm(2)):
        pass


class DiesAtOnce(FarmBench):
    def __call__(self) -> Any:
        os._exit(1)


def test_a_death_while_setting_up_is_told_as_such(
    ray: Any, space: ChannelSpace, file: SampleFile
) -> None:
    with pytest.raises(MeasurementError, match="the last one while it was set up; 0 samples"):
        collect_on_farm(
            file, space, DiesAtOnce(space), Farm(workers=2, restarts=0), count=10, **OPTIONS
        )


@pytest.mark.slow
def test_a_farm_that_dies_out_says_so_and_goes_on_later(
    ray: Any, space: ChannelSpace, file: SampleFile, alone: SampleFile
) -> None:
    deadly = FarmBench(space, deadly=alone.widths[4], always=True)
    with pytest.raises(MeasurementError, match="all workers died, the last one on widths"):
        collect_on_farm(file, space, deadly, Farm(workers=2, restarts=1), count=10, **OPTIONS)
    kept = SampleFile.open(file.path, space, IDENTITY)
    assert alone.widths[4] not in kept.widths
    collect_on_farm(kept, space, FarmBench(space), Farm(workers=2), count=10, **OPTIONS)
    check_complete(kept, alone, space)


class Failing(FarmBench):
    def __call__(self) -> Any:
        raise MeasurementError("no such device")


def test_an_error_of_a_worker_is_the_users_to_see(
    ray: Any, space: ChannelSpace, file: SampleFile
) -> None:
    with pytest.raises(MeasurementError, match="no such device"):
        collect_on_farm(file, space, Failing(space), Farm(workers=2), count=10, **OPTIONS)


class Unlike(FarmBench):
    """Each worker calls its processor by another name, and leaves a file of that name."""

    def __call__(self) -> Any:
        self.cpu = f"chip {os.getpid()}"
        made = super().__call__()
        assert self.marker is not None
        self.marker.with_name(self.cpu).touch()
        return made


@pytest.mark.slow
def test_workers_must_be_alike(
    ray: Any, space: ChannelSpace, file: SampleFile, tmp_path: Path
) -> None:
    def until_both_are_there(*_: object) -> None:
        while len(list(tmp_path.glob("chip *"))) < 2:
            time.sleep(0.05)

    with pytest.raises(MeasurementError, match="no machine like the first one"):
        collect_on_farm(
            file, space, Unlike(space, marker=tmp_path / "none"), Farm(workers=2), count=90,
            on_sample=until_both_are_there, **OPTIONS,
        )  # fmt: skip


@pytest.mark.slow
def test_workers_of_another_runtime_are_refused(
    ray: Any, space: ChannelSpace, tmp_path: Path
) -> None:
    file = SampleFile.open(tmp_path / "other", space, {"runtime": "another"})
    with pytest.raises(MeasurementError, match="runs another runtime than the sample file"):
        collect_on_farm(file, space, FarmBench(space), Farm(workers=2), count=10, **OPTIONS)


@pytest.mark.slow
def test_a_recipe_sets_up_a_real_runtime(ray: Any, tmp_path: Path) -> None:
    network = tiny("plain").eval()
    space = trace(network, example())
    settings = RuntimeSettings()
    identity = get_runtime("eager", settings).identity(example())
    file = SampleFile.open(tmp_path / "real", space, identity)
    recipe = BenchRecipe(network, space, example(), "eager", settings, 0.5, 1, seconds=0.01)
    collect_on_farm(file, space, recipe, Farm(workers=2), count=4, **OPTIONS)
    again = SampleFile.open(tmp_path / "real", space, identity)
    assert again.distinct == 4
    for source in again.sources.values():
        assert source.reference["dense_ms"] == 0.5
        assert source.environment["device_name"] == identity["device_name"]
