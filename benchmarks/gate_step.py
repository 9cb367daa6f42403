"""Claim: gates cost a training step less than 5 %.

Measured: one training step (forward, cross-entropy, backward, gate step, SGD step) of ResNet-50 and
MobileNetV2, 32 images of 224x224, two threads, with W-Gates attached, over the same step of the plain
network. The gates limit a predicted latency, as in a real run. Rival in the same rounds: the same
gates multiplying feature maps instead of weights. Before anything is timed, both ways are checked to
give the same loss and the same gate gradient.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.tools.activation_masking import ActivationMasking
from benchmarks.tools.interleave import at_once, compare, interleave
from benchmarks.tools.records import parser, write_record
from benchmarks.tools.subjects import SIDE, images, torchvision_network
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget, Limit
from wgates_plugin.efficiency.counts import MacsModel
from wgates_plugin.efficiency.lpnet import LPNet
from wgates_plugin.strategies.wgates import WGates, WGatesSettings
from wgates_plugin.tracing import trace

CLAIM = "gates add less than 5 % to a training step"
NETWORKS = ("resnet50", "mobilenet_v2")
LEARNING_RATE = 1e-3


class Step:
    """One network with its optimizer, and gates or none."""

    def __init__(self, network: nn.Module, gates: WGates | None, batch: Tensor, labels: Tensor):
        self.network, self.gates, self.batch, self.labels = network.train(), gates, batch, labels
        parameters = network.parameters()
        self.optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=0.9)

    def loss(self) -> Tensor:
        return functional.cross_entropy(self.network(self.batch), self.labels)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        if self.gates is not None:
            self.gates.regularize()
        self.optimizer.step()


def latency_budget(space: ChannelSpace, seed: int) -> Budget:
    """Half of an LPNet's latency. The LPNet is fitted to MACs: here only its cost per step counts."""
    macs = MacsModel(space)
    generator = torch.Generator().manual_seed(seed)
    full = torch.tensor(space.full_widths, dtype=torch.float64)
    shares = torch.rand(64, len(space.groups), generator=generator, dtype=torch.float64)
    widths = (full * shares).ceil().clamp_min(1.0)
    lpnet = LPNet.fit(
        space, [[int(w) for w in row] for row in widths], (macs(widths) / 1e9).tolist()
    )
    return Budget.of(Limit(lpnet, 0.5 * float(lpnet(full))))


def steps(network: nn.Module, batch: Tensor, labels: Tensor, seed: int) -> dict[str, Step]:
    """The three contenders, each on its own copy of the network."""
    space = trace(network, batch[:1], min_fraction=0.05)
    budget = latency_budget(space, seed)
    made = {"plain": Step(copy.deepcopy(network), None, batch, labels)}
    for name in ("wgates", "activation_masking"):
        own = copy.deepcopy(network)
        gates = WGates(own, space, budget, WGatesSettings(measuring=0))  # that act at once
        if name == "activation_masking":
            ActivationMasking(own, space, gates.gating.source).attach()
        else:
            gates.attach()
        made[name] = Step(own, gates, batch, labels)
    return made


def check_alike(made: dict[str, Step]) -> dict[str, float]:
    """Relative differences of loss and gate gradient between the two ways of gating.

    Raises:
        AssertionError: they are not the same computation.
    """
    values = []
    for name in ("wgates", "activation_masking"):
        step = made[name]
        assert step.gates is not None
        with torch.random.fork_rng(devices=[]):  # the same dropout for both
            torch.manual_seed(0)
            loss = step.loss()
        gates = step.gates.gating.source()
        (gradient,) = torch.autograd.grad(loss, gates)
        values.append((float(loss.detach()), gradient))
    (first, mine), (second, theirs) = values
    found = {
        "loss": abs(first - second) / abs(second),
        "gate_gradient": float((mine - theirs).norm() / theirs.norm()),
    }
    assert found["loss"] < 1e-4, found
    assert found["gate_gradient"] < 1e-2, found
    return found


def measure_network(name: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    network = torchvision_network(name, seed=arguments.seed)
    batch = images(arguments.batch, side=arguments.side, seed=arguments.seed)
    labels = torch.arange(arguments.batch) % 1000
    made = steps(network, batch, labels, arguments.seed)
    alike = check_alike(made)
    contenders = {key: at_once(step) for key, step in made.items()}
    seconds = interleave(contenders, rounds=arguments.rounds, warmup=2)
    numbers: dict[str, Any] = {
        key: compare(seconds[key], seconds["plain"]) for key in seconds if key != "plain"
    }
    numbers["plain_median_seconds"] = sorted(seconds["plain"])[len(seconds["plain"]) // 2]
    numbers["relative_difference_of_the_two_ways"] = alike
    for key in ("wgates", "activation_masking"):
        print(f"{name}: {key} {numbers[key]['ratio']:.3f} of a plain step", flush=True)
    return numbers, seconds


def main(argv: Sequence[str] = ()) -> None:
    options = parser("gate_step", __doc__)
    options.add_argument("--networks", nargs="+", default=list(NETWORKS))
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--side", type=int, default=SIDE)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--rounds", type=int, default=7)
    arguments = options.parse_args(list(argv))
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    found = {name: measure_network(name, arguments) for name in arguments.networks}
    write_record(
        arguments.results,
        "gate_step",
        claim=CLAIM,
        settings={
            "batch": arguments.batch,
            "side": arguments.side,
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "optimizer": "SGD with momentum",
        },
        seed=arguments.seed,
        numbers={name: numbers for name, (numbers, _) in found.items()},
        samples={name: seconds for name, (_, seconds) in found.items()},
    )
