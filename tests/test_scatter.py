"""Scatter: branches of a residual stream pruned on their own, the stream at its full width."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from helpers import random_plan, recount, same_tensors, snapshot
from networks import Add, Head, conv, conv_bn, example, randomised, tiny, torchvision_network
from test_laws import assert_counts_are_exact, largest_law_1_error
from torch import Tensor, nn

from wgates_plugin import PruningPlan, trace
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.errors import PlanError
from wgates_plugin.gating import Gating
from wgates_plugin.strategies.scop.branches import branch_ends, scatter_steps
from wgates_plugin.surgery import rebuild, remove, resize
from wgates_plugin.transforms import apply_steps
from wgates_plugin.transforms.scatter import Scatter
from wgates_plugin.verification import TOLERANCE, masked_output, relative_error

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


def test_counts_know_that_the_stream_stays_whole() -> None:
    network = scattered("residual")
    space = trace(network, example())
    plan = random_plan(space, 2)
    dense = recount(copy.deepcopy(network), example())
    smaller = recount(resize(network, space, plan), example())
    assert all(after < before for after, before in zip(smaller, dense, strict=True))
    assert resize(network, space, plan)[2].fc.in_features == 8
