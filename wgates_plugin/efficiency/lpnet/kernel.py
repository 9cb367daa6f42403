"""How alike a layer's latencies are at two pairs of widths: the covariance of `layer_times.py`.

Latency is smooth in a layer's input and output channels where the runtime's blocks are full, steps up
where a new block begins, and falls onto a slower kernel where a width is no multiple of what the fast
one needs. A layer is therefore described by its two widths, by the widths rounded up to blocks, and by
which powers of two divide them:

    k(x, x') = v exp(-|d / l|^2 / 2 - sum_m t_m [divides_m differs]) + sum_i a_i phi_i(x) phi_i(x')

with d the differences of widths and rounded widths and phi = (1, in, out, in * out).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.counts import LayerShapes

BLOCKS = (8, 16, 32)
"""Block sizes that runtimes round channels up to."""

MODULI = (2, 4, 8, 16, 32)
"""Divisors that runtimes choose kernels by."""


@dataclass(frozen=True)
class LayerInputs:
    """What the kernel sees of B networks, for L layers each.

    Attributes:
        places: (L, B, D) widths in and out, plain and rounded up, over the full width.
        divided: (L, B, M) 1.0 where a modulus divides a width.
    """

    places: Tensor
    divided: Tensor

    @property
    def trend(self) -> Tensor:
        """(L, B, 4): 1, in, out, in * out."""
        ins, outs = self.places[..., 0], self.places[..., 1]
        return torch.stack([torch.ones_like(ins), ins, outs, ins * outs], dim=-1)

    @property
    def plain(self) -> Tensor:
        """(B, 2 L): the widths alone, of all layers."""
        return self.places[..., :2].transpose(0, 1).flatten(1)

    def __getitem__(self, rows: Tensor) -> LayerInputs:
        return LayerInputs(self.places[:, rows], self.divided[:, rows])


class LayerView:
    """Widths (B, G) -> `LayerInputs` of the layers with a weight."""

    def __init__(self, space: ChannelSpace) -> None:
        self._shapes = LayerShapes(space)
        self._weighted = torch.tensor([layer.kernel > 0 for layer in space.layers])
        weighted = [layer for layer in space.layers if layer.kernel > 0]
        self._full_in = torch.tensor([layer.in_channels for layer in weighted]).double()
        self._full_out = torch.tensor([layer.out_channels for layer in weighted]).double()
        self._positions = torch.tensor([layer.positions for layer in weighted]).double()
        self.count = len(weighted)

    def __call__(self, widths: Tensor) -> LayerInputs:
        ins, outs = self._channels(widths)
        places = [ins / self._full_in, outs / self._full_out]
        for block in BLOCKS:
            places.append(_rounded_up(ins, block) / self._full_in)
            places.append(_rounded_up(outs, block) / self._full_out)
        divided = [(side % modulus == 0).double() for modulus in MODULI for side in (ins, outs)]
        return LayerInputs(
            torch.stack(places, dim=-1).transpose(0, 1),
            torch.stack(divided, dim=-1).transpose(0, 1),
        )

    def work(self, widths: Tensor) -> Tensor:
        """(B, L): each layer's share of the untouched network's work, half MACs, half traffic."""
        full = torch.tensor(self._shapes.space.full_widths, dtype=torch.float64)
        macs = self._shapes.macs_per_layer(widths)[..., self._weighted]
        all_macs = self._shapes.macs_per_layer(full)[..., self._weighted].sum()
        return 0.5 * macs / all_macs + 0.5 * self._traffic(widths) / self._traffic(full).sum()

    def _traffic(self, widths: Tensor) -> Tensor:
        ins, outs = self._channels(widths)
        return (ins + outs) * self._positions

    def _channels(self, widths: Tensor) -> tuple[Tensor, Tensor]:
        weighted = self._weighted
        return self._shapes.inputs(widths)[..., weighted], self._shapes.outputs(widths)[
            ..., weighted
        ]


def _rounded_up(widths: Tensor, block: int) -> Tensor:
    """To multiples of `block`, with the derivative of the identity: a step has none of use."""
    return widths + (torch.ceil(widths / block) * block - widths).detach()


@dataclass(frozen=True)
class LayerKernel:
    """Parameters as logarithms; the first dimension is L, or 1 where all layers share them.

    Attributes:
        reach: (L, D) length scales l. steps: (L, M) weights t of the divisors.
        variance: (L,) v. trend: (L, 4) a.
        useful: (L, M) divisors that tell the measured widths apart; the others say nothing.
    """

    reach: Tensor
    steps: Tensor
    variance: Tensor
    trend: Tensor
    useful: Tensor

    @classmethod
    def initial(cls, inputs: LayerInputs, *, shared: bool) -> LayerKernel:
        layers, _, places = inputs.places.shape
        rows = 1 if shared else layers
        divided = inputs.divided
        start = torch.zeros(rows, 1, dtype=torch.float64)
        return cls(
            reach=(start - 0.7).expand(rows, places).clone(),
            steps=(start - 2.3).expand(rows, divided.shape[-1]).clone(),
            variance=(start[:, 0] - 2.3).clone(),
            trend=(start - 1.2).expand(rows, 4).clone(),
            useful=(divided.amax(1) != divided.amin(1)).double(),
        )

    @property
    def learned(self) -> list[Tensor]:
        return [self.reach, self.steps, self.variance, self.trend]

    def __call__(self, first: LayerInputs, second: LayerInputs) -> Tensor:
        """Covariances (L, B, N) of first's B networks with second's N."""
        scale = torch.exp(-self.reach)[:, None, :]
        weights = (torch.exp(self.steps) * self.useful)[:, None, :]
        mine, theirs = first.places * scale, second.places * scale
        far = (
            mine.square().sum(-1)[:, :, None]
            + theirs.square().sum(-1)[:, None, :]
            - 2.0 * mine @ theirs.transpose(1, 2)
        ).clamp_min(0.0)
        weighted = first.divided * weights
        differ = (
            weighted.sum(-1)[:, :, None]
            + (second.divided * weights).sum(-1)[:, None, :]
            - 2.0 * weighted @ second.divided.transpose(1, 2)
        )
        smooth = torch.exp(self.variance)[:, None, None] * torch.exp(-0.5 * far - differ)
        return smooth + (first.trend * torch.exp(self.trend)[:, None, :]) @ second.trend.transpose(
            1, 2
        )

    def own(self, inputs: LayerInputs) -> Tensor:
        """Each network's covariance with itself (L, B)."""
        lift = (inputs.trend.square() * torch.exp(self.trend)[:, None, :]).sum(-1)
        return torch.exp(self.variance)[:, None] + lift

    def far_from_start(self) -> Tensor:
        """Penalty (scalar) on parameters away from their start: few measurements move few of them."""
        return 0.05 * (self.reach + 0.7).square().sum() + 0.025 * (self.steps + 2.3).square().sum()
