"""Which layer spends the time: a runtime's own profile, charged to the layers of the network.

A runtime fuses, renames, reorders and inserts kernels. Each kernel is charged to one layer with a
weight (a convolution or linear layer), together with the activations, additions and changes of memory
order around it, so that the layers' times add up to the network's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wgates_plugin.modules import WEIGHTED

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

PROFILED_RUNS = 5
"""Inferences per profile; of each kernel the least time counts."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of a profile, in order of execution.

    Attributes:
        owners: layers it may belong to, the likeliest first; empty when the profile does not say.
        ms: its time.
        before: it prepares the next kernel's input, so it is charged with that one.
    """

    owners: tuple[str, ...]
    ms: float
    before: bool = False


def charge(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Layer name -> ms. A kernel without owners goes with the layer before it (or after it)."""
    times: dict[str, float] = {}
    waiting, current = 0.0, None
    for kernel in kernels:
        if not kernel.owners and (kernel.before or current is None):
            waiting += kernel.ms
            continue
        if kernel.owners:
            fresh = [owner for owner in kernel.owners if owner not in times]
            current = (fresh or list(kernel.owners))[0]
        assert current is not None
        times[current] = times.get(current, 0.0) + kernel.ms + waiting
        waiting = 0.0
    if current is not None:
        times[current] += waiting
    return times


def merged(profiles: Sequence[Sequence[Kernel]]) -> list[Kernel]:
    """One profile of several of the same network: each kernel with its least time."""
    times = [min(same.ms for same in every) for every in zip(*profiles, strict=True)]
    return [Kernel(k.owners, ms, k.before) for k, ms in zip(profiles[0], times, strict=True)]


def graph_owners(graph: Any) -> dict[str, tuple[str, ...]]:
    """For an ONNX graph with state-dict names: node or tensor name -> layers it may belong to.

    A node with a layer's weight belongs to that layer, any other to what made its inputs.
    """
    weight_of = {
        item.name: item.name for item in graph.initializer if item.name.endswith(".weight")
    }
    owners: dict[str, tuple[str, ...]] = {}
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in weight_of:
            weight_of[node.output[0]] = weight_of[node.input[0]]  # before a MatMul
        own = [
            weight_of[name].removesuffix(".weight")
            for name in node.input[1:2]
            if name in weight_of and node.op_type in _WEIGHTED_NODES
        ]
        inherited = [owner for name in node.input for owner in owners.get(name, ())]
        found = tuple(dict.fromkeys(own or inherited))
        for name in (node.name, *node.output):
            owners[name] = found
    return owners


_WEIGHTED_NODES = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def hooked_times(
    network: nn.Module, call: Callable[[], object], *, runs: int = PROFILED_RUNS
) -> dict[str, float]:
    """Layer times of a torch network called by `call`, by the moments at which layers begin.

    A layer's time lasts until the next layer with a weight begins; what comes before the first is
    charged to it, so the layers' times add up to the call's. For the CPU, where calls return done.
    """
    marks: list[tuple[str, int]] = []

    def at_start(name: str) -> Callable[..., None]:
        return lambda *_: marks.append((name, time.perf_counter_ns()))

    handles: list[RemovableHandle] = [
        module.register_forward_pre_hook(at_start(name))
        for name, module in network.named_modules()
        if isinstance(module, WEIGHTED)
    ]
    profiles: list[list[Kernel]] = []
    try:
        for _ in range(runs + 1):
            marks.clear()
            start = time.perf_counter_ns()
            with torch.inference_mode():
                call()
            end = time.perf_counter_ns()
            moments = [start, *(moment for _, moment in marks[1:]), end]
            spans = [(b - a) / 1e6 for a, b in itertools.pairwise(moments)]
            profiles.append(
                [Kernel((name,), ms) for (name, _), ms in zip(marks, spans, strict=False)]
            )
    finally:
        for handle in handles:
            handle.remove()
    return charge(merged(profiles[1:]))
