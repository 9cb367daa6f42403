"""The image among a network's inputs: grey with a little noise to start from, and batches of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin.calling import ExampleInputs, call_with, map_tensors
from wgates_plugin.errors import TraceError

Key = str | int | None


@dataclass(frozen=True, eq=False)
class ImageInput:
    """The first floating-point tensor of a network's inputs; all others stay as in the example.

    `key` is its place: None when it is the only input. `example` holds one sample of everything.
    """

    example: ExampleInputs
    key: Key

    @classmethod
    def of(cls, example_inputs: ExampleInputs) -> ImageInput:
        """The image of these inputs.

        Raises:
            TraceError: no input is a floating-point tensor that gradients could climb on.
        """
        key = find_image(example_inputs)
        image = value_at(example_inputs, key)
        count = len(image)
        return cls(
            map_tensors(lambda t: t[:1] if t.ndim and len(t) == count else t, example_inputs), key
        )

    @property
    def image(self) -> Tensor:
        """(1, ...)"""
        return value_at(self.example, self.key)

    def inputs(self, images: Tensor) -> ExampleInputs:
        """All inputs for a batch of images (N, ...)."""

        def widened(tensor: Tensor) -> Tensor:
            if tensor.ndim and len(tensor) == 1:
                return tensor.expand(len(images), *tensor.shape[1:])
            return tensor

        return with_value(map_tensors(widened, self.example), self.key, images)

    def call(self, network: nn.Module, images: Tensor) -> Any:
        return call_with(network, self.inputs(images))


def find_image(inputs: ExampleInputs) -> Key:
    """Where the first floating-point tensor with a batch dimension is.

    Raises:
        TraceError: there is none.
    """
    if isinstance(inputs, Tensor):
        places: list[tuple[Key, Any]] = [(None, inputs)]
    elif isinstance(inputs, dict):
        places = list(inputs.items())
    else:
        places = list(enumerate(inputs))
    for key, value in places:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
            return key
    raise TraceError(
        "functionality: none of the network's inputs is a floating-point tensor with a batch "
        "dimension, so that no pattern can be found by gradient ascent; use another strategy"
    )


def value_at(inputs: ExampleInputs, key: Key) -> Tensor:
    found: Tensor = inputs if key is None else inputs[key]  # type: ignore[index, assignment]
    return found


def with_value(inputs: ExampleInputs, key: Key, value: Tensor) -> ExampleInputs:
    """The same inputs with `value` at `key`."""
    if key is None:
        return value
    if isinstance(inputs, dict):
        return {**inputs, str(key): value}
    return tuple(value if place == key else old for place, old in enumerate(inputs))


@dataclass(frozen=True, eq=False)
class Grey:
    """What grey is in the network's input space: mean (1, C, 1, ...) and one standard deviation."""

    mean: Tensor
    deviation: float

    @classmethod
    def of(cls, images: Sequence[Tensor]) -> Grey:
        """From training images (N, C, ...): they may be normalised in any way."""
        every = torch.cat([batch.float().transpose(0, 1).flatten(1) for batch in images], dim=1)
        mean = every.mean(1)  # (C, N * pixels) -> (C,)
        like_images = mean.to(images[0].dtype)
        deviation = float((every - mean[:, None]).square().mean().sqrt())
        return cls(like_images.view(1, -1, *[1] * (images[0].ndim - 2)), deviation or 1.0)

    def start(self, shape: Sequence[int], noise: float, seed: int) -> Tensor:
        """The one start (1, C, ...) of all filters: grey and a little noise, by the seed alone."""
        drawn = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
        return self.mean + noise * self.deviation * drawn.to(self.mean)


def shrunk(image: Tensor, side: int) -> list[int]:
    """Shape (C, ...) of the image with its longest side cut down to `side`."""
    sides = list(image.shape[2:])
    longest = max(sides, default=0)
    if longest <= side:
        return list(image.shape[1:])
    return [image.shape[1], *(max(1, round(s * side / longest)) for s in sides)]


Batches = list[tuple[ExampleInputs, Any]]
Loss = Callable[[Tensor, Any], Tensor]
