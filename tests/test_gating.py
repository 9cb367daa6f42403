"""Gates on weights against the slow twin that multiplies feature maps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import ActivationGates, random_plan, snapshot
from networks import TINY, example, tiny
from torch import Tensor, nn

from wgates_plugin import trace
from wgates_plugin.errors import PlanError
from wgates_plugin.gating import Gating, gated_weight
from wgates_plugin.verification import relative_error


def _gradients(network: nn.Module, gates: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    output = network(example())
    loss = (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()
    names, parameters = zip(*network.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, [gates, *parameters])
    return output.detach(), found[0], dict(zip(names, found[1:], strict=True))


@pytest.mark.parametrize("name", TINY)
def test_function_and_gradients_equal_those_of_gated_activations(name: str) -> None:
    """Fractional gates too: nothing in the law depends on 0 and 1."""
    network = tiny(name)
    space = trace(network, example())
    values = 0.5 + torch.rand(space.total_units)
    values[::5] = 0.0
    gates, slow_gates = (values.clone().requires_grad_(True) for _ in range(2))
    with Gating(network, space, lambda: gates):
        output, by_gate, by_weight = _gradients(network, gates)
    with ActivationGates(network, space, lambda: slow_gates):
        expected, slow_by_gate, slow_by_weight = _gradients(network, slow_gates)
    assert relative_error(output, expected) <= 1e-5
    assert relative_error(by_gate, slow_by_gate) <= 1e-4
    assert int((slow_by_gate != 0).sum()) > space.total_units // 2
    for key, slow in slow_by_weight.items():
        torch.testing.assert_close(by_weight[key], slow, rtol=1e-3, atol=1e-5)


def test_open_gates_change_nothing() -> None:
    network = tiny("grouped")
    space = trace(network, example())
    with torch.no_grad():
        plain = network(example())
        with Gating(network, space, lambda: torch.ones(space.total_units)):
            assert torch.equal(network(example()), plain)


def test_closing_where_channels_are_made_would_be_wrong() -> None:
    """The reason for gates on readers: a norm's shift revives a channel closed at its producer."""
    network = tiny("plain")
    space = trace(network, example())
    mask = random_plan(space, 0).mask.float()
    wrong = copy.deepcopy(network)
    with torch.no_grad():
        wrong[0][0].weight.mul_(mask[:8].view(-1, 1, 1, 1))
        wrong[1][0].weight.mul_(mask[8:].view(-1, 1, 1, 1))
        with Gating(network, space, lambda: mask):
            assert relative_error(wrong(example()), network(example())) > 1e-2


def test_gradients_accumulate_over_forward_passes() -> None:
    network = tiny("residual").train()
    space = trace(network, example())
    gates = torch.ones(space.total_units, requires_grad=True)
    parts = []
    with Gating(network, space, lambda: gates):
        for seed in (1, 2):
            gates.grad = None
            network.zero_grad()
            network(example(seed=seed)).square().sum().backward()
            parts.append(gates.grad.clone())
        gates.grad = None
        for seed in (1, 2):
            network(example(seed=seed)).square().sum().backward()
    torch.testing.assert_close(gates.grad, parts[0] + parts[1], rtol=1e-4, atol=1e-5)


def test_the_source_is_asked_once_per_forward_pass() -> None:
    network = tiny("concat")
    space = trace(network, example())
    calls = []

    def source() -> Tensor:
        calls.append(1)
        return torch.ones(space.total_units)

    with Gating(network, space, source), torch.no_grad():
        network(example())
        network(example())
    assert len(calls) == 2


def test_parameters_stay_the_optimizers_while_attached() -> None:
    network = tiny("plain")
    space = trace(network, example())
    before = snapshot(network)
    gating = Gating(network, space, lambda: torch.full((space.total_units,), 0.5))
    assert not gating.attached
    assert gating.attach() is gating.attach()
    assert gating.attached
    hooks = len(network[1][0]._forward_pre_hooks)
    assert hooks == 1
    assert isinstance(network[1][0].weight, nn.Parameter)
    network(example()).sum().backward()
    assert network[1][0].weight.grad is not None
    assert "weight" not in vars(network[1][0])
    network.zero_grad()
    assert gating.detach() is network
    assert gating.detach() is network
    assert snapshot(network) == before


