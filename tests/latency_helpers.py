"""Networks, comparisons and told clocks that the tests of latency share."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import conv
from torch import Tensor, nn

from wgates_plugin.errors import MissingExtraError
from wgates_plugin.latency import (
    BaseRuntime,
    Measurement,
    RuntimeSettings,
    get_runtime,
    measure,
)
from wgates_plugin.latency.base import Session, flatten_outputs


@dataclass(frozen=True)
class Case:
    """A runtime with options. A GPU's own algorithms for convolutions round in their own way."""

    runtime: str
    options: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    relative: float = 1e-4

    def build(self, *, threads: int = 1) -> BaseRuntime:
        """The runtime; the test is skipped where its library or device is missing."""
        if self.device != "cpu" and not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        settings = RuntimeSettings(threads=threads, device=self.device)
        try:
            return get_runtime(self.runtime, settings, **self.options)
        except MissingExtraError as error:
            pytest.skip(str(error))


FAKE_DEVICE = [sys.executable, "-S", str(Path(__file__).with_name("fake_device.py")), "{rounds}"]

CASES = {
    "eager": Case("eager"),
    "eager-channels-last": Case("eager", {"channels_last": True}),
    "compile": Case("compile"),
    "onnxruntime": Case("onnxruntime"),
    "openvino": Case("openvino"),
    "executorch": Case("executorch"),
    "command": Case(
        "command",
        {
            "command": [*FAKE_DEVICE, "ms=2", "model={model}"],
            "device_name": "a board",
            "rounds": 5,
        },
    ),
    "eager-cuda": Case("eager", device="cuda", relative=5e-3),
    "compile-cuda": Case("compile", device="cuda", relative=5e-3),
    "cuda-graphs": Case("cuda-graphs", device="cuda", relative=5e-3),
}
"""TensorRT is not here: its engines take minutes to build."""


def cases(*names: str) -> list[Any]:
    """Parameters of the cases called `names`, by default all; those on a GPU carry its mark."""
    return [
        pytest.param(
            CASES[name], id=name, marks=[pytest.mark.gpu] if CASES[name].device != "cpu" else []
        )
        for name in names or CASES
    ]


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
