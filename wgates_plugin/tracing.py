"""Tracing: from a network to its ChannelSpace, checked in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from wgates_plugin import verification
from wgates_plugin.calling import ExampleInputs
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.dependencies import DependencyTrace


def trace(
    network: nn.Module,
    example_inputs: ExampleInputs,
    *,
    ignored_layers: Sequence[nn.Module | str] = (),
    min_channels: int = 1,
    min_fraction: float = 0.0,
    floors: Mapping[str, int] | None = None,
    caps: Mapping[str, int] | None = None,
    verify: bool = True,
) -> ChannelSpace:
    """Find the network's channel groups. The network is left as found.

    Args:
        network: any `nn.Module` whose output is one tensor.
        example_inputs: a tensor (N, ...), a tuple of arguments or a dict of keyword arguments, on
            the network's device.
        ignored_layers: modules or names whose output channels must stay; children included.
        min_channels: floor of every group, in channels.
        min_fraction: floor of every group as a fraction of its width; the larger floor counts.
        floors: group name -> its own floor. caps: group name -> largest width it may keep.
        verify: where the network holds operations that might move channels (views, transposes,
            products, ...) or cuts a layer off from gradients, compare a gated with a physically
            smaller network once, to catch what cannot be followed (channel shuffle, for example).

    Raises:
        TraceError: the network cannot be traced or has nothing to prune; the message says why.
    """
    graph = DependencyTrace(network, example_inputs)
    space = graph.space(
        ignored_layers=ignored_layers,
        min_channels=min_channels,
        min_fraction=min_fraction,
        floors=floors,
        caps=caps,
    )
    if verify:
        verification.verify(graph, space)
    return space
