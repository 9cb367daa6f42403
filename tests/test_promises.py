"""What the scoreboard says of the systems' promises, and GDP's from its phase to the cut network."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CLASSES, example, tiny

from benchmarks import gdp_promise
from benchmarks.report.strategy_claims import STRATEGY_CLAIMS
from benchmarks.tools.records import write_record
from wgates_plugin import trace
from wgates_plugin.efficiency import Budget, Limit, MacsModel
from wgates_plugin.strategies.base import Task
from wgates_plugin.strategies.gdp import GDPSettings, GDPStrategy
from wgates_plugin.training import TrainingSettings

CLAIMS = {claim.name: claim for claim in STRATEGY_CLAIMS}


def record(folder: Path, name: str, numbers: Any, samples: Any) -> None:
    write_record(folder, name, claim="", settings={}, seed=0, numbers=numbers, samples=samples)


def phase(error: float, **found: float) -> dict[str, Any]:
    return {"gdp": {"facts": {"absorption_error": error}, **found}}


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ({}, None),
        ({"0": phase(0.0)}, 3e-7),
        ({"0": phase(0.0), "1": phase(2e-3)}, 2e-3),
        ({"0": phase(0.0, output_error=0.5), "1": phase(2e-3)}, 0.5),
    ],
)
def test_absorption_is_as_bad_as_the_worst_of_draws_and_real_phases(
    tmp_path: Path, runs: Any, expected: float | None
) -> None:
    record(tmp_path, "gdp_promise", {"absorption_error": 3e-7}, {"accuracy": runs})
    claim = CLAIMS["absorption_error/gdp"]
    assert claim.value(tmp_path) == expected
    assert claim.bar == 1e-5


def test_the_fitness_is_shown_beside_macs(tmp_path: Path) -> None:
    numbers = {
        "fitness_spearman": 0.91,
        "macs_spearman": 0.95,
        "right_order_at_equal_macs": 0.58,
    }
    beside = CLAIMS["fitness_minus_macs_spearman/metapruning"]
    order = CLAIMS["right_order_at_equal_macs/metapruning"]
    assert beside.value(tmp_path) is None
    record(tmp_path, "metapruning_promise", numbers, {})
    assert (beside.value(tmp_path), beside.bar) == (pytest.approx(-0.04), None)
    assert (order.value(tmp_path), order.bar) == (0.58, None)


def batches(count: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draws = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 3, 8, 8, generator=draws),
            torch.randint(CLASSES, (8,), generator=draws),
        )
        for _ in range(count)
    ]


def test_the_error_of_a_real_phase_reaches_to_the_cut_network() -> None:
    network = tiny("residual")
    space = trace(network, example())
    model = MacsModel(space)
    full = float(model(torch.tensor(space.full_widths)))

    def task() -> Task:
        return Task(
            copy.deepcopy(network),
            space,
            Budget.of(Limit(model, 0.6 * full)),
            example(),
            batches(),
            epochs=3,
            total_epochs=3,
            training=TrainingSettings(epochs=3, learning_rate=0.05, accelerator="cpu"),
            checkpoints=gdp_promise.Kept(),
            progress=False,
        )

    strategy, mine = GDPStrategy(GDPSettings()), task()
    decision = strategy.decide(mine)
    gated = gdp_promise._gated(task(), mine)
    found = gdp_promise._after_the_cut(strategy, decision, mine, batches(2), gated)
    assert found["macs_share"] <= 1.0
    assert found["output_error"] <= 1e-5
    assert decision.facts["absorption_error"] <= 1e-5
    with torch.no_grad():
        next(gated.parameters()).mul_(1.5)
    spoilt = gdp_promise._after_the_cut(strategy, decision, mine, batches(2), gated)
    assert spoilt["output_error"] > 1e-3
    assert "output_error" not in gdp_promise._after_the_cut(strategy, decision, mine, batches(2))
