"""Claim: GDP's smaller network computes what its gated one did, and owes no fine-tuning.

Measured: (a) gates with random values, zeros among them, on the tests' tiny networks, ResNet-34,
ResNet-50 and MobileNetV2 (64x64 images, warm BatchNorm statistics): largest output difference between
the network whose feature maps are multiplied by the gates, and the one that absorbed the values and
lost the closed channels, over the largest output. (b) Fashion-MNIST, a small ResNet, half of its
MACs, seeds 0 to 2: test accuracy with gates at the end of the phase, and after the cut without any
fine-tuning, and on the test images the largest difference between the outputs of these two networks,
as in (a). Rivals: W-Gates after as many epochs, cut without fine-tuning, and the largest filters by
L1 norm at uniform widths, cut from the network trained on for as many epochs, statistics renewed.
A seed that is done is not run again.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tools.activation_masking import ActivationMasking
from benchmarks.tools.records import parser, write_record
from benchmarks.tools.subjects import settle_batchnorm
from tests import networks
from wgates_plugin.calling import device_of, left_as_found
from wgates_plugin.catalogue.base import Data
from wgates_plugin.catalogue.data import load_data
from wgates_plugin.catalogue.models import load_model
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget, Limit
from wgates_plugin.efficiency.counts import MacsModel
from wgates_plugin.files import read_json, write_json
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies.base import Decision, InMemory, Strategy, Task
from wgates_plugin.strategies.budgeting import plan_for_budget
from wgates_plugin.strategies.gdp import GDPStrategy
from wgates_plugin.strategies.gdp.absorption import absorb
from wgates_plugin.strategies.gdp.gates import PolarisedGates
from wgates_plugin.strategies.gdp.settings import GDPSettings
from wgates_plugin.strategies.phase import PHASE_STATE
from wgates_plugin.strategies.table import STRATEGIES
from wgates_plugin.strategies.wgates.strategy import WGatesStrategy
from wgates_plugin.surgery import remove
from wgates_plugin.tracing import trace
from wgates_plugin.training import (
    Trainer,
    TrainingSettings,
    evaluate,
    recalibrate_batchnorm,
)
from wgates_plugin.training.evaluation import to_device
from wgates_plugin.transforms import apply_steps
from wgates_plugin.verification import relative_error

CLAIM = "GDP's smaller network computes what its gated one did (1e-5), and owes no fine-tuning"
LARGE = ("resnet34", "resnet50", "mobilenet_v2")
SCRATCH = Path("runs") / "gdp_promise"
SIDE = 64
BAR = 1e-5


def random_gates(space: ChannelSpace, generator: torch.Generator) -> Tensor:
    """Gates (total_units,): about half of each group closed, the others anywhere up to 1."""
    gates = torch.rand(space.total_units, generator=generator)
    closed = torch.rand(space.total_units, generator=generator) < 0.5
    gates[closed] = 0.0
    for index in range(len(space.groups)):
        mine = gates[space.unit_slice(index)]
        if not bool(mine.any()):
            mine[0] = 1.0
    return gates


@torch.no_grad()
def absorption_error(network: nn.Module, example: Tensor, seed: int) -> float:
    """Feature maps times gates against the network that absorbed them and lost the closed ones."""
    network = network.eval()
    space = trace(network, example)
    gates = random_gates(space, torch.Generator().manual_seed(seed))
    masking = ActivationMasking(network, space, lambda: gates).attach()
    expected = network(example)
    masking.detach()
    plan = PruningPlan.from_masks(space, gates > 0)
    smaller = remove(absorb(copy.deepcopy(network), space, gates), plan, example)
    return relative_error(smaller.eval()(example), expected)


def absorption(arguments: Namespace) -> dict[str, list[float]]:
    """Errors per network, `arguments.draws` of random gates each."""
    found: dict[str, list[float]] = {}
    for name in (*networks.TINY, *LARGE):
        tiny = name in networks.TINY
        example = networks.example(size=8 if tiny else SIDE)
        if tiny:
            network = networks.tiny(name)
        else:
            network = networks.torchvision_network(name)
            settle_batchnorm(network, networks.example(8, SIDE, seed=1))
        draws = arguments.draws if tiny else max(1, arguments.draws // 3)
        seeds = range(arguments.seed, arguments.seed + draws)
        found[name] = [absorption_error(network, example, seed) for seed in seeds]
        print(f"{name}: worst of {draws} {max(found[name]):.1e}", flush=True)
    return found


class Kept(InMemory):
    """Checkpoints that later steps cannot write into."""

    def save_state(self, name: str, state: dict[str, Any]) -> None:
        super().save_state(name, copy.deepcopy(state))


def one_seed(seed: int, arguments: Namespace) -> dict[str, Any]:
    """Accuracies of one seed, as shares of the 10,000 test images."""
    data = load_data("fashion-mnist", limit=arguments.limit, seed=seed)
    val_loader = load_data("fashion-mnist").val_loader
    torch.manual_seed(seed)
    dense = load_model("resnet_small", classes=10, in_channels=1)
    training = TrainingSettings(epochs=arguments.dense_epochs, learning_rate=arguments.rate)
    Trainer(dense, data.train_loader, training, seed=seed, label="dense").run()
    found: dict[str, Any] = {"dense": evaluate(dense, val_loader).accuracy}
    space = trace(dense, data.example_input, min_fraction=0.05)
    model = MacsModel(space)
    full = float(model(torch.tensor(space.full_widths, dtype=torch.float64)))
    budget = Budget.of(Limit(model, arguments.share * full))

    def task() -> Task:
        return Task(
            copy.deepcopy(dense),
            space,
            budget,
            data.example_input,
            data.train_loader,
            epochs=arguments.epochs,
            total_epochs=arguments.epochs,
            training=dataclasses.replace(training, epochs=arguments.epochs),
            seed=seed,
            checkpoints=Kept(),
            progress=False,
        )

    strategies: tuple[tuple[str, Strategy], ...] = (
        ("gdp", GDPStrategy(GDPSettings(travel=arguments.travel))),
        ("wgates", WGatesStrategy()),
    )
    for name, strategy in strategies:
        mine = task()
        decision = strategy.decide(mine)
        gated = _gated(task(), mine) if name == "gdp" else None
        found[name] = _after_the_cut(strategy, decision, mine, val_loader, gated)
        if gated is not None:
            found[name]["gated"] = evaluate(gated, val_loader).accuracy
            found[name]["facts"] = decision.facts
        print(f"seed {seed}: {name} {found[name]}", flush=True)
    found["uniform_l1"] = _uniform(task(), data, val_loader, seed)
    print(f"seed {seed}: dense {found['dense']:.4f}, L1 {found['uniform_l1']}", flush=True)
    return found


def _gated(task: Task, learned: Task) -> nn.Module:
    """The network as the phase left it, its gates attached and not absorbed."""
    state = learned.checkpoints.load_state(PHASE_STATE)
    assert state is not None
    task.network.load_state_dict(state["network"])
    gates = PolarisedGates(task.network, task.space, task.budget, steps=task.steps)
    gates.load_state_dict(state["gates"])
    return gates.attach().network.eval()


@torch.no_grad()
def output_error(network: nn.Module, expected: nn.Module, loader: Any) -> float:
    """Largest difference of two networks' outputs over all images, over the largest output."""
    outputs: list[list[Tensor]] = [[], []]
    for images, _ in loader:
        for each, found in zip((network, expected), outputs, strict=True):
            with left_as_found(each):
                found.append(each.eval()(to_device(images, device_of(each))).cpu())
    return relative_error(torch.cat(outputs[0]), torch.cat(outputs[1]))


