"""LPNet's own structure: latency as a sum of layers, each a Gaussian process in its widths.

    T(w) = c sum_l f_l(in_l, out_l) + r(w) + noise

Where the runtime's profiler told what each layer took, every f_l is learned from its own measurements:
one profiled network teaches all layers at once, which is why tens of networks do what otherwise takes
thousands. Without profiles f_l is the layer's share of the work. The remainder r is learned from the
measured totals: the layers' corrections (their covariance summed), a factor per layer, and a smooth
function of all widths. Parameters maximise the marginal likelihood; predictions are the posterior mean,
smooth in the widths but for steps at multiples that matter to the runtime. f_l is in `layer_times.py`,
the covariance of r in `remainder.py`.

Additive latency models are common (nn-Meter, arXiv 2104.09757, sums kernels; HALP, arXiv 2110.10811,
sums layer look-ups); the covariance and the two stages are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.lpnet.data import LatencyData, below
from wgates_plugin.efficiency.lpnet.gaussian import (
    at_most,
    descend,
    root_of,
    some,
    unlikelihood,
)
from wgates_plugin.efficiency.lpnet.kernel import LayerInputs, LayerKernel, LayerView
from wgates_plugin.efficiency.lpnet.layer_process import LayerTimes
from wgates_plugin.efficiency.lpnet.remainder import Parts, Remainder
from wgates_plugin.errors import MeasurementError

MOST_ROWS = 800
"""Measurements that a fit uses at most; the cost grows with their cube."""

_PROFILED_ROWS, _TOTAL_ROWS = 48, 200
"""Measurements that the parameters are learned from, with profiles and without."""

_RELEARNED_ROWS = 160
"""Up to here cross-validation learns parameters anew: few rows bend them to themselves."""

_TOTAL_STEPS = 80
_TOTAL_STEPS_SHARED = 60


class LayersStructure:
    """Learns from `LatencyData` and predicts; immutable once conditioned.

    Args:
        prior: a structure learned on another runtime or setting of the same network. Its layers,
            each times a factor, are what this one starts from.
    """

    name = "layers"

    times: LayerTimes
    remainder: Remainder

    data: LatencyData
    data_layers: Tensor
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
        full = torch.tensor(space.full_widths, dtype=torch.float64)
        self.times = LayerTimes(self.view, prior.layer_ms if prior else None)
        self.times.begin(data, inputs, full)
        self.remainder = Remainder.initial()
        if len(known):
            few = some(known, _PROFILED_ROWS, seed)
            self.times.learn(data[few], inputs[few])
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
        twin = self._over(self.prior)
        twin._condition(at_most(data, MOST_ROWS))
        return twin

    def predict(self, widths: Tensor) -> Tensor:
        """Widths (..., G) -> ms (...)."""
        flat, shape = _flat(widths)
        inputs, covariances, layers = self._seen_at(flat)
        total = self.ratio * layers.sum(-1)
        parts = self._parts(inputs, layers, covariances)
        total = total + self.remainder(parts, self._unit) @ self.total_weights
        return total.clamp_min(self.least_ms).reshape(shape)

    def layer_ms(self, widths: Tensor) -> Tensor:
        """Widths (..., G) -> ms of each layer with a weight (..., L), before the remainder."""
        flat, shape = _flat(widths)
        _, _, layers = self._seen_at(flat)
        return (self.ratio * layers).reshape(*shape, -1)

    def deviation(self, widths: Tensor) -> Tensor:
        """Posterior standard deviation of one measurement: widths (..., G) -> ms (...)."""
        flat, shape = _flat(widths)
        inputs, covariances, layers = self._seen_at(flat)
        cross = self.remainder(self._parts(inputs, layers, covariances), self._unit)
        known = (cross * torch.cholesky_solve(cross.T, self.root).T).sum(-1)
        own = self.remainder.own(self.times.own(inputs), layers, self._unit)
        own = own + self.remainder.noise_of(layers)
        return (own - known).clamp_min(1e-4 * own).sqrt().reshape(shape)

    def without(self, data: LatencyData, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and deviation (N,) of each measurement, had its part of `data` not been seen."""
        mean, deviation = torch.empty(2, len(data), dtype=torch.float64)
        for part, partial in self._partial(data, parts):
            mean[part] = partial.predict(data.widths[part])
            deviation[part] = partial.deviation(data.widths[part])
        return mean, deviation

    def layers_without(self, data: LatencyData, parts: Sequence[Tensor]) -> Tensor:
        """Layers (N, L) of each measurement in ms of the profile, had its part not been seen."""
        found = torch.empty(len(data), self.view.count, dtype=torch.float64)
        for part, partial in self._partial(data, parts):
            found[part] = partial.layer_ms(data.widths[part]) / partial.ratio
        return found

    def _partial(
        self, data: LatencyData, parts: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, LayersStructure]]:
        """Each part of `data` (rows) with what had been learned without it."""
        every = torch.arange(len(data))
        for part in parts:
            rest = every[~torch.isin(every, part)]
            yield part, self._unaware_of(data.widths[part])._from(data, rest)

    def _unaware_of(self, widths: Tensor) -> LayersStructure:
        """This structure with a prior that has not measured `widths` (N, G) either."""
        if self.prior is None:
            return self
        known, prior = self.prior.data, self.prior._unaware_of(widths)
        fresh = (known.widths[:, None] != widths[None]).any(-1).all(-1)
        if fresh.all() and prior is self.prior:
            return self
        return self._over(
            prior.conditioned(known[fresh]) if prior._copes_with(known[fresh]) else None
        )

    def _copes_with(self, data: LatencyData) -> bool:
        """Whether these parameters say something of layers where `data` is all that is known."""
        return len(data) > 0 and bool(self.times.base.any() or data.profiled.any())

    def _from(self, every: LatencyData, rows: Tensor) -> LayersStructure:
        """What a fit of these rows alone would be; with many, the parameters of this one do, which was
        fitted to all, where both know profiles or neither does."""
        data = every[rows]
        alike = bool(data.profiled.any()) == bool(every.profiled.any())
        if alike and len(data) > _RELEARNED_ROWS:
            return self.conditioned(data)
        return self.fit(self.space, data, seed=self.seed, prior=self.prior)

    def tensors(self) -> dict[str, Tensor]:
        """All that `from_tensors` needs."""
        found = {
            "widths": self.data.widths,
            "latency_ms": self.data.latency_ms,
            "layers_ms": self.data.layers_ms,
            "scale": self.times.scale,
            "base": self.times.base,
            "layer_noise": self.times.noise,
            **{f"kernel.{f.name}": getattr(self.times.kernel, f.name) for f in fields(LayerKernel)},
            **{f"remainder.{f.name}": getattr(self.remainder, f.name) for f in fields(Remainder)},
        }
        if self.prior is not None:
            found |= {f"prior.{name}": value for name, value in self.prior.tensors().items()}
        return found

    @classmethod
    def from_tensors(cls, space: ChannelSpace, tensors: Mapping[str, Tensor]) -> LayersStructure:
        """Raises KeyError, ValueError or RuntimeError where the tensors are not whole."""
        before = below("prior.", tensors)
        prior = cls.from_tensors(space, before) if before else None
        self = cls(space, prior)
        self.times = LayerTimes(self.view, prior.layer_ms if prior else None)
        self.times.scale, self.times.base = tensors["scale"], tensors["base"]
        self.times.noise = tensors["layer_noise"]
        self.times.kernel = LayerKernel(*(tensors[f"kernel.{f.name}"] for f in fields(LayerKernel)))
        self.remainder = Remainder(*(tensors[f"remainder.{f.name}"] for f in fields(Remainder)))
        self._condition(LatencyData(tensors["widths"], tensors["latency_ms"], tensors["layers_ms"]))
        return self

    def _learn_totals(self, data: LatencyData, inputs: LayerInputs, *, shared: bool) -> None:
        """Shared kernel parameters are learned here too, having no profiles to learn from."""
        fixed, wanted = self._condition_layers(data, inputs)
        kernel, layers = self.times.kernel, self.data_layers

        def loss() -> Tensor:
            parts = fixed
            if shared:
                parts = self._parts(inputs, layers, kernel(inputs, inputs))
            noise = torch.diag(self.remainder.noise_of(layers))
            penalty = kernel.far_from_start() if shared else 0.0
            return unlikelihood(self.remainder(parts, self._unit) + noise, wanted) + penalty

        parameters = [*self.remainder.learned, *(kernel.learned if shared else [])]
        descend(loss, parameters, _TOTAL_STEPS_SHARED if shared else _TOTAL_STEPS)

    def _condition(self, data: LatencyData) -> None:
        self.data = data
        parts, left = self._condition_layers(data, self.view(data.widths))
        noise = torch.diag(self.remainder.noise_of(self.data_layers))
        self.root = root_of(self.remainder(parts, self._unit) + noise)
        self.total_weights = torch.cholesky_solve(left[:, None], self.root)[:, 0]
        self.least_ms = 0.1 * float(data.latency_ms.min())

    def _condition_layers(self, data: LatencyData, inputs: LayerInputs) -> tuple[Parts, Tensor]:
        """The remainder's parts among `data`, and what its layers leave of its latencies (N,), ms."""
        covariances = self.times.kernel(inputs, inputs)
        self.times.condition(data, inputs, covariances)
        layers = self.data_layers = self.times(data.widths, covariances)
        self.ratio = (data.latency_ms / layers.sum(-1)).median()
        left = data.latency_ms - self.ratio * layers.sum(-1)
        return self._parts(inputs, layers, covariances), left

    def _seen_at(self, widths: Tensor) -> tuple[LayerInputs, Tensor, Tensor]:
        """Inputs of B networks, covariances with the N known ones, layer times (B, L) of the profile."""
        inputs = self.view(widths)
        covariances = self.times.kernel(inputs, self.times.inputs)
        return inputs, covariances, self.times(widths, covariances)

    def _parts(self, inputs: LayerInputs, layers: Tensor, covariances: Tensor) -> Parts:
        """Of B networks with the N known measurements."""
        return Parts.between(
            inputs,
            layers,
            self.times.inputs,
            self.data_layers,
            covariances=covariances,
            scale=self.times.scale,
        )

    @property
    def _unit(self) -> Tensor:
        """Mean time of the known measurements, by their layers."""
        return self.data_layers.sum(-1).mean()

    def _over(self, prior: LayersStructure | None) -> LayersStructure:
        """The same parameters over another prior, knowing no measurements."""
        twin = LayersStructure(self.space, prior, seed=self.seed)
        twin.times = self.times.over(prior.layer_ms if prior else None)
        twin.remainder = self.remainder
        return twin


def _flat(widths: Tensor) -> tuple[Tensor, torch.Size]:
    return widths.double().reshape(-1, widths.shape[-1]), widths.shape[:-1]
