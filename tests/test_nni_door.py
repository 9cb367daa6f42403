"""The NNI door: their config lists and evaluators, our gates, masks that removal follows exactly."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("nni", reason='nni is not installed; pip install "wgates-plugin[nni]"')
pytest.importorskip("wgates_plugin.integrations.nni")  # first: it lets NNI import Lightning

import torch
from helpers import same_tensors, snapshot
from networks import TINY, example, tiny, torchvision_network
from nni.compression.pruning import FPGMPruner, L1NormPruner, LevelPruner, TaylorPruner
from nni_helpers import batch, evaluator, training_func, training_step
from torch import Tensor, nn

from wgates_plugin import trace
from wgates_plugin.efficiency import Budget, Limit, LPNet, MacsModel, ParametersModel
from wgates_plugin.errors import (
    ConfigError,
    InfeasibleTargetError,
    PlanError,
    SurgeryError,
    TrainingError,
)
from wgates_plugin.integrations import torch_pruning as sibling
from wgates_plugin.integrations.nni import (
    ModelSpeedup,
    WGatesPruner,
    make_config,
    remove,
    speedup,
    torch_evaluator,
)
from wgates_plugin.strategies import Task, WGatesSettings, plan_for_budget
from wgates_plugin.strategies.wgates.strategy import WGatesStrategy
from wgates_plugin.targets import LatencyTarget, MacsTarget, ParametersTarget
from wgates_plugin.verification import TOLERANCE, masked_output, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:WGatesPruner. layers that stay whole")

SETTINGS = WGatesSettings(learning_rate=0.05)
HALF = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
FREE = [{"op_types": ["Conv2d"]}]
PRUNABLE = {"Conv1d", "Conv2d", "ConvTranspose2d", "Linear"}


def all_layers(network: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    kinds = {type(module).__name__ for module in network.modules()} & PRUNABLE
    return [{"op_types": sorted(kinds), **settings}]


def pruner_of(
    network: nn.Module,
    config: Any = HALF,
    *,
    steps: int | None = 3,
    size: int = 8,
    **options: Any,
) -> WGatesPruner:
    options.setdefault("settings", SETTINGS)
    return WGatesPruner(network, config, evaluator(network, size=size), steps, **options)


@torch.no_grad()
def output(network: nn.Module, size: int = 8) -> Tensor:
    return network.eval()(example(4, size, seed=99))


def width(network: nn.Module, name: str) -> int:
    return network.get_submodule(name).out_channels


def check_exact(
    pruner: WGatesPruner, masks: Any, network: nn.Module, size: int = 8, *, theirs: bool = True
) -> nn.Module:
    """Masked equals removed, by torch-pruning and by ModelSpeedup; returns the smaller network."""
    masked = output(network, size)
    pruner.unwrap_model()
    assert pruner.plan is not None
    gated = masked_output(network, pruner.plan, example(4, size, seed=99))
    assert relative_error(masked, gated) <= TOLERANCE
    twin = copy.deepcopy(network)
    smaller = remove(network, masks, example(2, size))
    assert smaller is network
    assert relative_error(output(smaller, size), masked) <= TOLERANCE
    for name, kept in zip(pruner.space.names, pruner.plan.widths, strict=True):
        root = smaller.get_submodule(name)
        assert kept == getattr(root, "out_channels", getattr(root, "out_features", None))
    if not theirs:
        with pytest.raises(SurgeryError, match="ModelSpeedup fails"):
            speedup(twin, masks, example(2, size))
    else:
        sped = speedup(twin, masks, example(2, size))
        assert relative_error(output(sped, size), masked) <= TOLERANCE
        counts = [sum(p.numel() for p in net.parameters()) for net in (smaller, sped)]
        assert counts[0] == counts[1]
    return smaller


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


def test_every_form_of_target() -> None:
    network = tiny("plain")
    space = trace(network, example())
    macs, parameters = MacsModel(space), ParametersModel(space)
    lpnet = LPNet.fit(space, [[k, k + 2] for k in range(1, 9)], [1.0 + k for k in range(8)])
    forms: list[tuple[Any, Any, Any, float]] = [
        (None, 2e4, macs, 2e4),
        (None, MacsTarget(macs=2e4), macs, 2e4),
        (None, ParametersTarget(parameters=600), parameters, 600.0),
        (ParametersModel, 600.0, parameters, 600.0),
        (lpnet, 5.0, lpnet, 5.0),
        (lpnet, LatencyTarget(milliseconds=5.0), lpnet, 5.0),
        (Budget.of(Limit(macs, 2e4), Limit(parameters, 600.0)), None, parameters, 600.0),
    ]
    for efficiency, target, model, limit in forms:
        fresh = tiny("plain")
        pruner = pruner_of(fresh, FREE, steps=1, efficiency=efficiency, target=target)
        pruner.compress()
        assert pruner.plan is not None
        assert float(model(torch.tensor(pruner.plan.widths))) <= limit


def test_bounds_of_the_config_hold_under_a_target() -> None:
    network = tiny("concat")
    config = [
        {"op_names": ["0.0"], "max_sparse_ratio": 0.2},
        {"op_names": ["1.layers.0.0"], "min_sparse_ratio": 0.5},
        {"op_types": ["Conv2d"], "exclude_op_names": ["0.0", "1.layers.0.0", "4.0"]},
    ]
    pruner = pruner_of(network, config, target=MacsTarget(fraction=0.4))
    _, masks = pruner.compress()
    smaller = check_exact(pruner, masks, network)
    assert width(smaller, "0.0") >= 5
    assert width(smaller, "1.layers.0.0") <= 2
    assert width(smaller, "4.0") == 9
    assert "4.0" not in masks


def test_a_global_ratio_is_shared_out_by_the_gates() -> None:
    network = tiny("plain")
    config = [{"op_types": ["Conv2d"], "global_group_id": "all", "sparse_ratio": 0.6}]
    config[0]["max_sparse_ratio"] = 0.8
    pruner = pruner_of(network, config)
    pruner.compress()
    assert pruner.plan is not None
    first, second = pruner.plan.widths
    full = 8 * 27 + 12 * 72
    assert first * 27 + second * 72 <= 0.4 * full < (first + 1) * 27 + (second + 1) * 72
    assert first >= 2


def test_a_config_over_norms_prunes_the_layers_behind_them() -> None:
    network = tiny("residual")
    pruner = pruner_of(network, [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    smaller = check_exact(pruner, masks, network)
    assert width(smaller, "0.0") == 4


def test_layers_that_cannot_be_pruned_are_named_and_stay() -> None:
    network = tiny("residual")
    config = [{"op_names": ["0.0", "1.main.0.0", "2.fc"], "sparse_ratio": 0.5}]
    with pytest.warns(UserWarning, match="layers that stay whole") as found:
        pruner = pruner_of(network, config)
    assert "`0.0`: it shares its channels with `1.main.1`" in str(found[0].message)
    assert "`2.fc`: its channels are outputs of the network" in str(found[0].message)
    assert set(pruner.left_out) == {"0.0", "2.fc"}
    _, masks = pruner.compress()
    assert masks["0.0"]["weight"].all()
    smaller = check_exact(pruner, masks, network)
    assert [width(smaller, name) for name in ("0.0", "1.main.0.0")] == [8, 3]


def test_training_goes_on_behind_the_masks() -> None:
    network = tiny("residual")
    pruner = pruner_of(network)
    network_, masks = pruner.compress(max_steps=6)
    assert network_ is network
    assert pruner.gates.step == 3
    closed = masks["0.0"]["weight"] == 0
    assert closed.any()
    check_exact(pruner, masks, network)


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


FORMS: list[tuple[Any, list[int]]] = [
    # widths of 0.0, 1.main.0.0, 1.main.1; the first and the last are coupled
    ([{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], [4, 3, 4]),
    ([{"op_names_re": [r".*main\.0"], "op_types": ["Conv2d"], "sparse_ratio": 0.5}], [8, 3, 8]),
    ([{"op_names": ["0.0", "1.main.1"], "sparse_ratio": 0.5}], [4, 6, 4]),
    (
        [{"op_types": ["Conv2d"], "exclude_op_names_re": [r".*main\.0"], "sparse_ratio": 0.5}],
        [4, 6, 4],
    ),
    (
        [{"op_types": ["Conv2d"], "exclude_op_names": ["1.main.0.0"], "sparse_ratio": 0.5}],
        [4, 6, 4],
    ),
    ([{"op_types": ["Conv2d"], "sparsity": 0.5}], [4, 3, 4]),  # NNI 2's word
    ([{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "max_sparse_ratio": 0.25}], [6, 5, 6]),
    ([{"op_types": ["Conv2d"], "sparse_ratio": 0.1, "min_sparse_ratio": 0.5}], [4, 3, 4]),
    ([{**HALF[0], "granularity": "out_channel"}], [4, 3, 4]),
    ([{**HALF[0], "granularity": [1, -1, -1, -1]}], [4, 3, 4]),
    ([{**HALF[0], "dependency_group_id": "all"}], [4, 3, 4]),
    ([{"op_types": ["Conv2d"], "target_settings": {"weight": {"sparse_ratio": 0.5}}}], [4, 3, 4]),
]


@pytest.mark.filterwarnings("ignore:.*legacy")
@pytest.mark.parametrize(("config", "widths"), FORMS)
def test_every_form_of_config(config: Any, widths: list[int]) -> None:
    network = tiny("residual")
    pruner = pruner_of(network, config, steps=2)
    _, masks = pruner.compress()
    smaller = check_exact(pruner, masks, network)
    assert [width(smaller, name) for name in ("0.0", "1.main.0.0", "1.main.1")] == widths


BAD: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "at least one"),
    ("conv", {}, "needs a list of dicts"),
    ([{"op_types": ["Conv3d"], "sparse_ratio": 0.5}], {}, "names no layer.*Conv2d"),
    ([{"op_names": ["9.conv"], "sparse_ratio": 0.5}], {}, "no layer `9.conv`"),
    ([{"op_types": ["ReLU"], "sparse_ratio": 0.5}], {}, "is a ReLU"),
    ([{"op_names": ["2.fc"], "sparse_ratio": 0.5}], {}, "can be pruned.*outputs of the network"),
    ([{"op_types": ["Conv2d"], "sparse_ratio": 1.0}], {}, "sparse_ratio is 1.0, needs a number"),
    ([{"op_types": ["Conv2d"], "sparse_ratio": -0.1}], {}, "sparse_ratio is -0.1"),
    ([{"op_types": ["Conv2d"], "sparse_ratio": "half"}], {}, "sparse_ratio is 'half'"),
    ([{"op_types": ["Conv2d"], "max_sparse_ratio": 2}], {"target": 1e4}, "max_sparse_ratio is 2"),
    ([{"op_types": ["Conv2d"], "sparse_threshold": 0.1}], {}, "sparse_threshold"),
    ([{**HALF[0], "granularity": "in_channel"}], {}, "whole output channels"),
    ([{**HALF[0], "target_names": ["_output_"]}], {}, "inputs and outputs"),
    ([{**HALF[0], "pruner": "l1"}], {}, "pruner"),
    (HALF, {"target": 1e4}, "together with a target"),
    (HALF, {"target": LatencyTarget(milliseconds=2.0)}, "together with a target"),
    (FREE, {}, "neither `target` nor any sparse_ratio"),
    (HALF, {"efficiency": MacsModel}, "efficiency without a target"),
    (FREE, {"target": LatencyTarget(milliseconds=2.0)}, "needs an `LPNet`"),
    (HALF, {"training_steps": -1}, "whole number"),
    (HALF, {"evaluator": None}, "no evaluator"),
    (HALF, {"evaluator": training_func()}, "evaluator is a function"),
    (
        [
            {"op_names": ["0.0"], "sparse_ratio": 0.5},
            {"op_names": ["1.main.1"], "sparse_ratio": 0.25},
        ],
        {},
        "contradictory sparse_ratio in one dependency group: 0.5 for `0.0`, 0.25 for `1.main.1`",
    ),
    (
        [
            {"op_names": ["0.0", "1.main.1"], "sparse_ratio": 0.5, "dependency_group_id": "a"},
            {"op_names": ["1.main.0.0"], "sparse_ratio": 0.25, "dependency_group_id": "a"},
        ],
        {},
        "dependency_group_id 'a': contradictory",
    ),
    (
        [{"op_names": ["0.0"], "sparse_ratio": 0.5}, {"op_names": ["0.0"], "sparse_ratio": 0.2}],
        {},
        "configured twice",
    ),
]


@pytest.mark.parametrize(("config", "options", "words"), BAD)
def test_bad_input_is_refused_before_anything_is_wrapped(
    config: Any, options: dict[str, Any], words: str
) -> None:
    network = tiny("residual").train()
    traced = evaluator(network, dummy_input=example())
    before = snapshot(network)
    given = {"evaluator": traced, "training_steps": 3, **options}
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        WGatesPruner(network, config, **given)
    assert snapshot(network) == before


def test_all_problems_come_at_once() -> None:
    network = tiny("residual")
    config = [
        {"op_names": ["nowhere"], "sparse_ratio": 0.5},
        {"op_types": ["Conv2d"], "sparse_ratio": 2.0, "granularity": "in_channel"},
    ]
    with pytest.raises(ConfigError) as found:
        WGatesPruner(network, config, None, -3)
    assert len(found.value.problems) >= 4


def test_an_unreachable_target_is_refused_before_training() -> None:
    network = tiny("plain")
    before = snapshot(network)
    with pytest.raises(InfeasibleTargetError, match="out of reach"):
        pruner_of(network, FREE, target=10.0, example_inputs=example())
    assert snapshot(network) == before


def test_a_wrapped_network_needs_from_compressor() -> None:
    network = tiny("plain")
    traced = evaluator(network, dummy_input=example())
    L1NormPruner(network, HALF)
    with pytest.raises(ConfigError, match="from_compressor"):
        WGatesPruner(network, HALF, traced, 3)


def test_an_untraced_optimizer_is_explained() -> None:
    network = tiny("plain")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"make it with nni.trace\(SGD\)") as found:
        torch_evaluator(training_func(), optimizer, "step")  # type: ignore[arg-type]
    assert len(found.value.problems) == 2


def test_an_optimizer_of_another_network_is_explained() -> None:
    network = tiny("plain")
    with pytest.raises(ConfigError, match="no parameter of this model"):
        WGatesPruner(network, HALF, evaluator(tiny("plain")), 3)


# Removal of anyone's masks.


@pytest.mark.parametrize("name", ["plain", "residual", "projection", "depthwise", "preactivation"])
@pytest.mark.parametrize("theirs", [L1NormPruner, FPGMPruner])
def test_their_pruners_masks_are_removed_exactly_with_our_config(name: str, theirs: Any) -> None:
    network = tiny(name)
    before = copy.deepcopy(network)
    pruner = theirs(network, make_config(network, example(), sparse_ratio=0.5))
    _, masks = pruner.compress()
    masked = output(network)
    pruner.unwrap_model()
    remove(network, masks, example())
    assert relative_error(output(network), masked) <= TOLERANCE
    space = trace(before, example())
    smaller = trace(network, example())
    for group, now in zip(space.groups, smaller.groups, strict=True):
        assert now.channels == group.channels - int(group.channels * 0.5)


@pytest.mark.filterwarnings("ignore:make_config")
def test_a_config_leaves_grouped_convolutions_to_us() -> None:
    network = tiny("grouped")
    config = make_config(network, example(), sparse_ratio=0.5)
    _, masks = L1NormPruner(network, config).compress()
    assert not {"1.main.0.0", "1.main.1.0"} & set(masks)


def test_a_config_leaves_out_what_nni_has_no_words_for() -> None:
    network = tiny("concat")
    with pytest.warns(UserWarning, match="`2` holds the channels of several groups"):
        config = make_config(network, example(), sparse_ratio=0.5)
    pruner = L1NormPruner(network, config)
    _, masks = pruner.compress()
    masked = output(network)
    pruner.unwrap_model()
    remove(network, masks, example())
    assert relative_error(output(network), masked) <= TOLERANCE
    assert width(network, "4.0") == 5


def test_a_config_takes_ratios_by_group_and_refuses_wrong_ones() -> None:
    network = tiny("plain")
    config = make_config(network, example(), sparse_ratio={"0.0": 0.25})
    _, masks = L1NormPruner(network, config).compress()
    assert set(masks) == {"0.0", "0.1"}
    with pytest.raises(ConfigError, match="`nowhere` is no channel group") as found:
        make_config(tiny("plain"), example(), sparse_ratio={"nowhere": 0.5, "0.0": 1.5})
    assert len(found.value.problems) == 2


def conv_masks(network: nn.Module) -> Any:
    """Masks of convolutions alone, as a plain config of theirs leaves them."""
    pruner = L1NormPruner(network, HALF)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return masks


def test_masks_behind_which_channels_live_on_are_refused() -> None:
    network = tiny("plain")
    masks = conv_masks(network)
    before = snapshot(network)
    with pytest.raises(SurgeryError, match=r"`1.0`: read by `2.fc`, not masked: `1.1`"):
        remove(network, masks, example())
    assert snapshot(network) == before
    remove(network, masks, example(), align=True)
    assert [width(network, name) for name in ("0.0", "1.0")] == [4, 6]


def test_what_cannot_be_removed_stays_as_zeros() -> None:
    network = tiny("residual")
    single = LevelPruner(network, [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.6}])
    _, masks = single.compress()
    masked = output(network)
    single.unwrap_model()
    remove(network, masks, example())
    assert relative_error(output(network), masked) <= TOLERANCE
    assert float((network[0][0].weight == 0).float().mean()) >= 0.5
    half = tiny("residual")
    one_sided = {"0.0": {"weight": torch.ones(8, 3, 3, 3)}}
    one_sided["0.0"]["weight"][:4] = 0  # coupled layers disagree
    remove(half, one_sided, example())
    assert width(half, "0.0") == 8
    assert not half[0][0].weight[:4].any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: m["0.0"].update(weight=torch.zeros(8, 3, 3, 3)),
            "close all 8 channels of `0.0`",
        ),
        (lambda m: m["0.0"].update(weight=torch.ones(9, 3, 3, 3)), "changed since the masks"),
        (lambda m: m.update(gone={"weight": torch.ones(1)}), "`gone` is not in the network"),
        (lambda m: m["0.0"].update(_output_0=torch.ones(1, 8, 1, 1)), "`_output_0`"),
        (lambda m: m["0.0"].update(weight=torch.full((8, 3, 3, 3), 0.5)), "other values"),
    ],
)
@pytest.mark.parametrize("way", [remove, speedup])
def test_wrong_masks_are_refused_and_the_network_left_as_found(
    change: Any, words: str, way: Any
) -> None:
    network = tiny("plain")
    masks = conv_masks(network)
    before = snapshot(network)
    change(masks)
    with pytest.raises(ConfigError, match=words):
        way(network, masks, example())
    assert snapshot(network) == before


def test_a_wrapped_network_is_not_cut() -> None:
    network = tiny("plain")
    _, masks = L1NormPruner(network, HALF).compress()
    for way in (remove, speedup):
        with pytest.raises(ConfigError, match="unwrap_model"):
            way(network, masks, example())


def test_speedup_says_when_it_computes_something_else() -> None:
    network = tiny("plain")
    masks = conv_masks(network)
    with pytest.raises(SurgeryError, match="computes something else"):
        speedup(network, masks, example())
