"""Experiments of the comparison: their files, and what their runs say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from comparison_helpers import SMALL, filled, stored

from benchmarks.comparison import runs
from benchmarks.comparison.experiment import (
    FOLDER,
    Run,
    load_experiment,
    recipe_of,
    runs_of,
)
from benchmarks.comparison.summary import Difference, read_cells
from benchmarks.comparison.tables import HEAD, experiment_text, verdict
from wgates_plugin.errors import ConfigError
from wgates_plugin.recipe import load_recipe


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_experiments_are_sound(path: Path) -> None:
    experiment = load_experiment(path)
    assert experiment.name == path.stem
    assert "random" in experiment.methods  # without chance no cell can be called decided
    assert experiment.ours == (experiment.variant or "wgates")
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": [0, 1, 1]}, r"seeds.*one is there twice"),
        ({"seeds": []}, "seeds.*at least 1"),
        ({"runtimes": []}, "runtimes.*at least 1"),
        ({"methods": {}}, "methods.*at least 1"),
        ({"runtimes": [{"runtime": "eager"}, {"runtime": "onnxruntime", "thread": 1}]}, "thread"),
        ({"methods": {"dense-l1": {"strategy": "l1"}}}, "dense-l1.*rename"),
        (
            {"methods": {"a": {"strategy": "l1", "pruning": {"options": {"scope": "local"}}}}},
            "methods.a.pruning.*: options in `pruning`: not taken from there; write them beside",
        ),
        (
            {"recipe": {**SMALL["recipe"], "pruning": {"strategy": "l1"}}},
            "recipe.*: strategy in `pruning`: not taken from there; write them under `methods`",
        ),
    ],
)
def test_what_would_be_left_out_or_counted_twice_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        load_experiment(stored(tmp_path, **changes))


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
    epochs = dict.fromkeys(
        ("gate_epochs", "fine_tune_epochs")
    )  # what is shared is made before them
    for one in committed:
        for other in committed:
            if one.task is not None and one.task == other.task:
                mine, theirs = (
                    {**each.recipe, "pruning": {**each.recipe["pruning"], **epochs}}
                    for each in (one, other)
                )
                assert mine == theirs


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
