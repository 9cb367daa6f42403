"""The torch-pruning door: their loop, our gates, exact removal."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch_pruning as tp
from helpers import same_tensors, snapshot
from networks import TINY, example, tiny, torchvision_network
from torch import nn

from wgates_plugin import PruningPlan, rebuild, trace
from wgates_plugin.efficiency import Budget, Limit, LPNet, MacsModel, ParametersModel
from wgates_plugin.errors import (
    ConfigError,
    InfeasibleTargetError,
    PlanError,
    TargetError,
    TraceError,
)
from wgates_plugin.integrations.torch_pruning import (
    GDPImportance,
    WGatesImportance,
    WGatesPruner,
)
from wgates_plugin.pipeline import prune_to_target
from wgates_plugin.strategies import WGatesSettings
from wgates_plugin.strategies.criteria_repaired import HessianImportance, TaylorImportance
from wgates_plugin.strategies.gdp import PolarisedGates
from wgates_plugin.targets import MacsTarget, PruningSettings
from wgates_plugin.training import Trainer, TrainingSettings
from wgates_plugin.verification import TOLERANCE, removal_error

SETTINGS = WGatesSettings(learning_rate=0.05)
AT_ONCE = WGatesSettings(learning_rate=0.05, measuring=0)
"""Gates that act and learn from the first step on."""


def learn(
    pruner: WGatesPruner,
    network: nn.Module,
    steps: int = 4,
    size: int = 8,
    batch: int = 8,
    rate: float = 0.02,
) -> dict[str, float]:
    """A training loop with the gates in it."""
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    network.train()
    monitor: dict[str, float] = {}
    for seed in range(steps):
        labels = torch.randint(5, (batch,), generator=torch.Generator().manual_seed(seed))
        logits = network(example(batch, size, seed))
        logits = logits.flatten(2).mean(2) if logits.dim() > 2 else logits
        loss = nn.functional.cross_entropy(logits, labels % logits.shape[1])
        optimizer.zero_grad()
        loss.backward()
        monitor = pruner.regularize(network, loss)
        optimizer.step()
    return monitor


def macs(network: nn.Module) -> float:
    space = trace(network, example(), verify=False)
    return float(MacsModel(space)(torch.tensor(space.full_widths)))


def law_1(pruner: WGatesPruner, fresh: nn.Module, before: Any, inputs: torch.Tensor) -> float:
    """Error between the pruned network and its twin, gated by the composed plan."""
    assert pruner.plan is not None
    fresh.load_state_dict(before)
    return removal_error(fresh, pruner.model, pruner.plan, inputs)


# Exact removal


@pytest.mark.parametrize("name", TINY)
def test_the_loop_ends_in_an_exact_removal_at_the_ratio(name: str) -> None:
    network = tiny(name)
    pruner = WGatesPruner(network, example(), pruning_ratio=0.5, settings=SETTINGS)
    assert isinstance(pruner, tp.pruner.BasePruner)
    assert learn(pruner, network)["step"] == 4.0
    before = copy.deepcopy(network.state_dict())
    assert pruner.step() is None
    assert law_1(pruner, tiny(name), before, example()) <= TOLERANCE
    assert pruner.plan is not None
    for group, width in zip(pruner.space.groups, pruner.plan.widths, strict=True):
        assert width == max(1, group.units // 2) * group.ties
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.modules())
    network.train()(example()).sum().backward()


@pytest.mark.parametrize("name", ["residual", "grouped", "concat", "depthwise", "flattened"])
def test_the_loop_ends_in_an_exact_removal_under_the_target(name: str) -> None:
    network = tiny(name)
    target = 0.5 * macs(network)
    pruner = WGatesPruner(network, example(), target=target, settings=SETTINGS)
    learn(pruner, network)
    before = copy.deepcopy(network.state_dict())
    pruner.step()
    assert law_1(pruner, tiny(name), before, example()) <= TOLERANCE
    assert macs(network) <= target


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "densenet121", "efficientnet_b0", "resnext50_32x4d"]
)
def test_law_1_through_this_door_on_torchvision(name: str) -> None:
    network = torchvision_network(name)
    inputs = example(2, 32)
    pruner = WGatesPruner(network, inputs, pruning_ratio=0.4, round_to=4, settings=SETTINGS)
    learn(pruner, network, steps=1, size=64, batch=4, rate=1e-4)
    before = copy.deepcopy(network.state_dict())
    pruner.step()
    assert law_1(pruner, torchvision_network(name), before, example(2, 64)) <= TOLERANCE


def test_interactive_removal_is_lazy_and_equals_the_other() -> None:
    networks = [tiny("concat") for _ in range(2)]
    pruners = [
        WGatesPruner(network, example(), pruning_ratio=0.5, settings=SETTINGS)
        for network in networks
    ]
    for pruner, network in zip(pruners, networks, strict=True):
        learn(pruner, network)
    pruners[0].step()
    parameters = [sum(p.numel() for p in networks[1].parameters())]
    groups = pruners[1].step(interactive=True)
    assert groups is not None
    assert iter(groups) is groups
    for group in groups:
        assert sum(p.numel() for p in networks[1].parameters()) == parameters[-1]
        group.prune()
        parameters.append(sum(p.numel() for p in networks[1].parameters()))
    assert len(parameters) > 2
    assert parameters == sorted(set(parameters), reverse=True)
    assert same_tensors(networks[0].state_dict(), networks[1].state_dict())


def test_a_second_step_is_refused() -> None:
    network = tiny("residual")
    pruner = WGatesPruner(network, example(), pruning_ratio=0.5)
    learn(pruner, network, steps=1)
    pruner.step()
    after = snapshot(network)
    with pytest.raises(PlanError, match="pruned already"):
        pruner.step()
    assert snapshot(network) == after


def test_a_step_before_learning_is_refused() -> None:
    network = tiny("residual")
    pruner = WGatesPruner(network, example(), pruning_ratio=0.5)
    with pytest.raises(PlanError, match=r"call `regularize\(model\)`"):
        pruner.step()
    learn(pruner, network, steps=1)
    pruner.step()


def test_another_model_is_refused_but_a_wrapper_is_not() -> None:
    network = tiny("residual")
    pruner = WGatesPruner(network, example(), pruning_ratio=0.5)
    with pytest.raises(PlanError, match="another model"):
        pruner.regularize(tiny("residual"))
    network.train()(example()).sum().backward()
    wrapper = nn.Module()
    wrapper.module = network
    assert pruner.regularize(wrapper)["step"] == 1.0


def test_detaching_gives_the_network_back() -> None:
    network = tiny("residual")
    for index, parameter in enumerate(network.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    before, state = snapshot(network), torch.get_rng_state()
    pruner = WGatesPruner(network, example(), pruning_ratio=0.5)
    assert pruner.detach() is network
    assert snapshot(network) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"efficiency": MacsModel}, ConfigError, "give its `target`"),
        ({"target": 1e4, "pruning_ratio": 0.5}, ConfigError, "either a target or ratios"),
        ({"target": 1e4, "pruning_ratio_dict": {nn.ReLU(): 0.5}}, ConfigError, "either a target"),
        ({"target": 1e4, "isomorphic": True}, ConfigError, "isomorphic: the budget decides"),
        ({"target": 1e4, "global_pruning": True}, ConfigError, "global_pruning: the budget"),
        ({"min_channels": -1}, ConfigError, "min_channels -1: needs a whole number from 0"),
        ({"min_channels": 2.5}, ConfigError, "min_channels 2.5"),
        ({"min_fraction": float("nan")}, ConfigError, "min_fraction nan: needs a number from 0"),
        ({"min_fraction": 1.5}, ConfigError, "min_fraction 1.5: needs a number from 0 to 1"),
        ({"floors": {"0.0": 0}}, ConfigError, "floors of '0.0' 0: needs a whole number from 1"),
        ({"caps": [3]}, ConfigError, r"caps \[3\]: needs a mapping"),
        ({"iterative_steps": 1.0}, ConfigError, "iterative_steps 1.0: needs a whole"),
        ({"iterative_pruning_ratio_scheduler": 3}, ConfigError, "scheduler 3: needs a function"),
        ({"iterative_pruning_ratio_scheduler": lambda: 1}, ConfigError, "scheduler: fails for"),
        ({"importance": TaylorImportance()}, ConfigError, "by gradients, and the model has none"),
        ({"importance": HessianImportance()}, ConfigError, "squared gradients, and has none"),
        ({"importance": "l1"}, ConfigError, "importance str: is not callable"),
        ({"average": 1}, ConfigError, "average 1: needs a function"),
        ({"steps": 0}, ConfigError, "steps 0: needs a whole number from 1"),
        ({"pruning_ratio": 1.5}, ConfigError, "needs a number from 0 to 1"),
        ({"pruning_ratio": "half"}, ConfigError, "needs a number from 0 to 1"),
        ({"pruning_ratio": float("nan")}, ConfigError, "pruning_ratio nan: needs a number"),
        ({"pruning_ratio_dict": {nn.ReLU(): 1.2}}, ConfigError, "pruning_ratio_dict value 1.2"),
        ({"max_pruning_ratio": -0.1}, ConfigError, "max_pruning_ratio -0.1"),
        ({"iterative_steps": 0}, ConfigError, "whole number from 1"),
        ({"pruning_ratio_dict": {nn.ReLU(): 0.5}}, ConfigError, "no module of the network"),
        ({"ignored_layers": [nn.Linear, nn.LSTM]}, ConfigError, "no LSTM"),
        ({"root_module_types": [nn.LSTM]}, ConfigError, "none is prunable"),
        ({"iterative_pruning_ratio_scheduler": lambda r, n: [r]}, ConfigError, "scheduler: gave"),
        ({"unwrapped_parameters": [(nn.Parameter(torch.ones(2)), 0)]}, ConfigError, "entry 0"),
        ({"target": -3.0}, TargetError, "positive finite"),
        ({"target": 1.0}, InfeasibleTargetError, "out of reach"),
        ({"pruning_ratio": 0.5, "floors": {"nowhere": 1}}, TraceError, "no prunable group"),
        ({"pruning_ratio": 0.5, "round_to": 0}, ConfigError, "round_to 0: needs"),
        ({"pruning_ratio": 0.5, "settings": WGatesSettings(start="open")}, ConfigError, "steps"),
    ],
)
def test_wrong_arguments_leave_the_network_as_found(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    network = tiny("residual").train()
    before = snapshot(network)
    with pytest.raises(error, match=words):
        WGatesPruner(network, example(), **options)
    assert snapshot(network) == before


def test_gradients_taken_before_serve_a_criterion_of_gradients() -> None:
    network = tiny("plain")
    network(example(8)).square().mean().backward()
    pruner = WGatesPruner(network, example(), TaylorImportance(), pruning_ratio=0.5)
    weight = network[0][0].weight
    assert weight.grad is not None
    ranked = WGatesPruner(tiny("plain"), example(), pruning_ratio=0.5).gates.unit_scores()
    assert not torch.equal(pruner.gates.unit_scores(), ranked)


def test_every_form_of_efficiency() -> None:
    network = tiny("plain")
    space = trace(network, example())
    lpnet = LPNet.fit(
        space, [[k, k + 2] for k in range(1, 9)], [1.0 + k for k in range(8)], structure="mlp"
    )
    forms: list[tuple[Any, float | None]] = [
        (None, 2e4),
        (MacsModel, 2e4),
        (MacsModel(space), 2e4),
        (lambda space: ParametersModel(space), 600.0),
        (lpnet, 5.0),
        (lambda space: lpnet, 5.0),
        (Budget.of(Limit(MacsModel(space), 2e4), Limit(ParametersModel(space), 600.0)), None),
    ]
    for efficiency, target in forms:
        fresh = tiny("plain")
        pruner = WGatesPruner(fresh, example(), efficiency=efficiency, target=target)
        learn(pruner, fresh, steps=1)
        pruner.step()
        assert pruner.plan is not None
        widths = torch.tensor(pruner.plan.widths)
        for limit in pruner.budget.limits:
            assert float(limit.model(widths)) <= limit.target
    with pytest.raises(ConfigError, match="target: a Budget holds its targets"):
        WGatesPruner(tiny("plain"), example(), efficiency=forms[-1][0], target=2e4)


def test_round_to_and_ignored_layers() -> None:
    network = tiny("concat")
    pruner = WGatesPruner(
        network, example(), pruning_ratio=0.3, round_to=2, ignored_layers=[network[0]]
    )
    learn(pruner, network)
    pruner.step()
    assert network[0][0].out_channels == 6
    assert pruner.plan is not None
    widths = dict(zip(pruner.space.names, pruner.plan.widths, strict=True))
    assert set(widths.values()) == {2, 6}  # 4 -> 2.8 -> 2, 9 -> 6.3 -> 6


def test_frozen_layers_are_pruned_and_stay_frozen() -> None:
    network = tiny("residual")
    network[0].requires_grad_(False)
    pruner = WGatesPruner(network, example(), pruning_ratio=0.6, settings=SETTINGS)
    learn(pruner, network)
    pruner.step()
    assert network[0][0].out_channels < 8
    assert not any(p.requires_grad for p in network[0].parameters())
    assert all(p.requires_grad for p in network[1].parameters())


def test_pruners_can_follow_one_another() -> None:
    network = tiny("residual")
    start = macs(network)
    for _ in range(2):
        before = macs(network)
        pruner = WGatesPruner(network, example(), target=0.7 * before)
        with pytest.raises(TraceError, match="gates are attached"):
            WGatesPruner(network, example(), pruning_ratio=0.3)
        learn(pruner, network, steps=2)
        pruner.step()
        assert macs(network) <= 0.7 * before
    assert macs(network) <= 0.5 * start


def test_a_resumed_pruner_removes_the_same() -> None:
    network = tiny("residual")
    pruner = WGatesPruner(network, example(), pruning_ratio=0.5, settings=SETTINGS)
    learn(pruner, network, steps=2)
    state = copy.deepcopy((pruner.state_dict(), network.state_dict()))
    twin = tiny("residual")
    resumed = WGatesPruner(twin, example(), pruning_ratio=0.5, settings=SETTINGS)
    resumed.load_state_dict(state[0])
    twin.load_state_dict(state[1])
    pruner.step()
    resumed.step()
    assert same_tensors(network.state_dict(), twin.state_dict())


# torch-pruning's words


def sparse_training(pruner_class: Any, network: nn.Module) -> Any:
    """torch-pruning's sparse-training example; the class is the only thing that differs."""
    example_inputs = example()
    imp = tp.importance.GroupMagnitudeImportance(p=2)
    ignored_layers = []
    for m in network.modules():
        if isinstance(m, torch.nn.Linear) and m.out_features == 5:
            ignored_layers.append(m)
    iterative_steps = 2
    pruner = pruner_class(
        network,
        example_inputs,
        importance=imp,
        iterative_steps=iterative_steps,
        pruning_ratio=0.5,
        ignored_layers=ignored_layers,
        unwrapped_parameters=[],
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
    for epoch in range(2):
        network.train()
        pruner.update_regularizer()
        for seed in range(3):
            data = example(8, seed=3 * epoch + seed)
            target = torch.randint(5, (8,), generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            out = network(data)
            loss = nn.functional.cross_entropy(out, target)
            loss.backward()
            pruner.regularize(network)
            optimizer.step()
    network.eval()
    base_macs, base_nparams = tp.utils.count_ops_and_params(network, example_inputs)
    for _ in range(iterative_steps):
        pruner.step()
        macs, nparams = tp.utils.count_ops_and_params(network, example_inputs)
        assert macs < base_macs
        assert nparams < base_nparams
    return pruner


@pytest.mark.parametrize("name", ["residual", "projection", "depthwise"])
def test_one_line_changes_in_torch_prunings_own_loop(name: str) -> None:
    theirs, ours = tiny(name), tiny(name)
    sparse_training(tp.pruner.GroupNormPruner, theirs)
    pruner = sparse_training(WGatesPruner, ours)
    assert pruner.current_step == 2
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in ours.modules())
    # Local pruning leaves both with the same widths.
    shapes = [[tuple(p.shape) for p in network.parameters()] for network in (theirs, ours)]
    assert shapes[0] == shapes[1]


def test_torch_prunings_progressive_loop() -> None:
    """Their benchmark's loop: many small steps after one training, until fast enough."""
    network = tiny("concat")
    pruner = WGatesPruner(network, example(), None, pruning_ratio=1.0, iterative_steps=12)
    learn(pruner, network, steps=2)
    network.eval()
    base_ops, _ = tp.utils.count_ops_and_params(network, example_inputs=example())
    current_speed_up = 1.0
    while current_speed_up < 2.0:
        pruner.step(interactive=False)
        pruned_ops, _ = tp.utils.count_ops_and_params(network, example_inputs=example())
        current_speed_up = float(base_ops) / pruned_ops
        if pruner.current_step == pruner.iterative_steps:
            break
    assert 2.0 <= current_speed_up < 3.0
    assert 2 < pruner.current_step < 12
    pruner.detach()(example())


def test_importance_says_where_the_gates_start() -> None:
    network = tiny("plain")
    with torch.no_grad():
        network[0][0].weight[:4] *= 10
        network[0][1].weight.copy_(torch.arange(8) * 1.0)
    starts = []
    for importance in (None, tp.importance.BNScaleImportance()):
        pruner = WGatesPruner(network, example(), importance, pruning_ratio=0.5)
        scores = pruner.gates.unit_scores()[:8]
        starts.append(scores.topk(4).indices.sort().values.tolist())
        pruner.detach()
    assert starts == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_every_option_that_cannot_be_honoured_is_named_at_once() -> None:
    network = tiny("residual").train()
    before = snapshot(network)
    with pytest.raises(ConfigError) as error:
        WGatesPruner(
            network,
            example(),
            customized_pruners={nn.ReLU: object()},
            num_heads={network[2].fc: 2},
            prune_num_heads=True,
            forward_fn=lambda *_: None,
            ch_sparsity=0.5,
            reg=1e-4,
            colour="red",
            pruning_ratio=3,
        )
    named = [problem.split(":")[0].split(" ")[0] for problem in error.value.problems]
    assert sorted(named) == [
        "ch_sparsity",
        "colour",
        "customized_pruners",
        "forward_fn",
        "num_heads",
        "prune_num_heads",
        "pruning_ratio",
        "reg",
    ]
    assert snapshot(network) == before


def test_contradictory_options_are_named_at_once() -> None:
    network = tiny("residual").train()
    before = snapshot(network)
    with pytest.raises(ConfigError) as error:
        WGatesPruner(
            network,
            example(),
            tp.importance.MagnitudeImportance(),
            settings=WGatesSettings(start="open"),
            efficiency=MacsModel,
            pruning_ratio=0.5,
            pruning_ratio_dict={network[0]: 0.2},
            isomorphic=True,
            max_pruning_ratio=2,
            iterative_steps=0,
            ignored_layers=[nn.LSTM],
            root_module_types=[nn.LSTM],
            unwrapped_parameters=[(nn.Parameter(torch.ones(2)), 0)],
            round_to=0,
            global_pruning=True,
            min_channels=-2,
            min_fraction=2.0,
            iterative_pruning_ratio_scheduler="linear",
            average=0.5,
        )
    assert error.value.subject == "WGatesPruner"
    named = [problem.split(":")[0].split(" ")[0] for problem in error.value.problems]
    assert sorted(named) == [
        "average",
        "efficiency",
        "global_pruning",
        "ignored_layers",
        "importance",
        "isomorphic",
        "iterative_pruning_ratio_scheduler",
        "iterative_steps",
        "max_pruning_ratio",
        "min_channels",
        "min_fraction",
        "pruning_ratio",
        "pruning_ratio_dict",
        "root_module_types",
        "round_to",
        "steps",
        "unwrapped_parameters",
    ]
    assert snapshot(network) == before


def test_a_wrong_target_is_named_among_other_problems() -> None:
    with pytest.raises(ConfigError) as error:
        WGatesPruner(tiny("plain"), example(), target=-3.0, iterative_steps=0)
    assert len(error.value.problems) == 2
    assert "target -3.0: must be a positive" in str(error.value)


def test_a_target_of_milliseconds_without_a_latency_model_is_seen_through() -> None:
    words = r"target 8 MACs: without `efficiency`.*milliseconds\? Give `efficiency=LPNet"
    with pytest.raises(InfeasibleTargetError, match=words):
        WGatesPruner(tiny("plain"), example(), target=8)
    with pytest.raises(InfeasibleTargetError, match=r"^macs: target 8 MACs is out of reach"):
        WGatesPruner(tiny("plain"), example(), efficiency=MacsModel, target=8)


@pytest.mark.parametrize("given", [{}, {"efficiency": MacsModel}])
def test_a_target_that_holds_already_is_warned_of(given: dict[str, Any]) -> None:
    network = tiny("plain")
    with pytest.warns(UserWarning, match="nothing will be removed") as found:
        WGatesPruner(network, example(), target=2 * macs(network), **given).detach()
    assert found[0].filename == __file__


def test_the_network_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[Any] = []
    build = tp.DependencyGraph.build_dependency

    def counted(*args: Any, **words: Any) -> Any:
        traced.append(args)
        return build(*args, **words)

    monkeypatch.setattr(tp.DependencyGraph, "build_dependency", counted)
    pruner = WGatesPruner(tiny("plain"), example())
    assert len(traced) == 1
    assert traced[0][0] is pruner.DG


@pytest.mark.parametrize("name", ["residual", "grouped", "depthwise", "flattened"])
def test_it_has_what_its_siblings_have(name: str) -> None:
    network = tiny(name)
    words: dict[str, Any] = {"pruning_ratio": 0.6, "iterative_steps": 2, "round_to": 2}
    theirs = tp.pruner.BasePruner(
        network,
        example(),
        None,
        **words,
        ignored_layers=[network[0]],
        in_channel_groups={},
        out_channel_groups={},
    )
    ours = WGatesPruner(network, example(), ignored_layers=[network[0]], **words)
    assert vars(theirs).keys() <= vars(ours).keys()
    told_apart = {"DG", "importance", "iterative_pruning_ratio_scheduler", "initial_total_channels"}
    own = set(network.modules())  # graphs have nodes of their own for operations
    for key in vars(theirs).keys() - told_apart:
        values = [getattr(pruner, key) for pruner in (ours, theirs)]
        if isinstance(values[0], dict):
            values = [{k: v for k, v in value.items() if k in own} for value in values]
        assert values[0] == values[1], key
    assert ours.layer_init_out_ch[network[0][0]] > 1
    assert ours.pruning_history() == theirs.pruning_history() == []


@pytest.mark.parametrize("name", ["residual", "grouped", "concat", "flattened"])
@pytest.mark.parametrize("options", [{}, {"global_pruning": True}, {"floors": 3}])
def test_asking_for_everything_empties_no_layer(name: str, options: dict[str, Any]) -> None:
    network = tiny(name)
    if "floors" in options:
        options = {"floors": dict.fromkeys(trace(network, example()).names[:1], options["floors"])}
    pruner = WGatesPruner(network, example(), pruning_ratio=1.0, settings=SETTINGS, **options)
    learn(pruner, network, steps=1)
    before = copy.deepcopy(network.state_dict())
    pruner.step()
    assert pruner.plan is not None
    assert pruner.plan.widths == pruner.space.least_widths()
    assert min(pruner.plan.widths) >= 1
    assert law_1(pruner, tiny(name), before, example()) <= TOLERANCE


def test_masks_that_would_empty_a_layer_are_refused() -> None:
    network = tiny("residual")
    pruner = WGatesPruner(network, example(), pruning_ratio=0.5)
    nothing = torch.zeros(pruner.space.total_units, dtype=torch.bool)
    with pytest.raises(PlanError, match=r"keeps 0 of 8 channels, its floor is 1"):
        PruningPlan.from_masks(pruner.space, nothing)


def test_options_at_torch_prunings_defaults_ask_for_nothing() -> None:
    network = tiny("residual")
    WGatesPruner(
        network,
        example(),
        customized_pruners=None,
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        prune_num_heads=False,
        prune_head_dims=True,
        head_pruning_ratio=0.0,
        head_pruning_ratio_dict=None,
        forward_fn=None,
        output_transform=None,
        channel_groups={},
        ch_sparsity=None,
        ch_sparsity_dict=None,
        root_module_types=[tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR, tp.ops.TORCH_LSTM],
    ).detach()
    with pytest.raises(ConfigError, match="alpha: no coefficient"):
        WGatesPruner(network, example()).regularize(network, alpha=4)


@pytest.mark.parametrize(
    "flawed", [tp.importance.TaylorImportance(), tp.importance.HessianImportance()]
)
def test_flawed_importances_are_refused_with_the_reason(flawed: Any) -> None:
    with pytest.raises(ConfigError, match="use the criterion"):
        WGatesPruner(tiny("plain"), example(), flawed)


def test_ratios_of_single_modules_and_of_scopes() -> None:
    network = tiny("concat")
    own = {network[0]: 0.5, (network[1].layers[0], network[1].layers[1]): 0.25}
    pruner = WGatesPruner(network, example(), pruning_ratio=0.0, pruning_ratio_dict=own)
    learn(pruner, network, steps=1)
    pruner.step()
    assert pruner.plan is not None
    assert pruner.plan.widths == (3, 3, 3, 4, 9)


def test_two_ratios_for_coupled_layers_are_refused() -> None:
    network = tiny("residual")
    with pytest.raises(ConfigError, match=r"gets 0.5 and 0.2 .* are coupled"):
        WGatesPruner(
            network, example(), pruning_ratio_dict={network[0][0]: 0.5, network[1].main[1]: 0.2}
        )


def test_global_ranking_keeps_the_share_over_all_groups() -> None:
    network = tiny("plain")
    pruner = WGatesPruner(
        network,
        example(),
        pruning_ratio=0.5,
        global_pruning=True,
        max_pruning_ratio=0.75,
        settings=AT_ONCE,
    )
    learn(pruner, network, steps=1)
    with torch.no_grad():  # the first layer's gates all say no, the second's all yes
        pruner.gates.scores.offset[:8] = -0.4
        pruner.gates.scores.offset[8:] = 0.4
    pruner.step()
    assert pruner.plan is not None
    assert pruner.plan.widths == (2, 8)


def test_isomorphic_ranking_is_by_structure() -> None:
    network = tiny("preactivation")
    pruner = WGatesPruner(network, example(), pruning_ratio=0.5, isomorphic=True, settings=AT_ONCE)
    learn(pruner, network, steps=1)
    with torch.no_grad():  # of the two inner layers, of like structure, the first says no
        where = [pruner.space.unit_slice(index) for index in range(3)]
        pruner.gates.scores.offset[where[1]] = -0.4
        pruner.gates.scores.offset[where[2]] = 0.4
    pruner.step()
    assert pruner.plan is not None
    assert pruner.plan.widths == (4, 1, 4)


def test_root_module_types_choose_the_groups() -> None:
    network = tiny("flattened")
    pruner = WGatesPruner(network, example(), root_module_types=[nn.Linear])
    assert pruner.space.names == ("2",)
    pruner.detach()


def test_layer_types_can_be_ignored() -> None:
    pruner = WGatesPruner(tiny("flattened"), example(), ignored_layers=[nn.Conv2d])
    assert pruner.space.names == ("2",)


# Iterative steps, histories, states


@pytest.mark.parametrize("goal", [{"pruning_ratio": 0.6}, {"target": None}])
@pytest.mark.parametrize("between", [0, 1])
def test_iterative_steps_end_where_one_would(goal: dict[str, Any], between: int) -> None:
    network = tiny("concat")
    full = macs(network)
    if "target" in goal:
        goal = {"target": 0.4 * full, "efficiency": MacsModel}
    pruner = WGatesPruner(network, example(), iterative_steps=3, settings=SETTINGS, **goal)
    learn(pruner, network, steps=2)
    sizes = [full]
    cost = MacsModel(pruner.space)
    for step in range(3):
        if step:
            learn(pruner, network, steps=between)  # 0: straight on, with what was learned
        pruner.step()
        assert pruner.plan is not None
        sizes.append(float(cost(torch.tensor(pruner.plan.widths))))
    assert sizes[-1] == macs(network)
    assert sizes == sorted(set(sizes), reverse=True)
    assert pruner.plan is not None
    if "target" in goal:
        for step, size in enumerate(sizes):
            assert size <= full - 0.6 * full * step / 3
    else:
        assert pruner.plan.widths == (2, 1, 1, 1, 3)
    # The composed plan rebuilds the network from the original class.
    twin = rebuild(tiny("concat"), pruner.plan, network.state_dict())
    assert torch.equal(twin(example()), network.eval()(example()))
    with pytest.raises(PlanError, match="pruned already, in 3"):
        pruner.step()
    with pytest.raises(PlanError, match="fine-tune it without"):
        pruner.regularize(network)


def test_gates_of_a_later_step_start_from_what_was_learned() -> None:
    network = tiny("plain")
    pruner = WGatesPruner(
        network, example(), pruning_ratio=0.5, iterative_steps=2, settings=AT_ONCE
    )
    learn(pruner, network, steps=1)
    order = torch.tensor([3, 1, 4, 0, 5, 7, 2, 6])
    with torch.no_grad():
        pruner.gates.scores.offset[:8] = order / 100
    pruner.step()
    pruner.step()
    assert pruner.plan is not None
    assert pruner.plan.kept[0] == (2, 4, 5, 7)


@pytest.mark.parametrize("goal", [{"pruning_ratio": 0.6}, {"target": 3e4}])
def test_gates_of_every_step_measure_anew(goal: dict[str, Any]) -> None:
    """Until they have, they hold to what the step before learned."""
    network = tiny("concat")
    settings = WGatesSettings(learning_rate=0.05, measuring=2, rounds=1)
    pruner = WGatesPruner(network, example(), iterative_steps=2, settings=settings, **goal)
    learn(pruner, network, steps=4)
    learned = pruner.gates.unit_scores()
    pruner.step()
    assert pruner.plan is not None
    kept = pruner.plan.kept
    left = [
        learned[pruner.space.unit_slice(index)][list(kept[index])].argsort().tolist()
        for index, name in enumerate(pruner.space.names)
        if name in pruner._now.names
    ]
    carried = pruner.gates.unit_scores()
    assert left == [
        carried[pruner._now.unit_slice(index)].argsort().tolist()
        for index in range(len(pruner._now.groups))
    ]
    assert pruner.gates.merits.wanted
    monitor = learn(pruner, network, steps=2)
    assert monitor["open_share"] == 1.0
    assert not pruner.gates.merits.wanted
    assert not torch.equal(pruner.gates.unit_scores(), carried)
    assert learn(pruner, network, steps=1)["open_share"] < 1.0
    pruner.step()


def test_a_given_importance_leaves_nothing_to_measure() -> None:
    network = tiny("plain")
    pruner = WGatesPruner(network, example(), tp.importance.LAMPImportance(), iterative_steps=2)
    for _ in range(2):
        assert not pruner.gates.merits.wanted
        assert learn(pruner, network, steps=1)["open_share"] < 1.0
        pruner.step()


def test_ratios_say_how_wide_and_measuring_says_which() -> None:
    network = tiny("plain")
    with torch.no_grad():  # nothing reads the larger half of the first layer
        network[0][0].weight[4:] *= 10
        network[1][0].weight[:, 4:] = 0
    kept = []
    for measuring in (0, 3):
        settings = WGatesSettings(measuring=measuring)
        pruner = WGatesPruner(copy.deepcopy(network), example(), settings=settings)
        learn(pruner, pruner.model, steps=3, rate=0.0)
        assert pruner.gates.widths() == (4, 6)
        pruner.step()
        assert pruner.plan is not None
        kept.append(pruner.plan.kept[0])
    assert kept == [(4, 5, 6, 7), (0, 1, 2, 3)]


def test_open_gates_have_to_learn_before_every_step() -> None:
    network = tiny("plain")
    settings = WGatesSettings(start="open", learning_rate=0.05)
    pruner = WGatesPruner(network, example(), iterative_steps=2, settings=settings, steps=1)
    learn(pruner, network, steps=1)
    pruner.step()
    with pytest.raises(PlanError, match="never learned"):
        pruner.step()


def test_an_unfinished_interactive_step_is_noticed() -> None:
    network = tiny("concat")
    pruner = WGatesPruner(network, example(), iterative_steps=2)
    learn(pruner, network, steps=1)
    groups = pruner.step(interactive=True)
    assert groups is not None
    next(groups).prune()
    with pytest.raises(PlanError, match="half pruned"):
        pruner.step()
    with pytest.raises(PlanError, match="not finished"):
        pruner.state_dict()


@pytest.mark.parametrize("name", ["residual", "grouped", "concat", "flattened"])
def test_a_history_prunes_a_fresh_network_alike(name: str) -> None:
    network = tiny(name)
    pruner = WGatesPruner(network, example(), iterative_steps=2)
    learn(pruner, network, steps=1)
    pruner.step()
    pruner.step()
    history = pruner.pruning_history()
    assert pruner.plan is not None
    fresh = tiny(name)
    other = WGatesPruner(fresh, example())
    other.load_pruning_history(history)
    assert other.plan is not None
    assert other.plan.kept == pruner.plan.kept
    assert other.pruning_history() == history
    other.detach()
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh.eval()(example()), network.eval()(example()))
    # torch-pruning's own reader understands it.
    third = tiny(name)
    tp.DependencyGraph().build_dependency(third, (example(),)).load_pruning_history(history)
    assert [p.shape for p in third.parameters()] == [p.shape for p in network.parameters()]


