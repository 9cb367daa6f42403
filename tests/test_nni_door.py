"""The NNI door: their evaluators, our gates, masks that removal follows exactly."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("nni", reason='nni is not installed; pip install "wgates-plugin[nni]"')
pytest.importorskip("wgates_plugin.integrations.nni")  # first: it lets NNI import Lightning

import numpy as np
import torch
from helpers import same_tensors
from networks import TINY, example, tiny, torchvision_network
from nni.compression.pruning import L1NormPruner, TaylorPruner
from nni_helpers import batch, evaluator, training_func, training_step
from nni_pruner_helpers import (
    FREE,
    HALF,
    SETTINGS,
    all_layers,
    check_exact,
    output,
    pruner_of,
    width,
)
from torch import Tensor, nn

from wgates_plugin import trace
from wgates_plugin.efficiency import Budget, Limit, MacsModel
from wgates_plugin.errors import ConfigError, PlanError, SurgeryError, TrainingError
from wgates_plugin.integrations import torch_pruning as sibling
from wgates_plugin.integrations.nni import ModelSpeedup, WGatesPruner, remove, speedup
from wgates_plugin.strategies import Task, WGatesSettings, plan_for_budget
from wgates_plugin.strategies.wgates.strategy import WGatesStrategy
from wgates_plugin.targets import MacsTarget
from wgates_plugin.verification import TOLERANCE, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:WGatesPruner. layers that stay whole")


NOT_SPED_UP = {"plain-norms", "signed-concat"}
"""What ModelSpeedup itself cannot take."""


@pytest.mark.parametrize("name", TINY)
def test_masked_equals_removed(name: str) -> None:
    network = tiny(name)
    before = sum(p.numel() for p in network.parameters())
    pruner = pruner_of(network, all_layers(network, sparse_ratio=0.5))
    model, masks = pruner.compress()
    assert model is network
    smaller = check_exact(pruner, masks, network, theirs=name not in NOT_SPED_UP)
    assert sum(p.numel() for p in smaller.parameters()) < before
    smaller.train()(example()).sum().backward()


def test_masked_equals_removed_on_resnet18() -> None:
    network = torchvision_network("resnet18", num_classes=5)
    pruner = pruner_of(network, steps=2, size=32)
    _, masks = pruner.compress()
    smaller = check_exact(pruner, masks, network, 32)
    assert width(smaller, "conv1") == 32
    assert width(smaller, "layer4.1.conv2") == 256


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["resnet34", "resnet50", "mobilenet_v2", "densenet121", "efficientnet_b0", "resnext50_32x4d"],
)
def test_masked_equals_removed_on_large_networks(name: str) -> None:
    network = torchvision_network(name)
    pruner = pruner_of(
        network, all_layers(network, sparse_ratio=0.5), steps=0, example_inputs=example(2, 64)
    )
    _, masks = pruner.compress()
    masked = output(network, 64)
    pruner.unwrap_model()
    remove(network, masks, example(2, 64))
    assert relative_error(output(network, 64), masked) <= TOLERANCE


def test_masks_have_nnis_form_in_the_networks_order() -> None:
    network = tiny("projection")
    pruner = pruner_of(network, steps=0, example_inputs=example())
    _, masks = pruner.compress()
    pruner.unwrap_model()
    order = list(dict(network.named_modules()))
    assert list(masks) == sorted(masks, key=order.index)
    for name, targets in masks.items():
        module = network.get_submodule(name)
        for key, mask in targets.items():
            assert mask is None or mask.shape == getattr(module, key).shape
            assert mask is None or set(mask.unique().tolist()) <= {0.0, 1.0}
    for name in ("0.0", "1.main.0.0", "1.main.1", "1.shortcut.0"):  # as their L1NormPruner's
        assert float(masks[name]["weight"].mean()) == 0.5
    norm = masks["0.1"]["weight"]
    assert torch.equal(norm, masks["0.0"]["weight"][:, 0, 0, 0])
    assert torch.equal(norm, masks["0.1"]["bias"])


class Digits(nn.Module):
    """The network of NNI's quick-start: two convolutions, flattened into three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(256, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.conv1(x).relu(), 2)
        x = nn.functional.max_pool2d(self.conv2(x).relu(), 2).flatten(1)
        scores: Tensor = self.fc3(self.fc2(self.fc1(x).relu()).relu())
        return scores


