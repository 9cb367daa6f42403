"""One export for a whole family, and what happens where it cannot serve."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from latency_helpers import assert_close, expected
from networks import conv, example, tiny
from torch import Tensor, nn

from wgates_plugin.errors import (
    ExportError,
)
from wgates_plugin.latency import (
    OnnxRuntime,
)
from wgates_plugin.latency.onnx_model import OnnxFamily
from wgates_plugin.surgery import resize
from wgates_plugin.tracing import trace


def _fresh() -> nn.Module:
    """Equal layers with equal fresh BatchNorms, whose tensors the exporter stores only once."""
    layers: list[nn.Module] = [conv(3, 8), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [conv(8, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8)]
    return nn.Sequential(*layers, conv(8, 2))


@pytest.fixture
def _one_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the slow second exporter out where the first one's failure is the subject."""
    from wgates_plugin.latency import onnx_model

    def export_dynamo(*_: Any, **__: Any) -> bytes:
        raise ExportError("left out")

    monkeypatch.setattr(onnx_model, "export_dynamo", export_dynamo)


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
