"""MetaPruning as a strategy: train the PruningNet, search widths with it, hand over the winner."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin.run_folder import weights_digest
from wgates_plugin.strategies.base import Decision, Strategy, Task
from wgates_plugin.strategies.budgeting import uniform_widths
from wgates_plugin.strategies.metapruning.evolution import Evolution
from wgates_plugin.strategies.metapruning.fitness import Fitness, judges, told
from wgates_plugin.strategies.metapruning.genes import Genes, Widths, check_searchable
from wgates_plugin.strategies.metapruning.held_out import gathered, split
from wgates_plugin.strategies.metapruning.pruning_net import PruningNet
from wgates_plugin.strategies.metapruning.settings import MetaPruningSettings
from wgates_plugin.strategies.metapruning.training import train
from wgates_plugin.strategies.metapruning.winner import (
    from_scratch,
    inherited_scores,
    leading_scores,
)

logger = logging.getLogger("wgates_plugin")

POPULATION = "population.pt"
_SECONDS_BETWEEN_SAVES = 2.0


class MetaPruningStrategy(Strategy):
    """The epochs train the PruningNet, at other widths in each step; then widths are searched.

    The winner's network has weights that know nothing of the search: they are fresh, or the trained
    network's. All of its training is the fine-tuning that follows.
    """

    settings_type = MetaPruningSettings
    trains_weights = False
    summary = (
        "an evolutionary search over widths, judged with weights that a network generates "
        "(MetaPruning, Liu et al., 2019)"
    )
    settings: MetaPruningSettings

    @property
    def hands_over_untrained(self) -> bool:
        return self.settings.weights == "scratch"

    def decide(self, task: Task) -> Decision:
        settings = self.settings
        genes = Genes.of(task.space, task.grid, settings.least_share, settings.share_step)
        check_searchable(genes, task.budget, task.grid, task.seed)
        if task.epochs == 0:
            logger.warning(
                "metapruning: without epochs there is no PruningNet to judge widths; the same share "
                "is taken of every group"
            )
            uniform = uniform_widths(task.space, task.budget, task.grid)
            return self._decision(task, uniform, {"search": None})
        parts = split(task.train_loader, settings.held_out, task.seed)
        pruning_net = PruningNet(
            task.network,
            task.space,
            hidden=settings.hidden,
            largest_table=settings.largest_table,
            seed=task.seed,
        )
        fitness = Fitness(
            pruning_net,
            gathered(parts.train, task.seed, settings.recalibration_images),
            parts.held_out,
            task.seed,
            task.loss,
        )
        fitness.check()
        task = dataclasses.replace(task, train_loader=parts.train)
        monitor, history = train(self, task, pruning_net, genes)
        search = self._search(task, fitness, genes)
        widths, error = search.best
        uniform = uniform_widths(task.space, task.budget, task.grid)
        facts = {
            "search": {
                "judged": len(search.errors),
                "generations": [_summary(generation) for generation in search.generations],
                "judged_by": f"held-out {fitness.measure}",
                f"best_{fitness.measure}": told(error),
                f"uniform_{fitness.measure}": told(_averaged(task, fitness(uniform))),
                "widths": list(widths),
                "uniform_widths": list(uniform),
            },
            "pruning_net": {
                "layers": len(pruning_net.generated),
                "parameters": sum(p.numel() for p in pruning_net.generators.parameters()),
            },
        }
        return self._decision(task, widths, facts, monitor, history)

    def _search(self, task: Task, fitness: Fitness, genes: Genes) -> Evolution:
        settings = self.settings
        about = {
            "weights": weights_digest(fitness.pruning_net),
            "judged_by": fitness.measure,
            "held_out": settings.held_out,
            "recalibration_images": settings.recalibration_images,
        }
        search = Evolution(
            genes, task.budget, settings, grid=task.grid, seed=task.seed, about=about
        )
        state = task.checkpoints.load_state(POPULATION)
        if state is not None:
            search.load_json(state)
        saved = time.monotonic()
        with judges(fitness, settings.workers) as crew:
            while candidates := search.ask():
                for widths, error in zip(candidates, crew.errors(candidates), strict=True):
                    search.tell(widths, _averaged(task, error))
                    if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                        task.checkpoints.save_state(POPULATION, search.to_json())
                        saved = time.monotonic()
                task.checkpoints.save_state(POPULATION, search.to_json())
                logger.info(
                    "metapruning: generation %d of %d, %d judged, least held-out %s %.4g",
                    len(search.generations),
                    settings.generations,
                    len(search.errors),
                    fitness.measure,
                    search.best[1],
                )
        return search

    def _decision(
        self,
        task: Task,
        widths: Widths,
        facts: dict[str, Any],
        monitor: list[dict[str, float]] | None = None,
        history: list[dict[str, Any]] | None = None,
    ) -> Decision:
        network: nn.Module = task.network
        scores: Tensor
        if self.settings.weights == "scratch":
            network = from_scratch(network, task.space, widths, task.seed)
            scores = leading_scores(task.space)
        else:
            scores = inherited_scores(network, task.space)
        facts = {**facts, "weights": self.settings.weights}
        return Decision(network, scores, widths, monitor or [], history or [], facts)


def _averaged(task: Task, error: float) -> float:
    """The same number on all processes, whose sums may differ in their last digits."""
    value = torch.tensor(error, dtype=torch.float64, device=task.device)
    return float(task.average(value))


def _summary(generation: dict[Widths, float | None]) -> dict[str, float | None]:
    """Of a generation's errors or losses; least and median of those that are finite, if any."""
    judged = [error for error in generation.values() if error is not None]
    finite = [error for error in map(told, judged) if error is not None]
    return {
        "candidates": len(judged),
        "not_finite": len(judged) - len(finite),
        "least": min(finite, default=None),
        "median": statistics.median(finite) if finite else None,
    }
