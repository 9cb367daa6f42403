"""Masked equals removed through every door that runs beside the package's own environment.

Each door takes a name of `torchvision.models` and prunes that network as its users would; random weights
and warm BatchNorm statistics, images of 64x64. It yields the largest output difference over the largest
output, eval mode, float32, on images that nothing was trained or traced on: gated network against what
the door removed. NNI's door needs an environment of its own (`nni_masked_equals_removed.py`).
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests import networks
from wgates_plugin.efficiency import Budget, Limit, MacsModel
from wgates_plugin.integrations.torch_pruning import WGatesImportance, WGatesPruner
from wgates_plugin.integrations.torch_pruning.importance import units_left
from wgates_plugin.latency.base import require
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies import WGates, WGatesSettings
from wgates_plugin.strategies.criteria import plan_by_criterion
from wgates_plugin.surgery import remove
from wgates_plugin.tracing import trace
from wgates_plugin.training import StepContext, Trainer, TrainingSettings
from wgates_plugin.verification import removal_error

NETWORKS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "mobilenet_v2",
    "densenet121",
    "efficientnet_b0",
    "resnext50_32x4d",
)
SIDE, CLASSES = 64, 10
LEARNING_RATE = 1e-4
"""Small: a random network that diverges amplifies rounding a thousandfold, whatever is removed."""

GATES = WGatesSettings(learning_rate=0.05, measuring=0)
Results = Iterator[dict[str, Any]]
"""Per way through the door: {way, relative_error, parameters_left}."""


def inputs() -> Tensor:
    """Images for tracing, (2, 3, 64, 64)."""
    return networks.example(2, SIDE, seed=11)


def batches(count: int = 2, batch: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [
        (networks.example(batch, SIDE, seed), torch.arange(batch) * (seed + 3) % CLASSES)
        for seed in range(count)
    ]


def judged(
    way: str, name: str, state: dict[str, Tensor], smaller: nn.Module, plan: PruningPlan
) -> dict[str, Any]:
    """A fresh `name` with the weights `state`, gated by the plan, against the `smaller` one."""
    whole = networks.torchvision_network(name)
    whole.load_state_dict(state)
    found = removal_error(whole, smaller, plan, networks.example(4, SIDE, 1000))
    left = size_of(smaller) / size_of(whole)
    assert math.isfinite(found), (name, way)
    assert left < 0.9, (name, way, left)  # next to nothing removed would prove nothing
    return {"way": way, "relative_error": found, "parameters_left": left}


def size_of(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def weights(network: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(network.state_dict())


def half_the_macs(space: Any) -> Budget:
    model = MacsModel(space)
    return Budget.of(Limit(model, 0.5 * float(model(torch.tensor(space.full_widths)))))


def pipeline(name: str) -> Results:
    """The pipeline's parts: trace, gates in its `Trainer`, plan, `remove`."""
    network = networks.torchvision_network(name)
    space = trace(network, inputs())
    gates = WGates(network, space, half_the_macs(space), GATES).attach()
    settings = TrainingSettings(epochs=1, learning_rate=LEARNING_RATE)
    trainer = Trainer(network, batches(), settings, seed=0)

    def step(_: StepContext) -> None:
        gates.regularize()

    trainer.run(after_backward=step, progress=False)
    plan = gates.plan()
    gates.detach()
    state = weights(network)
    yield judged("half the MACs", name, state, remove(network, plan, inputs()), plan)


def learn(pruner: WGatesPruner, network: nn.Module) -> None:
    """torch-pruning's sparse-training loop, two steps of it."""
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)
    network.train()
    for images, labels in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        pruner.regularize(network)
        optimizer.step()


def torch_pruning(name: str) -> Results:
    """`WGatesPruner` with learned gates, by ratio and by target; all at once, one by one, in steps."""
    macs = float(tp.utils.count_ops_and_params(networks.torchvision_network(name), inputs()[:1])[0])
    ways: dict[str, dict[str, Any]] = {
        "ratio": {"pruning_ratio": 0.5},
        "target": {"target": 0.5 * macs},
        "interactive": {"pruning_ratio": 0.3, "global_pruning": True, "max_pruning_ratio": 0.8},
        "iterative": {"pruning_ratio": 0.6, "iterative_steps": 3, "round_to": 4},
    }
    for way, options in ways.items():
        network = networks.torchvision_network(name)
        pruner = WGatesPruner(network, inputs(), settings=GATES, **options)
        learn(pruner, network)
        state = weights(network)
        for _ in range(options.get("iterative_steps", 1)):
            for group in pruner.step(interactive=way == "interactive") or ():
                group.prune()
        assert pruner.plan is not None
        yield judged(way, name, state, network, pruner.plan)


def importance(name: str) -> Results:
    """`WGatesImportance` in torch-pruning's own pruner, which decides and removes."""
    ways: dict[str, dict[str, Any]] = {
        "local": {},
        "global": {"global_pruning": True, "max_pruning_ratio": 0.8},
    }
    for way, options in ways.items():
        network = networks.torchvision_network(name)
        learner = WGatesPruner(network, inputs(), pruning_ratio=0.5, settings=GATES)
        learn(learner, network)
        scores = WGatesImportance(learner)
        learner.detach()
        state = weights(network)
        heads = [m for m in network.modules() if getattr(m, "out_features", 0) == CLASSES]
        theirs = tp.pruner.BasePruner(
            network,
            (inputs(),),
            scores,
            pruning_ratio=0.4,
            ignored_layers=heads,
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
            channel_groups={},
            **options,
        )
        theirs.step()
        left = units_left(learner.space, theirs.pruning_history())
        yield judged(way, name, state, network, PruningPlan.from_masks(learner.space, left))


def criteria(name: str) -> Results:
    """torch-pruning's criteria under our budget."""
    for criterion, scope in (("l1", "local"), ("group-norm", "global"), ("taylor", "global")):
        network = networks.torchvision_network(name)
        space = trace(network, inputs())
        budget = half_the_macs(space)
        plan = plan_by_criterion(network, space, criterion, budget, 1, batches(), scope=scope)
        state = weights(network)
        yield judged(criterion, name, state, remove(network, plan, inputs()), plan)


def lightning(name: str) -> Results:
    """`WGatesCallback` in `Trainer.fit`."""
    from wgates_plugin.integrations.lightning import WGatesCallback

    pl: Any = require("lightning.pytorch", extra="lightning", purpose="the Lightning door")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = networks.torchvision_network(name).train()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)

    class Keep(pl.Callback):
        state: dict[str, Tensor]

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.state = weights(pl_module.net)

    module, keep = Module(), Keep()
    gates = WGatesCallback(inputs(), network="net", pruning_ratio=0.5, settings=GATES)
    images, labels = zip(*batches(), strict=True)
    data = TensorDataset(torch.cat(images), torch.cat(labels))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[gates, keep],
        ).fit(module, DataLoader(data, batch_size=4))
    assert gates.plan is not None
    yield judged("fit", name, keep.state, module.net, gates.plan)


DOORS: dict[str, Callable[[str], Results]] = {
    "pipeline": pipeline,
    "torch-pruning": torch_pruning,
    "importance": importance,
    "criteria": criteria,
    "lightning": lightning,
}


def rows(door: str, network: str) -> list[dict[str, Any]]:
    """What the door left of `network`: {door, network, way, relative_error, parameters_left} each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [{"door": door, "network": network, **found} for found in DOORS[door](network)]
