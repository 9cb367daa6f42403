"""Sampling on several workers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_bench import IDENTITY, FarmBench, staircase_ms
from networks import example, tiny

from wgates_plugin import ChannelSpace, trace
from wgates_plugin.efficiency import farm as farm_module
from wgates_plugin.efficiency.farm import BenchRecipe, Farm, collect_on_farm
from wgates_plugin.efficiency.sample_file import SampleFile
from wgates_plugin.efficiency.sampling import Active
from wgates_plugin.errors import ConfigError, MeasurementError
from wgates_plugin.latency import RuntimeSettings, get_runtime

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
    monkeypatch.setattr(farm_module, "usable_cores", lambda: 6)
    monkeypatch.setattr(farm_module, "_on_cluster", lambda: False)
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
    monkeypatch.setattr(farm_module, "_on_cluster", lambda: True)
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
    assert "wgates-plugin[ray]" in caplog.text


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
    """Each worker calls its processor by another name."""

    def __call__(self) -> Any:
        import os

        self.cpu = f"chip {os.getpid()}"
        return super().__call__()


@pytest.mark.slow
def test_workers_must_be_alike(ray: Any, space: ChannelSpace, file: SampleFile) -> None:
    with pytest.raises(MeasurementError, match="no machine like the first one"):
        collect_on_farm(file, space, Unlike(space), Farm(workers=2), count=100, **OPTIONS)


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
