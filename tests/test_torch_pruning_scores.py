"""Soft scores of the gates in torch-pruning's other pruners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from helpers import same_tensors
from networks import example, tiny
from torch import nn
from torch_pruning_helpers import SETTINGS, learn, macs

from wgates_plugin import trace
from wgates_plugin.efficiency import Budget, Limit, MacsModel
from wgates_plugin.errors import PlanError
from wgates_plugin.integrations.torch_pruning import GDPImportance, WGatesImportance, WGatesPruner
from wgates_plugin.strategies.gdp import PolarisedGates


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
