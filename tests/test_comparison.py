"""The comparison harness: experiments, what is missing, what the runs say."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from comparison_helpers import filled, made_up, stored

from benchmarks import comparison
from benchmarks.comparison import finals, runs
from benchmarks.comparison import turns as turns_module
from benchmarks.comparison.experiment import (
    FOLDER,
    Experiment,
    Run,
    dense_recipe,
    load_experiment,
    merged,
    recipe_of,
    runs_of,
)
from benchmarks.comparison.summary import Difference, read_cells
from benchmarks.comparison.tables import HEAD, experiment_text, page, verdict
from benchmarks.comparison.turns import Turns, folder_of
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.dense_training import WEIGHTS
from wgates_plugin.errors import ConfigError, TargetError, WGatesError
from wgates_plugin.files import load_tensors, write_json
from wgates_plugin.recipe import load_recipe, prepare
from wgates_plugin.strategies.wgates import WGatesSettings
from wgates_plugin.tracing import trace


@pytest.fixture(autouse=True)
def _no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes sign up in the test's own folder."""
    monkeypatch.setattr(turns_module, "folder_of", lambda _: tmp_path / "workers")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_experiments_are_sound(path: Path) -> None:
    experiment = load_experiment(path)
    assert experiment.name == path.stem
    assert "random" in experiment.methods  # without chance no cell can be called decided
    assert experiment.ours == "wgates"
    keys = [run.key for run in runs_of(experiment)]
    assert len(set(keys)) == len(keys)
    for profile in experiment.profiles:
        other = load_experiment(path, profile)
        assert other.name == f"{path.stem}-{profile}"
        assert len(list(runs_of(other))) >= len(experiment.seeds) * len(other.methods)


def test_every_method_gets_the_same_but_what_it_names(tmp_path: Path) -> None:
    experiment = load_experiment(stored(tmp_path))
    weights = tmp_path / "dense.safetensors"
    weights.touch()
    recipes = [
        recipe_of(experiment, Run(method, "eager", 0.8, 3), tmp_path / method, weights=weights)
        for method in experiment.methods
    ]
    same = [
        {**recipe.model_dump(mode="json"), "name": None, "run_folder": None} for recipe in recipes
    ]
    strategies = [each["pruning"].pop("strategy") for each in same]
    assert strategies == ["wgates", "random"]
    assert same[0] == same[1]
    assert recipes[0].seed == 3
    assert not recipes[0].trains_first


def test_problems_of_all_methods_come_at_once(tmp_path: Path) -> None:
    ours = {"strategy": "wgates", "role": "ours"}
    methods = {"a": {"strategy": "magic"}, "b": {"strategy": "l1", "options": {"scoop": 1}}}
    with pytest.raises(ConfigError) as caught:
        load_experiment(stored(tmp_path, methods=methods))
    assert "method `a`" in str(caught.value)
    assert "did you mean `scope`" in str(caught.value)
    with pytest.raises(ConfigError, match="targets"):
        load_experiment(stored(tmp_path, targets=[1.5]))
    with pytest.raises(ConfigError, match="exactly one method is `ours`, not a, b"):
        load_experiment(stored(tmp_path, methods={"a": ours, "b": ours}))
    nowhere = {**ours, "targets": [0.8, 0.7], "runtimes": ["eager", "openvino"]}
    with pytest.raises(ConfigError, match=r"methods.a: runs at \[0.7, 'openvino'\]"):
        load_experiment(stored(tmp_path, methods={"a": nowhere}))


def test_a_methods_settings_are_laid_over_the_others(tmp_path: Path) -> None:
    """A method that distils keeps the learning rate that all have."""
    path = stored(tmp_path)
    raw = yaml.safe_load(path.read_text())
    raw["recipe"]["pruning"]["training"] = {"learning_rate": 0.03}
    raw["methods"]["taught"] = {
        "strategy": "wgates",
        "pruning": {"training": {"distillation_weight": 0.5}},
    }
    path.write_text(yaml.safe_dump(raw))
    recipe = recipe_of(load_experiment(path), Run("taught", "eager", 0.8, 0), tmp_path / "run")
    training = recipe.pruning.training
    assert (training.learning_rate, training.distillation_weight) == (0.03, 0.5)


