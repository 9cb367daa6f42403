"""Claim: unified weights take at most 0.6 of the bytes of plain pruning at equal accuracy.

Measured: a small residual network on Fashion-MNIST, seeds 0 to 2. From the same trained network, blocks
of 4x4 weights are pruned (the rival: the same blocks, the same ADMM, the same epochs, its zeros stored
by the same encoder) or pruned in part and unified for the rest, at several fractions each. Bytes are
those of the file on disk, which is read back and compared bit for bit. Equal accuracy is the accuracy of
the dense network trained on for as many epochs, less 0.3 points: for each method the fewest bytes at
which its curve of mean accuracy over bytes (between measured points: linear in the logarithm of bytes)
still has that. A method that stays above it everywhere counts with its smallest file, one that never
gets there with the dense file. Every single run is stored, and an interrupted benchmark goes on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from benchmarks.records import parser, write_record
from wgates_plugin.catalogue import Data, load_data, load_model
from wgates_plugin.files import load_tensors, read_json, save_tensors, write_json
from wgates_plugin.training import Trainer, TrainingSettings, evaluate
from wgates_plugin.transforms.unification import UnificationSettings, load_unified, unify
from wgates_plugin.transforms.unification.file import encoded, zstandard

CLAIM = "unified weights: at most 0.6 of the bytes of plain pruning at equal accuracy"
SEEDS = (0, 1, 2)
SCRATCH = Path("runs") / "unification_promise"
WIDTHS = (16, 32, 64)
LOSS_ALLOWED = 0.003
DENSE = TrainingSettings(epochs=6, learning_rate=0.1, warmup_epochs=1, channels_last=True)
FURTHER = TrainingSettings(learning_rate=0.05, channels_last=True)
RETRAIN = 6
SETTINGS: dict[str, dict[str, UnificationSettings]] = {
    "pruning": {
        f"{share:g}": UnificationSettings("prune", prune_fraction=share, retrain_epochs=RETRAIN)
        for share in (0.15, 0.3, 0.5)
    },
    "unification": {
        f"{zero:g}-{share:g}": UnificationSettings(
            prune_fraction=zero, unify_fraction=share, retrain_epochs=RETRAIN
        )
        for zero, share in ((0.15, 0.5), (0.3, 0.5), (0.3, 0.8), (0.0, 1.0))
    },
}
EPOCHS = SETTINGS["pruning"]["0.5"].total_epochs
Point = tuple[float, float]
"""(bytes, accuracy)"""


def network_of(data: Data, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return load_model(
        "resnet_small", classes=data.classes, in_channels=1, options={"widths": WIDTHS}
    )


def dense(data: Data, seed: int, folder: Path) -> nn.Module:
    """The trained network, from the folder when it was trained before."""
    network, path = network_of(data, seed), folder / "dense.safetensors"
    if path.exists():
        network.load_state_dict(load_tensors(path, kind="weights"))
    else:
        Trainer(network, data.train_loader, DENSE, seed=seed, label="dense").run()
        save_tensors(path, network.state_dict())
    return network


def packed_bytes(network: nn.Module) -> int:
    """Bytes of safetensors under Zstandard, as anybody could have it."""
    plain = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    return len(zstandard().ZstdCompressor(level=19).compress(save(plain)))


def trained_on(network: nn.Module, data: Data, seed: int) -> dict[str, Any]:
    """The dense network after the epochs that the methods spend."""
    before = evaluate(network, data.val_loader).accuracy
    settings = dataclasses.replace(FURTHER, epochs=EPOCHS)
    Trainer(network, data.train_loader, settings, seed=seed, label="dense, trained on").run()
    return {
        "accuracy_before": before,
        "accuracy": evaluate(network, data.val_loader).accuracy,
        "bytes": len(encoded(network.state_dict(), {})),
        "safetensors_zstd_bytes": packed_bytes(network),
    }


def one_run(
    network: nn.Module, data: Data, seed: int, settings: UnificationSettings, folder: Path
) -> dict[str, Any]:
    """Accuracy and bytes of one setting; the file is read back and compared bit for bit."""
    unified = unify(network, data.train_loader, settings=settings, training=FURTHER, seed=seed)
    path = folder / "weights.wgu"
    size = unified.save(path)
    state = unified.network.state_dict()
    for name, tensor in load_unified(path).items():
        assert torch.equal(bits(tensor), bits(state[name])), name
    return {
        "accuracy": evaluate(unified.network, data.val_loader).accuracy,
        "bytes": size,
        "safetensors_zstd_bytes": packed_bytes(unified.network),
        **unified.facts,
    }


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def bytes_at(accuracy: float, points: Sequence[Point], whole: Point) -> float:
    """The fewest bytes at which a method's curve has `accuracy`.

    Args:
        points: of the method, in any order. whole: of the dense network, the curve's upper end.
    """
    curve = sorted([*points, whole], reverse=True)  # from the largest file down
    last = max(i for i, (_, found) in enumerate(curve) if found >= accuracy)
    large, high = curve[last]
    if last + 1 == len(curve):
        return large
    small, low = curve[last + 1]
    share = (high - accuracy) / (high - low)
    return math.exp(math.log(large) + share * (math.log(small) - math.log(large)))


def ratio(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Both methods' bytes at equal accuracy over the means of these seeds, and their ratio."""
    reference = mean(row["dense"]["accuracy"] for row in rows)
    whole = (mean(row["dense"]["bytes"] for row in rows), reference)
    found = {}
    for method in SETTINGS:
        runs = zip(*(row[method] for row in rows), strict=True)
        points = [(mean(r["bytes"] for r in run), mean(r["accuracy"] for r in run)) for run in runs]
        found[method] = bytes_at(reference - LOSS_ALLOWED, points, whole)
    return {
        "accuracy": reference - LOSS_ALLOWED,
        "dense_bytes": whole[0],
        "pruning_bytes": found["pruning"],
        "unification_bytes": found["unification"],
        "ratio": found["unification"] / found["pruning"],
    }


