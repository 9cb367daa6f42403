"""Where the function of a channel is observed: behind which modules, and what it costs to get there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from wgates_plugin import modules as kinds
from wgates_plugin.channels import ChannelGroup, ChannelSpace
from wgates_plugin.errors import TraceError
from wgates_plugin.strategies.functionality.inputs import ImageInput, shrunk


@dataclass(frozen=True, eq=False)
class Point:
    """One layer of a channel group, observed behind the norm that reads it, if one does.

    Behind the norm a filter is what its readers see of it: a negative scale turns its function
    round, and a filter's own size, which the norm takes back, says nothing (ours).

    Attributes:
        layer: the convolution or linear layer. module: whose output is observed.
        units: (C,) channel of the output -> the group's unit, or -1.
        shape: (C_in, ...) of the images that reach it. values: activations per image on the way.
    """

    layer: str
    module: str
    units: np.ndarray
    shape: tuple[int, ...]
    values: int
    channels_last: bool = False

    def per_channel(self, output: Tensor) -> Tensor:
        """Output (M, C, ...) -> (M, C, positions)."""
        first = output.movedim(-1, 1) if self.channels_last else output
        return first.reshape(len(output), len(self.units), -1)

    def shares(self) -> Tensor:
        """(units, C): the mean over the channels of each unit, as a matrix."""
        owners = torch.from_numpy(self.units)
        matrix = functional.one_hot(owners.clamp_min(0), int(owners.max()) + 1).float()
        matrix *= (owners >= 0)[:, None]
        return (matrix / matrix.sum(0)).T


class Reached(Exception):
    """The observed module has run: nothing behind it is needed."""


@dataclass
class _Pass:
    """What one forward pass saw: who ran after how many activations, and which norm reads whom."""

    values: dict[str, int] = field(default_factory=dict)
    reader: dict[str, str] = field(default_factory=dict)


def members(group: ChannelGroup, space: ChannelSpace, limit: int) -> list[str]:
    """Layers of a group that make its channels, at most `limit`, first and last among them.

    Depthwise convolutions count, for they filter what they pass on (ours). Of one: the last.
    """
    kind = {layer.name: layer.kind for layer in space.layers}
    found = [
        slot.module
        for slot in group.slots
        if slot.role == "producer" or (slot.side == "out" and kind.get(slot.module) == "depthwise")
    ]
    found = list(dict.fromkeys(found))
    if len(found) <= limit:
        return found
    places = np.linspace(len(found) - 1 if limit == 1 else 0, len(found) - 1, limit)
    return [found[round(place)] for place in places.tolist()]


def find_points(
    network: nn.Module, space: ChannelSpace, image: ImageInput, *, producers: int, side: int
) -> list[list[Point]]:
    """The points of every group, in the order of `space.groups`.

    Images are made smaller only for layers that run on smaller ones; a linear layer behind a
    flatten gets them whole.

    Raises:
        TraceError: a layer does not run on the example inputs.
    """
    chosen = [members(group, space, producers) for group in space.groups]
    wanted = {name for names in chosen for name in names}
    small, full = shrunk(image.image, side), list(image.image.shape[1:])
    passes = [(small, _observe(network, image, small, wanted))]
    if small != full:
        passes.append((full, _observe(network, image, full, wanted)))
    result = []
    for group, names in zip(space.groups, chosen, strict=True):
        points = []
        for name in names:
            usable = [(shape, seen) for shape, seen in passes if name in seen.values]
            if not usable:
                raise TraceError(
                    f"layer `{name}`: does not run in eval mode on the example inputs; leave it "
                    "out with `ignored_layers`"
                )
            shape, seen = usable[0]
            module = seen.reader.get(name, name)
            units = next(s.units for s in group.slots if (s.module, s.side) == (name, "out"))
            last = isinstance(network.get_submodule(module), nn.Linear)
            points.append(Point(name, module, units, tuple(shape), seen.values[module], last))
        result.append(points)
    return result


@torch.no_grad()
def _observe(network: nn.Module, image: ImageInput, shape: list[int], wanted: set[str]) -> _Pass:
    seen, made, total = _Pass(), [], 0  # type: tuple[_Pass, list[tuple[str, Tensor]], int]
    names = {module: name for name, module in network.named_modules()}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal total
        if not isinstance(output, Tensor):
            return
        total += output.numel()
        name = names[module]
        if name in wanted and name not in seen.values:
            made.append((name, output))
        if isinstance(module, (*kinds.BATCH_NORMS, *kinds.INSTANCE_NORMS)):
            read = kinds.first_input(args, kwargs)
            for maker, tensor in made:
                # The very tensor: behind an addition or a concatenation it is no longer the layer's.
                if read is tensor:
                    seen.reader.setdefault(maker, name)
        seen.values.setdefault(name, total)

    leaves = [m for m in network.modules() if not list(m.children())]
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in leaves]
    try:
        image.call(network, torch.zeros(1, *shape).to(image.image))
    except (RuntimeError, ValueError):
        pass  # What ran before stands; the rest is looked at in full size, or reported.
    finally:
        for handle in handles:
            handle.remove()
    return seen
