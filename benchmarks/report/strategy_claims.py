"""What is claimed of the strategies: targets kept, what a step costs, and each system's own promise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.comparison.experiment import load_experiment
from benchmarks.comparison.summary import read_cells
from benchmarks.report.claims import Claim, number
from benchmarks.tools.records import read_record

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


def absorption_error(folder: Path) -> float | None:
    """The largest error of random gates and of the gates that real phases ended with.

    Of a phase both are taken: the network with gates against the one that absorbed them, and against
    the one that was planned, cut and finished. None unless there are phases in the record.
    """
    record = read_record(folder, "gdp_promise")
    if record is None or not record["samples"]["accuracy"]:
        return None
    found = [float(record["numbers"]["absorption_error"])]
    for run in record["samples"]["accuracy"].values():
        found.append(float(run["gdp"]["facts"]["absorption_error"]))
        if "output_error" in run["gdp"]:
            found.append(float(run["gdp"]["output_error"]))
    return max(found)


def fitness_over_macs(folder: Path) -> float | None:
    """Rank correlation of the generated weights' accuracy, less that of plain MACs."""
    ours, macs = (
        number("metapruning_promise", key)(folder) for key in ("fitness_spearman", "macs_spearman")
    )
    return None if ours is None or macs is None else ours - macs


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
    Claim(
        "absorption_error/gdp",
        1e-5,
        "lower",
        "results/gdp_promise.json; the largest of random gates and of the phases trained there, from "
        "the network with gates to the cut one",
        absorption_error,
    ),
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
    Claim(
        "fitness_minus_macs_spearman/metapruning",
        None,
        "higher",
        "results/metapruning_promise.json; no bar: below zero plain MACs rank the widths better",
        fitness_over_macs,
    ),
    Claim(
        "right_order_at_equal_macs/metapruning",
        None,
        "higher",
        "results/metapruning_promise.json; no bar: share of pairs of equal MACs, half by chance",
        number("metapruning_promise", "right_order_at_equal_macs"),
    ),
    _promise(
        "bytes_ratio_vs_pruning_at_equal_accuracy/unification",
        0.6,
        "lower",
        "unification_promise",
        "bytes_ratio_vs_pruning_at_equal_accuracy",
    ),
)