def seed_row(data: Data, seed: int, folder: Path) -> dict[str, Any]:
    """All runs of one seed, those that are stored not run again."""
    row: dict[str, Any] = {method: [] for method in SETTINGS}
    jobs: list[tuple[str, str, UnificationSettings | None]] = [("dense", "dense", None)]
    for method, table in SETTINGS.items():
        jobs += [(method, f"{method}-{name}", settings) for name, settings in table.items()]
    for method, name, settings in jobs:
        path = folder / f"{name}.json"
        if not path.exists():
            network = dense(data, seed, folder)
            if settings is None:
                found = trained_on(network, data, seed)
            else:
                found = {
                    "prune_fraction": settings.prune_fraction,
                    "unify_fraction": settings.unify_fraction,
                    **one_run(network, data, seed, settings, folder),
                }
            write_json(path, found)
        found = read_json(path, kind="run")
        print(f"seed {seed}, {name}: {found['accuracy']:.2%}, {found['bytes']} bytes", flush=True)
        if settings is None:
            row["dense"] = found
        else:
            row[method].append(found)
    return row


def main(argv: Sequence[str] = ()) -> None:
    options = parser("unification_promise", __doc__)
    options.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options.add_argument("--limit", type=int, default=10_000, help="training images")
    options.add_argument("--scratch", type=Path, default=SCRATCH, help="where single runs go")
    arguments = options.parse_args(list(argv))
    torch.set_num_threads(1)
    rows = []
    for seed in arguments.seeds:
        data = load_data("fashion-mnist", batch_size=64, limit=arguments.limit, seed=seed)
        rows.append(seed_row(data, seed, arguments.scratch / f"{arguments.limit}-{seed}"))
    together, single = ratio(rows), [ratio([row])["ratio"] for row in rows]
    write_record(
        arguments.results,
        "unification_promise",
        claim=CLAIM,
        settings={
            "network": f"resnet_small, widths {WIDTHS}",
            "limit": arguments.limit,
            "seeds": arguments.seeds,
            "loss_allowed": LOSS_ALLOWED,
            "training": dataclasses.asdict(FURTHER),
            "unification": {
                f"{method}-{name}": dataclasses.asdict(settings)
                for method, table in SETTINGS.items()
                for name, settings in table.items()
            },
        },
        seed=arguments.seeds[0],
        numbers={
            "bytes_ratio_vs_pruning_at_equal_accuracy": together["ratio"],
            "bytes_ratio_of_each_seed": single,
            **{key: value for key, value in together.items() if key != "ratio"},
        },
        samples=dict(zip(map(str, arguments.seeds), rows, strict=True)),
    )
    print(f"bytes over those of plain pruning at equal accuracy: {together['ratio']:.3f}")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
