"""Every claim with its value, its bar, and whether it holds; from the stored results alone.

A result that is not there leaves the value empty and the claim unheld; a missed bar stays in the table.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import demo, fashion_mnist, targets_at_224
from benchmarks.records import HOME, fashion_mnist_reports, parser, read_record
from wgates_plugin.files import write_json

TARGET_RUNS = len(fashion_mnist.NETWORKS) * len(fashion_mnist.SEEDS) + len(targets_at_224.NETWORKS)
"""Runs that are asked to keep a target, stored or not."""


@dataclass(frozen=True)
class Claim:
    """One line of the scoreboard before it is filled in.

    Attributes:
        better: "lower" or "higher".
        source: where the value is read, under benchmarks/, and what to know about it.
        value: reads the value from a results folder; None when the result is not there.
    """

    name: str
    bar: float
    better: str
    source: str
    value: Callable[[Path], float | None]


@dataclass(frozen=True)
class Entry:
    claim: str
    value: float | None
    bar: float
    better: str
    holds: bool
    source: str


def number(benchmark: str, *keys: str) -> Callable[[Path], float | None]:
    """Reader of one number in the record of `benchmark`."""

    def read(folder: Path) -> float | None:
        record = read_record(folder, benchmark)
        value = None if record is None else record["numbers"]
        for key in keys:
            value = None if value is None else value.get(key)
        return None if value is None else float(value)

    return read


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


def _gate_step(network: str) -> Claim:
    read = number("gate_step", network, "wgates", "ratio")
    return Claim(f"gate_step_ratio/{network}", 1.05, "lower", "results/gate_step.json", read)


CLAIMS = (
    _gate_step("resnet50"),
    _gate_step("mobilenet_v2"),
    Claim(
        "trace_and_removal_ratio_vs_torch_pruning/resnet50",
        1.2,
        "lower",
        "results/removal.json",
        number("removal", "ours", "ratio"),
    ),
    Claim(
        "sampling_share_in_inference/mobilenet_v2/onnxruntime",
        0.6,
        "higher",
        "results/sampling.json",
        number("sampling", "onnxruntime", "ours", "share_in_inference"),
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
)


def holds(value: float | None, bar: float, better: str) -> bool:
    """Whether `value` is at the bar or on its good side; nothing is never good enough.

    Example:
        >>> holds(1.04, 1.05, "lower"), holds(0.5, 0.6, "higher"), holds(None, 1.0, "lower")
        (True, False, False)
    """
    if value is None:
        return False
    return value <= bar if better == "lower" else value >= bar


def entries(folder: Path) -> list[Entry]:
    """The scoreboard of a results folder."""
    found = []
    for claim in CLAIMS:
        value = claim.value(folder)
        good = holds(value, claim.bar, claim.better)
        found.append(Entry(claim.name, value, claim.bar, claim.better, good, claim.source))
    return found


def main(argv: Sequence[str] = ()) -> None:
    options = parser("scoreboard", __doc__)
    options.add_argument("--out", type=Path, default=HOME / "scoreboard.json")
    arguments = options.parse_args(list(argv))
    found = entries(arguments.results)
    write_json(arguments.out, [asdict(entry) for entry in found])
    for entry in found:
        value = "-" if entry.value is None else f"{entry.value:.4g}"
        sign = "<=" if entry.better == "lower" else ">="
        print(
            f"{'holds' if entry.holds else 'MISSED':7} {entry.claim}: {value} {sign} {entry.bar:g}"
        )
    print(f"wrote {arguments.out}")
