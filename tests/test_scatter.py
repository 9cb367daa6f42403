"""Scatter: branches of a residual stream pruned on their own, the stream at its full width."""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import pytest
import torch
from helpers import random_plan, recount, same_tensors, snapshot
from networks import Add, Head, conv, conv_bn, example, randomised, tiny, torchvision_network
from test_laws import assert_counts_are_exact, largest_law_1_error
from torch import Tensor, nn

from wgates_plugin import PruningPlan, trace
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.efficiency import Budget, Limit, MacsModel
from wgates_plugin.errors import ConfigError, PlanError
from wgates_plugin.gating import Gating
from wgates_plugin.strategies import STRATEGIES, Task, make_strategy, plan_for_budget
from wgates_plugin.strategies.gdp.absorption import rigid_units
from wgates_plugin.strategies.gdp.gates import PolarisedGates
from wgates_plugin.strategies.scop.branches import branch_ends, scatter_steps
from wgates_plugin.surgery import rebuild, remove, resize
from wgates_plugin.training import TrainingSettings
from wgates_plugin.transforms import apply_steps
from wgates_plugin.transforms.scatter import Scatter
from wgates_plugin.transforms.unification import (
    UnificationSettings,
    Unified,
    cut_dead,
    dead_channels,
    layer_grids,
)
from wgates_plugin.verification import TOLERANCE, masked_output, relative_error, removal_error

RESIDUAL = ("residual", "projection", "depthwise", "grouped", "preactivation")
WITHOUT_BRANCHES = ("plain", "concat", "concat-depthwise", "squeeze-excite", "flattened", "reused")


def scattered(name: str) -> nn.Module:
    network = tiny(name)
    return apply_steps(network, scatter_steps(network, example())).eval()


def slow_twin(inputs: Tensor, index: Tensor, width: int) -> Tensor:
    output = torch.zeros(inputs.shape[0], width, *inputs.shape[2:])
    for place, channel in enumerate(index.tolist()):
        output[:, channel] = inputs[:, place]
    return output


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (2, 3, 4, 4), (1, 3, 2, 2, 2)])
def test_channels_go_to_their_places(shape: tuple[int, ...]) -> None:
    scatter = Scatter(7)
    scatter.index = torch.tensor([1, 2, 6])
    inputs = torch.randn(shape, requires_grad=True)
    output = scatter(inputs)
    assert torch.equal(output, slow_twin(inputs, scatter.index, 7))
    output.sum().backward()
    assert torch.equal(inputs.grad, torch.ones(shape))


def test_a_whole_scatter_returns_its_very_input() -> None:
    inputs = torch.randn(2, 4, 3, 3)
    assert Scatter(4)(inputs) is inputs


@pytest.mark.parametrize("name", RESIDUAL)
def test_the_step_changes_nothing_and_frees_the_branches(name: str) -> None:
    network = tiny(name)
    with torch.no_grad():
        expected = network(example())
    coupled = trace(network, example())
    before = snapshot(network)
    steps = scatter_steps(network, example())
    assert snapshot(network) == before
    steps = json.loads(json.dumps([dict(step) for step in steps]))
    network = apply_steps(network, steps)
    with torch.no_grad():
        assert torch.equal(network(example()), expected)
    space = trace(network, example())
    assert max(len(group.slots_as("producer")) for group in coupled.groups) > 1
    assert max(len(group.slots_as("producer")) for group in space.groups) == 1
    assert any("gives its stream" in reason for reason in space.excluded.values())


@pytest.mark.parametrize("name", RESIDUAL)
def test_masked_equals_removed_with_scatter(name: str) -> None:
    network = scattered(name)
    space = trace(network, example())
    assert largest_law_1_error(network, space, example(), plans=4) <= TOLERANCE
    assert_counts_are_exact(network, space, example(), plans=3)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "resnet50"])
def test_torchvision_networks_keep_the_laws_with_scatter(name: str) -> None:
    network, inputs = torchvision_network(name), example(1, 64)
    network = apply_steps(network, scatter_steps(network, inputs)).eval()
    space = trace(network, inputs, verify=False)
    assert largest_law_1_error(network, space, inputs, 1) <= TOLERANCE
    assert_counts_are_exact(network, space, inputs, 1)


@pytest.mark.parametrize("name", WITHOUT_BRANCHES)
def test_other_couplings_get_no_scatter(name: str) -> None:
    assert scatter_steps(tiny(name), example()) == []


class Ending(nn.Module):
    """A residual branch whose output is changed before it is added."""

    def __init__(self, change: nn.Module, *, subtracted: bool = False) -> None:
        super().__init__()
        self.main = nn.Sequential(conv_bn(8, 6), conv(6, 8), nn.BatchNorm2d(8))
        self.change, self.subtracted = change, subtracted

    def forward(self, x: Tensor) -> Tensor:
        branch = self.change(self.main(x))
        return x - branch if self.subtracted else x + branch


