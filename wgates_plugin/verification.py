"""Masked equals removed: the law every plan is held to, checked in numbers."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from wgates_plugin.calling import (
    ExampleInputs,
    call_with,
    copied,
    informative,
    left_as_found,
    map_tensors,
)
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.errors import TraceError, first_line
from wgates_plugin.gating import Gating
from wgates_plugin.plan import PruningPlan
from wgates_plugin.surgery import resize

if TYPE_CHECKING:
    from wgates_plugin.dependencies import DependencyTrace

TOLERANCE = 1e-5
"""Relative to the largest output, float32."""

_LARGE = 100.0
"""Noise of unit size may hide what mixes channels by their magnitude, such as a local response norm:
inputs this many times larger show it."""


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
    """Relative error between the gated `network` and the physically `smaller` one, eval mode.

    Constant example inputs are replaced by noise, see `calling.informative`.
    """
    example_inputs = informative(network, example_inputs)
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
    every channel is right; float64 tells the two apart. Where something inside insists on float32, a
    hundredfold is taken for rounding.
    """
    if error <= TOLERANCE:
        return True
    exact = _exact_error(network, smaller, plan, example_inputs)
    return error <= 100 * TOLERANCE if exact is None else exact <= TOLERANCE


def _exact_error(
    network: nn.Module, smaller: nn.Module, plan: PruningPlan, example_inputs: ExampleInputs
) -> float | None:
    """`removal_error` in float64; None where something inside insists on float32."""
    try:
        whole, cut = (copied(each).double() for each in (network, smaller))
        return removal_error(whole, cut, plan, map_tensors(_doubled, example_inputs))
    except Exception:  # whatever a network's own code raises
        return None


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


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
        TraceError: they differ; the message names the groups that are at fault, and what the
            smaller network fails with where it does not run. Or no output is finite.
    """
    example_inputs = informative(network, example_inputs)
    failure = _failure(network, _irregular(space, None), example_inputs)
    if failure is None:
        return
    untouched = PruningPlan.leading(space, space.full_widths)
    if not torch.isfinite(masked_output(network, untouched, example_inputs)).all():
        raise TraceError(
            f"network {type(network).__name__}: its output is not finite on the example inputs; look "
            "for NaN or infinity among its weights, its running statistics and these inputs"
        )
    guilty = [
        name
        for index, name in enumerate(space.names)
        if _failure(network, _irregular(space, index), example_inputs) is not None
    ]
    shown = ", ".join(f"`{name}`" for name in (guilty or space.names)[:6])
    raise TraceError(
        f"network {type(network).__name__}: gated and smaller network disagree for {shown}"
        f"{failure and f' ({failure})'}; an operation there (channel shuffle, a fixed view, a layer "
        "that runs without gradients, ...) reads channels in a way that cannot be followed; leave "
        "these layers out with `ignored_layers`"
    )


def _irregular(space: ChannelSpace, only: int | None) -> PruningPlan:
    """A plan without pattern: every second unit would hide an order that is only halved evenly."""
    kept = []
    for index, group in enumerate(space.groups):
        generator = np.random.default_rng(index)
        count = round(generator.uniform(0.4, 0.8) * group.units)
        count = max(1, min(count, group.units - 1))
        chosen = sorted(generator.permutation(group.units)[:count].tolist())
        kept.append(tuple(chosen if only in (None, index) else range(group.units)))
    plan = PruningPlan.leading(space, space.full_widths)
    object.__setattr__(plan, "kept", tuple(kept))
    return plan


def _failure(network: nn.Module, plan: PruningPlan, example_inputs: ExampleInputs) -> str | None:
    """None where gated and smaller network agree; an error's words, "" where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            smaller = resize(network, plan.space, plan)
            found = removal_error(network, smaller, plan, example_inputs)
            right = carried_out(network, smaller, plan, example_inputs, found)
            right = right and _agree_on_large_inputs(network, smaller, plan, example_inputs)
    except Exception as error:  # whatever a network says of shapes that it did not expect
        return f"{type(error).__name__}: {first_line(error)}"
    return None if right else ""


def _agree_on_large_inputs(
    network: nn.Module, smaller: nn.Module, plan: PruningPlan, example_inputs: ExampleInputs
) -> bool:
    """True too where the network takes none, has no finite answer to them, or computes in float32
    alone, whose rounding grows with them: they prove nothing there."""
    large = map_tensors(_enlarged, example_inputs)
    try:
        error = removal_error(network, smaller, plan, large)
    except Exception:  # whatever a network says of values that it did not expect
        return True
    if error <= TOLERANCE or not math.isfinite(error):
        return True
    exact = _exact_error(network, smaller, plan, large)
    return exact is None or not exact > TOLERANCE


def _enlarged(tensor: Tensor) -> Tensor:
    return _LARGE * tensor if tensor.is_floating_point() else tensor
