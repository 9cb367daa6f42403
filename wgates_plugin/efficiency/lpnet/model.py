"""LPNet: predicts a network's latency from the widths of all its layers, and says how surely.

W-Gates paper (arXiv 2007.02066), section 3.2: a predictor from the vector of widths to measured latency,
made offline and frozen. The paper's is an MLP (`structure="mlp"`); the default, `"layers"`, is ours.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.lpnet.data import LatencyData, folds, grid_of
from wgates_plugin.efficiency.lpnet.held_out import COVERAGE, HeldOut, cross_validated
from wgates_plugin.efficiency.lpnet.layers import LayersStructure
from wgates_plugin.efficiency.lpnet.mlp import MlpStructure
from wgates_plugin.errors import ConfigError, FileFormatError, MeasurementError
from wgates_plugin.files import atomic_path

logger = logging.getLogger("wgates_plugin")

IN_RUN_FOLDER = "lpnet.safetensors"
"""What LPNet's file is called in the folder of a run."""

_VERSION = 2

_FEW = 60
"""Measurements below which a prior must show that it helps: few cannot outvote a misleading one."""


class Structure(Protocol):
    """What learns and predicts inside LPNet; differentiable in the widths."""

    @property
    def name(self) -> str: ...

    def predict(self, widths: Tensor) -> Tensor: ...

    def deviation(self, widths: Tensor) -> Tensor: ...

    def conditioned(self, data: LatencyData) -> Structure: ...

    def without(self, data: LatencyData, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]: ...

    def tensors(self) -> dict[str, Tensor]: ...


_KINDS: dict[str, Callable[[ChannelSpace, Mapping[str, Tensor]], Structure]] = {
    "layers": LayersStructure.from_tensors,
    "mlp": MlpStructure.from_tensors,
}

STRUCTURES = tuple(_KINDS)


@dataclass(frozen=True)
class FitReport:
    """How good a fit is. Errors are relative, each on a measurement its fit had not seen.

    Attributes:
        samples: measurements fitted. held_out: how many of them were predicted without being seen.
        mape: mean absolute error. within_10_percent: share of errors up to 10 %. worst: the largest.
        half_width_90: typical (median) half width of the 90 % interval, relative; None where there
            are too few measurements to promise one. widest_90: the largest of the same.
    """

    samples: int
    held_out: int
    mape: float
    within_10_percent: float
    worst: float
    half_width_90: float | None
    widest_90: float | None = None


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
        half = None
        if held_out.most_coverage >= COVERAGE:
            half = held_out.quantile(COVERAGE) * held_out.deviation_ms / held_out.predicted_ms
        model.report = FitReport(
            samples=len(data),
            held_out=len(data),
            mape=float(errors.mean()),
            within_10_percent=float((errors <= 0.1).double().mean()),
            worst=float(errors.max()),
            half_width_90=None if half is None else float(half.median()),
            widest_90=None if half is None else float(half.max()),
        )
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
            "kind": "lpnet",
            "version": _VERSION,
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
        whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        with atomic_path(path) as part:
            save_file(whole, str(part), metadata={"about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path, *, space: ChannelSpace | None = None) -> LPNet:
        """Read what `save` wrote; with `space`, insist that it is for that network.

        Args:
            path: the file, or a run folder, which holds it as `lpnet.safetensors`.

        Raises:
            FileFormatError: missing, corrupt, of another kind, or for another network.
        """
        path = lpnet_file(Path(path))
        about, tensors = _read(path)
        if space is not None and about["fingerprint"] != space.fingerprint:
            raise FileFormatError(
                f"LPNet `{path}`: fitted for another network (fingerprint "
                f"{about['fingerprint']}, this one has {space.fingerprint}); fit one for this network"
            )
        own = space or ChannelSpace.from_json(about["space"])
        try:
            held_out = HeldOut.from_tensors(_below("held_out.", tensors))
            structure = _KINDS[about["structure"]](own, _below("structure.", tensors))
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


@dataclass(frozen=True)
class UpperBound:
    """The latency that a measurement stays under with the upper half of LPNet's interval, ms."""

    lpnet: LPNet
    coverage: float = COVERAGE

    name, unit = "latency", "ms"

    @property
    def fingerprint(self) -> str:
        return self.lpnet.fingerprint

    @property
    def identity(self) -> dict[str, Any] | None:
        return self.lpnet.identity

    @property
    def grid(self) -> int:
        return self.lpnet.grid

    def __call__(self, widths: Tensor) -> Tensor:
        return self.lpnet.interval(widths, self.coverage)[1]


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def check_choice(
    space: ChannelSpace,
    structure: str,
    prior: LPNet | None,
    identity: Mapping[str, Any] | None = None,
) -> None:
    """Raises ConfigError where structure, prior, network and runtime do not go together."""
    problems = []
    if structure not in STRUCTURES:
        problems.append(f"structure `{structure}`: known: {', '.join(STRUCTURES)}")
    if prior is not None and (structure, prior.structure) != ("layers", "layers"):
        problems.append("prior: only the structure `layers` adapts, and only from `layers`")
    if prior is not None and prior.fingerprint != space.fingerprint:
        problems.append(
            f"prior: fitted for another network (fingerprint {prior.fingerprint}, this one has "
            f"{space.fingerprint})"
        )
    if prior is not None and prior.identity and identity and prior.identity == dict(identity):
        problems.append(
            "prior: fitted on this very runtime, device, thread count and input shape; it is no "
            "prior but the same thing. Leave it out and go on with the samples it was fitted to "
            "(`--samples-file`)"
        )
    if problems:
        raise ConfigError("LPNet", problems)


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


def lpnet_file(path: Path) -> Path:
    """The file that is meant: `path`, or the one in the run folder `path`.

    Raises:
        FileFormatError: a folder without one.
    """
    if not path.is_dir():
        return path
    file = path / IN_RUN_FOLDER
    if not file.is_file():
        raise FileFormatError(
            f"LPNet `{path}`: a folder without `{IN_RUN_FOLDER}`; give a file that `wgates fit-lpnet` "
            "wrote, or the folder of a run with a latency target"
        )
    return file


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {}).get("about", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise FileFormatError(
            f"LPNet `{path}`: cannot be read ({error}); it is missing, corrupt or cut off, fit "
            "it again"
        ) from error
    known = isinstance(about, dict) and about.get("kind") == "lpnet"
    if not known or about.get("version") != _VERSION:
        raise FileFormatError(
            f"LPNet `{path}`: the file is no LPNet of version {_VERSION}; fit it again"
        )
    fields = ("fingerprint", "structure", "correction", "report", "space")
    if missing := [name for name in fields if name not in about]:
        raise FileFormatError(f"LPNet `{path}`: lacks {', '.join(missing)}; fit it again")
    return about, tensors
