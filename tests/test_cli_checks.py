"""What the command line refuses before it times anything, and what it says of its figures."""

from __future__ import annotations

import importlib
import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_bench import IDENTITY, REFERENCE_MS, SteadySession, steady_bench
from networks import example, tiny
from rich.console import Console
from torch import nn
from typer.testing import CliRunner, Result

from wgates_plugin import ChannelSpace, trace
from wgates_plugin.catalogue import load_model
from wgates_plugin.cli import app
from wgates_plugin.cli.app import guarded
from wgates_plugin.cli.fit_warnings import fit_warnings
from wgates_plugin.cli.measure import Row, table
from wgates_plugin.cli.runtimes import NAMES
from wgates_plugin.efficiency.lpnet import LPNet
from wgates_plugin.efficiency.samples.file import SampleFile
from wgates_plugin.errors import ConfigError, MissingExtraError
from wgates_plugin.latency import RUNTIMES, get_runtime, measure
from wgates_plugin.latency.artefacts import input_sides

DIGITS = ("--input-shape", "1,1,8,8", "--classes", 10, "--seconds", 0.1)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_console_without_the_letters_ends_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    with guarded(debug=False, again=[]):
        print("\u2264 2 ms", flush=True)
    assert written.getvalue().strip() == b"? 2 ms"


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be timed."""

    def timed(*_: object, **__: object) -> None:
        raise AssertionError("something was timed")

    monkeypatch.setattr("wgates_plugin.latency.measure", timed)
    monkeypatch.setattr("wgates_plugin.latency_study.measure", timed)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the digits network in each format."""
    folder = tmp_path_factory.mktemp("exported")
    network = load_model("digits_resnet", classes=10, in_channels=1)
    for runtime in ("onnxruntime", "eager", "executorch"):
        one = get_runtime(runtime)
        one.save(network, torch.zeros(1, 1, 8, 8), folder / one.artefact_name)
    return folder


def test_the_names_in_the_help_are_the_runtimes() -> None:
    assert tuple(RUNTIMES) == NAMES
    shown = " ".join(run("measure", "--help").output.split())
    for piece in (*NAMES, "[default: (onnxruntime)]"):
        assert piece in shown


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize(
    ("command", "option"),
    [("measure", "--out"), ("fit-lpnet", "--out"), ("fit-lpnet", "--samples-file")],
)
def test_an_output_that_cannot_be_written(command: str, option: str, tmp_path: Path) -> None:
    words = refused(command, "digits_resnet", *DIGITS, "--runtime", "eager", option, tmp_path)
    assert f"{option}: 1 problem - `{tmp_path}` is a folder" in words
    file = tmp_path / "file"
    file.touch()
    words = refused(command, "digits_resnet", *DIGITS, "--runtime", "eager", option, file / "a")
    assert f"`{file}` is a file, no folder" in words


@pytest.mark.usefixtures("untimed")
def test_what_is_read_or_kept_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prior = tmp_path / "run" / "lpnet.safetensors"
    prior.parent.mkdir()
    prior.write_bytes(b"learned")
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"trained")
    common = ("digits_resnet", *DIGITS, "--runtime", "eager")
    for asked, option in (
        (("--out", "a", "--samples-file", tmp_path / "b" / ".." / "a"), "--samples-file"),
        (("--prior", prior, "--out", "run/lpnet.safetensors"), "--prior"),
        (("--prior", "run", "--out", prior), "--prior"),
        (("--weights", weights, "--out", "weights.safetensors"), "--weights"),
    ):
        words = refused("fit-lpnet", *common, *asked)
        assert f"--out: 1 problem - `{asked[asked.index('--out') + 1]}` is the file of" in words
        assert f"the file of {option} too; give another path" in words
    words = refused("measure", *common, "--weights", weights, "--out", weights)
    assert "is the file of --weights too" in words
    words = refused("fit-lpnet", *common, "--prior", prior, "--samples-file", prior)
    assert f"--samples-file: 1 problem - `{prior}` is the file of --prior too" in words
    assert (prior.read_bytes(), weights.read_bytes()) == (b"learned", b"trained")


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nofile.onnx",), "`nofile.onnx`: no such file"),
        (("runs/nothing",), "`runs/nothing`: no such file"),
        (("digits_resnet", "--runtime", "onnxrutime"), "did you mean `onnxruntime`"),
        (
            ("digits_resnet", "--runtime", "eager", "--runtime-option", "compile.freezing=false"),
            "is for runtime `compile`, which is not asked for",
        ),
        (
            ("digits_resnet", "--runtime", "eager", "--runtime-option", "eagre.channels_last=true"),
            "did you mean `eager`",
        ),
        (("digits_resnet", "--runtime", "command"), 'command=["python", "on_phone.py", "{model}"'),
    ],
)
def test_measure_refuses_before_timing(arguments: tuple[str, ...], words: str) -> None:
    assert words in refused("measure", *arguments, *DIGITS)