def test_a_history_of_torch_prunings_pruner_is_read() -> None:
    network = tiny("concat")
    theirs = tp.pruner.BasePruner(
        network,
        (example(),),
        tp.importance.RandomImportance(),
        pruning_ratio=0.5,
        ignored_layers=[network[-1].fc],
        in_channel_groups={},
        out_channel_groups={},
    )
    theirs.step()
    fresh = tiny("concat")
    ours = WGatesPruner(fresh, example())
    ours.load_pruning_history(theirs.pruning_history())
    ours.detach()
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh.eval()(example()), network.eval()(example()))


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ([["nowhere", True, [0]]], "in no group"),
        ([["0.0", True, [8]]], "which has 8"),
        ([["0.0", True, [0] * 1], ["0.0", True, [7]]], "which has 7"),
        ([["0.0", True, list(range(8))]], "its floor"),
        ([["0.0", "?"]], "is no"),
    ],
)
def test_wrong_histories_are_refused(history: list[Any], words: str) -> None:
    network = tiny("residual")
    pruner = WGatesPruner(network, example())
    before = snapshot(network)
    with pytest.raises(PlanError, match=words):
        pruner.load_pruning_history(history)
    assert snapshot(network) == before


def test_a_state_between_steps_resumes_on_a_fresh_network() -> None:
    network = tiny("residual")
    options: dict[str, Any] = {"iterative_steps": 2, "settings": SETTINGS}
    pruner = WGatesPruner(network, example(), **options)
    learn(pruner, network, steps=2)
    pruner.step()
    learn(pruner, network, steps=1)
    state = copy.deepcopy((pruner.state_dict(), network.state_dict()))
    twin = tiny("residual")
    resumed = WGatesPruner(twin, example(), **options)
    resumed.load_state_dict(state[0])
    twin.load_state_dict(state[1])
    for one, net in ((pruner, network), (resumed, twin)):
        learn(one, net, steps=1)
        one.step()
    assert same_tensors(network.state_dict(), twin.state_dict())
    assert pruner.plan is not None
    assert resumed.plan is not None
    assert pruner.plan.kept == resumed.plan.kept
    with pytest.raises(PlanError, match="pruned already"):
        resumed.load_state_dict(state[0])