def test_a_method_runs_where_it_is_told_to(tmp_path: Path) -> None:
    methods = {
        "random": {"strategy": "random"},
        "some": {"strategy": "l1", "targets": [0.5], "runtimes": ["eager"]},
    }
    runtimes = [{"runtime": "eager"}, {"runtime": "onnxruntime"}]
    experiment = load_experiment(
        stored(tmp_path, methods=methods, targets=[0.5, 0.8], runtimes=runtimes)
    )
    assert [run.key for run in runs_of(experiment) if run.method == "some"] == ["some-eager-50-0"]
    cells = read_cells(experiment, tmp_path)
    assert [(c.runtime, c.target) for c in cells if "some" in c.rows] == [("eager", 0.5)]


def test_everyone_runs_in_some_cells_and_the_core_in_all(tmp_path: Path) -> None:
    methods = {
        "random": {"strategy": "random", "core": True},
        "some": {"strategy": "l1"},
        "one": {"strategy": "l2", "targets": [0.8]},
    }
    shape = {
        "methods": methods,
        "targets": [0.5, 0.8],
        "runtimes": [{"runtime": "eager"}, {"runtime": "onnxruntime"}],
    }
    experiment = load_experiment(stored(tmp_path, everyone={"eager": [0.5]}, **shape))
    cells = {(c.runtime, c.target): set(c.rows) for c in read_cells(experiment, tmp_path)}
    assert cells.pop(("eager", 0.5)) == {"random", "some"}
    assert list(cells.values()) == [{"random"}] * 3
    assert {(r.runtime, r.target) for r in runs_of(experiment) if r.method == "some"} == {
        ("eager", 0.5)
    }
    with pytest.raises(ConfigError, match=r"everyone: \['cuda', 0.3\] is no target or runtime"):
        load_experiment(stored(tmp_path, everyone={"cuda": [0.3]}, **shape))


