"""Claim: generated weights rank widths as training from scratch does, at Spearman 0.8 or more.

Measured: the rank correlation between a PruningNet's accuracy on held-out training images and the
accuracy of the same widths trained from scratch, on the 10,000 test images of Fashion-MNIST, over
twelve width vectors of a small residual network. The vectors were laid down before anything was
trained: four shares of the MACs in equal ratios, and at each one three shapes, the same share in every
group, more in the early groups, or more in the late ones. Every PruningNet (one per seed) is compared
with the mean accuracy of all seeds from scratch. Rivals: ranking by MACs or by parameters, which need
no training at all. The record also says how far two seeds from scratch agree with each other, which
bounds what any predictor can reach, and how often shapes of equal MACs are put in the right order,
where MACs know nothing. It can be stopped at any moment and goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import nn

from benchmarks.tools.records import parser, write_record
from wgates_plugin import trace
from wgates_plugin.catalogue.base import Data
from wgates_plugin.catalogue.data import load_data
from wgates_plugin.catalogue.networks import ResNetSmall
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget, Limit
from wgates_plugin.efficiency.counts import MacsModel, ParametersModel
from wgates_plugin.files import read_json, write_json
from wgates_plugin.strategies.base import Task
from wgates_plugin.strategies.metapruning import MetaPruningStrategy
from wgates_plugin.strategies.metapruning.fitness import Fitness
from wgates_plugin.strategies.metapruning.genes import Genes, Widths
from wgates_plugin.strategies.metapruning.held_out import gathered, split
from wgates_plugin.strategies.metapruning.pruning_net import PruningNet
from wgates_plugin.strategies.metapruning.training import train
from wgates_plugin.strategies.metapruning.winner import from_scratch
from wgates_plugin.surgery import resize
from wgates_plugin.training import Trainer, TrainingSettings, evaluate

CLAIM = "generated weights rank widths as training from scratch does: Spearman 0.8 or more"
MACS_SHARES = (0.05, 0.12, 0.29, 0.70)
SHAPES: dict[str, Callable[[float], float]] = {
    "uniform": lambda depth: 1.0,
    "early": lambda depth: 1.6 - 1.2 * depth,
    "late": lambda depth: 0.4 + 1.2 * depth,
}
"""Shape -> share of a group, up to a factor, by its depth from 0 (first) to 1 (last)."""
WIDTHS = (16, 32, 64)
"""Channels per stage of the network."""
SCRATCH = Path("runs") / "metapruning_promise"


def layouts(space: ChannelSpace, genes: Genes) -> dict[str, Widths]:
    """Name -> widths: each shape as wide as its share of the MACs allows."""
    macs = MacsModel(space)
    full = float(macs(torch.tensor(space.full_widths)))
    last = max(len(space.groups) - 1, 1)

    def at(shape: Callable[[float], float], factor: float) -> Widths:
        return tuple(
            min(mine, key=lambda w: (abs(w - factor * shape(g / last) * group.channels), w))
            for g, (group, mine) in enumerate(zip(space.groups, genes.alleles, strict=True))
        )

    found = {}
    for share in MACS_SHARES:
        for name, shape in SHAPES.items():
            low, high = 0.0, 4.0
            for _ in range(30):
                middle = (low + high) / 2
                fits = float(macs(torch.tensor(at(shape, middle)))) <= share * full
                low, high = (middle, high) if fits else (low, middle)
            found[f"{name}-{share}"] = at(shape, low)
    return found


class Subject:
    """The network, its space and data; the same for every seed."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.data: Data = load_data(
            "fashion-mnist", batch_size=arguments.batch, limit=arguments.limit, seed=0
        )
        # `limit` would cut the test images too.
        self.tests = load_data("fashion-mnist", batch_size=512, seed=0).val_loader
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.network: nn.Module = ResNetSmall(10, in_channels=1, widths=WIDTHS)
        self.space = trace(self.network, self.data.example_input)
        self.genes = Genes.of(self.space)
        self.layouts = layouts(self.space, self.genes)

    def training(self, epochs: int) -> TrainingSettings:
        rate = self.arguments.learning_rate
        return TrainingSettings(
            epochs=epochs, learning_rate=rate, warmup_epochs=1.0, accelerator="cpu"
        )

    def accuracy_from_scratch(self, widths: Widths, seed: int) -> float:
        fresh = from_scratch(self.network, self.space, widths, seed)
        smaller = resize(fresh, self.space, widths)
        settings = self.training(self.arguments.epochs)
        Trainer(smaller, self.data.train_loader, settings, seed=seed, label="scratch").run(
            progress=False
        )
        return evaluate(smaller, self.tests).accuracy

    def fitness(self, seed: int) -> dict[str, float]:
        """Held-out accuracy of every layout, by a PruningNet of this seed."""
        parts = split(self.data.train_loader, self.arguments.held_out, seed)
        pruning_net = PruningNet(self.network, self.space, seed=seed)
        epochs = self.arguments.pruning_net_epochs
        macs = MacsModel(self.space)
        full = float(macs(torch.tensor(self.space.full_widths)))
        task = Task(
            self.network,
            self.space,
            Budget.of(Limit(macs, full)),
            self.data.example_input,
            parts.train,
            epochs=epochs,
            total_epochs=epochs,
            training=self.training(epochs),
            seed=seed,
            progress=False,
        )
        train(MetaPruningStrategy(), task, pruning_net, self.genes)
        judge = Fitness(pruning_net, gathered(parts.train, seed, 1024), parts.held_out, seed)
        return {name: 1.0 - judge(widths) for name, widths in self.layouts.items()}


