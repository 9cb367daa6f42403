"""Every strategy of the package as an NNI pruner, and by name in a search space."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("nni", reason='nni is not installed; pip install "wgates-plugin[nni]"')
pytest.importorskip("wgates_plugin.integrations.nni")  # first: it lets NNI import Lightning

import torch
from networks import example, tiny
from nni_helpers import evaluator
from test_strategies import SMALL, TRAINING, batches

from wgates_plugin import trace
from wgates_plugin.efficiency import MacsModel
from wgates_plugin.errors import ConfigError, PlanError
from wgates_plugin.integrations.nni import PRUNERS, StrategyPruner, build_pruner, remove
from wgates_plugin.strategies import STRATEGIES
from wgates_plugin.verification import masked_output, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:WGatesPruner. layers that stay whole")

CONVOLUTIONS = [{"op_types": ["Conv2d"]}]


def pruner_of(strategy: str, **words: Any) -> StrategyPruner:
    words = {"training": TRAINING, "options": SMALL.get(strategy), **words}
    config = words.pop("config_list", CONVOLUTIONS)
    return StrategyPruner(tiny("residual"), config, strategy, batches(), **words)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks_carry_the_decision_out(strategy: str) -> None:
    space = trace(tiny("residual"), example())
    full = float(MacsModel(space)(torch.tensor(space.full_widths)))
    pruner = pruner_of(strategy, target=0.5 * full, grid=2, min_channels=2)
    model, masks = pruner.compress()
    assert pruner.plan is not None
    assert pruner.plan.note["strategy"] == strategy
    kept = torch.tensor(pruner.plan.widths)
    assert float(MacsModel(pruner.space)(kept)) <= 0.5 * full
    decided = pruner.decision.network.eval()
    expected = masked_output(decided, pruner.plan, example())
    with torch.no_grad():
        assert relative_error(model.eval()(example()), expected) <= 1e-5
    pruner.unwrap_model()
    remove(model, masks, example())
    with torch.no_grad():
        assert relative_error(model.eval()(example()), expected) <= 1e-5
    assert sum(p.numel() for p in model.parameters()) < sum(
        p.numel() for p in tiny("residual").parameters()
    )


def test_a_ratio_says_how_many() -> None:
    pruner = pruner_of("taylor", config_list=[{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    pruner.compress()
    assert pruner.plan is not None
    chosen = [n for n in pruner.space.names if n not in pruner.left_out]
    widths = dict(zip(pruner.space.names, pruner.plan.widths, strict=True))
    full = dict(zip(pruner.space.names, pruner.space.full_widths, strict=True))
    assert all(widths[name] == full[name] // 2 for name in chosen if widths[name] != full[name])
    assert any(widths[name] != full[name] for name in chosen)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name in PRUNERS])
def test_a_search_space_may_name_any_strategy(name: str) -> None:
    model = tiny("residual")
    pruner = build_pruner(
        {"pruner": name, "target_fraction": 0.6, "training_steps": 3},
        model=model,
        evaluator=evaluator(model),
        example_inputs=example(),
        data=batches(),
    )
    _, masks = pruner.compress()
    assert masks


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ConfigError, match="known: wgates"):
        pruner_of("magic")
    with pytest.raises(ConfigError, match="epochs"):
        pruner_of("l1", epochs=-2)
    with pytest.raises(ConfigError, match="before it is traced"):
        pruner_of("scop", options={"residual": "scatter"})
    model = tiny("residual")
    with pytest.raises(ConfigError, match="give `data=loader`"):
        build_pruner(
            {"pruner": "scop", "target_fraction": 0.5},
            model=model,
            evaluator=evaluator(model),
            example_inputs=example(),
        )
    pruner = pruner_of("l1", config_list=[{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    with pytest.raises(ConfigError, match="epochs"):
        pruner.compress(max_steps=3)
    pruner.compress()
    with pytest.raises(PlanError, match="compressed already"):
        pruner.compress()
    with pytest.raises(PlanError, match="unwrap the first"):
        StrategyPruner.from_compressor(pruner, CONVOLUTIONS)