def test_methods_may_stand_in_a_file_of_their_own(tmp_path: Path) -> None:
    methods = {"x": {"strategy": "l2"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(methods))
    assert load_experiment(stored(tmp_path, methods="mine.yaml")).methods["x"].strategy == "l2"


def test_a_profile_is_laid_over_the_experiment_and_kept_apart(tmp_path: Path) -> None:
    over = {"recipe": {"pruning": {"gate_epochs": 7}}, "seeds": [5]}
    path = stored(tmp_path, profiles={"large": over}, task="digits")
    plain, large = load_experiment(path), load_experiment(path, "large")
    assert (large.name, large.task, large.seeds) == ("small-large", "digits-large", [5])
    assert large.recipe["pruning"] == {**plain.recipe["pruning"], "gate_epochs": 7}
    assert large.methods == plain.methods
    first, second = (runs.Places(each, tmp_path, tmp_path) for each in (plain, large))
    assert first.results != second.results
    assert first.dense_folder(0) != second.dense_folder(0)
    with pytest.raises(ConfigError, match="profile `huge`: unknown; known: large"):
        load_experiment(path, "huge")


def test_experiments_of_a_task_share_what_is_dense(tmp_path: Path) -> None:
    """Their own results and run folders stay their own; so the recipes must agree."""
    first, second = (
        runs.Places(load_experiment(stored(tmp_path, name=name, task="t")), tmp_path, tmp_path)
        for name in ("small", "other")
    )
    run = Run("wgates", "eager", 0.8, 0)
    assert first.dense_folder(0) == second.dense_folder(0)
    assert first.samples("eager") == second.samples("eager")
    assert first.run_folder(run) != second.run_folder(run)
    assert first.result(run) != second.result(run)
    committed = [load_experiment(path) for path in FOLDER.glob("*.yaml")]
    for one in committed:
        for other in committed:
            if one.task is not None and one.task == other.task:
                assert one.recipe == other.recipe


def test_a_cell_is_decided_when_the_best_beats_chance(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "near").mkdir()
    far = filled(tmp_path / "far", {"random": [0.80, 0.81, 0.79], "good": [0.90, 0.91, 0.90]})
    near = filled(tmp_path / "near", {"random": [0.80, 0.90, 0.85], "good": [0.81, 0.88, 0.87]})
    (decided,) = read_cells(far, tmp_path / "far" / "results")
    (undecided,) = read_cells(near, tmp_path / "near" / "results")
    assert decided.decided()
    assert decided.best(["random", "good"]) == "good"
    assert not undecided.decided()
    assert "undecided" in experiment_text(near, tmp_path / "near" / "results")


def test_differences_are_paired_by_seed() -> None:
    found = Difference.of([0.91, 0.81, 0.71], [0.90, 0.80, 0.70])
    assert found.mean == pytest.approx(1.0)
    assert found.error == pytest.approx(0.0, abs=1e-9)
    assert Difference.of([0.9], [0.8]).error == math.inf


def test_missing_runs_are_shown(tmp_path: Path) -> None:
    experiment = filled(tmp_path, {"random": [0.8, 0.8], "good": [0.9, 0.9, 0.9]})
    (cell,) = read_cells(experiment, tmp_path / "results")
    assert cell.row("random").missing == [2]
    assert cell.best(["random"]) is None
    text = experiment_text(experiment, tmp_path / "results")
    assert "1 missing" in text
    assert "+2.00 ± 0.00" in text  # lost against the untouched network trained on
    assert all(line.count("|") == len(HEAD) + 1 for line in text.splitlines() if line[:1] == "|")
    assert "*incomplete*: 1 runs are missing" in text


def test_refused_runs_are_shown_and_all_of_a_method_are_no_missing_ones(tmp_path: Path) -> None:
    refused = {"random": [0.8, 0.8, 0.8], "wide": ["too few ms"] * 3, "odd": [0.9, "too few", 0.9]}
    experiment = filled(tmp_path, refused)
    (cell,) = read_cells(experiment, tmp_path / "results")
    assert cell.missing() == 1  # "wide" is out, "odd" is undone
    assert cell.best(["wide", "odd"]) is None
    text = experiment_text(experiment, tmp_path / "results")
    assert "| `wide` | 3 refused: too few ms |" in text
    assert "(2 seeds, 1 refused: too few)" in text


def test_a_target_that_nobody_reaches_is_said_to_be_so(tmp_path: Path) -> None:
    refused = {"wgates": ["too few ms"] * 3, "random": ["too few ms"] * 3}
    experiment = filled(tmp_path, refused, ours="wgates")
    (cell,) = read_cells(experiment, tmp_path / "results")
    assert cell.out_of_reach()
    assert not cell.missing()
    assert not cell.decided()
    assert verdict(cell).startswith("*out of reach* of every method")


def test_an_experiment_runs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For real: trained, sampled, pruned by every method, timed in one sitting; a second call does
    only what is missing."""
    path = stored(tmp_path, task="t")
    where = ["--results", str(tmp_path / "results"), "--scratch", str(tmp_path / "work")]
    words = [str(path), *where]
    comparison.main(words)
    experiment = load_experiment(path)
    places = runs.Places(experiment, tmp_path / "results", tmp_path / "work")
    assert runs.missing(places, runs_of(experiment)) == []
    last = json.loads(places.finals("eager").read_text())
    assert set(last["ratio"]) == {run.key for run in runs_of(experiment)}
    assert all(3 <= len(passes) <= 9 for passes in last["passes"].values())
    report = json.loads(places.result(Run("random", "eager", 0.8, 0)).read_text())
    assert report["strategy"] == "random"
    dense = json.loads(places.dense_result(0).read_text())
    assert dense["trained_on"]["epochs"] == 2
    samples = places.samples("eager").read_text()
    assert "0 runs to do" not in capsys.readouterr().out
    comparison.main(words)
    assert "0 runs to do" in capsys.readouterr().out
    assert places.samples("eager").read_text() == samples
    # On a machine without the run folders the same networks are timed, built from their widths.
    assert last["from_widths"] == []
    run = Run("random", "eager", 0.8, 0)
    network, data, _, settings = prepare(dense_recipe(experiment, 0, places.dense_folder(0)))
    stored_run = json.loads(places.result(run).read_text())
    built = finals.builder(network, data.example_input, settings)(stored_run)
    delivered = load_tensors(places.run_folder(run) / "pruned.safetensors", kind="weights")
    assert {k: v.shape for k, v in built.state_dict().items()} == {
        k: v.shape for k, v in delivered.items()
    }
    # A file of other widths than the result's is not taken for the run's.
    report_file = places.run_folder(run) / "report.json"
    other_widths = {**json.loads(report_file.read_text()), "widths": []}
    write_json(report_file, other_widths)
    assert finals._artefact(places, run, stored_run) is None
    shutil.rmtree(tmp_path / "work" / experiment.name)
    comparison.main([*words, "--finals"])
    again = json.loads(places.finals("eager").read_text())
    assert set(again["from_widths"]) == set(again["ratio"]) == set(last["ratio"])
    # Another experiment of the task takes the dense network and the samples as they are.
    weights = (places.dense_folder(0) / WEIGHTS).read_bytes()
    other = stored(tmp_path, name="other", task="t")
    comparison.main([str(other), *where, "--methods", "random"])
    beside = runs.Places(load_experiment(other), tmp_path / "results", tmp_path / "work")
    assert json.loads(beside.dense_result(0).read_text())["accuracy"] == dense["accuracy"]
    assert (places.dense_folder(0) / WEIGHTS).read_bytes() == weights
    assert places.samples("eager").read_text() == samples


def test_a_part_is_chosen_by_all_four(tmp_path: Path) -> None:
    experiment = load_experiment(
        stored(
            tmp_path,
            targets=[0.5, 0.8],
            seeds=[0, 1],
            runtimes=[{"runtime": "eager"}, {"runtime": "onnxruntime"}],
        )
    )
    assert comparison.choose(experiment) == list(runs_of(experiment))
    only = {"methods": ["random"], "seeds": [1], "targets": [0.8], "runtimes": ["onnxruntime"]}
    assert [run.key for run in comparison.choose(experiment, **only)] == ["random-onnxruntime-80-1"]  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        comparison.choose(experiment, methods=["none"], seeds=[7], targets=[0.7], runtimes=["x"])
    assert len(caught.value.problems) == 4
    assert "--seeds 7: not in the experiment; it has 0, 1" in str(caught.value)


def noting(done: list[object]) -> Callable[..., str]:
    """Stands in for a run: it is noted and has a result."""

    def attempt(_: object, places: runs.Places, run: Run) -> str:
        done.append(run.key)
        write_json(places.result(run), made_up(0.8))
        return run.key

    return attempt


def test_only_what_the_chosen_runs_need_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []
    monkeypatch.setattr(runs, "make_dense", lambda _, __, seed: done.append(seed))
    monkeypatch.setattr(runs, "make_samples", lambda _, __, block: done.append(block["runtime"]))
    monkeypatch.setattr(runs, "attempt", noting(done))
    monkeypatch.setattr(finals, "time_finals", lambda _, __, block, **___: done.append(block))
    blocks = [{"runtime": "eager"}, {"runtime": "onnxruntime"}]
    path = stored(tmp_path, targets=[0.5, 0.8], seeds=[0, 1], runtimes=blocks)
    words = [str(path), "--results", str(tmp_path / "results"), "--scratch", str(tmp_path / "work")]
    part = ["--methods", "random", "--seeds", "1", "--targets", "0.8", "--runtimes", "onnxruntime"]
    comparison.main([*words, *part])
    assert done == [1, "onnxruntime", "random-onnxruntime-80-1", blocks[1]]
    done.clear()
    places = runs.Places(load_experiment(path), tmp_path / "results", tmp_path / "work")
    comparison.main([*words, *part])
    assert done == [1, blocks[1]]  # its dense network's accuracies are still missing
    done.clear()
    write_json(places.dense_result(1), {"accuracy": 0.9, "trained_on": {"accuracy": 0.9}})
    comparison.main([*words, *part])
    assert done == [blocks[1]]


def test_nothing_to_time_leaves_the_last_sitting(tmp_path: Path) -> None:
    experiment = filled(tmp_path, {"random": [0.8] * 3}, finals=[0.4, 0.4, 0.4])
    places = runs.Places(experiment, tmp_path / "results", tmp_path / "work")
    before = places.finals("eager").read_text()
    finals.time_finals(experiment, places, experiment.runtimes[0])
    assert places.finals("eager").read_text() == before


def test_a_disturbed_run_is_forgotten_and_the_others_stay(tmp_path: Path) -> None:
    experiment = filled(tmp_path, {"random": [0.8] * 3}, finals=[0.49, 0.5, 0.51])
    places = runs.Places(experiment, tmp_path / "results", tmp_path / "work")
    chosen = list(runs_of(experiment))
    places.run_folder(chosen[2]).mkdir(parents=True)
    (line,) = finals.forget_disturbed(experiment, places, chosen)
    assert line.startswith(f"{chosen[2].key}: found 0.490 of the latency, the last sitting 0.510")
    assert runs.missing(places, chosen) == chosen[2:]
    assert finals.read_replaced(places) == [
        {"run": chosen[2].key, "accuracy": 0.8, "own": 0.49, "last": 0.51}
    ]
    assert "1 runs were made again" in page(experiment, tmp_path / "results")[1]
    assert not places.run_folder(chosen[2]).exists()
    assert set(json.loads(places.finals("eager").read_text())["ratio"]) == {
        run.key for run in chosen[:2]
    }
    assert finals.forget_disturbed(experiment, places, chosen) == []


def test_what_the_last_sitting_timed_beside_other_work_stays(tmp_path: Path) -> None:
    experiment = filled(tmp_path, {"random": [0.8] * 3}, finals=[0.49, 0.5, 0.51])
    places = runs.Places(experiment, tmp_path / "results", tmp_path / "work")
    chosen = list(runs_of(experiment))
    last = json.loads(places.finals("eager").read_text())
    write_json(places.finals("eager"), {**last, "disturbed": [chosen[2].key]})
    assert finals.forget_disturbed(experiment, places, chosen) == []
    assert runs.missing(places, chosen) == []


def test_a_grid_is_probed_once_for_all_runs_and_not_where_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes: list[int] = []

    def probe(_: object) -> dict[str, object]:
        probes.append(16)
        return {"grid": 16 * len(probes), "evidence": []}

    monkeypatch.setattr(runs.LatencyStudy, "probe", probe)
    monkeypatch.setattr(runs.LatencyStudy, "baseline", lambda *_: None)
    monkeypatch.setattr(runs.LatencyStudy, "sample", lambda *_, **__: None)
    asked: list[int | None] = []
    monkeypatch.setattr(
        runs, "run_recipe", lambda recipe, **_: asked.append(recipe.pruning.grid) or refuse()
    )

    def refuse() -> None:
        raise TargetError("not here")

    path = stored(tmp_path)
    raw = yaml.safe_load(path.read_text())
    for grid in (4, None):
        raw["recipe"]["pruning"]["grid"] = grid
        raw["methods"]["mine"] = {"strategy": "l1", "pruning": {"grid": 2}}
        raw["name"] = f"grid-{grid}"
        path.write_text(yaml.safe_dump(raw, sort_keys=False))
        experiment = load_experiment(path)
        places = runs.Places(experiment, tmp_path / "results", tmp_path / "work")
        for _ in range(2):
            runs.make_samples(experiment, places, experiment.runtimes[0])
        weights = places.dense_folder(0) / WEIGHTS
        weights.parent.mkdir(parents=True, exist_ok=True)
        weights.touch()
        for run in runs_of(experiment):
            runs.do_run(experiment, places, run)
    assert asked == [4, 4, 2, 16, 16, 2]
    assert probes == [16]


def test_stored_runs_of_other_settings_are_named(tmp_path: Path) -> None:
    experiment = load_experiment(stored(tmp_path))
    places = runs.Places(experiment, tmp_path, tmp_path)
    first, second = comparison.choose(experiment)
    same = {"strategy": "wgates", "options": {}, "gate_epochs": 1, "fine_tune_epochs": 1, "seed": 7}
    mine = dataclasses.asdict(WGatesSettings())
    write_json(places.result(first), {"settings": same, "resolved_options": mine})
    write_json(places.result(second), {"kind": "refused", "reason": "too few"})
    assert runs.outdated(experiment, places, [first, second]) == []
    for resolved in ({**mine, "learning_rate": 0.1}, None):  # None: what they were is not known
        write_json(places.result(first), {"settings": same, "resolved_options": resolved})
        (line,) = runs.outdated(experiment, places, [first, second])
        assert line.startswith(f"{first.key}: stored with other settings (options {resolved} there")
        assert str(places.result(first)) in line
    write_json(
        places.result(first), {"settings": {**same, "margin": 0.1}, "resolved_options": mine}
    )
    (line,) = runs.outdated(experiment, places, [first])
    assert "(margin 0.1 there, 0.02 here)" in line


def test_a_run_that_fails_does_not_end_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runs, "prepared", lambda *_: None)
    monkeypatch.setattr(runs, "recipe_of", lambda *_, **__: None)
    monkeypatch.setattr(runs, "run_recipe", fail)
    path = stored(tmp_path)
    with pytest.raises(SystemExit):
        comparison.main([str(path), "--results", str(tmp_path), "--scratch", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "wgates-eager-80-0: failed: RuntimeError: out of memory" in printed
    assert "random-eager-80-0: failed: RuntimeError: out of memory" in printed
    assert "small: 2 runs failed; see above" in printed
    assert (
        not runs.Places(load_experiment(path), tmp_path, tmp_path).results.joinpath("runs").exists()
    )


def test_whoever_measures_is_alone(tmp_path: Path) -> None:
    """A child of a process notes the time again and again; it stands still while another measures."""
    ticking = (
        "import sys, time, pathlib\n"
        "last = time.time(); end = last + 30; here = pathlib.Path(sys.argv[1])\n"
        "(here / 'begun').touch()\n"
        "while not (here / 'enough').exists() and last < end:\n"
        "    time.sleep(0.01); now = time.time()\n"
        "    (here / 'gaps').open('a').write(f'{now - last}\\n'); last = now\n"
    )
    measuring = (
        "import sys, time, pathlib\n"
        "from benchmarks.comparison.turns import Turns\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "while not (here / 'begun').exists(): time.sleep(0.01)\n"
        "with Turns(here).alone():\n"
        "    before = (here / 'gaps').stat().st_size if (here / 'gaps').exists() else 0\n"
        "    time.sleep(1.0)\n"
        "    after = (here / 'gaps').stat().st_size if (here / 'gaps').exists() else 0\n"
        "(here / 'ticks').write_text(str(after - before))\n"
        "time.sleep(0.2); (here / 'enough').touch()\n"
    )
    turns = Turns(tmp_path)
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    commands = [
        [sys.executable, "-c", *words, str(tmp_path)] for words in ([parent, ticking], [measuring])
    ]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(turns.call, commands)) == [0, 0]
    assert int((tmp_path / "ticks").read_text()) <= 64  # at most the line it was writing
    assert max(map(float, (tmp_path / "gaps").read_text().split())) >= 1.0
    assert not list(tmp_path.glob("*.worker"))


def test_a_file_left_by_a_killed_process_stops_nobody(tmp_path: Path) -> None:
    """Its number may be another's by now."""
    turns = Turns(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        (tmp_path / f"{stranger.pid}.worker").write_text("1")
        with turns.alone():
            state = Path(f"/proc/{stranger.pid}/stat").read_text().rpartition(")")[2].split()[0]
            assert state != "T"
            assert not list(tmp_path.glob("*.worker"))
        stranger.communicate(b"\n")


def test_machines_that_share_a_folder_sign_up_apart(tmp_path: Path) -> None:
    assert folder_of(tmp_path) == folder_of(tmp_path / "." / "x" / "..")
    assert folder_of(tmp_path) != folder_of(tmp_path / "x")
    assert tmp_path not in folder_of(tmp_path).parents


def test_a_command_runs_as_one_of_those_who_take_turns(tmp_path: Path) -> None:
    word = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpgrp() == os.getpid()))"
    out = tmp_path / "out"
    command = [sys.executable, turns_module.__file__, str(tmp_path), sys.executable, "-c", word]
    assert subprocess.run([*command, str(out)], check=False).returncode == 0
    assert out.read_text() == "True"


