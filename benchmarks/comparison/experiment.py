"""What is compared: one network and data set, targets, seeds and methods, in a small YAML file."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from benchmarks.tools.records import HOME
from wgates_plugin.errors import ConfigError
from wgates_plugin.recipe import Recipe
from wgates_plugin.recipe.checks import checked
from wgates_plugin.recipe.reading import read

FOLDER = HOME / "experiments"

DENSE = "dense-"
"""What the key of a dense network begins with; its seed follows."""


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Role = Literal["ours", "rival", "ablation"]


def _refuse_strategy(pruning: Any, instead: str) -> None:
    """A method says who decides, beside its `pruning` and not in it."""
    keys = pruning if isinstance(pruning, dict) else {}
    found = [key for key in ("strategy", "options") if key in keys]
    if found:
        raise ValueError(f"{', '.join(found)} in `pruning`: not taken from there; {instead}")


class Method(_Block):
    """One way to prune.

    Attributes:
        strategy, options: who decides, see `wgates_plugin.strategies`.
        pruning: settings that this method needs different from the others', laid over theirs.
        fine_tuned: False gives the epochs of fine-tuning to the phase before.
        tuning: how its settings were found, in words; readers judge by it.
        role: "ours" is held against every "rival"; an "ablation" is ours with one thing changed,
            shown in a table of its own and nobody's rival.
        targets, runtimes: only these of the experiment's; None runs at all.
        core: it runs in every cell, whatever the experiment says of `everyone`.
    """

    strategy: str
    options: dict[str, Any] = Field(default_factory=dict)
    pruning: dict[str, Any] = Field(default_factory=dict)
    fine_tuned: bool = True
    tuning: str = "defaults"
    role: Role = "rival"
    targets: list[float] | None = None
    runtimes: list[str] | None = None
    core: bool = False

    @field_validator("pruning")
    @classmethod
    def _strategy_is_beside(cls, value: dict[str, Any]) -> dict[str, Any]:
        _refuse_strategy(value, "write them beside `pruning`")
        return value


class Experiment(_Block):
    """All methods get the same dense networks, data, epochs, recipe and latency samples.

    Attributes:
        task: what the scoreboard calls it; None keeps it out of the comparison's claims. Experiments
            of one task share dense networks and latency samples.
        recipe: a recipe (see the README) without target, strategy and seed.
        runtimes: keys of a recipe's target besides the amount.
        targets: shares of the untouched network's measured latency.
        everyone: runtime -> targets at which every method runs; elsewhere the core does. None: all do.
        methods: by name; in the file also the path of a file of them, from the experiment's folder.
        profiles: name -> what to lay over the experiment, such as larger budgets for a GPU.
        rgb: whether the task is one of colour images.
        largest_limit: the largest `limit` that an experiment with this data has, where it is not this
            one's; held-out images beyond it judge nobody, see `other_images`.
        variant: what ours is here where it is not the default; claims have it behind the task's name.
        tuned_on: defaults of ours were chosen on this task; what is claimed is then counted without
            its cells too.
    """

    name: str
    about: str
    recipe: dict[str, Any]
    runtimes: list[dict[str, Any]] = Field(min_length=1)
    targets: list[float]
    seeds: list[int] = Field(min_length=1)
    methods: dict[str, Method] = Field(min_length=1)
    task: str | None = None
    everyone: dict[str, list[float]] | None = None
    profiles: dict[str, dict[str, Any]] = Field(default_factory=dict)
    rgb: bool = False
    largest_limit: int | None = None
    tuned_on: bool = False
    variant: str | None = None

    @property
    def ours(self) -> str | None:
        return next(iter(self.with_role("ours")), None)

    def with_role(self, *roles: Role) -> list[str]:
        return [name for name, method in self.methods.items() if method.role in roles]

    def has(self, method: str, runtime: str, target: float) -> bool:
        """Whether a method runs in a cell."""
        found = self.methods[method]
        return (
            (found.targets is None or target in found.targets)
            and (found.runtimes is None or runtime in found.runtimes)
            and (found.core or self.everyone is None or target in self.everyone.get(runtime, ()))
        )

    @field_validator("targets")
    @classmethod
    def _shares(cls, value: list[float]) -> list[float]:
        if not value or not all(0 < share < 1 for share in value):
            raise ValueError("give shares between 0 and 1")
        percents = [round(100 * share) for share in value]
        if len(set(percents)) < len(percents):
            raise ValueError("two are the same percent, by which files of runs are named")
        return value

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError(f"{value}: one is there twice, and would count as two")
        return value

    @field_validator("recipe")
    @classmethod
    def _strategy_is_the_methods(cls, value: dict[str, Any]) -> dict[str, Any]:
        _refuse_strategy(value.get("pruning"), "write them under `methods`")
        return value

    @model_validator(mode="after")
    def _one_is_ours(self) -> Experiment:
        ours = self.with_role("ours")
        if len(ours) > 1 or (self.task is not None and not ours):
            found = ", ".join(ours) or "none"
            raise ValueError(f"role: exactly one method is `ours`, not {found}")
        known = [runtime_name(block) for block in self.runtimes]
        if twice := [name for name in dict.fromkeys(known) if known.count(name) > 1]:
            raise ValueError(
                f"runtimes: {', '.join(twice)} is there twice; make it two experiments"
            )
        for name, method in self.methods.items():
            if name.startswith(DENSE):
                raise ValueError(f"methods.{name}: `{DENSE}...` are the dense networks; rename it")
            unknown: list[object] = [t for t in method.targets or () if t not in self.targets]
            unknown += [runtime for runtime in method.runtimes or () if runtime not in known]
            if unknown:
                raise ValueError(
                    f"methods.{name}: runs at {unknown}, which is no target or runtime of the "
                    "experiment; name some of its own"
                )
        strange: list[object] = [name for name in self.everyone or () if name not in known]
        strange += [t for ts in (self.everyone or {}).values() for t in ts if t not in self.targets]
        if strange:
            raise ValueError(
                f"everyone: {strange} is no target or runtime of the experiment; name some of its own"
            )
        return self


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


def merged(base: Any, over: Any) -> Any:
    """`over` laid over `base`: mappings key by key, anything else replaced.

    Example:
        >>> merged({"a": {"x": 1, "y": 2}, "b": [1]}, {"a": {"y": 3}, "b": []})
        {'a': {'x': 1, 'y': 3}, 'b': []}
    """
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return copy.deepcopy(over)
    return {**base, **{key: merged(base.get(key), value) for key, value in over.items()}}


def load_experiment(path: str | Path, profile: str | None = None) -> Experiment:
    """Read and check an experiment: a path, or the name of a file in benchmarks/experiments.

    Args:
        profile: one of its profiles, laid over it; name and task then say so.

    Raises:
        ConfigError: all problems, those of the recipes it stands for included.
    """
    path = Path(path)
    if not path.suffix:
        path = FOLDER / f"{path}.yaml"
    raw = _with_profile(read(path), profile, path)
    if isinstance(raw.get("methods"), str):
        raw["methods"] = read(path.parent / raw["methods"])
    try:
        experiment = Experiment.model_validate(raw)
    except ValidationError as error:
        problems = [
            f"`{'.'.join(map(str, e['loc']))}`: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise ConfigError(f"experiment `{path}`", problems) from None
    problems = []
    settings = {}
    for name in experiment.methods:
        run = Run(name, runtime_name(experiment.runtimes[0]), experiment.targets[0], 0)
        try:
            settings[name] = recipe_of(experiment, run, Path("run")).pruning
        except ConfigError as error:
            problems += [f"method `{name}`: {problem}" for problem in error.problems]
    for block in experiment.runtimes[1:]:
        run = Run(next(iter(experiment.methods)), runtime_name(block), experiment.targets[0], 0)
        try:
            recipe_of(experiment, run, Path("run"))
        except ConfigError as error:
            of_the_block = [problem for problem in error.problems if "target" in problem]
            problems += [f"runtime `{run.runtime}`: {problem}" for problem in of_the_block]
    wanted = dense_recipe(experiment, 0, Path("run")).pruning.epochs if settings else 0
    for name, found in settings.items():
        mine = found.epochs
        if found.unification is not None:
            mine += found.unification.admm_epochs + found.unification.retrain_epochs
        if experiment.methods[name].role != "ablation" and mine != wanted:
            problems.append(
                f"method `{name}`: trains for {mine} epochs, the others for {wanted}; give all the "
                "same sum of gate_epochs and fine_tune_epochs"
            )
    if problems:
        raise ConfigError(f"experiment `{path}`", problems)
    return experiment


def _with_profile(raw: dict[str, Any], profile: str | None, path: Path) -> dict[str, Any]:
    if profile is None:
        return raw
    profiles = raw.get("profiles") or {}
    if profile not in profiles:
        known = ", ".join(profiles) or "none"
        raise ConfigError(f"experiment `{path}`", [f"profile `{profile}`: unknown; known: {known}"])
    laid: dict[str, Any] = merged(raw, profiles[profile])
    return {**laid, **{k: f"{laid[k]}-{profile}" for k in ("name", "task") if laid.get(k)}}


def runtime_name(block: dict[str, Any]) -> str:
    return str(block.get("runtime", "onnxruntime"))


def runs_of(experiment: Experiment) -> Iterator[Run]:
    """All runs, the first seed of every cell before the second."""
    for seed in experiment.seeds:
        for block in experiment.runtimes:
            for target in experiment.targets:
                for name in experiment.methods:
                    run = Run(name, runtime_name(block), target, seed)
                    if experiment.has(name, run.runtime, target):
                        yield run


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
    grid: int | None = None,
) -> Recipe:
    """The whole recipe of one run, from a trained dense network and shared latency samples.

    Args:
        grid: the channel multiple where neither experiment nor method give one.
    """
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
        **merged(raw.get("pruning", {}), method.pruning),
        "strategy": method.strategy,
        "options": method.options,
    }
    if not method.fine_tuned:
        # What a method changes of its settings leaves the epochs of all alone, see `load_experiment`.
        all_epochs = dense_recipe(experiment, run.seed, folder).pruning.epochs
        raw["pruning"].update(gate_epochs=all_epochs, fine_tune_epochs=0)
    if grid is not None and raw["pruning"].get("grid") is None:
        raw["pruning"]["grid"] = grid
    if samples is not None and "samples_file" not in method.pruning:
        raw["pruning"]["samples_file"] = str(samples)
    return checked(raw, subject=f"experiment {experiment.name}")
