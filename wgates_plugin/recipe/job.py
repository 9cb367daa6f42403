"""From a recipe's file to the finished run."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wgates_plugin.catalogue import Data, load_data, load_model
from wgates_plugin.pipeline import PruningResult, check, make_job, prune_to_target
from wgates_plugin.recipe.blocks import Recipe
from wgates_plugin.recipe.checks import checked
from wgates_plugin.recipe.dense import check_folder, check_same_run, trained
from wgates_plugin.recipe.reading import read
from wgates_plugin.targets import PruningSettings, Target

logger = logging.getLogger("wgates_plugin")


def load_recipe(path: str | Path, *, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read and check a recipe. `overrides` are "key=value" with dotted keys: "target.fraction=0.3".

    Raises:
        FileFormatError: the file is missing, or no YAML or JSON.
        ConfigError: everything that is wrong with it, each with its path.
    """
    return checked(read(Path(path)), overrides=overrides, subject=f"recipe `{path}`")


def prepare(recipe: Recipe) -> tuple[nn.Module, Data, list[Target], PruningSettings]:
    """Network, data, targets and settings of a recipe. The random state is left as found."""
    data = load_data(
        recipe.data.name,
        batch_size=recipe.data.batch_size,
        image_size=recipe.data.image_size,
        limit=recipe.data.limit,
        seed=recipe.seed,
        root=recipe.data.root,
    )
    example = data.example_input[0] if isinstance(data.example_input, tuple) else data.example_input
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        network = load_model(
            recipe.model.name,
            classes=data.classes,
            in_channels=int(example.shape[1]) if example.ndim > 1 else 3,
            weights=recipe.model.weights,
            options=recipe.model.options,
        )
    settings = dataclasses.replace(recipe.pruning, seed=recipe.seed)
    return network, data, [target.build() for target in recipe.all_targets], settings


def run_recipe(
    recipe: Recipe, *, resume: bool = False, progress: bool | None = None
) -> PruningResult:
    """Do the whole job: train the dense network if asked to, then prune it to the target.

    Raises:
        RunFolderError: the run folder is taken by another run, by this one without `resume`, or by a
            process that is at work in it.
        Everything that `prune_to_target` raises.
    """
    check_folder(recipe.folder, resume=resume)
    network, data, targets, settings = prepare(recipe)
    if resume:
        check_same_run(recipe, data, targets, settings)
    inputs = data.example_input, data.train_loader, data.val_loader
    asked: dict[str, Any] = {
        "target": targets,
        "settings": settings,
        "run_folder": recipe.folder,
        "name": recipe.title,
        "progress": progress,
    }
    if recipe.trains_first:
        # What the pruning would refuse is told before hours of training; the folder is ours from here.
        ahead = make_job(network, *inputs, **asked)
        check(ahead)
        ahead.folder.hold()
        network = trained(network, data, recipe, resume=resume, progress=progress)
    elif recipe.dense_training is not None:
        logger.warning("%s: has `model.weights`, so `dense_training` is left out", recipe.title)
    return prune_to_target(network, *inputs, resume=resume, **asked)