def test_an_interrupt_ends_all_who_work(tmp_path: Path) -> None:
    turns = Turns(tmp_path)
    code = (  # a shell's background job ignores Ctrl-C, and so do its children
        "import pathlib, signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
    )
    with ThreadPoolExecutor(1) as pool:
        begun = tmp_path / "begun"
        status = pool.submit(turns.call, [sys.executable, "-c", code, str(begun)])
        while not begun.exists():
            time.sleep(0.01)
        turns.interrupt()
        assert status.result(timeout=30) != 0
    assert not list(tmp_path.glob("*.worker"))


def test_a_dense_network_that_came_out_differently_is_refused(tmp_path: Path) -> None:
    """Trained on another machine, it is not the one of the stored runs."""
    experiment = load_experiment(stored(tmp_path))
    places = runs.Places(experiment, tmp_path / "results", tmp_path / "work")
    write_json(places.dense_result(0), {"weights": "another"})
    with pytest.raises(WGatesError, match="is not the one of the stored runs"):
        runs.make_dense(experiment, places, 0)
    assert json.loads(places.dense_result(0).read_text()) == {"weights": "another"}


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


def test_equal_epochs_and_one_block_per_runtime_are_checked(tmp_path: Path) -> None:
    methods = {
        "wgates": {"strategy": "wgates", "role": "ours"},
        "long": {"strategy": "l1", "pruning": {"fine_tune_epochs": 5}},
        "phase-only": {"strategy": "gdp", "fine_tuned": False},
        "less": {"strategy": "wgates", "role": "ablation", "pruning": {"gate_epochs": 0}},
    }
    with pytest.raises(ConfigError) as caught:
        load_experiment(stored(tmp_path, methods=methods))
    (problem,) = caught.value.problems
    assert problem.startswith("method `long`: trains for 6 epochs, the others for 2")
    blocks = [{"runtime": "eager", "threads": 1}, {"runtime": "eager", "threads": 2}]
    with pytest.raises(ConfigError, match="eager is there twice"):
        load_experiment(stored(tmp_path, runtimes=blocks))


