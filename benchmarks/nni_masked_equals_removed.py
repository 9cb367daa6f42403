"""Claim: through the NNI door too, masked and physically smaller network agree to 1e-5 relative.

Measured: largest output difference over the largest output, float32, eval mode, on fresh images: the
network that NNI still wraps and masks, against the network after `unwrap_model` and `remove`. Masks come
from `WGatesPruner` with one ratio for all layers, decided by filter norms; from `WGatesPruner` whose
gates learned under a target of MACs in a `TorchEvaluator`'s training; and from NNI's `L1NormPruner` with
a config of `make_config`. Random weights, and BatchNorm statistics of random images.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tools.doors import LEARNING_RATE, NETWORKS, SIDE
from benchmarks.tools.records import parser, write_record
from tests import networks
from wgates_plugin.latency.environment import library_version
from wgates_plugin.verification import TOLERANCE, relative_error

CLAIM = "NNI's masked network and what `remove` leaves agree to 1e-5 relative"
NAME = "masked_equals_removed_nni"
STEPS = 2


def evaluator_of(network: nn.Module) -> Any:
    """NNI's `TorchEvaluator` over random images and labels."""
    import nni

    from wgates_plugin.integrations.nni import torch_evaluator

    def train(
        model: nn.Module,
        optimizers: torch.optim.Optimizer,
        training_step: Callable[..., Tensor],
        lr_schedulers: Any = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        model.train()
        for seed in range(max_steps or max_epochs or 1):
            optimizers.zero_grad()
            training_step(networks.example(4, SIDE, seed), model).backward()
            optimizers.step()

    def training_step(images: Tensor, model: nn.Module) -> Tensor:
        scores = model(images)
        labels = torch.arange(len(images)) % scores.shape[1]
        return nn.functional.cross_entropy(scores, labels)

    optimizer = nni.trace(torch.optim.SGD)(network.parameters(), lr=LEARNING_RATE)
    return torch_evaluator(train, optimizer, training_step)


def by_ratio(network: nn.Module, ratio: float) -> Any:
    from wgates_plugin.integrations.nni import WGatesPruner

    config = [{"op_types": ["Conv2d"], "sparse_ratio": ratio}]
    return WGatesPruner(network, config, training_steps=0, example_inputs=networks.example(2, SIDE))


def by_target(network: nn.Module, ratio: float) -> Any:
    from wgates_plugin.integrations.nni import WGatesPruner
    from wgates_plugin.targets import MacsTarget

    config = [{"op_types": ["Conv2d"], "max_sparse_ratio": 0.9}]
    target = MacsTarget(fraction=1.0 - ratio)
    return WGatesPruner(network, config, evaluator_of(network), STEPS, target=target)


def theirs(network: nn.Module, ratio: float) -> Any:
    from nni.compression.pruning import L1NormPruner

    from wgates_plugin.integrations.nni import make_config

    config = make_config(network, networks.example(2, SIDE), sparse_ratio=ratio)
    return L1NormPruner(network, config)


MASKERS: dict[str, Callable[[nn.Module, float], Any]] = {
    "wgates_ratio": by_ratio,
    "wgates_target": by_target,
    "l1_make_config": theirs,
}


@torch.no_grad()
def output(network: nn.Module, seed: int) -> Tensor:
    found: Tensor = network.eval()(networks.example(4, SIDE, seed + 1000))
    return found


def error(name: str, masker: str, ratio: float, *, seed: int) -> dict[str, Any]:
    """Relative error of one network under one pruner's masks, and the share of parameters left."""
    from wgates_plugin.integrations.nni import remove

    network = networks.torchvision_network(name, seed)
    before = sum(parameter.numel() for parameter in network.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that stay whole
        pruner = MASKERS[masker](network, ratio)
        _, masks = pruner.compress()
    masked = output(network, seed)
    pruner.unwrap_model()
    remove(network, masks, networks.example(2, SIDE))
    found = output(network, seed)
    after = sum(parameter.numel() for parameter in network.parameters())
    return {"masks": masker, "ratio": ratio, "error": relative_error(found, masked)} | {
        "parameters_left": after / before
    }


def main(argv: Sequence[str] = ()) -> None:
    options = parser(NAME, __doc__)
    options.add_argument("--ratios", nargs="+", type=float, default=[0.3, 0.6])
    options.add_argument("--networks", nargs="+", default=NETWORKS, help="of torchvision")
    arguments = options.parse_args(list(argv))
    import wgates_plugin.integrations.nni  # noqa: F401  says at once that nni is missing

    torch.set_num_threads(1)
    samples: dict[str, list[dict[str, Any]]] = {}
    for name in arguments.networks:
        samples[name] = [
            error(name, masker, ratio, seed=arguments.seed)
            for masker in MASKERS
            for ratio in arguments.ratios
        ]
        worst = max(row["error"] for row in samples[name])
        print(f"{name}: worst of {len(samples[name])} plans {worst:.1e}", flush=True)
    by_network = {name: max(row["error"] for row in rows) for name, rows in samples.items()}
    write_record(
        arguments.results,
        NAME,
        claim=CLAIM,
        settings={
            "ratios": arguments.ratios,
            "side": SIDE,
            "gate_steps": STEPS,
            "learning_rate": LEARNING_RATE,
            "tolerance": TOLERANCE,
            "nni": library_version("nni"),
        },
        seed=arguments.seed,
        numbers={
            "worst": max(by_network.values()),
            "networks": len(samples),
            "plans": sum(map(len, samples.values())),
            "worst_by_network": by_network,
        },
        samples=samples,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
