"""The command line: what it prints, where, and its exit codes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from tests.test_report import folder_with, made_up
from wgates_plugin.cli import app
from wgates_plugin.errors import TrainingError

RECIPE = {
    "model": {"name": "digits_resnet"},
    "data": {"name": "digits"},
    "target": {"fraction": 0.5, "runtime": "eager"},
    "dense_training": {"epochs": 1},
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def in_one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


class Job:
    """Stands in for the whole job and remembers what it was asked."""

    def __init__(self, outcome: Any) -> None:
        self.outcome, self.asked = outcome, {}

    def __call__(self, recipe: Any, **asked: Any) -> Any:
        self.asked = {"recipe": recipe, **asked}
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        from wgates_plugin.pipeline import PruningResult

        folder = recipe.folder
        held = self.outcome["contract"] == "held"
        none: Any = None
        return PruningResult(none, none, self.outcome, folder, folder / "model.onnx", held)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(outcome: Any) -> Job:
        stand_in = Job(outcome)
        monkeypatch.setattr(importlib.import_module("wgates_plugin.recipe"), "run_recipe", stand_in)
        return stand_in

    return install


def test_help_names_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("demo", "prune", "measure", "fit-lpnet", "report"):
        assert command in result.output


def test_a_bad_recipe_lists_everything_on_stderr(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    raw = {**RECIPE, "modle": 1, "pruning": {"samples": "x"}, "target": {"runtime": "onnx"}}
    path.write_text(yaml.safe_dump(raw))
    result = run("prune", path, "--set", "data.name=digitz", "--set", "model.name=resnet_smal")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for piece in (
        "`modle`: unknown key; did you mean `model`?",
        "`pruning.samples`: is 'x'",
        "`target.runtime`: unknown runtime `onnx`",
        "`target`: needs exactly one of",
        "`data.name`: unknown data set `digitz`",
        "close to it: resnet_small",
    ):
        assert piece in result.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("prune", tmp_path / "nothing.yaml", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "no such file" in result.stderr


def test_prune_prints_the_table_and_the_paths(recipe: Path, job: Any, tmp_path: Path) -> None:
    stand_in = job(made_up())
    out = tmp_path / "out"
    result = run("prune", recipe, "--out", out, "--set", "seed=4", "--resume")
    assert result.exit_code == 0
    assert stand_in.asked["resume"] is True
    assert stand_in.asked["recipe"].seed == 4
    assert stand_in.asked["recipe"].folder == out
    for piece in (
        "2.40 ms",
        "1.18 ms",
        "target held",
        *("report.html", "report.json", "model.onnx"),
    ):
        assert piece in result.stdout


def test_a_missed_target_is_exit_code_one(recipe: Path, job: Any) -> None:
    job(made_up(contract="missed"))
    result = run("prune", recipe)
    assert result.exit_code == 1
    assert "missed" in result.stdout


def test_ctrl_c_says_how_to_go_on(recipe: Path, job: Any) -> None:
    job(KeyboardInterrupt())
    result = run("prune", recipe, "--out", "a folder", "--set", "seed=4")
    assert result.exit_code == 130
    expected = f"wgates prune {recipe} --out 'a folder' --set seed=4 --resume"
    assert expected in result.stderr


def test_errors_of_the_job_are_one_clean_message(recipe: Path, job: Any) -> None:
    job(TrainingError("gates: the loss is [bold]nan[/bold]"))
    result = run("prune", recipe)
    assert result.exit_code == 2
    assert result.stderr == "Error: gates: the loss is [bold]nan[/bold]\n"


def test_errors_of_other_origin_are_not_hidden(recipe: Path, job: Any) -> None:
    job(ZeroDivisionError("a bug"))
    assert isinstance(run("prune", recipe).exception, ZeroDivisionError)


def test_demo_runs_the_built_in_recipe(job: Any, tmp_path: Path) -> None:
    stand_in = job(made_up())
    result = run("demo", "--out", tmp_path / "demo", "--seed", 7)
    assert result.exit_code == 0
    asked = stand_in.asked["recipe"]
    assert (asked.model.name, asked.seed) == ("digits_resnet", 7)
    assert asked.folder == tmp_path / "demo"
    assert asked.target.fraction == 0.5


def test_report_makes_the_page_again(tmp_path: Path) -> None:
    folder_with(made_up(), tmp_path)
    result = run("report", tmp_path)
    assert result.exit_code == 0
    assert (tmp_path / "report.html").exists()
    assert "2.40 ms -> 1.18 ms" in in_one_line(result.stdout)


def test_report_of_nothing_is_a_clean_error(tmp_path: Path) -> None:
    result = run("report", tmp_path)
    assert result.exit_code == 2
    assert "no such file" in result.stderr


def test_measure_gives_latency_with_spread() -> None:
    result = run(
        *("measure", "digits_resnet", "--runtime", "eager", "--seconds", 0.1),
        *("--input-shape", "1x1x8x8", "--classes", 10),
    )
    assert result.exit_code == 0, result.output
    for piece in ("latency", "spread", "ms", "torch"):
        assert piece in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("digits_resnet", "--runtime", "abacus"), "runtime `abacus`: unknown"),
        (("digits_resnet", "--runtime", "eager", "--input-shape", "1,a"), "needs a form like"),
        (("resnet_smal", "--runtime", "eager"), "did you mean resnet_small"),
    ],
)
def test_measure_refuses_cleanly(arguments: tuple[str, ...], words: str) -> None:
    result = run("measure", *arguments)
    assert result.exit_code == 2
    assert words in in_one_line(result.stderr)


def test_fit_lpnet_goes_on_with_kept_samples(tmp_path: Path) -> None:
    out = tmp_path / "lpnet.safetensors"
    common = (
        *("fit-lpnet", "digits_resnet", "--runtime", "eager", "--input-shape", "1,1,8,8"),
        *("--classes", 10, "--grid", 8, "--seconds", 0.01, "--out", out),
    )
    first = run(*common, "--samples", 8)
    assert first.exit_code == 0, first.output
    assert "held-out error" in first.stdout
    kept = tmp_path / "lpnet.samples.jsonl"
    before = kept.read_text()
    second = run(*common, "--samples", 10)
    assert second.exit_code == 0, second.output
    assert "2 measured now" in second.stdout
    assert kept.read_text().startswith(before)
    assert len(kept.read_text().splitlines()) == 11
    other = run(*common, "--samples", 12, "--threads", 2)
    assert other.exit_code == 2
    assert "use another file per runtime" in other.stderr
    header = json.loads(before.splitlines()[0])
    assert header["reference_ms"] > 0
