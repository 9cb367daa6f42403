"""What this package knows of module types: which dimension holds channels, and who may take part."""

from __future__ import annotations

from typing import Any

from torch import nn

from wgates_plugin.transforms.scatter import Scatter

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

WEIGHTED = (*CONVS, *TRANSPOSED, nn.Linear)
"""Modules that produce and consume channels."""

PER_CHANNEL = (*BATCH_NORMS, *INSTANCE_NORMS, nn.PReLU)
"""Modules that treat each channel on its own: a closed channel changes no other one."""

READERS = (*WEIGHTED, Scatter)
"""Modules that consume channels: what they give out does not tell how many they read."""


def is_depthwise(module: nn.Module) -> bool:
    """True for a convolution with one input and one output channel per conv group."""
    return (
        isinstance(module, CONVS)
        and module.groups > 1
        and module.groups == module.in_channels == module.out_channels
    )


def layer_kind(module: nn.Module) -> str:
    """The `Layer.kind` of a module."""
    if is_depthwise(module):
        return "depthwise"
    if isinstance(module, CONVS):
        return "conv"
    if isinstance(module, TRANSPOSED):
        return "transposed"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, (*BATCH_NORMS, *INSTANCE_NORMS)):
        return "norm"
    return "other"


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module reads, in a hook `with_kwargs`: it may be called by keyword (`conv(input=x)`)."""
    return args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))


def channel_dims(module: nn.Module) -> tuple[int, int]:
    """(output dimension, input dimension) of a weighted module's weight."""
    return (1, 0) if isinstance(module, TRANSPOSED) else (0, 1)


def channels_at(module: nn.Module, side: str) -> int | None:
    """Channels that a module reads ("in") or gives out ("out"); None where it has none of its own."""
    if isinstance(module, READERS):
        return out_channels_of(module) if side == "out" else in_channels_of(module)
    if isinstance(module, nn.PReLU):
        return module.num_parameters if module.num_parameters > 1 else None
    size = getattr(module, "num_features", None)
    return None if size is None else int(size)


def in_channels_of(module: nn.Module) -> int:
    return int(module.in_features if isinstance(module, nn.Linear) else module.in_channels)  # type: ignore[arg-type]


def out_channels_of(module: nn.Module) -> int:
    return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)  # type: ignore[arg-type]
