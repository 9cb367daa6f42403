"""Before any training: the baseline, the grid, LPNet, and whether the target can be reached."""

from __future__ import annotations

import functools
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wgates_plugin.efficiency.base import Budget
from wgates_plugin.efficiency.learner import Learner
from wgates_plugin.efficiency.lpnet import LPNet
from wgates_plugin.efficiency.samples.file import SampleFile
from wgates_plugin.efficiency.sampling import draw_widths
from wgates_plugin.errors import ConfigError, InfeasibleTargetError
from wgates_plugin.files import write_text
from wgates_plugin.pipeline.job import Job
from wgates_plugin.strategies.budgeting import check_feasible, fit_to_budget, uniform_widths

logger = logging.getLogger("wgates_plugin")

SAMPLES = "samples.jsonl"

_DESTINATIONS = 3
_MOST_OFF = 0.05
"""Relative. Beyond it, samples of another sitting are worth a warning."""


def measure_baseline(job: Job) -> None:
    """Latency, accuracy, MACs and parameters of the untouched network."""

    def compute() -> dict[str, Any]:
        found = job.study.baseline(job.settings.measure_seconds)
        return job.facts(job.dense, job.space.full_widths, found)

    job.baseline = job.folder.once("baseline", compute)
    job.study.reference_ms = job.baseline["latency_ms"]
    job.done(
        f"measuring the untouched network: {job.baseline['latency_ms']:.4g} ms on "
        f"{job.study.runtime.name}, accuracy {job.baseline['accuracy']:.2%}",
        "baseline",
    )


def find_grid(job: Job) -> None:
    """The channel multiple: the user's, or probed where latency counts."""

    def compute() -> dict[str, Any]:
        if job.settings.grid is not None:
            return {"multiple": job.settings.grid, "probed": False, "evidence": []}
        if job.latency_target is None:
            return {"multiple": 1, "probed": False, "evidence": []}
        probe = job.study.probe()
        return {"multiple": probe["grid"], "probed": True, "evidence": probe["evidence"]}

    found = job.folder.once("grid", compute)
    job.grid = int(found["multiple"])
    if found["probed"]:
        job.done(f"probing the channel grid: multiples of {job.grid}", "grid")


def check_samples(job: Job) -> None:
    """Refuse samples that are of no use to the job, before they are copied into its folder.

    Raises:
        ConfigError: no such file. FileFormatError: as `SampleFile.check`.
    """
    given = job.settings.samples_file
    if given is None or job.folder.file(SAMPLES).exists():
        return
    if not Path(given).is_file():
        raise ConfigError(
            "pruning settings", [f"samples_file is `{given}`, no such file; check the path"]
        )
    if job.latency_target is not None:
        SampleFile.check(given, job.space, job.study.identity)


def fit_lpnet(job: Job) -> None:
    """Sample sub-networks and fit LPNet; without a latency target there is nothing to do."""
    if job.latency_target is None:
        return
    path = job.folder.file("lpnet.safetensors")
    if job.folder.is_writer:
        samples = job.folder.file(SAMPLES)
        if job.settings.samples_file is not None and not samples.exists():
            write_text(samples, Path(job.settings.samples_file).read_text(encoding="utf-8"))
        fitted = job.folder.stage("lpnet") or {}
        job.study.open_files(
            samples, job.folder.stage_file("visited.jsonl"), known=fitted.get("sources", ())
        )
    if job.settings.samples_file is not None:
        _tie_samples(job)

    settings = job.settings

    def compute() -> dict[str, Any]:
        wanted = settings.active and settings.lpnet == "layers"
        towards = functools.partial(destinations, job)
        learner = Learner(job.space, seed=settings.seed, towards=towards) if wanted else None
        with (
            job.folder.clock("sampling"),
            job.bar("sampling", settings.samples) as bar,
        ):
            cost = job.study.sample(
                count=settings.samples,
                grid=job.grid,
                seed=settings.seed,
                seconds_per_sample=settings.seconds_per_sample,
                active=learner.active() if learner else None,
                farm=job.study.farm(settings.workers),
                on_sample=lambda done, _: bar.reach(done),
            )
        lpnet = job.study.fit(seed=settings.seed, structure=settings.lpnet)
        lpnet.save(path)
        assert lpnet.report is not None
        assert job.study.samples is not None
        return {
            "structure": lpnet.structure,
            "samples": lpnet.report.samples,
            "held_out": lpnet.report.held_out,
            "mape_held_out": lpnet.report.mape,
            "within_10_percent": lpnet.report.within_10_percent,
            "worst": lpnet.report.worst,
            "half_width_90": lpnet.report.half_width_90,
            "covered_90": lpnet.held_out.covered(0.9),
            "sources": sorted({sample.source for sample in job.study.samples}),
            "set_aside": sum(job.study.samples.set_aside().values()),
            "measured_again": len(job.study.samples.rejected),
            "active": learner is not None,
            "share_in_inference": cost.share_in_inference if cost.seconds else None,
        }

    facts = job.folder.once("lpnet", compute)
    job.lpnet = LPNet.load(path, space=job.space)
    job.done(
        f"measuring {facts['samples']} sub-networks and fitting LPNet: mean held-out error "
        f"{facts['mape_held_out']:.1%}",
        "lpnet",
    )


