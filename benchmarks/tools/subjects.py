"""Networks at ImageNet size, with random weights and warm BatchNorm statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIDE = 224


def images(batch: int = 1, *, side: int = SIDE, seed: int = 0) -> Tensor:
    """Random images (batch, 3, side, side)."""
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def torchvision_network(name: str, *, seed: int, warm: bool = True) -> nn.Module:
    """A torchvision classifier in eval mode; the same seed gives the same weights.

    Args:
        warm: run two training batches first. Fresh BatchNorm statistics let the activations of a
            deep random network die out, and comparing zeros with zeros proves nothing.
    """
    from wgates_plugin.catalogue.torchvision_import import import_torchvision

    import_torchvision()
    from torchvision import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = getattr(models, name)(weights=None)
        if warm:
            settle_batchnorm(network, images(4, side=96, seed=seed + 1))
    return network.eval()


@torch.no_grad()
def settle_batchnorm(network: nn.Module, batch: Tensor) -> None:
    """Set BatchNorm statistics to those of `batch`."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    usual = [norm.momentum for norm in norms]
    network.train()
    for norm in norms:
        norm.momentum = None  # a cumulative average, exact after one pass
    network(batch)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    network.eval()
