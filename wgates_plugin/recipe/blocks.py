"""What a recipe holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from wgates_plugin.catalogue.data import BATCH_SIZE
from wgates_plugin.errors import ConfigError
from wgates_plugin.files import from_home
from wgates_plugin.targets import (
    LatencyTarget,
    MacsTarget,
    ParametersTarget,
    PruningSettings,
    Target,
)
from wgates_plugin.training.settings import TrainingSettings

HomePath = Annotated[Path, AfterValidator(from_home)]
"""A path that may begin with `~`."""


class _Block(BaseModel):
    """A part of a recipe: unknown keys are errors, in the settings' dataclasses below it too."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelBlock(_Block):
    """Which network: arguments of `catalogue.load_model`."""

    name: str
    weights: HomePath | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class DataBlock(_Block):
    """Which data: arguments of `catalogue.load_data`."""

    name: str
    batch_size: int = Field(default=BATCH_SIZE, ge=1)
    image_size: int | None = Field(default=None, ge=1)
    limit: int | None = Field(default=None, ge=1)
    root: HomePath | None = None


_LATENCY_KEYS = ("runtime", "threads", "device", "precision", "options", "bound")


class TargetBlock(_Block):
    """One target: an amount, or `fraction` of what the untouched network costs.

    `kind` follows from the amount; with `fraction` it is latency unless given.
    """

    kind: Literal["latency", "macs", "parameters"] | None = None
    fraction: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    milliseconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    macs: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    parameters: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    runtime: str | None = None
    threads: int | None = Field(default=None, ge=1)
    device: str | None = None
    precision: str | None = None
    options: dict[str, Any] | None = None
    bound: Literal["expected", "upper"] | None = None

    @property
    def measure(self) -> str:
        """The kind, given or derived."""
        derived = {"milliseconds": "latency", "macs": "macs", "parameters": "parameters"}
        amounts = [kind for key, kind in derived.items() if getattr(self, key) is not None]
        return self.kind or (amounts[0] if amounts else "latency")

    @model_validator(mode="after")
    def _one_amount(self) -> TargetBlock:
        names = ("fraction", "milliseconds", "macs", "parameters")
        given = [name for name in names if getattr(self, name) is not None]
        own = "milliseconds" if self.measure == "latency" else self.measure
        problems = []
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            problems.append(f"needs exactly one of {', '.join(names)}; has {found}")
        elif given[0] not in ("fraction", own):
            problems.append(f"with kind {self.kind} give fraction or {own}, not {given[0]}")
        if self.fraction is not None and self.fraction > 1:
            problems.append(
                f"fraction is {self.fraction:g}, more than the untouched network; give a share "
                "such as 0.5"
            )
        for name in ("macs", "parameters"):
            amount = getattr(self, name)
            if amount is not None and amount < 1:
                problems.append(
                    f"{name} is {amount:g}, less than one; for a share of the untouched network "
                    f"give fraction: {amount:g} and kind: {name}"
                )
        if self.measure != "latency":
            problems += [
                f"{name} is for latency targets; this one counts {self.measure}"
                for name in _LATENCY_KEYS
                if getattr(self, name) is not None
            ]
        if problems:
            raise ConfigError("target", problems)
        return self

    def build(self) -> Target:
        if self.measure == "macs":
            return MacsTarget(self.macs, fraction=self.fraction)
        if self.measure == "parameters":
            return ParametersTarget(self.parameters, fraction=self.fraction)
        chosen = {name: getattr(self, name) for name in _LATENCY_KEYS}
        given: dict[str, Any] = {key: value for key, value in chosen.items() if value is not None}
        return LatencyTarget(self.milliseconds, fraction=self.fraction, **given)


class Recipe(_Block):
    """A whole job. Relative paths count from the current directory, as on the command line.

    Attributes:
        target, targets: one target, or a list of them that must all hold.
        dense_training: trains the network first; not used when `model.weights` is given.
        pruning: `PruningSettings`, with `training`, `options` and `unification` inside it.
        run_folder: by default `wgates-runs/NAME`.
        seed: seed of everything.
    """

    name: str | None = None
    model: ModelBlock
    data: DataBlock
    target: TargetBlock | None = None
    targets: list[TargetBlock] = Field(default_factory=list)
    dense_training: TrainingSettings | None = None
    pruning: PruningSettings = Field(default_factory=PruningSettings)
    run_folder: HomePath | None = None
    seed: int = Field(default=0, ge=0)

    @property
    def title(self) -> str:
        return self.name or self.model.name

    @property
    def folder(self) -> Path:
        return self.run_folder or Path("wgates-runs") / re.sub(r"[/\\:]", "-", self.title)

    @property
    def all_targets(self) -> list[TargetBlock]:
        return [*([self.target] if self.target else []), *self.targets]

    @property
    def trains_first(self) -> bool:
        return self.dense_training is not None and self.model.weights is None