def test_states_load_without_executing_anything(tmp_path: Any) -> None:
    network = tiny("residual")
    pruner = WGatesPruner(network, example(), iterative_steps=2)
    learn(pruner, network, steps=1)
    pruner.step()
    torch.save(pruner.state_dict(), tmp_path / "pruner.pt")
    twin = tiny("residual")
    resumed = WGatesPruner(twin, example(), iterative_steps=2)
    resumed.load_state_dict(torch.load(tmp_path / "pruner.pt", weights_only=True))
    assert [p.shape for p in twin.parameters()] == [p.shape for p in network.parameters()]
    with pytest.raises(PlanError, match="a field is missing"):
        WGatesPruner(tiny("residual"), example()).load_state_dict({"step": 1})
    other = WGatesPruner(tiny("residual"), example())
    with pytest.raises(PlanError, match="2 steps are done"):
        other.load_state_dict({**pruner.state_dict(), "step": 2})
    with pytest.raises(PlanError, match="its gates do not fit"):
        other.load_state_dict({**pruner.state_dict(), "kept": None, "step": 0})


# Networks that change, calls that make no sense


def test_a_network_changed_since_tracing_is_refused() -> None:
    network = tiny("plain")
    pruner = WGatesPruner(network, example())
    learn(pruner, network, steps=1)
    network[1][0] = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
    before = snapshot(network)
    with pytest.raises(PlanError, match=r"`1\.0` is another module now"):
        pruner.step()
    assert snapshot(network) == before


