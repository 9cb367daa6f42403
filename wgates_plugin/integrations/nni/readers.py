"""What the layers that read channels still see of those that masks close; the network is run to see."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin.calling import ExampleInputs, call_with, left_as_found
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.integrations.nni.masks import (
    AnyMasks,
    channel_dim,
    closed_channels,
    masked,
    masks_from,
    out_indices,
    out_targets,
)


def seen_when_closed(
    network: nn.Module,
    space: ChannelSpace,
    example_inputs: ExampleInputs,
    flags: Tensor,
    masks: AnyMasks,
) -> dict[str, Tensor]:
    """Reader -> which of its input channels are closed in `flags` and yet not zero under the masks.

    What is left of a closed channel no longer depends on the network's input, so one batch in eval
    mode decides it for all. Readers that see nothing of a closed channel are not in the result.
    """
    seen: dict[str, Tensor] = {}

    def look(name: str, features: Tensor, closed: Tensor) -> None:
        alive = ((features != 0).sum(1).cpu() > 0) & closed  # NaN counts as alive
        if alive.any():
            seen[name] = seen.get(name, torch.zeros_like(closed)) | alive

    _look_at_readers(network, space, example_inputs, flags, masks, look)
    return seen


@torch.no_grad()
def _look_at_readers(
    network: nn.Module,
    space: ChannelSpace,
    example_inputs: ExampleInputs,
    flags: Tensor,
    masks: AnyMasks,
    look: Callable[[str, Tensor, Tensor], None],
) -> None:
    """Run the masked network in eval mode, and show what is read of units closed in `flags`.

    `look` gets the reader's name, its input (C_in, rest) and which channels of it are closed (C_in,).
    """
    handles = []

    def showing(name: str, closed: Tensor) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            features = inputs[0].movedim(channel_dim(module, inputs[0]), 0)
            look(name, features.flatten(1), closed)

        return hook

    for name, side in space.slots_of:
        index = space.unit_index(name, side)
        if side == "out" or index is None:
            continue
        closed = ~flags[torch.from_numpy(index)]
        if closed.any():
            hook = showing(name, closed)
            handles.append(network.get_submodule(name).register_forward_pre_hook(hook))
    try:
        with left_as_found(network), masked(network, masks):
            network.eval()
            call_with(network, example_inputs)
    finally:
        for handle in handles:
            handle.remove()


def open_readers(
    network: nn.Module, space: ChannelSpace, example_inputs: ExampleInputs, groups: Collection[int]
) -> list[str]:
    """Layers that still see channels of these groups when masks close all of them."""
    flags = torch.ones(space.total_units + 1, dtype=torch.bool)
    for index in groups:
        flags[space.unit_slice(index)] = False
    found = dict(network.named_modules())
    parameters = {
        name: {key: found[name].get_parameter(key) for key in keys}
        for name, keys in out_targets(network, space, groups).items()
    }
    masks = masks_from(flags, network, space, parameters, readers=())
    return list(seen_when_closed(network, space, example_inputs, flags, masks))


def cut_off_units(
    network: nn.Module, space: ChannelSpace, example_inputs: ExampleInputs, masks: AnyMasks
) -> Tensor:
    """Units (total_units,) that a masked norm or depthwise convolution keeps from all their readers.

    Random numbers take the place of what their layers make. A reader that sees the same of any of them
    sees a constant: zero, or the shift of a norm whose bias was not masked.
    """
    candidates = torch.zeros(space.total_units + 1, dtype=torch.bool)
    for name, index in out_indices(space, "passenger"):
        closed = closed_channels(network.get_submodule(name), masks.get(name, {})).expand_as(index)
        whole = torch.ones_like(candidates)
        whole[index[~closed]] = False
        candidates[index[closed]] |= whole[index[closed]]
    candidates[-1] = False
    if not candidates.any():
        return candidates[:-1]
    # Both signs, for a ReLU hides one, and another size, for a square hides the sign.
    sums = [_sums_read(network, space, example_inputs, candidates, masks, f) for f in (1, -1, 0.5)]
    for name, first in sums[0].items():
        read = space.unit_index(name, "in")
        assert read is not None
        differs = (sums[1][name] != first) | (sums[2][name] != first)
        candidates[torch.from_numpy(read)[differs]] = False
    return candidates[:-1]


def _sums_read(
    network: nn.Module,
    space: ChannelSpace,
    example_inputs: ExampleInputs,
    candidates: Tensor,
    masks: AnyMasks,
    factor: float,
) -> dict[str, Tensor]:
    """Reader -> sums (C_in,) of what it reads, random numbers standing for the candidates' outputs."""
    generator = torch.Generator().manual_seed(0)
    sums: dict[str, Tensor] = {}

    def disturbing(index: Tensor) -> Callable[..., Tensor]:
        def hook(module: nn.Module, _: Any, output: Tensor) -> Tensor:
            dim = channel_dim(module, output)
            chosen = candidates[index].view([-1 if d == dim else 1 for d in range(output.dim())])
            sizes = 10 ** (4 * torch.rand(output.shape, generator=generator))  # of every order
            return torch.where(chosen.to(output.device), (factor * sizes).to(output), output)

        return hook

    def look(name: str, features: Tensor, _: Tensor) -> None:
        sums[name] = sums.get(name, 0) + features.double().sum(1).cpu()

    handles = [
        network.get_submodule(name).register_forward_hook(disturbing(index))
        for name, index in out_indices(space, "producer")
    ]
    try:
        _look_at_readers(network, space, example_inputs, ~candidates, masks, look)
    finally:
        for handle in handles:
            handle.remove()
    return sums
