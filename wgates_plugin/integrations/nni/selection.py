"""From the layers a config names to the channel groups that may shrink, and how far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelGroup, ChannelSpace
from wgates_plugin.efficiency.base import Limit
from wgates_plugin.integrations.nni.choices import GroupId, LayerChoice

PASSING = ("norm", "depthwise", "other")
"""Kinds of layers that make no channels of their own."""


class KeptWeights:
    """Weights that stay in the layers of one `global_group_id`: widths (..., G) -> (...)."""

    unit = "weights"

    def __init__(self, space: ChannelSpace, group_id: GroupId, weights: Mapping[str, int]) -> None:
        self.name = f"kept weights of global_group_id {group_id!r}"
        self.fingerprint = space.fingerprint
        self.slope = torch.zeros(len(space.groups), dtype=torch.float64)
        self.fixed = 0.0
        for layer, count in weights.items():
            touching = space.slots_of.get((layer, "out"), [])
            for index, slot in touching:
                share = float((slot.units >= 0).sum()) / slot.units.size
                self.slope[index] += count * share / space.groups[index].channels
            owned = sum(float((slot.units >= 0).sum()) / slot.units.size for _, slot in touching)
            self.fixed += count * (1.0 - owned)

    def __call__(self, widths: Tensor) -> Tensor:
        return widths.double() @ self.slope + self.fixed


@dataclass
class Selection:
    """Which groups may shrink.

    Attributes:
        chosen: their numbers in the channel space.
        floors, caps: group name -> least and largest width, for every group.
        left_out: layer the config names -> why its channels all stay.
        limits: what `global_group_id`s ask for.
        problems: what cannot be met.
    """

    chosen: set[int] = field(default_factory=set)
    floors: dict[str, int] = field(default_factory=dict)
    caps: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    limits: list[Limit] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def select_groups(
    space: ChannelSpace, choices: Mapping[str, LayerChoice], *, by_ratio: bool
) -> Selection:
    """Groups whose layers the config names, with the bounds it sets on their widths.

    A group is chosen when the config names all its convolutions and linear layers, or all its
    BatchNorms (the form of `SlimPruner`'s configs). Depthwise convolutions follow the layer that
    makes their channels, named or not. Every other group keeps its full width.
    """
    result = Selection()
    for index, group in enumerate(space.groups):
        result.floors[group.name] = result.caps[group.name] = group.channels
        reason = _why_not(space, group, choices)
        if reason is None:
            result.chosen.add(index)
            _bound(result, group, choices, by_ratio=by_ratio)
        elif reason:
            named = [slot.module for slot in group.slots if slot.side == "out"]
            result.left_out |= {name: reason for name in named if _chooses(choices, name)}
    inside = {slot.module for group in space.groups for slot in group.slots if slot.side == "out"}
    for name, choice in choices.items():
        if name not in inside and not choice.follows:
            result.left_out[name] = space.excluded.get(name, "its channels cannot be removed")
    result.problems += _apart(space, choices)
    _share(result, space, choices)
    return result


def _chooses(choices: Mapping[str, LayerChoice], name: str) -> bool:
    return name in choices and not choices[name].follows


def _members(space: ChannelSpace, group: ChannelGroup) -> tuple[list[str], list[str]]:
    """(convolutions and linear layers that make the group's channels, norms that pass them on)."""
    kinds = {layer.name: layer.kind for layer in space.layers}  # without norms that have no weights
    outs = list(dict.fromkeys(slot.module for slot in group.slots if slot.side == "out"))
    norms = [name for name in outs if kinds.get(name) == "norm"]
    weighted = [name for name in outs if kinds.get(name, "other") not in PASSING]
    return weighted, norms


def _why_not(
    space: ChannelSpace, group: ChannelGroup, choices: Mapping[str, LayerChoice]
) -> str | None:
    """None for a chosen group, "" for one the config does not name, else the reason."""
    weighted, norms = _members(space, group)
    if norms and all(_chooses(choices, name) for name in norms):
        return None
    if not any(_chooses(choices, slot.module) for slot in group.slots if slot.side == "out"):
        return ""
    missing = [name for name in weighted if name not in choices]
    if not missing:
        return None
    shown = ", ".join(f"`{name}`" for name in missing[:3]) + " ..." * (len(missing) > 3)
    return f"it shares its channels with {shown}, which the config does not name"


def _bound(
    result: Selection, group: ChannelGroup, choices: Mapping[str, LayerChoice], *, by_ratio: bool
) -> None:
    mine = {
        slot.module: choices[slot.module]
        for slot in group.slots
        if slot.side == "out" and _chooses(choices, slot.module)
    }
    ratios = {choice.clamped: name for name, choice in mine.items() if choice.ratio is not None}
    if len(ratios) > 1:
        pairs = ", ".join(f"{ratio:g} for `{name}`" for ratio, name in ratios.items())
        result.problems.append(
            f"contradictory sparse_ratio in one dependency group: {pairs}; these layers share their "
            "channels, give them one ratio"
        )
        return
    least = max(choice.least for choice in mine.values())
    most = min(choice.most for choice in mine.values())
    ratio = next(iter(ratios), None)
    if by_ratio and ratio is None:
        result.problems.append(
            f"`{next(iter(mine))}`: no sparse_ratio, and no target for the whole network; give one"
        )
        return
    if by_ratio and ratio is not None and any(choice.exact for choice in mine.values()):
        least = most = ratio
    # As NNI counts: so many whole channels of each conv group go, rounded down.
    low, high = (group.units - int(group.units * share) for share in (most, least))
    floor = max(group.floor, low * group.ties)
    if high * group.ties < floor:
        result.problems.append(
            f"`{next(iter(mine))}`: ratios from {least:g} to {most:g} leave no width between "
            f"{floor} and {high * group.ties} of {group.channels} channels; widen them, or lower "
            "min_channels"
        )
        return
    result.floors[group.name] = floor
    result.caps[group.name] = high * group.ties


def _apart(space: ChannelSpace, choices: Mapping[str, LayerChoice]) -> Iterator[str]:
    """One problem for each `dependency_group_id` over layers whose widths nothing holds together.

    Where each layer has its own exact ratio, that does.
    """
    apart: dict[GroupId, dict[frozenset[int], str]] = {}
    for name, choice in choices.items():
        if choice.dependency is not None and not choice.follows and not choice.exact:
            groups = frozenset(index for index, _ in space.slots_of.get((name, "out"), []))
            if groups:  # what stays whole is told of elsewhere
                apart.setdefault(choice.dependency, {}).setdefault(groups, name)
    for group_id, layers in apart.items():
        if len(layers) > 1:
            shown = ", ".join(f"`{name}`" for name in layers.values())
            yield (
                f"dependency_group_id {group_id!r}: {shown} do not have all of their channels in "
                "common, so that each finds a width of its own; leave the id out (coupled layers are "
                "found by tracing), or give the layers a sparse_ratio"
            )


def _share(result: Selection, space: ChannelSpace, choices: Mapping[str, LayerChoice]) -> None:
    """One limit per `global_group_id`: the ratio holds for its layers together."""
    sizes = {  # entries of what NNI masks; of a BatchNorm one per channel
        layer.name: layer.out_channels * ((layer.in_channels // layer.groups) * layer.kernel or 1)
        for layer in space.layers
    }
    members: dict[GroupId, dict[str, LayerChoice]] = {}
    for name, choice in choices.items():
        if choice.shared is not None and choice.ratio is not None:
            members.setdefault(choice.shared, {})[name] = choice
    for group_id, layers in members.items():
        weights = {name: sizes.get(name, 0) for name in layers}
        ratio = next(iter(layers.values())).ratio
        assert ratio is not None
        total = sum(weights.values())
        if total:
            model = KeptWeights(space, group_id, weights)
            result.limits.append(Limit(model, (1.0 - ratio) * total))
