"""`StrategyPruner`: every strategy through torch-pruning's interface."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import example, tiny
from test_strategies import SMALL, TRAINING, batches

from wgates_plugin.efficiency import MacsModel
from wgates_plugin.errors import ConfigError, PlanError
from wgates_plugin.integrations.torch_pruning import StrategyPruner, WGatesPruner
from wgates_plugin.strategies import STRATEGIES
from wgates_plugin.verification import removal_error


def pruner_of(strategy: str = "l1", network: str = "residual", **words: Any) -> StrategyPruner:
    words = {"min_fraction": 0.2, "training": TRAINING, "options": SMALL.get(strategy), **words}
    return StrategyPruner(tiny(network), example(), strategy, batches(), **words)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_prunes_to_a_target(strategy: str) -> None:
    space = pruner_of().space
    full = float(MacsModel(space)(torch.tensor(space.full_widths)))
    pruner = pruner_of(strategy, target=0.5 * full, round_to=2)
    pruner.step()
    assert pruner.plan is not None
    kept = torch.tensor(pruner.plan.widths)
    assert float(MacsModel(space)(kept)) <= 0.5 * full
    # What is left computes what the decided network computes with the closed channels gated.
    decided = pruner.decision.network.eval()
    assert removal_error(decided, pruner.model.eval(), pruner.plan, example()) <= 1e-5
    assert len(pruner.DG.pruning_history()) > 0


@pytest.mark.parametrize("strategy", ["l1", "taylor", "wgates"])
def test_ratios_mean_what_they_mean_in_the_gates_pruner(strategy: str) -> None:
    pruner = pruner_of(strategy, pruning_ratio=0.5, min_fraction=0.0)
    groups = pruner.step(interactive=True)
    assert groups is not None
    for group in groups:
        group.prune()
    gates = WGatesPruner(tiny("residual"), example(), pruning_ratio=0.5)
    assert pruner.plan is not None
    assert pruner.plan.widths == tuple(g.channels // 2 for g in gates.space.groups)
    gates.detach()


def test_problems_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        pruner_of(
            "l1", options={"scoop": 1}, epochs=-1, iterative_steps=3, pruning_ratio=2, round_to=0
        )
    for word in ("scope", "epochs", "iterative_steps", "pruning_ratio", "round_to"):
        assert word in str(caught.value)
    with pytest.raises(ConfigError, match="known: wgates"):
        pruner_of("magic")
    with pytest.raises(ConfigError, match="before it is traced"):
        pruner_of("scop", "residual", options={"residual": "scatter"})


def test_what_a_strategy_cannot_do_is_refused() -> None:
    pruner = pruner_of("l1", pruning_ratio=0.5)
    with pytest.raises(PlanError, match="learns by itself"):
        pruner.regularize(pruner.model)
    with pytest.raises(PlanError, match="floors"):
        pruner.manual_prune_width(0.5)
    pruner.step()
    with pytest.raises(PlanError, match="pruned already"):
        pruner.step()