def _after_the_cut(
    strategy: Strategy,
    decision: Decision,
    task: Task,
    val_loader: Any,
    gated: nn.Module | None = None,
) -> dict[str, Any]:
    plan = plan_for_budget(task.space, decision.scores, decision.widths, task.budget)
    inputs = task.example_inputs
    smaller = remove(copy.deepcopy(decision.network), plan, inputs)
    smaller = apply_steps(smaller, strategy.finish(smaller, plan, inputs))
    cut = evaluate(smaller, val_loader).accuracy
    error = {} if gated is None else {"output_error": output_error(smaller, gated, val_loader)}
    recalibrate_batchnorm(smaller, task.train_loader)
    return {
        "cut": cut,
        "recalibrated": evaluate(smaller, val_loader).accuracy,
        "macs_share": 1.0 + float(task.budget.excess(torch.tensor(plan.widths).double())),
        "widths": list(plan.widths),
        **error,
    }


def _uniform(task: Task, data: Data, val_loader: Any, seed: int) -> dict[str, Any]:
    """Cut by filter norms from the network trained on for as many epochs."""
    Trainer(task.network, data.train_loader, task.training, seed=seed, label="trained on").run()
    trained_on = evaluate(task.network, val_loader).accuracy
    kind = STRATEGIES["l1"]
    strategy = kind(kind.settings_type(scope="local"))
    after = _after_the_cut(strategy, strategy.decide(task), task, val_loader)
    return {"trained_on": trained_on, **after}


