"""Latency measurements as LPNet learns from them."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.errors import MeasurementError

logger = logging.getLogger("wgates_plugin")

LEAST_SAMPLES = 8
"""Fewer measurements than this fit no LPNet."""

_LEAST_COVERED = 0.5
"""Share of the latency that a profile's layers must add up to. Complete ones do to about all of it,
at the least two thirds; and to more where profiling slows the runtime down, which LPNet scales."""

_LEAST_PROFILED = 5


@dataclass(frozen=True)
class LatencyData:
    """Widths (N, G), their latencies (N,) in ms, and what single layers took.

    Attributes:
        layers_ms: (N, L) ms over the layers with a weight, in the order of the space; rows of NaN
            where a measurement came without a profile, or with one of too few layers.
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
            layers_ms: per measurement, layer name -> ms; None or empty where it is not known. Layers
                that a profile leaves out took no time of their own; one whose layers together
                account for less than half of the latency is logged and not used.

        Raises:
            MeasurementError: too few or useless measurements, or a profile of another network.
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
        for number, seen in enumerate(profiles):
            if seen and not set(seen) & set(names):
                raise MeasurementError(
                    f"LPNet: layer profile {number} names `{next(iter(seen))}` and no layer of this "
                    f"network (such as `{names[0]}`); give profiles by the network's layer names"
                )
        rows = [[seen.get(n, 0.0) for n in names] if seen else unknown for seen in profiles]
        _check(space, inputs, targets)
        layers = torch.tensor(rows, dtype=torch.float64)
        return cls(inputs, targets, _without_few(_without_partial(layers, targets)))

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


def grid_of(space: ChannelSpace, rows: Sequence[Sequence[int]]) -> int | None:
    """`common_multiple` of these widths (N, G)."""
    return common_multiple(
        space, [{widths[index] for widths in rows} for index in range(len(space.groups))]
    )


def common_multiple(space: ChannelSpace, widths: Sequence[Collection[int]]) -> int | None:
    """The coarsest grid that all `widths` of every group lie on; None where no group is cut.

    A group whose channels go in ties is on any grid that divides its ties. Full widths say nothing
    about the grid, and neither does a group that is always at its cap: that may be off the grid.
    """
    cut = {
        width
        for group, seen in zip(space.groups, widths, strict=True)
        for width in seen
        if width < group.channels and set(seen) != {group.cap}
    }
    return math.gcd(*cut) if cut else None


def folds(widths: Tensor, *, parts: int, seed: int) -> list[Tensor]:
    """A random partition of the rows of `widths` (N, G) into at most `parts` parts.

    Repeated measurements of one network stay together: a fit that saw one of them saw the other.
    """
    _, network = widths.unique(dim=0, return_inverse=True)
    count = int(network.max()) + 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return [torch.isin(network, part).nonzero()[:, 0] for part in order.chunk(min(parts, count))]


def _without_few(layers_ms: Tensor) -> Tensor:
    """`layers_ms` (N, L), of which so few rows are profiles that they say nothing, without any."""
    profiled = layers_ms.isfinite().all(1)
    if int(profiled.sum()) >= min(_LEAST_PROFILED, len(profiled)):
        return layers_ms
    return torch.full_like(layers_ms, torch.nan)


def _without_partial(layers: Tensor, targets: Tensor) -> Tensor:
    """Layers (N, L) with rows of NaN where they leave out most of the latency (N,).

    A zero for a layer that the runtime did not name would teach that the layer is free.
    """
    partial = layers.sum(dim=-1) < _LEAST_COVERED * targets  # never where there is no profile
    if partial.any():
        logger.warning(
            "LPNet: %d of %d layer profiles account for less than %.0f %% of the latency and are not "
            "used; the runtime does not name all layers",
            int(partial.sum()), int(torch.isfinite(layers).all(dim=-1).sum()), 100 * _LEAST_COVERED,
        )  # fmt: skip
    return layers.masked_fill(partial[:, None], float("nan"))


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


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, named without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
