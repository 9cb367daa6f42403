"""Efficiency models and constraint forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import TINY, example, tiny

from wgates_plugin import ChannelSpace, trace
from wgates_plugin.efficiency import (
    Budget,
    EfficiencyModel,
    Limit,
    MacsModel,
    ParametersModel,
)
from wgates_plugin.efficiency.constraint import AugmentedLagrangian, Weighted, make_constraint
from wgates_plugin.errors import ConfigError, TargetError


@pytest.fixture(scope="module")
def space() -> ChannelSpace:
    return trace(tiny("plain"), example())


# Counts


def test_counts_of_the_whole_network_by_hand(space: ChannelSpace) -> None:
    full = torch.tensor(space.full_widths)
    assert float(MacsModel(space)(full)) == 8 * 3 * 9 * 64 + 12 * 8 * 9 * 16 + 12 * 5
    assert float(ParametersModel(space)(full)) == 8 * 27 + 16 + 12 * 72 + 24 + 12 * 5 + 5
    small = torch.tensor([3, 2])
    assert float(MacsModel(space)(small)) == 3 * 27 * 64 + 2 * 27 * 16 + 2 * 5
    assert float(ParametersModel(space)(small)) == 3 * 27 + 6 + 2 * 27 + 4 + 2 * 5 + 5


@pytest.mark.parametrize("name", TINY)
def test_counts_are_batched_and_differentiable(name: str) -> None:
    space = trace(tiny(name), example())
    rows = torch.tensor([space.full_widths, space.least_widths()], dtype=torch.float64)
    for model in (MacsModel(space), ParametersModel(space)):
        assert isinstance(model, EfficiencyModel)
        found = model(rows)
        torch.testing.assert_close(found, torch.stack([model(row) for row in rows]))
        assert found[1] < found[0]
        widths = rows[0].clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(model(widths), widths)
        for index in range(len(widths)):
            ahead, behind = widths.detach().clone(), widths.detach().clone()
            ahead[index] += 0.5
            behind[index] -= 0.5
            # quadratic in one width where a layer reads and writes the same group
            assert float(slope[index]) == pytest.approx(float(model(ahead) - model(behind)))
            assert float(slope[index]) > 0


def test_batch_size_does_not_count() -> None:
    network = tiny("transposed")
    widths = torch.tensor([3.0, 5.0])
    one, four = (MacsModel(trace(network, example(batch))) for batch in (1, 4))
    assert float(one(widths)) == float(four(widths))


# Budgets


def test_budgets_report_relative_excess(space: ChannelSpace) -> None:
    macs, parameters = MacsModel(space), ParametersModel(space)
    full = torch.tensor(space.full_widths)
    budget = Budget.of(
        Limit(macs, 0.5 * float(macs(full))), Limit(parameters, 2 * float(parameters(full)))
    )
    torch.testing.assert_close(budget.violations(full), torch.tensor([1.0, -0.5]).double())
    assert float(budget.excess(full)) == pytest.approx(1.0)
    looser = budget.scaled([2.0, 1.0])
    assert float(looser.excess(full)) == pytest.approx(0.0)
    assert "macs" in budget.describe(full)
    assert "parameters" in budget.describe(full)
    with pytest.raises(TargetError, match="at least one"):
        Budget.of()


@pytest.mark.parametrize("target", [0, -1.0, float("nan"), float("inf"), True, "8", None])
def test_targets_are_positive_numbers(space: ChannelSpace, target: Any) -> None:
    with pytest.raises(TargetError, match="MACs"):
        Limit(MacsModel(space), target)


# Constraint forms


@pytest.mark.parametrize("kind", [MacsModel, ParametersModel])
def test_a_limit_needs_a_model_of_the_network_not_its_class(kind: Any) -> None:
    with pytest.raises(
        ConfigError, match=rf"class `{kind.__name__}`.*`Limit\({kind.__name__}\(space"
    ):
        Limit(kind, 1e5)


def test_a_limit_needs_a_model() -> None:
    with pytest.raises(ConfigError, match="is the class `Budget`; give an object"):
        Limit(Budget, 1e5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"type `function`; it needs `name`, `unit`"):
        Limit(lambda widths: widths.sum(-1), 1e5)  # type: ignore[arg-type]


def test_the_augmented_lagrangian_presses_until_the_limit_holds() -> None:
    constraint = AugmentedLagrangian(2, rate=0.5, curvature=10.0)
    broken = torch.tensor([0.2, -0.3], dtype=torch.float64)
    assert constraint.pressure(broken).tolist() == pytest.approx([2.0, 0.0])
    for _ in range(3):
        constraint.update(broken)
    assert constraint.multipliers.tolist() == pytest.approx([0.3, 0.0])
    held = torch.tensor([-0.01, -0.3], dtype=torch.float64)
    assert constraint.pressure(held).tolist() == pytest.approx([0.2, 0.0])
    for _ in range(100):
        constraint.update(held)
    assert constraint.multipliers.tolist() == [0.0, 0.0]
    other = AugmentedLagrangian(2)
    constraint.update(broken)
    other.load_state_dict(constraint.state_dict())
    assert torch.equal(other.multipliers, constraint.multipliers)


def test_dual_ascent_solves_a_small_problem() -> None:
    """min (x - 2)^2 subject to x <= 1, whose multiplier is 2."""
    constraint = AugmentedLagrangian(1, rate=0.05)
    x = torch.tensor(0.0, dtype=torch.float64)
    for _ in range(2000):
        violation = (x - 1.0).reshape(1)
        x = x - 0.02 * (2 * (x - 2.0) + constraint.pressure(violation)[0])
        constraint.update(violation)
    assert float(x) == pytest.approx(1.0, abs=1e-3)
    assert float(constraint.multipliers) == pytest.approx(2.0, abs=1e-2)


@pytest.mark.parametrize("form", ["linear", "log"])
def test_weighted_forms_are_derivatives_of_the_papers_sums(form: str) -> None:
    constraint = make_constraint(form, 1, alpha=0.7)
    cost = torch.tensor([1.8], dtype=torch.float64, requires_grad=True)
    value = 0.7 * (torch.log1p(cost) if form == "log" else cost)
    (slope,) = torch.autograd.grad(value.sum(), cost)
    pressure = constraint.pressure(cost.detach() - 1.0)
    torch.testing.assert_close(pressure, slope)
    constraint.update(cost.detach())
    assert constraint.state_dict() == {}
    assert isinstance(constraint, Weighted)


def test_unknown_forms_are_refused() -> None:
    with pytest.raises(ConfigError, match="known: augmented-lagrangian, linear, log"):
        make_constraint("barrier", 1)
