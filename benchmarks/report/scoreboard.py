"""Every claim with its value, its bar, and whether it holds; from the stored results alone.

A result that is not there leaves the value empty and the claim unheld; a missed bar stays in the table.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import demo, fashion_mnist, targets_at_224
from benchmarks.comparison.claims import comparison_claims
from benchmarks.comparison.contests import compared
from benchmarks.latency_samples import GRIDS, NETWORKS
from benchmarks.report.claims import Claim, number
from benchmarks.report.strategy_claims import STRATEGY_CLAIMS
from benchmarks.tools import doors
from benchmarks.tools.latency_rivals import RIVALS
from benchmarks.tools.records import HOME, fashion_mnist_reports, parser, read_record
from wgates_plugin.files import write_json

TARGET_RUNS = len(fashion_mnist.NETWORKS) * len(fashion_mnist.SEEDS) + len(targets_at_224.NETWORKS)
"""Runs that are asked to keep a target, stored or not."""


@dataclass(frozen=True)
class Entry:
    claim: str
    value: float | None
    bar: float | None
    better: str
    holds: bool
    source: str
    interval: tuple[float, float] | None = None
    most: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Every field; the interval and the upper end of a band where there is one."""
        fields = asdict(self).items()
        return {k: v for k, v in fields if k not in ("interval", "most") or v is not None}


def target_held_share(folder: Path) -> float | None:
    """Share of the `TARGET_RUNS` whose exported file was measured at or under the target.

    A run that is not stored counts as not held; a stored one outside the set counts for nothing.
    """
    reports = fashion_mnist_reports(folder)
    record = read_record(folder, "targets_at_224")
    at_224 = {} if record is None else record["numbers"]
    runs = [
        reports.get(f"{network}-{seed}")
        for network in fashion_mnist.NETWORKS
        for seed in fashion_mnist.SEEDS
    ]
    runs += [at_224.get(network) for network in targets_at_224.NETWORKS]
    return sum(run is not None and run["contract"] == "held" for run in runs) / TARGET_RUNS


def accuracy_loss(network: str) -> Callable[[Path], float | None]:
    """Reader of the accuracy lost on Fashion-MNIST in points, mean over seeds.

    Lost against the unpruned network trained on for as many epochs as pruning took; None unless
    every seed has both accuracies.
    """

    def read(folder: Path) -> float | None:
        reports = fashion_mnist_reports(folder)
        losses = []
        for seed in fashion_mnist.SEEDS:
            report = reports.get(f"{network}-{seed}")
            if report is None or "dense_trained_on" not in report:
                return None
            rival = report["dense_trained_on"]["accuracy"]
            losses.append(100.0 * (rival - report["final"]["accuracy"]))
        return statistics.mean(losses)

    return read


def demo_seconds(folder: Path) -> float | None:
    """Wall time of the demo; None unless it held its target, on no more than two cores."""
    record = read_record(folder, "demo")
    if record is None:
        return None
    numbers = record["numbers"]
    counts = numbers["contract"] == "held" and numbers["cores"] <= demo.CORES
    return float(numbers["seconds"]) if counts else None


def removal_over_modelspeedup(folder: Path) -> float | None:
    """Our time over ModelSpeedup's; the record holds its time over ours."""
    ratio = number("removal", "nni", "ratio")(folder)
    return None if ratio is None else 1.0 / ratio


def worst_through(door: str) -> Callable[[Path], float | None]:
    """Largest error through a door; None unless all of `doors.NETWORKS` went through it."""

    def read(folder: Path) -> float | None:
        name = "masked_equals_removed_nni" if door == "nni" else "masked_equals_removed"
        record = read_record(folder, name)
        numbers = {} if record is None else record["numbers"]
        if door == "nni":
            found = [numbers.get("worst_by_network", {})]
        else:
            rows = [row for row in numbers.get("rows", []) if row["door"] == door]
            found = [{row["network"]: row["relative_error"]} for row in rows]
        if set(doors.NETWORKS) - {network for errors in found for network in errors}:
            return None
        return max(float(error) for errors in found for error in errors.values())

    return read


