"""The usual way to gate a network, as a rival: feature maps are multiplied where they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin.channels import ChannelSpace


class ActivationMasking:
    """Same gates, same function and same gradient as `wgates_plugin.gating.Gating`.

    Every consumer's input (N, C, ...) is multiplied by its channels' gates (C,), so that autograd
    keeps one more feature map per consumer.

    Args:
        source: all gates as one vector (total_units,), called once per forward pass.
    """

    def __init__(
        self, network: nn.Module, space: ChannelSpace, source: Callable[[], Tensor]
    ) -> None:
        self.network, self.space, self.source = network, space, source
        self._handles: list[Any] = []
        self._gates = torch.empty(0)

    def attach(self) -> ActivationMasking:
        found = dict(self.network.named_modules())
        self._handles.append(self.network.register_forward_pre_hook(self._open))
        for name, side in self.space.slots_of:
            index = self.space.unit_index(name, "in") if side == "in" else None
            if index is not None:
                mask = self._masker(torch.from_numpy(index))
                self._handles.append(found[name].register_forward_pre_hook(mask))
        return self

    def detach(self) -> nn.Module:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        return self.network

    def _open(self, *_: Any) -> None:
        gates = self.source()
        self._gates = torch.cat([gates, gates.new_ones(1)])  # last: channels no group owns

    def _masker(self, index: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
        def mask(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            (features,) = inputs
            gates = self._gates[index]
            if features.dim() > 2 and gates.numel() == features.shape[1]:
                gates = gates.view(1, -1, *[1] * (features.dim() - 2))
            return (features * gates,)

        return mask
