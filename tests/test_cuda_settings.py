"""What a session on a CUDA device sets in torch: its device, and TF32 off at float32.

Stand-ins take the place of the device, so that all of it is tested without one.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from networks import example
from torch import Tensor, nn

from wgates_plugin.latency import OnnxRuntime, RuntimeSettings
from wgates_plugin.latency.compiled import CudaCompiledSession
from wgates_plugin.latency.eager import CudaEagerSession
from wgates_plugin.latency.onnx_runtime import CudaOnnxSession
from wgates_plugin.latency.tf32 import exact_float32, tf32_allowed

KINDS = [CudaEagerSession, CudaCompiledSession]


@pytest.fixture
def allowed() -> Iterator[None]:
    """TF32 is on for products and convolutions, as many users set it."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def both() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("level", ["high", "medium"])
def test_tf32_is_off_inside_and_as_found_outside(allowed: None, level: str) -> None:
    torch.set_float32_matmul_precision(level)
    assert tf32_allowed()
    with exact_float32():
        assert both() == (False, False)
        assert not tf32_allowed()
        with exact_float32():
            assert not tf32_allowed()
        assert not tf32_allowed()
    assert both() == (True, True)
    assert torch.get_float32_matmul_precision() == level
    with pytest.raises(ValueError, match="inside"), exact_float32():
        raise ValueError("inside")
    assert both() == (True, True)


def test_what_was_off_stays_off() -> None:
    assert not torch.backends.cuda.matmul.allow_tf32
    with exact_float32():
        assert both() == (False, False)
    assert both() == (False, True)  # as torch starts


NEW_SETTINGS = """
import torch
from wgates_plugin.latency.tf32 import exact_float32, tf32_allowed
products, conv, rnn = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
def now():
    return [backend.fp32_precision for backend in (products, conv, rnn)]
products.fp32_precision = "tf32"
conv.fp32_precision = "ieee"
before = now()
assert before == ["tf32", "ieee", "tf32"], before
with exact_float32():
    assert now() == ["ieee"] * 3, now()
    assert not tf32_allowed()
assert now() == before
"""


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has no such settings"
)
def test_torchs_newer_settings_are_put_back_too() -> None:
    """In a process of its own: after them torch no longer tells the older ones."""
    done = subprocess.run([sys.executable, "-c", NEW_SETTINGS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Device:
    """Records on which device everything happens that torch does on the current one."""

    def __init__(self) -> None:
        self.current, self.log = "cuda:0", list[tuple[str, str]]()

    @contextmanager
    def enter(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, str(device)
        yield
        self.current = before

    def note(self, what: str) -> None:
        self.log.append((what, self.current))

    def event(self, **_: Any) -> Any:
        self.note("event")
        return self

    def record(self) -> None:
        self.note("record")

    def synchronize(self) -> None:
        self.note("synchronize")

    def elapsed_time(self, _: Any) -> float:
        return 2.5


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch.cuda, "device", made.enter)
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    return made


class Seeing(nn.Module):
    """Notes the settings that it runs under."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device, self.seen = device, list[tuple[bool, bool]]()

    def forward(self, x: Tensor) -> Tensor:
        self.device.note("call")
        self.seen.append(both())
        return x


def session(kind: Any, network: Seeing, precision: str = "float32") -> CudaEagerSession:
    settings = RuntimeSettings(device="cuda:1", precision=precision)
    made: CudaEagerSession = kind(network, (example(),), settings=settings, identity={})
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_everything_happens_on_the_sessions_device(kind: Any, device: Device) -> None:
    made = session(kind, Seeing(device))
    made.run()
    assert made.elapsed_ms() == 2.5
    made.outputs()
    done = {what for what, _ in device.log}
    assert done == {"call", "event", "record", "synchronize"}
    assert {where for _, where in device.log} == {"cuda:1"}
    assert device.current == "cuda:0"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("precision", "tf32"), [("float32", False), ("float16", True)])
def test_float32_runs_without_tf32(
    allowed: None, kind: Any, device: Device, precision: str, tf32: bool
) -> None:
    network = Seeing(device)
    made = session(kind, network, precision)
    with made.active():
        made.run()
        made.elapsed_ms()
    made.outputs()
    assert network.seen == [(tf32, tf32)] * 3
    assert both() == (True, True)


def test_compiled_code_never_sees_tf32(allowed: None, device: Device) -> None:
    """Under other settings than those it was made under, dynamo would compile it once more."""
    network = Seeing(device)
    session(CudaCompiledSession, network).run()
    assert network.seen == [(False, False)]


class Binding:
    """Stands in for ONNX Runtime's session and its binding of inputs and outputs."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []

    def io_binding(self) -> Binding:
        return self

    def get_outputs(self) -> list[Any]:
        return [type("Output", (), {"name": "y"})]

    def bind_cpu_input(self, *_: Any) -> None: ...

    def bind_output(self, *bound: Any) -> None:
        self.outputs.append(bound)

    def synchronize_inputs(self) -> None: ...


def test_onnxruntime_keeps_outputs_on_its_device() -> None:
    native = Binding()
    CudaOnnxSession(native, {"x": np.zeros(1)}, identity={}, device_index=1)
    assert native.outputs == [("y", "cuda", 1)]


def test_onnxruntime_is_told_the_device_and_no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "a GPU")
    claimed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: claimed)
    runtime = OnnxRuntime(RuntimeSettings(device="cuda:1"))
    assert runtime._providers()[0] == ("CUDAExecutionProvider", {"device_id": 1, "use_tf32": 0})