def test_runs_from_another_dense_network_are_named(tmp_path: Path) -> None:
    """A dense network trained again, on another machine, may not be the one of yesterday's runs."""
    experiment = load_experiment(stored(tmp_path))
    places = runs.Places(experiment, tmp_path, tmp_path)
    first, second = comparison.choose(experiment)
    ours = {"settings": {}, "resolved_options": dataclasses.asdict(WGatesSettings())}
    write_json(places.result(first), {**ours, "dense_weights": "mine"})
    write_json(places.result(second), {"settings": {}, "resolved_options": {"scope": "global"}})
    assert runs.outdated(experiment, places, [first, second]) == []
    write_json(places.dense_result(0), {"weights": "mine"})
    assert runs.outdated(experiment, places, [first, second]) == []
    write_json(places.dense_result(0), {"weights": "other"})
    (line,) = runs.outdated(experiment, places, [first, second])
    assert line.startswith(f"{first.key}: pruned from another dense network than the one of seed 0")


def test_a_dense_network_of_another_recipe_is_refused(tmp_path: Path) -> None:
    experiment = load_experiment(stored(tmp_path))
    places = runs.Places(experiment, tmp_path, tmp_path)
    chosen = comparison.choose(experiment)
    write_json(places.dense_result(0), {"made_by": runs._made_by(experiment)})
    runs.refuse_other_dense(experiment, places, [0])
    recipe = merged(experiment.recipe, {"pruning": {"fine_tune_epochs": 3}})
    longer = load_experiment(stored(tmp_path, recipe=recipe))
    with pytest.raises(ConfigError) as caught:
        runs.prepared(longer, places, chosen)
    (problem,) = caught.value.problems
    assert problem.startswith(
        "the dense network of seed 0 is of another recipe (epochs changed since)"
    )


