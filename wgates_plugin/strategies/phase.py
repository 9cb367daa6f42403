"""A strategy's own phase of training: checked in every epoch, resumed where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import nn

from wgates_plugin.errors import TrainingError
from wgates_plugin.strategies.base import Strategy, Task
from wgates_plugin.strategies.own_checkpoints import own_checkpoints
from wgates_plugin.training import StepContext, Trainer

PHASE_STATE = "phase.pt"
LAST_GOOD = "phase-last-good.pt"


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def run_phase(
    strategy: Strategy,
    task: Task,
    trainer: Trainer,
    parts: Mapping[str, Stateful],
    step: Callable[[StepContext], dict[str, float]],
    *,
    before: Callable[[StepContext], None] | None = None,
) -> list[dict[str, float]]:
    """Train for `task.epochs`, saving after each; returns the numbers of each step.

    Args:
        strategy: whose phase it is; a phase of another one, or of other settings, is not gone on with.
        parts: what has state besides the trainer, by name; the network among them.
        step: called after each backward pass, before the optimizer's step; returns what to log.
        before: called before each forward pass.

    Raises:
        TrainingError: a loss or gradient is not finite; the last good state is kept.
        RunFolderError: the task's checkpoints hold another phase, see `own_checkpoints`.
    """
    monitor: list[dict[str, float]] = []
    checkpoints = own_checkpoints(strategy, task)
    state = checkpoints.load_state(PHASE_STATE)
    if state is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        trainer.load_state_dict(state["trainer"])
        trainer.history, monitor = list(state["history"]), list(state["monitor"])

    def after(context: StepContext) -> None:
        monitor.append({"step": context.step, "loss": float(context.loss or 0.0), **step(context)})

    def save(name: str) -> None:
        checkpoints.save_state(
            name,
            {
                **{name: part.state_dict() for name, part in parts.items()},
                "trainer": trainer.state_dict(),
                "history": trainer.history,
                "monitor": monitor,
            },
        )

    try:
        if trainer.epoch < task.epochs:
            trainer.run(
                epochs=task.epochs - trainer.epoch,
                before_forward=before,
                after_backward=after,
                on_epoch_end=lambda *_: save(PHASE_STATE),
                progress=task.progress,
            )
    except TrainingError:
        # The trainer stops before the bad step is made: what is here now is the last good state.
        save(LAST_GOOD)
        raise
    return monitor


def drop_frozen(task: Task, network: nn.Module, learning: Iterable[nn.Parameter] = ()) -> None:
    """Drop the gradients of `network` but those of `learning`, unless `task` trains its weights."""
    if task.train_weights:
        return
    kept = {id(parameter) for parameter in learning}
    for parameter in network.parameters():
        if id(parameter) not in kept:
            parameter.grad = None
