"""The whole job: milliseconds in, a smaller exported network out, measured to hold them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from wgates_plugin.callables import untold
from wgates_plugin.calling import ExampleInputs
from wgates_plugin.errors import ConfigError
from wgates_plugin.pipeline import delivery, learning, preparation, record, unifying
from wgates_plugin.pipeline.job import Job, PruningResult
from wgates_plugin.pipeline.labels import check_labels, check_scored
from wgates_plugin.plan import PruningPlan
from wgates_plugin.targets import PruningSettings, Target
from wgates_plugin.training.engine import LossFunction
from wgates_plugin.training.launch import batches_of

__all__ = ["PruningResult", "prune_to_target"]

logger = logging.getLogger("wgates_plugin")


def prune_to_target(
    network: nn.Module,
    example_inputs: ExampleInputs,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    *,
    target: Target | Sequence[Target],
    settings: PruningSettings | None = None,
    run_folder: str | Path,
    resume: bool = False,
    loss: LossFunction | None = None,
    name: str | None = None,
    progress: bool | None = None,
) -> PruningResult:
    """Prune a trained network until its exported artefact keeps the target.

    Baseline measured, LPNet fitted, feasibility measured; the strategy decides (W-Gates trains gates
    and weights together, at widths measured for it); widths settled by measurement, channels
    removed, fine-tuned, exported, measured again; when that is over the target, trimmed and measured
    again. The given network is only read.

    Args:
        network: a trained classifier whose output is one tensor of logits (N, classes).
        example_inputs: what one inference looks like: its batch size is what is timed.
        train_loader, val_loader: iterables of (inputs, targets) with a length.
        target: one target, or several that must all hold (at most one of a kind).
        run_folder: where everything is written; stopped at any moment, the job goes on from there
            with `resume=True`.
        loss: `loss(logits, targets)`; cross-entropy by default. A run is resumed with the same one, known
            by its name and what it holds; lambdas and functions within functions by their name alone.
        progress: True or False for progress bars; None shows them on a terminal.

    Raises:
        TraceError, TargetError, InfeasibleTargetError, RuntimeUnavailableError: before any training.
        RunFolderError: the folder belongs to another run.
        TrainingError: the loss is no longer finite; the last good state is in the folder.
    """
    job = make_job(
        network,
        example_inputs,
        train_loader,
        val_loader,
        target=target,
        settings=settings,
        run_folder=run_folder,
        loss=loss,
        name=name,
        progress=progress,
    )
    finished = job.folder.file("report.json").exists()
    if not finished:
        check(job)
    job.folder.claim(job.identity(), resume=resume, untold=untold(job.settings.options))
    if not finished:
        _run(job)
    return _result(job)


def make_job(
    network: nn.Module,
    example_inputs: ExampleInputs,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    *,
    target: Target | Sequence[Target],
    settings: PruningSettings | None = None,
    run_folder: str | Path,
    loss: LossFunction | None = None,
    name: str | None = None,
    progress: bool | None = None,
) -> Job:
    """What `prune_to_target` works on; nothing is measured or written yet. Arguments as there."""
    targets = _checked_targets(target)
    if settings is not None and not isinstance(settings, PruningSettings):
        raise ConfigError(
            "settings",
            [f"is {settings!r}, needs PruningSettings(...), such as PruningSettings(samples=50)"],
        )
    if loss is not None and not callable(loss):
        raise ConfigError("loss", [f"is {loss!r}, needs a callable: loss(logits, targets)"])
    return Job(
        network,
        example_inputs,
        train_loader,
        val_loader,
        targets,
        settings or PruningSettings(),
        run_folder,
        loss,
        name or type(network).__name__,
        progress,
    )


def check(job: Job) -> None:
    """Refuse, before anything is measured or trained, what would fail later.

    Raises:
        ConfigError, TrainingError, FileFormatError, MissingExtraError: labels that the network has no
            outputs for, data of which no accuracy can be told, samples that are not there or of
            another network or runtime, more workers than there is room for, a library that is missing.
    """
    for loader in (job.train_loader, job.val_loader):
        batches_of(loader)
    preparation.check_samples(job)
    if job.latency_target is not None:
        job.study.farm(job.settings.workers)
    if job.strategy.hands_over_untrained and not job.total_epochs:
        raise ConfigError(
            "pruning settings",
            [
                f"fine_tune_epochs is 0, and `{job.settings.strategy}` hands over freshly initialised "
                "weights, which nothing would train; give epochs, or let it inherit the weights"
            ],
        )
    unifying.check(job)
    if job.loss is None:
        check_labels(
            job.dense,
            job.example_inputs,
            train_loader=job.train_loader,
            val_loader=job.val_loader,
        )
    check_scored(job.dense, job.val_loader)


def _checked_targets(target: object) -> list[Target]:
    """The targets as a list; whether each is one, and whether they go together, the job says."""
    if isinstance(target, Target):
        return [target]
    if isinstance(target, Iterable) and not isinstance(target, (str, bytes, Mapping)):
        return list(target)
    hint = ""
    if isinstance(target, (int, float)) and not isinstance(target, bool):
        hint = f"; for milliseconds LatencyTarget(milliseconds={target})"
    raise ConfigError(
        "target",
        [f"is {target!r}, needs a LatencyTarget, MacsTarget or ParametersTarget, or a list{hint}"],
    )


def _run(job: Job) -> None:
    """The stages in order; each is skipped when an earlier sitting finished it."""
    preparation.measure_baseline(job)
    if job.within_limits(job.baseline) and not job.space.capped:
        logger.warning(
            "%s: within the target as it is (%.4g ms); nothing to prune",
            job.name, job.baseline["latency_ms"],
        )  # fmt: skip
        whole = PruningPlan.leading(job.space, job.space.full_widths)
        delivery.export(job, job.dense, 0)
        record.write(job, *unifying.unify(job, whole, job.dense))
        return
    preparation.find_grid(job)
    preparation.fit_lpnet(job)
    preparation.check_target_is_feasible(job)
    decision = learning.decide(job)
    plan = delivery.settle(job, decision)
    plan, network = delivery.remove_channels(job, decision.network, plan)
    network = learning.fine_tune(job, network)
    plan, network = delivery.deliver(job, plan, network, decision.scores)
    plan, network = unifying.unify(job, plan, network)
    record.write(job, plan, network, decision)


def _warn_when_slower(job: Job, report: dict[str, Any]) -> None:
    """MACs and parameters are no promise of speed; where they broke it, say so."""
    before, after = report["baseline"]["latency_ms"], report["final"]["latency_ms"]
    if job.latency_target is None and after > before and job.folder.is_writer:
        logger.warning(
            "%s: the smaller network is slower, %.4g ms after %.4g ms on %s; fewer MACs or "
            "parameters are no promise of speed. Give a LatencyTarget for your runtime, or widths "
            "it likes (grid=16)",
            job.name, after, before, job.study.runtime.name,
        )  # fmt: skip


def _result(job: Job) -> PruningResult:
    report = record.read(job)
    _warn_when_slower(job, report)
    plan = PruningPlan.load(job.folder.file("plan.json"), space=job.space)
    return PruningResult(
        job.stored(plan).eval(),
        plan,
        report,
        job.folder.path,
        job.artefact,
        report["contract"] == "held",
    )
