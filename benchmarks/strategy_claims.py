"""What is claimed of the strategies: targets kept, what a step costs, and each system's own promise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.claims import Claim, number
from benchmarks.comparison.experiment import load_experiment
from benchmarks.comparison.summary import read_cells

SYSTEMS = load_experiment("systems")
PHASED = ("wgates", "gdp", "scop", "metapruning")
"""Strategies with a training phase of their own."""


def held_share(method: str) -> Callable[[Path], float | None]:
    """Share of a method's runs that kept the target; a missing one counts as not held."""

    def read(folder: Path) -> float | None:
        rows = [cell.row(method) for cell in read_cells(SYSTEMS, folder)]
        if not any(row.held for row in rows):
            return None
        return sum(map(sum, (row.held for row in rows))) / (len(rows) * len(SYSTEMS.seeds))

    return read


def _promise(name: str, bar: float, better: str, record: str, *keys: str) -> Claim:
    return Claim(name, bar, better, f"results/{record}.json", number(record, *keys))


STRATEGY_CLAIMS = (
    *(
        Claim(
            f"target_held_share/{method}",
            1.0,
            "higher",
            f"results/comparison/{SYSTEMS.name}/; a missing run counts as not held",
            held_share(method),
        )
        for method in SYSTEMS.methods
    ),
    *(
        Claim(
            f"gate_step_ratio/{strategy}/resnet50",
            1.05 if strategy == "gdp" else None,
            "lower",
            "results/strategy_cost.json; a step of the phase over a plain step",
            number("strategy_cost", strategy, "resnet50", "ratio"),
        )
        for strategy in PHASED
    ),
    _promise("absorption_error/gdp", 1e-5, "lower", "gdp_promise", "absorption_error"),
    _promise("planted_noise_auc/scop", 0.95, "higher", "scop_promise", "planted_noise_auc"),
    _promise("scop_arithmetic_error", 0.3, "lower", "scop_promise", "scop_arithmetic_error"),
    _promise(
        "planted_duplicates_kept_once/functionality",
        0.9,
        "higher",
        "functionality_promise",
        "planted_duplicates_kept_once",
    ),
    _promise(
        "fitness_spearman/metapruning", 0.8, "higher", "metapruning_promise", "fitness_spearman"
    ),
    _promise(
        "bytes_ratio_vs_pruning_at_equal_accuracy/unification",
        0.6,
        "lower",
        "unification_promise",
        "bytes_ratio_vs_pruning_at_equal_accuracy",
    ),
)