def _tie_samples(job: Job) -> None:
    """Samples of another sitting, brought to the ratios that hold in this one."""
    seconds = job.settings.measure_seconds / 2
    factors = job.folder.once(
        "ties", lambda: {str(key): value for key, value in job.study.tie(seconds).items()}
    )
    if job.study.samples is None:  # no writer
        return
    job.study.samples.ties = {int(key): value for key, value in factors.items()}
    worst = max(factors.values(), key=lambda factor: abs(math.log(factor)), default=1.0)
    if abs(worst - 1.0) > _MOST_OFF:
        logger.warning(
            "samples `%s`: their reference takes %.0f %% of what it took beside the untouched "
            "network; one of the two sittings was disturbed. Go on with the present one, or measure "
            "samples anew on a quiet machine", job.settings.samples_file, 100 * worst,
        )  # fmt: skip


def destinations(job: Job, lpnet: LPNet) -> list[tuple[int, ...]]:
    """Widths at the target by `lpnet`: uniform ones, and random ones moved onto it.

    What the gates will want is not known before training; that they end at the target is.
    """
    budget = job.budget(lpnet)
    rng = np.random.default_rng(job.settings.seed)
    try:
        found = [uniform_widths(job.space, budget, job.grid)]
        for _ in range(_DESTINATIONS):
            scores = torch.from_numpy(rng.standard_normal(job.space.total_units))
            start = draw_widths(job.space, job.grid, rng)
            found.append(fit_to_budget(job.space, scores, start, budget, job.grid))
        return found
    except InfeasibleTargetError:  # so far as is known now; the measurement decides later
        return [job.space.least_widths(job.grid)]


def check_target_is_feasible(job: Job) -> None:
    """Measure the least allowed widths, so that no hour is spent on what cannot be.

    Raises:
        InfeasibleTargetError: names the least reachable cost.
    """

    def compute() -> dict[str, Any]:
        counts = job.count_limits()
        if counts:
            check_feasible(job.space, Budget.of(*counts), job.grid)
        target, aim = job.limits["latency_ms"], job.aim_ms
        if target is None or aim is None:
            return {}
        least = job.space.least_widths(job.grid)
        found = job.study.at(least, job.settings.seconds_per_sample).latency_ms
        if found > aim:
            raise InfeasibleTargetError(
                f"latency: target {target:.4g} ms is out of reach; the least allowed widths were "
                f"measured at {found:.4g} ms on {job.study.runtime.name} (the untouched network "
                f"takes {job.baseline['latency_ms']:.4g} ms); ask for more than "
                f"{found / (1.0 - job.settings.margin):.4g} ms, lower `min_fraction` or the floors, "
                "or start from a smaller network"
            )
        return {"least_ms": found, "widths": list(least)}

    measured: dict[str, Any] = job.folder.once("feasibility", compute)
    if measured:
        job.done(
            f"checking that the target can be reached: the least widths take "
            f"{measured['least_ms']:.4g} ms, aimed at {job.aim_ms:.4g} ms",
            "feasibility",
        )
    if job.lpnet is None or _feasible(job):
        return
    if job.bound == "upper":
        logger.warning(
            "LPNet: the upper end of its interval is over the target at the least widths, which "
            "were measured under it; the expected latency is held to the target instead"
        )
        job.bound = "expected"
    if not _feasible(job):
        # LPNet doubts what was measured to be possible: it is the one to be put right.
        job.lpnet = job.lpnet.corrected(measured["widths"], measured["least_ms"])


def _feasible(job: Job) -> bool:
    try:
        check_feasible(job.space, job.budget(job.lpnet), job.grid)
    except InfeasibleTargetError:
        return False
    return True
