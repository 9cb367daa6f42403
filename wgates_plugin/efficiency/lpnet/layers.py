"""LPNet's own structure: latency as a sum of layers, each a Gaussian process in its widths.

    T(w) = c sum_l f_l(in_l, out_l) + r(w) + noise

Where the runtime's profiler told what each layer took, every f_l is learned from its own measurements:
one profiled network teaches all layers at once, which is why tens of networks do what otherwise takes
thousands. Without profiles f_l is the layer's share of the work. The remainder r is learned from the
measured totals: the layers' corrections (their covariance summed), a factor per layer, and a smooth
function of all widths. Parameters maximise the marginal likelihood; predictions are the posterior mean,
smooth in the widths but for steps at multiples that matter to the runtime.

Additive latency models are common (nn-Meter, arXiv 2104.09757, sums kernels; HALP, arXiv 2110.10811,
sums layer look-ups); the covariance and the two stages are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.lpnet.data import LatencyData
from wgates_plugin.efficiency.lpnet.gaussian import (
    at_most,
    descend,
    root_of,
    some,
    unlikelihood,
)
from wgates_plugin.efficiency.lpnet.kernel import LayerInputs, LayerKernel, LayerView
from wgates_plugin.errors import MeasurementError

MOST_ROWS = 800
"""Measurements that a fit uses at most; the cost grows with their cube."""

_PROFILED_ROWS, _TOTAL_ROWS = 48, 200
"""Measurements that the parameters are learned from, with profiles and without."""

_LAYER_STEPS = 40
_RELEARNED_ROWS = 160
"""Up to here cross-validation learns parameters anew: few rows bend them to themselves."""

_TOTAL_STEPS = 80
_TOTAL_STEPS_SHARED = 60
_LEAST_TIME = 0.02
"""Layer noise grows with the time, from this share of the layer's longest time on."""


