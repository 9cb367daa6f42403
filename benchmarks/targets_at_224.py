"""Claim: half the measured latency of ImageNet-sized networks is reached, by the exported file.

Measured: ResNet-34, ResNet-50 and MobileNetV2 at 224x224 with random weights, on ONNX Runtime with one
thread, through the whole pipeline, channels chosen by L2 norm. The file is timed against the untouched
network in the same rounds; that network is the rival. Nothing is trained: latency does not depend on
weights. LPNet's error is given on held-out samples and on the widths that were visited.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.tools.records import parser, write_record
from benchmarks.tools.subjects import SIDE, images, torchvision_network
from wgates_plugin import LatencyTarget, PruningSettings, prune_to_target

CLAIM = "the exported file takes at most half of the untouched network's measured latency"
NETWORKS = ("resnet34", "resnet50", "mobilenet_v2")


def reach_target(
    name: str, arguments: argparse.Namespace, folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One network through the pipeline without training: (numbers, raw samples)."""
    side, seed = arguments.side, arguments.seed
    batch = (images(2, side=side, seed=seed), torch.tensor([0, 1]))
    report = prune_to_target(
        torchvision_network(name, seed=seed),
        images(1, side=side, seed=seed),
        [batch],
        [batch],
        target=LatencyTarget(fraction=arguments.fraction, threads=arguments.threads),
        settings=PruningSettings(
            strategy="l2",
            gate_epochs=0,
            fine_tune_epochs=0,
            samples=arguments.samples,
            seconds_per_sample=arguments.seconds,
            measure_seconds=arguments.measure_seconds,
            min_fraction=0.05,
            grid=arguments.grid,
            seed=seed,
        ),
        run_folder=folder,
        name=name,
        progress=False,
    ).report
    before, after, lpnet = report["baseline"], report["final"], dict(report["lpnet"])
    predictions = lpnet.pop("predictions")
    numbers = {
        "contract": report["contract"],
        "baseline_ms": before["latency_ms"],
        "target_ms": report["target_ms"],
        "latency_ms": after["latency_ms"],
        "ratio": after["latency_ms"] / before["latency_ms"],
        "ratio_spread": after["latency"]["ratio_spread"],
        "macs_share": after["macs"] / before["macs"],
        "parameters_share": after["parameters"] / before["parameters"],
        "grid": report["grid"]["multiple"],
        "lpnet": lpnet,
        "masked_equals_removed": report["masked_equals_removed"],
        "attempts": report["attempts"],
        "seconds": report["seconds"],
    }
    print(
        f"{name}: {after['latency_ms']:.2f} of {report['target_ms']:.2f} ms, {report['contract']}; "
        f"LPNet's error held out {lpnet['mape_held_out']:.1%}",
        flush=True,
    )
    samples = {
        "baseline_ms": before["latency"]["samples_ms"],
        "artefact_ms": after["latency"]["samples_ms"],
        "artefact_reference_ms": after["latency"]["reference_samples_ms"],
        "predictions": predictions,
        "widths": report["widths"],
    }
    return numbers, samples


def main(argv: Sequence[str] = ()) -> None:
    options = parser("targets_at_224", __doc__)
    options.add_argument("--networks", nargs="+", default=list(NETWORKS))
    options.add_argument("--side", type=int, default=SIDE)
    options.add_argument("--fraction", type=float, default=0.5)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--samples", type=int, default=100)
    options.add_argument("--seconds", type=float, default=0.4, help="inference per sample")
    options.add_argument("--measure-seconds", type=float, default=3.0)
    options.add_argument("--grid", type=int, help="channel multiple; probed when left out")
    arguments = options.parse_args(list(argv))
    torch.set_num_threads(1)
    found = {}
    with TemporaryDirectory() as scratch:
        for name in arguments.networks:
            found[name] = reach_target(name, arguments, Path(scratch) / name)
    write_record(
        arguments.results,
        "targets_at_224",
        claim=CLAIM,
        settings={
            "runtime": "onnxruntime",
            "threads": arguments.threads,
            "side": arguments.side,
            "fraction": arguments.fraction,
            "samples": arguments.samples,
            "seconds_per_sample": arguments.seconds,
            "measure_seconds": arguments.measure_seconds,
            "strategy": "l2",
        },
        seed=arguments.seed,
        numbers={name: numbers for name, (numbers, _) in found.items()},
        samples={name: samples for name, (_, samples) in found.items()},
    )
