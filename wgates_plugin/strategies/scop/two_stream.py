"""The network with a main and a control stream: the batch is real images, then their knockoffs.

Tang et al., "SCOP" (NeurIPS 2020). Behind each producer the main stream takes
`beta * Z + (1 - beta) * Z~` of the real features Z and the knockoff features Z~, while the control
stream goes on with Z~; norms see both streams as one batch. Only `beta` learns: it rises where the
network is better off with the real feature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin import modules as kinds
from wgates_plugin.calling import ExampleInputs, call_with
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.errors import TrainingError
from wgates_plugin.strategies.scop.knockoffs import KnockoffSource, main_images
from wgates_plugin.training.as_found import modes_kept
from wgates_plugin.training.evaluation import logits_of

START = 0.5
"""Of all betas: neither stream is preferred."""

_HALVES = (torch.bfloat16, torch.float16)


class Betas(nn.Module):
    """One beta in [0, 1] per output channel of every producer; channels that no group owns stay
    real, as what the paper's code leaves unpruned does.

    Attributes:
        values: producer (in the order of `names`) -> (C_out,).
    """

    def __init__(self, network: nn.Module, space: ChannelSpace) -> None:
        super().__init__()
        self.units: dict[str, Tensor] = {}
        self.values = nn.ParameterList()
        for (name, side), touching in space.slots_of.items():
            if side == "out" and any(slot.role == "producer" for _, slot in touching):
                index = space.unit_index(name, "out")
                assert index is not None
                module = network.get_submodule(name)
                device = next(module.parameters()).device
                units = torch.from_numpy(index).to(device)
                self.units[name] = units
                owned = (units < space.total_units).float()
                self.values.append(nn.Parameter(1 - (1 - START) * owned))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.units)

    @torch.no_grad()
    def clamp(self, total_units: int) -> None:
        """Back into [0, 1] after a step; channels that no group owns back to real."""
        for units, value in zip(self.units.values(), self.values, strict=True):
            value.clamp_(0, 1)
            value[units >= total_units] = 1.0

    @torch.no_grad()
    def mean(self, total_units: int) -> float:
        """Over all channels that groups own."""
        pairs = zip(self.units.values(), self.values, strict=True)
        return float(torch.cat([value[units < total_units] for units, value in pairs]).mean())


class TwoStream(nn.Module):
    """Runs real images together with their knockoffs; returns the main stream's logits.

    Hooks sit on the network only between `attach` and `detach`.
    """

    def __init__(self, network: nn.Module, betas: Betas, source: KnockoffSource) -> None:
        super().__init__()
        self.network = network
        self.betas = betas
        self.source = source
        self._handles: list[Any] = []

    def attach(self) -> TwoStream:
        for name, beta in zip(self.betas.names, self.betas.values, strict=True):
            module = self.network.get_submodule(name)
            width = kinds.out_channels_of(module)
            assert beta.numel() == width
            self._handles.append(module.register_forward_hook(_mixer(module, beta)))
        return self

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        inputs: ExampleInputs = kwargs or (args[0] if len(args) == 1 else args)
        images = main_images(inputs)
        both = call_with(self.network, _doubled(inputs, images, self._made_for(images)))
        logits = logits_of(both, self.network)
        if logits.shape[0] != 2 * len(images):
            raise TrainingError(
                f"network {type(self.network).__name__}: gives {logits.shape[0]} outputs for a "
                f"batch of {2 * len(images)}; SCOP needs one output per image"
            )
        return logits[: len(images)]

    def _made_for(self, images: Tensor) -> Tensor:
        """Knockoffs, made in full precision whatever the network runs in, of the images' type."""
        wide = images.float() if images.dtype in _HALVES else images
        with torch.autocast(images.device.type, enabled=False):
            return self.source(wide).to(images.dtype)


def _mixer(module: nn.Module, beta: nn.Parameter) -> Any:
    def mix(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        real, made = output.chunk(2)
        # Linear layers hold channels last, all others second.
        after = 0 if isinstance(module, nn.Linear) else output.dim() - 2
        share = beta.to(output.dtype).view(-1, *[1] * after)
        return torch.cat([share * real + (1 - share) * made, made])

    return mix


def _doubled(inputs: Any, images: Tensor, made: Tensor) -> Any:
    """The batch, then itself once more with the knockoffs in place of the images."""
    if isinstance(inputs, dict):
        return {key: _doubled(value, images, made) for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(_doubled(value, images, made) for value in inputs)
    if inputs is images:
        return torch.cat([images, made])
    if isinstance(inputs, Tensor) and inputs.dim() and len(inputs) == len(images):
        return torch.cat([inputs, inputs])
    return inputs


@torch.no_grad()
def norms_behind(
    network: nn.Module, names: tuple[str, ...], inputs: ExampleInputs
) -> dict[str, Any]:
    """Producer name -> the BatchNorm that reads its output and nothing else, where there is one.

    Found by running the network once in eval mode: that a norm gets the very tensor which a
    producer gave out shows in the object, whatever code lies between.
    """
    given: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, Any] = {}
    handles = []
    for name in names:

        def note(_: nn.Module, __: Any, output: Tensor, name: str = name) -> None:
            given[id(output)] = (name, output)  # the tensor too, so that no other takes its id

        handles.append(network.get_submodule(name).register_forward_hook(note))
    for module in network.modules():
        if isinstance(module, kinds.BATCH_NORMS):

            def meet(norm: nn.Module, args: Any, kwargs: Any) -> None:
                read = id(kinds.first_input(args, kwargs))
                if read in given:
                    found[given[read][0]] = norm

            handles.append(module.register_forward_pre_hook(meet, with_kwargs=True))
    try:
        with modes_kept(network):
            network.eval()
            call_with(network, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
