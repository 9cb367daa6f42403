"""What is compared: one network and data set, targets, seeds and methods, in a small YAML file."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from benchmarks.records import HOME
from wgates_plugin.errors import ConfigError
from wgates_plugin.recipe import Recipe
from wgates_plugin.recipe_checks import checked, read

FOLDER = HOME / "experiments"


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Method(_Block):
    """One way to prune.

    Attributes:
        strategy, options: who decides, see `wgates_plugin.strategies`.
        pruning: settings that this method needs different from the others'.
        tuning: how its settings were found, in words; every method is entitled to the same effort.
        rival: False for our own.
    """

    strategy: str
    options: dict[str, Any] = Field(default_factory=dict)
    pruning: dict[str, Any] = Field(default_factory=dict)
    tuning: str = "defaults"
    rival: bool = True


class Experiment(_Block):
    """All methods get the same dense networks, data, epochs, recipe and latency samples.

    Attributes:
        recipe: a recipe (see the README) without target, strategy and seed.
        runtimes: keys of a recipe's target besides the amount.
        targets: shares of the untouched network's measured latency.
        rgb: whether the task is one of colour images.
    """

    name: str
    about: str
    recipe: dict[str, Any]
    runtimes: list[dict[str, Any]]
    targets: list[float]
    seeds: list[int]
    methods: dict[str, Method]
    rgb: bool = False

    @field_validator("targets")
    @classmethod
    def _shares(cls, value: list[float]) -> list[float]:
        if not value or not all(0 < share < 1 for share in value):
            raise ValueError("give shares between 0 and 1")
        return value


@dataclass(frozen=True)
class Run:
    """One cell and seed of an experiment."""

    method: str
    runtime: str
    target: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.method}-{self.runtime}-{round(100 * self.target)}-{self.seed}"


def load_experiment(path: str | Path) -> Experiment:
    """Read and check an experiment: a path, or the name of a file in benchmarks/experiments.

    Raises:
        ConfigError: all problems, those of the recipes it stands for included.
    """
    path = Path(path)
    if not path.suffix:
        path = FOLDER / f"{path}.yaml"
    raw = read(path)
    try:
        experiment = Experiment.model_validate(raw)
    except ValidationError as error:
        problems = [f"`{'.'.join(map(str, e['loc']))}`: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"experiment `{path}`", problems) from None
    problems = []
    for name in experiment.methods:
        run = Run(name, runtime_name(experiment.runtimes[0]), experiment.targets[0], 0)
        try:
            recipe_of(experiment, run, Path("run"))
        except ConfigError as error:
            problems += [f"method `{name}`: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(f"experiment `{path}`", problems)
    return experiment


def runtime_name(block: dict[str, Any]) -> str:
    return str(block.get("runtime", "onnxruntime"))


def runs_of(experiment: Experiment) -> Iterator[Run]:
    """All runs, the first seed of every cell before the second."""
    for seed in experiment.seeds:
        for block in experiment.runtimes:
            for target in experiment.targets:
                for method in experiment.methods:
                    yield Run(method, runtime_name(block), target, seed)


def dense_recipe(experiment: Experiment, seed: int, folder: Path) -> Recipe:
    """The recipe that trains the dense network; its target only fills the place."""
    raw = copy.deepcopy(experiment.recipe)
    raw.update(seed=seed, run_folder=str(folder), target={"fraction": 1.0})
    return checked(raw, subject=f"experiment {experiment.name}")


def recipe_of(
    experiment: Experiment,
    run: Run,
    folder: Path,
    *,
    weights: Path | None = None,
    samples: Path | None = None,
) -> Recipe:
    """The whole recipe of one run, from a trained dense network and shared latency samples."""
    method = experiment.methods[run.method]
    block = next(b for b in experiment.runtimes if runtime_name(b) == run.runtime)
    raw = copy.deepcopy(experiment.recipe)
    raw.update(
        name=f"{experiment.name}: {run.key}",
        seed=run.seed,
        run_folder=str(folder),
        target={**block, "fraction": run.target},
    )
    if weights is not None:
        raw["model"]["weights"] = str(weights)
        raw.pop("dense_training", None)
    raw["pruning"] = {
        **raw.get("pruning", {}),
        **method.pruning,
        "strategy": method.strategy,
        "options": method.options,
    }
    if samples is not None:
        raw["pruning"]["samples_file"] = str(samples)
    return checked(raw, subject=f"experiment {experiment.name}")
