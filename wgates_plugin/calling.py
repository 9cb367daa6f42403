"""Running a user's network on example inputs, and leaving it as it was found."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin.errors import TraceError

ExampleInputs = Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]


@contextmanager
def left_as_found(network: nn.Module) -> Iterator[None]:
    """Restore train/eval modes, `requires_grad`, attributes and the random state on leaving.

    Attributes, because a forward pass may keep an activation (`self.features = x`), which cannot be
    copied while it has a gradient's history.
    """
    modes = {module: module.training for module in network.modules()}
    grads = {parameter: parameter.requires_grad for parameter in network.parameters()}
    attributes = [(vars(module), dict(vars(module))) for module in network.modules()]
    buffers = [
        (module._buffers, dict(module._buffers))
        for module in network.modules()
        if isinstance(module._buffers, dict)  # a scripted module keeps its buffers elsewhere
    ]
    try:
        with rng_kept(device_of(network)):
            yield
    finally:
        for held, before in attributes:
            for name in held.keys() - before.keys():
                del held[name]
            held.update(before)
        for held, before in buffers:
            for name, buffer in before.items():
                if not _moved(buffer, held.get(name)):
                    held[name] = buffer
        for module, training in modes.items():
            if module.training is not training:
                module.training = training
        for parameter, flag in grads.items():
            if parameter.requires_grad is not flag:
                parameter.requires_grad_(flag)


def copied(network: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy, also of a network whose forward pass kept an activation with its gradient's history:
    the copy's is without.

    Args:
        memo: as in `copy.deepcopy`.
    """
    try:
        return copy.deepcopy(network, dict(memo or {}))
    except RuntimeError:  # torch copies no tensor that has a history
        kept = [
            (vars(module), name, value)
            for module in network.modules()
            for name, value in vars(module).items()
            if _has_history(value)
        ]
        if not kept:
            raise
    try:
        for held, name, value in kept:
            held[name] = map_tensors(Tensor.detach, value)
        return copy.deepcopy(network, dict(memo or {}))
    finally:
        for held, name, value in kept:
            held[name] = value


def _has_history(value: Any, depth: int = 5) -> bool:
    """Of a tensor, or of any in plain lists, tuples and dicts, one in another."""
    if isinstance(value, Tensor):
        return value.grad_fn is not None
    if depth and type(value) in (dict, list, tuple):
        return any(_has_history(item, depth - 1) for item in _values(value))
    return False


def _moved(before: Tensor | None, now: Tensor | None) -> bool:
    """Whether a buffer is another one since the network went elsewhere, or to another precision."""
    if before is None or now is None or now.grad_fn is not None:
        return False
    return (before.device, before.dtype) != (now.device, now.dtype)


@contextmanager
def rng_kept(device: torch.device) -> Iterator[None]:
    """Give torch's random state back, that of the CPU and that of `device`."""
    forkable = device.type in ("cuda", "xpu")
    with torch.random.fork_rng(
        devices=[device] if forkable else [], device_type=device.type if forkable else "cuda"
    ):
        yield


def call_with(network: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Run the network on a tensor, a tuple or list of arguments or a dict of keyword arguments."""
    if isinstance(example_inputs, dict):
        return network(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return network(*example_inputs)
    return network(example_inputs)


def device_of(network: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a network without either."""
    for tensor in itertools.chain(network.parameters(), network.buffers()):
        return tensor.device
    return torch.device("cpu")


def _values(inputs: Any) -> Iterable[Any]:
    if isinstance(inputs, Mapping):
        return inputs.values()
    return inputs if isinstance(inputs, (tuple, list)) else [inputs]


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in _values(value):
            yield from _tensors(item)


def batch_length(inputs: ExampleInputs) -> int | None:
    """The length that all tensors with a dimension among the inputs have; None where they differ."""
    lengths = {len(tensor) for tensor in _tensors(inputs) if tensor.dim()}
    return lengths.pop() if len(lengths) == 1 else None


def shapes_of(inputs: ExampleInputs) -> str:
    """Shapes of the inputs, for messages."""
    return ", ".join(
        str(tuple(value.shape)) if isinstance(value, Tensor) else str(value)
        for value in _values(inputs)
    )


def refuse_other_device(network: nn.Module, example_inputs: ExampleInputs) -> None:
    """Refuse example inputs that are elsewhere than the network.

    Raises:
        TraceError: names both devices.
    """
    device = device_of(network)
    for tensor in _tensors(example_inputs):
        if tensor.device != device:
            raise TraceError(
                f"example inputs: on {tensor.device}, the network is on {device}; "
                f"move them with `.to('{device}')`"
            )


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `change` done to its tensors: one, or nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: map_tensors(change, item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [map_tensors(change, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def informative(network: nn.Module, inputs: ExampleInputs) -> ExampleInputs:
    """The inputs, with noise in place of constant tensors, which would let any mistake pass: to zeros,
    many a network answers with its biases alone.

    Of either sign, or from 0 to 1 where the network has no finite answer to that (it takes a logarithm);
    where it has none to any noise, the inputs stay.
    """
    if not any(map(_is_constant, _tensors(inputs))):
        return inputs
    for draw in (torch.randn, torch.rand):

        def noise(tensor: Tensor, draw: Callable[..., Tensor] = draw) -> Tensor:
            if not _is_constant(tensor):
                return tensor
            return draw(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)

        found: ExampleInputs = map_tensors(noise, inputs)
        if _is_finite(network, found):
            return found
    return inputs


def _is_constant(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() < 2:
        return False
    return not bool((tensor != tensor.flatten()[0]).any())


@torch.no_grad()
def _is_finite(network: nn.Module, inputs: ExampleInputs) -> bool:
    try:
        with left_as_found(network):
            network.eval()
            found = call_with(network, inputs)
    except Exception:  # whatever a network's own code raises
        return False
    return all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(found))


def to_cpu(inputs: ExampleInputs) -> ExampleInputs:
    """The same inputs on the CPU."""
    moved: ExampleInputs = map_tensors(Tensor.cpu, inputs)
    return moved