@pytest.mark.usefixtures("untimed")
def test_all_runtimes_are_checked_before_the_first_is_timed() -> None:
    asked = ("--runtime", "eager", "--runtime", "openvin", "--runtime-option", "eager.chanels=1")
    assert "did you mean `openvino`" in refused("measure", "digits_resnet", *DIGITS, *asked)


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("command", ["measure", "fit-lpnet"])
def test_files_of_another_kind_are_named(command: str, exported: Path, tmp_path: Path) -> None:
    weights = tmp_path / "pruned.safetensors"
    weights.touch()
    assert "holds weights and no network" in refused(command, weights)
    if command == "measure":
        words = refused("measure", exported / "model.onnx", "--runtime", "eager")
        assert "is an ONNX model; it takes a torch.export program (`*.pt2`)" in words
        assert "onnxruntime, openvino, tensorrt, command (artefact=onnx)" in words
        words = refused("measure", exported / "model.pt2")
        assert "is a torch.export program; it takes an ONNX model" in words
    else:
        words = refused("fit-lpnet", exported / "model.onnx")
        assert "an exported file has fixed widths" in words


@pytest.mark.parametrize(
    ("runtime", "name"),
    [("onnxruntime", "model.onnx"), ("eager", "model.pt2"), ("executorch", "model.pte")],
)
def test_a_file_brings_its_input_shape(runtime: str, name: str, exported: Path) -> None:
    assert input_sides(exported / name) == {"input_0": ((1, 1, 8, 8), torch.float32)}
    result = run("measure", exported / name, "--runtime", runtime, "--seconds", 0.1)
    assert result.exit_code == 0, result.output
    assert "one inference of 1,1,8,8 on cpu" in result.stdout


def test_a_foreign_onnx_file_brings_its_input_name(tmp_path: Path) -> None:
    network = load_model("digits_resnet", classes=10, in_channels=1).eval()
    path = tmp_path / "foreign.onnx"
    torch.onnx.export(
        network, (torch.zeros(1, 1, 8, 8),), path, input_names=["image"], dynamo=False
    )
    assert input_sides(path) == {"image": ((1, 1, 8, 8), torch.float32)}
    assert run("measure", path, "--seconds", 0.1).exit_code == 0


