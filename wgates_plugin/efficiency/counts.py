"""Exact MACs and parameters of any widths, differentiable. One multiply-add is one MAC."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace, Layer, Side
from wgates_plugin.efficiency.base import Budget, EfficiencyModel
from wgates_plugin.errors import ConfigError


class LayerShapes:
    """Input and output channels of every layer as linear functions of the widths.

    `inputs(widths)` and `outputs(widths)`: widths (..., G) -> (..., L), float64.
    """

    def __init__(self, space: ChannelSpace) -> None:
        count, groups = len(space.layers), len(space.groups)
        self.space = space
        self.in_slope = torch.zeros(count, groups, dtype=torch.float64)
        self.out_slope = torch.zeros(count, groups, dtype=torch.float64)
        for row, layer in enumerate(space.layers):
            sides: tuple[tuple[Side, torch.Tensor], ...]
            sides = (("in", self.in_slope), ("out", self.out_slope))
            for side, slope in sides:
                for index, slot in space.slots_of.get((layer.name, side), []):
                    reached = int((slot.units >= 0).sum())
                    slope[row, index] += reached / space.groups[index].channels
            if layer.kind in ("depthwise", "norm", "other"):  # one record serves both sides
                self.in_slope[row] = self.out_slope[row]
        full = torch.tensor(space.full_widths, dtype=torch.float64)
        totals_in = torch.tensor([layer.in_channels for layer in space.layers]).double()
        totals_out = torch.tensor([layer.out_channels for layer in space.layers]).double()
        self.in_fixed = totals_in - self.in_slope @ full
        self.out_fixed = totals_out - self.out_slope @ full
        self._macs = _Terms(space, [_mac_terms(layer) for layer in space.layers])
        self._parameters = _Terms(space, [_parameter_terms(layer) for layer in space.layers])

    def inputs(self, widths: Tensor) -> Tensor:
        return widths.double() @ self.in_slope.T + self.in_fixed

    def outputs(self, widths: Tensor) -> Tensor:
        return widths.double() @ self.out_slope.T + self.out_fixed

    def macs_per_layer(self, widths: Tensor) -> Tensor:
        """Widths (..., G) -> MACs per image (..., L)."""
        return self._macs(self.inputs(widths), self.outputs(widths))

    def parameters_per_layer(self, widths: Tensor) -> Tensor:
        """Widths (..., G) -> parameters (..., L)."""
        return self._parameters(self.inputs(widths), self.outputs(widths))


class _Terms:
    """Per layer, `pair * in * out / groups + single * out + fixed`, over all layers at once.

    The division comes last: of whole numbers that divide evenly, it is exact.
    """

    def __init__(self, space: ChannelSpace, rows: list[tuple[float, float, float]]) -> None:
        self.groups = torch.tensor([layer.groups for layer in space.layers]).double()
        self.pair, self.single, self.fixed = torch.tensor(rows, dtype=torch.float64).T

    def __call__(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        return self.pair * inputs * outputs / self.groups + self.single * outputs + self.fixed


def _mac_terms(layer: Layer) -> tuple[float, float, float]:
    work = float(layer.kernel * layer.positions)
    if layer.kind == "depthwise":
        return 0.0, work, 0.0
    if layer.kind in ("conv", "transposed", "linear"):
        return work, 0.0, 0.0
    return 0.0, 0.0, 0.0


def _parameter_terms(layer: Layer) -> tuple[float, float, float]:
    if layer.kind == "depthwise":
        return 0.0, float(layer.kernel + layer.bias), 0.0
    if layer.kind in ("conv", "transposed", "linear"):
        return float(layer.kernel), float(layer.bias), 0.0
    if layer.out_channels:
        return 0.0, layer.parameters / layer.out_channels, 0.0
    return 0.0, 0.0, float(layer.parameters)


class MacsModel:
    """Multiply-adds of convolutions and linear layers per image."""

    name, unit = "macs", "MACs"

    def __init__(self, space: ChannelSpace) -> None:
        self.shapes = LayerShapes(space)
        self.fingerprint = space.fingerprint

    def __call__(self, widths: Tensor) -> Tensor:
        return self.shapes.macs_per_layer(widths).sum(-1)


class ParametersModel:
    """Parameters of the whole network."""

    name, unit = "parameters", "parameters"

    def __init__(self, space: ChannelSpace) -> None:
        self.shapes = LayerShapes(space)
        self.fingerprint = space.fingerprint

    def __call__(self, widths: Tensor) -> Tensor:
        return self.shapes.parameters_per_layer(widths).sum(-1)


_MODELS = "an `LPNet`, `MacsModel(space)` or `ParametersModel(space)`"


def model_of(
    space: ChannelSpace,
    efficiency: EfficiencyModel | Callable[[ChannelSpace], EfficiencyModel] | None,
) -> EfficiencyModel:
    """A model as users name it: itself, what makes one of a space, or None, which counts MACs.

    Raises:
        ConfigError: it is none of these, or what it makes is no model.
    """
    if problems := efficiency_problems(efficiency):
        raise ConfigError("efficiency model", problems)
    if efficiency is None:
        return MacsModel(space)
    if not isinstance(efficiency, type) and isinstance(efficiency, EfficiencyModel):
        return efficiency
    made = efficiency(space)
    if not isinstance(made, EfficiencyModel):
        raise ConfigError(
            "efficiency model",
            [
                f"efficiency {efficiency!r:.60}: returned {type(made).__name__} for the channel space; "
                f"it must return {_MODELS}"
            ],
        )
    return made


def efficiency_problems(efficiency: object) -> list[str]:
    """What can stand for no model nor budget, before the network is looked at."""
    if isinstance(efficiency, (str, os.PathLike)):
        return [f"efficiency {efficiency!r}: is a path; give `LPNet.load({str(efficiency)!r})`"]
    if isinstance(efficiency, type) and hasattr(efficiency, "load"):
        name = efficiency.__name__
        return [f"efficiency: is the class `{name}`; give a fitted one, `{name}.load(...)`"]
    if efficiency is None or isinstance(efficiency, Budget) or callable(efficiency):
        return []
    return [
        f"efficiency {efficiency!r:.60}: needs {_MODELS}, a function of the channel space that "
        "returns one, or a `Budget`"
    ]
