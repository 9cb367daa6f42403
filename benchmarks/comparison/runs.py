"""Doing what is missing: dense networks, latency samples, one run; and what is there but outdated."""

from __future__ import annotations

import copy
import dataclasses
import json
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison.experiment import (
    DENSE,
    Experiment,
    Run,
    dense_recipe,
    recipe_of,
    runs_of,
    runtime_name,
)
from benchmarks.tools.records import code_digest
from wgates_plugin.efficiency.learner import Learner
from wgates_plugin.errors import ConfigError, TargetError, WGatesError
from wgates_plugin.files import read_json, save_tensors, write_json
from wgates_plugin.latency import RuntimeSettings, get_runtime
from wgates_plugin.latency.base import BaseRuntime
from wgates_plugin.latency.environment import describe_environment
from wgates_plugin.latency_study import LatencyStudy
from wgates_plugin.pipeline.identity import options_in_full, settings_as_json
from wgates_plugin.recipe import prepare, run_recipe
from wgates_plugin.recipe.dense import WEIGHTS, trained
from wgates_plugin.run_folder import weights_digest
from wgates_plugin.targets import LatencyTarget
from wgates_plugin.tracing import trace
from wgates_plugin.training import Trainer, evaluate

BULK = ("gates",)
"""Keys of a report that only its own page needs."""

PLACES = ("samples_file", "lpnet_file", "workers")
"""Settings of a stored run that say nothing of what it did; all others must be the experiment's."""


class Places:
    """Where an experiment's raw results are kept, and where it works.

    Attributes:
        results: committed JSON. scratch: run folders. shared: dense networks and samples, of all
            experiments of a task.
    """

    def __init__(self, experiment: Experiment, results: Path, scratch: Path) -> None:
        self.results = results / "comparison" / experiment.name
        self.scratch = scratch / experiment.name
        self.shared = scratch / (experiment.task or experiment.name)

    def result(self, run: Run) -> Path:
        return self.results / "runs" / f"{run.key}.json"

    def run_folder(self, run: Run) -> Path:
        return self.scratch / "runs" / run.key

    def dense_result(self, seed: int) -> Path:
        return self.results / f"dense-{seed}.json"

    def dense_folder(self, seed: int) -> Path:
        return self.shared / f"dense-{seed}"

    def samples(self, runtime: str) -> Path:
        return self.shared / f"samples-{runtime}.jsonl"

    def grid(self, runtime: str) -> Path:
        return self.shared / f"grid-{runtime}.json"

    @property
    def replaced(self) -> Path:
        return self.results / "replaced.json"

    def finals(self, runtime: str) -> Path:
        return self.results / f"finals-{runtime}.json"


def is_of(folder: Path, stored: dict[str, Any]) -> bool:
    """Whether a run folder holds the network that a stored result is about."""
    if not (folder / "report.json").exists():
        return False
    report = read_json(folder / "report.json", kind="report")
    return all(report.get(key) == stored.get(key) for key in ("widths", "final"))


