"""LPNet: predicts a network's latency from the widths of all its layers, and says how surely.

W-Gates paper (arXiv 2007.02066), section 3.2: a predictor from the vector of widths to measured latency,
made offline and frozen. The paper's is an MLP (`structure="mlp"`); the default, `"layers"`, is ours.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.lpnet import file
from wgates_plugin.efficiency.lpnet.compatibility import check_choice
from wgates_plugin.efficiency.lpnet.data import LatencyData, below, folds, grid_of
from wgates_plugin.efficiency.lpnet.fit_report import FitReport
from wgates_plugin.efficiency.lpnet.held_out import COVERAGE, HeldOut, cross_validated
from wgates_plugin.efficiency.lpnet.layers import LayersStructure
from wgates_plugin.efficiency.lpnet.mlp import MlpStructure
from wgates_plugin.efficiency.lpnet.structure import FROM_TENSORS, Structure
from wgates_plugin.efficiency.lpnet.upper_bound import UpperBound
from wgates_plugin.errors import ConfigError, FileFormatError, MeasurementError

logger = logging.getLogger("wgates_plugin")

_FEW = 60
"""Measurements below which a prior must show that it helps: few cannot outvote a misleading one."""


class LPNet:
    """Widths (..., G) -> latency in ms (...). An `EfficiencyModel`, differentiable in the widths.

    Make one with `LPNet.fit`, keep it with `save`, read it with `load`.

    Attributes:
        held_out: what cross-validation predicted; intervals are as wide as it was wrong.
        identity: of the runtime that was measured (`Runtime.identity`); None where it is not known.
        grid: the coarsest channel multiple of all widths that `fit` was given, full ones aside; 1 where
            they have none in common. Gates keep to it unless told otherwise.
    """

    name, unit = "latency", "ms"

    def __init__(self, space: ChannelSpace, structure: Structure, held_out: HeldOut) -> None:
        self.space, self.fingerprint = space, space.fingerprint
        self._structure = structure
        self.held_out = held_out
        self._correction = 1.0
        self.report: FitReport | None = None
        self.identity: dict[str, Any] | None = None
        self.grid = 1

    @property
    def structure(self) -> str:
        return self._structure.name

    def __call__(self, widths: Tensor) -> Tensor:
        return self._correction * self._structure.predict(widths)

    def interval(self, widths: Tensor, coverage: float = COVERAGE) -> tuple[Tensor, Tensor]:
        """Bounds in ms (...) between which a measurement at `widths` (..., G) lies that often.

        Cross-conformal (Vovk, arXiv 1208.0806) with normalised scores: the structure's deviation
        times the quantile that errors over deviations reached on measurements not seen. Meant for
        networks like the measured ones; the coverage on others is seen in `held_out.covered` only.

        Raises:
            ConfigError: `coverage` is not between 0 and 1, or there are too few measurements for it.
        """
        half = (
            self.held_out.quantile(coverage) * self._correction * self._structure.deviation(widths)
        )
        middle = self(widths)
        return (middle - half).clamp_min(0.0), middle + half

    def upper(self, coverage: float = COVERAGE) -> UpperBound:
        """The interval's upper end as an efficiency model, for a budget that means it."""
        self.held_out.quantile(coverage)
        return UpperBound(self, coverage)

    def spread(self, widths: Tensor) -> Tensor:
        """Relative standard deviation of the prediction, (..., G) -> (...)."""
        return self._structure.deviation(widths) / self._structure.predict(widths)

    def layer_ms(self, widths: Tensor) -> Tensor:
        """Predicted ms of each layer with a weight, (..., G) -> (..., L).

        Raises:
            ConfigError: the structure knows no layers.
        """
        return self._correction * self._layers.layer_ms(widths)

    @property
    def _layers(self) -> LayersStructure:
        if not isinstance(self._structure, LayersStructure):
            raise ConfigError("LPNet", [f"structure `{self.structure}` predicts no single layers"])
        return self._structure

    @property
    def profiled(self) -> int:
        """Measurements it learned from that came with a profile of the layers."""
        structure = self._structure
        return int(structure.data.profiled.sum()) if isinstance(structure, LayersStructure) else 0

    def profile_ms(self, widths: Tensor) -> Tensor:
        """What the runtime's profile would say of each layer with a weight, (..., G) -> (..., L) ms.

        Raises:
            ConfigError: the structure knows no layers.
        """
        return self._layers.layer_ms(widths) / self._layers.ratio

    def held_out_layers(self, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Layers of the profiled measurements: predicted unseen and as profiled, ms (P, L) each.

        Raises:
            ConfigError: the structure knows no layers.
        """
        data = self._layers.data
        parts = folds(data.widths, parts=5, seed=seed)
        predicted = self._layers.layers_without(data, parts)
        return predicted[data.profiled], data.layers_ms[data.profiled]

    @classmethod
    def fit(
        cls,
        space: ChannelSpace,
        widths: Sequence[Sequence[int]] | Tensor,
        latencies_ms: Sequence[float] | Tensor,
        *,
        layers_ms: Sequence[Mapping[str, float] | None] | None = None,
        structure: str = "layers",
        seed: int = 0,
        prior: LPNet | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> LPNet:
        """Learn from measurements; errors and intervals come from cross-validation over five parts.

        Args:
            layers_ms: per measurement, layer name -> ms from the runtime's profile, where there is
                one (`Family.layer_times_ms`). It lowers the number of measurements needed by far.
            structure: "layers", or "mlp" as in the paper.
            prior: an LPNet of the same network on another runtime, thread count or device; some 30
                measurements then adapt it. With fewer than 60 it is left out where a fit without it
                predicts unseen ones better. Its own measurements of held-out widths are held out too.
            identity: of the runtime that was measured.

        Raises:
            MeasurementError: too few or useless measurements.
            ConfigError: unknown structure, or a prior that does not fit.
        """
        check_choice(space, structure, prior, identity)
        data = LatencyData.of(space, widths, latencies_ms, layers_ms)
        learned: Structure
        if structure == "mlp":
            learned = MlpStructure.fit(space, data, seed=seed)
        else:
            before = prior._structure if prior else None
            assert before is None or isinstance(before, LayersStructure)
            learned = LayersStructure.fit(space, data, seed=seed, prior=before)
        model = cls._judged(space, learned, data, seed)
        if prior is not None and len(data) < _FEW:
            alone = LayersStructure.fit(space, data, seed=seed)
            model = _better(model, cls._judged(space, alone, data, seed))
        model.identity = None if identity is None else dict(identity)
        model.grid = grid_of(space, data.widths.long().tolist()) or 1
        return model

    @classmethod
    def _judged(
        cls, space: ChannelSpace, learned: Structure, data: LatencyData, seed: int
    ) -> LPNet:
        held_out = cross_validated(learned, data, seed=seed)
        model = cls(space, learned, held_out)
        errors = held_out.errors
        if not errors.isfinite().all():
            raise MeasurementError(
                f"LPNet: its predictions of {int((~errors.isfinite()).sum())} of {len(data)} samples are "
                "no numbers; measure the samples anew, or give more of them"
            )
        model.report = FitReport.of(held_out)
        return model

    def refit(
        self,
        widths: Sequence[Sequence[int]] | Tensor,
        latencies_ms: Sequence[float] | Tensor,
        *,
        layers_ms: Sequence[Mapping[str, float] | None] | None = None,
    ) -> LPNet:
        """A copy that knows all these measurements, with parameters, report and grid of this one.

        Raises:
            MeasurementError: as in `fit`; or no `layers_ms`, where this one has learned from them.
        """
        data = LatencyData.of(self.space, widths, latencies_ms, layers_ms)
        twin = copy.copy(self)
        twin._structure = self._structure.conditioned(data)
        twin._correction = 1.0
        return twin

    def corrected(self, widths: Sequence[int], measured_ms: float) -> LPNet:
        """A copy scaled so that it is exact at `widths`: for the neighbourhood of one network."""
        twin = copy.copy(self)
        predicted = float(self(torch.tensor(widths, dtype=torch.float64)))
        twin._correction = self._correction * measured_ms / predicted
        return twin

    @torch.no_grad()
    def relative_errors(self, widths: Tensor, latencies_ms: Tensor) -> Tensor:
        """(predicted - measured) / measured, shape (N,)."""
        return self(widths) / latencies_ms - 1.0

    def save(self, path: str | Path) -> None:
        """Write measurements, parameters and description to one safetensors file, atomically."""
        about = {
            "fingerprint": self.fingerprint,
            "structure": self.structure,
            "correction": self._correction,
            "report": asdict(self.report) if self.report else None,
            "identity": self.identity,
            "grid": self.grid,
            "space": self.space.to_json(),
        }
        tensors = {f"structure.{name}": value for name, value in self._structure.tensors().items()}
        tensors |= {f"held_out.{name}": part for name, part in self.held_out.tensors().items()}
        file.write(path, about, tensors)

    @classmethod
    def load(cls, path: str | Path, *, space: ChannelSpace | None = None) -> LPNet:
        """Read what `save` wrote; with `space`, insist that it is for that network.

        Args:
            path: the file, or a run folder, which holds it as `lpnet.safetensors`.

        Raises:
            FileFormatError: missing, corrupt, of another kind, or for another network.
        """
        path = file.lpnet_file(Path(path))
        about, tensors = file.read(path)
        if space is not None and about["fingerprint"] != space.fingerprint:
            raise FileFormatError(
                f"LPNet `{path}`: fitted for another network (fingerprint "
                f"{about['fingerprint']}, this one has {space.fingerprint}); fit one for this network"
            )
        own = space or ChannelSpace.from_json(about["space"])
        try:
            held_out = HeldOut.from_tensors(below("held_out.", tensors))
            structure = FROM_TENSORS[about["structure"]](own, below("structure.", tensors))
            model = cls(own, structure, held_out)
            model._correction = float(about["correction"])
            model.report = FitReport(**about["report"]) if about["report"] else None
            model.identity = dict(about["identity"]) if about.get("identity") else None
            model.grid = int(about.get("grid", 1))
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise FileFormatError(
                f"LPNet `{path}`: description and numbers do not fit together ({error}); fit it again"
            ) from error
        return model


def _better(adapted: LPNet, alone: LPNet) -> LPNet:
    """The fit with the prior, unless the one without it predicts unseen measurements better."""
    assert adapted.report is not None
    assert alone.report is not None
    if adapted.report.mape <= alone.report.mape:
        return adapted
    logger.info(
        "LPNet: the prior is left out: on unseen widths %.1f %% off with it, %.1f %% without",
        100 * adapted.report.mape, 100 * alone.report.mape,
    )  # fmt: skip
    return alone