@pytest.mark.parametrize(
    ("runtime", "name"),
    [("onnxruntime", "words.onnx"), ("eager", "words.pt2"), ("executorch", "words.pte")],
)
def test_a_file_may_take_whole_numbers(runtime: str, name: str, tmp_path: Path) -> None:
    words = torch.zeros(1, 5, dtype=torch.int64)
    get_runtime(runtime).save(nn.Embedding(7, 4), words, tmp_path / name)
    assert input_sides(tmp_path / name) == {"input_0": ((1, 5), torch.int64)}
    result = run("measure", tmp_path / name, "--runtime", runtime, "--seconds", 0.1)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("runtime", "advice"),
    [
        ("onnxruntime", "give the --device that it was exported for, or export it again"),
        ("openvino", "give the --precision that it was exported for, or export it again"),
    ],
)
def test_a_file_that_fails_is_advised_on_what_its_runtime_knows(
    runtime: str, advice: str, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(RUNTIMES[runtime], "load_file", broken)
    words = refused("measure", exported / "model.onnx", "--runtime", runtime)
    assert f"inputs of its own shape, 1,1,8,8 (no kernel); {advice}" in words


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_foreign_onnx_file_may_leave_its_batch_open(runtime: str, tmp_path: Path) -> None:
    network = load_model("digits_resnet", classes=10, in_channels=1).eval()
    path = tmp_path / "foreign.onnx"
    axes = {"image": {0: "batch"}}
    torch.onnx.export(
        network,
        (torch.zeros(1, 1, 8, 8),),
        path,
        input_names=["image"],
        dynamic_axes=axes,
        dynamo=False,
    )
    assert "does not say the whole shape" in refused("measure", path, "--runtime", runtime)
    asked = ("--runtime", runtime, "--input-shape", "2,1,8,8", "--seconds", 0.1)
    result = run("measure", path, *asked)
    assert result.exit_code == 0, result.output
    assert "one inference of 2,1,8,8" in result.stdout


@pytest.mark.usefixtures("untimed")
def test_weights_beside_a_file_are_refused(exported: Path, tmp_path: Path) -> None:
    words = refused("measure", exported / "model.onnx", "--weights", tmp_path / "w.safetensors")
    assert "has weights of its own" in words


def test_a_runtime_that_breaks_takes_no_other_along(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(RUNTIMES["onnxruntime"], "load", broken)
    runtimes = ("--runtime", "onnxruntime", "--runtime", "eager", "--out", tmp_path / "out.json")
    result = run("measure", "digits_resnet", *DIGITS, *runtimes)
    assert result.exit_code == 2
    assert "runtime `onnxruntime`: failed (RuntimeError: no kernel)" in result.stderr
    first, second = json.loads((tmp_path / "out.json").read_text())["results"]
    assert "no kernel" in first["error"]
    assert second["measurement"]["latency_ms"] > 0


@pytest.mark.parametrize(
    "error", [ConfigError("settings", ["a", "b"]), MissingExtraError("ray", "ray", "sampling")]
)
def test_errors_come_whole_out_of_other_processes(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))


@pytest.mark.usefixtures("untimed")
def test_a_grid_without_widths_is_refused_first(tmp_path: Path) -> None:
    asked = ("--grid", 500, "--samples", 8, "--runtime", "eager", "--out", tmp_path / "lpnet")
    words = refused("fit-lpnet", "digits_resnet", *DIGITS, *asked)
    assert "only 1 different widths on a grid of 500" in words


def test_factories_of_the_current_folder_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mynets_here.py").write_text(
        "from wgates_plugin.catalogue.networks import DigitsResNet as net\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in importlib.sys.path if p not in ("", ".")])
    result = run("measure", "mynets_here:net", *DIGITS, "--runtime", "eager")
    assert result.exit_code == 0, result.output


def measured(disturbed: int, **identity: Any) -> Row:
    facts = {"batch": 1, "library": "onnxruntime", "library_version": "1.31.1", **identity}
    switches = iter(range(disturbed * 40)) if disturbed else iter([0] * 10_000)
    found = measure(
        SteadySession(REFERENCE_MS),
        seconds=0.0,
        min_rounds=20,
        identity=facts,
        switches=lambda: next(switches) if disturbed else 0,
    )
    return Row("onnxruntime", found=found)


def test_the_table_marks_disturbed_figures_and_fits_eighty_columns() -> None:
    rows = [measured(0), measured(1000)]
    assert rows[0].cells()[4] == "0%"
    assert rows[1].cells()[4].startswith("!")
    rows[0].compile_seconds = 12.3
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table("digits", rows))
    text = captured.get()
    for piece in ("onnxruntime", "compile s", "disturbed", "12.3"):
        assert piece in text
    assert "…" not in text


