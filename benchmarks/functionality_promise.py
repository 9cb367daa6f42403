"""Claim: of filters that do the same, functionality-oriented pruning keeps exactly one.

Measured: a small residual and a small inverted-residual network, trained on Fashion-MNIST, in which a
quarter as many channels again are planted in every channel group as copies of others: one triple, the
rest pairs. A copy's filters carry noise of 1 % of their size, the kernels that read it share the
original's between the copies at random, and the function stays what it was, which is checked. Twice:
"scaled", every filter of a copied set times its own factor of 1/2 to 2, taken back by its BatchNorm, so
that sizes say nothing, and "same-size". Then each method chooses as many channels as there were before.
Counted: the share of copied sets of which exactly one channel stays, over seeds 0 to 2. Rivals at the
same widths: L1 norm, FPGM, and chance. Both ways to order repeats are measured, ours and the paper's,
on the same patterns.

Seed 0 is no fair judge: size, number and noise of the ascent's steps and the order of repeats were
chosen on its scaled networks, among some twenty settings; the first kept exactly one of 27 of 30 and of
38 of 57 sets. The sharpness of the order was then compared by accuracy after the cut, on the residual
network's seeds 1 and 2 too. So the figure over the other seeds stands beside the one over all.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.tools.records import parser, write_record
from wgates_plugin.calling import ExampleInputs
from wgates_plugin.catalogue.base import Data
from wgates_plugin.catalogue.data import load_data
from wgates_plugin.catalogue.networks import MobileNetSmall, ResNetSmall
from wgates_plugin.channels import ChannelSpace, Slot
from wgates_plugin.efficiency.base import Budget, Limit
from wgates_plugin.efficiency.counts import MacsModel
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies.base import Task
from wgates_plugin.strategies.criteria import criterion_scores
from wgates_plugin.strategies.functionality import FunctionalitySettings, FunctionalityStrategy
from wgates_plugin.tracing import trace
from wgates_plugin.training import Trainer, TrainingSettings, evaluate

TUNED_ON = 0
CLAIM = "of at least 90 % of planted sets of duplicate filters exactly one is kept"
SEEDS = (0, 1, 2)
PLANTED = 0.25
NOISE = 0.01
KINDS = ("scaled", "same-size")
RIVALS = ("l1", "fpgm", "random")
OURS = {"functionality": "coverage", "functionality, paper's order": "contribution"}


def resnet(share: float) -> nn.Module:
    """The small residual network, each width times 1 + share."""
    return ResNetSmall(10, 1, widths=[_wider(width, share) for width in (16, 24, 32)])


def mobilenet(share: float) -> nn.Module:
    """The small inverted-residual network, each width times 1 + share."""
    stages = ((1, 12, 1, 1), (3, 16, 1, 1), (3, 24, 2, 2))
    wider = [(expand, _wider(w, share), n, stride) for expand, w, n, stride in stages]
    return MobileNetSmall(
        10, 1, stages=wider, stem_width=_wider(12, share), head_width=_wider(48, share)
    )


NETWORKS: dict[str, Callable[[float], nn.Module]] = {"resnet": resnet, "mobilenet": mobilenet}


def _wider(width: int, share: float) -> int:
    return width + int(width * share)


@dataclass(frozen=True)
class Planted:
    """A network with duplicates. sources[g] (units,): the original of each unit of group g."""

    network: nn.Module
    space: ChannelSpace
    sources: list[np.ndarray]
    widths: tuple[int, ...]

    def kept_once(self, scores: Tensor) -> tuple[int, int, list[int]]:
        """(sets of which one channel stays at the original widths, sets, how many stay of each)."""
        plan = PruningPlan.top(self.space, scores, self.widths)
        left = []
        for kept, source in zip(plan.kept, self.sources, strict=True):
            copies = np.bincount(source)
            remaining = np.bincount(source[list(kept)], minlength=len(copies))
            left += remaining[copies > 1].tolist()
        return sum(count == 1 for count in left), len(left), left


def plant(
    dense: nn.Module, wide: nn.Module, example: ExampleInputs, *, scaled: bool, seed: int
) -> Planted:
    """Fill `wide`, of the same class as `dense`, with its channels and copies of some of them."""
    draws = np.random.default_rng(seed)
    before, after = trace(dense, example), trace(wide, example)
    sources = []
    for old, new in zip(before.groups, after.groups, strict=True):
        assert old.name == new.name
        extra = new.units - old.units
        copied = draws.choice(old.units, max(1, extra - 1), replace=False)
        # The first copied channel twice: a triple among pairs.
        repeats = np.concatenate([copied, copied[:1]])[:extra]
        sources.append(draws.permutation(np.concatenate([np.arange(old.units), repeats])))
    shares = [_reading_shares(source, draws) for source in sources]
    found = dict(dense.named_modules())
    for name, module in wide.named_modules():
        out = after.slots_of.get((name, "out"), [])
        into = after.slots_of.get((name, "in"), [])
        if not isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            continue
        state = {key: value.clone() for key, value in found[name].state_dict().items()}
        for key, value in state.items():
            if out and value.ndim:
                group, slot = out[0]
                value = value[_channels(before, name, "out", group, slot, sources[group])]
            if into and key == "weight":
                group, slot = into[0]
                value = value[:, _channels(before, name, "in", group, slot, sources[group])]
                share = torch.from_numpy(shares[group][slot.units]).to(value)
                value = value * share.view(1, -1, *[1] * (value.ndim - 2))
            state[key] = value
        module.load_state_dict(state)
    _disguise(wide, after, sources, draws, scaled=scaled)
    return Planted(wide, after, sources, before.full_widths)


def _reading_shares(source: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """What part of the original's reading kernel each copy gets; the parts of a set sum to 1."""
    weight = draws.uniform(0.5, 1.0, len(source))
    return weight / np.bincount(source, weight)[source]