@pytest.mark.parametrize(("change", "subtracted"), [(nn.ReLU(), False), (nn.Identity(), True)])
def test_branches_that_end_otherwise_are_said_and_refused_alone(
    change: nn.Module, subtracted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = make_strategy("scop", {"residual": "scatter"})
    odd = Ending(change, subtracted=subtracted)
    alone = randomised(nn.Sequential(conv_bn(3, 8), odd, Head(8)), 0)
    with pytest.raises(ConfigError, match=r'is "scatter", but sums.*couple groups \(`0\.0`\)'):
        strategy.prepare(alone, example())
    both = randomised(nn.Sequential(conv_bn(3, 8), odd, conv_bn(8, 8), *tiny("residual")[1:]), 0)
    with caplog.at_level(logging.WARNING):
        steps = strategy.prepare(both, example())
    assert [list(step["behind"]) for step in steps] == [["3.main.2"]]
    assert "couple groups (`0.0`); they stay coupled" in caplog.text


@pytest.mark.parametrize("name", [*RESIDUAL, *WITHOUT_BRANCHES])
def test_what_can_be_scattered_is_without_a_word(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        make_strategy("scop", {"residual": "scatter"}).prepare(tiny(name), example())
    assert not caplog.records


def test_branches_of_resnet50_end_in_its_third_convolutions() -> None:
    ends = branch_ends(DependencyTrace(torchvision_network("resnet50"), example(1, 64)))
    assert list(ends) == [
        f"layer{stage}.{block}.bn3"
        for stage, blocks in enumerate((3, 4, 6, 3), 1)
        for block in range(blocks)
    ]
    assert list(ends.values())[::8] == [256, 1024]


def test_both_sides_of_a_sum_of_two_branches_are_ends() -> None:
    branches = [nn.Sequential(conv_bn(6, 4), conv(4, 8), nn.BatchNorm2d(8)) for _ in range(2)]
    network = randomised(nn.Sequential(conv_bn(3, 6), Add(*branches), Head(8)), 0)
    ends = branch_ends(DependencyTrace(network, example()))
    assert ends == {"1.main.2": 8, "1.shortcut.2": 8}
    network = apply_steps(network, scatter_steps(network, example())).eval()
    space = trace(network, example())
    assert largest_law_1_error(network, space, example(), plans=3) <= TOLERANCE


def test_a_closed_channel_adds_nothing_to_the_stream() -> None:
    network = scattered("residual")
    space = trace(network, example())
    index = next(i for i, g in enumerate(space.groups) if g.name == "1.main.1")
    mask = torch.ones(space.total_units)
    mask[space.unit_slice(index)] = 0.0
    with torch.no_grad(), Gating(network, space, lambda: mask):
        found = network(example())
    stem = network[0](example())
    with torch.no_grad():
        expected = network[2](torch.relu(stem))
    assert relative_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("name", RESIDUAL)
def test_plan_and_state_dict_rebuild_the_network(name: str) -> None:
    original = tiny(name)
    steps = [dict(step) for step in scatter_steps(original, example())]
    network = apply_steps(copy.deepcopy(original), steps)
    space = trace(network, example())
    kept = random_plan(space, 1).kept
    plan = PruningPlan(space, kept, {"before": steps})
    smaller = remove(copy.deepcopy(network), plan, example())
    plan = PruningPlan.from_json(json.loads(json.dumps(plan.to_json())))
    again = rebuild(original, plan, smaller.state_dict())
    assert torch.equal(again(example()), smaller.eval()(example()))
    assert not any(isinstance(module, Scatter) for module in original.modules())


def test_a_pruned_network_is_traced_and_cut_again() -> None:
    network = scattered("projection")
    space = trace(network, example())
    first = random_plan(space, 0)
    once = remove(copy.deepcopy(network), first, example())
    inner_space = trace(once, example())
    second = random_plan(inner_space, 1)
    twice = remove(copy.deepcopy(once), second, example())
    both = resize(network, space, first.compose(second))
    assert same_tensors(twice.state_dict(), both.state_dict())
    with torch.no_grad():
        assert relative_error(twice(example()), masked_output(once, second, example())) <= TOLERANCE


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_network_with_scatters_is_pruned_again_by_any_strategy(strategy: str) -> None:
    network = scattered("residual")
    network = remove(network, random_plan(trace(network, example()), 1), example())
    space = trace(network, example(), min_channels=2)
    model = MacsModel(space)
    budget = Budget.of(Limit(model, 0.7 * float(model(torch.tensor(space.full_widths)))))
    task = Task(
        copy.deepcopy(network),
        space,
        budget,
        example(),
        [(example(4, seed=seed), torch.arange(4)) for seed in range(3)],
        epochs=1,
        total_epochs=1,
        training=TrainingSettings(accelerator="cpu"),
        progress=False,
    )
    options = {
        "metapruning": {"population": 4, "parents": 4, "generations": 1},
        "functionality": {"steps": 2},
    }
    decision = make_strategy(strategy, options.get(strategy)).decide(task)
    plan = plan_for_budget(space, decision.scores, decision.widths, budget)
    smaller = remove(copy.deepcopy(decision.network), plan, example())
    assert removal_error(decision.network, smaller, plan, example()) <= TOLERANCE


def test_gdps_gates_are_absorbed_where_a_scatter_reads_the_channels() -> None:
    network = scattered("residual").train()
    (index,) = {
        index
        for index, group in enumerate(trace(network, example()).groups)
        if any(isinstance(network.get_submodule(slot.module), Scatter) for slot in group.slots)
    }
    name = trace(network, example()).names[index]
    space = trace(network, example(), caps={name: 4})
    model = MacsModel(space)
    budget = Budget.of(Limit(model, 0.9 * float(model(torch.tensor(space.full_widths)))))
    gates = PolarisedGates(network, space, budget, steps=10, example_inputs=example()).attach()
    gates.settle()
    before = gates.output()
    gates.absorb()
    mine = space.unit_slice(index)
    assert rigid_units(network, space)[mine].all()
    assert (gates.unit_scores()[mine] == 0).any()
    assert relative_error(gates.output(closed_alone=True), before) <= TOLERANCE
    network.eval()
    with torch.no_grad():
        assert relative_error(network(example()), before) > TOLERANCE


def test_a_scatter_ignores_no_channel_but_zeros_in_front_of_it_are_dead() -> None:
    network = scattered("residual")
    space = trace(network, example())
    assert dead_channels(network, space, example()).widths == space.full_widths
    branch = dict(network.named_modules())
    with torch.no_grad():
        branch["1.main.1"].weight[2:4] = 0.0
        branch["1.main.2.made"].running_mean[2:4] = 0.0
        branch["1.main.2.made"].bias[2] = 0.0
        expected = network(example())
    plan = dead_channels(network, space, example())
    assert plan.kept == (tuple(range(6)), (0, 1, 3, 4, 5, 6, 7))
    grids = layer_grids(network, UnificationSettings(block="1x8"))
    smaller = cut_dead(Unified(network, grids), plan, example()).network
    with torch.no_grad():
        assert relative_error(smaller(example()), expected) <= TOLERANCE


def test_onnx_export_computes_the_same() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from wgates_plugin.latency.onnx_export import export_dynamo, export_torchscript

    network = scattered("projection")
    space = trace(network, example())
    smaller = remove(network, random_plan(space, 3), example()).eval()
    for export in (export_torchscript, export_dynamo):
        session = onnxruntime.InferenceSession(export(smaller, example()))
        (name,) = (entry.name for entry in session.get_inputs())
        (found,) = session.run(None, {name: example().numpy()})
        np.testing.assert_allclose(found, smaller(example()).detach().numpy(), atol=1e-5)


def test_a_step_for_another_network_is_refused() -> None:
    steps = [{"transform": "scatter", "behind": {"layer9.bn2": 8}}]
    with pytest.raises(PlanError, match="does not fit"):
        apply_steps(tiny("residual"), steps)


BROKEN_STEPS: dict[str, tuple[object, str]] = {
    "negative": ([{"transform": "scatter", "behind": {"1.main.2": -3}}], "width -3 is no number"),
    "word": ([{"transform": "scatter", "behind": {"1.main.2": "x"}}], "width 'x' is no number"),
    "too wide": ([{"transform": "scatter", "behind": {"1.main.2": 16}}], "8 channels, not 16"),
    "too narrow": ([{"transform": "scatter", "behind": {"1.main.2": 4}}], "8 channels, not 4"),
    "no names": ([{"transform": "scatter", "behind": ["1.main.2"]}], "where modules and widths"),
    "the network": ([{"transform": "scatter", "behind": {"": 8}}], "no module ``"),
    "a block": ([{"transform": "scatter", "behind": {"1.main": 8}}], "no layer of known width"),
    "no step": (["scatter"], "a step is 'scatter'"),
    "no name of a step": ([{"transform": ["scatter"]}], "is unknown"),
    "no steps": ({"transform": "scatter"}, "its steps are"),
}


@pytest.mark.parametrize("name", BROKEN_STEPS)
def test_a_broken_step_is_refused_and_changes_nothing(name: str) -> None:
    steps, why = BROKEN_STEPS[name]
    network = tiny("residual")
    modules = [each for each, _ in network.named_modules()]
    with pytest.raises(PlanError, match=why):
        apply_steps(network, steps)  # type: ignore[arg-type]
    assert [each for each, _ in network.named_modules()] == modules


def test_counts_know_that_the_stream_stays_whole() -> None:
    network = scattered("residual")
    space = trace(network, example())
    plan = random_plan(space, 2)
    dense = recount(copy.deepcopy(network), example())
    smaller = recount(resize(network, space, plan), example())
    assert all(after < before for after, before in zip(smaller, dense, strict=True))
    assert resize(network, space, plan)[2].fc.in_features == 8
