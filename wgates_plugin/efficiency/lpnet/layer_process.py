"""How long each layer takes by its widths: f_l in `layers.py`, learned from the runtime's profiles."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wgates_plugin.efficiency.lpnet.data import LatencyData
from wgates_plugin.efficiency.lpnet.gaussian import descend, root_of, unlikelihood
from wgates_plugin.efficiency.lpnet.kernel import LayerInputs, LayerKernel, LayerView

_STEPS = 40
_LEAST_TIME = 0.02
"""Noise grows with the time, from this share of the layer's longest time on."""


class LayerTimes:
    """A Gaussian process for each layer, about what the layer is before its profile is known.

    That is the prior's layer, or its share of the work, times a factor; nothing where profiles say
    it all.

    Args:
        prior: widths (B, G) -> ms (B, L) on another runtime or setting of the same network.

    Attributes:
        scale: (L,) each layer's longest time, ms. base: (L,) factors on what is known before.
        noise: (L,) logarithms of the profiles' noise.
        inputs: of the N known measurements. weights: (L, N), zero for those without a profile.
    """

    kernel: LayerKernel
    noise: Tensor
    scale: Tensor
    base: Tensor

    inputs: LayerInputs
    weights: Tensor

    def __init__(self, view: LayerView, prior: Callable[[Tensor], Tensor] | None) -> None:
        self.view, self.prior = view, prior

    def begin(self, data: LatencyData, inputs: LayerInputs, full: Tensor) -> None:
        """Parameters to learn from; `full` are the untouched network's widths (G,)."""
        known = data.profiled
        self.kernel = LayerKernel.initial(inputs, shared=not known.any())
        self.noise = torch.full((self.view.count,), -3.5, dtype=torch.float64)
        start = self._known_before(data.widths)
        if not known.any():
            self.base = (data.latency_ms / start.sum(-1)).median().expand(self.view.count).clone()
            self.scale = self.base * self._known_before(full)
            return
        labels = data.layers_ms[known]
        self.scale = labels.amax(0).clamp_min(1e-9)
        self.base = torch.zeros(self.view.count, dtype=torch.float64)
        if self.prior is not None:
            self.base = (labels / start[known].clamp_min(1e-9)).median(0).values

    def learn(self, data: LatencyData, inputs: LayerInputs) -> None:
        """Parameters by the marginal likelihood of profiles."""
        wanted = self._residuals(data)

        def loss() -> Tensor:
            covariance = self.kernel(inputs, inputs) + torch.diag_embed(self._label_noise(data))
            return unlikelihood(covariance, wanted) + self.kernel.far_from_start()

        descend(loss, [*self.kernel.learned, self.noise], _STEPS)

    def condition(self, data: LatencyData, inputs: LayerInputs, covariances: Tensor) -> None:
        """Know `data` and nothing else; `covariances` are those of its networks, (L, N, N)."""
        self.inputs = inputs
        self.weights = torch.zeros(self.view.count, len(data), dtype=torch.float64)
        known = data.profiled.nonzero()[:, 0]
        if len(known):
            profiled = data[known]
            within = covariances[:, known][:, :, known] + torch.diag_embed(
                self._label_noise(profiled)
            )
            solved = torch.cholesky_solve(self._residuals(profiled)[..., None], root_of(within))
            self.weights[:, known] = solved[..., 0]

    def __call__(self, widths: Tensor, covariances: Tensor) -> Tensor:
        """(B, L) ms at widths (B, G), from `covariances` (L, B, N) with the known measurements."""
        learned = (covariances @ self.weights[:, :, None])[..., 0].T
        return self._start(widths) + learned * self.scale

    def own(self, inputs: LayerInputs) -> Tensor:
        """Covariance of each network's layers with themselves, summed (B,)."""
        return (self.kernel.own(inputs) * self.scale.square()[:, None]).sum(0)

    def over(self, prior: Callable[[Tensor], Tensor] | None) -> LayerTimes:
        """The same parameters over another prior, knowing no measurements."""
        twin = LayerTimes(self.view, prior)
        twin.kernel, twin.noise = self.kernel, self.noise
        twin.scale, twin.base = self.scale, self.base
        return twin

    def _known_before(self, widths: Tensor) -> Tensor:
        """(..., L)"""
        return self.view.work(widths) if self.prior is None else self.prior(widths)

    def _start(self, widths: Tensor) -> Tensor:
        """(B, L) ms."""
        if not self.base.any():
            return torch.zeros(len(widths), self.view.count, dtype=torch.float64)
        return self._known_before(widths) * self.base

    def _residuals(self, data: LatencyData) -> Tensor:
        """What profiles say beyond the start, (L, N) over the layers' scales."""
        return ((data.layers_ms - self._start(data.widths)) / self.scale).T

    def _label_noise(self, data: LatencyData) -> Tensor:
        size = (data.layers_ms / self.scale).T.abs() + _LEAST_TIME
        return (torch.exp(self.noise)[:, None] * size).square() + 1e-8
