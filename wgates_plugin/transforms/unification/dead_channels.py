"""Channels that blocks of zeros have emptied: found, proven to be without effect, handed to a plan."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wgates_plugin import modules as kinds
from wgates_plugin.calling import ExampleInputs, call_with, informative, left_as_found
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.errors import SurgeryError
from wgates_plugin.plan import PruningPlan
from wgates_plugin.surgery import resize, resize_map
from wgates_plugin.transforms.scatter import Scatter
from wgates_plugin.transforms.unification.procedure import Unified
from wgates_plugin.verification import TOLERANCE, relative_error


def dead_channels(
    network: nn.Module, space: ChannelSpace, example_inputs: ExampleInputs, *, grid: int = 1
) -> PruningPlan:
    """The plan that removes channels without any effect on what the network computes in eval mode.

    A unit is dead where every reader either has only zero weights for it, or reads zero because
    all filters that make it are zero. A zero filter alone is not enough: BatchNorm turns its zeros
    into a shift, and a channel whose shift passes the activation stays. What is made of zeros does
    not depend on the input, so that one batch tells what it is.

    Args:
        space: of this network. grid: widths stay on it, and above floors; some dead channels may
            have to stay for that.
    """
    found = dict(network.named_modules())
    silent = torch.ones(space.total_units + 1, dtype=torch.bool)
    for name, side in space.slots_of:
        producing = any(slot.role == "producer" for _, slot in space.slots_of[name, side])
        if side == "out" and producing:
            silent[_units(space, name, "out")[~_zero_rows(found[name])]] = False
    dead = torch.ones(space.total_units + 1, dtype=torch.bool)
    for name, reads_zero in _zero_reads(network, space, example_inputs).items():
        units = _units(space, name, "in")
        harmless = _zero_columns(found[name]) | (reads_zero & silent[units])
        dead[units[~harmless]] = False
    return _without(space, dead[:-1].numpy(), grid)


def _without(space: ChannelSpace, dead: np.ndarray, grid: int) -> PruningPlan:
    kept = []
    for index, group in enumerate(space.groups):
        mine = dead[space.unit_slice(index)]
        alive = int((~mine).sum())
        units = group.round_up(alive * group.ties, grid) // group.ties
        order = np.argsort(mine, kind="stable")  # the living first
        kept.append(tuple(sorted(order[: max(alive, units)].tolist())))
    return PruningPlan(space, tuple(kept))


def _units(space: ChannelSpace, module: str, side: Any) -> Tensor:
    index = space.unit_index(module, side)
    assert index is not None
    return torch.from_numpy(index)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().cpu()


def _zero_rows(module: nn.Module) -> Tensor:
    """Boolean (C_out,): output channels whose filter is all zero."""
    out_dim, _ = kinds.channel_dims(module)
    return _zero_channels(_weight(module), out_dim, 1 if out_dim == 0 else _conv_groups(module))


def _zero_columns(module: nn.Module) -> Tensor:
    """Boolean (C_in,): input channels that every filter ignores; a scatter ignores none."""
    if isinstance(module, Scatter):
        return torch.zeros(module.in_channels, dtype=torch.bool)
    _, in_dim = kinds.channel_dims(module)
    return _zero_channels(_weight(module), in_dim, 1 if in_dim == 0 else _conv_groups(module))


def _conv_groups(module: nn.Module) -> int:
    return int(getattr(module, "groups", 1))


def _zero_channels(weight: Tensor, dim: int, groups: int) -> Tensor:
    """Channels of `dim` that are zero; with conv groups, dim 1 counts within each group."""
    nonzero = (weight != 0).flatten(2) if weight.dim() > 2 else (weight != 0).unsqueeze(2)
    per_group = nonzero.any(2).view(groups, -1, weight.shape[1])  # (groups, dim 0 / groups, dim 1)
    any_weight = per_group.any(2) if dim == 0 else per_group.any(1)
    return ~any_weight.reshape(-1)


@torch.no_grad()
def _zero_reads(
    network: nn.Module, space: ChannelSpace, example_inputs: ExampleInputs
) -> dict[str, Tensor]:
    """Reader -> boolean (C_in,): channels that are zero all over its input, in every call."""
    found = dict(network.named_modules())
    reads: dict[str, Tensor] = {}
    handles = []
    for name, side in space.slots_of:
        if side == "in":

            def look(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                values = kinds.first_input(args, kwargs).detach().cpu()
                last = isinstance(module, nn.Linear)
                per_channel = values.movedim(-1 if last else 1, 0).flatten(1)
                zero = (per_channel == 0).all(1)
                reads[name] = zero & reads[name] if name in reads else zero

            handles.append(found[name].register_forward_pre_hook(look, with_kwargs=True))
    try:
        with left_as_found(network):
            network.eval()
            call_with(network, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    # A reader that never ran reads nothing that is known to be zero.
    return {
        name: reads.get(name, torch.zeros(kinds.in_channels_of(found[name]), dtype=torch.bool))
        for name, side in space.slots_of
        if side == "in"
    }


@torch.no_grad()
def cut_dead(unified: Unified, plan: PruningPlan, example_inputs: ExampleInputs) -> Unified:
    """The unified network without the plan's channels; its blocks are the blocks they were.

    Constant example inputs are replaced by noise, see `calling.informative`.

    Raises:
        SurgeryError: the smaller network would compute something else.
    """
    network = unified.network
    example_inputs = informative(network, example_inputs)
    smaller = resize(network, plan.space, plan)
    with left_as_found(network), left_as_found(smaller):
        expected = call_with(network.eval(), example_inputs)
        error = relative_error(call_with(smaller.eval(), example_inputs), expected)
    if not error <= 10 * TOLERANCE:
        raise SurgeryError(
            f"unification: without {len(plan.mask) - int(plan.mask.sum())} dead channels the "
            f"outputs differ by {error:.1e} relative; please report the network"
        )
    slices = resize_map(network, plan.space, plan).tensors
    state = network.state_dict()
    grids = {
        name: grid.cut(state[name].shape, slices[name]) if name in slices else grid
        for name, grid in unified.grids.items()
    }
    return dataclasses.replace(unified, network=smaller, grids=grids)
