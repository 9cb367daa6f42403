"""Masks in NNI's form: {layer: {"weight": tensor, "bias": tensor}}, 1 = kept, shaped as the parameter.

A closed channel is masked where it is made and wherever it would come to life again: in the weight and
bias of its convolutions, of BatchNorms and of depthwise convolutions. Behind an operation that makes
something of nothing (a sigmoid, a norm without weights) no such mask can help; there the *readers'*
weights are masked along their inputs. Together they compute what the network computes once the
channels are gone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from nni.compression.base.setting import PruningSetting
from torch import Tensor, nn

from wgates_plugin import modules as kinds
from wgates_plugin.channels import ChannelSpace, Role
from wgates_plugin.gating import gated_weight
from wgates_plugin.plan import PruningPlan

Masks = dict[str, dict[str, Tensor]]
AnyMasks = Mapping[str, Mapping[str, Tensor | None]]
Targets = dict[str, list[str]]
"""Layer -> names of its parameters, in `named_modules()` order."""


def out_targets(network: nn.Module, space: ChannelSpace, groups: Collection[int]) -> Targets:
    """Parameters that hold a row for each output channel of these groups, as far as NNI masks them."""
    targets: Targets = {}
    for name, module in network.named_modules():
        touching = space.slots_of.get((name, "out"), [])
        if any(index in groups for index, _ in touching) and maskable(module):
            held = [key for key in ("weight", "bias") if module._parameters.get(key) is not None]
            if held:
                targets[name] = held
    return targets


def needed_targets(model: nn.Module, targets: Targets, readers: list[str]) -> Targets:
    """All parameters that get a mask, in `named_modules()` order."""
    needed: Targets = {}
    for name, _ in model.named_modules():
        keys = list(targets.get(name, []))
        if name in readers and "weight" not in keys:
            keys.insert(0, "weight")
        if keys:
            needed[name] = keys
    return needed


def maskable(module: nn.Module) -> bool:
    """Whether NNI wraps modules of this type."""
    return type(module).__name__ in PruningSetting.registry


def flags_of(plan: PruningPlan) -> Tensor:
    """Kept units (total_units + 1,); the last entry stands for channels that no group owns."""
    return torch.cat([plan.mask, torch.ones(1, dtype=torch.bool)])


def masks_from(
    flags: Tensor,
    network: nn.Module,
    space: ChannelSpace,
    parameters: Mapping[str, Mapping[str, Tensor]],
    readers: Collection[str],
) -> Masks:
    """Masks of these parameters for kept units `flags` (total_units + 1,)."""
    found = dict(network.named_modules())
    masks: Masks = {}
    for name, held in parameters.items():
        out_index, in_index = space.unit_index(name, "out"), space.unit_index(name, "in")
        masks[name] = {}
        for key, parameter in held.items():
            mask = torch.ones_like(parameter, requires_grad=False)
            if out_index is not None:
                kept = flags[torch.from_numpy(out_index)].to(mask)
                dim = out_dim(found[name]) if key == "weight" else 0
                mask = mask * kept.view([-1 if d == dim else 1 for d in range(mask.dim())])
            if key == "weight" and name in readers:
                assert in_index is not None
                read = flags[torch.from_numpy(in_index)].to(mask)
                mask = gated_weight(found[name], mask, read)
            masks[name][key] = mask
    return masks


def out_dim(module: nn.Module) -> int:
    """Dimension of the weight that counts output channels."""
    if isinstance(module, kinds.WEIGHTED) and not kinds.is_depthwise(module):
        return kinds.channel_dims(module)[0]
    return 0


def channel_dim(module: nn.Module, features: Tensor) -> int:
    """Dimension of what the module reads or gives out that counts channels."""
    return features.dim() - 1 if isinstance(module, nn.Linear) else 1


@contextmanager
def masked(network: nn.Module, masks: AnyMasks) -> Iterator[None]:
    """Multiply the masks into the parameters for the length of the block."""
    found = dict(network.named_modules())
    held: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for name, targets in masks.items():
            for key, mask in targets.items():
                parameter = found[name]._parameters.get(key)
                if mask is not None and parameter is not None:
                    held.append((parameter, parameter.detach().clone()))
                    parameter.data.mul_(mask.to(parameter))
        yield
    finally:
        for parameter, value in held:
            parameter.data.copy_(value)


def closed_units(network: nn.Module, space: ChannelSpace, masks: AnyMasks) -> Tensor:
    """Units (total_units,) all of whose channels are masked in every layer that makes them.

    Weights count; a bias that lives on keeps the channel at a constant, as a norm behind it may.
    """
    closed = torch.ones(space.total_units, dtype=torch.bool)
    for name, index in out_indices(space, "producer"):
        kept = ~closed_channels(network.get_submodule(name), masks.get(name, {}))
        closed[index[kept & (index < space.total_units)]] = False
    return closed


def out_indices(space: ChannelSpace, role: Role) -> Iterator[tuple[str, Tensor]]:
    """(layer, unit of each of its output channels) for the layers of this role."""
    names = dict.fromkeys(slot.module for group in space.groups for slot in group.slots_as(role))
    for name in names:
        index = space.unit_index(name, "out")
        if index is not None:
            yield name, torch.from_numpy(index)


def still_open(space: ChannelSpace, closed: Tensor) -> ChannelSpace:
    """The space with caps, and where need be floors, at what `closed` (total_units,) leaves open."""
    groups = []
    for index, group in enumerate(space.groups):
        left = int((~closed[space.unit_slice(index)]).sum()) * group.ties
        cap = min(group.cap, max(left, group.ties))
        groups.append(dataclasses.replace(group, cap=cap, floor=min(group.floor, cap)))
    return dataclasses.replace(space, groups=tuple(groups))


def closed_channels(module: nn.Module, targets: Mapping[str, Tensor | None]) -> Tensor:
    """Output channels (C_out,) whose weights are all masked; (1,) where there is no mask."""
    weight = targets.get("weight")
    if weight is None:
        return torch.zeros(1, dtype=torch.bool)
    others = [d for d in range(weight.dim()) if d != out_dim(module)]
    return ((weight != 0).sum(others) if others else weight).cpu() == 0


def by_input(module: nn.Module, values: Tensor) -> Tensor:
    """Sums (C_in,) of the values, shaped as the weight, over all but the channels it reads."""
    groups = int(getattr(module, "groups", 1))
    if groups == 1:
        dim = kinds.channel_dims(module)[1]
        return values.sum([d for d in range(values.dim()) if d != dim])
    # (C_out, C_in/groups, ...) -> (groups, C_out/groups, C_in/groups, ...)
    split = values.view(groups, values.shape[0] // groups, *values.shape[1:])
    return split.sum([1, *range(3, split.dim())]).flatten()
