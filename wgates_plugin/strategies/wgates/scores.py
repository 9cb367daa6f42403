"""Scores of channels from the weights of their filters, and where they start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.strategies.filters import filter_norms, filters_of, producers_of
from wgates_plugin.strategies.wgates.functions import squash


@contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Mixed precision off within, on the CPU and on `device`.

    A step moves a score by about the learning rate, which half precision would round away.
    """
    with torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False):
        yield


class WeightScores(nn.Module):
    """Scores of all units from the producers' weights: `() -> (total_units,)`.

    Called with offsets (total_units,), it gives the scores as they would be with these.

    For a producer with flattened filters `W* (C_out, fan_in)` the score of filter c is
    `standardise(W*)[c] @ theta / fan_in`, with one learnable `theta (fan_in,)` per producer. Coupled
    producers add up, and a fixed offset per unit says where training starts (both ours): a score
    that starts at the filter's rank cannot close a whole layer in one step. All of it is
    computed in float32, under mixed precision and for weights of any precision.
    """

    def __init__(self, network: nn.Module, space: ChannelSpace) -> None:
        super().__init__()
        self.space = space
        self._producers = producers_of(network, space)
        self.thetas = nn.ParameterList()
        for module, target in self._producers:
            fan_in = filters_of(module).shape[1]
            zeros = torch.zeros(fan_in, device=target.device, dtype=torch.float32)
            self.thetas.append(nn.Parameter(zeros))
        device = self.thetas[0].device
        options = {"device": device, "dtype": torch.float32}
        self.register_buffer("offset", torch.full((space.total_units,), 0.25, **options))
        ties = [float(group.ties) for group in space.groups for _ in range(group.units)]
        self.register_buffer("ties", torch.tensor(ties, **options))
        self.offset: Tensor
        self.ties: Tensor

    def forward(self, offset: Tensor | None = None) -> Tensor:
        return squash(self.raw() + (self.offset if offset is None else offset))

    def raw(self) -> Tensor:
        """What the weights add to the offset, before squashing: (total_units,)."""
        with no_autocast(self.offset.device):
            total = self.offset.new_zeros(self.space.total_units + 1)  # last: of no group
            for (module, target), theta in zip(self._producers, self.thetas, strict=True):
                flat = filters_of(module).to(theta.dtype)
                total = total.index_add(0, target, filter_scores(flat, theta))
            return total[:-1] / self.ties

    def norms(self) -> Tensor:
        return filter_norms(self._producers, self.space.total_units)


class FreeScores(nn.Module):
    """One learnable score per unit, for comparison (ours): `() -> (total_units,)`.

    What the paper's central claim is held against: the same offsets, squash and optimizer, but no
    weights behind the scores. `step_size (total_units,)` scales them so that an optimizer step moves
    a score as far as it would have moved the weights' (see `matched_step_size`).
    """

    def __init__(self, network: nn.Module, space: ChannelSpace) -> None:
        super().__init__()
        weights = WeightScores(network, space)
        self.norms: Callable[[], Tensor] = weights.norms
        self.free = nn.Parameter(torch.zeros_like(weights.offset))
        self.register_buffer("offset", weights.offset.clone())
        self.register_buffer("step_size", matched_step_size(weights))
        self.offset: Tensor
        self.step_size: Tensor

    def forward(self, offset: Tensor | None = None) -> Tensor:
        return squash(self.free * self.step_size + (self.offset if offset is None else offset))


SCORES: dict[str, type[WeightScores] | type[FreeScores]] = {
    "weights": WeightScores,
    "free": FreeScores,
}
"""`WGatesSettings.scores` -> module."""


def matched_step_size(weights: WeightScores, *, steps: int = 30) -> Tensor:
    """How far Adam moves a weight-dependent score against a free one, (total_units,).

    Filters share their `theta`, so that a step that suits one takes another along: of C filters with
    unlike gradients each moves about `1 / sqrt(C)` as far as a score of its own would. Both kinds
    are stepped here on the same white noise, which is most of what single batches send to gates, and
    their mean movements over steps and units of each group are divided. Under a gradient that
    never changes the free ones then move up to a third further: the doubt is settled in their favour.

    The thetas of `weights` are used up.
    """
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same on every device and rank
    units = torch.tensor([group.units for group in weights.space.groups])
    free = torch.zeros_like(weights.offset)
    thetas = list(weights.thetas)
    optimizer = torch.optim.Adam(
        [free, *thetas], lr=1.0
    )  # scores are linear in both: any rate does
    moved, moved_free = torch.zeros_like(free), torch.zeros_like(free)
    before, before_free = weights.raw().detach(), free.clone()
    for _ in range(steps):
        noise = torch.randn(len(free), generator=generator).to(free)
        # Not `backward`, which would leave gradients on the network's weights.
        with torch.enable_grad():
            gradients = torch.autograd.grad(weights.raw(), thetas, grad_outputs=noise)
        for parameter, gradient in zip([free, *thetas], [noise, *gradients], strict=True):
            parameter.grad = gradient
        optimizer.step()
        after = weights.raw().detach()
        moved += (after - before).abs()
        moved_free += (free - before_free).abs()
        before, before_free = after, free.clone()
    sums = [
        torch.stack([part.sum() for part in tensor.split(units.tolist())])
        for tensor in (moved, moved_free)
    ]
    return (sums[0] / sums[1]).repeat_interleave(units.to(free.device))


def filter_scores(flat: Tensor, theta: Tensor) -> Tensor:
    """`standardise(W*) @ theta / fan_in`, without forming the standardised matrix.

    Standardising and dividing by fan-in (ours) make one optimizer step move the score of a
    72-weight filter and of a 4608-weight filter alike.
    """
    with torch.no_grad():  # statistics are taken as given, as a detached normalisation would
        mean = flat.mean()
        # A norm and a mean are many times faster than torch.std_mean.
        variance = torch.linalg.vector_norm(flat).square() / flat.numel() - mean.square()
        spread = variance.clamp_min(0).sqrt().clamp_min(1e-12)
    projected = flat @ theta  # (C_out, fan_in) @ (fan_in,) -> (C_out,)
    return (projected - mean * theta.sum()) / (spread * theta.numel())


def starting_offsets(
    space: ChannelSpace, merits: Tensor, widths: Sequence[int], *, grid: int, spread: float
) -> Tensor:
    """Offsets (total_units,) that open `widths` (G,) channels of largest merit (ours).

    Scores are equally spaced by rank, so that as many channels stand close to the threshold in every
    layer. The threshold sits half a step inside the open channels: with widths rounded up to the
    grid, a group then has equally far to go to its next wider and its next narrower step.
    """
    offsets = torch.empty(space.total_units)
    for index, (group, width) in enumerate(zip(space.groups, widths, strict=True)):
        where = space.unit_slice(index)
        ranks = torch.argsort(torch.argsort(merits[where].cpu(), stable=True), stable=True)
        # The step below may be shorter than the grid: a full width need not lie on it.
        narrower = max((w for w in group.allowed_widths(grid) if w < width), default=0)
        slack = (width - narrower) // group.ties // 2 if grid > 1 else 0
        threshold = 1.0 - (width // group.ties - slack) / group.units
        quantiles = (ranks + 0.5) / group.units
        offsets[where] = spread * (quantiles - threshold) / max(threshold, 1 - threshold)
    return offsets
