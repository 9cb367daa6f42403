"""Every claim with its value, its bar, and whether it holds; from the stored results alone.

A result that is not there leaves the value empty and the claim unheld; a missed bar stays in the table.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.records import HOME, fashion_mnist_reports, parser, read_record
from wgates_plugin.files import write_json

SEEDS = 3


@dataclass(frozen=True)
class Claim:
    """One line of the scoreboard before it is filled in.

    Attributes:
        better: "lower" or "higher".
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
    """Share of all stored runs whose exported file was measured at or under the target."""
    contracts = [report["contract"] for report in fashion_mnist_reports(folder).values()]
    record = read_record(folder, "targets_at_224")
    if record is not None:
        contracts += [numbers["contract"] for numbers in record["numbers"].values()]
    if not contracts:
        return None
    return sum(contract == "held" for contract in contracts) / len(contracts)


def accuracy_loss(network: str) -> Callable[[Path], float | None]:
    """Reader of the accuracy lost on Fashion-MNIST in points, mean over seeds; all must be there."""

    def read(folder: Path) -> float | None:
        losses = [
            100.0 * (report["baseline"]["accuracy"] - report["final"]["accuracy"])
            for name, report in fashion_mnist_reports(folder).items()
            if name.rpartition("-")[0] == network
        ]
        return statistics.mean(losses) if len(losses) >= SEEDS else None

    return read


def _gate_step(network: str) -> Claim:
    read = number("gate_step", network, "wgates", "ratio")
    return Claim(f"gate_step_ratio/{network}", 1.05, "lower", "gate_step.json", read)


CLAIMS = (
    _gate_step("resnet50"),
    _gate_step("mobilenet_v2"),
    Claim(
        "trace_and_removal_ratio_vs_torch_pruning/resnet50",
        1.2,
        "lower",
        "removal.json",
        number("removal", "ours", "ratio"),
    ),
    Claim(
        "sampling_share_in_inference/mobilenet_v2/onnxruntime",
        0.6,
        "higher",
        "sampling.json",
        number("sampling", "onnxruntime", "ours", "share_in_inference"),
    ),
    Claim(
        "target_held_share",
        1.0,
        "higher",
        "targets_at_224.json, fashion_mnist/",
        target_held_share,
    ),
    Claim(
        "accuracy_loss_50/fashion_mnist/resnet",
        1.0,
        "lower",
        "fashion_mnist/",
        accuracy_loss("resnet"),
    ),
    Claim("demo_seconds", 300.0, "lower", "demo.json", number("demo", "seconds")),
    Claim(
        "masked_equals_removed_worst",
        1e-5,
        "lower",
        "masked_equals_removed.json",
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
        source = f"results/{claim.source}".replace(", ", ", results/")
        found.append(Entry(claim.name, value, claim.bar, claim.better, good, source))
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
