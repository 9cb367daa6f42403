"""Removal, resize and rebuild: refusals, shapes, and what stays untouched."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import random_plan, same_tensors, snapshot
from networks import TINY, example, tiny
from torch import nn

from wgates_plugin import PruningPlan, trace
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.errors import FileFormatError, PlanError, SurgeryError, WGatesError
from wgates_plugin.files import load_tensors, save_tensors
from wgates_plugin.surgery import rebuild, removals, remove, resize, resize_map
from wgates_plugin.verification import TOLERANCE, relative_error, removal_error


def test_removal_is_in_place_and_selects_weights() -> None:
    network = tiny("plain")
    weight = network[1][0].weight.detach().clone()
    plan = PruningPlan(trace(network, example()), ((0, 3, 5), (1, 11)))
    assert remove(network, plan, example()) is network
    assert network[1][0].in_channels == 3
    assert torch.equal(network[1][0].weight, weight[[1, 11]][:, [0, 3, 5]])
    assert network[2].fc.in_features == 2


def test_trace_and_removal_share_one_graph() -> None:
    network = tiny("concat")
    twin = copy.deepcopy(network)
    traced = DependencyTrace(network, example())
    plan = random_plan(traced.space(), 0)
    remove(network, plan, traced=traced)
    remove(twin, plan, example())
    assert same_tensors(network.state_dict(), twin.state_dict())


def test_groups_are_built_one_at_a_time() -> None:
    network = tiny("concat")
    original = copy.deepcopy(network)
    plan = random_plan(trace(network, example()), 0)
    shrinking = []
    for group in removals(network, plan, example()):
        group.prune()
        shrinking.append(sum(p.numel() for p in network.parameters()))
    assert len(shrinking) == len(plan.space.groups)
    assert shrinking == sorted(set(shrinking), reverse=True)
    assert removal_error(original, network, plan, example()) <= TOLERANCE


def test_a_full_plan_changes_nothing() -> None:
    network = tiny("residual")
    space = trace(network, example())
    before = snapshot(network)
    plan = PruningPlan.leading(space, space.full_widths)
    assert list(removals(network, plan, example())) == []
    assert snapshot(network) == before
    assert resize_map(network, space, plan).tensors == {}


def test_a_pruned_network_trains_on() -> None:
    network = tiny("grouped").train()
    remove(network, random_plan(trace(network, example()), 0), example())
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    nn.functional.cross_entropy(network(example(4)), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    assert all(p.grad is not None for p in network.parameters())
    assert not same_tensors(before, network.state_dict())


def test_removal_refuses_another_network() -> None:
    plan = random_plan(trace(tiny("plain"), example()), 0)
    other = tiny("residual")
    before = snapshot(other)
    with pytest.raises(PlanError, match="changed since it was traced, or another one"):
        remove(other, plan, example())
    assert snapshot(other) == before
    network = remove(tiny("plain"), plan, example())
    with pytest.raises(PlanError, match="channels, the plan expects 8"):
        remove(network, plan, example())
    with pytest.raises(SurgeryError, match="`example_inputs`, or `traced`"):
        remove(tiny("plain"), plan)


def test_resize_takes_widths_or_a_plan_and_copies() -> None:
    network = tiny("depthwise").train()
    space = trace(network, example())
    before = snapshot(network)
    smaller = resize(network, space, space.least_widths())
    assert smaller.training
    assert smaller(example()).shape == (2, 5)
    depthwise = smaller.get_submodule("1.main.1.0")
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (1, 1, 1)
    shared = {p.data_ptr() for p in network.parameters()}
    assert not shared & {p.data_ptr() for p in smaller.parameters()}
    assert snapshot(network) == before
    with pytest.raises(PlanError):
        resize(network, space, [0] * len(space.groups))
    with pytest.raises((PlanError, WGatesError)):
        resize(tiny("plain"), space, space.least_widths())


def test_resize_does_not_disturb_the_other_side() -> None:
    network = tiny("plain")
    space = trace(network, example())
    smaller = resize(network, space, (8, 4))
    with torch.no_grad():
        smaller[2].fc.bias.add_(1.0)
        smaller[0][0].weight.zero_()
    assert float(network[0][0].weight.detach().abs().max()) > 0


def test_rebuild_refuses_what_does_not_fit(tmp_path: Path) -> None:
    network = tiny("plain")
    plan = random_plan(trace(network, example()), 0)
    removed = remove(copy.deepcopy(network), plan, example())
    state = removed.state_dict()
    rebuilt = rebuild(TINY["plain"](), plan, state)
    assert same_tensors(rebuilt.state_dict(), state)
    assert rebuilt.state_dict()._metadata == state._metadata
    with pytest.raises(PlanError, match="names differ"):
        rebuild(TINY["plain"](), plan, {**state, "extra": torch.zeros(1)})
    with pytest.raises(PlanError, match="does not fit the planned network"):
        rebuild(TINY["plain"](), plan, network.state_dict())
    with pytest.raises(PlanError, match="another one"):
        rebuild(TINY["residual"](), plan, state)
    save_tensors(tmp_path / "weights.safetensors", state)
    content = (tmp_path / "weights.safetensors").read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(content[: len(content) // 2])
    for name in ("torn.safetensors", "missing.safetensors"):
        with pytest.raises(FileFormatError, match=name):
            rebuild(TINY["plain"](), plan, tmp_path / name)
    assert same_tensors(load_tensors(tmp_path / "weights.safetensors", kind="weights"), state)


def test_relative_error_is_relative_to_the_largest_value() -> None:
    expected = torch.tensor([10.0, 1.0])
    assert relative_error(torch.tensor([10.0, 1.1]), expected) == pytest.approx(0.01)
    network = tiny("plain")
    plan = random_plan(trace(network, example()), 0)
    broken = remove(copy.deepcopy(network), plan, example())
    with torch.no_grad():
        broken[2].fc.bias[0] = float("nan")
    assert removal_error(network, broken, plan, example()) == float("inf")


def _orders(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: weight.stride() for name, weight in network.named_parameters()}


@pytest.mark.parametrize("name", ["residual", "grouped", "depthwise", "transposed"])
def test_weights_keep_their_memory_order(name: str) -> None:
    network = tiny(name).to(memory_format=torch.channels_last)
    plain = tiny(name)
    plan = random_plan(trace(plain, example()), 0)
    for smaller in (
        resize(network, plan.space, plan),
        remove(copy.deepcopy(network), plan, example()),
    ):
        images = [weight for weight in smaller.parameters() if weight.dim() == 4]
        assert all(w.is_contiguous(memory_format=torch.channels_last) for w in images)
        assert any(not weight.is_contiguous() for weight in images)
    whole = resize(plain, plan.space, plan)
    assert _orders(whole) == _orders(remove(plain, plan, example()))
    assert all(weight.is_contiguous() for weight in whole.parameters())