def test_a_network_pruned_by_others_since_tracing_is_refused() -> None:
    network = tiny("plain")
    pruner = WGatesPruner(network, example())
    learn(pruner, network, steps=1)
    group = pruner.DG.get_pruning_group(network[0][0], tp.prune_conv_out_channels, [0])
    group.prune()
    with pytest.raises(PlanError, match="changed since it was traced"):
        pruner.step()


def test_calls_that_would_leave_the_gates_behind_are_refused() -> None:
    network = tiny("plain")
    pruner = WGatesPruner(network, example())
    with pytest.raises(PlanError, match="manual_prune_width"):
        pruner.manual_prune_width(network[0][0], tp.prune_conv_out_channels, 0.5)
    pruner.reset()
    learn(pruner, network, steps=1)
    pruner.step()
    with pytest.raises(PlanError, match="reset"):
        pruner.reset()


# Soft scores for other pruners


def fitted(name: str, ratio: float = 0.5) -> tuple[nn.Module, WGatesPruner]:
    network = tiny(name)
    pruner = WGatesPruner(network, example(), pruning_ratio=ratio, settings=SETTINGS)
    learn(pruner, network, steps=3)
    return network, pruner


@pytest.mark.parametrize("name", ["residual", "projection", "grouped", "concat", "flattened"])
@pytest.mark.parametrize("scope", ["local", "global", "isomorphic", "iterative"])
def test_soft_scores_serve_any_torch_pruning_pruner(name: str, scope: str) -> None:
    network, pruner = fitted(name)
    importance = WGatesImportance(pruner)
    pruner.detach()
    words: dict[str, Any] = {
        "local": {},
        "global": {"global_pruning": True, "max_pruning_ratio": 0.9},
        "isomorphic": {"global_pruning": True, "isomorphic": True, "max_pruning_ratio": 0.9},
        "iterative": {"iterative_steps": 2},
    }[scope]
    heads = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == 5]
    theirs = tp.pruner.BasePruner(
        network,
        (example(),),
        importance,
        pruning_ratio=0.5,
        ignored_layers=heads,
        in_channel_groups={},
        out_channel_groups={},
        **words,
    )
    before = sum(p.numel() for p in network.parameters())
    for _ in range(words.get("iterative_steps", 1)):
        theirs.step()
    assert sum(p.numel() for p in network.parameters()) < before
    network.eval()(example())
    if scope in ("local", "iterative"):  # what the gates would have kept, they keep
        twin, learner = fitted(name)
        learner.step()
        assert same_tensors(network.state_dict(), twin.state_dict())


