"""The comparison harness: experiments, what is missing, what the runs say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import comparison
from benchmarks.comparison import runs
from benchmarks.comparison.experiment import FOLDER, Run, load_experiment, recipe_of, runs_of
from benchmarks.comparison.summary import Difference, read_cells
from benchmarks.comparison.tables import HEAD, experiment_text
from wgates_plugin.errors import ConfigError
from wgates_plugin.files import write_json
from wgates_plugin.recipe import load_recipe

SMALL: dict[str, Any] = {
    "name": "small",
    "about": "digits, for the tests",
    "recipe": {
        "model": {"name": "digits_resnet"},
        "data": {"name": "digits", "batch_size": 64, "limit": 256},
        "dense_training": {"epochs": 1},
        "pruning": {
            "gate_epochs": 1,
            "fine_tune_epochs": 1,
            "samples": 10,
            "seconds_per_sample": 0.02,
            "measure_seconds": 0.05,
            "min_fraction": 0.1,
            "grid": 4,
            "active": False,
        },
    },
    "runtimes": [{"runtime": "eager"}],
    "targets": [0.8],
    "seeds": [0],
    "methods": {"wgates": {"strategy": "wgates", "rival": False}, "random": {"strategy": "random"}},
}


def stored(folder: Path, **changes: Any) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return path


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_experiments_are_sound(path: Path) -> None:
    experiment = load_experiment(path)
    assert experiment.name == path.stem
    assert "random" in experiment.methods  # without chance no cell can be called decided
    keys = [run.key for run in runs_of(experiment)]
    assert len(set(keys)) == len(keys)


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
    methods = {"a": {"strategy": "magic"}, "b": {"strategy": "l1", "options": {"scoop": 1}}}
    with pytest.raises(ConfigError) as caught:
        load_experiment(stored(tmp_path, methods=methods))
    assert "method `a`" in str(caught.value)
    assert "did you mean `scope`" in str(caught.value)
    with pytest.raises(ConfigError, match="targets"):
        load_experiment(stored(tmp_path, targets=[1.5]))


def made_up(accuracy: float, ratio: float = 0.49) -> dict[str, Any]:
    before = {"latency_ms": 2.0, "accuracy": 0.9, "macs": 10.0, "parameters": 10.0}
    after = {"latency_ms": 2.0 * ratio, "accuracy": accuracy, "macs": 5.0, "parameters": 4.0}
    return {
        "kind": "wgates-report",
        "baseline": before,
        "final": after,
        "after_removal": {"accuracy": 0.5},
        "contract": "held" if ratio <= 0.5 else "missed",
        "seconds": {"gates": 3.0},
    }


def filled(folder: Path, accuracies: dict[str, list[float]]) -> Any:
    experiment = load_experiment(
        stored(folder, seeds=[0, 1, 2], methods={m: {"strategy": "l1"} for m in accuracies})
    )
    home = folder / "results" / "comparison" / "small"
    for seed in experiment.seeds:
        dense = {"accuracy": 0.9, "trained_on": {"accuracy": 0.92}}
        write_json(home / f"dense-{seed}.json", dense)
    for method, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            path = home / "runs" / f"{Run(method, 'eager', 0.8, seed).key}.json"
            write_json(path, made_up(accuracy))
    return experiment


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


def test_an_experiment_runs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For real: trained, sampled, pruned by every method, timed in one sitting; a second call does
    only what is missing."""
    path = stored(tmp_path)
    words = [
        str(path), "--results", str(tmp_path / "results"), "--scratch", str(tmp_path / "work"),
    ]  # fmt: skip
    comparison.main(words)
    experiment = load_experiment(path)
    places = runs.Places(experiment, tmp_path / "results", tmp_path / "work")
    assert runs.missing(experiment, places) == []
    finals = json.loads(places.finals("eager").read_text())
    assert set(finals["ratio"]) == {run.key for run in runs_of(experiment)}
    assert all(len(passes) == 3 for passes in finals["passes"].values())
    report = json.loads(places.result(Run("random", "eager", 0.8, 0)).read_text())
    assert report["strategy"] == "random"
    dense = json.loads(places.dense_result(0).read_text())
    assert dense["trained_on"]["epochs"] == 2
    samples = places.samples("eager").read_text()
    assert "0 runs to do" not in capsys.readouterr().out
    comparison.main(words)
    assert "0 runs to do" in capsys.readouterr().out
    assert places.samples("eager").read_text() == samples


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
