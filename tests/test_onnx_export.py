"""ONNX export and its sessions: a file that computes something else is never handed out."""

from __future__ import annotations

import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latency_helpers import assert_close, expected
from networks import conv, example, tiny
from torch import Tensor, nn

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.errors import (
    ExportError,
    FileFormatError,
    RuntimeUnavailableError,
)
from wgates_plugin.latency import (
    OnnxRuntime,
    OpenVinoRuntime,
    RuntimeSettings,
    base,
    onnx_export,
    onnx_runtime,
)
from wgates_plugin.latency.onnx_export import check_agreement, export_torchscript
from wgates_plugin.latency.onnx_model import OnnxModelRuntime
from wgates_plugin.latency.onnx_runtime import CudaOnnxSession
from wgates_plugin.tracing import trace


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


def test_a_wrong_export_names_the_layer_where_it_departs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An exporter that doubles the weights of one layer."""
    import onnx

    def doubling(network: nn.Module, inputs: Tensor, *, template: bool = False) -> bytes:
        whole = onnx.load_from_string(export_torchscript(network, inputs, template=True))
        for tensor in whole.graph.initializer:
            if tensor.name == "2.weight":
                values = onnx.numpy_helper.to_array(tensor) * 2
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        return bytes(whole.SerializeToString())

    network = nn.Sequential(conv(3, 4), nn.ReLU(inplace=True), conv(4, 5), nn.ReLU(), conv(5, 6))
    for layer in network:
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for name in ("export_torchscript", "export_dynamo"):
        monkeypatch.setattr(onnx_export, name, doubling)
    for inputs in (example(), torch.zeros_like(example())):  # zeros alone would hide it
        with pytest.raises(ExportError, match=r"first at `2` \(node `/2/Conv`\), off by"):
            OnnxRuntime().load(network, inputs)


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


def test_weights_in_a_file_beside_the_model_are_read(tmp_path: Path) -> None:
    network, path = tiny("plain"), tmp_path / "model.onnx"
    torch.onnx.export(
        network,
        (example(),),
        path,
        input_names=["input_0"],
        dynamo=True,
        external_data=True,
        verbose=False,
    )
    beside = path.with_suffix(".onnx.data")
    assert beside.exists()
    for runtime in (OnnxRuntime(), OpenVinoRuntime()):
        with runtime.load_file(path, example()) as session:
            assert_close(session.outputs(), expected(network, example()))
    beside.unlink()
    with pytest.raises(FileFormatError, match=r"model\.onnx.*cannot be loaded.*model\.onnx\.data"):
        OnnxRuntime().load_file(path, example())


def convolution(path: Path, kind: str, *, fed: str | None = None, ir_version: int = 9) -> Path:
    """A file with one convolution of numbers of this kind, made of those that are fed."""
    onnx = pytest.importorskip("onnx")
    number = getattr(onnx.TensorProto, kind)
    values = np.ones((4, 3, 3, 3), onnx.helper.tensor_dtype_to_np_dtype(number))
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Cast", ["x"], ["x of its kind"], to=number),
            onnx.helper.make_node("Conv", ["x of its kind", "w"], ["y"]),
        ],
        "one convolution",
        [
            onnx.helper.make_tensor_value_info(
                "x", getattr(onnx.TensorProto, fed or kind), [1, 3, 8, 8]
            )
        ],
        [onnx.helper.make_tensor_value_info("y", number, None)],
        [onnx.numpy_helper.from_array(values, "w")],
    )
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[opset], ir_version=ir_version), str(path)
    )
    return path


@pytest.mark.parametrize("runtime", [OnnxRuntime, OpenVinoRuntime])
@pytest.mark.parametrize("kind", ["FLOAT16", "DOUBLE", "BFLOAT16"])
def test_inputs_of_other_floats_are_refused_by_name(
    runtime: type[OnnxModelRuntime], kind: str, tmp_path: Path
) -> None:
    path = convolution(tmp_path / "other.onnx", kind)
    with pytest.raises(ExportError, match=f"`x` is {kind.lower()}; this package feeds float32"):
        runtime().load_file(path, {"x": example(batch=1)})


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({"kind": "FLOAT", "ir_version": 99}, "IR version"),
        ({"kind": "DOUBLE", "fed": "FLOAT"}, "NOT_IMPLEMENTED"),
    ],
)
def test_a_sound_file_that_does_not_load_is_not_merely_called_damaged(
    made: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = convolution(tmp_path / "sound.onnx", **made)
    words = rf"sound.onnx.*cannot be loaded \(.*{reason}.*\); it is damaged, or made for another "
    with pytest.raises(FileFormatError, match=words + "version, or with operators or types that"):
        OnnxRuntime().load_file(path, {"x": example(batch=1)})


def test_a_closed_gpu_session_holds_nothing() -> None:
    class Native:
        def io_binding(self) -> Native:
            return self

        def get_outputs(self) -> list[Any]:
            return []

        def synchronize_inputs(self) -> None: ...

    native = Native()
    held = weakref.ref(native)
    session = CudaOnnxSession(native, {}, identity={})
    del native
    session.close()
    assert held() is None
    with pytest.raises(RuntimeError, match="this session is closed"):
        session.run()


def test_a_profile_without_kernels_knows_no_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = OnnxRuntime()
    model = export_torchscript(tiny("plain"), example())
    monkeypatch.setattr(onnx_runtime, "_is_kernel", lambda event: False)
    assert runtime.layer_times_ms(model, example(), {}) == {}


def test_a_gpu_that_is_not_used_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ONNX Runtime itself falls back to the CPU without an error."""
    path = OnnxRuntime().save(tiny("plain"), example(), tmp_path / "model.onnx")
    runtime = OnnxRuntime()
    runtime.settings = RuntimeSettings(device="cuda:0")
    native = runtime._ort.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    monkeypatch.setattr(runtime._ort, "InferenceSession", lambda *_, **__: native)
    assert runtime.layer_times_ms(path.read_bytes(), example(), {}) == {}
    space = trace(tiny("plain"), example())
    for use in (
        lambda: runtime.load(tiny("plain"), example()),
        lambda: runtime.load_file(path, example()),
        lambda: runtime.family(tiny("plain"), space, example()),
    ):
        with pytest.raises(RuntimeUnavailableError, match="CUDAExecutionProvider could not"):
            use()


def test_several_threads_do_not_spin_between_inferences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "usable_cores", lambda: 2)

    def entry(threads: int) -> str:
        runtime = OnnxRuntime(RuntimeSettings(threads=threads))
        with runtime.load(tiny("plain"), example()) as session:
            options = session._native.get_session_options()
            found: str = options.get_session_config_entry("session.force_spinning_stop")
            return found

    assert entry(2) == "1"
    with pytest.raises(RuntimeError, match="force_spinning_stop"):
        entry(1)


def test_no_warning_reaches_the_user_from_a_good_export() -> None:
    space: ChannelSpace = trace(tiny("plain"), example())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runtime = OnnxRuntime()
        runtime.load(tiny("plain"), example()).close()
        runtime.family(tiny("plain"), space, example())
