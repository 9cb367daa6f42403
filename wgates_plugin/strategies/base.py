"""What every strategy is given, and what it answers; `table.py` has them by name.

A strategy turns a network, data and a budget into merits of channels and the widths it wants. It does
not remove anything, and measures only by `Task.settle`: doors and pipeline settle the widths and cut.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from wgates_plugin.calling import ExampleInputs
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget
from wgates_plugin.efficiency.belonging import check_models
from wgates_plugin.errors import ConfigError
from wgates_plugin.plan import PruningPlan, score_problem
from wgates_plugin.run_folder import weights_digest
from wgates_plugin.training.engine import LossFunction, Trainer
from wgates_plugin.training.launch import default_fabric, share_loader
from wgates_plugin.training.settings import TrainingSettings
from wgates_plugin.transforms import Step


class Checkpoints(Protocol):
    """Where a strategy keeps what an interrupted phase goes on from: plain values and tensors."""

    def load_state(self, name: str) -> dict[str, Any] | None: ...

    def save_state(self, name: str, state: dict[str, Any]) -> None: ...


class InMemory:
    """Checkpoints that live as long as the process, for doors without a run folder.

    What is kept is a copy, as on disk: tensors that are trained on change nothing in it.
    """

    def __init__(self) -> None:
        self._states: dict[str, dict[str, Any]] = {}

    def load_state(self, name: str) -> dict[str, Any] | None:
        return copy.deepcopy(self._states.get(name))

    def save_state(self, name: str, state: dict[str, Any]) -> None:
        self._states[name] = copy.deepcopy(state)


Settle = Callable[[Tensor, Sequence[int]], tuple[tuple[int, ...], Budget]]


@dataclass
class Task:
    """What a strategy is given to decide on.

    Attributes:
        network: a copy that may be trained, on the device of the training; its structure stays.
        budget: limits on differentiable models of the widths. grid: multiple that widths lie on.
        train_loader: batches (inputs, targets), with a length.
        epochs: length of the strategy's own phase; 0 decides without learning.
        training: settings of that phase. total_epochs: length of the schedule it is a part of.
        train_weights: False learns with the network's weights frozen.
        fabric: processes and device of the phase; by default those that `training` asks for, to which
            a network that is to learn is moved.
        seed: of everything random. checkpoints: what an interrupted phase goes on from.
        settle: scores (total_units,) and widths (G,) -> widths near them that were measured to keep
            the budget, and that budget, exact there. Measured once, for the first that ask; None
            where nothing can be.
    """

    network: nn.Module
    space: ChannelSpace
    budget: Budget
    example_inputs: ExampleInputs
    train_loader: Iterable[Any]
    grid: int = 1
    epochs: int = 2
    total_epochs: int = 2
    training: TrainingSettings = field(default_factory=TrainingSettings)
    train_weights: bool = True
    loss: LossFunction | None = None
    teacher: nn.Module | None = None
    fabric: Any = None
    seed: int = 0
    checkpoints: Checkpoints = field(default_factory=InMemory)
    progress: bool | None = None
    settle: Settle | None = None

    def __post_init__(self) -> None:
        check_models(self.space, self.budget)
        if self.fabric is None:
            self.fabric = default_fabric(self.training)
            if self.epochs:
                self.network.to(self.fabric.device)

    def average(self, value: Tensor) -> Tensor:
        """Mean over processes."""
        mean: Tensor = self.fabric.all_reduce(value, reduce_op="mean")
        return mean

    @functools.cached_property
    def weights_digest(self) -> str:
        """Of the network as it came: to be asked for before it learns, and the same ever after."""
        found: str = self.fabric.broadcast(weights_digest(self.network))
        return found

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def steps(self) -> int:
        """Optimizer steps in the strategy's phase, of which every process makes as many.

        Raises:
            TrainingError: a loader that no trainer takes, see `Trainer`.
        """
        if not self.epochs:
            return 0
        return self.epochs * len(share_loader(self.train_loader, self.fabric))

    def trainer(
        self,
        network: nn.Module,
        label: str,
        *,
        total_epochs: int | None = None,
        training: TrainingSettings | None = None,
    ) -> Trainer:
        """A training loop over the task's data; by default along the job's one schedule."""
        training = training or self.training
        return Trainer(
            network,
            self.train_loader,
            training,
            fabric=self.fabric,
            loss=self.loss,
            teacher=self.teacher if training.distillation_weight > 0 else None,
            total_epochs=self.total_epochs if total_epochs is None else total_epochs,
            seed=self.seed,
            label=label,
        )


@dataclass(frozen=True)
class Decision:
    """What a strategy answers.

    Attributes:
        network: the task's network with the weights that are to be cut, nothing attached to it.
        scores: merit of each unit (total_units,), on the CPU; the highest of each group stay.
        widths: wanted widths (G,); the budget and measurements have the last word.
        learned: the weights have learned with no more than these widths open, so that every further
            cut costs some of it.
        monitor: numbers of each step of the phase. history: records of its epochs.
        facts: what the report should show, as JSON.
        pictures: name -> image (H, W, 3) uint8, for the report.
    """

    network: nn.Module
    scores: Tensor
    widths: tuple[int, ...]
    learned: bool = field(default=False, kw_only=True)
    monitor: list[dict[str, float]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Tensor] = field(default_factory=dict)

    def plain(self, space: ChannelSpace, subject: str) -> Decision:
        """The same in plain values, on the CPU: what can be written down and read again.

        Raises:
            PlanError: widths that the space cannot have.
            ConfigError: scores that are not one finite number per unit, or what it tells is no JSON, or
                not a number; names the groups and the keys.
        """
        told: dict[str, Any] = {}
        wrong = score_problem(space, self.scores)
        problems = [f"decision.scores: {wrong}"] if wrong else []
        for name in ("monitor", "history", "facts"):
            try:
                text = json.dumps(getattr(self, name), default=_plain_number, allow_nan=False)
                told[name] = json.loads(text)
            except (TypeError, ValueError) as error:
                problems.append(f"decision.{name}: {error}; give finite numbers, words and lists")
        if problems:
            raise ConfigError(subject, problems)
        widths = space.check_widths(self.widths)
        scores = self.scores.detach().cpu()
        return dataclasses.replace(
            self, network=self.network.cpu(), widths=widths, scores=scores, **told
        )


def _plain_number(value: Any) -> Any:
    """Of an array or a tensor, or of one of their numbers."""
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is no JSON")


class Strategy(ABC):
    """Turns a `Task` into a `Decision`.

    Laws: the same seed and data give the same decision; the widths lie on the grid and above every
    floor, and aim at the task's budget, of which doors and pipeline have the last word; an
    interrupted phase goes on from its checkpoints and ends in the same place; the network it returns
    computes, with the channels outside its best `widths` gated off, what the strategy trained or
    judged.

    Attributes:
        settings_type: frozen dataclass of options, its defaults the recommended ones.
        has_phase: it learns for `Task.epochs`. Otherwise these epochs go to fine-tuning.
        trains_weights: the phase trains the network's weights, along the fine-tuning's schedule.
        hands_over_untrained: its network has weights that no training has seen.
        summary: one line of what it does, with its paper.
    """

    settings_type: ClassVar[type]
    has_phase: ClassVar[bool] = True
    trains_weights: ClassVar[bool] = True
    summary: ClassVar[str] = ""

    def __init__(self, settings: Any = None) -> None:
        self.settings = self.settings_type() if settings is None else settings

    @property
    def hands_over_untrained(self) -> bool:
        return False

    @abstractmethod
    def decide(self, task: Task) -> Decision: ...

    def prepare(self, network: nn.Module, example_inputs: ExampleInputs) -> list[Step]:
        """Steps (see `transforms`) to change the network by before it is traced; none by default."""
        return []

    def finish(
        self, network: nn.Module, plan: PruningPlan, example_inputs: ExampleInputs
    ) -> list[Step]:
        """Steps to change the smaller network by, none of which changes what it computes."""
        return []


def option_names(strategy: type[Strategy]) -> list[str]:
    """Options of a strategy by name; the grid is the job's, not an option."""
    return [f.name for f in dataclasses.fields(strategy.settings_type) if f.name != "grid"]


Strategies = Mapping[str, type[Strategy]]