def make_dense(experiment: Experiment, places: Places, seed: int) -> None:
    """Train the dense network of a seed, and on for as many epochs as pruning takes.

    Losses are counted against the latter: an undertrained network makes every pruner look good.
    """
    path = places.dense_result(seed)
    if path.exists() and (places.dense_folder(seed) / WEIGHTS).exists():
        return
    recipe = dense_recipe(experiment, seed, places.dense_folder(seed))
    network, data, _, settings = prepare(recipe)
    if recipe.trains_first:
        network = trained(network, data, recipe, resume=True, progress=False)
    else:  # the model came with weights
        save_tensors(places.dense_folder(seed) / WEIGHTS, dict(network.state_dict()))
    weights = weights_digest(network)
    before = evaluate(network, data.val_loader).accuracy
    epochs = settings.epochs
    distilled = settings.training.distillation_weight > 0
    trainer = Trainer(
        network,
        data.train_loader,
        dataclasses.replace(settings.training, epochs=epochs),
        teacher=copy.deepcopy(network) if distilled else None,  # as every method has it
        seed=seed,
        label="dense, trained on",
    )
    trainer.run(progress=False)
    known = read_json(path, kind="dense result").get("weights") if path.exists() else None
    if known not in (None, weights):
        raise WGatesError(
            f"experiment {experiment.name}: the dense network of seed {seed}, trained again here, is "
            f"not the one of the stored runs (weights {weights}, stored {known}); delete `{path}` and "
            f"this seed's files in `{places.results / 'runs'}`, or fetch the folder "
            f"`{places.dense_folder(seed)}` from where they were made"
        )
    write_json(
        path,
        {
            "seed": seed,
            "weights": weights,
            "accuracy": before,
            "made_by": _made_by(experiment),
            "trained_on": {
                "accuracy": evaluate(network, data.val_loader).accuracy,
                "epochs": epochs,
                "seconds": sum(row["seconds"] for row in trainer.history),
            },
            "environment": describe_environment(),
        },
    )


def _made_by(experiment: Experiment) -> dict[str, Any]:
    """What the dense networks of an experiment, and their training on, depend on."""
    pruning = dense_recipe(experiment, experiment.seeds[0], Path("dense")).pruning
    made: dict[str, Any] = {k: v for k, v in experiment.recipe.items() if k != "pruning"}
    return {**made, "training": settings_as_json(pruning.training), "epochs": pruning.epochs}


def refuse_other_dense(experiment: Experiment, places: Places, seeds: Iterable[int]) -> None:
    """Raises ConfigError where a dense result is of another recipe than the experiment's now."""
    mine = _made_by(experiment)
    problems = []
    for seed in seeds:
        path = places.dense_result(seed)
        theirs = read_json(path, kind="dense result").get("made_by") if path.exists() else None
        if theirs not in (None, mine):
            changed = [key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key)]
            problems.append(
                f"the dense network of seed {seed} is of another recipe ({', '.join(changed)} changed "
                f"since); undo that, or delete `{path}`, `{places.dense_folder(seed)}` and the runs "
                f"of that seed in `{places.results / 'runs'}`"
            )
    if problems:
        raise ConfigError(f"experiment {experiment.name}", problems)


def make_samples(experiment: Experiment, places: Places, block: dict[str, Any]) -> None:
    """Latency samples of one runtime: they depend on structure alone and serve every run."""
    seed = experiment.seeds[0]  # its weights have no part in it
    recipe = dense_recipe(experiment, seed, places.dense_folder(seed))
    network, data, _, settings = prepare(recipe)
    space = trace(
        network,
        data.example_input,
        ignored_layers=settings.ignored_layers,
        min_channels=settings.min_channels,
        min_fraction=settings.min_fraction,
        floors=settings.floors,
        caps=settings.caps,
    )
    study = LatencyStudy(network, space, data.example_input, LatencyTarget(fraction=1.0, **block))
    samples = study.open_samples(places.samples(runtime_name(block)))
    grid = settings.grid or _probed(study, places.grid(runtime_name(block)))
    if len(samples.usable) >= settings.samples:
        return
    if study.reference_ms is None:
        study.baseline(settings.measure_seconds)
    study.sample(
        count=settings.samples,
        grid=grid,
        seed=settings.seed,
        seconds_per_sample=settings.seconds_per_sample,
        active=Learner(space, seed=settings.seed).active() if settings.active else None,
    )


def _probed(study: LatencyStudy, path: Path) -> int:
    """The runtime's channel multiple, probed once for all runs: a probe is noisy, and two methods
    on two grids could not be compared."""
    if not path.exists():
        write_json(path, study.probe())
    return int(read_json(path, kind="channel grid")["grid"])


def runtime_of(block: dict[str, Any]) -> BaseRuntime:
    """The runtime that a block of the experiment names."""
    settings = {k: v for k, v in block.items() if k in ("threads", "device", "precision")}
    return get_runtime(runtime_name(block), RuntimeSettings(**settings), **block.get("options", {}))