@pytest.mark.parametrize(("count", "workers"), [(1, 2), (3, 2), (20, 2), (100, 3)])
def test_a_process_does_a_few_runs_and_fewer_towards_the_end(count: int, workers: int) -> None:
    keys = [str(number) for number in range(count)]
    handfuls = comparison._handfuls(keys, workers)
    assert [key for few in handfuls for key in few] == keys
    sizes = [len(few) for few in handfuls]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] <= comparison.MOST_AT_ONCE
    assert sizes[-1] == 1


def test_an_unknown_run_is_refused(tmp_path: Path) -> None:
    words = [str(stored(tmp_path)), "--results", str(tmp_path), "--scratch", str(tmp_path)]
    with pytest.raises(ConfigError, match="--only no-such-run: no run of it"):
        comparison.main([*words, "--only", "no-such-run"])


def test_runs_of_two_machines_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stored(tmp_path)
    experiment = load_experiment(path)
    places = runs.Places(experiment, tmp_path, tmp_path)
    first, second = comparison.choose(experiment)
    here = {"cpu": "one", "cpu_capability": "AVX512"}
    monkeypatch.setattr(runs, "describe_environment", lambda: here)
    write_json(places.result(first), {"environment": {**here, "cores": 2}})
    runs.refuse_other_machines(experiment, places)
    monkeypatch.setattr(runs, "describe_environment", lambda: {**here, "cpu": "two"})
    runs.refuse_other_machines(experiment, places, [])
    words = [str(path), "--results", str(tmp_path), "--scratch", str(tmp_path)]
    with pytest.raises(ConfigError) as caught:
        comparison.main(words)
    (problem,) = caught.value.problems
    assert problem.startswith(
        "runtime eager: 1 stored runs are from one AVX512, this machine is two"
    )
    assert not places.result(second).exists()
    with pytest.raises(ConfigError, match="this machine is two AVX512"):
        comparison.main([*words, "--methods", first.method, "--finals"])


