"""`from_compressor`: what an earlier compressor closed stays closed, and counts."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("nni", reason='nni is not installed; pip install "wgates-plugin[nni]"')
pytest.importorskip("wgates_plugin.integrations.nni")  # first: it lets NNI import Lightning

import torch
from networks import example, tiny
from nni.compression.base.compressor import Pruner
from nni.compression.pruning import L1NormPruner
from nni.compression.utils import Evaluator
from nni_helpers import evaluator
from test_strategies import batches
from torch import Tensor, nn

from wgates_plugin import trace
from wgates_plugin.efficiency import MacsModel
from wgates_plugin.integrations.nni import StrategyPruner, WGatesPruner, remove
from wgates_plugin.strategies import WGatesSettings
from wgates_plugin.strategies.budgeting import holds
from wgates_plugin.targets import MacsTarget
from wgates_plugin.verification import TOLERANCE, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:WGatesPruner. layers that stay whole")

INNER = "1.main.0.0"
"""A convolution of `tiny("residual")` whose channels are its own."""


def closed(masks: Any, name: str = INNER) -> Tensor:
    """Output channels (C,) that the masks close."""
    return (masks[name]["weight"] != 0).flatten(1).sum(1) == 0


def trained_beside(earlier: Pruner, network: nn.Module) -> Evaluator:
    """An evaluator of the plain network, made while the earlier link's wrappers are off."""
    earlier.unwrap_model()
    made = evaluator(network)
    made._init_optimizer_helpers(network)
    earlier.wrap_model()
    return made


@pytest.mark.parametrize("decided", [True, False])
def test_a_strategy_by_name_may_come_first(decided: bool) -> None:
    network = tiny("residual")
    config = [{"op_names": [INNER], "sparse_ratio": 0.25}]
    earlier = StrategyPruner(network, config, "l1", batches())
    before = closed(earlier.compress()[1]) if decided else None
    pruner = WGatesPruner.from_compressor(
        earlier,
        [{"op_names": [INNER], "sparse_ratio": 0.5}],
        3,
        evaluator=trained_beside(earlier, network),
        example_inputs=example(),
    )
    now = closed(pruner.compress()[1])
    assert earlier.plan is not None
    assert int(now.sum()) == len(now) // 2
    assert before is None or bool(now[before].all())


def chained(
    network: nn.Module, first: float, config: Any, steps: int = 3, **options: Any
) -> tuple[Tensor, WGatesPruner, Any]:
    """(what an `L1NormPruner` closed at ratio `first`, the pruner after it, its masks)."""
    earlier = L1NormPruner(network, [{"op_names": [INNER], "sparse_ratio": first}])
    _, masks = earlier.compress()
    before = closed(masks)
    assert int(before.sum()) == int(len(before) * first)
    pruner = WGatesPruner.from_compressor(
        earlier,
        config,
        steps,
        evaluator=trained_beside(earlier, network) if steps else None,
        example_inputs=example(),
        # Fast enough that gates change their minds within three steps.
        settings=WGatesSettings(learning_rate=0.5),
        **options,
    )
    _, masks = pruner.compress()
    return before, pruner, masks


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(
    ("first", "second", "left"), [(0.25, 0.5, 0.5), (0.5, 0.5, 0.5), (0.5, 0.25, 0.5)]
)
def test_a_ratio_counts_what_is_closed_already(
    first: float, second: float, left: float, steps: int
) -> None:
    network = tiny("residual")
    config = [{"op_names": [INNER], "sparse_ratio": second}]
    before, pruner, masks = chained(network, first, config, steps)
    now = closed(masks)
    assert bool(now[before].all())
    assert int((~now).sum()) == int(len(now) * left)
    assert pruner.plan is not None
    widths = dict(zip(pruner.space.names, pruner.plan.widths, strict=True))
    assert widths[INNER] == int((~now).sum())


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("fraction", [0.4, 0.6, 0.8])
def test_a_target_counts_what_is_closed_already(fraction: float, steps: int) -> None:
    network = tiny("residual")
    space = trace(tiny("residual"), example())
    cost = MacsModel(space)
    before, pruner, masks = chained(
        network, 0.5, [{"op_types": ["Conv2d"]}], steps, target=MacsTarget(fraction=fraction)
    )
    assert bool(closed(masks)[before].all())
    assert pruner.plan is not None
    widths = list(pruner.plan.widths)
    assert holds(pruner.budget, widths)
    # Not more is removed than has to be: no open group has room for another channel.
    left = int((~before).sum())
    for place, group in enumerate(pruner.space.groups):
        most = left if group.name == INNER else group.cap
        if widths[place] + group.ties <= most:
            wider = widths.copy()
            wider[place] += group.ties
            assert not holds(pruner.budget, wider), group.name
    with torch.no_grad():
        masked = network.eval()(example(4))
        pruner.unwrap_model()
        remove(network, masks, example())
        assert relative_error(network.eval()(example(4)), masked) <= TOLERANCE
    smaller = trace(network, example())
    full = float(cost(torch.tensor(space.full_widths)))
    assert float(MacsModel(smaller)(torch.tensor(smaller.full_widths))) <= fraction * full


def test_channels_masked_without_their_bias_count_too() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    )
    config = [{"op_names": ["0"], "target_names": ["weight"], "sparse_ratio": 0.5}]
    earlier = L1NormPruner(network, config)
    _, before = earlier.compress()
    pruner = WGatesPruner.from_compressor(
        earlier, [{"op_names": ["0"], "sparse_ratio": 0.25}], 0, example_inputs=example()
    )
    _, masks = pruner.compress()
    assert torch.equal(closed(masks, "0"), closed(before, "0"))
    assert torch.equal(masks["0"]["bias"] == 0, closed(masks, "0"))
