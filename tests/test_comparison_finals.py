"""The last sitting of a comparison."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from comparison_helpers import filled, made_up, stored

from benchmarks import comparison
from benchmarks.comparison import finals, runs
from benchmarks.comparison.experiment import (
    Experiment,
    dense_recipe,
    load_experiment,
)
from benchmarks.comparison.summary import network_of
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.errors import ConfigError
from wgates_plugin.files import write_json
from wgates_plugin.recipe import prepare
from wgates_plugin.tracing import trace


def test_nothing_to_time_leaves_the_last_sitting(tmp_path: Path) -> None:
    experiment = filled(tmp_path, {"random": [0.8] * 3}, finals=[0.4, 0.4, 0.4])
    places = runs.Places(experiment, tmp_path / "results", tmp_path / "work")
    before = places.finals("eager").read_text()
    finals.time_finals(experiment, places, experiment.runtimes[0])
    assert places.finals("eager").read_text() == before


def space_of(experiment: Experiment) -> ChannelSpace:
    network, data, *_ = prepare(dense_recipe(experiment, 0, Path("nowhere")))
    return trace(network, data.example_input)


def of_full_widths(experiment: Experiment) -> dict[str, Any]:
    """A made-up result whose network can be built again."""
    widths = [
        {"group": group.name, "dense": group.channels, "kept": group.channels}
        for group in space_of(experiment).groups
    ]
    return {**made_up(0.8), "widths": widths, "before_cut": [], "after_cut": []}


def test_the_same_networks_are_not_timed_twice(tmp_path: Path) -> None:
    """A sitting that is repeated until all keep their targets tells of chance."""
    experiment = load_experiment(stored(tmp_path))
    places = runs.Places(experiment, tmp_path / "results", tmp_path / "work")
    (first, _), block = comparison.choose(experiment), experiment.runtimes[0]
    result = of_full_widths(experiment)
    write_json(places.result(first), result)
    finals.time_finals(experiment, places, block, seconds=0.02, passes=1)
    before = places.finals("eager").read_text()
    finals.time_finals(experiment, places, block, seconds=0.02, passes=1)
    assert places.finals("eager").read_text() == before
    finals.time_finals(experiment, places, block, seconds=0.02, passes=1, again=True)
    timed = places.finals("eager").read_text()
    assert timed != before
    result["widths"][0]["kept"] //= 2  # the run was made again, and delivered another network
    write_json(places.result(first), result)
    finals.time_finals(experiment, places, block, seconds=0.02, passes=1)
    assert places.finals("eager").read_text() != timed


def test_what_cannot_be_built_again_keeps_its_timing(tmp_path: Path) -> None:
    """Its run folder is gone, and its network is more than widths."""
    experiment = load_experiment(stored(tmp_path))
    places = runs.Places(experiment, tmp_path / "results", tmp_path / "work")
    (first, second), block = comparison.choose(experiment), experiment.runtimes[0]
    result = of_full_widths(experiment)
    for run in (first, second):
        write_json(places.result(run), result)
    finals.time_finals(experiment, places, block, seconds=0.02, passes=1)
    gone = {**result, "after_cut": ["constants"]}
    write_json(places.result(second), gone)
    last = json.loads(places.finals("eager").read_text())
    last["networks"][second.key] = network_of(gone)
    write_json(places.finals("eager"), last)
    before = places.finals("eager").read_text()
    finals.time_finals(experiment, places, block, seconds=0.02, passes=1)
    assert places.finals("eager").read_text() == before
    finals.time_finals(experiment, places, block, seconds=0.02, passes=1, again=True)
    after = json.loads(places.finals("eager").read_text())
    assert after["of_an_earlier_sitting"] == [second.key]
    for table in ("ratio", "networks", "passes"):
        assert after[table][second.key] == last[table][second.key]
    assert set(after["ratio"]) == {first.key, second.key}
    write_json(places.result(second), {**gone, "after_cut": ["another"]})
    finals.time_finals(experiment, places, block, seconds=0.02, passes=1, again=True)
    assert set(json.loads(places.finals("eager").read_text())["ratio"]) == {first.key}


def test_runs_of_another_machine_are_not_timed_here(tmp_path: Path) -> None:
    experiment = load_experiment(stored(tmp_path))
    places = runs.Places(experiment, tmp_path / "results", tmp_path / "work")
    first, _ = comparison.choose(experiment)
    result = {**of_full_widths(experiment), "environment": {"cpu": "another"}}
    write_json(places.result(first), result)
    with pytest.raises(ConfigError, match="1 stored runs are from another"):
        finals.time_finals(experiment, places, experiment.runtimes[0], again=True)
    assert not places.finals("eager").exists()


@pytest.mark.parametrize(
    ("reference_ms", "passes", "ratio", "disturbed"),
    [
        ([1.0, 1.0], 2, 0.45, 0),  # quiet: not one pass more than asked for
        ([1.0, 1.2, 1.2, 1.0], 4, 0.55, 0),
        ([1.0, 1.2, 1.2, 1.3, 1.3, 1.3], 6, 0.45, 1),  # the least slowed of them, and said
    ],
)
def test_a_network_timed_beside_other_work_is_timed_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reference_ms: list[float],
    passes: int,
    ratio: float,
    disturbed: int,
) -> None:
    experiment = load_experiment(stored(tmp_path))
    places = runs.Places(experiment, tmp_path / "results", tmp_path / "work")
    first, _ = comparison.choose(experiment)
    result = of_full_widths(experiment)
    write_json(places.result(first), result)
    timings = iter(
        SimpleNamespace(
            **{**dict.fromkeys(finals.RAW), "ratio": 0.4 + 0.1 * number, "reference_ms": one}
        )
        for number, one in enumerate(reference_ms)
    )
    monkeypatch.setattr(finals, "measure", lambda *_, **__: next(timings))
    finals.time_finals(experiment, places, experiment.runtimes[0], passes=2)
    last = json.loads(places.finals("eager").read_text())
    assert len(last["passes"][first.key]) == passes
    assert last["ratio"][first.key] == pytest.approx(ratio)
    assert len(last["disturbed"]) == disturbed


def test_a_busy_hour_does_not_undo_a_quiet_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timings of an earlier sitting stay with the same network, and go with another one."""
    experiment = load_experiment(stored(tmp_path))
    places = runs.Places(experiment, tmp_path / "results", tmp_path / "work")
    first, second = comparison.choose(experiment)
    result = of_full_widths(experiment)
    for run in (first, second):
        write_json(places.result(run), result)
    now = {"ratio": 0.4, "reference_ms": 1.0}
    monkeypatch.setattr(
        finals, "measure", lambda *_, **__: SimpleNamespace(**dict.fromkeys(finals.RAW) | now)
    )
    finals.time_finals(experiment, places, experiment.runtimes[0], passes=2)
    now.update(ratio=0.3, reference_ms=1.2)
    result["widths"][0]["kept"] //= 2
    write_json(places.result(second), result)
    finals.time_finals(experiment, places, experiment.runtimes[0], passes=2)
    last = json.loads(places.finals("eager").read_text())
    assert last["ratio"] == pytest.approx({first.key: 0.4, second.key: 0.3})
    assert last["disturbed"] == [second.key]
    assert len(last["passes"][first.key]) == 4
    finals.time_finals(experiment, places, experiment.runtimes[0], passes=2, again=True)
    assert json.loads(places.finals("eager").read_text())["ratio"] == last["ratio"]
    elsewhere = {**last, "environment": {"cpu": "another"}}
    write_json(places.finals("eager"), elsewhere)
    finals.time_finals(experiment, places, experiment.runtimes[0], passes=2, again=True)
    assert json.loads(places.finals("eager").read_text())["ratio"][first.key] == pytest.approx(0.3)


def test_a_machine_whose_speed_wanders_is_not_timed_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = load_experiment(stored(tmp_path, seeds=list(range(20))))
    places = runs.Places(experiment, tmp_path / "results", tmp_path / "work")
    chosen = comparison.choose(experiment, methods=["wgates"])
    result = of_full_widths(experiment)
    for run in chosen:
        write_json(places.result(run), result)
    speeds = itertools.chain([1.0] * 10, itertools.repeat(1.2))
    timing = dict.fromkeys(finals.RAW) | {"ratio": 0.4}
    monkeypatch.setattr(
        finals,
        "measure",
        lambda *_, **__: SimpleNamespace(**{**timing, "reference_ms": next(speeds)}),
    )
    finals.time_finals(experiment, places, experiment.runtimes[0], passes=2)
    last = json.loads(places.finals("eager").read_text())
    assert {len(timings) for timings in last["passes"].values()} == {3}
    assert len(last["disturbed"]) == 20
