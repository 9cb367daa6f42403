"""The torch-pruning door: their loop, our gates, exact removal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning as tp
from helpers import same_tensors, snapshot
from networks import example, tiny
from torch import nn

from wgates_plugin import trace
from wgates_plugin.efficiency import Budget, Limit, LPNet, MacsModel, ParametersModel
from wgates_plugin.errors import (
    ConfigError,
    InfeasibleTargetError,
    PlanError,
    TargetError,
    TraceError,
)
from wgates_plugin.integrations.torch_pruning import WGatesPruner
from wgates_plugin.strategies import WGatesSettings
from wgates_plugin.surgery import resize
from wgates_plugin.verification import TOLERANCE, removal_error

SETTINGS = WGatesSettings(learning_rate=0.05)


def learn(pruner: WGatesPruner, network: nn.Module, steps: int = 4) -> dict[str, float]:
    """torch-pruning's own sparse-training loop."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
    network.train()
    for seed in range(steps):
        labels = torch.randint(5, (8,), generator=torch.Generator().manual_seed(seed))
        loss = nn.functional.cross_entropy(network(example(8, seed=seed)), labels)
        optimizer.zero_grad()
        loss.backward()
        monitor = pruner.regularize(network, loss)
        optimizer.step()
    return monitor


def macs(network: nn.Module) -> float:
    space = trace(network, example(), verify=False)
    return float(MacsModel(space)(torch.tensor(space.full_widths)))


@pytest.mark.parametrize("name", ["residual", "grouped", "concat", "depthwise", "flattened"])
def test_the_loop_ends_in_an_exact_removal_under_the_target(name: str) -> None:
    network = tiny(name)
    full = macs(network)
    pruner = WGatesPruner(network, example(), pruning_ratio=0.5, settings=SETTINGS)
    assert isinstance(pruner, tp.pruner.BasePruner)
    monitor = learn(pruner, network)
    assert monitor["step"] == 4.0
    before = copy.deepcopy(network)
    assert pruner.step() is None
    assert pruner.plan is not None
    dense = resize(tiny(name), pruner.space, pruner.space.full_widths)
    dense.load_state_dict(before.state_dict())
    assert removal_error(dense, network, pruner.plan, example()) <= TOLERANCE
    assert macs(network) <= 0.5 * full
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.modules())
    network.train()(example()).sum().backward()


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
        ({}, ConfigError, "either `target` or `pruning_ratio`"),
        ({"target": 1e4, "pruning_ratio": 0.5}, ConfigError, "either"),
        ({"pruning_ratio": 1.5}, ConfigError, "needs 0 to 1"),
        ({"target": -3.0}, TargetError, "positive finite"),
        ({"target": 1.0}, InfeasibleTargetError, "out of reach"),
        ({"pruning_ratio": 0.5, "floors": {"nowhere": 1}}, TraceError, "no prunable group"),
        ({"pruning_ratio": 0.5, "round_to": 0}, ConfigError, "grid"),
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


def test_every_form_of_efficiency() -> None:
    network = tiny("plain")
    space = trace(network, example())
    lpnet = LPNet.fit(
        space, [[k, k + 2] for k in range(1, 9)], [1.0 + k for k in range(8)], steps=50
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
    with pytest.raises(ConfigError, match="a Budget holds its targets"):
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
    for width, group in zip(pruner.plan.widths, pruner.space.groups, strict=True):
        assert width % 2 == 0 or width == group.channels


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
        pruner = WGatesPruner(network, example(), pruning_ratio=0.3)
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
