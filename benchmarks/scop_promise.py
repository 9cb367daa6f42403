"""Claim: SCOP's scheme removes what the paper says, and its scores find useless filters.

Measured (a): the fall of conv and linear MACs and parameters of ResNet-34, ResNet-50 and ResNet-101 at
224x224 with the same share of filters removed from every convolution of every residual block, its last
one scattered into the full stream, against the figures that the paper's scheme gives by arithmetic. As
in its code `int(share * filters)` go from each convolution, while the first convolution, those in the
shortcuts and the classifier stay whole. Nothing is trained.

Measured (b): a small network learns Fashion-MNIST with a third of its filters planted: useless, yet of
the same size and BatchNorm scale as the others (see `planted_noise`). Each ranking is judged by its
AUC, the chance that it places a random other filter of a layer above a random planted one, averaged
over the layers. SCOP learns its betas on the training images; its rivals are the filters' L1 norm,
the BatchNorm scale, and the first-order Taylor criterion, which sees the labels as SCOP does.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from benchmarks.tools.planted_noise import train_planted
from benchmarks.tools.records import parser, write_record
from benchmarks.tools.subjects import images, torchvision_network
from wgates_plugin.catalogue import Data, load_data
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget, Limit
from wgates_plugin.efficiency.counts import LayerShapes, MacsModel
from wgates_plugin.gating import Gating
from wgates_plugin.strategies.base import Task
from wgates_plugin.strategies.criteria import criterion_scores
from wgates_plugin.strategies.scop import ScopSettings, ScopStrategy
from wgates_plugin.tracing import trace
from wgates_plugin.training import TrainingSettings, evaluate
from wgates_plugin.transforms import apply_steps

CLAIM = "SCOP's arithmetic agrees to 0.3 points; planted noise filters are found at an AUC of 0.95"

SCHEME = (
    ("resnet34", 0.30, 39.7, 39.2),
    ("resnet34", 0.35, 45.6, 44.8),
    ("resnet50", 0.35, 42.8, 45.4),
    ("resnet50", 0.45, 52.3, 55.6),
    ("resnet101", 0.35, 46.8, 48.6),
)
"""Network, share of filters removed, fall of parameters and of MACs in percent.

Computed from the layer shapes of the paper's released code; the paper's table 2 agrees to a point.
"""

RIVALS = ("l1", "bn-scale", "taylor")


def scheme_falls(name: str, share: float, *, seed: int = 0) -> tuple[float, float]:
    """Fall in percent of conv and linear (parameters, MACs) under the paper's scheme."""
    network, example = torchvision_network(name, seed=seed, warm=False), images()
    steps = ScopStrategy(ScopSettings(residual="scatter")).prepare(network, example)
    network = apply_steps(network, steps)
    space = trace(network, example, ignored_layers=["conv1"], verify=False)
    full = torch.tensor(space.full_widths)
    widths = torch.tensor([group.channels - int(share * group.channels) for group in space.groups])
    shapes = LayerShapes(space)
    counted = torch.tensor([layer.kind in ("conv", "linear") for layer in space.layers])

    def fall(of: Any) -> float:
        return 100 * (1 - float(of(widths)[counted].sum() / of(full)[counted].sum()))

    return fall(shapes.parameters_per_layer), fall(shapes.macs_per_layer)


def arithmetic(seed: int) -> tuple[float, list[dict[str, Any]]]:
    """The largest departure in points, and all figures."""
    rows: list[dict[str, Any]] = []
    for name, share, parameters, macs in SCHEME:
        found = scheme_falls(name, share, seed=seed)
        rows.append(
            {
                "network": name,
                "share": share,
                "parameters": found[0],
                "parameters_expected": parameters,
                "macs": found[1],
                "macs_expected": macs,
                "error": max(abs(found[0] - parameters), abs(found[1] - macs)),
            }
        )
        print(
            f"{name}, {share:.0%} of the filters: parameters fall by {found[0]:.2f} % "
            f"({parameters}), MACs by {found[1]:.2f} % ({macs})",
            flush=True,
        )
    return max(row["error"] for row in rows), rows


def layer_aucs(space: ChannelSpace, scores: Tensor, planted: dict[str, Tensor]) -> dict[str, float]:
    """Layer -> chance that a filter that was not planted outranks a planted one."""
    return {
        name: float(roc_auc_score(~planted[name], scores[space.unit_slice(index)]))
        for index, name in enumerate(space.names)
    }


