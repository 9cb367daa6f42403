"""The strategy's decision, and the training of what is left."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from torch import nn

from wgates_plugin.pipeline import delivery
from wgates_plugin.pipeline.job import Job
from wgates_plugin.strategies.base import Decision

DECISION_STATE = "decision.pt"
FINE_TUNE_STATE = "fine-tune.pt"


def decide(job: Job) -> Decision:
    """Let the strategy decide; its trained network, scores and wanted widths."""
    task = job.task()
    if job.lpnet is not None and job.settings.efficiency == "latency":
        task.settle = functools.partial(delivery.settle_start, job)
    state = job.folder.load_state(DECISION_STATE)
    if state is not None:
        network = task.network.cpu()
        network.load_state_dict(state.pop("network"))
        return Decision(network, **{**state, "widths": tuple(state["widths"])})
    with job.folder.clock("gates"):
        decision = job.strategy.decide(task)
    decision = decision.plain(job.space, f"strategy `{job.settings.strategy}`")
    fields = {f.name: getattr(decision, f.name) for f in dataclasses.fields(decision)}
    job.folder.save_state(
        DECISION_STATE,
        {**fields, "network": decision.network.state_dict(), "widths": list(decision.widths)},
    )
    job.done(_words(job, decision), "gates")
    return decision


def _words(job: Job, decision: Decision) -> str:
    words = f"{job.settings.strategy}: deciding"
    if job.phase_epochs:
        words += f", {job.phase_epochs} epochs"
    last = decision.monitor[-1] if decision.monitor else {}
    if "open_share" in last:
        words += f": {last['open_share']:.0%} open"
    if "violation" in last:
        words += f", cost {last['violation']:+.1%} off the target"
    return words


def fine_tune(job: Job, network: nn.Module) -> nn.Module:
    """Train the smaller network on, along the rest of the learning-rate schedule."""
    epochs = job.total_epochs - job.first_fine_tune_epoch
    if epochs == 0:
        return network
    trainer = job.trainer(network, "fine-tune", job.total_epochs, job.settings.training)
    trainer.epoch = job.first_fine_tune_epoch
    state = job.folder.load_state(FINE_TUNE_STATE)
    if state is not None:
        network.load_state_dict(state["network"])
        trainer.load_state_dict(state["trainer"])
        trainer.history = state["history"]

    def save(*_: object) -> None:
        job.folder.save_state(
            FINE_TUNE_STATE,
            {
                "network": network.state_dict(),
                "trainer": trainer.state_dict(),
                "history": trainer.history,
            },
        )

    if trainer.epoch < job.total_epochs:
        with job.folder.clock("fine_tune"):
            trainer.run(on_epoch_end=save, progress=job.progress)
    job.done(
        f"fine-tuning, {epochs} epochs: accuracy on training images "
        f"{_last_accuracy(trainer.history)}",
        "fine_tune",
    )
    return network.cpu()


def _last_accuracy(history: list[dict[str, Any]]) -> str:
    found = history[-1].get("accuracy") if history else None
    return "not known" if found is None else f"{found:.2%}"


def training_log(job: Job, decision: Decision | None) -> list[dict[str, Any]]:
    """Records of all epochs, of both phases."""
    rows = list(decision.history) if decision else []
    state = job.folder.load_state(FINE_TUNE_STATE)
    return rows + (state["history"] if state else [])


def gate_log(decision: Decision | None, *, points: int) -> list[dict[str, float]]:
    """The monitor of the strategy's phase, thinned to about so many steps."""
    monitor = decision.monitor if decision else []
    return monitor[:: max(1, len(monitor) // points)]
