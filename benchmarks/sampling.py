"""Claim: at least 60 % of the time LPNet's sampling takes is timed inference.

Measured: MobileNetV2 at 224x224, 30 random sub-networks on ONNX Runtime and in eager mode, one thread;
share of all wall time, setting up included, spent inside timed inferences. A timed inference is one
of the candidate or of the reference it is interleaved with, so the candidate's alone is recorded too.
Rival beside it, sample by sample in alternating order and with the same timing: what is done without
this package, namely a deep copy, a traced dependency graph, torch-pruning's removal, an export and a
session for every sample.
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

from benchmarks.records import parser, write_record
from benchmarks.subjects import SIDE, images, torchvision_network
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.sampling import draw_widths
from wgates_plugin.latency.base import BaseRuntime, Session
from wgates_plugin.latency.measurement import Measurement
from wgates_plugin.latency.onnx_export import export_torchscript
from wgates_plugin.latency.onnx_runtime import OnnxRuntime
from wgates_plugin.latency.timing import measure
from wgates_plugin.latency_study import LatencyStudy
from wgates_plugin.targets import LatencyTarget
from wgates_plugin.tracing import trace

CLAIM = "at least 60 % of LPNet's sampling time is timed inference"
RUNTIMES = ("onnxruntime", "eager")


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
    if isinstance(runtime, OnnxRuntime):
        return runtime.session_of(export_torchscript(smaller.eval(), example), example)
    return runtime.load(smaller, example)


def noting_runs(session: Session, seconds: list[float]) -> Session:
    """The same session; every run of it appends how long it took (s)."""
    run = session.run

    def timed() -> None:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)

    session.run = timed  # type: ignore[method-assign]
    return session


def sample_row(seconds: float, found: Measurement, runs: Sequence[float]) -> dict[str, float]:
    """One sample's wall time, timed inference, and the candidate's part in it, all in s.

    Args:
        runs: every run of the candidate in this measurement, its warm-up first.
    """
    return {
        "seconds": seconds,
        "inference": found.inference_seconds,
        "candidate_inference": sum(runs[found.warmup :]),
    }


def measure_runtime(
    runtime: str, arguments: argparse.Namespace, scratch: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    network = torchvision_network(arguments.network, seed=arguments.seed)
    example = images(1, side=arguments.side, seed=arguments.seed)
    space = trace(network, example, min_fraction=0.05)
    target = LatencyTarget(fraction=0.5, runtime=runtime, threads=1)
    study = LatencyStudy(network, space, example, target)
    study.baseline(1.0)
    assert study.reference_ms is not None
    started = time.perf_counter()
    study.open_files(scratch / f"{runtime}.jsonl", scratch / f"{runtime}-visited.jsonl")
    family = study.family
    setup = time.perf_counter() - started
    samples: dict[str, list[dict[str, float]]] = {"ours": [], "naive": []}
    runs: list[float] = []
    measured: list[Measurement] = []
    make = family.session
    family.session = lambda widths: noting_runs(make(widths), runs)  # type: ignore[method-assign]

    def ours(number: int) -> None:
        runs.clear()
        cost = study.sample(
            count=number + 1,
            grid=arguments.grid,
            seed=arguments.seed,
            seconds_per_sample=arguments.seconds,
            on_sample=lambda _, found: measured.append(found),
        )
        samples["ours"].append(sample_row(cost.seconds, measured[-1], runs))

    def naive(number: int) -> None:
        widths = draw_widths(space, arguments.grid, np.random.default_rng([arguments.seed, number]))
        start = time.perf_counter()
        runs.clear()
        session = naive_session(network, space, widths, example, study.runtime)
        session = noting_runs(session, runs)
        found = measure(
            session,
            reference=study.reference,
            reference_ms=study.reference_ms,
            seconds=arguments.seconds,
        )
        session.close()
        seconds = time.perf_counter() - start
        samples["naive"].append(sample_row(seconds, found, runs))

    for number in range(arguments.samples):
        pair = [ours, naive] if number < arguments.naive_samples else [ours]
        for way in pair if number % 2 == 0 else reversed(pair):
            way(number)
    numbers = {name: share(rows) for name, rows in samples.items() if rows}
    numbers["ours"] = share(samples["ours"], setup=setup)
    for name, facts in numbers.items():
        print(f"{runtime}: {name} {facts['share_in_inference']:.2f} in inference", flush=True)
    return numbers, {**samples, "setup_seconds": setup}


def share(rows: Sequence[dict[str, float]], *, setup: float = 0.0) -> dict[str, float]:
    """Sums over samples; `setup` (s) counts as time outside inference.

    Example:
        >>> row = {"seconds": 3.0, "inference": 2.0, "candidate_inference": 1.0}
        >>> found = share([row], setup=1.0)
        >>> found["share_in_inference"], found["share_in_candidate_inference"]
        (0.5, 0.25)
    """
    seconds = sum(row["seconds"] for row in rows) + setup
    inference = sum(row["inference"] for row in rows)
    candidate = sum(row["candidate_inference"] for row in rows)
    return {
        "samples": len(rows),
        "seconds": seconds,
        "setup_seconds": setup,
        "inference_seconds": inference,
        "candidate_inference_seconds": candidate,
        "share_in_inference": inference / seconds,
        "share_in_candidate_inference": candidate / seconds,
        "overhead_seconds_per_sample": (seconds - setup - inference) / len(rows),
    }


def main(argv: Sequence[str] = ()) -> None:
    options = parser("sampling", __doc__)
    options.add_argument("--network", default="mobilenet_v2")
    options.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=RUNTIMES)
    options.add_argument("--side", type=int, default=SIDE)
    options.add_argument("--samples", type=int, default=30)
    options.add_argument("--naive-samples", type=int, default=10)
    options.add_argument("--seconds", type=float, default=0.4, help="inference per sample")
    options.add_argument("--grid", type=int, default=8)
    arguments = options.parse_args(list(argv))
    torch.set_num_threads(1)
    with TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {
            runtime: measure_runtime(runtime, arguments, Path(scratch))
            for runtime in arguments.runtimes
        }
    write_record(
        arguments.results,
        "sampling",
        claim=CLAIM,
        settings={
            "network": arguments.network,
            "side": arguments.side,
            "seconds_per_sample": arguments.seconds,
            "grid": arguments.grid,
            "threads": 1,
        },
        seed=arguments.seed,
        numbers={runtime: numbers for runtime, (numbers, _) in found.items()},
        samples={runtime: samples for runtime, (_, samples) in found.items()},
    )
