"""Claim: half the latency on Fashion-MNIST costs less than one point of accuracy.

Measured: the recipes under benchmarks/recipes, seeds 0 to 2: a network is trained, pruned to half of its
measured ONNX Runtime latency, fine-tuned, exported and measured from the file. Accuracy is that of the
10,000 test images. The rival in latency is the trained network itself, timed in the same rounds. The
rival in accuracy is that network trained on for as many epochs as pruning took, by the same recipe:
against the network as it was, any extra training would pass for a gain. This takes hours; it can be
stopped at any moment and goes on where it was, and stored results are skipped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.tools.records import HOME, parser
from wgates_plugin.files import load_tensors, write_json
from wgates_plugin.recipe import Recipe, load_recipe, prepare, run_recipe
from wgates_plugin.training import Trainer, evaluate

CLAIM = "half the latency for less than one point of accuracy"
NETWORKS = ("resnet", "mobilenet")
SEEDS = (0, 1, 2)
SCRATCH = Path("runs") / "fashion_mnist"


def recipe_path(network: str) -> Path:
    return HOME / "recipes" / f"fashion_mnist_{network}.yaml"


def without_bulk(report: dict[str, Any]) -> dict[str, Any]:
    """The report less what only its plots need: gate steps and LPNet's single predictions."""
    kept = {key: value for key, value in report.items() if key != "gates"}
    if isinstance(kept.get("lpnet"), dict):
        kept["lpnet"] = {k: v for k, v in kept["lpnet"].items() if k != "predictions"}
    return kept


def dense_trained_on(recipe: Recipe) -> dict[str, Any]:
    """Accuracy of the unpruned network after the epochs that pruning spent, at the same settings."""
    network, data, _, settings = prepare(recipe)
    network.load_state_dict(load_tensors(recipe.folder / "dense.safetensors", kind="weights"))
    epochs = settings.epochs
    Trainer(
        network,
        data.train_loader,
        dataclasses.replace(settings.training, epochs=epochs),
        seed=recipe.seed,
        label="dense, trained on",
    ).run()
    return {"accuracy": evaluate(network, data.val_loader).accuracy, "epochs": epochs}


def run_one(network: str, seed: int, *, results: Path, scratch: Path, threads: int | None) -> None:
    stored = results / "fashion_mnist" / f"{network}-{seed}.json"
    folder = scratch / f"{network}-{seed}"
    recipe = load_recipe(recipe_path(network), overrides=[f"seed={seed}", f"run_folder={folder}"])
    if threads is not None:
        torch.set_num_threads(threads)
    if stored.exists():
        record = json.loads(stored.read_text())
    else:
        record = without_bulk(run_recipe(recipe, resume=folder.exists(), progress=None).report)
        write_json(stored, record)
    if "dense_trained_on" not in record:
        record["dense_trained_on"] = dense_trained_on(recipe)
        write_json(stored, record)
    before, after, rival = record["baseline"], record["final"], record["dense_trained_on"]
    print(
        f"{network}, seed {seed}: {before['latency_ms']:.3f} -> {after['latency_ms']:.3f} ms, "
        f"accuracy {before['accuracy']:.2%} -> {after['accuracy']:.2%} (unpruned, trained on: "
        f"{rival['accuracy']:.2%}), {record['contract']}",
        flush=True,
    )


def main(argv: Sequence[str] = ()) -> None:
    options = parser("fashion_mnist", __doc__)
    options.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    options.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options.add_argument("--scratch", type=Path, default=SCRATCH, help="where run folders go")
    options.add_argument(
        "--threads", type=int, help="training threads; torch's default if left out"
    )
    arguments = options.parse_args(list(argv))
    for seed in arguments.seeds:
        for network in arguments.networks:
            run_one(
                network,
                seed,
                results=arguments.results,
                scratch=arguments.scratch,
                threads=arguments.threads,
            )
