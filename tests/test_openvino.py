"""OpenVINO computes in the precision that was asked for, or says what it would do instead."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from latency_helpers import assert_close, expected
from networks import example, tiny

from wgates_plugin import trace
from wgates_plugin.errors import RuntimeUnavailableError
from wgates_plugin.latency import OpenVinoRuntime, RuntimeSettings

openvino = pytest.importorskip("openvino")


@dataclasses.dataclass
class Core:
    """OpenVINO on a processor that turns every precision into `found`."""

    real: Any
    found: str

    def read_model(self, model: bytes) -> Any:
        return self.real.read_model(model)

    def compile_model(self, model: Any, device: str, settings: dict[str, Any]) -> Any:
        self.asked = settings["INFERENCE_PRECISION_HINT"]
        settings = {**settings, "INFERENCE_PRECISION_HINT": "f32"}
        return Compiled(self.real.compile_model(model, device, settings), self.found)


class Compiled:
    def __init__(self, real: Any, found: str) -> None:
        self._real, self._found = real, found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_property(self, name: str) -> Any:
        assert name == "INFERENCE_PRECISION_HINT"
        return getattr(openvino.Type, self._found)


def on_a_processor(found: str, precision: str) -> tuple[OpenVinoRuntime, Core]:
    runtime = OpenVinoRuntime(RuntimeSettings(precision=precision))
    core = Core(runtime._core, found)
    runtime._core = core
    return runtime, core


@pytest.mark.parametrize(
    ("precision", "found", "named"),
    [
        ("float16", "bf16", "bfloat16"),
        ("bfloat16", "f32", "float32"),
        ("float32", "bf16", "bfloat16"),
    ],
)
def test_another_precision_than_asked_for_is_refused(
    precision: str, found: str, named: str, tmp_path: Path
) -> None:
    network = tiny("plain")
    runtime, _ = on_a_processor(found, precision)
    words = f"`{precision}` asked for, but .* would compute in {named}; ask for .*`{named}`"
    path = tmp_path / "model.onnx"
    runtime.at_float32().save(network, example(), path)
    for load in (
        lambda: runtime.load_file(path, example()),
        lambda: runtime.session_of(path.read_bytes(), example()),
        lambda: runtime.layer_times_ms(path.read_bytes(), example(), {}),
        lambda: runtime.family(network, trace(network, example()), example()).session((4, 8)),
    ):
        with pytest.raises(RuntimeUnavailableError, match=words):
            load()


def test_a_precision_that_has_no_name_here_is_named_by_openvino() -> None:
    runtime, _ = on_a_processor("f64", "float32")
    model = runtime.at_float32()._export(tiny("plain"), example())
    with pytest.raises(RuntimeUnavailableError, match=r"compute in f64; ask for .*`float32`"):
        runtime.session_of(model, example())


@pytest.mark.parametrize(
    ("precision", "hint"), [("float32", "f32"), ("bfloat16", "bf16"), ("float16", "f16")]
)
def test_the_precision_asked_for_is_accepted(precision: str, hint: str) -> None:
    network = tiny("plain")
    runtime, core = on_a_processor(hint, precision)
    with runtime.load(network, example()) as session:
        assert core.asked == hint
        assert session.identity["precision"] == precision
        assert_close(session.outputs(), expected(network, example()))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_lower_precision_computes_nearly_the_same(precision: str) -> None:
    runtime = OpenVinoRuntime(RuntimeSettings(precision=precision))
    try:
        session = runtime.load(tiny("plain"), example())
    except RuntimeUnavailableError as error:
        pytest.skip(str(error))
    with session:
        assert_close(session.outputs(), expected(tiny("plain"), example()), relative=0.05)
