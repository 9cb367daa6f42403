"""Physical removal of the channels that masks close, through torch-pruning, exact."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from wgates_plugin import surgery
from wgates_plugin.calling import ExampleInputs, call_with, left_as_found
from wgates_plugin.channels import ChannelGroup, ChannelSpace
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.errors import ConfigError, SurgeryError
from wgates_plugin.integrations.nni.given_masks import GivenMasks, check_masks, read_masks
from wgates_plugin.integrations.nni.masks import (
    AnyMasks,
    by_input,
    closed_channels,
    closed_units,
    masked,
)
from wgates_plugin.integrations.nni.readers import cut_off_units, seen_when_closed
from wgates_plugin.plan import PruningPlan
from wgates_plugin.verification import TOLERANCE, relative_error, verify


def remove(
    model: nn.Module,
    masks: GivenMasks,
    example_inputs: ExampleInputs,
    *,
    align: bool = False,
) -> nn.Module:
    """Remove the channels that masks close, in place; the result computes what the masked network did.

    Works with the masks of any NNI pruner, after `unwrap_model()`. A channel goes when the masks of
    all layers that make it are zero, or those of a norm that all its readers sit behind (SlimPruner's);
    whatever else is masked (single weights, a channel that only one of two coupled layers gave up) is
    kept as zeros. Whole channels that are kept so are warned of.

    Args:
        masks: {layer: {"weight": tensor, ...}}, 1 = kept, shaped as the parameters, or the path of a
            file that `torch.save` wrote of it.
        align: when channels that masks close come to life again behind them (a BatchNorm turns zero
            into its shift, a bias was not masked), remove them all the same. The function then changes
            by these shifts.

    Raises:
        FileFormatError: the file cannot be read as plain tensors.
        ConfigError: the masks do not fit the network, or would empty a layer; all problems at once.
        SurgeryError: closed channels come to life again, and `align` is False.
        TraceError: the network cannot be traced.
    """
    masks = check_masks(model, read_masks(masks))
    traced = DependencyTrace(model, example_inputs)
    space = traced.space()
    verify(traced, space)
    plan = plan_from_masks(model, space, masks, example_inputs, align=align)
    expected = None if align else masked_output(model, masks, example_inputs)
    found = dict(model.named_modules())
    for name, targets in masks.items():
        for key, mask in targets.items():
            parameter = found[name]._parameters.get(key)
            if mask is not None and parameter is not None:
                parameter.data.mul_(mask.to(parameter))
    surgery.remove(model, plan, traced=traced)
    if expected is not None:
        compare(model, expected, example_inputs, "removal")
    return model


def plan_from_masks(
    model: nn.Module,
    space: ChannelSpace,
    masks: AnyMasks,
    example_inputs: ExampleInputs,
    *,
    align: bool = False,
) -> PruningPlan:
    """The plan that masks stand for; the model is unwrapped and left as found.

    Raises:
        ConfigError: a layer would be empty. SurgeryError: see `remove`.
    """
    closed = closed_units(model, space, masks)
    closed |= cut_off_units(model, space, example_inputs, masks)
    problems = [
        f"group `{group.name}`: masks close all {group.channels} channels of "
        + ", ".join(f"`{slot.module}`" for slot in group.slots_as("producer"))
        + "; keep at least one"
        for index, group in enumerate(space.groups)
        if bool(closed[space.unit_slice(index)].all())
    ]
    if problems:
        raise ConfigError("masks", problems)
    flags = torch.cat([~closed, torch.ones(1, dtype=torch.bool)])
    if not align:
        _refuse_revived(model, space, masks, example_inputs, flags)
    _warn_of_zeros(model, space, masks, flags)
    return PruningPlan.from_masks(space, flags[:-1], strategy="nni-masks")


def _refuse_revived(
    model: nn.Module,
    space: ChannelSpace,
    masks: AnyMasks,
    example_inputs: ExampleInputs,
    flags: Tensor,
) -> None:
    """Refuse masks behind which a closed channel is not zero where it is read."""
    seen = seen_when_closed(model, space, example_inputs, flags, masks)
    guilty: dict[str, list[str]] = {}
    for name, alive in seen.items():
        module = model.get_submodule(name)
        mask = masks.get(name, {}).get("weight")
        if mask is not None:
            alive = alive & (by_input(module, (mask != 0).float()).cpu() > 0)
        index = space.unit_index(name, "in")
        assert index is not None
        for unit in torch.from_numpy(index)[alive].unique().tolist():
            group = next(g for g in range(len(space.groups)) if unit < space.offsets[g + 1])
            readers = guilty.setdefault(space.groups[group].name, [])
            if name not in readers:
                readers.append(name)
    if not guilty:
        return
    lines = []
    for group_name, readers in guilty.items():
        followers = _not_masked(model, space.group(group_name), masks)
        lines.append(
            f"`{group_name}`: read by {', '.join(f'`{name}`' for name in readers)}"
            + (f", not masked: {', '.join(followers)}" if followers else "")
        )
    shown = "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")
    raise SurgeryError(
        f"masks: closed channels come to life again before they are read, in {len(lines)} group"
        f"{'s' * (len(lines) > 1)} "
        f"({shown}), so the network without them would compute something else; mask norms and "
        "biases too (`make_config` aligns them), or remove all the same with align=True"
    )


def _not_masked(model: nn.Module, group: ChannelGroup, masks: AnyMasks) -> list[str]:
    """Norms of the group without a mask, and biases that are open where the weights are closed."""
    names = []
    for slot in (*group.slots_as("producer"), *group.slots_as("passenger")):
        module, targets = model.get_submodule(slot.module), masks.get(slot.module)
        if targets is None and slot.role == "passenger":
            names.append(f"`{slot.module}`")
        elif targets is not None and module._parameters.get("bias") is not None:
            bias = targets.get("bias")
            closed = closed_channels(module, targets)
            if (closed if bias is None else closed & (bias != 0).cpu()).any():
                names.append(f"the bias of `{slot.module}`")
    return list(dict.fromkeys(names))


def _warn_of_zeros(model: nn.Module, space: ChannelSpace, masks: AnyMasks, flags: Tensor) -> None:
    """Name the layers whose masks close channels that stay nonetheless."""
    staying = {}
    for name, targets in masks.items():
        closed = closed_channels(model.get_submodule(name), targets)
        index = space.unit_index(name, "out")
        if index is not None:
            closed = closed & flags[torch.from_numpy(index)]
        if closed.any():
            staying[name] = int(closed.sum())
    if staying:
        shown = ", ".join(f"{count} of `{name}`" for name, count in list(staying.items())[:5])
        more = f" and of {len(staying) - 5} more layers" if len(staying) > 5 else ""
        warnings.warn(
            f"masks: channels that are masked stay in the network, as zeros: {shown}{more}; a coupled "
            "layer keeps them, or they cannot be removed (`make_config` masks coupled layers alike)",
            stacklevel=4,
        )


@torch.no_grad()
def masked_output(model: nn.Module, masks: AnyMasks, example_inputs: ExampleInputs) -> Tensor:
    """What the network computes under the masks, in eval mode."""
    with left_as_found(model), masked(model, masks):
        model.eval()
        output: Tensor = call_with(model, example_inputs)
    return output


@torch.no_grad()
def compare(model: nn.Module, expected: Tensor, example_inputs: ExampleInputs, what: str) -> None:
    """Hold the smaller network to what the masked one computed.

    Raises:
        SurgeryError: it computes something else.
    """
    with left_as_found(model):
        model.eval()
        found = call_with(model, example_inputs)
    error = relative_error(found, expected) if found.shape == expected.shape else float("inf")
    if not error <= 100 * TOLERANCE:
        raise SurgeryError(
            f"{what}: the smaller network computes something else than the masked one (relative "
            f"difference {error:.2g}); use a fresh copy of the network"
            + (" and `remove`" if what == "ModelSpeedup" else "")
        )
