"""The two training phases: gates with weights, and what is left alone."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import nn

from wgates_plugin.errors import TrainingError
from wgates_plugin.pipeline.job import Job
from wgates_plugin.strategies.wgates import WGates
from wgates_plugin.training import StepContext

GATES_STATE = "gates.pt"
FINE_TUNE_STATE = "fine-tune.pt"


def learn_gates(job: Job) -> tuple[nn.Module, WGates]:
    """Train gates and weights together; returns the network, gates off, and what they learned."""
    settings = job.settings
    network = copy.deepcopy(job.dense).to(job.fabric.device)
    gates = WGates(
        network,
        job.space,
        job.budget(job.lpnet),
        dataclasses.replace(settings.gates, grid=job.grid),
        steps=max(1, settings.gate_epochs * len(job.train_loader)),  # type: ignore[arg-type]
        average=lambda gradient: job.fabric.all_reduce(gradient, reduce_op="mean"),  # type: ignore[arg-type, return-value]
    )
    if settings.gate_epochs == 0:
        return network, gates
    trainer = job.trainer(network, "gates", job.total_epochs, settings.training)
    monitor: list[dict[str, float]] = []
    state = job.folder.load_state(GATES_STATE)
    if state is not None:
        network.load_state_dict(state["network"])
        gates.load_state_dict(state["gates"])
        trainer.load_state_dict(state["trainer"])
        trainer.history, monitor = state["history"], state["monitor"]

    def step(context: StepContext) -> None:
        record = gates.regularize()
        if not settings.train_weights:
            for parameter in network.parameters():
                parameter.grad = None
        monitor.append({"loss": float(context.loss or 0.0), **record})

    def save(name: str) -> None:
        job.folder.save_state(
            name,
            {
                "network": network.state_dict(),
                "gates": gates.state_dict(),
                "trainer": trainer.state_dict(),
                "history": trainer.history,
                "monitor": monitor,
            },
        )

    gates.attach()
    try:
        if trainer.epoch < settings.gate_epochs:
            with job.folder.clock("gates"):
                trainer.run(
                    epochs=settings.gate_epochs - trainer.epoch,
                    after_backward=step,
                    on_epoch_end=lambda *_: save(GATES_STATE),
                    progress=job.progress,
                )
    except TrainingError:
        # The trainer stops before the bad step is made: what is here now is the last good state.
        save("gates-last-good.pt")
        raise
    finally:
        gates.detach()
    words = f"learning the gates, {settings.gate_epochs} epochs"
    if monitor:
        last = monitor[-1]
        words += f": {last['open_share']:.0%} open, cost {last['violation']:+.1%} off the target"
    job.done(words, "gates")
    return network, gates


def fine_tune(job: Job, network: nn.Module) -> nn.Module:
    """Train the smaller network on, along the rest of the learning-rate schedule."""
    settings = job.settings
    if settings.fine_tune_epochs == 0:
        return network
    trainer = job.trainer(network, "fine-tune", job.total_epochs, settings.training)
    trainer.epoch = settings.gate_epochs
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
        f"fine-tuning, {settings.fine_tune_epochs} epochs: accuracy on training images "
        f"{_last_accuracy(trainer.history)}",
        "fine_tune",
    )
    return network.cpu()


def _last_accuracy(history: list[dict[str, Any]]) -> str:
    found = history[-1].get("accuracy") if history else None
    return "not known" if found is None else f"{found:.2%}"


def training_log(job: Job) -> list[dict[str, Any]]:
    """Records of all epochs, of both phases."""
    rows: list[dict[str, Any]] = []
    for name in (GATES_STATE, FINE_TUNE_STATE):
        state = job.folder.load_state(name)
        rows += state["history"] if state else []
    return rows


def gate_log(job: Job, *, points: int) -> list[dict[str, float]]:
    """The monitor of the gate phase, thinned to about so many steps."""
    state = job.folder.load_state(GATES_STATE)
    monitor: list[dict[str, float]] = state["monitor"] if state else []
    return monitor[:: max(1, len(monitor) // points)]
