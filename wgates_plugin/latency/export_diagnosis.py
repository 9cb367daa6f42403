"""Where an exported model begins to compute something else than the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wgates_plugin.latency.base import require, split_inputs
from wgates_plugin.latency.layer_times import graph_owners

if TYPE_CHECKING:
    from wgates_plugin.calling import ExampleInputs

_TOLERANCE = 1e-3


def first_departure(
    model: bytes,
    network: nn.Module,
    example_inputs: ExampleInputs,
    run: Callable[[bytes], list[Tensor]],
) -> str:
    """The first layer with a weight whose output differs, in words; or that none does.

    Args:
        model: an ONNX export with state-dict names and nothing folded (`template=True`).
        run: executes a model on the example inputs and returns all its outputs, flattened.
    """
    onnx = require("onnx", extra="onnx", purpose="looking into an ONNX export")
    whole = onnx.load_from_string(model)
    nodes = _weighted_nodes(whole.graph)
    expected = _layer_outputs(network, example_inputs)
    wanted = [(layer, node) for layer, node in nodes if layer in expected]
    usual = len(whole.graph.output)
    for _, node in wanted:
        whole.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.output[0]))
    found = run(bytes(whole.SerializeToString()))[usual:]
    for (layer, node), mine in zip(wanted, found, strict=True):
        theirs = expected[layer]
        if mine.shape != theirs.shape:
            return f"first at `{layer}` (node `{node.name}`), whose output has another shape"
        scale = float(theirs.abs().max()) or 1.0
        distance = float((mine - theirs).abs().max()) / scale
        if not distance <= _TOLERANCE:
            return f"first at `{layer}` (node `{node.name}`), off by {distance:.1e}"
    return "every layer with a weight agrees, so it begins in an operation after the last of them"


def _weighted_nodes(graph: Any) -> list[tuple[str, Any]]:
    """(layer, node) of the nodes that hold a layer's weight, in order of execution."""
    owners = graph_owners(graph)
    found = []
    for node in graph.node:
        weight = node.input[1] if len(node.input) > 1 else ""
        if owners.get(node.name) == (weight.removesuffix(".weight"),):
            found.append((owners[node.name][0], node))
    return found


@torch.no_grad()
def _layer_outputs(network: nn.Module, example_inputs: ExampleInputs) -> dict[str, Tensor]:
    """Output of every module that is called once and returns a tensor, by name."""
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                # An in-place activation behind the layer would write into what it returned.
                outputs.setdefault(name, []).append(output.detach().clone().float())

        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in network.named_modules() if name]
    try:
        args, kwargs = split_inputs(example_inputs)
        network(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: seen[0] for name, seen in outputs.items() if len(seen) == 1}
