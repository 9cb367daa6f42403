"""What is missing of an experiment is done: by whom, on which machine, from which dense network."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from comparison_helpers import SMALL, made_up, stored

from benchmarks import comparison
from benchmarks.comparison import finals, runs
from benchmarks.comparison import turns as turns_module
from benchmarks.comparison.contests import compared
from benchmarks.comparison.experiment import (
    Run,
    dense_recipe,
    load_experiment,
    merged,
    runs_of,
)
from benchmarks.comparison.other_images import other_images
from benchmarks.tools.records import code_digest
from wgates_plugin.catalogue import TensorLoader, load_data
from wgates_plugin.errors import ConfigError, RuntimeUnavailableError, TargetError, WGatesError
from wgates_plugin.files import load_tensors, save_tensors, write_json
from wgates_plugin.recipe import prepare
from wgates_plugin.recipe.dense import WEIGHTS
from wgates_plugin.strategies.wgates import WGatesSettings
from wgates_plugin.surgery import rebuild
from wgates_plugin.training import evaluate


@pytest.fixture(autouse=True)
def _no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes sign up in the test's own folder."""
    monkeypatch.setattr(turns_module, "folder_of", lambda _: tmp_path / "workers")


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
    assert report["code"] == code_digest()
    dense = json.loads(places.dense_result(0).read_text())
    assert dense["trained_on"]["epochs"] == 2
    samples = places.samples("eager").read_text()
    assert "0 runs to do" not in capsys.readouterr().out
    comparison.main(words)
    assert "0 runs to do" in capsys.readouterr().out
    assert places.samples("eager").read_text() == samples
    # Its accuracy on the images that `limit` leaves out is stored with it, or added where it is not.
    others = other_images(experiment)
    assert others is not None
    assert report["other_images"]["images"] == len(others.images) == 450 - 256
    torn, scored = Run("wgates", "eager", 0.8, 0), Run("random", "eager", 0.8, 0)
    for run in (torn, scored):
        kept = json.loads(places.result(run).read_text())
        del kept["other_images"]
        write_json(places.result(run), kept)
    weights_file = places.run_folder(torn) / "pruned.safetensors"
    whole = weights_file.read_bytes()
    weights_file.write_bytes(whole[:100])
    comparison.main(words)
    assert json.loads(places.result(scored).read_text()) == report
    assert f"{torn.key}: not scored on other images" in capsys.readouterr().err
    weights_file.write_bytes(whole)
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
    folder = places.run_folder(run)
    pruned = rebuild(network, folder / "plan.json", folder / "pruned.safetensors")
    assert evaluate(pruned, data.val_loader).accuracy == report["final"]["accuracy"]
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


def test_other_images_are_those_that_no_run_is_judged_by(tmp_path: Path) -> None:
    experiment = load_experiment(stored(tmp_path))
    _, data, *_ = prepare(dense_recipe(experiment, 0, tmp_path / "dense"))
    mine, others = data.val_loader, other_images(experiment)
    assert isinstance(mine, TensorLoader)
    assert isinstance(others, TensorLoader)
    whole = load_data("digits").val_loader
    assert isinstance(whole, TensorLoader)
    rows = sorted([*mine.images.flatten(1).tolist(), *others.images.flatten(1).tolist()])
    assert rows == sorted(whole.images.flatten(1).tolist())
    assert (others.mean, others.std, others.shift) == (mine.mean, mine.std, mine.shift)
    fewer = other_images(load_experiment(stored(tmp_path, largest_limit=300)))
    assert fewer is not None
    assert len(fewer.images) == 450 - 300
    assert {str(image) for image in fewer.images} <= {str(image) for image in others.images}
    free = {**SMALL["recipe"], "data": {"name": "digits"}}
    assert other_images(load_experiment(stored(tmp_path, recipe=free))) is None


def test_committed_experiments_leave_out_the_same_images() -> None:
    kept: dict[str, set[int]] = {}
    for experiment in compared():
        block = dense_recipe(experiment, 0, Path("dense")).data
        if block.limit is not None:
            largest = max(block.limit, experiment.largest_limit or 0)
            kept.setdefault(block.name, set()).add(largest)
    assert kept == {"fashion-mnist": {4000}}


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
    del mine["grid"]  # the job's
    write_json(places.result(first), {"settings": same, "resolved_options": {**mine, "grid": 1}})
    assert runs.outdated(experiment, places, [first]) == []
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


def test_a_dense_network_that_came_out_differently_is_refused(tmp_path: Path) -> None:
    """Trained on another machine, it is not the one of the stored runs."""
    experiment = load_experiment(stored(tmp_path))
    places = runs.Places(experiment, tmp_path / "results", tmp_path / "work")
    write_json(places.dense_result(0), {"weights": "another"})
    with pytest.raises(WGatesError, match="is not the one of the stored runs"):
        runs.make_dense(experiment, places, 0)
    assert json.loads(places.dense_result(0).read_text()) == {"weights": "another"}


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
    write_json(places.dense_result(0), {"made_by": runs._made_by(experiment)})
    runs.refuse_other_dense(experiment, places, [0])
    recipe = merged(experiment.recipe, {"pruning": {"fine_tune_epochs": 3}})
    longer = stored(tmp_path, recipe=recipe)
    with pytest.raises(ConfigError) as caught:
        comparison.main([str(longer), "--results", str(tmp_path), "--scratch", str(tmp_path)])
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
    failed = runs.attempt(experiment, places, second)  # as a worker elsewhere would begin it
    assert failed.startswith(f"{second.key}: failed: ConfigError: ")
    assert "this machine is two AVX512" in failed


def test_a_network_with_weights_of_its_own_is_not_trained_first(tmp_path: Path) -> None:
    recipe = dict(SMALL["recipe"])
    del recipe["dense_training"]
    given, *_ = prepare(dense_recipe(load_experiment(stored(tmp_path)), 7, tmp_path))
    save_tensors(tmp_path / "mine.safetensors", dict(given.state_dict()))
    recipe["model"] = {"name": "digits_resnet", "weights": str(tmp_path / "mine.safetensors")}
    experiment = load_experiment(stored(tmp_path, name="own", recipe=recipe))
    places = runs.Places(experiment, tmp_path / "results", tmp_path / "work")
    runs.make_dense(experiment, places, 0)
    made = load_tensors(places.dense_folder(0) / WEIGHTS, kind="dense network")
    assert all(torch.equal(made[name], value) for name, value in given.state_dict().items())
    assert json.loads(places.dense_result(0).read_text())["trained_on"]["epochs"] == 2


def test_a_runtime_that_is_not_there_is_said_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [{"runtime": "eager"}, {"runtime": "eager-elsewhere"}]
    experiment = load_experiment(stored(tmp_path))
    experiment = experiment.model_copy(update={"runtimes": blocks})
    places = runs.Places(experiment, tmp_path / "results", tmp_path / "work")
    monkeypatch.setattr(runs, "make_dense", lambda *_: pytest.fail("trained"))
    with pytest.raises(RuntimeUnavailableError, match="eager-elsewhere"):
        runs.prepared(experiment, places, list(runs_of(experiment)))


@pytest.mark.parametrize("words", [["--seed", "1"], ["--method", "l1"]])
def test_words_that_are_nearly_right_are_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        comparison.main(["fashion_resnet20", *words])
    assert f"unrecognized arguments: {' '.join(words)}" in capsys.readouterr().err


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
