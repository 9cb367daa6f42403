"""The filters behind each unit: who produces it, and how large its filters are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wgates_plugin import modules as kinds
from wgates_plugin.channels import ChannelSpace

Producers = Sequence[tuple[nn.Module, Tensor]]
"""Producing layers, and the unit (C_out,) of each of their filters; `total_units` for one of no group."""


def producers_of(network: nn.Module, space: ChannelSpace) -> Producers:
    """Those of all groups, in the groups' order."""
    found = dict(network.named_modules())
    producers = []
    for index, group in enumerate(space.groups):
        for slot in group.slots_as("producer"):
            module = found[slot.module]
            units = torch.from_numpy(slot.units).to(module.weight.device)
            target = torch.where(units >= 0, units + space.offsets[index], space.total_units)
            producers.append((module, target))
    return producers


def filters_of(module: nn.Module) -> Tensor:
    """Filters as rows: (C_out, fan_in)."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    out_dim, _ = kinds.channel_dims(module)
    return weight.transpose(0, out_dim).flatten(1)


@torch.no_grad()
def filter_norms(producers: Producers, total_units: int) -> Tensor:
    """L2 norm of each unit's filters relative to its layer's mean, summed over producers:
    (total_units,), in float32."""
    total = torch.zeros(total_units + 1, device=producers[0][1].device, dtype=torch.float32)
    for module, target in producers:
        norm = filters_of(module).to(total.dtype).norm(dim=1)
        total.index_add_(0, target, norm / norm.mean().clamp_min(1e-12))
    return total[:-1]