def train_digits(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        images = torch.randn(8, 1, 28, 28, generator=generator)
        labels = torch.randint(10, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:WGatesPruner. no evaluator")
@pytest.mark.parametrize("pruner_class", [L1NormPruner, WGatesPruner])
def test_nnis_quick_start_with_our_class_in_place_of_theirs(pruner_class: Any) -> None:
    """The steps of NNI's tutorial `pruning_quick_start.py`; only the names imported are ours."""
    torch.manual_seed(0)
    model = Digits()
    train_digits(model)
    config_list = [
        {"op_types": ["Linear", "Conv2d"], "exclude_op_names": ["fc3"], "sparse_ratio": 0.5}
    ]
    pruner = pruner_class(model, config_list)
    _, masks = pruner.compress()
    for mask in masks.values():
        assert float(mask["weight"].sum() / mask["weight"].numel()) == 0.5
    images = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        masked = model(images)
        pruner.unwrap_model()
        ModelSpeedup(model, torch.rand(3, 1, 28, 28), masks).speedup_model()
        assert relative_error(model(images), masked) <= TOLERANCE
    assert [width(model, name) for name in ("conv1", "conv2")] == [3, 8]
    assert [model.get_submodule(f"fc{k}").out_features for k in (1, 2, 3)] == [60, 42, 10]
    train_digits(model)


def test_without_an_evaluator_norms_decide_and_it_is_told() -> None:
    network = Digits()
    before = copy.deepcopy(network.state_dict())
    with pytest.warns(UserWarning, match="no evaluator, so filter norms decide"):
        pruner = WGatesPruner(network, HALF)
    pruner.unwrap_model()
    assert same_tensors(network.state_dict(), before)
    with pytest.raises(ConfigError, match="give `example_inputs=`"):  # MACs depend on the images
        WGatesPruner(Digits(), FREE, target=MacsTarget(fraction=0.5))


def test_equal_shares_of_a_global_ratio_are_told_of() -> None:
    together = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "global_group_id": 1}]
    with pytest.warns(UserWarning, match="layers of one global_group_id lose equal shares"):
        pruner = WGatesPruner(Digits(), together)
    pruner.compress()
    assert pruner.plan is not None
    assert pruner.plan.widths[:2] == (3, 8)


@pytest.mark.filterwarnings("ignore:WGatesPruner. no evaluator")
@pytest.mark.parametrize(
    ("duration", "words"),
    [
        ({"max_steps": 5}, "max_steps: nothing is trained without an evaluator"),
        ({"max_epochs": 1}, "max_epochs: nothing is trained without an evaluator"),
        ({"max_epochs": True}, "max_epochs is True, needs a whole number from 0"),
    ],
)
def test_durations_without_an_evaluator_are_refused(duration: Any, words: str) -> None:
    pruner = WGatesPruner(Digits(), HALF)
    with pytest.raises(ConfigError, match=f"WGatesPruner.compress: (?s:.)*{words}"):
        pruner.compress(**duration)
    pruner.compress(max_steps=0)


def test_a_duration_shorter_than_the_gates_is_refused() -> None:
    pruner = pruner_of(tiny("plain"), steps=3)
    with pytest.raises(ConfigError, match="max_steps 2 end before training_steps 3"):
        pruner.compress(max_steps=2)
    with pytest.raises(ConfigError, match="how long may the gates learn"):
        pruner_of(tiny("plain"), steps=None).compress()


