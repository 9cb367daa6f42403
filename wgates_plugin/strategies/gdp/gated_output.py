"""What a network answers under any gates, whatever gates are on it."""

from __future__ import annotations

import torch
from torch import Tensor

from wgates_plugin.calling import (
    ExampleInputs,
    call_with,
    informative,
    left_as_found,
    map_tensors,
)
from wgates_plugin.gating import Gating
from wgates_plugin.training.evaluation import to_device


@torch.no_grad()
def gated_output(
    gating: Gating, gates: Tensor, example_inputs: ExampleInputs, seed: int | None = None
) -> Tensor:
    """Eval-mode output of the network of `gating` with `gates` (total_units,) in place of its own.

    Constant example inputs are replaced by noise, see `calling.informative`.

    Args:
        seed: of noise to take in place of the example inputs, in their shape; None takes them.
    """
    generator = torch.Generator().manual_seed(seed or 0)

    def noise(value: Tensor) -> Tensor:
        if seed is None or not value.is_floating_point():
            return value
        return torch.randn(value.shape, generator=generator).to(value)

    inputs = to_device(example_inputs, gates.device)
    with gating.answering(gates) as network, left_as_found(network):
        inputs = map_tensors(noise, informative(network, inputs))
        network.eval()
        output: Tensor = call_with(network, inputs)
    return output
