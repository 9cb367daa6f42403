"""What the user asks for: how fast or how small, and the settings of the whole job."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from wgates_plugin.efficiency.base import check_target
from wgates_plugin.efficiency.lpnet import STRUCTURES
from wgates_plugin.errors import ConfigError, TargetError
from wgates_plugin.option_checks import did_you_mean, value_problems
from wgates_plugin.strategies.table import strategy_problems
from wgates_plugin.training.settings import TrainingSettings
from wgates_plugin.transforms.unification.settings import UnificationSettings


@dataclass(frozen=True)
class _Target:
    """Either an absolute amount or a fraction of what the untouched network costs."""

    fraction: float | None = field(default=None, kw_only=True)

    @property
    def amount(self) -> float | None:
        raise NotImplementedError

    unit = ""

    def __post_init__(self) -> None:
        if (self.amount is None) == (self.fraction is None):
            raise TargetError(
                f"{type(self).__name__}: give either an amount in {self.unit} or `fraction` of "
                "the untouched network, not both"
            )
        for name, given in list(vars(self).items()):
            if isinstance(given, Real) and type(given) not in (int, float, bool):
                plain = int(given) if isinstance(given, Integral) else float(given)
                object.__setattr__(self, name, plain)  # numpy's scalars are no JSON
        check_target(self.amount if self.amount is not None else self.fraction, self.unit)
        if self.fraction is not None and self.fraction > 1:
            raise TargetError(
                f"{type(self).__name__}: fraction {self.fraction} is more than the untouched network; "
                "give a share such as 0.5"
            )
        if self.unit != "ms" and self.amount is not None and self.amount < 1:
            raise TargetError(
                f"{type(self).__name__}: {self.amount} {self.unit} is less than one; for a share of "
                f"the untouched network give fraction={self.amount}"
            )

    def resolve(self, baseline: float) -> float:
        """The target in its unit, given what the untouched network costs."""
        if self.amount is not None:
            return float(self.amount)
        assert self.fraction is not None
        return self.fraction * baseline


EFFICIENCIES = ("latency", "macs")
"""What a latency target becomes for the strategy."""

BOUNDS = ("expected", "upper")
"""What of LPNet's prediction a latency budget holds."""


@dataclass(frozen=True)
class LatencyTarget(_Target):
    """So many milliseconds per inference of the example batch, on a runtime.

    Attributes:
        milliseconds: the target; or `fraction` of the untouched network's latency.
        runtime: one of `latency.RUNTIMES`.
        threads, device, precision: see `RuntimeSettings`.
        options: keyword arguments of the runtime, such as {"channels_last": True}.
        bound: what the search holds to the target: the "expected" latency, or the "upper" end of
            LPNet's 90 % interval, which wastes a little speed and is seldom exceeded.

    Example:
        >>> LatencyTarget(fraction=0.5).resolve(baseline=12.0)
        6.0
    """

    milliseconds: float | None = None
    runtime: str = "onnxruntime"
    threads: int = 1
    device: str = "cpu"
    precision: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)
    bound: str = "expected"
    unit = "ms"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.options, Mapping):
            raise TargetError(
                f"LatencyTarget: options is {self.options!r}; needs a dict of the runtime's options, "
                "such as {'channels_last': True}"
            )
        if self.bound not in BOUNDS:
            raise TargetError(
                f"LatencyTarget: bound is {self.bound!r}; choose from {', '.join(BOUNDS)}"
            )

    @property
    def amount(self) -> float | None:
        return self.milliseconds


@dataclass(frozen=True)
class MacsTarget(_Target):
    """So many multiply-adds per image."""

    macs: float | None = None
    unit = "MACs"

    @property
    def amount(self) -> float | None:
        return self.macs


@dataclass(frozen=True)
class ParametersTarget(_Target):
    """So many parameters."""

    parameters: float | None = None
    unit = "parameters"

    @property
    def amount(self) -> float | None:
        return self.parameters


Target = LatencyTarget | MacsTarget | ParametersTarget


