"""What all stages of a job share: the network, its space, data, limits, and the run folder."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin.callables import name_of
from wgates_plugin.calling import ExampleInputs, copied, refuse_other_device, to_cpu
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.efficiency.base import Budget, EfficiencyModel, Limit
from wgates_plugin.efficiency.counts import MacsModel, ParametersModel
from wgates_plugin.efficiency.lpnet import LPNet
from wgates_plugin.errors import ConfigError
from wgates_plugin.files import load_tensors, save_tensors
from wgates_plugin.latency.base import Measurement
from wgates_plugin.latency_study import LatencyStudy
from wgates_plugin.pipeline.identity import identity_of_request, settings_as_json
from wgates_plugin.plan import PruningPlan
from wgates_plugin.run_folder import RunFolder, weights_digest
from wgates_plugin.strategies.base import Task
from wgates_plugin.strategies.budgeting import uniform_widths
from wgates_plugin.strategies.table import make_strategy
from wgates_plugin.surgery import rebuild
from wgates_plugin.targets import (
    LatencyTarget,
    MacsTarget,
    ParametersTarget,
    PruningSettings,
    Target,
)
from wgates_plugin.tracing import trace
from wgates_plugin.training import (
    Trainer,
    TrainingSettings,
    default_fabric,
    evaluate,
    recalibrate_batchnorm,
)
from wgates_plugin.training.as_found import random_state_kept, seed_epoch
from wgates_plugin.training.engine import LossFunction
from wgates_plugin.training.progress import Bar
from wgates_plugin.transforms import apply_steps

logger = logging.getLogger("wgates_plugin")


@dataclass(frozen=True)
class PruningResult:
    """What the job leaves behind.

    Attributes:
        network: the smaller network, in eval mode. artefact: the exported file that was measured.
        held: True when the artefact was measured at or under every target.
    """

    network: nn.Module
    plan: PruningPlan
    report: dict[str, Any]
    run_folder: Path
    artefact: Path
    held: bool

    def __repr__(self) -> str:
        before, after = self.report["baseline"], self.report["final"]
        return (
            f"PruningResult({self.report['contract']}: {before['latency_ms']:.4g} -> "
            f"{after['latency_ms']:.4g} ms, accuracy {before['accuracy']:.2%} -> "
            f"{after['accuracy']:.2%}, artefact {str(self.artefact)!r})"
        )


class Job:
    """One run of the pipeline. The given network is copied, never touched.

    Attributes:
        dense: the untouched network on the CPU, changed only by the steps in `before`.
        study: everything measured on it. strategy: who decides.
        baseline: facts of the dense network, once measured. grid: the channel multiple, once found.
        lpnet: the latency predictor, once fitted; None without a latency target.
        bound: what of its predictions the budget holds, see `LatencyTarget`.
    """

    baseline: dict[str, Any]
    grid: int

    def __init__(
        self,
        network: nn.Module,
        example_inputs: ExampleInputs,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any],
        targets: list[Target],
        settings: PruningSettings,
        run_folder: str | Path,
        loss: LossFunction | None,
        name: str,
        progress: bool | None,
    ) -> None:
        self.settings, self.name, self.loss, self.progress = settings, name, loss, progress
        self.train_loader, self.val_loader = train_loader, val_loader
        refuse_other_device(network, example_inputs)
        self.example_inputs = to_cpu(example_inputs)
        self.latency_target, self.count_targets = _sort_targets(targets)
        self.fabric = default_fabric(settings.training)
        self.folder = RunFolder(run_folder, self.fabric)
        self.strategy = make_strategy(settings.strategy, settings.options)
        self.dense = copied(network).cpu()
        self.before = self.strategy.prepare(self.dense, self.example_inputs)
        self.dense = apply_steps(self.dense, self.before)
        self.space = trace(
            self.dense,
            self.example_inputs,
            ignored_layers=settings.ignored_layers,
            min_channels=settings.min_channels,
            min_fraction=settings.min_fraction,
            floors=settings.floors,
            caps=settings.caps,
        )
        self.study = LatencyStudy(
            self.dense,
            self.space,
            self.example_inputs,
            self.latency_target or LatencyTarget(fraction=1.0, runtime="eager"),
        )
        self.lpnet: LPNet | None = None
        self.bound = self.latency_target.bound if self.latency_target else "expected"

    @property
    def phase_epochs(self) -> int:
        """Epochs in which the strategy learns."""
        return self.settings.gate_epochs if self.strategy.has_phase else 0

    @property
    def phase_trains_weights(self) -> bool:
        return self.strategy.trains_weights and self.settings.train_weights

    @property
    def first_fine_tune_epoch(self) -> int:
        """Where fine-tuning starts on the one schedule of all epochs that train weights."""
        return self.phase_epochs if self.phase_trains_weights else 0

    @property
    def total_epochs(self) -> int:
        """Length of that schedule. Epochs that a strategy has no use for go to the fine-tuning."""
        unused = self.settings.gate_epochs - self.phase_epochs
        return self.first_fine_tune_epoch + unused + self.settings.fine_tune_epochs

    @property
    def artefact(self) -> Path:
        return self.folder.file(self.study.runtime.artefact_name)

    def identity(self) -> dict[str, Any]:
        """What makes this run this run: a folder of another one is not continued."""
        targets = [t for t in (self.latency_target, *self.count_targets) if t is not None]
        return {
            "kind": "wgates-run",
            "version": 1,
            "network": self.name,
            "structure": self.space.fingerprint,
            "weights": weights_digest(self.dense),
            "runtime": self.study.identity,
            **identity_of_request(targets, self.settings, self.train_loader, self.val_loader),
            "loss": None if self.loss is None else name_of(self.loss),
        }

    def settings_as_json(self) -> dict[str, Any]:
        return settings_as_json(self.settings)

    # Limits

    @property
    def limits(self) -> dict[str, float | None]:
        """The targets as amounts: ms, MACs and parameters; None where there is no limit."""
        found: dict[str, float | None] = {"latency_ms": None, "macs": None, "parameters": None}
        if self.latency_target is not None:
            found["latency_ms"] = self.latency_target.resolve(self.baseline["latency_ms"])
        for target in self.count_targets:
            what = "macs" if isinstance(target, MacsTarget) else "parameters"
            found[what] = target.resolve(self.baseline[what])
        return found

    def within_limits(self, facts: dict[str, Any], *, noise: float = 0.0) -> bool:
        """Whether all targets hold; the latency may be over by `noise`, a share of its target."""
        allowed = {"latency_ms": 1.0 + noise}
        return all(
            limit is None or facts[what] <= limit * allowed.get(what, 1.0)
            for what, limit in self.limits.items()
        )

    @property
    def aim_ms(self) -> float | None:
        """A little under the latency target, so that noise does not break the contract."""
        target = self.limits["latency_ms"]
        return None if target is None else target * (1.0 - self.settings.margin)

    def count_limits(self) -> list[Limit]:
        limits = self.limits
        found = []
        if limits["macs"] is not None:
            found.append(Limit(MacsModel(self.space), limits["macs"]))
        if limits["parameters"] is not None:
            found.append(Limit(ParametersModel(self.space), limits["parameters"]))
        return found

    def budget(self, lpnet: LPNet | None) -> Budget:
        """All limits; latency as `lpnet` predicts it, held to the aim."""
        if lpnet is None or self.aim_ms is None:
            return Budget.of(*self.count_limits())
        return Budget.of(Limit(self.bounded(lpnet), self.aim_ms), *self.count_limits())

    def strategy_budget(self) -> Budget:
        """What the strategy is held to: the budget, its latency in MACs if the settings say so."""
        budget = self.budget(self.lpnet)
        if self.lpnet is None or self.settings.efficiency == "latency":
            return budget
        model = MacsModel(self.space)
        uniform = torch.tensor(uniform_widths(self.space, budget, self.grid), dtype=torch.float64)
        return Budget.of(Limit(model, float(model(uniform))), *self.count_limits())

    def bounded(self, lpnet: LPNet) -> EfficiencyModel:
        """What of `lpnet` is held to the aim: its prediction, or its interval's upper end."""
        return lpnet.upper() if self.bound == "upper" else lpnet

    # Tools of several stages

    def task(self) -> Task:
        """What the strategy is given: a copy of the network on the device of the training."""
        settings = self.settings
        return Task(
            copied(self.dense).to(self.fabric.device),
            self.space,
            self.strategy_budget(),
            self.example_inputs,
            self.train_loader,
            grid=self.grid,
            epochs=self.phase_epochs,
            total_epochs=self.total_epochs if self.phase_trains_weights else self.phase_epochs,
            training=settings.training,
            train_weights=settings.train_weights,
            loss=self.loss,
            teacher=self.teacher(settings.training),
            fabric=self.fabric,
            seed=settings.seed,
            checkpoints=self.folder,
            progress=self.progress,
        )

    def teacher(self, training: TrainingSettings) -> nn.Module | None:
        return copied(self.dense) if training.distillation_weight > 0 else None

    def done(self, words: str, *phases: str) -> None:
        """One line of the log: a stage is behind us. `phases` are those of its wall time."""
        if not self.folder.is_writer:
            return
        spent = self.folder.seconds()
        seconds = sum(spent.get(phase, 0.0) for phase in phases)
        logger.info("%s%s", words, f" ({seconds:.1f} s)" if phases else "")

    def facts(
        self,
        network: nn.Module,
        widths: Sequence[int],
        latency: Measurement,
        *,
        other_layers: bool = False,
    ) -> dict[str, Any]:
        """Latency, accuracy, MACs and parameters of a network, as JSON.

        Args:
            other_layers: it has others than the untouched network at these widths, and is traced.
        """
        space = self.space
        if other_layers:
            space = DependencyTrace(network.cpu(), self.example_inputs).space()
            widths = space.full_widths
        row = torch.tensor(widths, dtype=torch.float64)
        return {
            "latency_ms": latency.latency_ms,
            "accuracy": self.accuracy(network),
            "macs": float(MacsModel(space)(row)),
            "parameters": float(ParametersModel(space)(row)),
            "latency": latency.to_json(),
        }

    def accuracy(self, network: nn.Module) -> float:
        network.to(self.fabric.device)
        found = evaluate(network, self.val_loader).accuracy
        network.cpu()
        return found

    def trainer(
        self, network: nn.Module, label: str, total_epochs: int, training: TrainingSettings
    ) -> Trainer:
        return Trainer(
            network.to(self.fabric.device),
            self.train_loader,
            training,
            fabric=self.fabric,
            loss=self.loss,
            teacher=self.teacher(training),
            total_epochs=total_epochs,
            seed=self.settings.seed,
            label=label,
        )

    def recalibrate(self, network: nn.Module) -> None:
        """BatchNorm statistics for the smaller network; the same images whatever came before."""
        network.to(self.fabric.device)
        with random_state_kept(self.fabric.device, self.train_loader):
            seed_epoch(self.settings.seed, 0, self.fabric.device, self.train_loader)
            recalibrate_batchnorm(
                network, self.train_loader, images=self.settings.recalibration_images
            )
        network.cpu()

    def store(self, plan: PruningPlan, network: nn.Module) -> None:
        """Write the network as it stands: plan and weights."""
        if self.folder.is_writer:
            save_tensors(self.folder.file("pruned.safetensors"), network.state_dict())
            plan.save(self.folder.file("plan.json"))

    def stored(self, plan: PruningPlan) -> nn.Module:
        """The network that was stored last."""
        state = load_tensors(self.folder.file("pruned.safetensors"), kind="pruned weights")
        return self.rebuilt(plan, state)

    def rebuilt(self, plan: PruningPlan, state: Mapping[str, Tensor]) -> nn.Module:
        """The plan's network with these weights."""
        # `dense` is prepared already.
        note = {key: value for key, value in plan.note.items() if key != "before"}
        return rebuild(self.dense, dataclasses.replace(plan, note=note), state)

    def bar(self, label: str, total: int) -> Bar:
        return Bar(label, total, wanted=self.progress if self.folder.is_writer else False)


def _sort_targets(
    targets: Sequence[Target],
) -> tuple[LatencyTarget | None, list[MacsTarget | ParametersTarget]]:
    """The one latency target, if any, and the others.

    Raises:
        ConfigError: none, one that is no target, or two of a kind.
    """
    kinds = [type(target).__name__ for target in targets]
    problems = [] if targets else ["no target given; give a LatencyTarget"]
    problems += [
        f"{target!r} is no target; use LatencyTarget, MacsTarget or ParametersTarget"
        for target in targets
        if not isinstance(target, Target)
    ]
    problems += [
        f"{kind} is given {kinds.count(kind)} times; give one of a kind"
        for kind in sorted(set(kinds))
        if kinds.count(kind) > 1
    ]
    if problems:
        raise ConfigError("targets", problems)
    latency = next((t for t in targets if isinstance(t, LatencyTarget)), None)
    return latency, [t for t in targets if not isinstance(t, LatencyTarget)]
