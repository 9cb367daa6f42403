"""Accuracy on test images that no experiment of the comparison is judged by: those that every `limit`
leaves out.

They choose no best rival. A run is scored on them as long as its run folder is there.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison.experiment import Experiment, Run, dense_recipe
from benchmarks.comparison.runs import Places, is_of
from wgates_plugin.catalogue import TensorLoader, load_data
from wgates_plugin.catalogue.base import chosen_indices
from wgates_plugin.errors import WGatesError
from wgates_plugin.files import read_json, write_json
from wgates_plugin.recipe import prepare
from wgates_plugin.surgery import rebuild
from wgates_plugin.training import evaluate


def other_images(experiment: Experiment) -> TensorLoader | None:
    """The held-out images that neither the recipe's `limit` chooses nor the largest one of this data
    (`Experiment.largest_limit`); None where there are none, or where they are not in memory."""
    block = dense_recipe(experiment, experiment.seeds[0], Path("dense")).data
    if block.limit is None:
        return None

    def held_out(limit: int | None) -> Any:
        return load_data(
            block.name,
            batch_size=block.batch_size,
            image_size=block.image_size,
            limit=limit,
            root=block.root,
        ).val_loader

    mine, whole = held_out(block.limit), held_out(None)
    if not isinstance(mine, TensorLoader) or not isinstance(whole, TensorLoader):
        return None
    count = len(whole.images)
    if not torch.equal(mine.images, whole.images[chosen_indices(count, block.limit, 0)]):
        return None  # chosen in a way of its own
    left = torch.ones(count, dtype=torch.bool)
    left[chosen_indices(count, max(block.limit, experiment.largest_limit or 0), 0)] = False
    if not left.any():
        return None
    return dataclasses.replace(whole, images=whole.images[left], targets=whole.targets[left])


def score(experiment: Experiment, places: Places, chosen: Iterable[Run]) -> None:
    """Add `other_images` (accuracy 0..1, images) to the stored runs whose run folders are there."""
    chosen = [run for run in chosen if places.run_folder(run).exists()]
    loader = other_images(experiment) if chosen else None
    if loader is None:
        return
    network, *_ = prepare(dense_recipe(experiment, experiment.seeds[0], Path("dense")))
    for run in chosen:
        path, folder = places.result(run), places.run_folder(run)
        stored = read_json(path, kind="run") if path.exists() else {}
        known = stored.get("other_images", {}).get("images")
        if known == len(loader.images) or not is_of(folder, stored):
            continue
        try:
            pruned = rebuild(network, folder / "plan.json", folder / "pruned.safetensors")
        except WGatesError as error:
            print(f"{run.key}: not scored on other images: {error}", file=sys.stderr)
            continue
        found = evaluate(pruned, loader)
        stored["other_images"] = {"accuracy": found.accuracy, "images": found.images}
        write_json(path, stored)
