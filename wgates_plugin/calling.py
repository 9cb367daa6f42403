"""Running a user's network on example inputs, and leaving it as it was found."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin.errors import TraceError

ExampleInputs = Tensor | tuple[Any, ...] | dict[str, Any]


@contextmanager
def left_as_found(network: nn.Module) -> Iterator[None]:
    """Restore train/eval modes, `requires_grad` and the random state on leaving."""
    modes = {module: module.training for module in network.modules()}
    grads = {parameter: parameter.requires_grad for parameter in network.parameters()}
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        for module, training in modes.items():
            if module.training is not training:
                module.training = training
        for parameter, flag in grads.items():
            if parameter.requires_grad is not flag:
                parameter.requires_grad_(flag)


def call_with(network: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Run the network on a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(example_inputs, dict):
        return network(**example_inputs)
    if isinstance(example_inputs, tuple):
        return network(*example_inputs)
    return network(example_inputs)


def device_of(network: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a network without either."""
    for tensor in itertools.chain(network.parameters(), network.buffers()):
        return tensor.device
    return torch.device("cpu")


def _tensors(inputs: ExampleInputs) -> list[Any]:
    if isinstance(inputs, dict):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]


def shapes_of(inputs: ExampleInputs) -> str:
    """Shapes of the inputs, for messages."""
    return ", ".join(
        str(tuple(value.shape)) if isinstance(value, Tensor) else str(value)
        for value in _tensors(inputs)
    )


def refuse_other_device(network: nn.Module, example_inputs: ExampleInputs) -> None:
    """Refuse example inputs that are elsewhere than the network.

    Raises:
        TraceError: names both devices.
    """
    device = device_of(network)
    for tensor in _tensors(example_inputs):
        if isinstance(tensor, Tensor) and tensor.device != device:
            raise TraceError(
                f"example inputs: on {tensor.device}, the network is on {device}; "
                f"move them with `.to('{device}')`"
            )


def to_cpu(inputs: ExampleInputs) -> ExampleInputs:
    """The same inputs on the CPU."""
    if isinstance(inputs, dict):
        return {name: to_cpu(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(to_cpu(value) for value in inputs)
    return inputs.cpu() if isinstance(inputs, Tensor) else inputs