def test_soft_scores_by_root_index() -> None:
    network, pruner = fitted("residual")
    importance = WGatesImportance(pruner.gates)
    graph = pruner.DG
    root = network[1].main[1]  # not the layer that our group is named after
    group = graph.get_pruning_group(root, tp.prune_conv_out_channels, [6, 2, 5])
    found = importance(group)
    expected = pruner.gates.unit_scores()[pruner.space.unit_slice(0)][[6, 2, 5]] + 0.5
    assert found is not None
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.equal(found, pruner.estimate_importance(group))
    unknown = graph.get_pruning_group(network[2].fc, tp.prune_linear_out_channels, [0])
    assert importance(unknown) is None


def test_soft_scores_need_gates_that_learned_and_their_network() -> None:
    network = tiny("residual")
    pruner = WGatesPruner(network, example())
    with pytest.raises(PlanError, match="never learned"):
        WGatesImportance(pruner)
    with pytest.raises(PlanError, match="got Sequential"):
        WGatesImportance(network)
    learn(pruner, network, steps=1)
    importance = WGatesImportance(pruner)
    pruner.step()
    with pytest.raises(PlanError, match="make it before"):
        WGatesImportance(pruner)
    other = tiny("plain")
    graph = tp.DependencyGraph().build_dependency(other, (example(),))
    group = graph.get_pruning_group(other[1][0], tp.prune_conv_out_channels, list(range(12)))
    with pytest.raises(PlanError, match="another one"):
        importance(group)


