"""Runtimes, measurements and the grid probe. Nothing here asserts how long anything takes."""

from __future__ import annotations

import builtins
import dataclasses
import gc
import json
import random
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import snapshot
from networks import TINY, conv, example, tiny
from torch import Tensor, nn

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.errors import (
    ConfigError,
    ExportError,
    FileFormatError,
    MeasurementError,
    MissingExtraError,
    RuntimeUnavailableError,
)
from wgates_plugin.latency import (
    RUNTIMES,
    BaseRuntime,
    EagerRuntime,
    Measurement,
    OnnxRuntime,
    RuntimeSettings,
    describe_environment,
    get_runtime,
    measure,
    probe_grid,
)
from wgates_plugin.latency.base import BaseSession, Session, flatten_outputs, named_tensors
from wgates_plugin.latency.grid import choose_grid, probe_widths
from wgates_plugin.latency.onnx_export import check_agreement, export_torchscript
from wgates_plugin.latency.onnx_template import OnnxFamily
from wgates_plugin.latency.timing import _block_length
from wgates_plugin.surgery import resize
from wgates_plugin.tracing import trace


@pytest.fixture(params=list(RUNTIMES))
def runtime(request: pytest.FixtureRequest) -> BaseRuntime:
    return get_runtime(request.param)


class TwoInputs(nn.Module):
    """Two inputs, two outputs; `forward` order differs from the alphabet's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 4), conv(3, 4)

    def forward(self, wide: Tensor, narrow: Tensor) -> dict[str, Any]:
        left, right = self.first(wide), self.second(narrow)
        return {"difference": left - right, "parts": (left, None)}


def expected(network: nn.Module, *args: Tensor, **kwargs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return flatten_outputs(network.eval()(*args, **kwargs))


def assert_close(found: list[Tensor], wanted: list[Tensor], relative: float = 1e-4) -> None:
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == torch.float32
        assert mine.device.type == "cpu"
        assert mine.shape == theirs.shape
        assert float((mine - theirs).abs().max()) <= relative * float(theirs.abs().max())


# The contract, once per runtime


@pytest.mark.parametrize("name", ["plain", "depthwise", "flattened"])
def test_loaded_network_computes_the_same(runtime: BaseRuntime, name: str) -> None:
    network = tiny(name)
    with runtime.load(network, example()) as session:
        assert_close(session.outputs(), expected(network, example()))
        session.run()
        assert_close(session.outputs(), expected(network, example()))


def test_saved_file_computes_the_same(runtime: BaseRuntime, tmp_path: Path) -> None:
    network = tiny("depthwise")
    path = tmp_path / "deep" / runtime.artefact_name
    assert runtime.save(network, example(), path) == path
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    with runtime.load_file(path, example()) as session:
        assert_close(session.outputs(), expected(network, example()))
    other = example(seed=1)
    with runtime.load_file(path, other) as session:
        assert_close(session.outputs(), expected(network, other))


def test_keyword_inputs_and_nested_outputs(runtime: BaseRuntime, tmp_path: Path) -> None:
    network = TwoInputs()
    inputs = {"narrow": example(seed=1), "wide": example(seed=2)}
    wanted = expected(network, **inputs)
    with runtime.load(network, inputs) as session:
        assert_close(session.outputs(), wanted)
    with runtime.load(network, (inputs["wide"], inputs["narrow"])) as session:
        assert_close(session.outputs(), wanted)
    path = tmp_path / runtime.artefact_name
    runtime.save(network, inputs, path)
    with runtime.load_file(path, inputs) as session:
        assert_close(session.outputs(), wanted)


def test_identity_is_complete_json(runtime: BaseRuntime) -> None:
    identity = runtime.identity(example(batch=3))
    assert json.loads(json.dumps(identity, allow_nan=False)) == identity
    assert identity["runtime"] == runtime.name
    assert identity["library_version"] == sys.modules[identity["library"]].__version__
    assert (identity["device"], identity["threads"], identity["precision"]) == ("cpu", 1, "float32")
    assert identity["device_name"]
    assert identity["batch"] == 3
    assert identity["inputs"] == {"input_0": [3, 3, 8, 8]}
    two = type(runtime)(RuntimeSettings(threads=2)).identity(example(batch=3))
    assert two == {**identity, "threads": 2}
    session = runtime.load(tiny("plain"), example(batch=3))
    assert session.identity == identity


def test_the_network_is_left_as_found(runtime: BaseRuntime, tmp_path: Path) -> None:
    network = tiny("residual").train()
    next(network.parameters()).requires_grad_(False)
    space = trace(network, example())
    inputs = example()
    before, values = snapshot(network), inputs.clone()
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    python, arrays = random.getstate(), np.random.get_state()[1].tolist()
    with runtime.load(network, inputs) as session:
        session.run()
        session.outputs()
    runtime.save(network, inputs, tmp_path / "file")
    runtime.load_file(tmp_path / "file", inputs).outputs()
    family = runtime.family(network, space, inputs)
    family.session(space.least_widths()).outputs()
    measure(runtime.load(network, inputs), seconds=0, min_rounds=1, warmup=1)
    assert snapshot(network) == before
    assert torch.equal(inputs, values)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert random.getstate() == python
    assert np.random.get_state()[1].tolist() == arrays


# Resizing itself is tested with surgery; a template must find every kind of layer in the graph.
# InstanceNorm is the one whose template comes from the slower exporter.
FAMILIES = [("eager", "residual"), ("eager", "grouped-two-ways")]
FAMILIES += [("onnxruntime", name) for name in sorted(set(TINY) - {"plain", "plain-norms"})]


@pytest.mark.parametrize(("runtime_name", "name"), FAMILIES)
def test_family_sessions_equal_resized_networks(runtime_name: str, name: str) -> None:
    runtime = get_runtime(runtime_name)
    network = tiny(name)
    space = trace(network, example())
    family = runtime.family(network, space, example())
    assert not isinstance(family, OnnxFamily) or family.from_template
    draw = random.Random(0)
    for widths in (
        space.full_widths,
        space.least_widths(),
        [draw.choice(allowed) for allowed in space.allowed_widths()],
    ):
        session = family.session(widths)
        assert_close(session.outputs(), expected(resize(network, space, widths), example()))
        session.close()


def test_a_closed_session_does_not_run(runtime: BaseRuntime) -> None:
    session = runtime.load(tiny("plain"), example())
    session.close()
    with pytest.raises(RuntimeError, match="closed"):
        session.run()


def test_a_damaged_or_missing_file_is_named(runtime: BaseRuntime, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no such file"):
        runtime.load_file(tmp_path / "missing", example())
    path = tmp_path / runtime.artefact_name
    runtime.save(tiny("plain"), example(), path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(FileFormatError, match=path.name):
        runtime.load_file(path, example())


def test_measured_through_the_same_door(runtime: BaseRuntime) -> None:
    with runtime.load(tiny("plain"), example()) as session:
        found = measure(session, reference=session, seconds=0, min_rounds=3)
    assert found.rounds == 3
    assert found.identity == runtime.identity(example())
    assert found.environment == describe_environment()
    assert Measurement.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_inputs_that_are_no_tensors_are_refused(runtime: BaseRuntime) -> None:
    with pytest.raises(ExportError, match="`input_1` \\(int\\)"):
        runtime.load(tiny("plain"), (example(), 3))


# Which runtimes there are


def test_unknown_runtime_lists_the_known() -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"tensorflow.*eager, onnxruntime"):
        get_runtime("tensorflow")


def test_settings_are_checked_together() -> None:
    with pytest.raises(ConfigError) as caught:
        RuntimeSettings(threads=0, device="")
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError) as caught:
        get_runtime("onnxruntime", RuntimeSettings(device="tpu", precision="int3"))
    assert len(caught.value.problems) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("name", list(RUNTIMES))
def test_a_missing_device_is_named(name: str) -> None:
    with pytest.raises(RuntimeUnavailableError, match="cuda:1"):
        get_runtime(name, RuntimeSettings(device="cuda:1"))


@pytest.mark.parametrize("library", ["onnx", "onnxruntime"])
def test_a_missing_library_has_an_install_hint(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf'`{library}`.*pip install "wgates-plugin\[onnx'):
        get_runtime("onnxruntime")


def test_importing_the_package_imports_no_optional_library() -> None:
    code = (
        "import sys, wgates_plugin.latency; "
        "print([name for name in ('onnx', 'onnxruntime', 'onnxscript') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_environment_is_json_without_private_facts() -> None:
    environment = describe_environment()
    assert json.loads(json.dumps(environment)) == environment
    assert environment["libraries"]["torch"] == torch.__version__
    assert environment["cpu"]
    assert environment["cores"] >= 1
    import socket

    text = json.dumps(environment)
    assert str(Path.home()) not in text
    assert len(socket.gethostname()) < 4 or socket.gethostname() not in text
    environment["libraries"].clear()
    assert describe_environment()["libraries"]


# Eager


@pytest.mark.parametrize("threads", [1, 2])
def test_eager_threads_hold_only_inside(threads: int) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            return x

    session = EagerRuntime(RuntimeSettings(threads=threads)).load(Spy(), example())
    measure(session, seconds=0, min_rounds=1, warmup=1)
    session.outputs()
    assert set(seen) == {threads}
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), session.active():
        raise KeyError
    assert torch.get_num_threads() == before


def test_eager_channels_last_and_bfloat16() -> None:
    network = tiny("plain")
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    last = EagerRuntime(channels_last=True)
    assert_close(last.load(network, example()).outputs(), expected(network, example()))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert last.identity(example())["options"] == {"channels_last": True}
    half = EagerRuntime(RuntimeSettings(precision="bfloat16"))
    found = half.load(network, example()).outputs()
    assert seen[2].dtype == torch.bfloat16
    assert_close(found, expected(network, example()), relative=0.05)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    return EagerRuntime().save(tiny("plain"), example(), path)


def _edited(source: Path, target: Path, member: str, old: str, new: str) -> Path:
    """Copy a zip with `old` replaced by `new` in one member; `old` must be there."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
        for info in before.infolist():
            content = before.read(info)
            if info.filename.endswith(member):
                assert old.encode() in content
                content = content.replace(old.encode(), new.encode(), 1)
            after.writestr(info.filename, content)
    return target