def test_a_failing_forward_leaves_no_gated_weight() -> None:
    network = tiny("plain")
    space = trace(network, example())
    before = snapshot(network)

    def fail(module: nn.Module, inputs: Any) -> None:
        raise KeyError("in the middle")

    with Gating(network, space, lambda: torch.ones(space.total_units)):
        handle = network[1][0].register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            network(example())
        assert all("weight" not in vars(module) for module in network.modules())
        handle.remove()
        with pytest.raises(RuntimeError):
            network(torch.zeros(1, 5, 8, 8))
        with torch.no_grad():
            network(example())
    assert snapshot(network) == before


def test_a_failing_source_is_told_and_leaves_no_trace() -> None:
    network = tiny("plain")
    space = trace(network, example())
    before = snapshot(network)

    def source() -> Tensor:
        raise ArithmeticError("no gates today")

    with Gating(network, space, source), pytest.raises(ArithmeticError):
        network(example())
    assert snapshot(network) == before


def test_a_gated_layer_on_its_own_is_refused() -> None:
    """Before and after a pass of the whole network: its gates are not left lying about."""
    network = tiny("plain")
    space = trace(network, example())
    with Gating(network, space, lambda: torch.ones(space.total_units)):
        for _ in range(2):
            with pytest.raises(PlanError, match="call the whole network"):
                network[1](torch.zeros(1, 8, 8, 8))
            assert "weight" not in vars(network[1][0])
            network(example())


def test_another_network_is_refused_and_left_as_found() -> None:
    space = trace(tiny("projection"), example())
    other = tiny("plain")
    before = snapshot(other)
    with pytest.raises(PlanError, match="not in the network"):
        Gating(other, space, lambda: torch.ones(space.total_units)).attach()
    assert snapshot(other) == before


def test_a_deep_copy_of_an_attached_network_is_the_plain_one() -> None:
    network = tiny("residual")
    space = trace(network, example())
    plain = network(example())
    gates = (
        random_plan(space, 0).mask.float().requires_grad_()
    )  # a gradient's history is no hindrance
    twins = []
    with Gating(network, space, lambda: gates * 1.0):
        for _ in range(2):
            twins.append(copy.deepcopy(network))
            gated = network(example())
        assert not torch.allclose(gated, plain)
        for twin in twins:
            assert torch.equal(twin(example()), plain)
        assert torch.equal(network(example()), gated)
    for twin in (*twins, copy.deepcopy(twins[0])):
        found = trace(twin, example())
        assert found.to_json() == space.to_json()
        with torch.no_grad(), Gating(twin, found, lambda: gates):  # gates of its own act on it
            assert torch.equal(twin(example()), gated)
        assert torch.equal(twin(example()), plain)


def answer_under_other_gates(gating: Gating) -> None:
    with gating.answering(torch.ones(1)):
        pass


@pytest.mark.parametrize("use", [Gating.attach, Gating.detach, answer_under_other_gates])
def test_a_deep_copy_of_gates_is_refused(use: Any) -> None:
    network = tiny("residual")
    space = trace(network, example())
    with (
        Gating(network, space, lambda: torch.ones(space.total_units)) as gating,
        pytest.raises(PlanError, match="make new gates for it"),
    ):
        use(copy.deepcopy(gating))


@pytest.mark.parametrize("groups", [1, 2])
def test_gated_weight_of_convolutions(groups: int) -> None:
    layer = nn.Conv2d(4, 6, 3, groups=groups)
    gates, x = torch.rand(4), torch.randn(1, 4, 5, 5)
    found = nn.functional.conv2d(
        x, gated_weight(layer, layer.weight, gates), layer.bias, groups=groups
    )
    torch.testing.assert_close(found, layer(x * gates.view(1, 4, 1, 1)))


def test_gated_weight_of_a_transposed_convolution_and_of_half_precision() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3)
    gates, x = torch.rand(4), torch.randn(1, 4, 5, 5)
    found = nn.functional.conv_transpose2d(x, gated_weight(layer, layer.weight, gates), layer.bias)
    torch.testing.assert_close(found, layer(x * gates.view(1, 4, 1, 1)))
    linear = nn.Linear(4, 2).bfloat16()
    assert gated_weight(linear, linear.weight, gates).dtype == torch.bfloat16
