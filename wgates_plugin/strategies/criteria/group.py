"""Groups of a channel space as torch-pruning's importances take them, made from records alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch_pruning as tp
from torch import nn
from torch_pruning.dependency.dependency import Dependency
from torch_pruning.dependency.group import Group
from torch_pruning.dependency.node import Node
from torch_pruning.pruner.function import PrunerBox

from wgates_plugin.channels import ChannelSpace, Slot
from wgates_plugin.errors import PlanError
from wgates_plugin.transforms.scatter import Scatter, ScatterPruner


def tp_group(network: nn.Module, space: ChannelSpace, index: int) -> Group:
    """Group `index` of the space as a torch-pruning group over all of its channels."""
    record = space.groups[index]
    found = dict(network.named_modules())
    root = Node(found[record.name], None, record.name)
    group = Group()
    # The root comes first, as in torch-pruning: reductions like "first" count on it.
    for slot in sorted(record.slots, key=lambda s: (s.module, s.side) != (record.name, "out")):
        module = found.get(slot.module)
        if module is None:
            raise PlanError(f"module `{slot.module}`: not in the network; trace this network first")
        pruner = _pruner_of(module)
        handler = pruner.prune_out_channels if slot.side == "out" else pruner.prune_in_channels
        trigger = _pruner_of(found[record.name]).prune_out_channels
        dependency = Dependency(trigger, handler, root, Node(module, None, slot.module))
        indices, roots = _indices(slot, record.units, record.ties)
        group.add_dep(dependency, indices)
        group[len(group.items) - 1].root_idxs = roots
    return group


def _pruner_of(module: nn.Module) -> Any:
    """How torch-pruning cuts this module; no importance counts anything of a `Scatter`."""
    if isinstance(module, Scatter):
        return ScatterPruner()
    return PrunerBox[tp.ops.module2type(module)]


def _indices(slot: Slot, units: int, ties: int) -> tuple[list[int], list[int]]:
    """(channels of the slot, root channel of each): runs of one unit are dealt out to its ties."""
    indices = np.flatnonzero(slot.units >= 0)
    owners = slot.units[indices]
    order = np.argsort(owners, kind="stable")
    per_unit = len(owners) // units
    turn = np.empty(len(owners), dtype=np.int64)
    turn[order] = np.tile(np.arange(per_unit), units)
    roots = owners + units * (turn // max(1, per_unit // ties))
    return indices.tolist(), roots.tolist()
