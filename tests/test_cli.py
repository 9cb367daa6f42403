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
    result = run("prune", recipe)
    assert result.exit_code == 2  # 1 would say that the target was missed
    assert "Traceback" in result.stderr
    assert "Error: not foreseen (ZeroDivisionError: a bug)" in result.stderr


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
    for piece in ("spread", "drift", "per s", "one inference of 1x1x8x8 on cpu", "torch"):
        assert piece in result.stdout


DIGITS = ("--input-shape", "1,1,8,8", "--classes", 10, "--seconds", 0.1)


def test_measure_takes_several_runtimes_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    result = run(
        *("measure", "digits_resnet", *DIGITS, "--runtime", "eager", "--runtime", "onnxruntime"),
        *("--runtime-option", "eager.channels_last=true", "--out", out),
    )
    assert result.exit_code == 0, result.output
    assert "eager: loading" in result.stderr
    found = json.loads(out.read_text())
    assert found["inputs"] == {"input_0": [1, 1, 8, 8]}
    assert [row["runtime"] for row in found["results"]] == ["eager", "onnxruntime"]
    for row in found["results"]:
        ms = row["measurement"]["latency_ms"]
        measured = row["measurement"]
        seconds = measured["inference_seconds"] / measured["inferences"]
        assert row["per_second"] == pytest.approx(1 / seconds)
        assert row["measurement"]["identity"]["library_version"] in in_one_line(result.stdout)
        assert f"{ms:.4g}" in result.stdout
    assert found["results"][0]["measurement"]["identity"]["options"] == {"channels_last": True}


def test_one_runtime_that_fails_does_not_take_the_others_along(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    result = run(
        *("measure", "digits_resnet", *DIGITS, "--runtime", "cuda-graphs", "--runtime", "eager"),
        *("--out", out),
    )
    assert result.exit_code == 2
    assert "runtime `cuda-graphs`" in result.stderr
    failed, done = json.loads(out.read_text())["results"]
    assert "cuda-graphs" in failed["error"]
    assert done["measurement"]["latency_ms"] > 0


@pytest.mark.parametrize(
    ("runtime", "name", "words"),
    [
        ("onnxruntime", "model.onnx", "made for [1, 1, 8, 8]"),
        ("eager", "model.pt2", "--input-shape: 1 problem - got 1,3,8,8"),
    ],
)
def test_measure_runs_an_exported_file(runtime: str, name: str, words: str, tmp_path: Path) -> None:
    import torch

    from wgates_plugin.catalogue import load_model
    from wgates_plugin.latency import get_runtime

    network = load_model("digits_resnet", classes=10, in_channels=1)
    path = tmp_path / name
    get_runtime(runtime).save(network, torch.zeros(1, 1, 8, 8), path)
    asked = ("measure", path, "--seconds", 0.1, "--runtime", runtime)
    assert run(*asked, "--input-shape", "1,1,8,8").exit_code == 0
    for option, value in (("--classes", 10), ("--weights", path)):
        useless = run(*asked, option, value)
        assert useless.exit_code == 2
        assert f"{option}: 1 problem" in in_one_line(useless.stderr)
    wrong = run("measure", path, "--runtime", runtime, "--input-shape", "1,3,8,8")
    assert wrong.exit_code == 2
    assert words in in_one_line(wrong.stderr)


def test_drift_is_the_later_half_over_the_earlier() -> None:
    from fake_bench import REFERENCE_MS, SteadySession

    from wgates_plugin.cli.measure import Row
    from wgates_plugin.latency import measure

    found = measure(SteadySession(REFERENCE_MS), seconds=0.0, min_rounds=4, identity={"batch": 8})
    row = Row("fake", found=found)
    assert row.drift == 0.0
    assert row.per_second == pytest.approx(8 * 1000 / REFERENCE_MS)


def test_inputs_per_second_are_over_all_inferences() -> None:
    from fake_bench import SteadySession

    from wgates_plugin.cli.measure import Row
    from wgates_plugin.latency import measure

    found = measure(SteadySession(1.0, 3.0), seconds=0.0, min_rounds=4, identity={"batch": 1})
    assert found.latency_ms == 1.0
    assert found.inferences == 4 * 15
    assert Row("fake", found=found).per_second == pytest.approx(500, rel=0.02)


def test_a_grid_that_cannot_be_probed_leaves_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wgates_plugin.errors import ExportError

    def broken(runtime: Any) -> Any:
        raise ExportError("no chains here")

    monkeypatch.setattr("wgates_plugin.latency.probe_grid", broken)
    out = tmp_path / "found.json"
    result = run("measure", "digits_resnet", *DIGITS, "--runtime", "eager", "--grid", "--out", out)
    assert result.exit_code == 2
    assert "no chains here" in result.stderr
    assert "per s" in result.stdout
    (row,) = json.loads(out.read_text())["results"]
    assert "no chains here" in row["error"]
    assert row["measurement"]["latency_ms"] > 0


@pytest.mark.parametrize("command", ["measure", "fit-lpnet"])
def test_a_shape_the_network_cannot_take(command: str) -> None:
    result = run(command, "mobilenet_v2", "--input-shape", "1,3,2", "--runtime", "eager")
    assert result.exit_code == 2
    words = in_one_line(result.stderr)
    for piece in ("got 1,3,2", "layer `features.0.0` of mobilenet_v2", "such as 1,3,224,224"):
        assert piece in words
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--structure", "mlp", "--active"), "does not know how sure it is"),
        (("--structure", "tree"), "known: layers, mlp"),
        (("--prior", "nothing.safetensors"), "cannot be read"),
    ],
)
def test_fit_lpnet_refuses_before_measuring(arguments: tuple[str, ...], words: str) -> None:
    result = run("fit-lpnet", "digits_resnet", *DIGITS, "--runtime", "eager", *arguments)
    assert result.exit_code == 2
    assert words in in_one_line(result.stderr)


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


