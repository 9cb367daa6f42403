"""Unification from start to end: ADMM, hard projection, retraining with the structure fixed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from wgates_plugin.calling import copied
from wgates_plugin.run_folder import weights_digest
from wgates_plugin.strategies.base import Checkpoints, InMemory
from wgates_plugin.strategies.own_checkpoints import OwnCheckpoints, told_fields
from wgates_plugin.training import StepContext, Trainer, TrainingSettings, recalibrate_batchnorm
from wgates_plugin.training.as_found import random_state_kept, seed_epoch
from wgates_plugin.training.engine import LossFunction
from wgates_plugin.transforms.unification.admm import Admm
from wgates_plugin.transforms.unification.blocks import BlockGrid, layer_grids
from wgates_plugin.transforms.unification.file import save_unified
from wgates_plugin.transforms.unification.projection import (
    KEPT,
    PRUNED,
    UNIFIED,
    Structure,
    project,
)
from wgates_plugin.transforms.unification.settings import UnificationSettings

STATE = "unification.pt"
"""Name of the checkpoint that an interrupted procedure goes on from."""


@dataclass(frozen=True)
class Unified:
    """A network whose weights have the structure, exactly.

    Attributes:
        grids: the blocks of each unified parameter, by its name.
        facts: how far the weights were from the structure before, after ADMM: relative L2 norms.
        history: records of all epochs.
    """

    network: nn.Module
    grids: Mapping[str, BlockGrid]
    facts: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def save(self, path: str | Path) -> int:
        """Write the weights compactly, to be read by `load_unified`; returns bytes on disk."""
        return save_unified(path, self.network.state_dict(), self.grids)


def unify(
    network: nn.Module,
    train_loader: Iterable[Any],
    *,
    settings: UnificationSettings | None = None,
    training: TrainingSettings | None = None,
    loss: LossFunction | None = None,
    teacher: nn.Module | None = None,
    fabric: Fabric | None = None,
    seed: int = 0,
    checkpoints: Checkpoints | None = None,
    skip_small: bool = False,
    recalibration_images: int = 1024,
    progress: bool | None = None,
) -> Unified:
    """Give the layers' small blocks one magnitude each, or none; shapes stay.

    The network is left as found; a copy is trained. Each epoch is saved to `checkpoints`, and the
    same call goes on from there and ends in the same place.

    Args:
        training: of all phases; its `epochs` are the settings' instead.
        skip_small: leave out layers that are smaller than a block, instead of refusing them.
        recalibration_images: for BatchNorm statistics, when nothing is trained after the projection.

    Raises:
        ConfigError: the settings do not fit the network. TrainingError: training broke down.
        RunFolderError: the checkpoints are of other settings, another training, seed or network.
    """
    run = _Run(
        copied(network),
        train_loader,
        settings or UnificationSettings(),
        training or TrainingSettings(),
        {"loss": loss, "teacher": teacher, "fabric": fabric, "seed": seed},
        InMemory() if checkpoints is None else checkpoints,
        skip_small=skip_small,
        progress=progress,
    )
    run.approach()
    run.harden(recalibration_images)
    run.retrain()
    run.share_buffers()
    return Unified(run.network.cpu(), run.grids, run.facts, run.trainer.history)


class _Run:
    """A procedure under way; taken up where its checkpoint left it."""

    def __init__(
        self,
        network: nn.Module,
        loader: Iterable[Any],
        settings: UnificationSettings,
        training: TrainingSettings,
        options: dict[str, Any],
        checkpoints: Checkpoints,
        *,
        skip_small: bool,
        progress: bool | None,
    ) -> None:
        self.network, self.loader, self.settings = network, loader, settings
        self.options, self.progress = options, progress
        rate = settings.learning_rate
        self.training = dataclasses.replace(
            training,
            epochs=settings.total_epochs,
            learning_rate=training.learning_rate if rate is None else rate,
        )
        self.grids = layer_grids(network, settings, skip_small=skip_small)
        self.structures: dict[str, Structure] | None = None
        self.trainer = self._new_trainer()  # it moves the network to its device
        self.admm = Admm(network, self.grids, settings)
        identity = {
            "weights": self.trainer.fabric.broadcast(weights_digest(network)),
            "seed": options["seed"],
            "layers": list(self.grids),
            **told_fields("settings", settings),
            **told_fields("training", dataclasses.replace(self.training, accelerator="auto")),
        }
        self.checkpoints = OwnCheckpoints(checkpoints, identity)
        state = self.checkpoints.load_state(STATE)
        if state is None:
            self.facts: dict[str, Any] = {"distance_before": self.admm.distance()}
        else:
            self._take_up(state)

    def _new_trainer(self) -> Trainer:
        return Trainer(
            self.network,
            self.loader,
            self.training,
            total_epochs=self.settings.total_epochs,
            label="unify",
            **self.options,
        )

    def _take_up(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.trainer.load_state_dict(state["trainer"])
        self.trainer.history, self.facts = list(state["history"]), dict(state["facts"])
        if state["structures"] is None:
            self.admm.load_state_dict(state["admm"])
        else:
            self.structures = {
                name: Structure(grid, state["structures"][name][0], state["structures"][name][1])
                for name, grid in self.grids.items()
            }

    def _save(self) -> None:
        fixed = self.structures
        kept = None if fixed is None else {n: [s.kinds, s.signs] for n, s in fixed.items()}
        state = {
            "network": self.network.state_dict(),
            "trainer": self.trainer.state_dict(),
            "history": self.trainer.history,
            "facts": self.facts,
            "admm": self.admm.state_dict() if fixed is None else None,
            "structures": kept,
        }
        self.checkpoints.save_state(STATE, state)

    def approach(self) -> None:
        """ADMM: train toward the structure, round by round."""
        ahead = self.settings.admm_epochs - self.trainer.epoch
        if self.structures is not None or ahead <= 0:
            return

        def end_of_epoch(epoch: int, _: object) -> None:
            if (epoch + 1) % self.settings.epochs_per_round == 0:
                self.admm.next_round()
            self._save()

        self.trainer.run(
            epochs=ahead,
            after_backward=lambda _: self.admm.add_gradients(),
            on_epoch_end=end_of_epoch,
            progress=self.progress,
        )

    @torch.no_grad()
    def harden(self, recalibration_images: int) -> None:
        """Project the weights, and fix the structure they have then."""
        if self.structures is not None:
            return
        self.facts["distance_after_admm"] = self.admm.distance()
        self.structures = {}
        for name, grid in self.grids.items():
            weight = self.network.get_parameter(name)
            projected, self.structures[name] = project(weight, grid, self.settings)
            weight.copy_(projected)
        found = [structure.kinds for structure in self.structures.values()]
        kinds = torch.cat([torch.empty(0, dtype=torch.uint8), *found])
        for word, kind in (("kept", KEPT), ("unified", UNIFIED), ("pruned", PRUNED)):
            self.facts[f"blocks_{word}"] = int((kinds == kind).sum())
        history = self.trainer.history
        # Momentum of old would leave the structure; and parameters that were distributed once
        # keep the hooks of that.
        self.network = copied(self.network)
        self.trainer = self._new_trainer()
        self.trainer.epoch, self.trainer.history = self.settings.admm_epochs, history
        if not self.settings.retrain_epochs:
            self._recalibrate(recalibration_images)

    def _recalibrate(self, images: int) -> None:
        device = self.trainer.fabric.device
        with random_state_kept(device, self.loader):
            seed_epoch(self.options["seed"], 0, device, self.loader)
            recalibrate_batchnorm(self.network, self.loader, images=images)

    def share_buffers(self) -> None:
        """Every process gets the first one's BatchNorm statistics, as it has the same weights.

        Gradients are averaged, but the statistics of a process follow its own images.
        """
        fabric = self.trainer.fabric
        if fabric.world_size > 1:
            mine = {name: buffer.cpu() for name, buffer in self.network.named_buffers()}
            first = fabric.broadcast(mine, src=0)
            for name, buffer in self.network.named_buffers():
                buffer.copy_(first[name])

    def retrain(self) -> None:
        """Train on within the structure: one magnitude per unified block, pruned blocks stay zero.

        Gradients are projected onto the structure instead of training a parameter per block
        (ours): the same directions, and optimizer, weight decay and checkpoints stay the trainer's.
        """
        ahead = self.settings.total_epochs - self.trainer.epoch
        if ahead <= 0:
            return
        assert self.structures is not None
        weights = {name: self.network.get_parameter(name) for name in self.structures}
        structures = self.structures

        @torch.no_grad()
        def project_gradients(_: StepContext) -> None:
            for name, structure in structures.items():
                gradient = weights[name].grad
                if gradient is not None:
                    gradient.copy_(structure.fixed(gradient))

        @torch.no_grad()
        def end_of_epoch(*_: object) -> None:
            for name, structure in structures.items():  # vectorised arithmetic may round unevenly
                weights[name].copy_(structure.fixed(weights[name]))
            self._save()

        self.trainer.run(
            epochs=ahead,
            after_backward=project_gradients,
            on_epoch_end=end_of_epoch,
            progress=self.progress,
        )