def test_polarised_scores_need_gates_that_were_absorbed() -> None:
    network = tiny("plain").train()
    space = trace(network, example())
    budget = Budget.of(Limit(MacsModel(space), 0.6 * macs(network)))
    gates = PolarisedGates(network.train(), space, budget, steps=1).attach()
    with pytest.raises(PlanError, match="never learned"):
        GDPImportance(gates)
    network(example(8)).square().mean().backward()
    gates.regularize()
    assert gates.settled is not None  # decided, and yet not in the weights
    with pytest.raises(PlanError, match=r"not absorbed.*call `gates.absorb\(\)`"):
        GDPImportance(gates)
    gates.detach()
    with pytest.raises(PlanError, match="not absorbed"):
        GDPImportance(gates)
    gates.absorb()
    importance = GDPImportance(gates)
    graph = tp.DependencyGraph().build_dependency(network, (example(),))
    group = graph.get_pruning_group(network[0][0], tp.prune_conv_out_channels, list(range(8)))
    assert torch.equal(importance(group), gates.unit_scores()[:8])
    group._DG = None
    with pytest.raises(PlanError, match="GDPImportance: the group belongs to no"):
        importance(group)


# The same plan through every door


def test_the_pipeline_and_this_door_find_the_same_plan(tmp_path: Any) -> None:
    data = [
        (example(8, seed=seed), torch.randint(5, (8,), generator=torch.Generator().manual_seed(9)))
        for seed in range(3)
    ]
    training = TrainingSettings(epochs=2, learning_rate=0.05)
    settings = PruningSettings(
        gate_epochs=2,
        fine_tune_epochs=0,
        training=training,
        options={key: value for key, value in asdict(SETTINGS).items() if key != "grid"},
        min_fraction=0.1,
        measure_seconds=0.01,
        seed=3,
    )
    network = tiny("residual")
    target = 0.5 * macs(network)
    result = prune_to_target(
        network,
        example(),
        data,
        data,
        target=MacsTarget(macs=target),
        settings=settings,
        run_folder=tmp_path,
        progress=False,
    )
    copied = copy.deepcopy(network)
    pruner = WGatesPruner(
        copied, example(), target=target, settings=SETTINGS, min_fraction=0.1, steps=6
    )
    trainer = Trainer(copied, data, training, total_epochs=2, seed=3)
    trainer.run(after_backward=lambda _: pruner.regularize(copied), progress=False)
    pruner.step()
    assert pruner.plan is not None
    theirs = PruningPlan.load(result.run_folder / "plan.json")
    assert pruner.plan.kept == theirs.kept
    assert pruner.plan.widths != pruner.space.full_widths