def accuracy(arguments: Namespace) -> dict[str, Any]:
    """Results by seed; those on disk with these settings are taken from there."""
    found = {}
    for seed in arguments.seeds:
        settings = _settings(arguments)
        path = arguments.scratch / f"seed-{seed}.json"
        stored = read_json(path, kind="seed") if path.exists() else {}
        if stored.get("settings") != settings:
            stored = {"settings": settings, "result": one_seed(seed, arguments)}
            write_json(path, stored)
        found[str(seed)] = stored["result"]
    return found


def _settings(arguments: Namespace) -> dict[str, Any]:
    names = ("limit", "dense_epochs", "epochs", "rate", "share", "travel")
    return {name: getattr(arguments, name) for name in names}


def main(argv: Sequence[str] = ()) -> None:
    options = parser("gdp_promise", __doc__)
    options.add_argument("--draws", type=int, default=6, help="random gates per tiny network")
    options.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    options.add_argument("--limit", type=int, default=15_000, help="training images")
    options.add_argument("--dense-epochs", type=int, default=5)
    options.add_argument("--epochs", type=int, default=8, help="of the gates' phase")
    options.add_argument("--rate", type=float, default=0.05, help="peak learning rate")
    options.add_argument("--share", type=float, default=0.5, help="of the MACs to keep")
    options.add_argument("--travel", type=float, default=GDPSettings().travel)
    options.add_argument("--scratch", type=Path, default=SCRATCH, help="where seeds are kept")
    arguments = options.parse_args(list(argv))
    torch.set_num_threads(1)
    errors = absorption(arguments)
    seeds = accuracy(arguments)
    worst = {name: max(values) for name, values in errors.items()}
    numbers: dict[str, Any] = {"absorption_error": max(worst.values()), "bar": BAR, "worst": worst}
    if seeds:
        runs = list(seeds.values())
        numbers |= {
            "phase_error": max(
                max(run["gdp"]["facts"]["absorption_error"], run["gdp"].get("output_error", 0.0))
                for run in runs
            ),
            "gated_minus_cut": max(abs(run["gdp"]["gated"] - run["gdp"]["cut"]) for run in runs),
            "dense": statistics.mean(run["dense"] for run in runs),
            "dense_trained_on": statistics.mean(run["uniform_l1"]["trained_on"] for run in runs),
            "gated": statistics.mean(run["gdp"]["gated"] for run in runs),
            **{
                f"{name}_{what}": statistics.mean(run[name][what] for run in runs)
                for name in ("gdp", "wgates", "uniform_l1")
                for what in ("cut", "recalibrated", "macs_share")
            },
        }
    write_record(
        arguments.results,
        "gdp_promise",
        claim=CLAIM,
        settings={**_settings(arguments), "draws": arguments.draws, "side": SIDE},
        seed=arguments.seed,
        numbers=numbers,
        samples={"absorption": errors, "accuracy": seeds},
    )


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