@dataclass(frozen=True)
class PruningSettings:
    """Everything about the job but the target. The defaults suit small image networks.

    Attributes:
        strategy: who decides, one of `strategies.STRATEGIES` or your own `strategies.Strategy` as
            "package.module:Class". options: its own settings.
        gate_epochs: epochs in which the strategy learns; W-Gates trains gates and weights together,
            and decides by filter norms with 0. Strategies that do not learn leave them to the
            fine-tuning.
        fine_tune_epochs: epochs after the removal. One learning-rate schedule runs over all epochs
            in which weights are trained.
        train_weights: False learns the gates with the weights frozen.
        efficiency: what the strategy is held to under a latency target: "latency" as LPNet predicts
            it, or "macs", those of the uniform widths that keep the target. Widths are settled
            by latency in either case.
        samples: sub-networks measured for LPNet.
        samples_file: measurements of this network on this runtime and machine to start from, as
            `wgates fit-lpnet` keeps them; the rest of `samples` is measured.
        seconds_per_sample: timed inference per sub-network, the reference's share included.
        lpnet: structure of LPNet: "layers", or "mlp" for the paper's plain form.
        active: after a covering part, measure where LPNet is least sure. Without effect for "mlp",
            which does not know how sure it is.
        workers: processes that measure; more than one through Ray, on as many free
            cores or devices; without it one measures.
        measure_seconds: the same for the baseline and for the delivered artefact.
        grid: channel multiple; None probes the runtime.
        min_channels, min_fraction, floors, caps, ignored_layers: see `trace`.
        margin: aim this far under the target, so that noise does not break the contract;
            half of it is left to widths that a network has learned at.
        attempts: how often the closed loop may correct a network that is over the target, and widths
            before a network learns at them.
        trim_epochs: epochs at a tenth of the learning rate after a delivered file was over the target
            and its network trimmed; they come on top of all others. None where no other epoch trains
            weights. 0: a network that was trained is never trimmed, and may miss its target.
        recalibration_images: training images for BatchNorm statistics after the removal.
        unification: also give the delivered weights few bits (`transforms.unification`); None does not.

    `training` and `unification` may be given as dicts of their keys.
    """

    strategy: str = "wgates"
    options: dict[str, Any] = field(default_factory=dict)
    gate_epochs: int = 2
    fine_tune_epochs: int = 4
    train_weights: bool = True
    efficiency: str = "latency"
    training: TrainingSettings = field(default_factory=TrainingSettings)
    samples: int = 100
    samples_file: str | Path | None = None
    seconds_per_sample: float = 0.4
    lpnet: str = "layers"
    active: bool = True
    workers: int = 1
    measure_seconds: float = 3.0
    grid: int | None = None
    min_channels: int = 1
    min_fraction: float = 0.05
    floors: dict[str, int] = field(default_factory=dict)
    caps: dict[str, int] = field(default_factory=dict)
    ignored_layers: Sequence[str] = ()
    margin: float = 0.02
    attempts: int = 4
    trim_epochs: int = 1
    recalibration_images: int = 1024
    unification: UnificationSettings | None = None
    seed: int = 0

    @property
    def epochs(self) -> int:
        """All epochs but those of a trim and of unification, whoever learns in them."""
        return self.gate_epochs + self.fine_tune_epochs

    def __post_init__(self) -> None:
        problems = self._form_problems()
        if isinstance(self.options, Mapping):
            problems += strategy_problems(self.strategy, self.options)
        whole: dict[str, tuple[Any, int]] = {
            "gate_epochs": (self.gate_epochs, 0),
            "fine_tune_epochs": (self.fine_tune_epochs, 0),
            "samples": (self.samples, 10),
            "workers": (self.workers, 1),
            "min_channels": (self.min_channels, 1),
            "attempts": (self.attempts, 1),
            "trim_epochs": (self.trim_epochs, 0),
            "recalibration_images": (self.recalibration_images, 1),
            "seed": (self.seed, 0),
        }
        if self.grid is not None:
            whole["grid"] = (self.grid, 1)
        for name, (value, least) in whole.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                problems.append(f"{name} is {value!r}, needs a whole number from {least}")
        ranges = {
            "seconds_per_sample": (1e-3, 3600.0),
            "measure_seconds": (1e-3, 3600.0),
            "min_fraction": (0.0, 1.0),
            "margin": (0.0, 0.5),
        }
        for name, (low, high) in ranges.items():
            number = getattr(self, name)
            if not isinstance(number, (int, float)) or not low <= number <= high:
                problems.append(f"{name} is {number!r}, needs a number from {low:g} to {high:g}")
        if self.efficiency not in EFFICIENCIES:
            problems.append(
                f"efficiency is {self.efficiency!r}, choose from {', '.join(EFFICIENCIES)}"
            )
        if self.lpnet not in STRUCTURES:
            problems.append(f"lpnet is {self.lpnet!r}, choose from {', '.join(STRUCTURES)}")
        if problems:
            raise ConfigError("pruning settings", problems)

    def _form_problems(self) -> list[str]:
        """What is of the wrong form. Dicts become the settings that they spell out."""
        problems: list[str] = []
        blocks: dict[str, tuple[type, bool]] = {
            "training": (TrainingSettings, False),
            "unification": (UnificationSettings, True),
        }
        for name, (kind, optional) in blocks.items():
            given = getattr(self, name)
            if isinstance(given, Mapping):
                made, wrong = _spelt_out(kind, given)
                problems += [f"{name}.{problem}" for problem in wrong]
                if made is not None:
                    object.__setattr__(self, name, made)
            elif not isinstance(given, kind) and not (optional and given is None):
                nothing = ", or None" if optional else ""
                problems.append(
                    f"{name} is {given!r}, needs {kind.__name__} or a dict of its keys{nothing}"
                )
        for name in ("options", "floors", "caps"):
            given = getattr(self, name)
            if not isinstance(given, Mapping):
                problems.append(f"{name} is {given!r}, needs a dict of names and values")
            elif name != "options":
                problems += [
                    f"{name}.{group} is {width!r}, needs a whole number of channels"
                    for group, width in given.items()
                    if not isinstance(width, Integral) or isinstance(width, bool)
                ]
                whole = {k: int(v) if isinstance(v, Integral) else v for k, v in given.items()}
                object.__setattr__(self, name, whole)
        if isinstance(self.samples_file, (str, Path)):
            object.__setattr__(self, "samples_file", os.path.expanduser(self.samples_file))
        elif self.samples_file is not None:
            problems.append(f"samples_file is {self.samples_file!r}, needs a path")
        for name in ("active", "train_weights"):
            given = getattr(self, name)
            if not isinstance(given, bool):
                problems.append(f"{name} is {given!r}, needs true or false")
        layers = self.ignored_layers
        if isinstance(layers, str) or not isinstance(layers, Sequence):
            problems.append(f"ignored_layers is {layers!r}, needs a list of names")
        return problems


def _spelt_out(kind: type, given: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The settings that a dict spells out, or what is wrong with it, the key first."""
    known = [field.name for field in dataclasses.fields(kind)]
    problems = [
        f"{key} is unknown; {did_you_mean(key, known)}known: {', '.join(known)}"
        for key in given
        if key not in known
    ]
    try:
        made: Any = TypeAdapter(kind).validate_python(
            {k: v for k, v in given.items() if k in known}
        )
    except ValidationError as error:
        return None, problems + value_problems(error)
    return made, problems
