"""Claim: at least 60 % of the time LPNet's sampling takes is timed inference, 80 % in eager mode.

Measured: random sub-networks of MobileNetV2, ResNet-34 and ResNet-50 at 224x224 on ONNX Runtime,
OpenVINO and in eager mode, one thread; share of all wall time, setting up included, spent inside timed
inferences, for as many samples as a job takes. A timed inference is one of the candidate, of the
reference it is interleaved with, or of the layer profile, and counts whether or not its timing was kept.
Rival beside it, on the first samples in alternating order and with the same timing: what is done without
this package, namely a deep copy, a traced dependency graph, torch-pruning's removal, an export and a
session for every sample, and no profile.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.latency_samples import GRIDS, NETWORKS
from benchmarks.tools.records import parser, write_record
from benchmarks.tools.subjects import SIDE, images, torchvision_network
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.sampling import draw_widths
from wgates_plugin.latency.base import BaseRuntime, Session
from wgates_plugin.latency.onnx_export import export_torchscript
from wgates_plugin.latency.onnx_runtime import OnnxRuntime
from wgates_plugin.latency.openvino import OpenVinoRuntime
from wgates_plugin.latency.timing import measure
from wgates_plugin.latency_study import LatencyStudy
from wgates_plugin.targets import LatencyTarget, PruningSettings
from wgates_plugin.tracing import trace

CLAIM = "at least 60 % of LPNet's sampling time is timed inference, 80 % in eager mode"


def naive_session(
    network: nn.Module,
    space: ChannelSpace,
    widths: Sequence[int],
    example: Tensor,
    runtime: BaseRuntime,
) -> Session:
    """The network at `widths` (G,), made with torch-pruning and a fresh export; nothing is checked."""
    smaller = copy.deepcopy(network)
    graph = tp.DependencyGraph().build_dependency(smaller, example_inputs=(example,))
    found = dict(smaller.named_modules())
    for group, width in zip(space.groups, widths, strict=True):
        if width < group.channels:
            root = found[group.name]
            pruning = graph.get_pruner_of_module(root).prune_out_channels
            graph.get_pruning_group(root, pruning, list(range(width, group.channels))).prune()
    if isinstance(runtime, (OnnxRuntime, OpenVinoRuntime)):
        return runtime.session_of(export_torchscript(smaller.eval(), example), example)
    return runtime.load(smaller, example)


def measure_pair(
    name: str, runtime: str, arguments: argparse.Namespace, scratch: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    network = torchvision_network(name, seed=arguments.seed)
    example = images(1, side=arguments.side, seed=arguments.seed)
    space = trace(network, example, min_fraction=0.05)
    target = LatencyTarget(fraction=0.5, runtime=runtime, threads=1)
    study = LatencyStudy(network, space, example, target)
    started = time.perf_counter()
    baseline = study.baseline(1.0)
    calibrated = baseline.inference_seconds + baseline.discarded_seconds
    study.open_files(scratch / "samples.jsonl", scratch / "visited.jsonl")
    _ = study.family
    setup = time.perf_counter() - started
    samples: dict[str, list[dict[str, float]]] = {"ours": [], "naive": []}
    before_sampling: list[float] = []

    def ours(number: int) -> None:
        began = time.perf_counter()
        cost = study.sample(
            count=number + 1,
            grid=GRIDS[runtime],
            seed=arguments.seed,
            seconds_per_sample=arguments.seconds,
        )
        samples["ours"].append({"seconds": cost.seconds, "inference": cost.inference_seconds})
        # The first call also makes the reference and calibrates it.
        before_sampling.append(time.perf_counter() - began - cost.seconds)

    def naive(number: int) -> None:
        widths = draw_widths(space, GRIDS[runtime], np.random.default_rng([arguments.seed, number]))
        start = time.perf_counter()
        session = naive_session(network, space, widths, example, study.runtime)
        found = measure(
            session,
            reference=study.reference,
            reference_ms=study.reference_ms,
            seconds=arguments.seconds,
        )
        session.close()
        seconds = time.perf_counter() - start
        samples["naive"].append({"seconds": seconds, "inference": found.inference_seconds})

    for number in range(arguments.samples):
        pair = [ours, naive] if number < arguments.naive_samples else [ours]
        for take in pair if number % 2 == 0 else reversed(pair):
            take(number)
    numbers = {way: share(rows) for way, rows in samples.items() if rows}
    assert study.samples is not None
    light = next(iter(study.samples.sources.values())).reference
    setup += sum(before_sampling)
    calibrated += light["inference_seconds"]
    numbers["ours"] = share(samples["ours"], setup=setup, calibrated=calibrated)
    for way, facts in numbers.items():
        print(
            f"{name} on {runtime}: {way} {facts['share_in_inference']:.2f} in inference", flush=True
        )
    return numbers, {**samples, "setup_seconds": setup, "calibration_seconds": calibrated}


def share(
    rows: Sequence[dict[str, float]], *, setup: float = 0.0, calibrated: float = 0.0
) -> dict[str, float]:
    """Sums over samples and setting up (s), of which `calibrated` is timed inference.

    Example:
        >>> share([{"seconds": 3.0, "inference": 2.0}], setup=1.0)["share_in_inference"]
        0.5
    """
    seconds = sum(row["seconds"] for row in rows) + setup
    inference = sum(row["inference"] for row in rows) + calibrated
    return {
        "samples": len(rows),
        "seconds": seconds,
        "setup_seconds": setup,
        "inference_seconds": inference,
        "share_in_inference": inference / seconds,
        "overhead_seconds_per_sample": (seconds - setup - inference + calibrated) / len(rows),
    }


def main(argv: Sequence[str] = ()) -> None:
    options = parser("sampling", __doc__)
    options.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    options.add_argument("--runtimes", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    options.add_argument("--side", type=int, default=SIDE)
    options.add_argument("--samples", type=int, default=PruningSettings.samples, help="a job's")
    options.add_argument("--naive-samples", type=int, default=3)
    options.add_argument("--seconds", type=float, default=0.5, help="inference per sample")
    arguments = options.parse_args(list(argv))
    torch.set_num_threads(1)
    numbers: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in arguments.networks:
            for runtime in arguments.runtimes:
                with TemporaryDirectory() as scratch:
                    found = measure_pair(name, runtime, arguments, Path(scratch))
                numbers[f"{name}/{runtime}"], samples[f"{name}/{runtime}"] = found
    write_record(
        arguments.results,
        "sampling",
        claim=CLAIM,
        settings={
            "side": arguments.side,
            "seconds_per_sample": arguments.seconds,
            "grids": GRIDS,
            "threads": 1,
        },
        seed=arguments.seed,
        numbers=numbers,
        samples=samples,
    )
