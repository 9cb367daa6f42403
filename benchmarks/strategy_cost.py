"""Claim: every strategy decides on ResNet-50 and MobileNetV2 at 224x224; what it costs is shown.

Measured: random weights, batches of random images, one thread. For strategies with a phase, the median
wall time of a step of it over that of a plain training step (forward, backward, SGD) on the same batches
of 16, one-off steps apart, and beside it what the phase takes once, in plain steps; for the others, wall
time of the whole decision in plain training steps on batches of two. Half of the MACs on a grid of 8.
Searches are cut to a few candidates. Each decision is cut, and the cut network compared with the gated
one. Rows that are not asked for stay as they were measured.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tools.records import parser, read_record, write_record
from benchmarks.tools.subjects import torchvision_network
from wgates_plugin.efficiency import Budget, Limit, MacsModel
from wgates_plugin.strategies import STRATEGIES, Decision, Task, make_strategy, plan_for_budget
from wgates_plugin.strategies.base import InMemory
from wgates_plugin.surgery import remove
from wgates_plugin.tracing import trace
from wgates_plugin.training import Trainer, TrainingSettings
from wgates_plugin.verification import removal_error

CLAIM = (
    "every strategy decides on ResNet-50 and MobileNetV2; a GDP step costs at most 1.05 plain ones"
)
NETWORKS = ("resnet50", "mobilenet_v2")
OPTIONS: dict[str, dict[str, Any]] = {
    "metapruning": {
        "population": 4, "parents": 2, "mutations": 1, "crossovers": 1, "generations": 1,
        "recalibration_images": 2,
    },
    "functionality": {"steps": 2, "batches": 1, "tried": 3, "largest_k": 8, "side": 32, "pictured": 1},
    "scop": {"knockoff_images": 4, "knockoff_rank": 2},
}  # fmt: skip
"""What makes an expensive decision small enough here."""

GRID = 8
STEPS = {True: 4, False: 2}
"""Steps of strategies with a phase, and of the others' data."""

ONE_OFF = 1.5
"""A step that takes this many times the median of all is counted with what the phase takes once."""

TRAINING = TrainingSettings(learning_rate=1e-3, accelerator="cpu")


class Watched(list[tuple[Tensor, Tensor]]):
    """Batches that note when they are fetched.

    Attributes:
        seconds: of each step of the last whole pass.
    """

    seconds: list[float]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        stamps = []
        for batch in super().__iter__():
            stamps.append(time.perf_counter())
            yield batch
        stamps.append(time.perf_counter())
        self.seconds = [after - before for before, after in itertools.pairwise(stamps)]


def batches(size: int, images: int, count: int, seed: int) -> Watched:
    generator = torch.Generator().manual_seed(seed)
    return Watched(
        (
            torch.randn(images, 3, size, size, generator=generator),
            torch.randint(1000, (images,), generator=generator),
        )
        for _ in range(count)
    )


def decide(
    strategy: str, network: nn.Module, data: Watched, *, epochs: int
) -> tuple[Decision, dict[str, Any]]:
    """One decision, timed, cut and checked."""
    example = data[0][0][:1]
    space = trace(network, example, min_fraction=0.1)
    macs = MacsModel(space)
    budget = Budget.of(Limit(macs, 0.5 * float(macs(torch.tensor(space.full_widths)))))
    task = Task(
        copy.deepcopy(network),
        space,
        budget,
        example,
        data,
        grid=GRID,
        epochs=epochs,
        total_epochs=max(1, epochs),
        training=TRAINING,
        checkpoints=InMemory(),
        progress=False,
    )
    started = time.perf_counter()
    decision = make_strategy(strategy, OPTIONS.get(strategy)).decide(task)
    seconds = time.perf_counter() - started
    plan = plan_for_budget(space, decision.scores, decision.widths, budget, GRID)
    smaller = remove(copy.deepcopy(decision.network), plan, example)
    error = removal_error(decision.network, smaller, plan, example)
    in_phase = sum(row["seconds"] for row in decision.history)
    return decision, {
        "seconds": seconds,
        "phase_seconds": in_phase or None,
        "masked_equals_removed": error,
        "macs_left": float(macs(torch.tensor(plan.widths)) / macs(torch.tensor(space.full_widths))),
    }


def plain_seconds(network: nn.Module, data: Watched) -> list[float]:
    """Wall time of each step of the same loop without a strategy."""
    Trainer(copy.deepcopy(network), data, TRAINING, total_epochs=1).run(progress=False)
    return data.seconds


def measure_strategy(
    strategy: str, network: nn.Module, data: Watched, rounds: int
) -> dict[str, Any]:
    """Phase and plain epochs in turn; the ratio of the medians of all their steps."""
    has_phase = STRATEGIES[strategy].has_phase
    plain: list[float] = []
    taken: list[float] = []
    phases: list[float] = []
    found: dict[str, Any] = {}
    for _ in range(rounds):
        plain += plain_seconds(network, data)
        _, found = decide(strategy, network, data, epochs=1 if has_phase else 0)
        taken += data.seconds if has_phase else [found["seconds"]]
        phases.append(found["phase_seconds"] or 0.0)
    step = statistics.median(plain)
    # A step in which the phase does something it does once, such as settling, is none to multiply by.
    usual = [seconds for seconds in taken if seconds < ONE_OFF * statistics.median(taken)]
    whole = statistics.median(usual)
    once = statistics.median(phases) - whole * len(data)
    return {
        **found,
        "ratio": whole / step,
        "seconds_each": taken,
        "plain_seconds_each": plain,
        "once_in_plain_steps": max(0.0, once) / step if has_phase else None,
        "of": "phase step over a plain step" if has_phase else "whole decision in plain steps",
    }


def main(argv: Sequence[str] = ()) -> None:
    options = parser("strategy_cost", __doc__)
    options.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    options.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--size", type=int, default=224)
    options.add_argument("--images", type=int, default=2, help="a batch, for whole decisions")
    options.add_argument("--phase-images", type=int, default=16, help="a batch, for phases")
    arguments = options.parse_args(list(argv))
    torch.set_num_threads(1)
    stored = read_record(arguments.results, "strategy_cost")
    numbers: dict[str, Any] = stored["numbers"] if stored else {}
    for name in arguments.networks:
        network = torchvision_network(name, seed=arguments.seed)
        for strategy in arguments.strategies:
            phase = STRATEGIES[strategy].has_phase
            images = arguments.phase_images if phase else arguments.images
            data = batches(arguments.size, images, STEPS[phase], arguments.seed)
            plain_seconds(network, data)  # warm up
            found = measure_strategy(strategy, network, data, arguments.rounds)
            found["images"] = images
            numbers.setdefault(strategy, {})[name] = found
            print(
                f"{name}, {strategy}: {found['ratio']:.2f} ({found['of']}), masked equals removed "
                f"to {found['masked_equals_removed']:.1e}",
                flush=True,
            )
    write_record(
        arguments.results,
        "strategy_cost",
        claim=CLAIM,
        settings={
            "size": arguments.size,
            "images": arguments.images,
            "phase_images": arguments.phase_images,
            "steps": [STEPS[True], STEPS[False]],
            "rounds": arguments.rounds,
            "options": OPTIONS,
        },
        seed=arguments.seed,
        numbers=numbers,
        samples={},
    )