def _channels(
    before: ChannelSpace, name: str, side: Any, group: int, slot: Slot, source: np.ndarray
) -> Tensor:
    """Channels of the dense module that the wide module's channels are copies of."""
    (own,) = [old for index, old in before.slots_of[(name, side)] if index == group]
    place = np.argsort(own.units)  # one channel per unit in these networks
    return torch.from_numpy(place[source[slot.units]])


@torch.no_grad()
def _disguise(
    wide: nn.Module,
    space: ChannelSpace,
    sources: Sequence[np.ndarray],
    draws: np.random.Generator,
    *,
    scaled: bool,
) -> None:
    """Noise on the filters of copied sets, and factors that the BatchNorm behind takes back."""
    found = dict(wide.named_modules())
    layers = [name for name, module in found.items() if isinstance(module, nn.Conv2d)]
    norms = [name for name, module in found.items() if isinstance(module, nn.BatchNorm2d)]
    assert len(layers) == len(norms)  # every convolution has its BatchNorm next in line
    for layer, norm_name in zip(layers, norms, strict=True):
        ((group, slot),) = space.slots_of[(layer, "out")]
        source = sources[group][slot.units]
        copied = torch.from_numpy(np.bincount(source)[source] > 1)
        convolution, norm = found[layer], found[norm_name]
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight = convolution.weight
        size = weight.flatten(1).std(1, unbiased=False).view(-1, 1, 1, 1)
        noise = torch.from_numpy(draws.standard_normal(weight.shape)).to(weight) * size * NOISE
        weight.add_(noise * copied.view(-1, 1, 1, 1))
        if not scaled:
            continue
        factor = torch.from_numpy(2 ** draws.uniform(-1, 1, len(source))).to(weight)
        factor = torch.where(copied, factor, torch.ones_like(factor))
        weight.mul_(factor.view(-1, 1, 1, 1))
        norm.running_mean.mul_(factor)
        variance = (norm.running_var + norm.eps) * factor.square() - norm.eps
        norm.running_var.copy_(variance.clamp_min(0))


