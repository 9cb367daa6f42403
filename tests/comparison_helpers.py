"""A small experiment, and made-up results of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.comparison.experiment import Experiment, Run, load_experiment
from benchmarks.comparison.summary import network_of
from wgates_plugin.files import write_json

SMALL: dict[str, Any] = {
    "name": "small",
    "about": "digits, for the tests",
    "recipe": {
        "model": {"name": "digits_resnet"},
        "data": {"name": "digits", "batch_size": 64, "limit": 256},
        "dense_training": {"epochs": 1},
        "pruning": {
            "gate_epochs": 1,
            "fine_tune_epochs": 1,
            "samples": 10,
            "seconds_per_sample": 0.02,
            "measure_seconds": 0.05,
            "min_fraction": 0.1,
            "grid": 4,
            "active": False,
        },
    },
    "runtimes": [{"runtime": "eager"}],
    "targets": [0.8],
    "seeds": [0],
    "methods": {"wgates": {"strategy": "wgates", "role": "ours"}, "random": {"strategy": "random"}},
}


def stored(folder: Path, **changes: Any) -> Path:
    path = folder / f"{changes.get('name', 'small')}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return path


def made_up(accuracy: float, ratio: float = 0.49) -> dict[str, Any]:
    before = {"latency_ms": 2.0, "accuracy": 0.9, "macs": 10.0, "parameters": 10.0}
    after = {"latency_ms": 2.0 * ratio, "accuracy": accuracy, "macs": 5.0, "parameters": 4.0}
    return {
        "kind": "wgates-report",
        "baseline": before,
        "final": after,
        "after_removal": {"accuracy": 0.5},
        "contract": "held" if ratio <= 0.5 else "missed",
        "seconds": {"gates": 3.0},
    }


def filled(
    folder: Path,
    accuracies: Mapping[str, Sequence[float | str]],
    *,
    ours: str | None = None,
    ablations: Sequence[str] = (),
    target: float = 0.5,
    finals: Sequence[float] | None = None,
    other_images: Mapping[str, Sequence[float]] | None = None,
    **changes: Any,
) -> Experiment:
    """An experiment with these accuracies by seed as results in `folder/results`.

    A word instead of an accuracy is the reason of a refused target; of too few, the rest is missing.
    `finals`: final latencies by seed, the same for all methods. `other_images`: accuracies there.
    """
    roles = dict.fromkeys(accuracies, "rival")
    roles |= dict.fromkeys(ablations, "ablation") | ({} if ours is None else {ours: "ours"})
    experiment = load_experiment(
        stored(
            folder,
            **{
                "seeds": [0, 1, 2],
                "targets": [target],
                "methods": {m: {"strategy": "l1", "role": role} for m, role in roles.items()},
                **changes,
            },
        )
    )
    home = folder / "results" / "comparison" / experiment.name
    ratios, networks = {}, {}
    for seed in experiment.seeds:
        dense = {"accuracy": 0.9, "trained_on": {"accuracy": 0.92}}
        write_json(home / f"dense-{seed}.json", dense)
    for method, values in accuracies.items():
        for seed, value in enumerate(values):
            run = Run(method, "eager", target, seed)
            refused = {"kind": "refused", "reason": value}
            found = refused if isinstance(value, str) else made_up(value)
            if other_images is not None and seed < len(other_images.get(method, ())):
                found["other_images"] = {"accuracy": other_images[method][seed], "images": 100}
            write_json(home / "runs" / f"{run.key}.json", found)
            if finals is not None:
                ratios[run.key], networks[run.key] = finals[seed], network_of(found)
    if finals is not None:
        last = {"ratio": ratios, "networks": networks, "disturbed": []}
        write_json(home / "finals-eager.json", last)
    return experiment
