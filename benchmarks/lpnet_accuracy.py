"""Claim: from 300 measurements LPNet is right to 2 % on the grid, to 3 % off it, and knows how surely.

Judged on the stored raw latencies (`latency_samples`): ResNet-34, ResNet-50 and MobileNetV2 at 224x224
on eager, ONNX Runtime and OpenVINO. Five-fold cross-validation over 375 sub-networks per set, so that
every sub-network is predicted once by a fit that never saw it, from 50, 100, 200 and 300 others.
Beside it, with the same measurements: the paper's MLP, a line through MACs, gradient boosting on the
widths, and a look-up table of the same profiled layer times; and our own structure without layer
profiles. The noise floor is the error of a single measurement, from pairs of the same sub-network
minutes apart in the same run. `visited` are the networks an optimiser came by, with LPNet fitted on
300 grid samples. `transfer`: fitted on the first runtime, adapted to another from 30 measurements,
judged on widths that neither saw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.latency_samples import FITTED, GRIDS, NETWORKS, read_samples, stored, subject
from benchmarks.tools.latency_rivals import ABLATIONS, RIVALS
from benchmarks.tools.records import RESULTS, parser, read_record, write_record
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.lpnet import LPNet
from wgates_plugin.efficiency.lpnet.data import LatencyData, folds
from wgates_plugin.efficiency.samples.file import SampleFile

CLAIM = "300 measurements: 2 % on grid widths, 3 % on arbitrary ones, intervals that hold"
SIZES = (50, 100, 200, 300)
FOLDS = 5
TRANSFER_SAMPLES = 30
COVERAGE = 0.9


def data_of(space: ChannelSpace, file: SampleFile) -> LatencyData:
    """First measurements of all different widths."""
    samples = [sample for sample in file.usable if not sample.repeat]
    return LatencyData.of(
        space,
        [sample.widths for sample in samples],
        [sample.latency_ms for sample in samples],
        [sample.layers_ms for sample in samples],
    )


def noise_floor(file: SampleFile) -> dict[str, float | None]:
    """Error of one measurement, relative: two of the same network are sqrt(2) of it apart."""
    first: dict[tuple[int, ...], float] = {}
    apart = []
    for sample in file.usable:
        if sample.widths in first:
            apart.append(abs(sample.latency_ms / first[sample.widths] - 1.0))
        else:
            first[sample.widths] = sample.latency_ms
    error = float(torch.tensor(apart).mean()) / math.sqrt(2) if apart else None
    return {"pairs": len(apart), "mean_error": error}


def fit(space: ChannelSpace, data: LatencyData, seed: int, prior: LPNet | None = None) -> LPNet:
    """LPNet as its users fit it."""
    return LPNet.fit(
        space, data.widths, data.latency_ms, layers_ms=profiles(space, data), seed=seed, prior=prior
    )


def profiles(space: ChannelSpace, data: LatencyData) -> list[dict[str, float] | None]:
    names = [layer.name for layer in space.layers if layer.kernel > 0]
    return [
        dict(zip(names, row, strict=True)) if known else None
        for known, row in zip(data.profiled.tolist(), data.layers_ms.tolist(), strict=True)
    ]


def summary(errors: Tensor) -> dict[str, float]:
    """Relative errors (N,) in a few numbers."""
    size = errors.abs()
    return {
        "mape": float(size.mean()),
        "within_10_percent": float((size <= 0.1).double().mean()),
        "worst": float(size.max()),
        "bias": float(errors.mean()),
    }


def held_out(
    space: ChannelSpace, data: LatencyData, size: int, seed: int
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Every sub-network predicted from `size` others: (numbers per predictor, raw predictions)."""
    ways = {**RIVALS, **(ABLATIONS if size in SIZES[:1] else {})}
    predicted = {name: torch.empty(len(data)).double() for name in ("ours", "low", "high", *ways)}
    for number, part in enumerate(folds(data.widths, parts=FOLDS, seed=seed)):
        rest = torch.arange(len(data))[~torch.isin(torch.arange(len(data)), part)]
        order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed + number))
        known = data[rest[order[:size]]]
        lpnet = fit(space, known, seed)
        predicted["ours"][part] = lpnet(data.widths[part])
        low, high = lpnet.interval(data.widths[part], COVERAGE)
        predicted["low"][part], predicted["high"][part] = low, high
        for name, way in ways.items():
            predicted[name][part] = way(space, known, seed)(data.widths[part])
    truth = data.latency_ms
    numbers: dict[str, Any] = {
        name: summary(predicted[name] / truth - 1.0) for name in ("ours", *ways)
    }
    inside = (predicted["low"] <= truth) & (truth <= predicted["high"])
    numbers["ours"]["coverage_90"] = float(inside.double().mean())
    half = (predicted["high"] - predicted["low"]) / 2 / predicted["ours"]
    numbers["ours"]["half_width_90"] = float(half.median())
    raw = [
        {"measured_ms": t, "predicted_ms": p, "low_ms": a, "high_ms": b}
        for t, p, a, b in zip(
            *(predicted_or.tolist() for predicted_or in
              (truth, predicted["ours"], predicted["low"], predicted["high"])),
            strict=True,
        )
    ]  # fmt: skip
    return numbers, raw


