"""Training the dense network of a recipe: kept in the run folder, taken up where it stopped."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from wgates_plugin.errors import FileFormatError, RunFolderError
from wgates_plugin.files import atomic_path, load_tensors, read_json, save_tensors
from wgates_plugin.pipeline.identity import identity_of_request
from wgates_plugin.run_folder import another_run, differences
from wgates_plugin.training import Trainer, default_fabric

if TYPE_CHECKING:
    from wgates_plugin.catalogue import Data
    from wgates_plugin.recipe.blocks import Recipe
    from wgates_plugin.targets import PruningSettings, Target

logger = logging.getLogger("wgates_plugin")

WEIGHTS = "dense.safetensors"
CHECKPOINT = "dense-checkpoint.pt"


def check_folder(folder: Path, *, resume: bool) -> None:
    """Say before any training that a run folder cannot be used.

    Raises:
        RunFolderError: it is a file, holds something else, or a run that is not to be resumed.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunFolderError(f"run folder `{folder}`: is a file; choose another path")
    # Hidden files are what a kill in mid-write leaves behind.
    found = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if "run.json" in found:
        if not resume:
            raise RunFolderError(
                f"run folder `{folder}`: already holds a run; go on with it (`resume=True`, "
                "`--resume`), or choose another folder (`run_folder`, `--out`)"
            )
    elif CHECKPOINT in found and not resume:
        raise RunFolderError(
            f"run folder `{folder}`: holds a dense training that was stopped; go on with it "
            "(`resume=True`, `--resume`), or choose another folder (`run_folder`, `--out`)"
        )
    elif found - {WEIGHTS, CHECKPOINT}:
        raise RunFolderError(
            f"run folder `{folder}`: holds files but no run.json; choose an empty or new folder"
        )


def check_same_run(
    recipe: Recipe, data: Data, targets: list[Target], settings: PruningSettings
) -> None:
    """Say before any training that a run cannot be resumed since it is another one.

    Compared is all that a recipe tells without its trained network.

    Raises:
        RunFolderError: names what differs, each key with its old and its new value.
    """
    path = recipe.folder / "run.json"
    if not path.exists():
        return
    found = read_json(path, kind="run description")
    wanted = json.loads(
        json.dumps(
            {
                "network": recipe.title,
                **identity_of_request(targets, settings, data.train_loader, data.val_loader),
            }
        )
    )
    if not isinstance(found, dict):
        return  # no run description: said where the folder is claimed
    changed = differences({key: found.get(key) for key in wanted}, wanted)
    weights = recipe.folder / WEIGHTS
    if recipe.trains_first and weights.exists():
        changed = _changed(_origin(weights), _made_by(recipe)) + changed
    if changed:
        raise RunFolderError(another_run(recipe.folder, changed))


def trained(
    network: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    resume: bool,
    progress: bool | None,
) -> nn.Module:
    """`network` trained in place as the recipe says, or loaded if that has been done before.

    Raises:
        RunFolderError: the folder's dense network comes from another recipe.
        FileFormatError: a file of an earlier sitting is corrupt.
        TrainingError: the loss is no longer finite.
    """
    assert recipe.dense_training is not None
    made_by = _made_by(recipe)
    weights, checkpoint = recipe.folder / WEIGHTS, recipe.folder / CHECKPOINT
    if weights.exists():
        _check_origin(_origin(weights), made_by, weights)
        network.load_state_dict(load_tensors(weights, kind="dense network"))
        if checkpoint.exists():  # a stop came between the two
            checkpoint.unlink(missing_ok=True)
        return network
    trainer = Trainer(
        network,
        data.train_loader,
        recipe.dense_training,
        fabric=default_fabric(recipe.dense_training),
        seed=recipe.seed,
        label="dense training",
    )
    if resume and checkpoint.exists():
        state = _read_checkpoint(checkpoint)
        _check_origin(state["made_by"], made_by, checkpoint)
        network.load_state_dict(state["network"])
        trainer.load_state_dict(state["trainer"])
    writes = trainer.fabric.global_rank == 0

    def save(*_: object) -> None:
        if writes:
            with atomic_path(checkpoint) as part:
                state = {
                    "made_by": made_by,
                    "network": network.state_dict(),
                    "trainer": trainer.state_dict(),
                }
                torch.save(state, part)

    trainer.run(on_epoch_end=save, progress=progress)
    if writes:
        last = trainer.history[-1].get("accuracy") if trainer.history else None
        words = "" if last is None else f": accuracy on training images {last:.2%}"
        logger.info("training the network first, %d epochs%s", recipe.dense_training.epochs, words)
        save_tensors(weights, dict(network.state_dict()), metadata={"made_by": made_by})
        checkpoint.unlink(missing_ok=True)
    trainer.fabric.barrier()
    return network.cpu()


def _made_by(recipe: Recipe) -> str:
    """What the dense network depends on, as JSON."""
    keys = {"model", "data", "dense_training", "seed"}
    return json.dumps(recipe.model_dump(mode="json", include=keys), sort_keys=True)


def _check_origin(found: str | None, wanted: str, path: Path) -> None:
    changed = _changed(found, wanted)
    if changed:
        raise RunFolderError(
            f"run folder `{path.parent}`: `{path.name}` was trained by another recipe (different: "
            f"{'; '.join(changed)}); choose another folder (`run_folder`, `--out`), or go on with "
            "the recipe it was begun with"
        )


def _changed(found: str | None, wanted: str) -> list[str]:
    """What differs between two descriptions of a dense network."""
    if found == wanted:
        return []
    try:
        before = json.loads(found or "null")
    except json.JSONDecodeError:
        before = None
    if not isinstance(before, dict):
        return ["its description, which cannot be read"]
    return differences(before, json.loads(wanted))


def _origin(path: Path) -> str | None:
    try:
        with safe_open(str(path), framework="pt") as file:
            return (file.metadata() or {}).get("made_by")
    except (SafetensorError, OSError) as error:
        raise FileFormatError(
            f"dense network `{path}`: cannot be read ({error}); delete it to train again"
        ) from error


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        if set(state) != {"made_by", "network", "trainer"}:
            raise KeyError("keys")
    except Exception as error:
        raise FileFormatError(
            f"checkpoint `{path}`: cannot be read ({type(error).__name__}); delete it to train the "
            "dense network from the beginning"
        ) from error
    return state