def _lpnet(pair: str, *keys: str) -> Callable[[Path], float | None]:
    return number("lpnet_accuracy", pair, *keys)


def best_rival_ratio(pair: str) -> Callable[[Path], float | None]:
    """Our MAPE over the best rival's, in the row where it is highest."""

    def read(folder: Path) -> float | None:
        record = read_record(folder, "lpnet_accuracy")
        facts = None if record is None else record["numbers"].get(pair)
        if facts is None:
            return None
        rows = [found for by_size in facts["sets"].values() for found in by_size.values()]
        return max(
            found["ours"]["mape"] / min(found[rival]["mape"] for rival in RIVALS) for found in rows
        )

    return read


def worst_coverage(pair: str) -> Callable[[Path], float | None]:
    """Share inside the 90 % interval, of the row (set and size) farthest from 91 %."""

    def read(folder: Path) -> float | None:
        record = read_record(folder, "lpnet_accuracy")
        facts = None if record is None else record["numbers"].get(pair)
        if facts is None:
            return None
        rows = [found["ours"] for sizes in facts["sets"].values() for found in sizes.values()]
        shares = [float(ours["coverage_90"]) for ours in rows if "coverage_90" in ours]
        return max(shares, key=lambda share: abs(share - 0.91))

    return read


def _lpnet_claims(network: str, runtime: str) -> list[Claim]:
    pair, source = f"{network}/{runtime}", "results/lpnet_accuracy.json"
    grid, other = ("sets", "grid", "300", "ours"), ("sets", "any", "300", "ours")
    return [
        Claim(f"lpnet_mape_grid_300/{pair}", 0.02, "lower", source, _lpnet(pair, *grid, "mape")),
        Claim(
            f"lpnet_within10_grid_300/{pair}",
            0.99,
            "higher",
            source,
            _lpnet(pair, *grid, "within_10_percent"),
        ),
        Claim(f"lpnet_mape_any_300/{pair}", 0.03, "lower", source, _lpnet(pair, *other, "mape")),
        Claim(
            f"lpnet_best_rival_ratio/{pair}",
            1.0,
            "lower",
            f"{source}; in the row that is worst for us",
            best_rival_ratio(pair),
        ),
        Claim(
            f"interval_coverage_90/{pair}",
            0.87,
            "higher",
            f"{source}; and at most 0.95; the row of set and size that is farthest from 0.91",
            worst_coverage(pair),
            most=0.95,
        ),
        Claim(
            f"noise_floor/{pair}",
            None,
            "lower",
            f"{source}; no bar: relative error of one measurement, arbitrary widths",
            _lpnet(pair, "noise_floor", "any", "mean_error"),
        ),
    ]


def _sampling_share(network: str, runtime: str) -> Claim:
    return Claim(
        f"sampling_share_in_inference/{network}/{runtime}",
        0.8 if runtime == "eager" else 0.6,
        "higher",
        "results/sampling.json",
        number("sampling", f"{network}/{runtime}", "ours", "share_in_inference"),
    )


def _gate_step(network: str) -> Claim:
    read = number("gate_step", network, "wgates", "ratio")
    return Claim(f"gate_step_ratio/{network}", 1.05, "lower", "results/gate_step.json", read)


