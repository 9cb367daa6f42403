"""Activation maximisation: the input pattern that excites a filter most, for many filters at once."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from wgates_plugin.strategies.functionality.inputs import Grey, ImageInput
from wgates_plugin.strategies.functionality.points import Point, Reached
from wgates_plugin.strategies.functionality.settings import FunctionalitySettings

LEAK = 0.1
"""Slope below zero, so that a filter that is silent at the start has a way up (ours)."""

BYTES_PER_VALUE = 12
"""Activation, its gradient and a copy inside an operator, in float32."""


def patterns(
    network: nn.Module,
    point: Point,
    image: ImageInput,
    grey: Grey,
    settings: FunctionalitySettings,
    seed: int,
) -> Tensor:
    """What excites each unit of a point, (units, C_in, ...), in deviations of the data from grey.

    All units of a layer are rows of one batch, cut up as memory allows; each climbs
    `objective` by `settings.steps` normalised gradient steps from the same start, with L2 decay
    toward grey and blur (Qin et al., section 3.1; normalisation and blur ours). From each result the
    start is taken away as decay and blur alone would have left it, so that only what the filter
    drew remains.

    Args:
        network: in eval mode, its parameters without gradients.
    """
    device = image.image.device
    shares = point.shares().to(device)
    start = grey.start(point.shape, settings.noise, seed)
    chunk = max(1, int(settings.memory_gib * 2**30 / (BYTES_PER_VALUE * max(1, point.values))))
    control = start
    for _ in range(settings.steps):
        control = _settle(control, grey, settings)
    found = [
        _climb(network, point, image, grey, settings, start, rows) - control
        for rows in shares.split(chunk)
    ]
    return torch.cat(found) / grey.deviation


def objective(output: Tensor, point: Point, rows: Tensor) -> Tensor:
    """Mean rectified activation of unit n in image n, summed: (M, C, ...), (N, C) -> scalar.

    Rectified, for the mean of a plain convolution depends on nothing but the image's mean; leaky,
    for a silent filter must be able to wake (ours).
    """
    level = functional.leaky_relu(point.per_channel(output), LEAK).mean(2)  # (M, C)
    # A network may fold positions or frames into the batch: M is then a multiple of N.
    level = level.view(len(rows), -1, level.shape[1]).mean(1)
    return (level * rows).sum()


def _climb(
    network: nn.Module,
    point: Point,
    image: ImageInput,
    grey: Grey,
    settings: FunctionalitySettings,
    start: Tensor,
    rows: Tensor,
) -> Tensor:
    images = start.repeat(len(rows), *[1] * (start.ndim - 1))
    reached: list[Tensor] = []

    def stop(_: nn.Module, __: Any, output: Tensor) -> None:
        reached.append(output)
        raise Reached

    handle = network.get_submodule(point.module).register_forward_hook(stop)
    try:
        for _ in range(settings.steps):
            images.requires_grad_(True)
            with torch.enable_grad():
                # A clone: the network's first layer may work in place.
                with suppress(Reached):
                    image.call(network, images.clone())
                value = objective(reached.pop(), point, rows)
                (gradient,) = torch.autograd.grad(value, images)
            size = gradient.flatten(1).square().mean(1).sqrt()
            size = size.view(-1, *[1] * (gradient.ndim - 1)).clamp_min(1e-20)
            step = settings.step * grey.deviation
            images = _settle(images.detach() + step * gradient / size, grey, settings)
    finally:
        handle.remove()
    return images


def _settle(images: Tensor, grey: Grey, settings: FunctionalitySettings) -> Tensor:
    """Decay toward grey, then blur."""
    return blurred(grey.mean + (1 - settings.decay) * (images - grey.mean), settings.blur)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (N, C, L) or (N, C, H, W), edges repeated; anything else comes back as it is.

    A constant image stays as it is.
    """
    if sigma == 0 or images.ndim not in (3, 4):
        return images
    radius = math.ceil(2 * sigma)
    places = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (places / sigma).square())
    kernel = kernel / kernel.sum()
    for dim in range(2, images.ndim):
        rows = images.movedim(dim, -1)
        flat = functional.pad(rows.reshape(-1, 1, rows.shape[-1]), (radius, radius), "replicate")
        smooth = functional.conv1d(flat, kernel.view(1, 1, -1))
        images = smooth.view(rows.shape).movedim(-1, dim)
    return images.contiguous()