@pytest.mark.parametrize(
    ("member", "old", "new"),
    [
        ("weights_config.json", '"use_pickle": false', '"use_pickle": true'),
        ("weights_config.json", '"use_pickle": false', '"use_pickle": 1'),
        ("weights_config.json", '"weight_0"', '"../other"'),
        ("model.json", "torch.ops.aten.conv2d.default", "torch.serialization.os.system"),
        ("model.json", "torch.ops.aten.conv2d.default", "#example:conv2d"),
        ("model.json", '"guards_code": []', '"guards_code": ["print(1)"]'),
        ("model.json", '{"as_int": 2}', '{"as_expr": {"expr_str": "print(1)"}}'),
        ("model.json", "builtins.tuple", "__enum__"),
        ("sample_inputs/model.pt", "PK", "XX"),
    ],
)
def test_a_program_that_could_execute_code_is_refused(
    program: Path, tmp_path: Path, member: str, old: str, new: str
) -> None:
    path = _edited(program, tmp_path / "edited.pt2", member, old, new)
    with pytest.raises(FileFormatError, match="could execute code"):
        EagerRuntime().load_file(path, example())


def test_a_program_with_foreign_members_is_refused(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "more.pt2"
    shutil.copy(program, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/data/constants/custom_obj_0", b"")
    with pytest.raises(FileFormatError, match="custom_obj_0"):
        EagerRuntime().load_file(path, example())


def test_a_pickle_named_like_a_program_is_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return builtins.open, (str(tmp_path / "exploded"), "w")

    torch.save(Bomb(), tmp_path / "model.pt2")
    with pytest.raises(FileFormatError):
        EagerRuntime().load_file(tmp_path / "model.pt2", example())
    assert not (tmp_path / "exploded").exists()


# ONNX Runtime


def test_wrong_export_says_which_output_and_how_far() -> None:
    network = tiny("plain")
    right = expected(network, example())
    check_agreement(right, network, example())
    worst = right[0].abs().max()
    with pytest.raises(ExportError, match=r"output 0 is off by 1\.0e-02"):
        check_agreement([right[0] + 0.01 * worst], network, example())
    with pytest.raises(ExportError, match="output 0"):
        check_agreement([right[0] * float("nan")], network, example())
    with pytest.raises(ExportError, match="has 2 outputs where the network has 1"):
        check_agreement(right * 2, network, example())
    with pytest.raises(ExportError, match="shape"):
        check_agreement([right[0].T], network, example())


def test_agreement_is_judged_at_the_outputs_own_scale() -> None:
    class Small(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1e-12

    class Cancelling(nn.Module):
        """Outputs near 1e-7 from terms near 1: float32 can hold one digit of them."""

        def forward(self, x: Tensor) -> Tensor:
            return (x + 1e-7) - x

    small = expected(Small(), example())
    check_agreement(small, Small(), example())
    with pytest.raises(ExportError):
        check_agreement([small[0] * 1.01], Small(), example())
    exact = torch.full_like(example(), 1e-7)
    check_agreement([exact], Cancelling(), example())
    with pytest.raises(ExportError):
        check_agreement([exact + 1e-5], Cancelling(), example())


def test_an_unexportable_network_gives_both_reasons() -> None:
    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch.jit.is_tracing() or torch.compiler.is_compiling():
                raise NotImplementedError("not while exporting")
            return x

    with pytest.raises(
        ExportError, match=r"export_torchscript.*not while exporting.*export_dynamo"
    ):
        OnnxRuntime().load(Refuses(), example())


def test_where_tracing_fails_the_other_exporter_serves(capfd: pytest.CaptureFixture[str]) -> None:
    network = nn.Sequential(conv(3, 4), nn.AdaptiveAvgPool2d(5), conv(4, 2))
    with pytest.raises(torch.onnx.errors.SymbolicValueError):
        export_torchscript(network, example())
    with OnnxRuntime().load(network, example()) as session:
        assert_close(session.outputs(), expected(network, example()))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_onnx_inputs_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = OnnxRuntime().save(tiny("plain"), example(), tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="`input_0` is \\[1, 3, 8, 8\\]"):
        OnnxRuntime().load_file(path, example(batch=1))
    with pytest.raises(ExportError, match="`input_0` is not among"):
        OnnxRuntime().load_file(path, {"x": example()})


def test_a_gpu_that_is_not_used_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ONNX Runtime itself falls back to the CPU without an error."""
    path = OnnxRuntime().save(tiny("plain"), example(), tmp_path / "model.onnx")
    runtime = OnnxRuntime()
    runtime.settings = RuntimeSettings(device="cuda:0")
    native = runtime._ort.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    monkeypatch.setattr(runtime._ort, "InferenceSession", lambda *_, **__: native)
    space = trace(tiny("plain"), example())
    for use in (
        lambda: runtime.load(tiny("plain"), example()),
        lambda: runtime.load_file(path, example()),
        lambda: runtime.family(tiny("plain"), space, example()),
    ):
        with pytest.raises(RuntimeUnavailableError, match="CUDAExecutionProvider could not"):
            use()


def test_several_threads_do_not_spin_between_inferences() -> None:
    def entry(threads: int) -> str:
        runtime = OnnxRuntime(RuntimeSettings(threads=threads))
        with runtime.load(tiny("plain"), example()) as session:
            options = session._native.get_session_options()
            found: str = options.get_session_config_entry("session.force_spinning_stop")
            return found

    assert entry(2) == "1"
    with pytest.raises(RuntimeError, match="force_spinning_stop"):
        entry(1)


def _fresh() -> nn.Module:
    """Equal layers with equal fresh BatchNorms, whose tensors the exporter stores only once."""
    layers: list[nn.Module] = [conv(3, 8), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [conv(8, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8)]
    return nn.Sequential(*layers, conv(8, 2))


@pytest.fixture
def _one_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the slow second exporter out where the first one's failure is the subject."""
    from wgates_plugin.latency import onnx_template

    def export_dynamo(*_: Any, **__: Any) -> bytes:
        raise ExportError("left out")

    monkeypatch.setattr(onnx_template, "export_dynamo", export_dynamo)


@pytest.mark.usefixtures("_one_exporter")
def test_equal_tensors_are_sliced_apart() -> None:
    network = _fresh()
    space = trace(network, example())
    family = OnnxFamily(OnnxRuntime(), network, space, example())
    assert family.from_template
    for widths in ([3, 5, 7], [8, 1, 2], [8, 8, 8], [2, 8, 8]):
        wanted = expected(resize(network, space, widths), example())
        assert_close(family.session(widths).outputs(), wanted)


class FrozenShape(nn.Module):
    """Its export holds the dense channel count as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 6), nn.ReLU())
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out = out.view(out.shape[0], int(out.shape[1]), -1).mean(2)
        result: Tensor = self.head(out)
        return result


@pytest.mark.usefixtures("_one_exporter")
def test_a_template_that_does_not_agree_gives_way() -> None:
    network = FrozenShape()
    space = trace(network, example())
    with pytest.warns(RuntimeWarning, match="exported by itself"):
        family = OnnxFamily(OnnxRuntime(), network, space, example())
    assert not family.from_template
    wanted = expected(resize(network, space, [4]), example())
    assert_close(family.session([4]).outputs(), wanted)


@pytest.mark.usefixtures("_one_exporter")
def test_a_template_with_the_wrong_channels_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from wgates_plugin.latency import onnx_template

    right = onnx_template._sliced

    def last_instead(array: np.ndarray, slices: Any) -> np.ndarray:
        turned = {d: array.shape[d] - 1 - indices[::-1] for d, indices in slices.items()}
        return right(array, turned)

    monkeypatch.setattr(onnx_template, "_sliced", last_instead)
    network = tiny("plain")
    space = trace(network, example())
    with pytest.warns(RuntimeWarning, match="is off by"):
        family = OnnxFamily(OnnxRuntime(), network, space, example())
    assert not family.from_template


# Timing, with sessions and a clock that do what they are told


class Clock:
    """A clock that moves only when a session says so."""

    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns


class Scripted:
    """A session whose k-th inference takes `times_ms[k]` (the last one from then on)."""

    def __init__(self, clock: Clock, times_ms: list[float], log: list[str], name: str) -> None:
        self.clock, self.log, self.name = clock, log, name
        self.times = self._endless(times_ms)

    @staticmethod
    def _endless(times: list[float]) -> Iterator[float]:
        yield from times
        while True:
            yield times[-1]

    def run(self) -> None:
        self.log.append(self.name)
        assert not gc.isenabled()
        self.clock.ns += round(next(self.times) * 1e6)

    def outputs(self) -> list[Tensor]:
        return []

    def close(self) -> None: ...


def scripted(mine: list[float], other: list[float]) -> tuple[Session, Session, Clock, list[str]]:
    clock, log = Clock(), list[str]()
    return Scripted(clock, mine, log, "c"), Scripted(clock, other, log, "r"), clock, log


def quiet(session: Session, clock: Clock, **options: Any) -> Measurement:
    """Measured by a told clock on a machine where nothing is ever interrupted."""
    options = {"seconds": 0, "warmup": 1, "switches": lambda: 0, **options}
    return measure(session, clock_ns=clock, processor_ns=clock, **options)


def test_ratio_is_the_median_of_pairs_times_the_calibrated_reference() -> None:
    # One warm-up inference of 20 ms each makes blocks of one inference for both.
    session, reference, clock, log = scripted([20, 30, 66, 50, 20], [20, 20, 33, 25, 40])
    found = quiet(
        session,
        clock,
        reference=reference,
        reference_ms=10.0,
        min_rounds=4,
        identity={"runtime": "scripted"},
        environment={},
    )
    assert found.samples_ms == (30, 66, 50, 20)
    assert found.reference_samples_ms == (20, 33, 25, 40)
    assert found.ratio == pytest.approx((1.5 + 2.0) / 2)  # of 1.5, 2.0, 2.0, 0.5
    assert found.latency_ms == pytest.approx(17.5)
    assert found.ratio_spread == pytest.approx((2.0 - 1.25) / 2)
    assert found.drift == pytest.approx((25 + 33) / 2 / 10)
    assert found.median_ms == 40
    assert found.minimum_ms == 20
    assert found.inference_seconds == pytest.approx(0.284)
    assert found.seconds == pytest.approx(0.324)
    assert (found.rounds, found.warmup) == (4, 1)
    assert "".join(log) == "cr" + "cr" + "rc" + "cr" + "rc"
    assert gc.isenabled()


def test_without_a_calibration_the_reference_calibrates_itself() -> None:
    session, reference, clock, _ = scripted([30], [20, 20, 22, 60])
    found = quiet(session, clock, reference=reference, min_rounds=3)
    assert found.reference_ms == 22
    assert found.drift == 1
    assert found.ratio == pytest.approx(30 / 22)
    assert found.latency_ms == pytest.approx(30)


def test_without_a_reference_the_median_of_minima_counts() -> None:
    # 5 ms: blocks of three; each block's least is kept.
    session, _, clock, log = scripted([5, 9, 4, 7, 8, 6, 9, 30, 5, 40], [1])
    found = quiet(session, clock, min_rounds=3)
    assert found.samples_ms == (4, 6, 5)
    assert found.latency_ms == found.reference_ms == found.median_ms == 5
    assert found.ratio == found.drift == 1
    assert found.reference_samples_ms == ()
    assert len(log) == 1 + 3 * 3


def test_a_shared_slowdown_cancels() -> None:
    drift = [1.0, 1.3, 2.0, 1.1, 3.0]
    session, reference, clock, _ = scripted(
        [30, *(30 * d for d in drift)], [40, *(40 * d for d in drift)]
    )
    found = quiet(session, clock, reference=reference, reference_ms=8, min_rounds=5)
    assert found.latency_ms == pytest.approx(6)
    assert found.drift == pytest.approx(40 * 1.3 / 8)
    assert found.ratio_spread == pytest.approx(0, abs=1e-9)


def test_rounds_fill_the_seconds_asked_for() -> None:
    session, reference, clock, _ = scripted([10], [20])
    found = quiet(session, clock, reference=reference, seconds=1.0, min_rounds=2)
    assert found.rounds == 17  # blocks of 2 x 10 ms and 2 x 20 ms
    assert found.inference_seconds == pytest.approx(1.02)


@pytest.mark.parametrize("swapped", [False, True])
def test_both_take_their_least_of_as_many_inferences(swapped: bool) -> None:
    # One quiet inference in three: the least of two would miss the slow one's.
    fast, slow = [5.0, 6, 6, 5, 6, 6, 5], [10.0, 12, 12, 10, 12, 12, 10]
    session, reference, clock, log = scripted(*((slow, fast) if swapped else (fast, slow)))
    found = quiet(session, clock, reference=reference, min_rounds=2)
    assert "".join(log) == "cr" + "cccrrr" + "rrrccc"
    assert found.ratio == pytest.approx(2.0 if swapped else 0.5)


@pytest.mark.parametrize(
    ("estimates_ms", "count"),
    [
        ([400.0], 1),
        ([15.0], 1),
        ([7.5], 2),
        ([1.0], 15),
        ([1e-6], 2000),
        ([400.0, 400.0], 1),
        ([1.0, 1.0], 15),
        ([1.0, 4.0], 15),
        ([1.0, 10.0], 6),  # 15 would keep the slower one busy for 150 ms
        ([10.0, 1.0], 6),
        ([1.0, 500.0], 3),
        ([14.0, 500.0], 2),
    ],
)
def test_blocks_are_of_one_length_and_bounded(estimates_ms: list[float], count: int) -> None:
    assert _block_length(estimates_ms) == count


def test_slow_networks_warm_up_less() -> None:
    session, _, clock, _ = scripted([700], [1])
    found = quiet(session, clock, min_rounds=2, warmup=5)
    assert found.warmup == 1


def test_the_sessions_own_clock_is_preferred() -> None:
    class Events(Scripted):
        def elapsed_ms(self) -> float:
            self.run()
            return 3.0

    clock = Clock()
    found = quiet(Events(clock, [20.0], [], "c"), clock, min_rounds=2)
    assert found.latency_ms == 3.0


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_times_are_refused(wrong: float) -> None:
    class Broken(Scripted):
        def elapsed_ms(self) -> float:
            return wrong

    with pytest.raises(MeasurementError, match="took"):
        measure(Broken(Clock(), [1], [], "c"))
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference_ms": 3.0}, "without a `reference`"),
        ({"seconds": float("nan")}, "seconds"),
        ({"min_rounds": 0}, "min_rounds"),
        ({"warmup": 0}, "warmup"),
    ],
)
def test_senseless_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    session, *_ = scripted([1], [1])
    with pytest.raises(MeasurementError, match=message):
        measure(session, **options)


def test_garbage_collection_stays_off_where_it_was_off() -> None:
    session, _, clock, _ = scripted([20], [1])
    gc.disable()
    try:
        quiet(session, clock, min_rounds=1)
        assert not gc.isenabled()
    finally:
        gc.enable()


class Interrupted(Scripted):
    """Loses the processor during the inferences whose times are negative, for that long."""

    def __init__(self, clock: Clock, times_ms: list[float], identity: dict[str, Any]) -> None:
        super().__init__(clock, times_ms, [], "c")
        self.identity = identity
        self.switches = 0
        self.worked_ns = 0

    def run(self) -> None:
        took_ms = next(self.times)
        self.switches += took_ms < 0
        self.clock.ns += round(abs(took_ms) * 1e6)
        self.worked_ns += round((abs(took_ms) if took_ms > 0 else 18) * 1e6)

    def measured(self, **options: Any) -> Measurement:
        return measure(
            self,
            seconds=0,
            warmup=1,
            clock_ns=self.clock,
            processor_ns=lambda: self.worked_ns,
            switches=lambda: self.switches,
            **options,
        )


def test_an_interrupted_inference_on_one_thread_counts_with_its_processor_time() -> None:
    session = Interrupted(Clock(), [20, -50, 21, -16], {"threads": 1, "device": "cpu"})
    found = session.measured(min_rounds=3)
    assert found.samples_ms == (18, 21, 16)
    assert found.disturbed == 2


@pytest.mark.parametrize("identity", [{"threads": 2, "device": "cpu"}, {"device": "cuda"}, {}])
def test_any_other_interrupted_inference_is_taken_again(identity: dict[str, Any]) -> None:
    session = Interrupted(Clock(), [20, -50, 21, -16, -17, 22, 23], identity)
    found = session.measured(min_rounds=3)
    assert found.samples_ms == (21, 22, 23)
    assert found.disturbed == 3


def test_where_every_inference_is_interrupted_the_least_counts() -> None:
    session = Interrupted(Clock(), [-20, -50, -40, -30, -60], {})
    found = session.measured(min_rounds=1)
    assert found.samples_ms == (30,)
    assert found.disturbed == 4


# Measurements as files


def a_measurement() -> Measurement:
    session, reference, clock, _ = scripted([30], [20, 20, 22, 60])
    return quiet(session, clock, reference=reference, min_rounds=3)


def test_measurement_survives_json() -> None:
    found = a_measurement()
    again = Measurement.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert again == found
    assert isinstance(again.samples_ms, tuple)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latency_ms", -1.0),
        ("latency_ms", 31.0),
        ("latency_ms", "30"),
        ("latency_ms", True),
        ("latency_ms", None),
        ("ratio", 0),
        ("ratio", float("nan")),
        ("ratio_spread", -0.1),
        ("ratio_spread", float("inf")),
        ("samples_ms", []),
        ("samples_ms", [30, 30]),
        ("samples_ms", [30, 30, -30]),
        ("samples_ms", [30, 30, "30"]),
        ("samples_ms", 30),
        ("reference_samples_ms", [20]),
        ("reference_samples_ms", [20, float("nan"), 60]),
        ("drift", 0.0),
        ("drift", 1.5),
        ("drift", "1"),
        ("median_ms", 29.0),
        ("minimum_ms", 31.0),
        ("rounds", 2),
        ("rounds", 3.0),
        ("warmup", -1),
        ("seconds", 0.0),
        ("identity", []),
        ("environment", "here"),
        ("version", 1),
        ("kind", "plan"),
        ("surprise", 1),
    ],
)
def test_corrupt_measurements_are_refused(field: str, value: Any) -> None:
    record = {**a_measurement().to_json(), field: value}
    with pytest.raises(FileFormatError, match="measurement"):
        Measurement.from_json(record)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Measurement)])
def test_every_field_is_needed(field: str) -> None:
    record = a_measurement().to_json()
    del record[field]
    with pytest.raises(FileFormatError, match=f"`{field}` is missing"):
        Measurement.from_json(record)


@pytest.mark.parametrize("value", [None, 3, [], {}, "measurement"])
def test_what_is_no_measurement_is_refused(value: Any) -> None:
    with pytest.raises(FileFormatError, match="no measurement"):
        Measurement.from_json(value)


# The channel grid


def staircase(grid: int, candidates: tuple[int, ...]) -> dict[int, float]:
    return {width: float(-(-width // grid) * grid) for width in probe_widths(candidates)}


CANDIDATES = (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize("grid", CANDIDATES)
def test_a_clean_staircase_gives_its_step(grid: int) -> None:
    times = staircase(grid, CANDIDATES)
    assert choose_grid(times, CANDIDATES, tolerance=0.001) == grid
    # Widths off the grid that cost even more than the next step do not change the answer.
    penal = {width: ms * (1.0 if width % grid == 0 else 1.4) for width, ms in times.items()}
    assert choose_grid(penal, CANDIDATES, tolerance=0.001) >= grid


def test_one_disturbed_timing_does_not_change_the_grid() -> None:
    times = staircase(16, CANDIDATES)
    times[66] *= 0.9
    assert choose_grid(times, CANDIDATES) == 16


def test_a_slope_has_no_grid_and_no_evidence_proves_nothing() -> None:
    slope = {width: float(width) for width in probe_widths(CANDIDATES)}
    assert choose_grid(slope, CANDIDATES, tolerance=0.001) == 1
    assert choose_grid({64: 1.0, 96: 1.0}, CANDIDATES) == 1


def test_candidates_are_checked() -> None:
    with pytest.raises(ConfigError, match="candidates"):
        probe_grid(EagerRuntime(), candidates=())
    with pytest.raises(ConfigError, match="candidates"):
        probe_grid(EagerRuntime(), candidates=(0, 8))


class Stairs(EagerRuntime):
    """A runtime that takes as many milliseconds as there are channels, in whole steps of 4."""

    def load(self, network: nn.Module, example_inputs: Any) -> Any:
        width = network.full[0].out_channels

        class Fixed(BaseSession):
            def run(self) -> None: ...
            def outputs(self) -> list[Tensor]:
                return []

            def close(self) -> None: ...
            def elapsed_ms(self) -> float:
                return 0.25 * (-(-width // 4) * 4)

        return Fixed({})


def test_the_probe_reports_what_it_saw() -> None:
    state = torch.get_rng_state()
    probe = probe_grid(Stairs(), seconds=0, candidates=(4, 1, 2, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert probe.grid == 4
    assert probe.candidates == (1, 2, 4, 8)
    assert [width for width, _ in probe.evidence] == probe_widths((1, 2, 4, 8))
    assert dict(probe.evidence)[17] == pytest.approx(5.0)
    assert json.loads(json.dumps(probe.to_json()))["grid"] == 4


def test_helpers_name_inputs_and_flatten_outputs() -> None:
    x = example()
    assert list(named_tensors((x, x))) == ["input_0", "input_1"]
    assert list(named_tensors({"b": x, "a": x})) == ["b", "a"]
    half = torch.ones(2, dtype=torch.float16, requires_grad=True)
    (flat,) = flatten_outputs([None, ({"a": half},)])
    assert flat.dtype == torch.float32
    assert not flat.requires_grad
    with pytest.raises(ExportError, match="found a str"):
        flatten_outputs((half, "logits"))


def test_no_warning_reaches_the_user_from_a_good_export() -> None:
    space: ChannelSpace = trace(tiny("plain"), example())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runtime = OnnxRuntime()
        runtime.load(tiny("plain"), example()).close()
        runtime.family(tiny("plain"), space, example())
