"""What learns and predicts inside LPNet, and which kinds there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.lpnet.data import LatencyData
from wgates_plugin.efficiency.lpnet.layers import LayersStructure
from wgates_plugin.efficiency.lpnet.mlp import MlpStructure


class Structure(Protocol):
    """What learns and predicts inside LPNet; differentiable in the widths."""

    @property
    def name(self) -> str: ...

    def predict(self, widths: Tensor) -> Tensor: ...

    def deviation(self, widths: Tensor) -> Tensor: ...

    def conditioned(self, data: LatencyData) -> Structure: ...

    def without(self, data: LatencyData, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]: ...

    def tensors(self) -> dict[str, Tensor]: ...


FROM_TENSORS: dict[str, Callable[[ChannelSpace, Mapping[str, Tensor]], Structure]] = {
    "layers": LayersStructure.from_tensors,
    "mlp": MlpStructure.from_tensors,
}

STRUCTURES = tuple(FROM_TENSORS)