@dataclass(frozen=True)
class Remainder:
    """Logarithms of the variances of what the sum of layers does not say.

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


@dataclass(frozen=True)
class Parts:
    """What the remainder's covariance is put together from, (B, N) each.

    Attributes:
        layers: covariances of the layers, summed. factors: products of layer times, summed.
        whole: products of the sums of layers. apart: mean squared distance of the widths.
    """

    layers: Tensor
    factors: Tensor
    whole: Tensor
    apart: Tensor


class LayersStructure:
    """Learns from `LatencyData` and predicts; immutable once conditioned.

    Args:
        prior: a structure learned on another runtime or setting of the same network. Its layers,
            each times a factor, are what this one starts from.
    """

    name = "layers"

    kernel: LayerKernel
    remainder: Remainder
    layer_noise: Tensor
    scale: Tensor
    base: Tensor

    data: LatencyData
    inputs: LayerInputs
    data_layers: Tensor
    layer_weights: Tensor
    ratio: Tensor
    root: Tensor
    total_weights: Tensor
    least_ms: float

    def __init__(
        self, space: ChannelSpace, prior: LayersStructure | None = None, *, seed: int = 0
    ) -> None:
        self.space, self.prior, self.seed = space, prior, seed
        self.view = LayerView(space)

    @classmethod
    def fit(
        cls,
        space: ChannelSpace,
        data: LatencyData,
        *,
        seed: int,
        prior: LayersStructure | None = None,
    ) -> LayersStructure:
        """Parameters by marginal likelihood, then conditioned on all of `data`."""
        self = cls(space, prior, seed=seed)
        data = at_most(data, MOST_ROWS)
        inputs = self.view(data.widths)
        known = data.profiled.nonzero()[:, 0]
        self.kernel = LayerKernel.initial(inputs, shared=not len(known))
        self.layer_noise = torch.full((self.view.count,), -3.5, dtype=torch.float64)
        self.remainder = Remainder.initial()
        self._scale_from(data, inputs)
        if len(known):
            few = some(known, _PROFILED_ROWS, seed)
            self._learn_layers(data[few], inputs[few])
            self._learn_totals(data, inputs, shared=False)
        else:
            few = some(torch.arange(len(data)), _TOTAL_ROWS, seed)
            self._learn_totals(data[few], inputs[few], shared=True)
        return self.conditioned(data)

    def conditioned(self, data: LatencyData) -> LayersStructure:
        """The same parameters, knowing `data` and nothing else.

        Raises:
            MeasurementError: all that this one knows of layers are their profiles, and `data` has none.
        """
        if not self._copes_with(data):
            raise MeasurementError(
                "LPNet: it was fitted with layers' times and knows nothing without them; give "
                "`layers_ms` with the measurements, or fit anew"
            )
        twin = self._copy()
        twin._condition(at_most(data, MOST_ROWS))
        return twin

    def predict(self, widths: Tensor) -> Tensor:
        """Widths (..., G) -> ms (...)."""
        flat, shape = _flat(widths)
        inputs = self.view(flat)
        covariances = self.kernel(inputs, self.inputs)
        layers = self._layers(flat, covariances)
        total = self.ratio * layers.sum(-1)
        parts = self._parts(inputs, layers, covariances)
        total = total + self._covariance(parts) @ self.total_weights
        return total.clamp_min(self.least_ms).reshape(shape)

    def layer_ms(self, widths: Tensor) -> Tensor:
        """Widths (..., G) -> ms of each layer with a weight (..., L), before the remainder."""
        flat, shape = _flat(widths)
        layers = self._layers(flat, self.kernel(self.view(flat), self.inputs))
        return (self.ratio * layers).reshape(*shape, -1)

    def deviation(self, widths: Tensor) -> Tensor:
        """Posterior standard deviation of one measurement: widths (..., G) -> ms (...)."""
        flat, shape = _flat(widths)
        inputs = self.view(flat)
        covariances = self.kernel(inputs, self.inputs)
        layers = self._layers(flat, covariances)
        cross = self._covariance(self._parts(inputs, layers, covariances))
        known = (cross * torch.cholesky_solve(cross.T, self.root).T).sum(-1)
        own = self._own(inputs, layers) + self._noise(layers)
        return (own - known).clamp_min(1e-4 * own).sqrt().reshape(shape)

    def without(self, data: LatencyData, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and deviation (N,) of each measurement, had its part of `data` not been seen."""
        mean, deviation = torch.empty(len(data)), torch.empty(len(data))
        mean, deviation = mean.double(), deviation.double()
        every = torch.arange(len(data))
        for part in parts:
            rest = every[~torch.isin(every, part)]
            partial = self._unaware_of(data.widths[part])._from(data, rest)
            mean[part] = partial.predict(data.widths[part])
            deviation[part] = partial.deviation(data.widths[part])
        return mean, deviation

    def _unaware_of(self, widths: Tensor) -> LayersStructure:
        """This structure with a prior that has not measured `widths` (N, G) either."""
        if self.prior is None:
            return self
        known, prior = self.prior.data, self.prior._unaware_of(widths)
        fresh = (known.widths[:, None] != widths[None]).any(-1).all(-1)
        if fresh.all() and prior is self.prior:
            return self
        twin = self._copy()
        twin.prior = prior.conditioned(known[fresh]) if prior._copes_with(known[fresh]) else None
        return twin

    def _copes_with(self, data: LatencyData) -> bool:
        """Whether these parameters say something of layers where `data` is all that is known."""
        return len(data) > 0 and bool(self.base.any() or data.profiled.any())

    def _from(self, every: LatencyData, rows: Tensor) -> LayersStructure:
        """What a fit of these rows alone would be; with many, the parameters of this one do, which was
        fitted to all, where both know profiles or neither does."""
        data = every[rows]
        alike = bool(data.profiled.any()) == bool(every.profiled.any())
        if alike and len(data) > _RELEARNED_ROWS:
            return self.conditioned(data)
        return self.fit(self.space, data, seed=self.seed, prior=self.prior)

    def layers_without(self, data: LatencyData, parts: Sequence[Tensor]) -> Tensor:
        """Layers (N, L) of each measurement in ms of the profile, had its part not been seen."""
        found = torch.empty(len(data), self.view.count, dtype=torch.float64)
        every = torch.arange(len(data))
        for part in parts:
            rest = every[~torch.isin(every, part)]
            partial = self._unaware_of(data.widths[part])._from(data, rest)
            found[part] = partial.layer_ms(data.widths[part]) / partial.ratio
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All that `from_tensors` needs."""
        found = {
            "widths": self.data.widths,
            "latency_ms": self.data.latency_ms,
            "layers_ms": self.data.layers_ms,
            "scale": self.scale,
            "base": self.base,
            "layer_noise": self.layer_noise,
            **{f"kernel.{f.name}": getattr(self.kernel, f.name) for f in fields(self.kernel)},
            **{f"remainder.{f.name}": getattr(self.remainder, f.name) for f in fields(Remainder)},
        }
        if self.prior is not None:
            found |= {f"prior.{name}": value for name, value in self.prior.tensors().items()}
        return found

    @classmethod
    def from_tensors(cls, space: ChannelSpace, tensors: Mapping[str, Tensor]) -> LayersStructure:
        """Raises KeyError, ValueError or RuntimeError where the tensors are not whole."""
        before = {
            name.removeprefix("prior."): value
            for name, value in tensors.items()
            if name.startswith("prior.")
        }
        self = cls(space, cls.from_tensors(space, before) if before else None)
        self.scale, self.base = tensors["scale"], tensors["base"]
        self.layer_noise = tensors["layer_noise"]
        self.kernel = LayerKernel(*(tensors[f"kernel.{f.name}"] for f in fields(LayerKernel)))
        self.remainder = Remainder(*(tensors[f"remainder.{f.name}"] for f in fields(Remainder)))
        self._condition(LatencyData(tensors["widths"], tensors["latency_ms"], tensors["layers_ms"]))
        return self

    # What a layer is before its profile is known: the prior's layer, or its share of the work.

    def _scale_from(self, data: LatencyData, inputs: LayerInputs) -> None:
        known = data.profiled
        if self.prior is not None:
            start = self.prior.layer_ms(data.widths)
        else:
            start = self.view.work(data.widths)
        if not known.any():
            self.base = (data.latency_ms / start.sum(-1)).median().expand(self.view.count).clone()
            full = torch.tensor(self.space.full_widths, dtype=torch.float64)
            whole = self.prior.layer_ms(full) if self.prior else self.view.work(full)
            self.scale = self.base * whole
            return
        labels = data.layers_ms[known]
        self.scale = labels.amax(0).clamp_min(1e-9)
        self.base = torch.zeros(self.view.count, dtype=torch.float64)
        if self.prior is not None:
            self.base = (labels / start[known].clamp_min(1e-9)).median(0).values

    def _start(self, widths: Tensor) -> Tensor:
        """(B, L) ms."""
        if not self.base.any():
            return torch.zeros(len(widths), self.view.count, dtype=torch.float64)
        start = self.view.work(widths) if self.prior is None else self.prior.layer_ms(widths)
        return start * self.base

    def _residuals(self, data: LatencyData) -> Tensor:
        """What profiles say beyond the start, (L, N) over the layers' scales."""
        return ((data.layers_ms - self._start(data.widths)) / self.scale).T

    def _label_noise(self, data: LatencyData) -> Tensor:
        size = (data.layers_ms / self.scale).T.abs() + _LEAST_TIME
        return (torch.exp(self.layer_noise)[:, None] * size).square() + 1e-8

    def _learn_layers(self, data: LatencyData, inputs: LayerInputs) -> None:
        wanted = self._residuals(data)
        parameters = [*self.kernel.learned, self.layer_noise]

        def loss() -> Tensor:
            covariance = self.kernel(inputs, inputs) + torch.diag_embed(self._label_noise(data))
            return unlikelihood(covariance, wanted) + self.kernel.far_from_start()

        descend(loss, parameters, _LAYER_STEPS)

    def _learn_totals(self, data: LatencyData, inputs: LayerInputs, *, shared: bool) -> None:
        """Shared kernel parameters are learned here too, having no profiles to learn from."""
        covariances = self.kernel(inputs, inputs)
        self._solve_layers(data, inputs, covariances)
        layers = self._layers(data.widths, covariances)
        self.ratio = (data.latency_ms / layers.sum(-1)).median()
        wanted = data.latency_ms - self.ratio * layers.sum(-1)
        self.data_layers, self.inputs = layers, inputs

        fixed = self._parts(inputs, layers, covariances)

        def loss() -> Tensor:
            parts = fixed
            if shared:
                parts = self._parts(inputs, layers, self.kernel(inputs, inputs))
            covariance = self._covariance(parts) + torch.diag(self._noise(layers))
            penalty = self.kernel.far_from_start() if shared else 0.0
            return unlikelihood(covariance, wanted) + penalty

        parameters = [*self.remainder.learned, *(self.kernel.learned if shared else [])]
        descend(loss, parameters, _TOTAL_STEPS_SHARED if shared else _TOTAL_STEPS)

    def _condition(self, data: LatencyData) -> None:
        self.data = data
        inputs = self.view(data.widths)
        covariances = self.kernel(inputs, inputs)
        self._solve_layers(data, inputs, covariances)
        layers = self._layers(data.widths, covariances)
        self.ratio = (data.latency_ms / layers.sum(-1)).median()
        self.inputs, self.data_layers = inputs, layers
        covariance = self._covariance(self._parts(inputs, layers, covariances))
        self.root = root_of(covariance + torch.diag(self._noise(layers)))
        left = data.latency_ms - self.ratio * layers.sum(-1)
        self.total_weights = torch.cholesky_solve(left[:, None], self.root)[:, 0]
        self.least_ms = 0.1 * float(data.latency_ms.min())

    def _solve_layers(self, data: LatencyData, inputs: LayerInputs, covariances: Tensor) -> None:
        """Weights (L, N) of the profiled measurements; zero for the others."""
        self.inputs = inputs
        self.layer_weights = torch.zeros(self.view.count, len(data), dtype=torch.float64)
        known = data.profiled.nonzero()[:, 0]
        if len(known):
            profiled = data[known]
            within = covariances[:, known][:, :, known] + torch.diag_embed(
                self._label_noise(profiled)
            )
            solved = torch.cholesky_solve(self._residuals(profiled)[..., None], root_of(within))
            self.layer_weights[:, known] = solved[..., 0]

    def _layers(self, widths: Tensor, covariances: Tensor) -> Tensor:
        """(B, L) ms of each layer."""
        learned = (covariances @ self.layer_weights[:, :, None])[..., 0].T
        return self._start(widths) + learned * self.scale

    # The remainder's covariance

    def _parts(self, inputs: LayerInputs, layers: Tensor, covariances: Tensor) -> Parts:
        """Of B networks with the N known measurements."""
        mine, theirs = layers.sum(-1), self.data_layers.sum(-1)
        every = covariances.expand(len(self.scale), -1, -1)
        plain = self.inputs.plain
        return Parts(
            layers=torch.einsum("lbn,l->bn", every, self.scale.square()),
            factors=layers @ self.data_layers.T,
            whole=mine[:, None] * theirs[None, :],
            apart=torch.cdist(inputs.plain, plain).square() / plain.shape[-1],
        )

    def _covariance(self, parts: Parts) -> Tensor:
        """(B, N) of what the sum of layers does not say, with the known measurements."""
        size = self.remainder
        unit = self.data_layers.sum(-1).mean()
        near = torch.exp(-0.5 * parts.apart * torch.exp(-size.reach))
        return (
            torch.exp(size.layers) * parts.layers
            + torch.exp(size.factors) * parts.factors
            + torch.exp(size.constant) * unit.square()
            + torch.exp(size.whole) * parts.whole
            + torch.exp(size.smooth) * parts.whole * near
        )

    def _own(self, inputs: LayerInputs, layers: Tensor) -> Tensor:
        """(B,) of the same."""
        part = self.remainder
        unit = self.data_layers.sum(-1).mean()
        total = layers.sum(-1).square()
        one_by_one = (self.kernel.own(inputs) * self.scale.square()[:, None]).sum(0)
        return (
            torch.exp(part.layers) * one_by_one
            + torch.exp(part.factors) * layers.square().sum(-1)
            + torch.exp(part.constant) * unit.square()
            + (torch.exp(part.whole) + torch.exp(part.smooth)) * total
        )

    def _noise(self, layers: Tensor) -> Tensor:
        """(B,) variance of a measurement of networks with these layer times."""
        return torch.exp(self.remainder.noise) * layers.sum(-1).square() + 1e-12

    def _copy(self) -> LayersStructure:
        twin = LayersStructure(self.space, self.prior, seed=self.seed)
        twin.kernel, twin.remainder = self.kernel, self.remainder
        twin.layer_noise, twin.scale, twin.base = self.layer_noise, self.scale, self.base
        return twin


def _flat(widths: Tensor) -> tuple[Tensor, torch.Size]:
    return widths.double().reshape(-1, widths.shape[-1]), widths.shape[:-1]
