"""Gate values go into the weights that read the gated channels, which computes the same.

A gate acts where a channel is read, so `W (g * x) = (W * g) x` for every convolution and linear layer
behind it. What lies between (BatchNorm, depthwise convolutions, a concatenation) sees the channel as
it was, and takes no part.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wgates_plugin import modules as kinds
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.gating import gated_weight


@torch.no_grad()
def absorb(network: nn.Module, space: ChannelSpace, gates: Tensor) -> nn.Module:
    """Multiply gates (total_units,) into the reading kernels, in place; returns the network.

    The product is the one that `Gating` forms in every forward pass, so nothing is rounded anew.
    Channels of a reader without weights to change must have gates of 0 or 1, see `rigid_units`.
    """
    found = dict(network.named_modules())
    extended = torch.cat([gates.detach(), gates.new_ones(1)])
    for name, side in space.slots_of:
        module = found[name]
        index = space.unit_index(name, side)
        if side == "out" or index is None or not isinstance(module, kinds.WEIGHTED):
            continue
        weight: Tensor = module.weight
        mine = extended[torch.from_numpy(index).to(extended.device)].to(weight.device)
        weight.copy_(gated_weight(module, weight, mine))
    return network


def rigid_units(network: nn.Module, space: ChannelSpace) -> Tensor:
    """Units (total_units,) with a reader that cannot absorb a gate: bool.

    That is one without weights, or with frozen ones (`requires_grad` is false).
    """
    found = dict(network.named_modules())
    rigid = torch.zeros(space.total_units, dtype=torch.bool)
    for index, group in enumerate(space.groups):
        readers = (found[slot.module] for slot in group.slots_as("consumer"))
        if not all(_can_absorb(reader) for reader in readers):
            rigid[space.unit_slice(index)] = True
    return rigid


def _can_absorb(reader: nn.Module) -> bool:
    return isinstance(reader, kinds.WEIGHTED) and bool(reader.weight.requires_grad)
