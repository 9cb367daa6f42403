"""The training loop, on Lightning Fabric: one CPU, one GPU or several under torchrun."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from wgates_plugin.calling import ExampleInputs, call_with, map_tensors
from wgates_plugin.errors import TrainingError
from wgates_plugin.training.as_found import (
    channels_last_within,
    epoch_batches,
    modes_kept,
    random_state_kept,
)
from wgates_plugin.training.distillation import distillation_loss
from wgates_plugin.training.evaluation import (
    IGNORED,
    all_ignored,
    count_correct,
    cross_entropy,
    logits_of,
    of_one_value,
    one_number,
    unpack,
)
from wgates_plugin.training.launch import default_fabric, share_loader
from wgates_plugin.training.progress import Bar
from wgates_plugin.training.settings import (
    TrainingSettings,
    all_finite,
    build_optimizer,
    learning_rate_at,
)

logger = logging.getLogger("wgates_plugin")

LossFunction = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class StepContext:
    """Where training stands: global step from 0, fraction of the whole schedule 0..1, epoch.

    `loss` is the step's loss averaged over all processes; None before the forward pass.
    """

    step: int
    fraction: float
    epoch: int
    loss: float | None = None


class Trainer:
    """Trains `network` in place over `loader`, which yields (inputs, targets) batches.

    Inputs are a tensor, a tuple of arguments or a dict of keyword arguments of the network.

    Laws: an epoch's shuffling depends only on (seed, epoch), augmentation and dropout on these and the
    process, so stopping at an epoch's end and starting again ends in the same place (worker processes
    that outlive an epoch, `persistent_workers`, are the exception: they keep random state of their own).
    The global random state, train/eval modes and batches are left as found. The network is moved to the
    fabric's device and stays there. If a loss or gradient is not finite, no step is made with it.

    `total_epochs` (default `settings.epochs`) is the length of the learning-rate schedule, of
    which `run` may do any part. `loss(logits, targets)` defaults to cross-entropy with the
    settings' label smoothing. With a teacher, loss = (1 - w) * loss + w * distillation loss.

    Raises:
        TrainingError: nothing to train, a loader of unknown or zero length, one that several
            processes cannot share, or a distillation weight without a teacher.
    """

    def __init__(
        self,
        network: nn.Module,
        loader: Iterable[Any],
        settings: TrainingSettings,
        *,
        fabric: Fabric | None = None,
        loss: LossFunction | None = None,
        teacher: nn.Module | None = None,
        total_epochs: int | None = None,
        seed: int = 0,
        label: str = "train",
    ) -> None:
        if settings.distillation_weight > 0 and teacher is None:
            raise TrainingError(
                f"{label}: distillation_weight is {settings.distillation_weight} but there is no "
                "teacher; pass teacher=, or set the weight to 0"
            )
        self.network = network
        self.settings = settings
        self.total_epochs = settings.epochs if total_epochs is None else total_epochs
        self.seed = seed
        self.label = label
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.fabric = default_fabric(settings) if fabric is None else fabric
        self._loader = share_loader(loader, self.fabric)
        self.steps_per_epoch = len(self._loader)
        self._loss = loss
        self._teacher = teacher if settings.distillation_weight > 0 else None
        if self._teacher is not None:
            self._teacher.to(self.fabric.device)
        self._wrapped, self.optimizer = self.fabric.setup(
            network, build_optimizer(network, settings)
        )

    def run(
        self,
        *,
        first_epoch: int | None = None,
        epochs: int | None = None,
        before_forward: Callable[[StepContext], None] | None = None,
        after_backward: Callable[[StepContext], None] | None = None,
        on_epoch_end: Callable[[int, dict[str, Any]], None] | None = None,
        progress: bool | None = None,
    ) -> list[dict[str, Any]]:
        """Train `epochs` epochs from `first_epoch`; returns their records.

        `first_epoch` defaults to the first one not done yet, `epochs` to the rest of the schedule.
        `after_backward` runs when the network's gradients are complete and before its optimizer
        steps: the place where gates add their own gradient and step. `on_epoch_end(epoch, record)`
        may save `state_dict()`. `progress`: None shows a bar on a terminal, True always, False
        never; one line per epoch goes to the logger "wgates_plugin" in any case.

        A record holds label, epoch, steps (done in all), loss, accuracy (None if the targets are
        no classes), learning_rate (of the last step) and seconds.

        Raises:
            TrainingError: a loss or gradient is not finite (the weights and statistics are those
                from before that step), or batches, outputs or losses are of an unusable kind.
        """
        first = self.epoch if first_epoch is None else first_epoch
        last = self.total_epochs if epochs is None else first + epochs
        steps = max(last - first, 0) * self.steps_per_epoch
        rank_zero = self.fabric.global_rank == 0
        records = []
        with (
            modes_kept(self.network),
            modes_kept(self._teacher or nn.Module()),
            channels_last_within(self.network, wanted=self.settings.channels_last),
            random_state_kept(self.fabric.device, self._loader),
            Bar(self.label, steps, wanted=progress if rank_zero else False) as bar,
        ):
            for epoch in range(first, last):
                record = self._run_epoch(epoch, bar, before_forward, after_backward)
                self.epoch = epoch + 1
                self.history.append(record)
                records.append(record)
                if rank_zero:
                    accuracy = record["accuracy"]
                    logger.info(
                        "%s: epoch %d of %d%s, loss %.4f, accuracy %s, %.1f s",
                        self.label,
                        epoch - first + 1,
                        last - first,
                        ""
                        if last - first == self.total_epochs
                        else f" (epoch {epoch + 1} of {self.total_epochs} on the learning-rate "
                        "schedule)",
                        record["loss"],
                        "-" if accuracy is None else f"{accuracy:.2%}",
                        record["seconds"],
                    )
                if on_epoch_end is not None:
                    on_epoch_end(epoch, record)
        return records

    def state_dict(self) -> dict[str, Any]:
        """Optimizer state and number of finished epochs; loads with `weights_only=True`."""
        return {"epoch": self.epoch, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a trainer over the same network.

        Raises:
            TrainingError: the state does not fit this network's parameters.
        """
        try:
            epoch = int(state["epoch"])
            shapes = [p.shape for group in self.optimizer.param_groups for p in group["params"]]
            for index, entry in state["optimizer"]["state"].items():
                for value in entry.values():
                    if isinstance(value, Tensor) and value.ndim and value.shape != shapes[index]:
                        raise ValueError(f"{tuple(value.shape)} for {tuple(shapes[index])}")
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise TrainingError(
                f"{self.label}: the saved optimizer state does not fit this network ({error}); "
                "load the state that was saved with these widths, or start the phase anew"
            ) from error
        self.epoch = epoch

    def _run_epoch(
        self,
        epoch: int,
        bar: Bar,
        before_forward: Callable[[StepContext], None] | None,
        after_backward: Callable[[StepContext], None] | None,
    ) -> dict[str, Any]:
        started = time.perf_counter()
        self.network.train()
        if self._teacher is not None:
            self._teacher.eval()
        total_steps = max(self.total_epochs * self.steps_per_epoch, 1)
        first = epoch * self.steps_per_epoch
        step, rate = first, 0.0
        tally, buffers = _Tally(self.fabric.device), _Buffers(self.network)
        batches = epoch_batches(
            self._loader, self.seed, epoch, self.fabric.device, self.fabric.global_rank
        )
        for step, batch in enumerate(batches, start=first):
            where = StepContext(step, min(1.0, step / total_steps), epoch)
            rate = self._set_learning_rate(step)
            inputs, targets = self._on_device(batch)
            if before_forward is not None:
                before_forward(where)
            buffers.save()
            self.optimizer.zero_grad()
            logits = self._logits(inputs, where, buffers)
            loss = self._total_loss(inputs, logits, targets)
            images = self._images_judged(logits, targets)
            # The mean over processes, so that all of them raise, and all gates see one number.
            value = float(self.fabric.all_reduce(loss.detach(), reduce_op="mean"))  # type: ignore[arg-type]
            self._backward(loss, value, where, buffers)
            if after_backward is not None:
                after_backward(StepContext(step, where.fraction, epoch, value))
            if self.settings.gradient_clip is not None:
                self.fabric.clip_gradients(
                    self._wrapped, self.optimizer, max_norm=self.settings.gradient_clip
                )
            self.optimizer.step()
            tally.add(loss.detach(), logits, targets, images=images)
            bar.advance(f"epoch {epoch + 1}, loss {value:.3f}")
        self.optimizer.zero_grad()
        found = tally.means(self.fabric)
        if found is None:
            raise TrainingError(
                f"{self.label}: epoch {epoch + 1}: the loader gave no batches, or none with a label "
                f"that is not one to ignore ({IGNORED}); check the data set and limit"
            )
        return {
            "label": self.label,
            "epoch": epoch,
            "steps": step + 1,
            **found,
            "learning_rate": rate,
            "seconds": time.perf_counter() - started,
        }

    def _set_learning_rate(self, step: int) -> float:
        rate = learning_rate_at(
            step,
            steps_per_epoch=self.steps_per_epoch,
            total_epochs=self.total_epochs,
            settings=self.settings,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _backward(self, loss: Tensor, value: float, where: StepContext, buffers: _Buffers) -> None:
        """Gradients of a step, or an error that leaves the weights of the step before."""
        if not math.isfinite(value):
            self._give_up(f"the loss is {value}", where, buffers)
        self.fabric.backward(loss)
        if not all_finite(p.grad for p in self.network.parameters() if p.grad is not None):
            self._give_up("a gradient is not finite", where, buffers)

    def _on_device(self, batch: Any) -> tuple[ExampleInputs, Any]:
        inputs, targets = unpack(self.fabric.to_device(batch))
        if self.settings.channels_last:
            inputs = map_tensors(_channels_last, inputs)
        return inputs, targets

    def _logits(self, inputs: ExampleInputs, where: StepContext, buffers: _Buffers) -> Tensor:
        try:
            return logits_of(call_with(self._wrapped, _copied(inputs)), self.network)
        except ValueError as error:
            if not of_one_value(error):
                raise
            buffers.restore()
            raise TrainingError(
                f"{self.label}: epoch {where.epoch + 1}, step {where.step}: a BatchNorm has one value "
                "per channel, as in a batch of one image, and no variance; use a loader that leaves the "
                "last, smaller batch out (`drop_last=True`), or another batch size"
            ) from error

    def _total_loss(self, inputs: ExampleInputs, logits: Tensor, targets: Any) -> Tensor:
        if self._loss is not None:
            loss = one_number(self._loss(logits, targets), self.label)
        else:
            smoothing = self.settings.label_smoothing
            loss = cross_entropy(logits, targets, label_smoothing=smoothing)
        if self._teacher is not None:
            with torch.no_grad(), self.fabric.autocast():
                answers = call_with(self._teacher, _copied(inputs))
                answers = logits_of(answers, self._teacher).float()
            weight = self.settings.distillation_weight
            soft = distillation_loss(logits, answers, self.settings.distillation_temperature)
            loss = (1 - weight) * loss + weight * soft
        return loss

    def _images_judged(self, logits: Tensor, targets: Any) -> int:
        """Images of a batch whose loss counts: none where cross-entropy has no label to go by."""
        judged = self._loss is not None or self._teacher is not None
        return len(logits) if judged or not all_ignored(targets) else 0

    def _give_up(self, what: str, where: StepContext, buffers: _Buffers) -> None:
        # The forward pass has already spoilt running statistics; the weights are untouched.
        buffers.restore()
        self.optimizer.zero_grad()
        raise TrainingError(
            f"{self.label}: epoch {where.epoch + 1}, step {where.step}: {what}; the weights are "
            "those of the step before. Lower the learning rate, add warm-up or gradient clipping, "
            "and check the inputs for values that are not finite"
        )


class _Buffers:
    """A network's buffers (running statistics), and what they were at the last `save`."""

    def __init__(self, network: nn.Module) -> None:
        self._live = list(network.buffers())
        self._kept = [buffer.clone() for buffer in self._live]

    def save(self) -> None:
        for kept, live in zip(self._kept, self._live, strict=True):
            kept.copy_(live)

    @torch.no_grad()
    def restore(self) -> None:
        for kept, live in zip(self._kept, self._live, strict=True):
            live.copy_(kept)


class _Tally:
    """Loss and right answers of this process's batches, kept on the device until they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(4, device=device)  # loss sum, images, right answers, answers

    def add(self, loss: Tensor, logits: Tensor, targets: Any, *, images: int) -> None:
        self._sums[0] += loss * images
        self._sums[1] += images
        counted = count_correct(logits, targets)
        if counted is not None:
            self._sums[2] += counted[0]
            self._sums[3] += counted[1]

    def means(self, fabric: Fabric) -> dict[str, float | None] | None:
        """Of all processes; accuracy is None where answers are not counted, all is without images."""
        summed: Any = fabric.all_reduce(self._sums, reduce_op="sum")
        loss, images, right, answers = (float(item) for item in summed)
        if not images:
            return None
        return {"loss": loss / images, "accuracy": right / answers if answers else None}


def _copied(inputs: ExampleInputs) -> ExampleInputs:
    """For a network may work on them in place, and they are the loader's and the teacher's too."""
    copies: ExampleInputs = map_tensors(Tensor.clone, inputs)
    return copies


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
