"""The PruningNet: one network that computes what networks of any widths would, of shared weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from wgates_plugin import modules as kinds
from wgates_plugin.calling import copied
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.strategies.metapruning.generator import (
    KernelGenerator,
    bases_for,
    crop,
    shares_of,
)
from wgates_plugin.surgery import ResizeMap, resize, resize_map

logger = logging.getLogger("wgates_plugin")


class PruningNet(nn.Module):
    """Generates the kernels of `network` for the widths in `self.widths`, and runs it at these.

    Every convolution or linear layer that makes channels of a group, depthwise ones among them, has
    a generator, which is told the kept shares of the groups it reads and makes (ours: of all of
    them, where inputs are concatenated). All else is trained as it is: norms' maps, biases,
    and layers that groups do not touch or are only read by. All of it starts anew: the trained
    weights have no part in this.

    Layers run at their cropped size, the leading channels of each group. That is the full network
    with all other channels closed where they are read, at the cost of the smaller one. Layers with
    frozen parameters stay as they are and are cropped only.

    Law: `forward`, `materialised(widths)` and the full generated kernels under gates agree.

    Args:
        network: any traced network; copied. hidden, largest_table: see `MetaPruningSettings`.
    """

    def __init__(
        self,
        network: nn.Module,
        space: ChannelSpace,
        *,
        hidden: int = 32,
        largest_table: int | None = 2**23,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.space = space
        self.widths: tuple[int, ...] = space.full_widths
        where = next(network.parameters()).device
        self.network = initialised(copied(network).cpu(), seed)
        found = dict(self.network.named_modules())
        self.generated: dict[str, tuple[int, ...]] = {}
        generators = []
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for name in _producers(space, found):
                weight = found[name].get_parameter("weight")
                if not weight.requires_grad:
                    continue
                touching = _groups_around(space, name)
                bases = bases_for(weight.numel(), hidden, largest_table)
                generators.append(KernelGenerator(weight, len(touching), hidden, bases))
                self.generated[name] = touching
                weight.requires_grad_(False)
        self.generators = nn.ModuleList(generators)
        self.to(where)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        change = resize_map(self.network, self.space, self.widths)
        tensors = self._cropped(change, self.widths)
        with _attributes(self.network, change.attributes):
            output = functional_call(self.network, tensors, args, kwargs)
        if self.training:
            self._keep_statistics(change, tensors)
        return output

    def kernels(
        self, widths: Sequence[int], change: ResizeMap | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """(name of the weight, kernel) for `widths`; whole kernels unless `change` crops them."""
        tensors = {} if change is None else change.tensors
        first = next(self.network.parameters())
        shares = shares_of(widths, self.space.full_widths, first.device)
        for (name, touching), generator in zip(
            self.generated.items(), self.generators, strict=True
        ):
            slices = tensors.get(f"{name}.weight", {})
            yield f"{name}.weight", generator(shares[list(touching)], slices)

    @torch.no_grad()
    def materialised(self, widths: Sequence[int]) -> nn.Module:
        """A plain network of `widths` with the weights generated for it, to be judged."""
        change = resize_map(self.network, self.space, widths)
        smaller = resize(self.network, self.space, widths)
        for name, kernel in self.kernels(widths, change):
            smaller.get_parameter(name).copy_(kernel)
        return smaller

    def _cropped(self, change: ResizeMap, widths: Sequence[int]) -> dict[str, Tensor]:
        tensors = dict(self.kernels(widths, change))
        own = {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}
        for name, slices in change.tensors.items():
            if name not in tensors:
                tensors[name] = crop(own[name], slices)
        return tensors

    @torch.no_grad()
    def _keep_statistics(self, change: ResizeMap, tensors: Mapping[str, Tensor]) -> None:
        """Bring running statistics of open channels back; leading ones were updated in place."""
        for name, buffer in self.network.named_buffers():
            slices = change.tensors.get(name)
            if slices and tensors[name]._base is None:
                buffer[torch.from_numpy(slices[0]).to(buffer.device)] = tensors[name]


def initialised(network: nn.Module, seed: int) -> nn.Module:
    """Give every module of a network on the CPU fresh weights, in place, as torch would do.

    Modules that cannot say how (no `reset_parameters`), or have frozen parameters, stay as they are.
    """
    kept = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name, module in network.named_modules():
            own = list(module.parameters(recurse=False))
            reset = getattr(module, "reset_parameters", None)
            if callable(reset) and all(parameter.requires_grad for parameter in own):
                reset()
            elif own:
                kept.append(name)
    if kept:
        logger.warning(
            "metapruning: %d modules (`%s`) have frozen parameters or no `reset_parameters`; their "
            "weights stay as they were",
            len(kept),
            kept[0],
        )
    return network


def _producers(space: ChannelSpace, found: Mapping[str, nn.Module]) -> list[str]:
    """Weighted layers whose outputs are channels of a group, in the network's order."""
    made = {
        slot.module
        for group in space.groups
        for slot in group.slots
        if slot.role == "producer" or kinds.is_depthwise(found[slot.module])
    }
    return [name for name in found if name in made and isinstance(found[name], kinds.WEIGHTED)]


def _groups_around(space: ChannelSpace, name: str) -> tuple[int, ...]:
    """Indices of the groups that a layer reads, then of those that it makes."""
    touching = [
        index
        for place in ((name, "in"), (name, "out"))
        for index, _ in space.slots_of.get(place, [])
    ]
    return tuple(dict.fromkeys(touching))


@contextmanager
def _attributes(network: nn.Module, wanted: Mapping[str, Mapping[str, int]]) -> Iterator[None]:
    """Set module attributes, such as a depthwise convolution's groups, for the block's length."""
    found = dict(network.named_modules())
    before = [
        (found[name], key, getattr(found[name], key))
        for name, values in wanted.items()
        for key in values
    ]
    try:
        for name, values in wanted.items():
            for key, value in values.items():
                setattr(found[name], key, value)
        yield
    finally:
        for module, key, value in before:
            setattr(module, key, value)
