"""The factor that a training function puts on the gates' gradient and takes off the weights'.

Mixed precision multiplies the loss, and divides the weights' gradients again before the optimizer steps.
Clipping by norm shrinks them too. Neither knows of the gates, whose gradient goes on to the weights
through the scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.errors import TrainingError
from wgates_plugin.integrations.nni.gates import wrapper_of
from wgates_plugin.integrations.nni.masks import by_input

ALIKE = 0.05
"""Relative difference up to which two gradients count as equal; bfloat16 keeps three digits."""

FAR = 100.0
"""Factor from which gradients that differ in direction too are of different scales."""

ENOUGH = 2
"""Channels that must agree: through one alone there is always a factor."""


def trainers_scale(trainer: Any) -> float:
    """What a Lightning trainer multiplies the loss by."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


@torch.no_grad()
def found_scale(gradient: Tensor, network: nn.Module, space: ChannelSpace) -> float:
    """How many times larger the gates' gradient is than that of the weights they multiply.

    The gradient of an open gate is the sum of w * dL/dw over the weights w that read its channel.
    Where one factor for all channels makes the two equal, that is the answer; otherwise (weights with
    a penalty of their own, gradients of several steps) it is 1. So it is where the gates' gradient is the
    smaller one, which neither scaling a loss nor clipping brings about.

    Args:
        gradient: of the gates (total_units,), averaged over ranks as the weights' gradients are.

    Raises:
        TrainingError: no one factor, and yet the gates' gradient is larger by orders of magnitude.
    """
    found = dict(network.named_modules())
    expected = gradient.new_zeros(space.total_units + 1)
    known = torch.ones_like(expected, dtype=torch.bool)
    for name, side in space.slots_of:
        if side == "out":
            continue
        module = found[name]
        index = torch.from_numpy(space.unit_index(name, "in")).to(gradient.device)
        weight = (wrapper_of(module) or module)._parameters.get("weight")
        if weight is None or weight.grad is None:
            known[index] = False
        else:
            products = weight.detach().to(expected) * weight.grad.to(expected)
            expected.index_add_(0, index, by_input(module, products))
    # Weights behind a closed gate have no gradient to compare with.
    compared = (known & (expected != 0))[:-1]
    ours, theirs = gradient[compared].double(), expected[:-1][compared].double()
    size = float(ours.norm() / theirs.norm())
    if not 0 < size < float("inf"):  # nothing to compare, or an overflow, which skips the step
        return 1.0
    scale = float(ours @ theirs / (theirs @ theirs))
    alike = float((ours - scale * theirs).norm() / ours.norm()) <= ALIKE
    if alike and len(ours) >= ENOUGH and scale > 1.0 + ALIKE:
        return scale
    if alike or size < FAR:
        return 1.0
    raise TrainingError(
        f"gates: their gradient is {size:.2g} times what the weights' gradients come to, and by no one "
        "factor for all channels; if the training function scales its loss, give `loss_scale`, a "
        "function that returns the factor (such as `scaler.get_scale`), otherwise `lambda: 1.0`"
    )