def test_dense_networks_are_trained_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stored(tmp_path, seeds=[0, 1])
    words = [str(path), "--results", str(tmp_path), "--scratch", str(tmp_path)]
    experiment = load_experiment(path)
    places = runs.Places(experiment, tmp_path, tmp_path)
    asked: list[list[str]] = []

    def in_parallel(commands: list[list[str]], workers: int, _: object) -> None:
        assert workers == 2
        asked.append([command[-1] for command in commands])
        for command in commands:
            if command[-1].startswith("dense-"):
                comparison.main(command[4:])

    monkeypatch.setattr(comparison, "_in_parallel", in_parallel)
    monkeypatch.setattr(runs, "make_samples", lambda *_: None)
    with pytest.raises(SystemExit):  # no run was made
        comparison.main([*words, "--workers", "2"])
    assert asked[0] == ["dense-0", "dense-1"]
    assert asked[1] == [run.key for run in runs_of(experiment)]
    assert all(places.dense_result(seed).exists() for seed in (0, 1))
    with pytest.raises(SystemExit):
        comparison.main([*words, "--workers", "2"])
    assert asked[2:] == asked[1:2]  # the dense networks are there


def test_without_ray_it_goes_on_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done: list[object] = []
    monkeypatch.setattr(runs, "prepared", lambda *_: None)
    monkeypatch.setattr(finals, "time_finals", lambda *_, **__: None)
    monkeypatch.setattr(runs, "attempt", noting(done))
    path = stored(tmp_path)
    comparison.main([str(path), "--results", str(tmp_path), "--scratch", str(tmp_path), "--ray"])
    assert "wgates-plugin[ray]" in capsys.readouterr().out
    assert done == ["wgates-eager-80-0", "random-eager-80-0"]