def visited(space: ChannelSpace, grid: LatencyData, seen: LatencyData, seed: int) -> dict[str, Any]:
    """Errors on the optimiser's networks, fitted on the first 300 grid samples as it was."""
    known = grid[torch.arange(min(FITTED, len(grid)))]
    lpnet = fit(space, known, seed)
    found = {"ours": summary(lpnet(seen.widths) / seen.latency_ms - 1.0)}
    low, high = lpnet.interval(seen.widths, COVERAGE)
    inside = (low <= seen.latency_ms) & (seen.latency_ms <= high)
    found["ours"]["inside_90"] = float(inside.double().mean())
    for name, way in {**RIVALS, **ABLATIONS}.items():
        found[name] = summary(way(space, known, seed)(seen.widths) / seen.latency_ms - 1.0)
    return found


def transfer(
    space: ChannelSpace, source: LatencyData, other: LatencyData, seed: int
) -> dict[str, dict[str, float]]:
    """Another runtime's latencies from 30 of its measurements, with and without the first's LPNet."""
    order = torch.randperm(len(other), generator=torch.Generator().manual_seed(seed))
    known, rest = other[order[:TRANSFER_SAMPLES]], other[order[TRANSFER_SAMPLES:]]
    first = source[torch.arange(min(FITTED, len(source)))]
    prior = fit(space, first, seed)
    there = set(map(tuple, first.widths.tolist()))
    fresh = [row for row, w in enumerate(rest.widths.tolist()) if tuple(w) not in there]
    unseen = rest[torch.tensor(fresh, dtype=torch.int64)]
    blind = LatencyData(known.widths, known.latency_ms, torch.full_like(known.layers_ms, torch.nan))
    ways = {
        "adapted": fit(space, known, seed, prior),
        "adapted-without-profiles": fit(space, blind, seed, prior),
        "from-scratch": fit(space, known, seed),
        "from-scratch-without-profiles": fit(space, blind, seed),
    }
    return {n: summary(m(unseen.widths) / unseen.latency_ms - 1.0) for n, m in ways.items()}


def pair(network: str, runtime: str, folder: Path, seed: int) -> tuple[dict[str, Any], Any]:
    """All numbers of one network on one runtime, and raw predictions from 300 measurements."""
    _, space = subject(network, warm=False)
    files = {kind: read_samples(stored(folder, network, runtime, kind)) for kind in ("grid", "any")}
    data = {kind: data_of(space, file) for kind, file in files.items()}
    numbers: dict[str, Any] = {"grid": GRIDS[runtime], "samples": {}, "sets": {}, "noise_floor": {}}
    raw = {}
    for kind, rows in data.items():
        numbers["samples"][kind] = len(rows)
        numbers["noise_floor"][kind] = noise_floor(files[kind])
        numbers["sets"][kind] = {}
        for size in SIZES:
            found, predictions = held_out(space, rows, size, seed)
            numbers["sets"][kind][str(size)] = found
            print(network, runtime, kind, size, _line(found), flush=True)
        raw[kind] = predictions
    path = stored(folder, network, runtime, "visited")
    if path.exists():
        rows = data_of(space, read_samples(path))
        numbers["samples"]["visited"] = len(rows)
        numbers["sets"]["visited"] = {str(FITTED): visited(space, data["grid"], rows, seed)}
    source = next(iter(GRIDS))
    if runtime != source:
        for kind, rows in data.items():
            first = data_of(space, read_samples(stored(folder, network, source, kind)))
            numbers.setdefault("transfer", {})[kind] = transfer(space, first, rows, seed)
    return numbers, raw


def _line(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {facts['mape']:.1%}" for name, facts in found.items())


def main(argv: Sequence[str] = ()) -> None:
    options = parser("lpnet_accuracy", __doc__)
    options.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    options.add_argument("--runtimes", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    options.add_argument("--samples", type=Path, default=RESULTS, help="where the raw files are")
    arguments = options.parse_args(list(argv))
    torch.set_num_threads(1)
    for network in arguments.networks:
        for runtime in arguments.runtimes:
            if not stored(arguments.samples, network, runtime, "grid").exists():
                print(f"{network} on {runtime}: no stored samples; run latency_samples first")
                continue
            found, raw = pair(network, runtime, arguments.samples, arguments.seed)
            before = read_record(arguments.results, "lpnet_accuracy")
            numbers = {**(before["numbers"] if before else {}), f"{network}/{runtime}": found}
            samples = {**(before["samples"] if before else {}), f"{network}/{runtime}": raw}
            write_record(
                arguments.results,
                "lpnet_accuracy",
                claim=CLAIM,
                settings={"sizes": SIZES, "folds": FOLDS, "transfer_samples": TRANSFER_SAMPLES},
                seed=arguments.seed,
                numbers=dict(sorted(numbers.items())),
                samples=dict(sorted(samples.items())),
            )
