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
from wgates_plugin.calling import ExampleInputs, call_with, left_as_found
from wgates_plugin.channels import ChannelSpace
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


@torch.no_grad()
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
    found = dict(network.named_modules())
    seen: dict[str, Tensor] = {}
    handles = []
    for name, side in space.slots_of:
        index = space.unit_index(name, side)
        if side == "out" or index is None:
            continue
        closed = ~flags[torch.from_numpy(index)]
        if not closed.any():
            continue

        def look(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            index = space.unit_index(name, "in")
            assert index is not None
            closed = ~flags[torch.from_numpy(index)]
            dim = inputs[0].dim() - 1 if isinstance(module, nn.Linear) else 1
            others = [d for d in range(inputs[0].dim()) if d != dim]
            alive = (inputs[0] != 0).sum(others).cpu() > 0  # NaN counts as alive
            if (alive & closed).any():
                seen[name] = seen.get(name, torch.zeros_like(closed)) | (alive & closed)

        handles.append(found[name].register_forward_pre_hook(look))
    try:
        with left_as_found(network), masked(network, masks):
            network.eval()
            call_with(network, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


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


def closed_units(network: nn.Module, space: ChannelSpace, masks: AnyMasks) -> Tensor:
    """Units (total_units,) all of whose channels are masked in every layer that makes them."""
    found = dict(network.named_modules())
    closed = torch.ones(space.total_units, dtype=torch.bool)
    for index, group in enumerate(space.groups):
        for slot in group.slots_as("producer"):
            owned = torch.from_numpy(slot.units) >= 0
            units = torch.from_numpy(slot.units)[owned] + space.offsets[index]
            kept = ~_closed_channels(found[slot.module], masks.get(slot.module, {}))[owned]
            closed[units[kept]] = False
    return closed


def still_open(space: ChannelSpace, closed: Tensor) -> ChannelSpace:
    """The space with caps, and where need be floors, at what `closed` (total_units,) leaves open."""
    groups = []
    for index, group in enumerate(space.groups):
        left = int((~closed[space.unit_slice(index)]).sum()) * group.ties
        cap = min(group.cap, max(left, group.ties))
        groups.append(dataclasses.replace(group, cap=cap, floor=min(group.floor, cap)))
    return dataclasses.replace(space, groups=tuple(groups))


def _closed_channels(module: nn.Module, targets: Mapping[str, Tensor | None]) -> Tensor:
    """Output channels (C_out,) whose weights and bias are all masked."""
    weight, bias = targets.get("weight"), targets.get("bias")
    none = torch.zeros(kinds.out_channels_of(module), dtype=torch.bool)
    if weight is None:
        return none
    others = [d for d in range(weight.dim()) if d != out_dim(module)]
    closed = (weight != 0).sum(others).cpu() == 0
    if getattr(module, "bias", None) is not None:
        closed &= (bias == 0).cpu() if bias is not None else none
    return closed
