"""Which operations are known to leave channels where they are.

A network made of these alone needs no numerical check of its trace; any other one gets it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch_pruning import ops as tp_ops

from wgates_plugin import modules as kinds

_ELEMENTWISE = {
    "ReluBackward0",
    "HardtanhBackward0",
    "LeakyReluBackward0",
    "EluBackward0",
    "SiluBackward0",
    "GeluBackward0",
    "TanhBackward0",
    "SigmoidBackward0",
    "HardswishBackward0",
    "HardsigmoidBackward0",
    "MaxPool2DWithIndicesBackward0",
    "AvgPool2DBackward0",
    "AdaptiveAvgPool2DBackward0",
}


class FixedViews(TorchFunctionMode):
    """Notes whether a view names its last size, as `x.view(-1, 400)` does: that number may count
    channels, which the graph does not tell."""

    seen = False

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _VIEWS:
            shape = [*args[1:], *(kwargs or {}).values()]
            while shape and isinstance(shape[-1], (tuple, list)):
                shape = list(shape[-1])
            self.seen = self.seen or bool(shape and isinstance(shape[-1], int) and shape[-1] != -1)
        return func(*args, **(kwargs or {}))


_VIEWS = (Tensor.view, Tensor.reshape, torch.reshape)


def is_certain(graph: tp.DependencyGraph) -> bool:
    """True when every operation of the traced graph is known to keep channels in place."""
    nodes = graph.module2node.values()
    # One channel broadcast over many looks like any other sum in the graph.
    broadcasts = any(
        isinstance(node.module, kinds.WEIGHTED) and kinds.out_channels_of(node.module) == 1
        for node in nodes
    )
    return not broadcasts and all(_keeps_order(node) for node in nodes)


def _keeps_order(node: Any) -> bool:
    if isinstance(node.module, (*kinds.READERS, *kinds.BATCH_NORMS, nn.PReLU)):
        return True
    name = node.grad_fn.name() if hasattr(node.grad_fn, "name") else ""
    if node.type == tp_ops.OPTYPE.OUTPUT:
        return True
    if node.type == tp_ops.OPTYPE.RESHAPE:
        return _is_flatten_into_linear(node)
    if name == "TBackward0":  # the transposed weight of a linear layer
        return not node.inputs
    if name == "AddBackward0":  # an input or a buffer on the other side keeps its channels
        return all(before is not None for before, _ in node.grad_fn.next_functions)
    if name == "MeanBackward1":
        return _is_spatial_mean(node.grad_fn)
    return name in _ELEMENTWISE


def _is_flatten_into_linear(node: Any) -> bool:
    sizes = getattr(node.grad_fn, "_saved_self_sym_sizes", ())
    readers = [reader.module for reader in node.outputs]
    return bool(readers) and all(
        isinstance(reader, nn.Linear) and reader.in_features == math.prod(sizes[1:])
        for reader in readers
    )


def _is_spatial_mean(grad_fn: Any) -> bool:
    rank = len(getattr(grad_fn, "_saved_self_sym_sizes", ()))
    dims = {dim if dim < rank else dim - 2**64 + rank for dim in getattr(grad_fn, "_saved_dim", ())}
    return rank == 4 and dims == {2, 3}