def _grid(places: Places, runtime: str) -> int | None:
    path = places.grid(runtime)
    return int(read_json(path, kind="channel grid")["grid"]) if path.exists() else None


def do_run(experiment: Experiment, places: Places, run: Run) -> None:
    """One run; what cannot be reached is stored with the reason."""
    path = places.result(run)
    if path.exists():
        return
    folder = places.run_folder(run)
    recipe = recipe_of(
        experiment,
        run,
        folder,
        weights=places.dense_folder(run.seed) / WEIGHTS,
        samples=places.samples(run.runtime),
        grid=_grid(places, run.runtime),
    )
    try:
        report = run_recipe(recipe, resume=folder.exists(), progress=False).report
    except TargetError as error:
        write_json(
            path,
            {
                "kind": "refused",
                "reason": str(error),
                **dataclasses.asdict(run),
                "settings": _without_places(settings_as_json(recipe.pruning)),
                "resolved_options": options_in_full(recipe.pruning),
                "environment": describe_environment(),
                "code": code_digest(),
            },
        )
        return
    kept = {key: value for key, value in report.items() if key not in BULK}
    kept["settings"] = _without_places(kept["settings"])
    plan = read_json(folder / "plan.json", kind="plan")
    note = plan.get("note", {})
    kept["before_cut"] = note.get("before", [])
    kept["after_cut"] = [step["transform"] for step in note.get("after", [])]
    kept["resolved_options"] = options_in_full(recipe.pruning)
    kept["code"] = code_digest()
    kept["dense_weights"] = read_json(folder / "run.json", kind="run description")["weights"]
    if isinstance(kept.get("lpnet"), dict):
        kept["lpnet"] = {k: v for k, v in kept["lpnet"].items() if k != "predictions"}
    write_json(path, kept)


MACHINE = ("cpu", "cpu_capability", "gpu")
"""Of an environment: what two latencies that are compared have in common, beside the versions of torch
and of the runtime."""


def refuse_other_machines(
    experiment: Experiment, places: Places, runtimes: Iterable[str] | None = None
) -> None:
    """All runs on one runtime belong on one machine, the one whose milliseconds are their target.

    Args:
        runtimes: those on which something is to be measured; None for all.

    Raises:
        ConfigError: runs of another machine are stored; all runtimes at once.
    """
    here = describe_environment()
    others: dict[str, list[str]] = {}
    for run in runs_of(experiment):
        path = places.result(run)
        if (runtimes is None or run.runtime in runtimes) and path.exists():
            there = _machine(read_json(path, kind="run").get("environment", {}), run.runtime)
            if there not in ("", _machine(here, run.runtime)):
                others.setdefault(run.runtime, []).append(there)
    problems = [
        f"runtime {runtime}: {len(found)} stored runs are from {', '.join(sorted(set(found)))}, this "
        f"machine is {_machine(here, runtime)}, and latencies of two machines say nothing of methods; "
        "go on there, give `--results` a folder of its own, or delete "
        f"`{places.results / 'runs'}/*-{runtime}-*` to make "
        "them all here"
        for runtime, found in others.items()
    ]
    if problems:
        raise ConfigError(f"experiment {experiment.name}", problems)


def _machine(environment: dict[str, Any], runtime: str) -> str:
    words = [str(environment[key]) for key in MACHINE if environment.get(key)]
    libraries = environment.get("libraries", {})
    words += [f"{name} {libraries[name]}" for name in ("torch", runtime) if libraries.get(name)]
    return " ".join(words)


def _without_places(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in PLACES}


def missing(places: Places, chosen: Iterable[Run]) -> list[Run]:
    return [run for run in chosen if not places.result(run).exists()]


