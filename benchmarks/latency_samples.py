"""Raw latencies of random sub-networks: what `lpnet_accuracy` learns from and is judged on.

ResNet-34, ResNet-50 and MobileNetV2 at 224x224 on eager, ONNX Runtime and OpenVINO (float32), one
thread. Per pair two files of 375 sub-networks each, `grid` (multiples of the runtime's own channel
grid) and `any` (arbitrary widths), taken in turn, each sample timed against the network at half widths
and profiled layer by layer; after every 25 samples an earlier one is measured once more, for the
noise. A third file, `visited`, holds what an optimiser comes by: LPNet is fitted on 300 grid samples
and asked for networks at 30 to 80 % of the latency, under random scores. Compressed sample files go to
`results/latency_samples/`. Hours; can be stopped at any moment and goes on where it was. The stored
`grid` and `any` files were taken before doubted samples were measured again: nothing in them was
rejected.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.tools.records import RESULTS, parser
from benchmarks.tools.subjects import images, torchvision_network
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget, Limit
from wgates_plugin.efficiency.bench import Bench
from wgates_plugin.efficiency.light_reference import light_bench
from wgates_plugin.efficiency.lpnet import LPNet
from wgates_plugin.efficiency.samples.file import SampleFile
from wgates_plugin.efficiency.sampling import collect, draw_widths
from wgates_plugin.files import atomic_path
from wgates_plugin.latency_study import LatencyStudy
from wgates_plugin.strategies.budgeting import fit_to_budget
from wgates_plugin.targets import LatencyTarget
from wgates_plugin.tracing import trace

NETWORKS = ("mobilenet_v2", "resnet34", "resnet50")
GRIDS = {"onnxruntime": 16, "openvino": 8, "eager": 16}
"""Runtime -> the channel grid that `probe_grid` finds for it on the machine of the stored files."""
SETS = ("grid", "any", "visited")
COUNT = 375
STEP = 25
FITTED = 300
SHARES = (0.3, 0.45, 0.6, 0.8)
SCORES = 3
MIN_FRACTION = 0.05


def stored(folder: Path, network: str, runtime: str, kind: str) -> Path:
    return folder / "latency_samples" / f"{network}-{runtime}-{kind}.jsonl.gz"


def subject(network: str, *, warm: bool = True) -> tuple[torch.nn.Module, ChannelSpace]:
    """The benchmark network and its channel space."""
    model = torchvision_network(network, seed=0, warm=warm)
    return model, trace(model, images(1), min_fraction=MIN_FRACTION)


def read_samples(path: Path) -> SampleFile:
    """A compressed sample file, with the samples of every source, wherever it is read."""
    with TemporaryDirectory() as folder:
        plain = Path(folder) / path.stem
        plain.write_bytes(gzip.decompress(path.read_bytes()))
        file = SampleFile.load(plain)
    file.allowed = frozenset(file.sources)
    return file


def compress(plain: Path, path: Path) -> None:
    with atomic_path(path) as part:
        part.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))


def sample(network: str, runtime: str, work: Path, *, count: int, seconds: float) -> None:
    """Bring the `grid` and `any` files of one pair in `work` up to `count` samples each."""
    model, space = subject(network)
    study = LatencyStudy(model, space, images(1), LatencyTarget(fraction=1.0, runtime=runtime))
    files = {
        kind: SampleFile.open(work / f"{network}-{runtime}-{kind}.jsonl", space, study.identity)
        for kind in ("grid", "any")
    }
    sources = [source for file in files.values() for source in file.sources.values()]
    clock = sources[0].reference["dense_ms"] if sources else study.baseline(2.0).latency_ms
    bench = bench_for(study, GRIDS[runtime], clock)
    grids = {"grid": GRIDS[runtime], "any": 1}
    facts: dict[str, Any] = {"reference": bench.about, "environment": bench.environment}
    for upto in range(STEP, count + STEP, STEP):
        for seed, (kind, file) in enumerate(files.items(), 1):
            before = file.distinct
            collect(
                file, space, bench, count=min(upto, count), grid=grids[kind], seed=seed,
                seconds_per_sample=seconds,
            )  # fmt: skip
            if file.distinct > before:
                again = file.usable[(7 * upto) % file.distinct].widths
                taken = bench.take(again, seconds, profile=False)
                file.add(again, taken.found, file.source(bench.reference_ms, **facts))
        print(network, runtime, min(upto, count), flush=True)


def bench_for(study: LatencyStudy, grid: int, dense_ms: float) -> Bench:
    """Everything is timed against the network at half widths, itself against the untouched one.

    Args:
        dense_ms: what the untouched network is said to take; the same for all of a pair's files.
    """
    return light_bench(study.family, study.space, study.reference, dense_ms, grid=grid, seconds=6.0)


def visit(network: str, runtime: str, work: Path, *, seconds: float) -> None:
    """Measure networks that LPNet and a budget lead to."""
    model, space = subject(network)
    study = LatencyStudy(model, space, images(1), LatencyTarget(fraction=1.0, runtime=runtime))
    known = read_samples(stored(RESULTS, network, runtime, "grid"))
    fitted = [s for s in known.usable if not s.repeat][:FITTED]
    lpnet = LPNet.fit(
        space,
        [s.widths for s in fitted],
        [s.latency_ms for s in fitted],
        layers_ms=[s.layers_ms for s in fitted],
    )
    dense = float(lpnet(torch.tensor(space.full_widths)))
    clock = next(iter(known.sources.values())).reference["dense_ms"]
    bench = bench_for(study, GRIDS[runtime], clock)
    file = SampleFile.open(work / f"{network}-{runtime}-visited.jsonl", space, study.identity)
    source = file.source(bench.reference_ms, reference=bench.about, environment=bench.environment)
    for seed in range(SCORES):
        rng = np.random.default_rng(seed)
        scores = torch.from_numpy(rng.standard_normal(space.total_units))
        for share in SHARES:
            budget = Budget.of(Limit(lpnet, share * dense))
            start = draw_widths(space, GRIDS[runtime], rng)
            widths = fit_to_budget(space, scores, start, budget, GRIDS[runtime])
            if widths not in file.widths:
                taken = bench.take(widths, seconds, profile=False)
                file.add(widths, taken.found, source)
    print(network, runtime, "visited", len(file), flush=True)


def main(argv: Sequence[str] = ()) -> None:
    options = parser("latency_samples", __doc__)
    options.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    options.add_argument("--runtimes", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    options.add_argument("--count", type=int, default=COUNT)
    options.add_argument("--seconds", type=float, default=0.25, help="timed inference per sample")
    options.add_argument("--work", type=Path, default=Path("latency_samples"), help="open files")
    options.add_argument("--only", choices=("sample", "visit"), help="one of the two parts")
    arguments = options.parse_args(list(argv))
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for network in arguments.networks:
        for runtime in arguments.runtimes:
            kinds: list[str] = []
            if arguments.only != "visit":
                sample(
                    network, runtime, arguments.work,
                    count=arguments.count, seconds=arguments.seconds,
                )  # fmt: skip
                kinds += ["grid", "any"]
            if arguments.only != "sample":
                visit(network, runtime, arguments.work, seconds=2 * arguments.seconds)
                kinds += ["visited"]
            for kind in kinds:
                plain = arguments.work / f"{network}-{runtime}-{kind}.jsonl"
                compress(plain, stored(arguments.results, network, runtime, kind))
