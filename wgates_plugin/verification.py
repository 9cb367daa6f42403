"""Masked equals removed: the law every plan is held to, checked in numbers."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from wgates_plugin.calling import ExampleInputs, call_with, left_as_found
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.errors import TraceError
from wgates_plugin.gating import Gating
from wgates_plugin.plan import PruningPlan
from wgates_plugin.surgery import resize

if TYPE_CHECKING:
    from wgates_plugin.dependencies import DependencyTrace

TOLERANCE = 1e-5
"""Relative to the largest output, float32."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    scale = expected.abs().max().clamp_min(1e-30)
    return float((found - expected).abs().max() / scale)


@torch.no_grad()
def masked_output(network: nn.Module, plan: PruningPlan, example_inputs: ExampleInputs) -> Tensor:
    """Eval-mode output of the network with the plan's channels gated, not removed."""
    device = next(network.parameters()).device
    gates = plan.mask.to(device, torch.float32)
    with left_as_found(network):
        network.eval()
        with Gating(network, plan.space, lambda: gates):
            output: Tensor = call_with(network, example_inputs)
    return output


@torch.no_grad()
def removal_error(
    network: nn.Module,
    smaller: nn.Module,
    plan: PruningPlan,
    example_inputs: ExampleInputs,
) -> float:
    """Relative error between the gated `network` and the physically `smaller` one, eval mode."""
    expected = masked_output(network, plan, example_inputs)
    with left_as_found(smaller):
        smaller.eval()
        found = call_with(smaller, example_inputs)
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return float("inf")
    return relative_error(found, expected)


def carried_out(
    network: nn.Module,
    smaller: nn.Module,
    plan: PruningPlan,
    example_inputs: ExampleInputs,
    error: float,
) -> bool:
    """Whether `error`, found in float32, is rounding alone.

    A network whose activations grow without bound may differ by whole percents in float32 although
    every channel is right; float64 tells the two apart.
    """
    if error <= 100 * TOLERANCE:
        return True
    try:
        whole, cut = (copy.deepcopy(each).double() for each in (network, smaller))
        return removal_error(whole, cut, plan, _doubled(example_inputs)) <= TOLERANCE
    except RuntimeError:  # something inside insists on float32
        return False


def _doubled(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {name: _doubled(value) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_doubled(value) for value in inputs)
    return inputs.double() if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs


def verify(traced: DependencyTrace, space: ChannelSpace) -> None:
    """`check_traced`, where an operation of the network might move channels unseen.

    Raises:
        TraceError: as `check_traced` does.
    """
    if not traced.keeps_channel_order:
        check_traced(traced.network, space, traced.example_inputs)


def check_traced(network: nn.Module, space: ChannelSpace, example_inputs: ExampleInputs) -> None:
    """Cut an irregular share of every group once and compare with the gated network.

    Raises:
        TraceError: they differ; the message names the groups that are at fault.
    """
    example_inputs = _informative(example_inputs)
    if _exact(network, _irregular(space, None), example_inputs):
        return
    guilty = [
        name
        for index, name in enumerate(space.names)
        if not _exact(network, _irregular(space, index), example_inputs)
    ]
    shown = ", ".join(f"`{name}`" for name in (guilty or space.names)[:6])
    raise TraceError(
        f"network {type(network).__name__}: gated and smaller network disagree for {shown}; an "
        "operation there (channel shuffle, a fixed view, ...) moves channels in a way that cannot "
        "be followed; leave these layers out with `ignored_layers`"
    )


def _informative(inputs: Any) -> Any:
    """The inputs, with noise in place of constant tensors: zeros would let any mistake pass."""
    if isinstance(inputs, dict):
        return {name: _informative(value) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_informative(value) for value in inputs)
    if not (isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.numel() > 1):
        return inputs
    if (inputs != inputs.flatten()[0]).any():
        return inputs
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))
    return noise.to(inputs)


def _irregular(space: ChannelSpace, only: int | None) -> PruningPlan:
    """A plan without pattern: every second unit would hide an order that is only halved evenly."""
    kept = []
    for index, group in enumerate(space.groups):
        generator = np.random.default_rng(index)
        count = max(1, round(generator.uniform(0.4, 0.8) * group.units))
        chosen = sorted(generator.permutation(group.units)[:count].tolist())
        kept.append(tuple(chosen if only in (None, index) else range(group.units)))
    plan = PruningPlan.leading(space, space.full_widths)
    object.__setattr__(plan, "kept", tuple(kept))
    return plan


def _exact(network: nn.Module, plan: PruningPlan, example_inputs: ExampleInputs) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            smaller = resize(network, plan.space, plan)
            error = removal_error(network, smaller, plan, example_inputs)
            return carried_out(network, smaller, plan, example_inputs, error)
    except (RuntimeError, ValueError, IndexError):
        return False
