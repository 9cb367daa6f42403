"""Surgery: the one place that makes a network physically smaller.

`remove` cuts decided channels through torch-pruning. `resize` builds a copy of given shapes from the
records of a ChannelSpace alone, without tracing: for latency samples, where values do not matter, and
to rebuild a pruned network from its plan and a state dict.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from wgates_plugin import modules as kinds
from wgates_plugin.calling import ExampleInputs, copied
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.dependencies.raw_groups import coupled_with
from wgates_plugin.errors import PlanError, SurgeryError
from wgates_plugin.files import load_tensors
from wgates_plugin.plan import PruningPlan
from wgates_plugin.transforms import apply_steps


def remove(
    network: nn.Module,
    plan: PruningPlan,
    example_inputs: ExampleInputs | None = None,
    *,
    traced: DependencyTrace | None = None,
) -> nn.Module:
    """Cut the channels that `plan` does not keep, in place, and return the network.

    Either `example_inputs` (the graph is traced now) or `traced` (a graph of this very network) is
    needed. Floating point weights are selected, never changed.

    Raises:
        SurgeryError: torch-pruning refuses a group, or the network changed since it was traced.
    """
    for group in removals(network, plan, example_inputs, traced=traced):
        group.prune()
    return network


def removals(
    network: nn.Module,
    plan: PruningPlan,
    example_inputs: ExampleInputs | None = None,
    *,
    traced: DependencyTrace | None = None,
) -> Iterator[Any]:
    """Yield torch-pruning groups one by one; prune each before asking for the next.

    Each group is built only when it is asked for, from the graph as the earlier removals left it:
    groups fetched ahead would carry indices of channels that have moved since.
    """
    if traced is None:
        if example_inputs is None:
            raise SurgeryError("remove: give `example_inputs`, or `traced` from an earlier trace")
        traced = DependencyTrace(network, example_inputs)
    check_shapes(network, plan.space)
    graph: tp.DependencyGraph = traced.graph
    found = dict(network.named_modules())
    for index, group in enumerate(plan.space.groups):
        gone = plan.removed_channels(index)
        if not gone:
            continue
        root = found[group.name]
        removal = coupled_with(graph, root, gone)
        if not graph.check_pruning_group(removal):
            raise SurgeryError(
                f"group `{group.name}`: torch-pruning refuses to remove {len(gone)} of "
                f"{group.channels} channels because a coupled layer would be left empty; "
                "raise the group's floor"
            )
        with _parameters_kept([item.dep.target.module for item in removal]):
            yield removal
        if kinds.out_channels_of(root) != group.channels - len(gone):
            raise SurgeryError(
                f"group `{group.name}`: was not pruned before the next one was asked for; call "
                "`prune()` on each group as it comes, groups fetched ahead are out of date"
            )


@contextmanager
def _parameters_kept(members: Sequence[Any]) -> Iterator[None]:
    """Keep `requires_grad` and memory order of the members' parameters: torch-pruning makes new ones
    that all train, in plain order."""
    before = [
        (module, name, parameter.requires_grad, _channels_last(parameter))
        for module in members
        if isinstance(module, nn.Module)
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    try:
        yield
    finally:
        for module, name, flag, order in before:
            parameter = module.get_parameter(name)
            parameter.data = _ordered(parameter.data, order)
            parameter.requires_grad_(flag)


def _channels_last(tensor: Tensor) -> torch.memory_format | None:
    """The channels-last order that a tensor is in; None where it is in plain order (too)."""
    order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if order is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=order):
        return None
    return order


def _ordered(tensor: Tensor, order: torch.memory_format | None) -> Tensor:
    return tensor if order is None else tensor.contiguous(memory_format=order)


def check_shapes(network: nn.Module, space: ChannelSpace) -> None:
    """Refuse a network that does not have the layers and channels of `space`.

    Raises:
        PlanError: names the layers that differ.
    """
    found = dict(network.named_modules())
    problems = []
    for (name, side), touching in space.slots_of.items():
        module = found.get(name)
        expected = touching[0][1].units.size
        if module is None:
            problems.append(f"`{name}` is missing")
        elif (actual := kinds.channels_at(module, side)) != expected:
            problems.append(
                f"`{name}` has {actual or 'no'} {side}put channels, the plan expects {expected}"
            )
    if problems:
        raise PlanError(
            "network: changed since it was traced, or another one: "
            + "; ".join(problems[:5])
            + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            + "; trace it again and make a new plan"
        )


@dataclass(frozen=True)
class ResizeMap:
    """What a change of widths does to a state dict and to module attributes.

    Attributes:
        tensors: state-dict name -> {dimension: kept indices (int64)}.
        attributes: module name -> {attribute: new value}, such as `{"groups": 12}`.
    """

    tensors: Mapping[str, Mapping[int, np.ndarray]]
    attributes: Mapping[str, Mapping[str, int]]


def resize_map(
    network: nn.Module, space: ChannelSpace, widths: PruningPlan | Sequence[int]
) -> ResizeMap:
    """The slices that bring `network` to `widths` (G,) or to the channels of a plan."""
    plan = widths if isinstance(widths, PruningPlan) else PruningPlan.leading(space, widths)
    mask = np.append(plan.mask.numpy(), True)
    kept: dict[tuple[str, str], np.ndarray] = {}
    for place in space.slots_of:
        index = space.unit_index(*place)
        if index is not None and not mask[index].all():
            kept[place] = np.flatnonzero(mask[index])
    found = dict(network.named_modules())
    tensors: dict[str, dict[int, np.ndarray]] = {}
    attributes: dict[str, dict[str, int]] = {}
    for (name, side), indices in kept.items():
        module = found.get(name)
        if module is None:
            raise PlanError(f"module `{name}`: not in the network; the plan is for another one")
        _resize_module(name, module, side, indices, tensors, attributes)
    return ResizeMap(tensors, attributes)


def _resize_module(
    name: str,
    module: nn.Module,
    side: str,
    indices: np.ndarray,
    tensors: dict[str, dict[int, np.ndarray]],
    attributes: dict[str, dict[str, int]],
) -> None:
    changed = attributes.setdefault(name, {})
    count = int(indices.size)
    if isinstance(module, kinds.Scatter):
        tensors[f"{name}.index"] = {0: indices}
    elif kinds.is_depthwise(module):
        tensors[f"{name}.weight"] = {0: indices}
        changed.update(in_channels=count, out_channels=count, groups=count)
    elif isinstance(module, kinds.WEIGHTED):
        out_dim, in_dim = kinds.channel_dims(module)
        suffix = "features" if isinstance(module, nn.Linear) else "channels"
        changed[f"{side}_{suffix}"] = count
        if side == "in":
            # Ties keep the same channels in every conv group, so the first one speaks for all.
            groups = int(getattr(module, "groups", 1))
            per_group = kinds.in_channels_of(module) // groups
            tensors.setdefault(f"{name}.weight", {})[in_dim] = indices[indices < per_group]
            return
        tensors.setdefault(f"{name}.weight", {})[out_dim] = indices
    elif isinstance(module, nn.PReLU):
        tensors[f"{name}.weight"] = {0: indices}
        changed["num_parameters"] = count
        return
    else:
        changed["num_features"] = count
        for tensor in ("weight", "running_mean", "running_var"):
            if getattr(module, tensor, None) is not None:
                tensors[f"{name}.{tensor}"] = {0: indices}
    if getattr(module, "bias", None) is not None:
        tensors[f"{name}.bias"] = {0: indices}


def resize(
    network: nn.Module, space: ChannelSpace, widths: PruningPlan | Sequence[int]
) -> nn.Module:
    """A copy of `network` at `widths` (G,) or at the channels of a plan; the original is untouched.

    Sliced tensors are put into `deepcopy`'s memo, so that full-size weights are never copied.
    """
    change = resize_map(network, space, widths)
    memo: dict[int, Any] = {}
    originals = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for name, slices in change.tensors.items():
        original = originals[name]
        with torch.no_grad():
            value: Tensor = original.detach()
            for dim, indices in slices.items():
                value = value.index_select(dim, torch.from_numpy(indices).to(value.device))
            value = _ordered(value, _channels_last(original))
        if isinstance(original, nn.Parameter):
            memo[id(original)] = nn.Parameter(value, requires_grad=original.requires_grad)
        else:
            memo[id(original)] = value
    smaller = copied(network, memo)
    found = dict(smaller.named_modules())
    for name, values in change.attributes.items():
        for attribute, number in values.items():
            setattr(found[name], attribute, number)
    return smaller


def rebuild(
    network: nn.Module,
    plan: PruningPlan | str | Path,
    state: Mapping[str, Tensor] | str | Path,
) -> nn.Module:
    """A pruned network from the original class, a plan and a plain state dict; nothing is unpickled.

    Args:
        network: a fresh, unpruned instance of the original class; left untouched.
        plan: a `PruningPlan` or the path of its JSON.
        state: the pruned network's state dict or the path of its safetensors.

    Returns:
        The pruned network in eval mode.

    Raises:
        PlanError: network, plan and state do not belong together.
    """
    if not isinstance(plan, PruningPlan):
        plan = PruningPlan.load(plan)
    if not isinstance(state, Mapping):
        state = load_tensors(state, kind="weights")
    if before := plan.note.get("before"):
        network = apply_steps(copied(network), before)
    check_shapes(network, plan.space)
    smaller = resize(network, plan.space, plan)
    smaller = apply_steps(smaller, plan.note.get("after", ()))
    fitting = smaller.state_dict()
    try:
        if set(fitting) != set(state):
            missing = sorted(set(fitting) ^ set(state))
            raise RuntimeError(f"names differ: {', '.join(missing[:5])}")
        # Updating the network's own dict keeps its version metadata, which safetensors cannot hold.
        fitting.update(state)
        smaller.load_state_dict(fitting)
    except RuntimeError as error:
        raise PlanError(f"state dict: does not fit the planned network; {error}") from error
    return smaller.eval()
