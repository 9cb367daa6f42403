"""Sets of coupled channels, as torch-pruning's graph gives them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch_pruning as tp
from torch import nn
from torch_pruning import ops as tp_ops

from wgates_plugin import modules as kinds
from wgates_plugin.dependencies.forward_pass import ForwardPass
from wgates_plugin.errors import TraceError


def raw_groups(seen: ForwardPass) -> Iterator[Any]:
    """Every set of coupled channels, found from one of its layers.

    A layer that reads a concatenation holds the channels of several groups, which would be one if
    they were found from it; one that gives out a single channel may have it spread over many.
    Such layers wait for a second round, in which most have been met.

    Raises:
        TraceError: torch-pruning cannot follow the channels.
    """
    graph = seen.graph
    roots = [module for module in graph.module2node if isinstance(module, kinds.WEIGHTED)]
    met: set[Any] = set()
    try:
        for last_round in (False, True):
            for root in roots:
                channels = kinds.out_channels_of(root)
                waits = not last_round and (channels == 1 or kinds.is_depthwise(root))
                if root in met or waits:
                    continue
                raw = coupled_with(graph, root, range(channels))
                written = [
                    item for item in raw if graph.is_out_channel_pruning_fn(item.dep.handler)
                ]
                if not last_round and _holds_several(written, channels):
                    continue
                met.update(item.dep.target.module for item in written)
                yield raw
    except (IndexError, KeyError, AttributeError, RuntimeError, TypeError) as error:
        raise TraceError(
            f"network {type(seen.network).__name__}: torch-pruning cannot follow its channels "
            f"({type(error).__name__}: {error}); it holds a layer that is not supported, such "
            "as a recurrent one"
        ) from error


def coupled_with(graph: tp.DependencyGraph, root: nn.Module, channels: Iterable[int]) -> tp.Group:
    """What falls with these output channels of `root`: torch-pruning's group."""
    prune = graph.get_pruner_of_module(root).prune_out_channels
    return graph.get_pruning_group(root, prune, list(channels))


def root_of(raw: Any, seen: ForwardPass) -> tuple[str, np.ndarray]:
    """The group's first producer (in module order) that covers all its channels, and its numbers.

    torch-pruning numbers channels by the layer where it met the group first; the array (C,)
    turns these numbers into those of the producer returned.
    """
    graph = seen.graph
    current, channels = raw[0].dep.target.module, len(raw[0].idxs)
    wide_enough = [
        item
        for item in raw
        if isinstance(item.dep.target.module, kinds.WEIGHTED)
        and kinds.out_channels_of(item.dep.target.module) == channels
        and graph.is_out_channel_pruning_fn(item.dep.handler)
        and not kinds.is_depthwise(item.dep.target.module)
    ]
    wide_enough.sort(key=lambda item: seen.order[seen.names[item.dep.target.module]])
    numbers = np.arange(channels)
    for item in wide_enough:
        root = item.dep.target.module
        if root is current:
            break
        if len(set(item.root_idxs) - {None}) == channels:
            numbers[np.asarray(item.root_idxs)] = np.asarray(item.idxs)
            return seen.names[root], numbers
    return seen.names[current], numbers


def _holds_several(written: Sequence[Any], channels: int) -> bool:
    """Whether channels of narrower layers were concatenated to these. A narrower layer that reads one
    part of them (a split) is of the same group."""
    kinds_met = {item.dep.target.type for item in written}
    parted = {tp_ops.OPTYPE.SPLIT, tp_ops.OPTYPE.SLICE, tp_ops.OPTYPE.UNBIND}
    if tp_ops.OPTYPE.CONCAT not in kinds_met or kinds_met & parted:
        return False
    modules = [item.dep.target.module for item in written]
    return any(
        isinstance(module, kinds.WEIGHTED) and 1 < kinds.out_channels_of(module) < channels
        for module in modules
    )
