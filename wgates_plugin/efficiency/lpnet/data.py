"""Latency measurements as LPNet learns from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.errors import MeasurementError

LEAST_SAMPLES = 8
"""Fewer measurements than this fit no LPNet."""


@dataclass(frozen=True)
class LatencyData:
    """Widths (N, G), their latencies (N,) in ms, and what single layers took.

    Attributes:
        layers_ms: (N, L) ms over the layers with a weight, in the order of the space; rows of NaN
            where a measurement came without a profile.
    """

    widths: Tensor
    latency_ms: Tensor
    layers_ms: Tensor

    @classmethod
    def of(
        cls,
        space: ChannelSpace,
        widths: Sequence[Sequence[int]] | Tensor,
        latencies_ms: Sequence[float] | Tensor,
        layers_ms: Sequence[Mapping[str, float] | None] | None = None,
    ) -> LatencyData:
        """Checked tensors of plain values.

        Args:
            layers_ms: per measurement, layer name -> ms; None or empty where it is not known.

        Raises:
            MeasurementError: too few or useless measurements.
        """
        inputs = torch.as_tensor(widths, dtype=torch.float64)
        targets = torch.as_tensor(latencies_ms, dtype=torch.float64)
        names = weighted_names(space)
        profiles = layers_ms if layers_ms is not None else [None] * len(targets)
        if len(profiles) != len(targets):
            raise MeasurementError(
                f"LPNet: {len(profiles)} layer profiles for {len(targets)} measurements"
            )
        unknown = [float("nan")] * len(names)
        rows = [[seen.get(n, 0.0) for n in names] if seen else unknown for seen in profiles]
        _check(space, inputs, targets)
        return cls(inputs, targets, torch.tensor(rows, dtype=torch.float64))

    def __len__(self) -> int:
        return len(self.latency_ms)

    def __getitem__(self, rows: Tensor) -> LatencyData:
        return LatencyData(self.widths[rows], self.latency_ms[rows], self.layers_ms[rows])

    @property
    def profiled(self) -> Tensor:
        """Which measurements know their layers: booleans (N,)."""
        return torch.isfinite(self.layers_ms).all(dim=-1)


def weighted_names(space: ChannelSpace) -> list[str]:
    """Names of the layers with a weight: those that latency is charged to."""
    return [layer.name for layer in space.layers if layer.kernel > 0]


def folds(count: int, *, parts: int, seed: int) -> list[Tensor]:
    """A random partition of `count` row numbers into `parts` nearly equal parts."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return [part.sort().values for part in order.chunk(parts)]


def _check(space: ChannelSpace, inputs: Tensor, targets: Tensor) -> None:
    if inputs.dim() != 2 or inputs.shape[1] != len(space.groups):
        raise MeasurementError(
            f"LPNet: widths of shape {tuple(inputs.shape)}, needed (N, {len(space.groups)})"
        )
    if len(targets) < LEAST_SAMPLES or len(targets) != len(inputs):
        raise MeasurementError(
            f"LPNet: {len(targets)} measurements; at least {LEAST_SAMPLES} are needed"
        )
    if not (torch.isfinite(targets).all() and (targets > 0).all()):
        raise MeasurementError("LPNet: a measured latency is not a positive finite number")
    if (inputs == inputs[0]).all():
        raise MeasurementError(
            "LPNet: all measurements are of the same widths; sample different ones"
        )
    if (targets == targets[0]).all():
        raise MeasurementError(
            f"LPNet: all {len(targets)} measurements say {float(targets[0]):.6g} ms; the clock or "
            "the program that reports times does not react to the network, check it"
        )
