"""Exact MACs and parameters of any widths, differentiable. One multiply-add is one MAC."""

from __future__ import annotations

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace, Side


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
        totals_in = torch.tensor([float(layer.in_channels) for layer in space.layers]).double()
        totals_out = torch.tensor([float(layer.out_channels) for layer in space.layers]).double()
        self.in_fixed = totals_in - self.in_slope @ full
        self.out_fixed = totals_out - self.out_slope @ full

    def inputs(self, widths: Tensor) -> Tensor:
        return widths.double() @ self.in_slope.T + self.in_fixed

    def outputs(self, widths: Tensor) -> Tensor:
        return widths.double() @ self.out_slope.T + self.out_fixed

    def macs_per_layer(self, widths: Tensor) -> Tensor:
        """Widths (..., G) -> MACs per image (..., L)."""
        return _pair_macs(self.space, self.inputs(widths), self.outputs(widths))

    def parameters_per_layer(self, widths: Tensor) -> Tensor:
        """Widths (..., G) -> parameters (..., L)."""
        inputs, outputs = self.inputs(widths), self.outputs(widths)
        columns = []
        for index, layer in enumerate(self.space.layers):
            cin, cout = inputs[..., index], outputs[..., index]
            if layer.kind == "depthwise":
                columns.append(cout * (layer.kernel + layer.bias))
            elif layer.kind in ("conv", "transposed", "linear"):
                columns.append(layer.kernel * cin * cout / layer.groups + layer.bias * cout)
            elif layer.out_channels:
                columns.append(cout * (layer.parameters / layer.out_channels))
            else:
                columns.append(torch.full_like(cout, float(layer.parameters)))
        return torch.stack(columns, dim=-1)


def _pair_macs(space: ChannelSpace, inputs: Tensor, outputs: Tensor) -> Tensor:
    columns = []
    for index, layer in enumerate(space.layers):
        cin, cout = inputs[..., index], outputs[..., index]
        work = float(layer.kernel * layer.positions)
        if layer.kind == "depthwise":
            columns.append(cout * work)
        elif layer.kind in ("conv", "transposed", "linear"):
            columns.append(cin * cout * (work / layer.groups))
        else:
            columns.append(torch.zeros_like(cout))
    return torch.stack(columns, dim=-1)


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