def accuracy_without(
    network: nn.Module, space: ChannelSpace, closed: dict[str, Tensor], data: Data
) -> float:
    """Accuracy on the validation images with filters closed."""
    gates = 1.0 - torch.cat([closed[name].float() for name in space.names])
    with Gating(network, space, lambda: gates):
        return evaluate(network, data.val_loader).accuracy


def planted_run(
    seed: int, *, limit: int, side: int, epochs: int, scop_epochs: int, batch_size: int
) -> dict[str, Any]:
    data = load_data(
        "fashion-mnist", batch_size=batch_size, image_size=side, limit=limit, seed=seed
    )
    training = TrainingSettings(epochs=epochs, learning_rate=0.05, accelerator="cpu")
    network, planted = train_planted(data, training, seed)
    space = trace(network, data.example_input)
    model = MacsModel(space)
    half = 0.5 * float(model(torch.tensor(space.full_widths)))
    others = {name: _as_many(~mask, int(mask.sum()), seed) for name, mask in planted.items()}
    accuracy = {
        "whole": evaluate(network, data.val_loader).accuracy,
        "planted_closed": accuracy_without(network, space, planted, data),
        "as_many_others_closed": accuracy_without(network, space, others, data),
    }
    task = Task(
        copy.deepcopy(network),
        space,
        Budget.of(Limit(model, half)),
        data.example_input,
        data.train_loader,
        epochs=scop_epochs,
        total_epochs=scop_epochs,
        training=TrainingSettings(accelerator="cpu"),
        seed=seed,
        progress=False,
    )
    decision = ScopStrategy().decide(task)
    scores = {"scop": decision.scores}
    for rival in RIVALS:
        scores[rival] = criterion_scores(network, space, rival, data.train_loader, seed=seed)
    aucs = {name: layer_aucs(space, mine, planted) for name, mine in scores.items()}
    means = {name: statistics.fmean(layers.values()) for name, layers in aucs.items()}
    print(
        f"seed {seed}: accuracy {accuracy['whole']:.2%}, planted filters closed "
        f"{accuracy['planted_closed']:.2%}, as many others closed "
        f"{accuracy['as_many_others_closed']:.2%}; AUC "
        + ", ".join(f"{name} {mean:.3f}" for name, mean in means.items()),
        flush=True,
    )
    return {
        "seed": seed,
        "accuracy": accuracy,
        "auc": means,
        "auc_per_layer": aucs,
        "scores": {name: mine.tolist() for name, mine in scores.items()},
        "planted": {name: mask.tolist() for name, mask in planted.items()},
        "facts": decision.facts,
    }


def _as_many(candidates: Tensor, count: int, seed: int) -> Tensor:
    """A random choice of `count` among the true entries of (C_out,)."""
    places = torch.nonzero(candidates).flatten()
    draws = torch.Generator().manual_seed(seed)
    chosen = torch.zeros_like(candidates)
    chosen[places[torch.randperm(len(places), generator=draws)[:count]]] = True
    return chosen


def main(argv: Sequence[str] = ()) -> None:
    options = parser("scop_promise", __doc__)
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--limit", type=int, default=6000, help="training and test images")
    options.add_argument("--side", type=int, default=14, help="images are resized to this")
    options.add_argument("--epochs", type=int, default=8, help="of training the planted network")
    options.add_argument("--scop-epochs", type=int, default=3, help="of learning the betas")
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--threads", type=int, default=1)
    arguments = options.parse_args(list(argv))
    torch.set_num_threads(arguments.threads)
    error, rows = arithmetic(arguments.seed)
    runs = [
        planted_run(
            seed,
            limit=arguments.limit,
            side=arguments.side,
            epochs=arguments.epochs,
            scop_epochs=arguments.scop_epochs,
            batch_size=arguments.batch_size,
        )
        for seed in arguments.seeds
    ]

    def over_seeds(name: str) -> dict[str, float]:
        values = [run["auc"][name] for run in runs]
        return {"mean": statistics.fmean(values), "least": min(values), "most": max(values)}

    write_record(
        arguments.results,
        "scop_promise",
        claim=CLAIM,
        settings={
            "limit": arguments.limit,
            "side": arguments.side,
            "epochs": arguments.epochs,
            "scop_epochs": arguments.scop_epochs,
            "batch_size": arguments.batch_size,
            "seeds": arguments.seeds,
        },
        seed=arguments.seed,
        numbers={
            "scop_arithmetic_error": error,
            "planted_noise_auc": over_seeds("scop")["mean"],
            "auc": {name: over_seeds(name) for name in ("scop", *RIVALS)},
            "accuracy": [run["accuracy"] for run in runs],
        },
        samples={"arithmetic": rows, "planted": runs},
    )
