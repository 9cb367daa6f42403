"""Before any training: the baseline, the grid, LPNet, and whether the target can be reached."""

from __future__ import annotations

from typing import Any

from wgates_plugin.efficiency.base import Budget
from wgates_plugin.efficiency.lpnet import LPNet
from wgates_plugin.errors import InfeasibleTargetError
from wgates_plugin.pipeline.job import Job
from wgates_plugin.strategies.budgeting import check_feasible


def measure_baseline(job: Job) -> None:
    """Latency, accuracy, MACs and parameters of the untouched network."""

    def compute() -> dict[str, Any]:
        found = job.study.baseline(job.settings.measure_seconds)
        return job.facts(job.dense, job.space.full_widths, found)

    job.baseline = job.folder.once("baseline", compute)
    job.study.reference_ms = job.baseline["latency_ms"]


def find_grid(job: Job) -> None:
    """The channel multiple: the user's, or probed where latency counts."""

    def compute() -> dict[str, Any]:
        if job.settings.grid is not None:
            return {"multiple": job.settings.grid, "probed": False, "evidence": []}
        if job.latency_target is None:
            return {"multiple": 1, "probed": False, "evidence": []}
        probe = job.study.probe()
        return {"multiple": probe["grid"], "probed": True, "evidence": probe["evidence"]}

    job.grid = int(job.folder.once("grid", compute)["multiple"])


def fit_lpnet(job: Job) -> None:
    """Sample sub-networks and fit LPNet; without a latency target there is nothing to do."""
    if job.latency_target is None:
        return
    path = job.folder.file("lpnet.safetensors")
    if job.folder.is_writer:
        job.study.open_files(
            job.folder.file("samples.jsonl"), job.folder.stage_file("visited.jsonl")
        )

    def compute() -> dict[str, Any]:
        with (
            job.folder.clock("sampling"),
            job.bar("sampling", job.settings.samples) as bar,
        ):
            cost = job.study.sample(
                count=job.settings.samples,
                grid=job.grid,
                seed=job.settings.seed,
                seconds_per_sample=job.settings.seconds_per_sample,
                on_sample=lambda done, _: bar.reach(done),
            )
        lpnet = job.study.fit(seed=job.settings.seed)
        lpnet.save(path)
        assert lpnet.report is not None
        return {
            "structure": lpnet.structure,
            "samples": lpnet.report.samples,
            "held_out": lpnet.report.held_out,
            "mape_held_out": lpnet.report.mape,
            "within_10_percent": lpnet.report.within_10_percent,
            "share_in_inference": cost.share_in_inference,
        }

    job.folder.once("lpnet", compute)
    job.lpnet = LPNet.load(path, space=job.space)


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
    if job.lpnet is not None:
        try:
            check_feasible(job.space, job.budget(job.lpnet), job.grid)
        except InfeasibleTargetError:
            # LPNet doubts what was measured to be possible: it is the one to be put right.
            job.lpnet = job.lpnet.corrected(measured["widths"], measured["least_ms"])
