"""The contract, once per runtime, and which runtimes there are."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import snapshot
from latency_helpers import CASES, Case, TwoInputs, assert_close, cases, expected
from networks import TINY, example, tiny

from wgates_plugin.errors import (
    ConfigError,
    ExportError,
    FileFormatError,
    MissingExtraError,
    RuntimeUnavailableError,
)
from wgates_plugin.latency import (
    RUNTIMES,
    BaseRuntime,
    Measurement,
    RuntimeSettings,
    base,
    describe_environment,
    get_runtime,
    measure,
)
from wgates_plugin.latency.base import flatten_outputs, named_tensors
from wgates_plugin.latency.environment import library_version
from wgates_plugin.latency.onnx_model import OnnxFamily
from wgates_plugin.surgery import resize
from wgates_plugin.tracing import trace


@pytest.fixture(params=cases())
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture
def runtime(case: Case) -> BaseRuntime:
    return case.build()


# The contract, once per runtime


@pytest.mark.parametrize("name", ["plain", "depthwise", "flattened"])
def test_loaded_network_computes_the_same(case: Case, runtime: BaseRuntime, name: str) -> None:
    network = tiny(name)
    with runtime.load(network, example()) as session:
        assert_close(session.outputs(), expected(network, example()), case.relative)
        session.run()
        assert_close(session.outputs(), expected(network, example()), case.relative)


def test_saved_file_computes_the_same(case: Case, runtime: BaseRuntime, tmp_path: Path) -> None:
    network = tiny("depthwise")
    path = tmp_path / "deep" / runtime.artefact_name
    assert runtime.save(network, example(), path) == path
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    with runtime.load_file(path, example()) as session:
        assert_close(session.outputs(), expected(network, example()), case.relative)
    other = example(seed=1)
    with runtime.load_file(path, other) as session:
        assert_close(session.outputs(), expected(network, other), case.relative)


def test_keyword_inputs_and_nested_outputs(
    case: Case, runtime: BaseRuntime, tmp_path: Path
) -> None:
    network = TwoInputs()
    inputs = {"narrow": example(seed=1), "wide": example(seed=2)}
    wanted = expected(network, **inputs)
    with runtime.load(network, inputs) as session:
        assert_close(session.outputs(), wanted, case.relative)
    with runtime.load(network, (inputs["wide"], inputs["narrow"])) as session:
        assert_close(session.outputs(), wanted, case.relative)
    path = tmp_path / runtime.artefact_name
    runtime.save(network, inputs, path)
    with runtime.load_file(path, inputs) as session:
        assert_close(session.outputs(), wanted, case.relative)


def test_identity_is_complete_json(
    case: Case, runtime: BaseRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = runtime.identity(example(batch=3))
    assert json.loads(json.dumps(identity, allow_nan=False)) == identity
    assert identity["runtime"] == runtime.name
    library = identity["library"]
    assert identity["library_version"] == (library_version(library) if library else None)
    assert (identity["threads"], identity["precision"]) == (1, "float32")
    assert identity["device"] == case.device
    assert identity["device_name"]
    assert identity["batch"] == 3
    assert identity["inputs"] == {"input_0": [3, 3, 8, 8]}
    monkeypatch.setattr(base, "usable_cores", lambda: 2)
    assert case.build(threads=2).identity(example(batch=3)) == {**identity, "threads": 2}
    session = runtime.load(tiny("plain"), example(batch=3))
    assert session.identity == identity


def test_the_network_is_left_as_found(case: Case, runtime: BaseRuntime, tmp_path: Path) -> None:
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
# InstanceNorm is the one whose template comes from the slower exporter. Runtimes that load resized
# networks like any other need no rows here.
FAMILIES = [("onnxruntime", name) for name in sorted(set(TINY) - {"plain", "plain-norms"})]
FAMILIES += [
    (name, network)
    for name in ("eager", "eager-channels-last", "openvino")
    for network in ("residual", "grouped-two-ways")
]
FAMILIES += [("command", "residual")]


@pytest.mark.parametrize(("case_name", "name"), FAMILIES)
def test_family_sessions_equal_resized_networks(case_name: str, name: str) -> None:
    runtime = CASES[case_name].build()
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


def test_a_damaged_or_missing_file_is_named(
    case: Case, runtime: BaseRuntime, tmp_path: Path
) -> None:
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
    with pytest.raises(RuntimeUnavailableError, match=r"tensorflow.*eager, compile, onnxruntime"):
        get_runtime("tensorflow")


def test_settings_are_checked_together() -> None:
    with pytest.raises(ConfigError) as caught:
        RuntimeSettings(threads=0, device="")
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError) as caught:
        get_runtime("onnxruntime", RuntimeSettings(device="tpu", precision="int3"))
    assert len(caught.value.problems) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("name", [n for n in RUNTIMES if "cuda" in RUNTIMES[n].device_kinds])
def test_a_missing_device_is_named(name: str) -> None:
    with pytest.raises(RuntimeUnavailableError, match="cuda:1"):
        get_runtime(name, RuntimeSettings(device="cuda:1"))


def test_a_device_needs_a_number_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RuntimeUnavailableError, match=r"`cuda:3` asked for.*only 2 of them"):
        get_runtime("eager", RuntimeSettings(device="cuda:3"))
    for device in ("cpu:0", "cuda:first", "cuda:"):
        with pytest.raises(ConfigError, match=f"device: got '{device}'"):
            get_runtime("eager", RuntimeSettings(device=device))


@pytest.mark.parametrize("library", ["onnx", "onnxruntime"])
def test_a_missing_library_has_an_install_hint(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf'`{library}`.*pip install "wgates-plugin\[onnx'):
        get_runtime("onnxruntime")


@pytest.mark.parametrize(
    ("name", "library"), [("openvino", "openvino"), ("executorch", "executorch.exir")]
)
def test_every_other_missing_library_too(
    name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf'pip install "wgates-plugin\[{name}\]'):
        get_runtime(name)


@pytest.mark.parametrize("name", ["eager", "compile", "onnxruntime", "openvino", "executorch"])
def test_more_threads_than_cores_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "usable_cores", lambda: 3)
    with pytest.raises(ConfigError, match="threads: got 4, but this process may use 3 cores"):
        CASES[name].build(threads=4)
    assert CASES[name].build(threads=3).settings.threads == 3
    assert CASES["command"].build(threads=4).settings.threads == 4


def test_options_are_checked_together() -> None:
    with pytest.raises(ConfigError) as caught:
        get_runtime("eager", channels_last=1, chanels_last=True)
    assert caught.value.problems == [
        "channels_last: is 1; Input should be a valid boolean",
        "chanels_last: no option of runtime `eager`; did you mean `channels_last`? it knows "
        "channels_last",
    ]
    with pytest.raises(ConfigError, match="it has none"):
        get_runtime("onnxruntime", channels_last=True)


def test_importing_the_package_imports_no_optional_library() -> None:
    code = (
        "import sys, wgates_plugin.latency; "
        "print([name for name in ('onnx', 'onnxruntime', "
        "'onnxscript', 'openvino', 'executorch') if name in sys.modules])"
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
