"""The strategy: patterns, clusters and contributions of every group, then widths from the budget."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wgates_plugin.calling import left_as_found
from wgates_plugin.errors import TrainingError
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies import budgeting
from wgates_plugin.strategies.base import Decision, Strategy, Task
from wgates_plugin.strategies.budgeting import threshold_widths
from wgates_plugin.strategies.dependence import check_all_see
from wgates_plugin.strategies.functionality.clustering import (
    SILENT,
    cluster,
    likeness,
    load_sklearn,
)
from wgates_plugin.strategies.functionality.contribution import contribution_index
from wgates_plugin.strategies.functionality.inputs import (
    Batches,
    Grey,
    ImageInput,
    find_image,
    value_at,
)
from wgates_plugin.strategies.functionality.maximisation import patterns
from wgates_plugin.strategies.functionality.pictures import picture, thumbnails
from wgates_plugin.strategies.functionality.points import Point, find_points
from wgates_plugin.strategies.functionality.ranking import rank, representatives
from wgates_plugin.strategies.functionality.settings import FunctionalitySettings
from wgates_plugin.strategies.own_checkpoints import own_checkpoints
from wgates_plugin.training.as_found import random_state_kept, seed_epoch
from wgates_plugin.training.evaluation import cross_entropy, to_device, unpack
from wgates_plugin.training.progress import Bar

STATE = "functionality.pt"


class FunctionalityStrategy(Strategy):
    """Keeps one filter of every function; of a function's repeats, those that contribute most.

    It trains nothing: its epochs are fine-tuning. What is done for a group depends on the seed and
    the network alone, so that a run that stopped goes on with the next group.
    """

    settings_type = FunctionalitySettings
    has_phase = False
    trains_weights = False
    summary = "filters that repeat another one's function go first (Qin et al., 2018)"
    settings: FunctionalitySettings

    def decide(self, task: Task) -> Decision:
        load_sklearn()
        space, budget, grid = task.space, task.budget, task.grid
        budgeting.check_feasible(space, budget, grid)
        state = self._judged(task)
        groups: list[dict[str, Any]] = [state["groups"][name] for name in space.names]
        scores = torch.cat([group["scores"] for group in groups])
        # The last bits may differ between machines; all processes must cut alike.
        scores = task.average(scores.float().to(task.device)).cpu()
        if self.settings.quotas == "uniform":
            start = budgeting.uniform_widths(space, budget, grid)
        else:
            start = threshold_widths(space, scores, budget, grid)
        widths = budgeting.fit_to_budget(space, scores, start, budget, grid)
        plan = PruningPlan.top(space, scores, widths)
        contribution = state["contribution"]
        facts, pictures = {}, {}
        for index, (name, group) in enumerate(zip(space.names, groups, strict=True)):
            kept = set(plan.kept[index])
            mine = contribution[space.unit_slice(index)]
            facts[name] = _facts(group, mine, kept)
            if group["tiles"] is not None:
                own = scores[space.unit_slice(index)]
                pictures[name] = picture(group["tiles"], group["labels"], own, kept)
        return Decision(task.network, scores, widths, facts={"groups": facts}, pictures=pictures)

    def _judged(self, task: Task) -> dict[str, Any]:
        """Contributions of all units, and labels and scores of each group; from the checkpoint if
        one is there, which is written after each group."""
        checkpoints = own_checkpoints(self, task)
        state = checkpoints.load_state(STATE) or {"contribution": None, "groups": {}}
        if len(state["groups"]) == len(task.space.groups):
            return state
        network = task.network
        writes = task.fabric.global_rank == 0
        with left_as_found(network):
            network.eval().requires_grad_(False)
            image = ImageInput.of(to_device(task.example_inputs, task.device))
            check_all_see(network, task.space, image.example, image.image, "functionality")
            data = self._data(task)
            grey = Grey.of([value_at(inputs, find_image(inputs)) for inputs, _ in data])
            points = find_points(
                network,
                task.space,
                image,
                producers=self.settings.producers,
                side=self.settings.side,
            )
            if state["contribution"] is None:
                loss = task.loss or cross_entropy
                state["contribution"] = contribution_index(network, task.space, points, data, loss)
                checkpoints.save_state(STATE, state)
            shown = _spread(len(points), self.settings.pictured)
            wanted = task.progress if writes else False
            with Bar("functions", len(points), wanted=wanted) as bar:
                for index, name in enumerate(task.space.names):
                    if name not in state["groups"]:
                        mine = state["contribution"][task.space.unit_slice(index)]
                        state["groups"][name] = self._judge(
                            network, points[index], image, grey, mine, task.seed, index in shown
                        )
                        checkpoints.save_state(STATE, state)
                    bar.advance(name)
        return state

    def _judge(
        self,
        network: nn.Module,
        points: Sequence[Point],
        image: ImageInput,
        grey: Grey,
        contribution: Tensor,
        seed: int,
        pictured: bool,
    ) -> dict[str, Any]:
        """One group. Units are alike if they are in all of its layers: patterns of several layers
        stand side by side as one (ours)."""
        settings = self.settings
        tiles, units = None, len(contribution)
        cosines = torch.zeros(units, units, dtype=torch.float64)
        for place, point in enumerate(points):
            found = patterns(network, point, image, grey, settings, seed)
            cosines += likeness(found) / len(points)
            if pictured and place == 0:
                tiles = thumbnails(found)
        clusters = cluster(
            cosines, largest=settings.largest_k, tried=settings.tried, seed=seed % 2**32
        )
        scores = rank(cosines, clusters.labels, contribution, repeats=settings.repeats)
        return {
            "labels": clusters.labels,
            "silhouette": clusters.silhouette,
            "scores": scores,
            "tiles": tiles,
        }

    def _data(self, task: Task) -> Batches:
        """The first batches of the training data, by the seed; the same for every process."""
        loader: Any = task.train_loader
        with random_state_kept(task.device, loader):
            seed_epoch(task.seed, 0, task.device, loader)
            found = [
                unpack(to_device(batch, task.device))
                for batch in islice(loader, self.settings.batches)
            ]
        if not found:
            raise TrainingError(
                "functionality: the loader gave no batches; check the data set and limit"
            )
        return found


def _facts(group: dict[str, Any], contribution: Tensor, kept: set[int]) -> dict[str, Any]:
    """What the report says of a group, as JSON."""
    chosen = representatives(group["labels"], contribution)
    return {
        "units": len(group["labels"]),
        "clusters": len(chosen),
        "silhouette": group["silhouette"],
        "silent": int((group["labels"] == SILENT).sum()),
        "kept": len(kept),
        "representatives_kept": len(kept.intersection(chosen)),
    }


def _spread(count: int, limit: int) -> set[int]:
    """At most `limit` of `count` places, first and last among them."""
    if limit == 0:
        return set()
    return {round(place) for place in np.linspace(0, count - 1, min(limit, count)).tolist()}
