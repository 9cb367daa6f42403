"""Physical removal of the channels that masks close, through torch-pruning, exact."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wgates_plugin import surgery
from wgates_plugin.calling import ExampleInputs, call_with, left_as_found
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.errors import ConfigError, SurgeryError
from wgates_plugin.integrations.nni.given_masks import GivenMasks, check_masks, read_masks
from wgates_plugin.integrations.nni.masks import (
    AnyMasks,
    closed_units,
    masked,
    out_dim,
    seen_when_closed,
)
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
    all layers that make it are zero; whatever else is masked (single weights, a channel that only
    one of two coupled layers gave up) is kept as zeros.

    Args:
        masks: {layer: {"weight": tensor, ...}}, 1 = kept, shaped as the parameters, or the path of a
            file that `torch.save` wrote of it.
        align: when channels that masks close come to life again behind them (a BatchNorm turns zero
            into its shift), remove them all the same. The function then changes by these shifts.

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
            alive = alive & _read_channels(module, mask)
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
        followers = [
            slot.module
            for slot in space.group(group_name).slots_as("passenger")
            if slot.module not in masks
        ]
        lines.append(
            f"`{group_name}`: read by {', '.join(f'`{name}`' for name in readers)}"
            + (f", not masked: {', '.join(f'`{name}`' for name in followers)}" if followers else "")
        )
    shown = "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")
    raise SurgeryError(
        f"masks: closed channels come to life again before they are read, in {len(lines)} group"
        f"{'s' * (len(lines) > 1)} "
        f"({shown}), so the network without them would compute something else; mask the norms too "
        "(`make_config` aligns them), or remove all the same with align=True"
    )


def _read_channels(module: nn.Module, mask: Tensor) -> Tensor:
    """Input channels (C_in,) that a weight mask lets through."""
    out = out_dim(module)
    groups = int(getattr(module, "groups", 1))
    if groups == 1:
        others = [d for d in range(mask.dim()) if d != 1 - out]
        return (mask != 0).sum(others).cpu() > 0
    # (C_out, C_in/groups, ...) -> (groups, C_out/groups, C_in/groups, ...)
    split = (mask != 0).view(groups, mask.shape[0] // groups, *mask.shape[1:])
    return split.sum([1, *range(3, split.dim())]).flatten().cpu() > 0


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