def trained_quick_start(pruner_class: Any, network: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The steps of NNI's example `taylor_pruning.py`, on a small network."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
    training_func()(network, optimizer, training_step, None, None, 1)
    config_list: Any = [{"op_types": ["Conv2d"], "op_names_re": [".*"], "sparse_ratio": 0.5}]

    pruner = pruner_class(network, config_list, evaluator(network), training_steps=4)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    network = speedup(network, masks, example())

    optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
    training_func()(network, optimizer, training_step, None, None, 1)
    return network, masks


def test_nnis_training_example_with_our_class_in_place_of_theirs() -> None:
    network, masks = trained_quick_start(WGatesPruner, tiny("projection"))
    assert width(network, "0.0") == 4
    assert width(network, "1.shortcut.0") == width(network, "1.main.1") == 6
    with pytest.raises(SurgeryError, match="computes something else"):
        trained_quick_start(TaylorPruner, tiny("projection"))  # its masks leave norms' shifts alive
    assert float(masks["0.0"]["weight"].mean()) == 0.5


class PlainLoop:
    """The pipeline's training loop, in the steps of `nni_helpers.training_func`."""

    epoch = 0
    history: tuple[Any, ...] = ()

    def __init__(self, network: nn.Module, steps: int) -> None:
        self.network, self.steps = network, steps

    def run(self, *, after_backward: Any, **_: Any) -> None:
        optimizer = torch.optim.SGD(self.network.parameters(), lr=0.02)
        self.network.train()
        for seed in range(self.steps):
            optimizer.zero_grad()
            loss = training_step(batch(seed), self.network)
            loss.backward()
            after_backward(SimpleNamespace(step=seed, loss=loss.detach()))
            optimizer.step()


class PlainTask(Task):
    """A strategy's task whose training loop is the one that NNI's evaluator runs."""

    def trainer(self, network: nn.Module, label: str, **_: Any) -> Any:
        return PlainLoop(network, self.steps)


@pytest.mark.parametrize("name", ["residual", "depthwise", "concat"])
def test_the_same_plan_as_through_the_pipelines_strategy(name: str) -> None:
    ours, theirs = tiny(name), tiny(name)
    space = trace(theirs, example())
    target = MacsTarget(fraction=0.5)
    pruner = pruner_of(ours, FREE, steps=4, target=target)
    pruner.compress()
    macs = MacsModel(space)
    full = float(macs(torch.tensor(space.full_widths, dtype=torch.float64)))
    budget = Budget.of(Limit(macs, target.resolve(full)))
    task = PlainTask(theirs, space, budget, example(), [None] * 4, epochs=1, total_epochs=1, seed=0)
    decision = WGatesStrategy(SETTINGS).decide(task)
    plan = plan_for_budget(space, decision.scores, decision.widths, budget, 1, strategy="wgates")
    assert pruner.plan is not None
    assert pruner.plan.kept == plan.kept
    pruner.unwrap_model()
    assert same_tensors(ours.state_dict(), decision.network.state_dict())


def test_the_same_plan_as_through_the_torch_pruning_door() -> None:
    ours, theirs = tiny("residual"), tiny("residual")
    pruner = pruner_of(ours, FREE, steps=4, target=MacsTarget(macs=30_000))
    pruner.compress()
    other = sibling.WGatesPruner(
        theirs, example(), efficiency=MacsModel, target=30_000, settings=SETTINGS, steps=4
    )
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.02)
    theirs.train()
    for seed in range(4):
        optimizer.zero_grad()
        training_step(batch(seed), theirs).backward()
        other.regularize(theirs)
        optimizer.step()
    other.detach()
    assert pruner.plan is not None
    assert pruner.plan.kept == other.gates.plan().kept
    pruner.unwrap_model()
    assert same_tensors(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize(("steps", "length"), [(8, None), (None, 8)])
def test_gates_are_measured_for_half_of_the_training(steps: int | None, length: int | None) -> None:
    network = tiny("residual")
    settings = WGatesSettings(rounds=1)
    pruner = pruner_of(
        network, FREE, steps=steps, settings=settings, target=MacsTarget(fraction=0.5)
    )
    seen: list[float] = []
    plain = pruner._learn

    def watch() -> None:
        plain()
        with torch.no_grad():
            seen.append(float(pruner.gates.gating.source().mean()))

    pruner._learn = watch
    _, masks = pruner.compress(max_steps=length)
    assert [share == 1.0 for share in seen] == [
        *[True] * 3,
        *[False] * 5,
    ]  # closed after the fourth
    assert (pruner.gates.merits.done, pruner.gates.step) == (4, 8)
    check_exact(pruner, masks, network)


SCRIPT = """
import json, sys, torch
sys.path[:0] = {path!r}
torch.set_num_threads(1)
from wgates_plugin.integrations.nni import WGatesPruner
from networks import tiny
from nni_helpers import evaluator
net = tiny("projection")
pruner = WGatesPruner(net, [{{"op_types": ["Conv2d"], "sparse_ratio": 0.5}}], evaluator(net), 3)
_, masks = pruner.compress()
found = {{name: [m.flatten().tolist() for m in t.values() if m is not None]
         for name, t in masks.items()}}
print("RESULT" + json.dumps([list(masks), found, pruner.plan.kept]))
"""


def test_the_order_of_sets_decides_nothing() -> None:
    here = Path(__file__).parent
    script = SCRIPT.format(path=[str(here), str(here.parent)])
    found = []
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
        found.append(json.loads(line.removeprefix("RESULT")))
    assert found[0] == found[1]


def test_training_goes_on_behind_the_masks() -> None:
    network, twin = tiny("residual"), tiny("residual")
    pruner, shorter = pruner_of(network), pruner_of(twin)
    network_, masks = pruner.compress(max_steps=6)
    assert network_ is network
    assert pruner.gates.step == 3
    _, decided = shorter.compress()
    assert (masks["0.0"]["weight"] == 0).any()
    assert torch.equal(masks["0.0"]["weight"], decided["0.0"]["weight"])
    longer, smaller = check_exact(pruner, masks, network), check_exact(shorter, decided, twin)
    assert not torch.equal(longer[0][0].weight, smaller[0][0].weight)


def test_epochs_can_set_the_duration_and_too_few_are_told() -> None:
    network = tiny("plain")
    pruner = pruner_of(network, steps=None)
    with pytest.warns(UserWarning, match=r"all 4 gate steps .* none learned.*training_steps=4"):
        pruner.compress(max_epochs=1)
    assert pruner.gates.step == 4


def test_an_early_end_is_told() -> None:
    network = tiny("plain")

    def short(model: Any, optimizer: Any, step: Any, *_: Any) -> None:
        training_func()(model, optimizer, step, None, 2)

    traced = evaluator(network)
    traced.training_func = short
    pruner = WGatesPruner(network, HALF, traced, 3)
    with pytest.warns(UserWarning, match="after 2 of 3 steps"):
        pruner.compress()


def test_from_compressor_keeps_what_was_masked() -> None:
    network = tiny("residual")
    first = L1NormPruner(network, [{"op_names": ["1.main.0.0"], "sparse_ratio": 0.5}])
    before = first.compress()[1]["1.main.0.0"]["weight"]
    pruner = WGatesPruner.from_compressor(
        first,
        FREE,
        3,
        evaluator=evaluator_of_wrapped(network, first),
        target=MacsTarget(fraction=0.4),
    )
    _, masks = pruner.compress()
    now = masks["1.main.0.0"]["weight"]
    assert not now[before == 0].any()
    smaller = check_exact(pruner, masks, network)
    assert width(smaller, "1.main.0.0") <= 3


def evaluator_of_wrapped(network: nn.Module, compressor: Any) -> Any:
    """An evaluator made while the network is unwrapped, as its optimizer must be."""
    compressor.unwrap_model()
    made = evaluator(network)
    made._init_optimizer_helpers(network)
    compressor.wrap_model()
    return made


def test_another_pruner_can_go_on_from_ours() -> None:
    network = tiny("projection")
    pruner = pruner_of(network, [{"op_names": ["0.0"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    later = TaylorPruner.from_compressor(
        pruner, [{"op_names": ["1.main.0.0"], "sparse_ratio": 0.5}], training_steps=2
    )
    _, both = later.compress(2, None)
    assert torch.equal(both["0.0"]["weight"], masks["0.0"]["weight"])
    assert float(both["1.main.0.0"]["weight"].mean()) == 0.5
    assert pruner.gates.step == 3


def test_a_refused_chain_leaves_the_first_compressor_at_work() -> None:
    network = tiny("plain")
    first = L1NormPruner(network, HALF)
    first.compress()
    masked = output(network)
    with pytest.raises(ConfigError, match="no evaluator"):
        WGatesPruner.from_compressor(first, HALF, 3)
    assert torch.equal(output(network), masked)


def test_without_training_norms_decide() -> None:
    network = tiny("plain")
    norms = network[0][0].weight.detach().flatten(1).norm(dim=1)
    pruner = WGatesPruner(network, HALF, training_steps=0, example_inputs=example())
    _, masks = pruner.compress()
    kept = masks["0.0"]["weight"][:, 0, 0, 0].bool()
    assert norms[kept].min() > norms[~kept].max()
    check_exact(pruner, masks, network)


def test_a_failing_training_takes_the_gates_off() -> None:
    network = tiny("residual")

    def fail(model: nn.Module, optimizers: Any, step: Any, *_: Any) -> None:
        training_func()(model, optimizers, step, None, 1)
        raise ZeroDivisionError("user's own")

    traced = evaluator(network, dummy_input=example())
    traced.training_func = fail
    pruner = WGatesPruner(network, HALF, traced, 3)
    with pytest.raises(ZeroDivisionError):
        pruner.compress()
    pruner.unwrap_model()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.modules())
    assert traced.model is None


def test_no_optimizer_step_means_no_masks() -> None:
    network = tiny("plain")
    traced = evaluator(network, dummy_input=example())
    traced.training_func = lambda *_: None
    with pytest.raises(TrainingError, match="never learned"):
        WGatesPruner(network, HALF, traced, 3).compress()


def test_finding_an_example_moves_no_random_state() -> None:
    network = tiny("plain")

    def augmenting(model: Any, optimizer: Any, step: Any, *_: Any) -> None:
        random.random(), np.random.rand(), torch.rand(1)
        training_func()(model, optimizer, step, None, 1)

    traced = evaluator(network)
    traced.training_func = augmenting
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    WGatesPruner(network, HALF, traced, 3)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == states[2]).all()


def test_a_second_compress_is_refused() -> None:
    network = tiny("plain")
    pruner = pruner_of(network, steps=1)
    pruner.compress()
    with pytest.raises(PlanError, match="compressed already"):
        pruner.compress()


def other_layer(network: Any) -> None:
    network[1].main[0][0] = nn.Conv2d(8, 6, 3, padding=1, bias=False)


def other_block(network: Any) -> None:
    network[1].main = nn.Identity()


def other_shape(network: Any) -> None:
    head = network[2].fc
    head.weight = nn.Parameter(head.weight.detach()[:, :4].clone())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_layer, "`1.main.0.0` is another layer now"),
        (other_block, "`1.main.0.0` is gone"),
        (other_shape, r"`2.fc.weight` was \(5, 8\) and is \(5, 4\)"),
    ],
)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_network_that_changed_since_tracing_is_refused(
    change: Any, words: str, steps: int
) -> None:
    network = tiny("residual")
    pruner = pruner_of(network, steps=steps)
    change(network)
    with pytest.raises(PlanError, match=f"changed since it was traced: .*{words}"):
        pruner.compress()
