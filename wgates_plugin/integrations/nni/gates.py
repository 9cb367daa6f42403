"""Gates on a network whose layers NNI has wrapped.

A wrapper takes the weight away from its layer, trains a parameter of its own, and hands the layer a
masked (or quantised) copy on every call. Gates therefore multiply that copy, and scores read the
wrapper's parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget
from wgates_plugin.gating import Gating, gated_weight
from wgates_plugin.strategies.wgates import WGates, WGatesSettings


def wrapper_of(module: nn.Module) -> Any | None:
    """The NNI wrapper that holds the module's weight, if there is one."""
    if "weight" in module._parameters:
        return None
    return module._modules.get("_nni_wrapper")


Layers = dict[str, tuple[nn.Module, torch.Size]]
"""Layer -> the module itself and the shape of its weight."""


def layers_of(network: nn.Module, names: Iterable[str]) -> Layers:
    """The layers of these names that are there and have weights, wrapped or not."""
    found = dict(network.named_modules())
    layers: Layers = {}
    for name in names:
        module = found.get(name)
        holder = module if module is None else wrapper_of(module) or module
        weight = getattr(holder, "weight", None)
        if module is not None and isinstance(weight, Tensor):
            layers[name] = (module, weight.shape)
    return layers


def changes(network: nn.Module, before: Layers) -> list[str]:
    """How the layers differ from what they were, one line each."""
    now = layers_of(network, before)
    problems = []
    for name, (module, shape) in before.items():
        if name not in now:
            problems.append(f"`{name}` is gone")
        elif now[name][0] is not module:
            problems.append(f"`{name}` is another layer now")
        elif now[name][1] != shape:
            problems.append(f"`{name}.weight` was {tuple(shape)} and is {tuple(now[name][1])}")
    return problems


class WrappedGating(Gating):
    """`Gating` that multiplies what NNI's wrappers hand to their layers."""

    def attach(self) -> Gating:
        if self.attached:
            return self
        super().attach()
        # A LightningModule's training step may call the network inside it instead of itself.
        trunk = _trunk(self.network, [name for name, _ in self.space.slots_of])
        if trunk is not self.network:
            self._handles.append(trunk.register_forward_pre_hook(self._open))
            self._handles.append(trunk.register_forward_hook(self._close, always_call=True))
        return self

    def _shadow(self, module: nn.Module, _: Any) -> None:
        wrapper = wrapper_of(module)
        if wrapper is None or self._extended is None:
            super()._shadow(module, _)
            return
        gates = self._extended[self._indices[module]]
        plain = wrapper.patch_params

        def patch_params(targets: dict[str, Tensor]) -> dict[str, Tensor]:
            patched: dict[str, Tensor] = plain(targets)
            patched["weight"] = gated_weight(module, patched["weight"], gates)
            return patched

        wrapper.__dict__["patch_params"] = patch_params

    @staticmethod
    def _unshadow(module: nn.Module, *_: Any) -> None:
        Gating._unshadow(module)
        wrapper = module._modules.get("_nni_wrapper")
        if wrapper is not None:
            wrapper.__dict__.pop("patch_params", None)


def _trunk(network: nn.Module, names: Sequence[str]) -> nn.Module:
    """The smallest module that holds all these layers."""
    paths = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return network.get_submodule(".".join(shared))


@contextmanager
def trained_weights(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block, `module.weight` is what the wrapper trains, times the mask it has already."""
    shadowed = []
    for module in modules:
        wrapper = wrapper_of(module)
        weight = None if wrapper is None else wrapper._parameters.get("weight")
        if wrapper is None or weight is None:
            continue
        mask = wrapper._buffers.get("weight_mask")
        module.__dict__["weight"] = weight if mask is None else weight * mask
        shadowed.append(module)
    try:
        yield
    finally:
        for module in shadowed:
            module.__dict__.pop("weight", None)


@torch.no_grad()
def load_wrapped(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the unwrapped network's state dict: wrapped weights belong to their wrappers."""
    for name, value in state.items():
        for held in _held(network, name):
            held.copy_(value)


def unwrapped_state(network: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """These entries of the unwrapped network's state dict as they are now, copied."""
    found = {name: _held(network, name) for name in names}
    return {name: held[0].detach().clone() for name, held in found.items() if held}


def _held(network: nn.Module, name: str) -> list[Tensor]:
    """The tensors that stand for an entry of the state dict; first the one that is trained."""
    path, _, key = name.rpartition(".")
    module = network.get_submodule(path)
    wrapper = module._modules.get("_nni_wrapper")
    owners = [owner for owner in (wrapper, module) if owner is not None]
    tables: list[Mapping[str, Tensor | None]] = []
    for owner in owners:
        tables += [owner._parameters, owner._buffers]
    return [held for table in tables if (held := table.get(key)) is not None]


def unsynchronised(network: nn.Module) -> AbstractContextManager[None]:
    """Where a DistributedDataParallel runs without expecting a backward pass after each forward."""
    if _is_ddp(network):
        return network.no_sync()
    return nullcontext()


def _is_ddp(network: nn.Module) -> TypeGuard[nn.parallel.DistributedDataParallel]:
    return isinstance(network, nn.parallel.DistributedDataParallel)


def wrapped_gates(
    network: nn.Module,
    space: ChannelSpace,
    budget: Budget,
    settings: WGatesSettings,
    *,
    steps: int | None,
    average: Callable[[Tensor], Tensor],
) -> WGates:
    """The `WGates` of a network that NNI has wrapped."""
    found = dict(network.named_modules())
    producers = [
        found[slot.module] for group in space.groups for slot in group.slots_as("producer")
    ]
    with trained_weights(producers):
        gates = WGates(network, space, budget, settings, steps=steps, average=average)
    gates.gating = WrappedGating(network, space, gates.gating.source)
    # NNI trains a wrapper of its own, so that the mode of the user's says nothing.
    gates.network = network.module if _is_ddp(network) else network
    inside: list[Any] = []

    def enter(*_: Any) -> None:
        inside.append(trained_weights(producers))
        inside[-1].__enter__()

    def leave(*_: Any) -> None:
        inside.pop().__exit__(None, None, None)

    gates.scores.register_forward_pre_hook(enter)
    gates.scores.register_forward_hook(leave, always_call=True)
    return gates