def test_a_program_s_device_is_named_and_no_library_made_up() -> None:
    row = measured(0, library=None, library_version=None, device_name="phone")
    assert (row.elsewhere, row.library) == ("phone", "-")
    row.reported_library = "tflite 2.19"
    assert row.library == "tflite 2.19"


def test_no_empty_table_where_everything_failed() -> None:
    asked = ("--runtime", "cuda-graphs", "--runtime", "tensorrt")
    result = run("measure", "digits_resnet", *DIGITS, *asked)
    assert result.exit_code == 2
    assert result.stdout == ""


@pytest.fixture(scope="module")
def space() -> ChannelSpace:
    return trace(tiny("residual"), example())


def fitted(space: ChannelSpace, noise: float, count: int) -> LPNet:
    rng = torch.Generator().manual_seed(0)
    widths = [
        [int(torch.randint(1, g.channels + 1, (1,), generator=rng)) for g in space.groups]
        for _ in range(count)
    ]
    times = [
        (1.0 + sum(row)) * float(torch.exp(noise * torch.randn(1, generator=rng))) for row in widths
    ]
    return LPNet.fit(space, widths, times, structure="mlp")


def test_a_poor_fit_says_so_with_the_next_step(space: ChannelSpace) -> None:
    (words,) = fit_warnings(fitted(space, noise=0.5, count=8))
    assert "off on average" in words
    assert "without a 90 % interval, which needs 9 measurements" in words
    assert "--samples 40: the 8 measured ones are kept" in words


def test_no_more_samples_are_asked_for_than_there_are_networks(space: ChannelSpace) -> None:
    (words,) = fit_warnings(fitted(space, noise=0.5, count=8), there=8, grid=16)
    assert "All 8 networks on the grid of 16 are measured" in words
    assert "--grid 8" in words
    assert "--samples" not in words


def test_the_lines_of_samples_have_units(space: ChannelSpace, tmp_path: Path) -> None:
    import io

    from wgates_plugin.cli.live_samples import LiveSamples
    from wgates_plugin.efficiency.sampling import collect

    file = SampleFile.open(tmp_path / "samples.jsonl", space, IDENTITY)
    out = io.StringIO()
    with LiveSamples(file, space, 8, console=Console(file=out, width=200)) as shown:
        collect(
            file, space, steady_bench(space), count=8, grid=1, seed=0, seconds_per_sample=0.0,
            on_sample=shown,
        )  # fmt: skip
    line = out.getvalue().splitlines()[0]
    assert line.startswith("1/8: MACs ")
    assert " ms, spread " in line
    assert "again" not in line
    shown._shares, shown._drifts = [0.4] * 8, [0.96] * 8
    disturbed, drift = shown.warnings()
    assert "40% of the inferences were disturbed" in disturbed
    assert "-4.0%" in drift


def test_the_samples_own_grid_is_told_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "lpnet.safetensors"
    common = ("fit-lpnet", "digits_resnet", *DIGITS[:-1], 0.01, "--runtime", "eager", "--out", out)
    first = run(*common, "--samples", 8, "--grid", 8, "--no-profile")
    assert first.exit_code == 0, first.output
    assert "8 sub-networks on multiples of 8 channels" in first.stdout
    assert "Warning: this LPNet" in first.stderr
    again = run(*common, "--samples", 9, "--no-profile")
    assert again.exit_code == 0, again.output
    assert "probing" not in again.stderr
    assert "9 sub-networks on multiples of 8 channels" in again.stdout
    mixed = run(*common, "--samples", 10, "--grid", 16, "--no-profile")
    assert "the 9 kept samples are on multiples of 8 channels, new ones on" in " ".join(
        mixed.stderr.split()
    )
    own = run(
        *common[:-1], tmp_path / "other.safetensors", "--samples", 8, "--grid", 8, "--prior", out
    )
    assert own.exit_code == 2
    assert "fitted on this very runtime" in " ".join(own.stderr.split())
    assert json.loads((tmp_path / "lpnet.samples.jsonl").read_text().splitlines()[0])
