"""Where residual branches end: the last module before the sum of a branch and what goes past it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from wgates_plugin import modules as kinds
from wgates_plugin.calling import ExampleInputs
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.errors import TraceError
from wgates_plugin.transforms import Step

_SUMS = ("AddBackward0", "SubBackward0")


def scatter_steps(network: nn.Module, example_inputs: ExampleInputs) -> list[Step]:
    """The step that puts a `Scatter` behind each branch of the network; none without branches."""
    behind = branch_ends(DependencyTrace(network, example_inputs))
    return [{"transform": "scatter", "behind": behind}] if behind else []


def coupled_by_sums(traced: DependencyTrace) -> list[str]:
    """Groups, by name, whose channels several layers make because their outputs are added up.

    Layers that multiply each other, as in squeeze-and-excitation, are none: no scatter parts them.
    """
    try:
        space = traced.space()
    except TraceError:
        return []
    nodes, modules = traced.graph.module2node, {name: m for m, name in traced.names.items()}
    found = []
    for group in space.groups:
        makers = [modules[slot.module] for slot in group.slots_as("producer")]
        if len(makers) > 1 and any(_meets_a_sum(nodes[m]) for m in makers if m in nodes):
            found.append(group.name)
    return found


def _meets_a_sum(producer: Any) -> bool:
    """Does its output go into a sum or difference before another layer makes new channels of it?"""

    def onward(node: Any) -> Iterable[Any]:
        mixes = isinstance(node.module, kinds.READERS) and not kinds.is_depthwise(node.module)
        return () if mixes else node.outputs

    return any(_is_sum(node, _SUMS) for node in _walk(producer.outputs, onward))


def branch_ends(traced: DependencyTrace) -> dict[str, int]:
    """Name of the last module of each residual branch -> its output channels, in module order.

    A branch ends in a convolution, or in its norm, whose output goes into a sum and nowhere else,
    and which reads at least one convolution that the sum's other side does not depend on. So a
    projection of the stream itself, and a convolution that a stream starts with, are no branches:
    their outputs keep their width, as in the paper's code.
    """
    try:
        space = traced.space()
    except TraceError:  # nothing can be cut, hence nothing has to be scattered
        return {}
    coupled = {
        slot.module
        for group in space.groups
        if len(group.slots_as("producer")) > 1
        for slot in group.slots_as("producer")
    }
    found: dict[str, int] = {}
    for module, name in traced.names.items():
        if name not in coupled or module not in traced.graph.module2node:
            continue
        # The channels of a linear layer may lie in another dimension than the first.
        if isinstance(module, nn.Linear):
            continue
        end = _end_of_branch(traced.graph.module2node[module])
        if end is not None:
            found[traced.names[end]] = kinds.out_channels_of(module)
    return found


def _end_of_branch(producer: Any) -> nn.Module | None:
    """The module whose output the sum takes, if `producer` ends a branch."""
    last = producer
    while len(last.outputs) == 1:
        following = last.outputs[0]
        if not isinstance(following.module, (*kinds.BATCH_NORMS, *kinds.INSTANCE_NORMS)):
            break
        last = following
    if len(last.outputs) != 1 or not _is_sum(last.outputs[0]):
        return None
    total = last.outputs[0]
    beside: set[Any] = set()
    for other in total.inputs:
        if other is not last:
            beside.add(other)
            beside.update(_walk(other.inputs, lambda node: node.inputs))
    sources = [node for node in _sources(producer) if node not in beside]
    module: nn.Module = last.module
    return module if beside and sources and producer not in beside else None


def _is_sum(node: Any, names: tuple[str, ...] = _SUMS[:1]) -> bool:
    function: Any = getattr(node, "grad_fn", None)
    return bool(hasattr(function, "name")) and function.name() in names


def _sources(producer: Any) -> Iterator[Any]:
    """Producers whose channels `producer` reads, through whatever lies between."""

    def makes_channels(node: Any) -> bool:
        return isinstance(node.module, kinds.WEIGHTED) and not kinds.is_depthwise(node.module)

    between = _walk(producer.inputs, lambda node: () if makes_channels(node) else node.inputs)
    return filter(makes_channels, between)


def _walk(first: Iterable[Any], onward: Callable[[Any], Iterable[Any]]) -> Iterator[Any]:
    """`first`, and all nodes that `onward` leads to from there; each once."""
    seen: set[Any] = set()
    waiting = list(first)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting.extend(onward(node))