def measure(subject: Subject, progress: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """All accuracies, taken from the progress file as far as they are there."""
    done: dict[str, Any] = {"settings": settings, "fitness": {}, "scratch": {}}
    if progress.exists():
        found = read_json(progress, kind="progress")
        if found.get("settings") != settings:
            raise SystemExit(
                f"progress `{progress}`: of a run with other settings ({found.get('settings')}); "
                "delete it, or choose another --scratch folder"
            )
        done = found
    for seed in map(str, subject.arguments.seeds):
        if seed not in done["fitness"]:
            done["fitness"][seed] = subject.fitness(int(seed))
            write_json(progress, done)
            print(f"seed {seed}: PruningNet judged {len(subject.layouts)} widths", flush=True)
        mine = done["scratch"].setdefault(seed, {})
        for name, widths in subject.layouts.items():
            if name not in mine:
                mine[name] = subject.accuracy_from_scratch(widths, int(seed))
                write_json(progress, done)
                print(
                    f"seed {seed}: {name} {widths}: {done['fitness'][seed][name]:.2%} generated, "
                    f"{mine[name]:.2%} from scratch",
                    flush=True,
                )
    return done


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    value = float(spearmanr(first, second).statistic)
    if not math.isfinite(value):
        raise SystemExit("metapruning_promise: all accuracies are equal; nothing to rank")
    return value


def right_order(found: dict[str, float], wanted: dict[str, float]) -> float:
    """Share of pairs of equal MACs that `found` puts in the order of `wanted`."""
    pairs = [
        (f"{first}-{share}", f"{second}-{share}")
        for share in MACS_SHARES
        for first, second in itertools.combinations(SHAPES, 2)
    ]
    right = [(found[a] - found[b]) * (wanted[a] - wanted[b]) > 0 for a, b in pairs]
    return sum(right) / len(right)


def numbers_of(subject: Subject, done: dict[str, Any]) -> dict[str, Any]:
    names = list(subject.layouts)
    seeds = [str(seed) for seed in subject.arguments.seeds]
    mean = {name: statistics.fmean(done["scratch"][seed][name] for seed in seeds) for name in names}

    def against_mean(values: dict[str, float]) -> float:
        return rank_correlation([values[n] for n in names], [mean[n] for n in names])

    rows = {name: torch.tensor(subject.layouts[name]) for name in names}
    costs = {
        "macs": {n: float(MacsModel(subject.space)(row)) for n, row in rows.items()},
        "parameters": {n: float(ParametersModel(subject.space)(row)) for n, row in rows.items()},
    }
    by_seed = {seed: against_mean(done["fitness"][seed]) for seed in seeds}
    pairs = [
        rank_correlation(
            [done["scratch"][a][n] for n in names], [done["scratch"][b][n] for n in names]
        )
        for a, b in itertools.combinations(seeds, 2)
    ]
    return {
        "fitness_spearman": statistics.fmean(by_seed.values()),
        "fitness_spearman_by_seed": by_seed,
        "macs_spearman": against_mean(costs["macs"]),
        "parameters_spearman": against_mean(costs["parameters"]),
        "scratch_spearman_between_seeds": statistics.fmean(pairs) if pairs else None,
        "right_order_at_equal_macs": statistics.fmean(
            right_order(done["fitness"][seed], mean) for seed in seeds
        ),
        "accuracy_from_scratch": mean,
        "widths": {name: list(widths) for name, widths in subject.layouts.items()},
        "macs": costs["macs"],
    }


def main(argv: Sequence[str] = ()) -> None:
    options = parser("metapruning_promise", __doc__)
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    options.add_argument("--limit", type=int, default=6_000, help="training images")
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--epochs", type=int, default=6, help="from scratch")
    options.add_argument("--pruning-net-epochs", type=int, default=30)
    options.add_argument("--held-out", type=float, default=0.2)
    options.add_argument("--learning-rate", type=float, default=0.05)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--scratch", type=Path, default=SCRATCH, help="where progress is kept")
    arguments = options.parse_args(list(argv))
    torch.set_num_threads(arguments.threads)
    chosen = ("limit", "batch", "epochs", "pruning_net_epochs", "held_out", "learning_rate")
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in chosen}
    subject = Subject(arguments)
    done = measure(subject, arguments.scratch / "progress.json", settings)
    numbers = numbers_of(subject, done)
    print(
        f"rank correlation with training from scratch: generated weights "
        f"{numbers['fitness_spearman']:.3f}, MACs {numbers['macs_spearman']:.3f}, parameters "
        f"{numbers['parameters_spearman']:.3f}; shapes of equal MACs in the right order: "
        f"{numbers['right_order_at_equal_macs']:.0%}"
    )
    write_record(
        arguments.results,
        "metapruning_promise",
        claim=CLAIM,
        settings={**settings, "seeds": arguments.seeds, "widths": list(WIDTHS)},
        seed=arguments.seed,
        numbers=numbers,
        samples={"fitness": done["fitness"], "scratch": done["scratch"]},
    )
