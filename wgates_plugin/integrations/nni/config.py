"""Config lists that are right on residual networks: dependency ids and aligned norms, by tracing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from wgates_plugin import modules as kinds
from wgates_plugin.calling import ExampleInputs
from wgates_plugin.channels import ChannelGroup, ChannelSpace, Slot
from wgates_plugin.errors import ConfigError
from wgates_plugin.integrations.nni.choices import ConfigList
from wgates_plugin.integrations.nni.masks import maskable
from wgates_plugin.integrations.nni.readers import open_readers
from wgates_plugin.tracing import trace


def make_config(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    sparse_ratio: float | Mapping[str, float] | None = None,
    max_sparse_ratio: float | None = None,
    ignored_layers: Sequence[nn.Module | str] = (),
) -> ConfigList:
    """A config list over all channels that can be removed, for any NNI pruner and for `WGatesPruner`.

    Coupled layers share a `dependency_group_id`; BatchNorms and depthwise convolutions are aligned
    to the layer that makes their channels, so that the masks close what a removal takes away.
    Groups for which NNI has no such words (a norm over concatenated channels, grouped convolutions, a
    sigmoid that makes something of nothing) are left out with a warning; name their layers yourself
    to prune them with `WGatesPruner`, which masks them in its own way.

    Args:
        sparse_ratio: share of channels to remove: one number, or group name -> share (groups that
            are missing stay whole); None for `WGatesPruner` with a target.
        max_sparse_ratio: largest share of any layer.
        ignored_layers: modules or names whose output channels must stay.

    Raises:
        ConfigError: a ratio out of range, an unknown group. TraceError: see `wgates_plugin.trace`.
    """
    space = trace(model, example_inputs, ignored_layers=ignored_layers)
    ratios = _ratios(space, sparse_ratio)
    if max_sparse_ratio is not None and not 0 < max_sparse_ratio <= 1:
        raise ConfigError(
            "make_config", [f"max_sparse_ratio {max_sparse_ratio!r}: needs above 0 and up to 1"]
        )
    found = dict(model.named_modules())
    readers = open_readers(model, space, example_inputs, range(len(space.groups)))
    entries: ConfigList = []
    left_out: dict[str, str] = {}
    for index, group in enumerate(space.groups):
        if ratios is not None and group.name not in ratios:
            continue
        reason = _beyond_words(space, index, found, readers)
        if reason:
            left_out[group.name] = reason
            continue
        goal: dict[str, Any] = {} if ratios is None else {"sparse_ratio": ratios[group.name]}
        if max_sparse_ratio is not None:
            goal["max_sparse_ratio"] = float(max_sparse_ratio)
        entries += _group_entries(group, goal, found)
    if left_out:
        shown = "; ".join(f"`{name}`: {reason}" for name, reason in left_out.items())
        warnings.warn(f"make_config: groups left out: {shown}", stacklevel=2)
    return entries


def _ratios(
    space: ChannelSpace, sparse_ratio: float | Mapping[str, float] | None
) -> dict[str, float] | None:
    if sparse_ratio is None:
        return None
    given = (
        dict(sparse_ratio)
        if isinstance(sparse_ratio, Mapping)
        else dict.fromkeys(space.names, sparse_ratio)
    )
    problems = [
        f"`{name}` is no channel group; known: {', '.join(space.names)}"
        for name in given
        if name not in space.names
    ]
    problems += [
        f"sparse_ratio {ratio!r} of `{name}`: needs a number from 0 up to, but not including, 1"
        for name, ratio in given.items()
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1
    ]
    if problems:
        raise ConfigError("make_config", list(dict.fromkeys(problems)))
    return {name: float(ratio) for name, ratio in given.items()}


def _beyond_words(
    space: ChannelSpace,
    index: int,
    found: Mapping[str, nn.Module],
    readers: Sequence[str],
) -> str | None:
    """Why NNI's own words cannot mask this group rightly, or None."""
    group = space.groups[index]
    root = group.slots_as("producer")[0]
    if group.ties > 1:
        return "the conv groups that it passes must keep the same channels, NNI chooses for each"
    for slot in group.slots:
        module = found[slot.module]
        if slot.role == "consumer":
            if slot.module in readers:
                return f"`{slot.module}` would still see something of closed channels"
            continue
        if slot.role == "passenger" and not maskable(module):
            continue  # nothing was seen behind it, so it keeps a zero a zero
        if len(space.slots_of[slot.module, "out"]) > 1:
            return f"`{slot.module}` holds the channels of several groups"
        if not np.array_equal(slot.units, root.units):
            return f"`{slot.module}` has its channels in another order than `{root.module}`"
    return None


def _group_entries(
    group: ChannelGroup, goal: dict[str, Any], found: Mapping[str, nn.Module]
) -> ConfigList:
    producers = [slot.module for slot in group.slots_as("producer")]
    root = producers[0]
    shared: dict[str, Any] = {**goal}
    dims = {name: found[name].get_parameter("weight").dim() for name in producers}
    # NNI averages the metrics of one id, so that their shapes must be alike.
    alike = [name for name in producers if dims[name] == dims[root] and _first_dim(found[name])]
    if len(alike) > 1:
        shared["dependency_group_id"] = group.name
    followers = [name for name in producers if name not in alike]
    followers += [slot.module for slot in _masked_passengers(group, found)]
    entries: ConfigList = [
        {"op_names": alike or [root], "target_names": ["weight", "bias"], **shared}
    ]
    align = {"module_name": root, "target_name": "weight", "dims": [0]}
    if followers:
        settings = {key: {"align": dict(align)} for key in ("weight", "bias")}
        entries.append(
            {
                "op_names": followers,
                "target_names": ["weight", "bias"],
                "target_settings": settings,
            }
        )
    return entries


def _first_dim(module: nn.Module) -> bool:
    return not isinstance(module, kinds.TRANSPOSED)


def _masked_passengers(group: ChannelGroup, found: Mapping[str, nn.Module]) -> list[Slot]:
    return [
        slot
        for slot in group.slots_as("passenger")
        if maskable(found[slot.module]) and found[slot.module]._parameters.get("weight") is not None
    ]