def test_runtime_options_reach_the_runtime(tmp_path: Path) -> None:
    common = ("--input-shape", "1,1,8,8", "--classes", 10, "--seconds", 0.1, "--runtime", "eager")
    options = ("--runtime-option", "channels_last=true", "--precision", "bfloat16")
    found = run("measure", "digits_resnet", *common, *options)
    assert found.exit_code == 0, found.output
    kept = tmp_path / "lpnet.samples.jsonl"
    asked = ("--grid", 8, "--samples", 8, "--out", tmp_path / "lpnet.safetensors")
    found = run("fit-lpnet", "digits_resnet", *common, *options, *asked)
    assert found.exit_code == 0, found.output
    identity = json.loads(kept.read_text().splitlines()[0])["identity"]
    assert identity["precision"] == "bfloat16"
    assert identity["options"] == {"channels_last": True}


@pytest.mark.parametrize("command", ["measure", "fit-lpnet"])
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("channels_last", "needs the form key=value"),
        ("channels_last=maybe", "is 'maybe'; Input should be a valid boolean"),
        ("chanels_last=true", "did you mean `channels_last`?"),
    ],
)
def test_bad_runtime_options(command: str, option: str, words: str) -> None:
    shape = ("--input-shape", "1,1,8,8")
    found = run(command, "digits_resnet", *shape, "--runtime", "eager", "--runtime-option", option)
    assert found.exit_code == 2
    assert words in in_one_line(found.stderr)


def test_fit_lpnet_goes_on_with_kept_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [line.get("type") for line in lines].count("sample") == 10
    monkeypatch.setattr("wgates_plugin.latency.base.usable_cores", lambda: 2)
    other = run(*common, "--samples", 12, "--threads", 2)
    assert other.exit_code == 2
    assert "use another file per runtime" in other.stderr
    # One for each time that the reference was calibrated, which a machine that drifts asks for.
    sources = [line for line in lines if line.get("type") == "source"]
    assert sources
    clocks = [source["reference"].get("dense_ms", source["reference_ms"]) for source in sources]
    assert min(clocks) > 0


def test_fit_lpnet_with_prior_report_and_another_structure(tmp_path: Path) -> None:
    first, second = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    common = ("--input-shape", "1,1,8,8", "--classes", 10, "--grid", 8, "--seconds", 0.01)
    made = run("fit-lpnet", "digits_resnet", *common, "--samples", 8, "--out", first)
    assert made.exit_code == 0, made.output
    report = tmp_path / "page"
    asked = ("--runtime", "eager", "--samples", 9, "--no-profile", "--prior", first)
    made = run("fit-lpnet", "digits_resnet", *common, *asked, "--out", second, "--report", report)
    assert made.exit_code == 0, made.output
    assert "9/9:" in made.stderr
    assert "90 % interval" in made.stdout
    assert (report / "lpnet.html").is_file()
    found = json.loads((report / "lpnet.json").read_text())
    assert (found["identity"]["runtime"], found["profiled"]) == ("eager", 0)
    kept = (*common, "--runtime", "eager", "--samples", 9, "--structure", "mlp")
    file = ("--samples-file", tmp_path / "two.samples.jsonl")
    made = run("fit-lpnet", "digits_resnet", *kept, *file, "--out", tmp_path / "three.safetensors")
    assert made.exit_code == 0, made.output
    assert "0 measured now" in made.stdout


def test_the_live_table_shows_prediction_and_totals(tmp_path: Path) -> None:
    import io

    from fake_bench import IDENTITY, steady_bench
    from networks import example, tiny
    from rich.console import Console

    from wgates_plugin import trace
    from wgates_plugin.cli.live_samples import SHOWN, LiveSamples
    from wgates_plugin.efficiency.learner import Learner
    from wgates_plugin.efficiency.samples.file import SampleFile
    from wgates_plugin.efficiency.sampling import collect

    space = trace(tiny("residual"), example())
    file = SampleFile.open(tmp_path / "samples.jsonl", space, IDENTITY)
    learner = Learner(space, seed=0)
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with LiveSamples(file, space, 14, console=console, learner=learner) as shown:
        collect(
            file, space, steady_bench(space), count=14, grid=1, seed=0, seconds_per_sample=0.0,
            active=learner.active(covering=10), on_sample=shown,
        )  # fmt: skip
        plain = Console(width=120)
        with plain.capture() as captured:
            plain.print(shown._view())
    text = captured.get()
    assert "14/14" in text
    assert "measured again: 0" in text
    rows = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    assert len(rows) == SHOWN
    assert [bool(row[3].strip()) for row in rows] == [False] * (SHOWN - 4) + [True] * 4
    assert rows[-1][0].strip() == "14"
