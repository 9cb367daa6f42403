"""CUDA graphs and TensorRT: what they refuse without a GPU, and on one what they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from latency_helpers import assert_close, expected
from networks import example, tiny
from torch import Tensor, nn

from wgates_plugin.errors import ConfigError, ExportError, RuntimeUnavailableError
from wgates_plugin.latency import (
    CudaGraphsRuntime,
    RuntimeSettings,
    TensorRtRuntime,
    get_runtime,
    measure,
)

NAMES = ["cuda-graphs", "tensorrt"]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@no_gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [None, RuntimeSettings(device="cuda:1")])
def test_without_a_gpu_they_are_not_there(name: str, settings: RuntimeSettings | None) -> None:
    with pytest.raises(RuntimeUnavailableError, match=f"`{name}`.*choose another runtime"):
        get_runtime(name, settings)


@pytest.mark.parametrize("name", NAMES)
def test_the_processor_is_no_device_of_theirs(name: str) -> None:
    with pytest.raises(ConfigError, match="device: got 'cpu', choose one of: cuda"):
        get_runtime(name, RuntimeSettings())


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a TensorRT runtime on a machine that only claims to have a GPU and the provider."""
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "a GPU")
    claimed = ["TensorrtExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: claimed)
    return lambda precision: TensorRtRuntime(RuntimeSettings(device="cuda:1", precision=precision))


def test_an_onnxruntime_without_tensorrt_is_named(
    monkeypatch: pytest.MonkeyPatch, tensorrt: Any
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeUnavailableError, match=r"`tensorrt`.*TensorrtExecutionProvider"):
        tensorrt("float32")


@pytest.mark.parametrize(("precision", "half"), [("float32", False), ("float16", True)])
def test_half_precision_only_when_asked_for(tensorrt: Any, precision: str, half: bool) -> None:
    runtime = tensorrt(precision)
    first, second, last = runtime._providers()
    assert first == (
        "TensorrtExecutionProvider",
        {"device_id": 1, "trt_fp16_enable": half},
    )
    tf32 = {} if half else {"use_tf32": 0}
    assert second == ("CUDAExecutionProvider", {"device_id": 1, **tf32})
    assert last == "CPUExecutionProvider"
    identity = runtime.identity(example())
    assert (identity["runtime"], identity["precision"]) == ("tensorrt", precision)


def test_a_tensorrt_that_does_not_start_is_named(
    tensorrt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime itself falls back without an error."""
    runtime = tensorrt("float32")
    model = runtime._export(tiny("plain"), example())
    native = runtime._ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    monkeypatch.setattr(runtime._ort, "InferenceSession", lambda *_, **__: native)
    with pytest.raises(RuntimeUnavailableError, match="TensorrtExecutionProvider could not"):
        runtime.session_of(model, example())


def test_whether_tensorrt_may_use_tf32_is_recorded(
    tensorrt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    assert tensorrt("float32").identity(example())["options"] == {"tf32": True}
    assert tensorrt("float16").identity(example())["options"] == {}
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert tensorrt("float32").identity(example())["options"] == {"tf32": False}


@pytest.mark.gpu
@needs_gpu
def test_a_replay_computes_the_same_and_is_timed_by_events() -> None:
    network = tiny("residual")
    with CudaGraphsRuntime().load(network, example()) as session:
        first = session.outputs()
        assert_close(first, expected(network, example()), relative=5e-3)
        session.run()
        assert all(torch.equal(a, b) for a, b in zip(first, session.outputs(), strict=True))
        assert session.elapsed_ms() > 0
        found = measure(session, reference=session, seconds=0, min_rounds=2)
    assert found.identity["runtime"] == "cuda-graphs"
    with pytest.raises(RuntimeError, match="closed"):
        session.run()


@pytest.mark.gpu
@needs_gpu
def test_what_waits_for_the_device_cannot_be_recorded() -> None:
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.sum().item())

    with pytest.raises(ExportError, match="cannot be recorded"):
        CudaGraphsRuntime().load(Waits(), example())
    with CudaGraphsRuntime().load(tiny("plain"), example()) as session:
        assert_close(session.outputs(), expected(tiny("plain"), example()), relative=5e-3)
