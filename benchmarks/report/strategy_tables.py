"""Tables of the strategies: the systems on one task, what a step costs, each system's own promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.comparison.tables import experiment_text
from benchmarks.report.strategy_claims import SYSTEMS
from benchmarks.tools.records import NOT_RUN, markdown, read_record


def systems_table(folder: Path) -> str:
    return experiment_text(SYSTEMS, folder)


def strategy_cost_table(folder: Path) -> str:
    record = read_record(folder, "strategy_cost")
    if record is None:
        return NOT_RUN
    networks = list(dict.fromkeys(n for found in record["numbers"].values() for n in found))
    head = ["strategy", "what is counted", *networks, "worst masked equals removed"]
    rows = []
    for strategy, by_network in record["numbers"].items():
        facts = list(by_network.values())
        rows.append(
            [
                f"`{strategy}`",
                facts[0]["of"],
                *(f"{by_network[n]['ratio']:.2f}" if n in by_network else "-" for n in networks),
                f"{max(f['masked_equals_removed'] for f in facts):.1e}",
            ]
        )
    return markdown(head, rows)


def promises_table(folder: Path) -> str:
    """One line per system: what it promises, what was found, and the rivals in the same run."""
    rows = [row for make in (_gdp, _scop, _functionality, _metapruning, _unification)
            for row in make(folder)]  # fmt: skip
    return markdown(["system", "promise", "found", "beside it"], rows)


def _numbers(folder: Path, name: str) -> dict[str, Any] | None:
    record = read_record(folder, name)
    return None if record is None else record["numbers"]


def _gdp(folder: Path) -> list[list[str]]:
    n = _numbers(folder, "gdp_promise")
    if n is None:
        return [["GDP", "absorption is exact; no fine-tuning is owed", NOT_RUN, ""]]
    rows = [["GDP", "absorption is exact", f"{n['absorption_error']:.1e} relative", ""]]
    if "gdp_cut" in n:
        found = f"{100 * n['gdp_cut']:.2f} % cut, {100 * n['gated']:.2f} % gated"
        beside = (
            f"W-Gates cut {100 * n['wgates_cut']:.2f} %, L1 cut {100 * n['uniform_l1_cut']:.2f} %, "
            f"dense trained on {100 * n['dense_trained_on']:.2f} %"
        )
        rows.append(["GDP", "no fine-tuning is owed", found, beside])
    return rows


def _scop(folder: Path) -> list[list[str]]:
    n = _numbers(folder, "scop_promise")
    if n is None:
        return [["SCOP", "planted noise filters are ranked last", NOT_RUN, ""]]
    rivals = ", ".join(f"{k} {v['mean']:.2f}" for k, v in n["auc"].items() if k != "scop")
    return [
        ["SCOP", "the paper's arithmetic", f"{n['scop_arithmetic_error']:.2f} points off", ""],
        ["SCOP", "planted noise ranked last (AUC)", f"{n['planted_noise_auc']:.2f}", rivals],
    ]


def _functionality(folder: Path) -> list[list[str]]:
    n = _numbers(folder, "functionality_promise")
    promise = "one of each planted duplicate is kept"
    if n is None:
        return [["functionality", promise, NOT_RUN, ""]]
    found = f"{n['planted_duplicates_kept_once']:.2f} in the worst case"
    fresh = n["planted_duplicates_kept_once_on_seeds_not_tuned_on"]
    worst: dict[str, float] = {}
    for case in n["cases"].values():
        for name, facts in case.items():
            if name != "functionality":
                worst[name] = min(facts["mean"], worst.get(name, 1.0))
    rivals = ", ".join(f"{name} {value:.2f}" for name, value in worst.items())
    return [["functionality", promise, f"{found}, {fresh:.2f} on fresh seeds", rivals]]


def _metapruning(folder: Path) -> list[list[str]]:
    n = _numbers(folder, "metapruning_promise")
    promise = "fitness ranks widths like training from scratch (Spearman)"
    if n is None:
        return [["MetaPruning", promise, NOT_RUN, ""]]
    beside = (
        f"MACs {n['macs_spearman']:.2f}, parameters {n['parameters_spearman']:.2f}, another "
        f"training from scratch {n['scratch_spearman_between_seeds']:.2f}; right order at equal "
        f"MACs {n['right_order_at_equal_macs']:.0%}"
    )
    return [["MetaPruning", promise, f"{n['fitness_spearman']:.2f}", beside]]


def _unification(folder: Path) -> list[list[str]]:
    n = _numbers(folder, "unification_promise")
    promise = "bytes over those of block pruning at equal accuracy"
    if n is None:
        return [["unification", promise, NOT_RUN, ""]]
    below = n.get("one_point_below")
    beside = "" if below is None else f"at 1.0 points below the dense network {below['ratio']:.2f}"
    return [
        ["unification", promise, f"{n['bytes_ratio_vs_pruning_at_equal_accuracy']:.2f}", beside]
    ]