def prepared(
    experiment: Experiment,
    places: Places,
    chosen: Sequence[Run],
    ahead: Callable[[list[str]], object] = lambda _: None,
) -> None:
    """Everything that the chosen runs share, as far as one of them is still to do.

    Of a seed whose runs are all there, the dense network's accuracies are still asked for.

    Args:
        ahead: called with the keys of the dense networks that are wanted, to make them side by side;
            what is then not there is made here, one after the other.
    """
    todo = missing(places, chosen)
    used = {run.runtime for run in todo}
    blocks = [block for block in experiment.runtimes if runtime_name(block) in used]
    for block in blocks:
        runtime_of(block)  # what is not to be had here is said before hours of training
    wanted = [
        seed
        for seed in dict.fromkeys(run.seed for run in chosen)
        if not places.dense_result(seed).exists()
        or (
            any(run.seed == seed for run in todo)
            and not (places.dense_folder(seed) / WEIGHTS).exists()
        )
    ]
    if wanted:
        seeds = ", ".join(map(str, wanted))
        print(f"{experiment.name}: training dense networks, seeds {seeds}", flush=True)
    ahead([f"{DENSE}{seed}" for seed in wanted])
    for seed in wanted:
        make_dense(experiment, places, seed)
    for block in blocks:
        print(f"{experiment.name}: latency samples on {runtime_name(block)}", flush=True)
        make_samples(experiment, places, block)


def outdated(experiment: Experiment, places: Places, chosen: Sequence[Run]) -> list[str]:
    """A line for each stored run whose settings are no longer those of the experiment."""
    lines = []
    for run in chosen:
        path = places.result(run)
        stored: dict[str, Any] = read_json(path, kind="run") if path.exists() else {}
        theirs: Any = stored.get("settings")
        if not isinstance(theirs, dict):
            continue
        pruning = recipe_of(experiment, run, places.run_folder(run)).pruning
        mine = settings_as_json(pruning)
        # Without them, stored before defaults were: whatever these are now, they may have been others.
        mine["options"] = options_in_full(pruning)
        theirs = {**theirs, "options": stored.get("resolved_options")}
        if isinstance(theirs["options"], dict):  # the strategy's copy of the grid says nothing
            theirs["options"] = {n: v for n, v in theirs["options"].items() if n != "grid"}
        common = [key for key in theirs if key in _without_places(mine) and key != "seed"]
        # A grid that the experiment leaves open was probed.
        common = [key for key in common if key != "grid" or mine["grid"] is not None]
        other = [key for key in common if theirs[key] != mine[key]]
        if other:
            changed = ", ".join(f"{key} {theirs[key]} there, {mine[key]} here" for key in other)
            lines.append(
                f"{run.key}: stored with other settings ({changed}); delete `{path}` and "
                f"`{places.run_folder(run)}` to run it again"
            )
        dense = places.dense_result(run.seed)
        weights = read_json(dense, kind="dense result").get("weights") if dense.exists() else None
        if weights is not None and stored.get("dense_weights", weights) != weights:
            lines.append(
                f"{run.key}: pruned from another dense network than the one of seed {run.seed} here "
                f"(trained on another machine?); delete `{path}` and `{places.run_folder(run)}` to run "
                "it again"
            )
    return lines


def attempt(experiment: Experiment, places: Places, run: Run) -> str:
    """One run, said in a line; an error is said and stored nowhere, so that it is tried again."""
    threads = torch.get_num_threads()
    try:
        refuse_other_machines(experiment, places, {run.runtime})  # this may be another of a cluster
        do_run(experiment, places, run)
    except Exception as error:  # the others are to be tried all the same
        if not isinstance(error, WGatesError):
            traceback.print_exc()
        return f"{run.key}: failed: {type(error).__name__}: {error}"
    finally:
        torch.set_num_threads(threads)
    stored = json.loads(places.result(run).read_text())
    if stored.get("kind") == "refused":
        return f"{run.key}: refused: {stored['reason']}"
    before, after = stored["baseline"], stored["final"]
    return (
        f"{run.key}: {after['latency_ms'] / before['latency_ms']:.3f} of the latency, accuracy "
        f"{before['accuracy']:.2%} -> {after['accuracy']:.2%}, {stored['contract']}"
    )
