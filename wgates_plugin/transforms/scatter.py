"""Scatter: the outputs that a residual branch has left, put back into the stream's full width.

Tang et al., "SCOP" (NeurIPS 2020), prune the last convolution of a residual block on its own: its
remaining outputs are added to the channels of the stream that they belong to, the others get nothing.
The step "scatter" inserts an identity of this kind; removing channels in front of it gives it work.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional

from wgates_plugin.calling import device_of
from wgates_plugin.errors import PlanError

_CHANNELS = ("out_channels", "out_features", "num_features")
"""Where convolutions, linear layers and norms keep the number of channels that they give out."""


class Scatter(nn.Module):
    """(N, kept, ...) -> (N, width, ...): channel i goes to `index[i]`, all others are zero.

    While every channel is kept the input is returned as it is. `index` (kept,), int64, is ascending
    and part of the state dict; slicing it is all that a change of width needs.
    """

    index: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("index", torch.arange(width))

    @property
    def in_channels(self) -> int:
        return self.index.numel()

    @property
    def out_channels(self) -> int:
        return self.width

    def forward(self, inputs: Tensor) -> Tensor:
        kept = self.in_channels
        if kept == self.width:
            return inputs
        # A gather from the input with one empty channel more: runtimes do this in one pass, where
        # a scatter over feature maps would need an index as large as the map.
        device, whole = self.index.device, torch.int64  # exporters take `full` for floats
        places = torch.full((self.width,), kept, dtype=whole, device=device)
        places = places.scatter(0, self.index, torch.arange(kept, dtype=whole, device=device))
        padded = functional.pad(inputs, [0, 0] * (inputs.dim() - 2) + [0, 1])
        return padded.index_select(1, places)

    def extra_repr(self) -> str:
        return f"{self.in_channels} of {self.width}"


class ScatterPruner(tp.BasePruningFunc):
    """How torch-pruning cuts the inputs of a `Scatter`; its outputs stay."""

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        keep = torch.ones(layer.in_channels, dtype=torch.bool)
        keep[list(idxs)] = False
        layer.index = layer.index[keep.to(layer.index.device)]
        module: nn.Module = layer
        return module

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        raise PlanError("scatter: the stream behind it keeps its width; its outputs cannot be cut")

    def get_in_channels(self, layer: Any) -> int:
        return int(layer.in_channels)

    def get_out_channels(self, layer: Any) -> int:
        return int(layer.out_channels)


def _problem(name: object, width: object, found: Mapping[str, nn.Module]) -> str | None:
    """Why no scatter of `width` can stand behind the module `name`; None if one can."""
    if not isinstance(name, str) or not name or name not in found:
        return f"no module `{name}`"
    if type(width) is not int or width < 1:
        return f"`{name}`: width {width!r:.40} is no number of channels"
    made = found[name]
    known = [getattr(made, each) for each in _CHANNELS if hasattr(made, each)]
    if not known:
        return f"`{name}` is {type(made).__name__}, no layer of known width"
    return None if known[0] == width else f"`{name}` gives out {known[0]} channels, not {width}"


def apply(network: nn.Module, behind: Mapping[str, int]) -> nn.Module:
    """Insert a `Scatter` behind each named module, in place.

    Args:
        behind: module name -> its output channels. The module moves to `NAME.made`, the scatter is
            `NAME.scatter`.

    Raises:
        PlanError: the network has no such modules, or they give out another number of channels; all
            at once, and nothing is changed.
    """
    if not isinstance(behind, Mapping):
        raise PlanError(
            f"plan: step `scatter` has {behind!r:.60} where modules and widths belong; make the plan "
            "anew"
        )
    found = dict(network.named_modules())
    problems = [_problem(name, width, found) for name, width in behind.items()]
    if any(problems):
        raise PlanError(
            f"plan: step `scatter` does not fit this network ({'; '.join(filter(None, problems))}); "
            "give the network that the plan was made for"
        )
    for name, width in behind.items():
        parent_name, _, child = name.rpartition(".")
        parent, made = network.get_submodule(parent_name), found[name]
        scatter = Scatter(width).to(device_of(made)).train(made.training)
        pair = nn.Sequential(OrderedDict(made=made, scatter=scatter))
        pair.training = made.training
        setattr(parent, child, pair)
    return network
