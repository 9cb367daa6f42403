"""The record of a finished job: report.json, and the readable report beside it."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from wgates_plugin.efficiency.lpnet import LPNet
from wgates_plugin.errors import MissingExtraError
from wgates_plugin.files import read_json, write_json
from wgates_plugin.latency.base import Measurement
from wgates_plugin.latency.environment import describe_environment
from wgates_plugin.pipeline import learning
from wgates_plugin.pipeline.job import Job
from wgates_plugin.pipeline.lpnet_record import predictions, visited_error
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies.base import Decision

logger = logging.getLogger("wgates_plugin")

GATE_POINTS = 500


def write(
    job: Job, plan: PruningPlan, network: nn.Module, decision: Decision | None = None
) -> None:
    """Write plan, weights and report.json; no decision when the network needed no pruning."""

    def compute() -> bool:
        smaller = network.cpu().eval()
        job.store(plan, smaller)
        deliveries = _deliveries(job)
        final = job.facts(
            smaller,
            plan.widths,
            Measurement.from_json(deliveries[-1]),
            other_layers=bool(plan.note.get("after")),
        )
        write_json(job.folder.file("report.json"), _report(job, plan, final, deliveries, decision))
        return True

    job.folder.once("finished", compute)


def read(job: Job) -> dict[str, Any]:
    """The report; its readable page is made when it is not there yet."""
    from wgates_plugin.report import write_report

    if job.folder.is_writer and not job.folder.file("report.html").exists():
        write_report(job.folder.path)
    job.fabric.barrier()
    report: dict[str, Any] = read_json(job.folder.file("report.json"), kind="report")
    return report


def _report(
    job: Job,
    plan: PruningPlan,
    final: dict[str, Any],
    deliveries: list[dict[str, Any]],
    decision: Decision | None,
) -> dict[str, Any]:
    removal, unification = job.folder.stage("removal"), job.folder.stage("unification")
    packed = unification["bytes"] if unification else {"dense": None, "unified": None}
    runtime = job.study.runtime
    return {
        "kind": "wgates-report",
        "version": 1,
        "name": job.name,
        "strategy": job.settings.strategy,
        "runtime": runtime.name,
        "device": runtime.settings.device,
        "identity": job.study.identity,
        "target": job.limits,
        "target_ms": job.limits["latency_ms"],
        "contract": "held" if _holds(job, plan, final) else "missed",
        "seed": job.settings.seed,
        "baseline": {
            **job.baseline,
            "file_bytes": _dense_bytes(job),
            "packed_bytes": packed["dense"],
        },
        "final": {
            **final,
            "file_bytes": job.artefact.stat().st_size,
            "packed_bytes": packed["unified"],
        },
        "after_removal": removal,
        "seconds": _seconds(job),
        "environment": describe_environment(),
        "grid": job.folder.stage("grid"),
        "lpnet": _lpnet(job),
        "widths": [
            {"group": group.name, "dense": group.channels, "kept": width}
            for group, width in zip(job.space.groups, plan.widths, strict=True)
        ],
        "gates": learning.gate_log(decision, points=GATE_POINTS),
        "training": learning.training_log(job, decision),
        "decision": _decision(job, decision),
        "attempts": _attempts(job, plan, deliveries),
        "unification": unification,
        "masked_equals_removed": removal and removal["masked_equals_removed"],
        "settings": job.settings_as_json(),
    }


def _decision(job: Job, decision: Decision | None) -> dict[str, Any]:
    """What the strategy has to show: facts, and pictures as files under `pictures/`."""
    from wgates_plugin.report.plots import save_images

    if decision is None:
        return {"facts": {}, "pictures": []}
    pictures = []
    try:
        images = {name: image.numpy() for name, image in decision.pictures.items()}
        files = save_images(images, job.folder.path / "pictures")
        pictures = [{"name": name, "file": file} for name, file in zip(images, files, strict=True)]
    except MissingExtraError as error:
        logger.info("%s", error)
    return {"facts": decision.facts, "pictures": pictures}


def _holds(job: Job, plan: PruningPlan, final: dict[str, Any]) -> bool:
    """The delivered artefact decides."""
    return job.within_limits(final, noise=_noise(job, plan))


def _noise(job: Job, plan: PruningPlan) -> float:
    """Share of the latency target that breaks nothing: what is the untouched network still was within it
    at the baseline, and may be over by the margin."""
    untouched = plan.widths == job.space.full_widths and job.settings.unification is None
    return job.settings.margin if untouched and job.within_limits(job.baseline) else 0.0


def _deliveries(job: Job) -> list[dict[str, Any]]:
    attempts = (*range(job.settings.attempts), "unified")
    found = (job.folder.stage(f"delivery-{attempt}") for attempt in attempts)
    return [delivery for delivery in found if delivery is not None]


def _attempts(
    job: Job, plan: PruningPlan, deliveries: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    target_ms, noise = job.limits["latency_ms"], _noise(job, plan)
    settled = (job.folder.stage(stage) for stage in ("start", "plan"))
    rows = [attempt for found in settled if found is not None for attempt in found["attempts"]]
    for delivery in deliveries:
        over = target_ms is not None and delivery["latency_ms"] > target_ms * (1.0 + noise)
        rows.append(
            {
                "stage": "delivery",
                "predicted_ms": None,
                "measured_ms": delivery["latency_ms"],
                "verdict": "over" if over else "held",
            }
        )
    return rows


def _seconds(job: Job) -> dict[str, float]:
    """Wall time per phase; "lpnet" is the fit alone, "delivery" includes the export."""
    seconds = job.folder.seconds()
    for outer, inner_phase in (("lpnet", "sampling"), ("gates", "start")):
        if outer in seconds:
            seconds[outer] = max(0.0, seconds[outer] - seconds.get(inner_phase, 0.0))
    inner = ("export",)
    seconds["total"] = sum(value for phase, value in seconds.items() if phase not in inner)
    return seconds


def _dense_bytes(job: Job) -> int:
    path = job.folder.stage_file(f"dense-{job.study.runtime.artefact_name}")
    if not path.exists():
        job.study.runtime.save(job.dense, job.example_inputs, path)
    return path.stat().st_size


def _lpnet(job: Job) -> dict[str, Any] | None:
    facts = job.folder.stage("lpnet")
    if facts is None:
        return None
    fitted = LPNet.load(job.folder.file("lpnet.safetensors"), space=job.space)
    return {
        **facts,
        "mape_visited": visited_error(fitted, job.study.visited),
        "predictions": predictions(fitted, job.study.visited),
    }
