"""Latency predictors to compare LPNet with. Each learns from `LatencyData` and returns widths -> ms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.counts import MacsModel
from wgates_plugin.efficiency.lpnet.data import LatencyData
from wgates_plugin.efficiency.lpnet.kernel import LayerView
from wgates_plugin.efficiency.lpnet.layers import LayersStructure
from wgates_plugin.efficiency.lpnet.mlp import MlpStructure

Predictor = Callable[[Tensor], Tensor]


def paper_mlp(space: ChannelSpace, data: LatencyData, seed: int) -> Predictor:
    """W-Gates' own LPNet: an MLP on the widths."""
    return MlpStructure.fit(space, data, seed=seed).predict


def macs_line(space: ChannelSpace, data: LatencyData, seed: int) -> Predictor:
    """A line through MACs, by least squares of the relative error."""
    macs = MacsModel(space)
    unit = float(macs(torch.tensor(space.full_widths)))

    def terms(widths: Tensor) -> Tensor:
        return torch.stack([macs(widths) / unit, torch.ones(len(widths)).double()], dim=-1)

    weighted = terms(data.widths) / data.latency_ms[:, None]
    slope = torch.linalg.lstsq(weighted, torch.ones(len(data), 1).double()).solution[:, 0]
    return lambda widths: terms(widths) @ slope


def gradient_boosting(space: ChannelSpace, data: LatencyData, seed: int) -> Predictor:
    """Boosted trees on the widths, of log latency."""
    from sklearn.ensemble import GradientBoostingRegressor

    trees = GradientBoostingRegressor(
        n_estimators=500,
        learning_rate=0.05,
        max_depth=3,
        subsample=0.7,
        max_features=0.5,
        random_state=seed,
    )
    trees.fit(data.widths.numpy(), data.latency_ms.log().numpy())
    return lambda widths: torch.from_numpy(trees.predict(widths.numpy())).exp()


def lookup_table(space: ChannelSpace, data: LatencyData, seed: int) -> Predictor:
    """A table of profiled layer times, (in, out) -> ms, summed and scaled to the measured totals.

    A pair that is not in a layer's table is read off the pair nearest in MACs and widths.
    """
    view = LayerView(space)
    known = data[data.profiled]
    pairs = view(known.widths).places[..., :2]
    pairs = torch.cat([pairs, pairs.prod(-1, keepdim=True)], dim=-1)

    def total(widths: Tensor) -> Tensor:
        wanted = view(widths).places[..., :2]
        wanted = torch.cat([wanted, wanted.prod(-1, keepdim=True)], dim=-1)
        distance = torch.cdist(wanted, pairs)  # (L, B, N)
        nearest = distance <= distance.amin(-1, keepdim=True) + 1e-9
        times = known.layers_ms.T[:, None, :].expand_as(distance)
        mean = (times * nearest).sum(-1) / nearest.sum(-1)
        return mean.sum(0)

    ratio = (known.latency_ms / known.layers_ms.sum(-1)).median()
    return lambda widths: ratio * total(widths)


def without_profiles(space: ChannelSpace, data: LatencyData, seed: int) -> Predictor:
    """LPNet's own structure, learning from totals alone."""
    blind = LatencyData(data.widths, data.latency_ms, torch.full_like(data.layers_ms, torch.nan))
    return LayersStructure.fit(space, blind, seed=seed).predict


RIVALS: dict[str, Callable[[ChannelSpace, LatencyData, int], Predictor]] = {
    "lpnet-mlp": paper_mlp,
    "macs-line": macs_line,
    "gradient-boosting": gradient_boosting,
    "lookup-table": lookup_table,
}

ABLATIONS: dict[str, Callable[[ChannelSpace, LatencyData, int], Predictor]] = {
    "ours-without-profiles": without_profiles,
}