PACKAGE_CLAIMS = (
    _gate_step("resnet50"),
    _gate_step("mobilenet_v2"),
    Claim(
        "removal_ratio_vs_torch_pruning/resnet50",
        1.0,
        "lower",
        "results/removal.json; trace, plan and removal",
        number("removal", "ours", "ratio"),
    ),
    Claim(
        "removal_ratio_vs_modelspeedup/resnet50",
        0.05,
        "lower",
        "results/removal.json; empty where nni was not installed",
        removal_over_modelspeedup,
    ),
    *(_sampling_share(network, runtime) for network in NETWORKS for runtime in GRIDS),
    *(
        claim
        for network in NETWORKS
        for runtime in GRIDS
        for claim in _lpnet_claims(network, runtime)
    ),
    Claim(
        "speed_at_equal_macs_vs_torch_pruning/mobilenet_v2/onnxruntime",
        2.0,
        "higher",
        "results/not_faster.json; torch-pruning's ms at uniform 30 % over ours",
        number("not_faster", "mobilenet_v2", "onnxruntime", "speed_ratio"),
    ),
    Claim(
        "target_held_share",
        1.0,
        "higher",
        "results/fashion_mnist/, results/targets_at_224.json; "
        f"of all {TARGET_RUNS} runs, a missing one counts as not held",
        target_held_share,
    ),
    Claim(
        "accuracy_loss_50/fashion_mnist/resnet",
        1.0,
        "lower",
        "results/fashion_mnist/; against the unpruned network trained on for as many epochs",
        accuracy_loss("resnet"),
    ),
    Claim(
        "demo_seconds",
        300.0,
        "lower",
        "results/demo.json; empty unless the target was held on at most two cores",
        demo_seconds,
    ),
    Claim(
        "masked_equals_removed_worst",
        1e-5,
        "lower",
        "results/masked_equals_removed.json",
        number("masked_equals_removed", "worst"),
    ),
    *(
        Claim(
            f"masked_equals_removed_worst/{door}",
            1e-5,
            "lower",
            f"results/{'masked_equals_removed_nni' if door == 'nni' else 'masked_equals_removed'}"
            f".json; over {len(doors.NETWORKS)} networks, empty if one is missing",
            worst_through(door),
        )
        for door in (*doors.DOORS, "nni")
    ),
    Claim(
        "nni_trials_succeeded_share",
        1.0,
        "higher",
        "results/nni_experiment.json",
        number("nni_experiment", "succeeded_share"),
    ),
)
"""Of measuring, removing, predicting and keeping targets."""


@functools.cache
def claims() -> tuple[Claim, ...]:
    return (*PACKAGE_CLAIMS, *STRATEGY_CLAIMS, *comparison_claims(compared()))


def holds(value: float | None, bar: float | None, better: str, most: float | None = None) -> bool:
    """Whether `value` is at the bar or on its good side; nothing is never good enough.

    What has no bar is only shown. `most` is a second, upper bar.

    Example:
        >>> holds(1.04, 1.05, "lower"), holds(0.5, 0.6, "higher"), holds(None, 1.0, "lower")
        (True, False, False)
    """
    if value is None:
        return False
    if most is not None and value > most:
        return False
    if bar is None:
        return True
    return value <= bar if better == "lower" else value >= bar


def _word(entry: Entry) -> str:
    if entry.bar is None:
        return "shown"
    return "holds" if entry.holds else "MISSED"


def entries(folder: Path) -> list[Entry]:
    """The scoreboard of a results folder."""
    found = []
    for claim in claims():
        value = claim.value(folder)
        good = holds(value, claim.bar, claim.better, claim.most)
        interval = claim.interval(folder) if claim.interval else None
        found.append(
            Entry(
                claim.name, value, claim.bar, claim.better, good, claim.source, interval, claim.most
            )
        )
    return found


def main(argv: Sequence[str] = ()) -> None:
    options = parser("scoreboard", __doc__, seed=None)
    options.add_argument("--out", type=Path, default=HOME / "scoreboard.json")
    arguments = options.parse_args(list(argv))
    found = entries(arguments.results)
    write_json(arguments.out, [entry.to_json() for entry in found])
    for entry in found:
        value = "-" if entry.value is None else f"{entry.value:.4g}"
        sign = "<=" if entry.better == "lower" else ">="
        print(
            f"{_word(entry):7} {entry.claim}: {value}"
            + ("" if entry.interval is None else " ({:.4g} to {:.4g})".format(*entry.interval))
            + ("" if entry.bar is None else f" {sign} {entry.bar:g}")
        )
    print(f"wrote {arguments.out}")