@pytest.mark.slow
def test_runs_on_ray_are_processes_of_one_thread(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    word = "import os, sys; open(sys.argv[1], 'w').write(os.environ['OMP_NUM_THREADS'])"
    places = [tmp_path / name for name in "ab"]
    commands = [[sys.executable, "-c", word, str(place)] for place in places]
    assert comparison._on_ray(commands, tmp_path, gpus=0)
    assert [place.read_text() for place in places] == ["1", "1"]


@pytest.mark.parametrize("system", ["gdp", "scop", "functionality", "metapruning"])
def test_recipes_of_the_systems_are_those_of_the_experiment(system: str) -> None:
    """A reader can run one system alone by its recipe and get what the table is about."""
    experiment = load_experiment("systems")
    alone = load_recipe(FOLDER.parent / "recipes" / f"fashion_mnist_{system}.yaml")
    run = Run(system, "onnxruntime", 0.5, 0)
    of_run = recipe_of(experiment, run, Path("run"))
    for part in ("model", "data", "target", "dense_training", "pruning", "seed"):
        assert getattr(alone, part) == getattr(of_run, part), part


def test_the_unification_recipe_trains_for_as_many_epochs() -> None:
    recipe = load_recipe(FOLDER.parent / "recipes" / "fashion_mnist_unification.yaml")
    unification = recipe.pruning.unification
    assert unification is not None
    epochs = recipe.pruning.gate_epochs + recipe.pruning.fine_tune_epochs
    epochs += unification.admm_epochs + unification.retrain_epochs
    other = load_experiment("systems").recipe["pruning"]
    assert epochs == other["gate_epochs"] + other["fine_tune_epochs"]
