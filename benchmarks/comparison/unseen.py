"""Accuracy on test images that steered nothing: those that the `limit` of all experiments leaves out.

No run is told of them, and no trial of a method was judged by them. A run is scored on them when it is
done, or later, as long as its run folder is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison.experiment import Experiment, Run, dense_recipe
from benchmarks.comparison.runs import Places, is_of
from wgates_plugin.catalogue import TensorLoader, load_data
from wgates_plugin.catalogue.base import chosen_indices
from wgates_plugin.files import read_json, write_json
from wgates_plugin.recipe import prepare
from wgates_plugin.surgery import rebuild
from wgates_plugin.training import evaluate


def unseen_images(experiment: Experiment) -> TensorLoader | None:
    """The held-out images that neither the recipe's `limit` chooses nor a larger one of that many
    would (`Experiment.seen`); None where there are none, or where they are not in memory."""
    block = dense_recipe(experiment, experiment.seeds[0], Path("dense")).data
    if block.limit is None:
        return None
    whole = load_data(
        block.name, batch_size=block.batch_size, image_size=block.image_size, root=block.root
    ).val_loader
    seen = max(block.limit, experiment.seen or 0)
    if not isinstance(whole, TensorLoader) or seen >= len(whole.images):
        return None
    left = torch.ones(len(whole.images), dtype=torch.bool)
    left[chosen_indices(len(whole.images), seen, 0)] = False
    return dataclasses.replace(whole, images=whole.images[left], targets=whole.targets[left])


def score(experiment: Experiment, places: Places, chosen: Iterable[Run]) -> None:
    """Add `unseen` (accuracy 0..1, images) to stored runs without it whose run folders are there."""
    todo = {run: stored for run in chosen if (stored := _without_score(places, run)) is not None}
    loader = unseen_images(experiment) if todo else None
    if loader is None:
        return
    network, *_ = prepare(dense_recipe(experiment, experiment.seeds[0], Path("dense")))
    for run, stored in todo.items():
        folder = places.run_folder(run)
        pruned = rebuild(network, folder / "plan.json", folder / "pruned.safetensors")
        found = evaluate(pruned, loader)
        stored["unseen"] = {"accuracy": found.accuracy, "images": found.images}
        write_json(places.result(run), stored)


def _without_score(places: Places, run: Run) -> dict[str, Any] | None:
    if not places.result(run).exists():
        return None
    stored: dict[str, Any] = read_json(places.result(run), kind="run")
    return None if "unseen" in stored or not is_of(places.run_folder(run), stored) else stored
