"""The contribution index: how strongly the loss hangs on each filter's feature map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin.calling import ExampleInputs, call_with
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.errors import TrainingError
from wgates_plugin.strategies.functionality.inputs import (
    Batches,
    Key,
    Loss,
    find_image,
    value_at,
    with_value,
)
from wgates_plugin.strategies.functionality.points import Point
from wgates_plugin.training.evaluation import images_in, images_of, logits_of, one_number

IMAGES_AT_ONCE = 32
"""Feature maps of the whole network are held for so many images."""


def contribution_index(
    network: nn.Module,
    space: ChannelSpace,
    points: Sequence[Sequence[Point]],
    data: Batches,
    loss: Loss,
) -> Tensor:
    """Mean over images of |dL / d(feature map)|_2 per unit, (total_units,), mean 1 in each layer.

    `L` is the loss of one image (Qin et al., section 3.3). A unit that has several channels in a
    layer counts with the norm over all of them; a group of several layers takes the mean of their
    normalised indices (ours).

    Args:
        network: in eval mode, its parameters without gradients.

    Raises:
        TrainingError: a loss that is not finite, or no single number.
    """
    sums: dict[int, Tensor] = {}
    norms: list[tuple[int, Tensor]] = []
    every = [point for group in points for point in group]
    # Modules that produce for several groups have one point in each of them.
    handles = [
        network.get_submodule(point.module).register_forward_hook(_watch(place, point, norms))
        for place, point in enumerate(every)
    ]
    try:
        for inputs, targets in data:
            count = images_in(inputs)
            for first in range(0, count, IMAGES_AT_ONCE):
                part = slice(first, first + IMAGES_AT_ONCE)
                used = _backward(network, *_part(inputs, targets, count, part), loss)
                for place, squares in norms:  # one entry per call of the module
                    sums[place] = (
                        sums.get(place, 0) + _per_image(squares, used, every[place]) * used
                    )
                norms.clear()
    finally:
        for handle in handles:
            handle.remove()
    result, place = torch.zeros(space.total_units), 0
    for index, group in enumerate(points):
        mine = torch.zeros(space.groups[index].units)
        for _ in group:
            if place in sums:  # a layer that the loss does not reach contributes nothing
                found = sums[place].cpu()
                mine += found / found.mean().clamp_min(1e-30) / len(group)
            place += 1
        result[space.unit_slice(index)] = mine
    return result


def _watch(place: int, point: Point, norms: list[tuple[int, Tensor]]) -> Any:
    def watch(_: nn.Module, __: Any, output: Tensor) -> None:
        def keep(gradient: Tensor) -> None:
            norms.append((place, point.per_channel(gradient).square().sum(2)))  # (M, C)

        if output.requires_grad:
            output.register_hook(keep)

    return watch


def _per_image(squares: Tensor, images: int, point: Point) -> Tensor:
    """Squared norms (M, C) of one call -> sum over images of the norm per unit (units,)."""
    squares = squares.view(images, -1, squares.shape[1]).sum(1)
    owners = torch.from_numpy(point.units).to(squares.device)
    per_unit = squares.new_zeros(images, int(owners.max()) + 1)
    owned = owners >= 0
    per_unit.index_add_(1, owners[owned], squares[:, owned])
    return per_unit.sqrt().sum(0)


def _part(
    inputs: ExampleInputs, targets: Any, count: int, part: slice
) -> tuple[ExampleInputs, Any]:
    return images_of(inputs, part, count), images_of(targets, part, count)


def _backward(network: nn.Module, inputs: ExampleInputs, targets: Any, loss: Loss) -> int:
    key: Key = find_image(inputs)
    image = value_at(inputs, key).detach().requires_grad_(True)
    with torch.enable_grad():
        output = call_with(network, with_value(inputs, key, image.clone()))
        value = one_number(loss(logits_of(output, network), targets), "functionality")
        if not torch.isfinite(value):
            raise TrainingError(
                f"functionality: the loss is {float(value.detach())} on a batch of training data"
            )
        torch.autograd.grad(value, image)
    return len(image)