@torch.no_grad()
def change(dense: nn.Module, wide: nn.Module, data: Data) -> float:
    """How far planting moved the logits, relative to their size."""
    images = next(iter(data.val_loader))[0]
    first, second = dense.eval()(images), wide.eval()(images)
    return float((first - second).norm() / first.norm())


def scores_of(method: str, planted: Planted, data: Data, seed: int) -> Tensor:
    if method in RIVALS:
        return criterion_scores(planted.network, planted.space, method, seed=seed)
    macs = MacsModel(planted.space)
    # No cut is asked of the strategy: only its scores are looked at.
    limit = Limit(macs, float(macs(torch.tensor(planted.space.full_widths))))
    task = Task(
        copy.deepcopy(planted.network),
        planted.space,
        Budget.of(limit),
        data.example_input,
        data.train_loader,
        seed=seed,
    )
    settings = FunctionalitySettings(repeats=OURS[method], pictured=0)
    return FunctionalityStrategy(settings).decide(task).scores


def measure(name: str, seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One trained network, planted in both ways, judged by every method."""
    torch.manual_seed(seed)
    data = load_data("fashion-mnist", limit=arguments.limit, seed=seed)
    dense, wide = NETWORKS[name](0.0), NETWORKS[name](PLANTED)
    training = TrainingSettings(epochs=arguments.epochs, learning_rate=0.1, warmup_epochs=0.5)
    Trainer(dense, data.train_loader, training, seed=seed, label="dense").run(progress=False)
    accuracy = evaluate(dense, data.val_loader).accuracy
    rows = []
    for kind in KINDS:
        planted = plant(
            dense.eval(), wide.eval(), data.example_input, scaled=kind == "scaled", seed=seed
        )
        moved = change(dense, wide, data)
        assert moved < 0.1, moved
        for method in (*OURS, *RIVALS):
            once, sets, left = planted.kept_once(scores_of(method, planted, data, seed))
            rows.append(
                {
                    "network": name,
                    "seed": seed,
                    "kind": kind,
                    "method": method,
                    "share": once / sets,
                    "sets": sets,
                    "none_kept": left.count(0),
                    "several_kept": sum(count > 1 for count in left),
                    "accuracy": accuracy,
                    "change_of_logits": moved,
                }
            )
            print(f"{name}, seed {seed}, {kind}: {method} {once} of {sets}", flush=True)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and spreads over seeds; the figure claimed is the mean in our worst case."""
    every = _cases(rows)
    others = _cases([row for row in rows if row["seed"] != TUNED_ON])
    return {
        "planted_duplicates_kept_once": _worst(every),
        "planted_duplicates_kept_once_on_seeds_not_tuned_on": _worst(others),
        "cases": every,
    }


def _cases(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares per network and kind, and of these per method."""
    shares: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        case = shares.setdefault(f"{row['network']}/{row['kind']}", {})
        case.setdefault(row["method"], []).append(row["share"])
    return {
        name: {method: _spread(found) for method, found in case.items()}
        for name, case in shares.items()
    }


def _worst(cases: dict[str, Any]) -> float | None:
    return min((case["functionality"]["mean"] for case in cases.values()), default=None)


def _spread(shares: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(shares), "least": min(shares), "most": max(shares)}


def main(argv: Sequence[str] = ()) -> None:
    options = parser("functionality_promise", __doc__)
    options.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    options.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options.add_argument("--limit", type=int, default=8000, help="training images")
    options.add_argument("--epochs", type=int, default=4)
    arguments = options.parse_args(list(argv))
    rows = [
        row
        for name in arguments.networks
        for seed in arguments.seeds
        for row in measure(name, seed, arguments)
    ]
    write_record(
        arguments.results,
        "functionality_promise",
        claim=CLAIM,
        settings={
            "seeds": arguments.seeds,
            "training_images": arguments.limit,
            "epochs": arguments.epochs,
            "planted_share": PLANTED,
            "noise": NOISE,
            "strategy": vars(FunctionalitySettings()),
        },
        seed=arguments.seeds[0],
        numbers=summary(rows),
        samples=rows,
    )


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
