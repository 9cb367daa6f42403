"""A layer as a record."""

from __future__ import annotations

import math

from torch import Tensor, nn

from wgates_plugin import modules as kinds
from wgates_plugin.channels import Layer


def layer_record(name: str, module: nn.Module, positions: int) -> Layer:
    """`positions`: how often its kernel is applied per image, over all its calls."""
    kind = kinds.layer_kind(module)
    parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    if kind in ("conv", "depthwise", "transposed", "linear"):
        weight: Tensor = module.weight  # type: ignore[assignment]
        groups = int(getattr(module, "groups", 1))
        return Layer(
            name,
            kind,
            kinds.in_channels_of(module),
            kinds.out_channels_of(module),
            groups,
            math.prod(weight.shape[2:]),
            positions,
            getattr(module, "bias", None) is not None,
            parameters,
        )
    channels = int(getattr(module, "num_features", 0) or getattr(module, "num_parameters", 0))
    return Layer(name, kind, channels, channels, 1, 0, positions, False, parameters)
