"""What the sum of layers does not say of a network's latency: the covariance of r in `layers.py`.

Corrections to single layers (their covariances summed), a factor per layer, a time that is always
there, a factor on the whole, and a smooth function of all widths.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from wgates_plugin.efficiency.lpnet.kernel import LayerInputs


@dataclass(frozen=True)
class Parts:
    """What the covariance of B networks with N others is put together from, (B, N) each.

    Attributes:
        layers: covariances of the layers, summed. factors: products of layer times, summed.
        whole: products of the sums of layers. apart: mean squared distance of the widths.
    """

    layers: Tensor
    factors: Tensor
    whole: Tensor
    apart: Tensor

    @classmethod
    def between(
        cls,
        inputs: LayerInputs,
        layers: Tensor,
        others: LayerInputs,
        other_layers: Tensor,
        *,
        covariances: Tensor,
        scale: Tensor,
    ) -> Parts:
        """Of networks with these inputs and layer times, (B, L) and (N, L) ms.

        Args:
            covariances: of their layers, (L, B, N), or (1, B, N) where all layers share them.
            scale: (L,) ms, what these are relative to.
        """
        every = covariances.expand(len(scale), -1, -1)
        plain = others.plain
        return cls(
            layers=torch.einsum("lbn,l->bn", every, scale.square()),
            factors=layers @ other_layers.T,
            whole=layers.sum(-1)[:, None] * other_layers.sum(-1)[None, :],
            apart=torch.cdist(inputs.plain, plain).square() / plain.shape[-1],
        )


@dataclass(frozen=True)
class Remainder:
    """Logarithms of the variances.

    Attributes:
        layers: of corrections to single layers, over the layers' own. factors: of a factor per
        layer. constant: of a time that is always there. whole: of a factor on the whole.
        smooth, reach: of a smooth function of all widths, and its squared length scale.
        noise: of the measurements, relative.
    """

    layers: Tensor
    factors: Tensor
    constant: Tensor
    whole: Tensor
    smooth: Tensor
    reach: Tensor
    noise: Tensor

    @classmethod
    def initial(cls) -> Remainder:
        start = (-6.0, -6.0, -6.0, -6.0, -6.0, -2.0, -8.0)
        return cls(*(torch.tensor(value, dtype=torch.float64) for value in start))

    @property
    def learned(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def __call__(self, parts: Parts, unit: Tensor) -> Tensor:
        """Covariances (B, N); `unit` is a usual time, ms."""
        near = torch.exp(-0.5 * parts.apart * torch.exp(-self.reach))
        return (
            torch.exp(self.layers) * parts.layers
            + torch.exp(self.factors) * parts.factors
            + torch.exp(self.constant) * unit.square()
            + torch.exp(self.whole) * parts.whole
            + torch.exp(self.smooth) * parts.whole * near
        )

    def own(self, one_by_one: Tensor, layers: Tensor, unit: Tensor) -> Tensor:
        """Each network's covariance with itself (B,).

        Args:
            one_by_one: of its layers, summed (B,). layers: their times (B, L), ms.
        """
        total = layers.sum(-1).square()
        return (
            torch.exp(self.layers) * one_by_one
            + torch.exp(self.factors) * layers.square().sum(-1)
            + torch.exp(self.constant) * unit.square()
            + (torch.exp(self.whole) + torch.exp(self.smooth)) * total
        )

    def noise_of(self, layers: Tensor) -> Tensor:
        """(B,) variance of a measurement of networks with these layer times (B, L)."""
        return torch.exp(self.noise) * layers.sum(-1).square() + 1e-12
