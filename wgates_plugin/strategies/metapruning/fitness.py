"""What a candidate is worth on held-out training images, with generated weights: error or loss."""

from __future__ import annotations

import itertools
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from wgates_plugin.calling import device_of, rng_kept
from wgates_plugin.errors import MissingExtraError, TrainingError, WGatesError
from wgates_plugin.latency.base import require
from wgates_plugin.strategies.metapruning.genes import Widths
from wgates_plugin.strategies.metapruning.pruning_net import PruningNet
from wgates_plugin.training.as_found import modes_kept, random_state_kept, seed_epoch
from wgates_plugin.training.engine import LossFunction
from wgates_plugin.training.evaluation import answer, evaluate, one_number
from wgates_plugin.training.recalibration import recalibrate_batchnorm

logger = logging.getLogger("wgates_plugin")

_WORST = 1e30
"""Of a candidate whose loss is not finite: the search goes on without it. Sums of a few stay finite."""

_STORE_BYTES = 256 * 2**20
"""Least shared memory of a Ray started here; what is put there is added, the images among it."""


def told(error: float) -> float | None:
    """An error or loss as it can be written down; None of a candidate whose loss was not finite."""
    # Half: the mean over two processes, of which one found no finite loss.
    return error if error < _WORST / 2 else None


class Fitness:
    """`1 - accuracy` of a candidate, or its mean loss; weights are generated once for each.

    The loss judges where the user gave one of their own (ours): accuracy may mean nothing there, and
    this loss is what they want to be low. `measure` says which of the two it is.

    BatchNorm statistics are taken anew for each candidate (MetaPruning, section 3.3), all on the same
    images. Neither these nor the ones judged on come from validation data.

    Args:
        recalibration: batches for the statistics. held_out: batches to judge on, not trained on.
        seed: of anything random in the held-out loader, such as augmentation.
        loss: the user's, of logits and targets, a mean over the batch.
    """

    def __init__(
        self,
        pruning_net: PruningNet,
        recalibration: Sequence[Any],
        held_out: Iterable[Any],
        seed: int = 0,
        loss: LossFunction | None = None,
    ) -> None:
        self.pruning_net, self.seed, self.loss = pruning_net, seed, loss
        self.recalibration, self.held_out = recalibration, held_out

    @property
    def measure(self) -> str:
        """What candidates are judged by: "error" or "loss"."""
        return "error" if self.loss is None else "loss"

    def __call__(self, widths: Widths) -> float:
        network = self.pruning_net.materialised(widths)
        # As many as there are: how many batches it takes was settled when they were gathered.
        recalibrate_batchnorm(network, self.recalibration, images=2**62)
        device = next(network.parameters()).device
        with random_state_kept(device, self.held_out):
            seed_epoch(self.seed, 0, device, self.held_out)
            return self._judged(network, self.held_out)

    def _judged(self, network: nn.Module, batches: Iterable[Any]) -> float:
        if self.loss is None:
            return 1.0 - evaluate(network, batches).accuracy
        found = mean_loss(network, batches, self.loss)
        return min(found, _WORST) if math.isfinite(found) else _WORST

    def check(self) -> None:
        """Judge one batch, so that data of another kind are refused before training.

        Raises:
            TrainingError: there is nothing to classify and no loss was given, or the loss is no
                single number.
        """
        with random_state_kept(torch.device("cpu"), self.held_out):
            self._judged(self.pruning_net, list(itertools.islice(iter(self.held_out), 1)))


@torch.no_grad()
def mean_loss(network: nn.Module, loader: Iterable[Any], loss: LossFunction) -> float:
    """Mean of `loss(logits, targets)` over the loader's images, in eval mode. Modes and torch's
    random state are left as found.

    Raises:
        TrainingError: no batches, or a loss that is no single number.
    """
    device = device_of(network)
    total, images = 0.0, 0
    with modes_kept(network), rng_kept(device):
        network.eval()
        for batch in loader:
            logits, targets = answer(network, batch, device)
            value = float(one_number(loss(logits, targets), "metapruning"))
            total += value * logits.shape[0]
            images += logits.shape[0]
    if not images:
        raise TrainingError("metapruning: no held-out batches to judge on; check the data set")
    return total / images


class Judges:
    """Errors or losses of candidates, in their order, from this process or from several."""

    def __init__(self, fitness: Fitness, actors: Sequence[Any] = (), pool: Any = None) -> None:
        self.fitness, self.actors, self.pool = fitness, actors, pool

    def errors(self, candidates: Sequence[Widths]) -> Iterator[float]:
        if self.pool is None:
            return map(self.fitness, candidates)
        found: Iterator[float] = self.pool.map(
            lambda actor, widths: actor.judge.remote(widths), list(candidates)
        )
        return found


@contextmanager
def judges(fitness: Fitness, workers: int = 1) -> Iterator[Judges]:
    """`workers` processes through Ray, or this one: without Ray, on a GPU, or when one is asked for.

    Ray is taken as found when it is connected already, else started here and stopped again. A worker
    that dies is replaced, and what it was judging is judged again.
    """
    ray = _ray(fitness, workers)
    if ray is None:
        yield Judges(fitness)
        return
    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked for a report
        ray.init(
            num_cpus=workers,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=_STORE_BYTES + 2 * len(ray.cloudpickle.dumps(fitness)),
            # Workers must find the module of the user's network where this process found it.
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},
        )
    from ray.util import ActorPool

    actors = []
    try:
        shared = ray.put(fitness)  # once in shared memory, however many workers
        worker = ray.remote(_Judge).options(num_cpus=1, max_restarts=3, max_task_retries=3)
        actors = [worker.remote(shared) for _ in range(workers)]
        yield Judges(fitness, actors, ActorPool(actors))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, WGatesError):
            raise error.cause from error
        raise
    except ray.exceptions.RayActorError as error:
        raise TrainingError(
            f"metapruning: a worker that judges candidates died for good ({error}); what was judged "
            "is kept: start again, with `workers` 1 if it happens again"
        ) from error
    finally:
        for actor in actors:
            ray.kill(actor)
        if ours:
            ray.shutdown()


class _Judge:
    """Lives in a process of its own."""

    def __init__(self, fitness: Fitness) -> None:
        torch.set_num_threads(1)
        self.fitness = fitness

    def judge(self, widths: Widths) -> float:
        return self.fitness(widths)


def _ray(fitness: Fitness, workers: int) -> ModuleType | None:
    if workers == 1:
        return None
    device = next(fitness.pruning_net.parameters()).device
    if device.type != "cpu":
        logger.warning(
            "metapruning: %d workers were asked for, but the PruningNet is on `%s`; one process "
            "judges all candidates there",
            workers,
            device,
        )
        return None
    try:
        return require("ray", extra="ray", purpose="judging candidates on several workers")
    except MissingExtraError as error:
        logger.warning("%s; this process judges alone", error)
        return None
