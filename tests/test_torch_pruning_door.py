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
from torch_pruning_helpers import SETTINGS, law_1, learn, macs

from wgates_plugin import PruningPlan, trace
from wgates_plugin.efficiency import Budget, Limit, LPNet, MacsModel, ParametersModel
from wgates_plugin.errors import (
    ConfigError,
    InfeasibleTargetError,
    PlanError,
    TargetError,
    TraceError,
)
from wgates_plugin.integrations.torch_pruning import StrategyPruner, WGatesPruner
from wgates_plugin.pipeline import prune_to_target
from wgates_plugin.strategies import WGatesSettings
from wgates_plugin.strategies.criteria.repaired import HessianImportance, TaylorImportance
from wgates_plugin.targets import MacsTarget, PruningSettings
from wgates_plugin.training import Trainer, TrainingSettings
from wgates_plugin.verification import TOLERANCE


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


@pytest.mark.parametrize("made", [tuple, list])
def test_several_inputs_may_be_listed(made: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny("residual")

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.net(x + y)
            return out

    inputs = made([example(), example(seed=1)])
    expected = trace(Two(), (example(), example(seed=1))).to_json()
    assert trace(Two(), inputs).to_json() == expected
    for kind, words in ((WGatesPruner, []), (StrategyPruner, ["l1"])):
        pruner = kind(Two().train(), inputs, *words)
        assert pruner.space.to_json() == expected
        if kind is WGatesPruner:
            pruner.model(*inputs).sum().backward()
            pruner.regularize(pruner.model)
        pruner.step()
        assert pruner.model(*inputs).shape == (2, 5)


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
