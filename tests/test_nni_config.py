"""NNI's config lists and targets: every form, and what is refused before anything is wrapped."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("nni", reason='nni is not installed; pip install "wgates-plugin[nni]"')
pytest.importorskip("wgates_plugin.integrations.nni")  # first: it lets NNI import Lightning

import torch
from helpers import snapshot
from networks import example, tiny
from nni.compression.pruning import L1NormPruner
from nni_helpers import evaluator, training_func
from nni_pruner_helpers import FREE, HALF, check_exact, pruner_of, width

from wgates_plugin import trace
from wgates_plugin.efficiency import Budget, Limit, LPNet, MacsModel, ParametersModel
from wgates_plugin.errors import ConfigError, InfeasibleTargetError
from wgates_plugin.integrations.nni import WGatesPruner, torch_evaluator
from wgates_plugin.targets import LatencyTarget, MacsTarget, ParametersTarget

pytestmark = pytest.mark.filterwarnings("ignore:WGatesPruner. layers that stay whole")


def test_every_form_of_target() -> None:
    network = tiny("plain")
    space = trace(network, example())
    macs, parameters = MacsModel(space), ParametersModel(space)
    lpnet = LPNet.fit(space, [[k, k + 2] for k in range(1, 9)], [1.0 + k for k in range(8)])
    forms: list[tuple[Any, Any, Any, float]] = [
        (None, 2e4, macs, 2e4),
        (None, MacsTarget(macs=2e4), macs, 2e4),
        (None, ParametersTarget(parameters=600), parameters, 600.0),
        (ParametersModel, 600.0, parameters, 600.0),
        (lpnet, 5.0, lpnet, 5.0),
        (lpnet, LatencyTarget(milliseconds=5.0), lpnet, 5.0),
        (Budget.of(Limit(macs, 2e4), Limit(parameters, 600.0)), None, parameters, 600.0),
    ]
    for efficiency, target, model, limit in forms:
        fresh = tiny("plain")
        pruner = pruner_of(fresh, FREE, steps=1, efficiency=efficiency, target=target)
        pruner.compress()
        assert pruner.plan is not None
        assert float(model(torch.tensor(pruner.plan.widths))) <= limit


def test_bounds_of_the_config_hold_under_a_target() -> None:
    network = tiny("concat")
    config = [
        {"op_names": ["0.0"], "max_sparse_ratio": 0.2},
        {"op_names": ["1.layers.0.0"], "min_sparse_ratio": 0.5},
        {"op_types": ["Conv2d"], "exclude_op_names": ["0.0", "1.layers.0.0", "4.0"]},
    ]
    pruner = pruner_of(network, config, target=MacsTarget(fraction=0.4))
    _, masks = pruner.compress()
    smaller = check_exact(pruner, masks, network)
    assert width(smaller, "0.0") >= 5
    assert width(smaller, "1.layers.0.0") <= 2
    assert width(smaller, "4.0") == 9
    assert "4.0" not in masks


def test_coupled_layers_may_share_an_id_under_a_target() -> None:
    network = tiny("residual")
    config = [{"op_names": ["0.0", "1.main.1"], "dependency_group_id": "a"}]
    pruner = pruner_of(network, config, steps=1, target=MacsTarget(fraction=0.8))
    _, masks = pruner.compress()
    closed = [masks[name]["weight"][:, 0, 0, 0] for name in ("0.0", "1.main.1")]
    assert torch.equal(*closed)


def test_a_global_ratio_is_shared_out_by_the_gates() -> None:
    network = tiny("plain")
    config = [{"op_types": ["Conv2d"], "global_group_id": "all", "sparse_ratio": 0.6}]
    config[0]["max_sparse_ratio"] = 0.8
    pruner = pruner_of(network, config)
    pruner.compress()
    assert pruner.plan is not None
    first, second = pruner.plan.widths
    full = 8 * 27 + 12 * 72
    assert first * 27 + second * 72 <= 0.4 * full < (first + 1) * 27 + (second + 1) * 72
    assert first >= 2


def test_a_dependency_id_goes_before_a_global_one_as_in_nni() -> None:
    """The weights of one layer are tiny, which a rank over both ids' layers would take first."""
    config = [
        {"op_names": ["0.0", "1.main.1"], "dependency_group_id": "sum"},
        {"op_names": ["1.main.0.0"]},
    ]
    config = [{**entry, "global_group_id": "all", "sparse_ratio": 0.5} for entry in config]
    ours, theirs = tiny("residual"), tiny("residual")
    for network in (ours, theirs):
        network[1].main[0][0].weight.data.mul_(0.01)
    _, expected = L1NormPruner(theirs, config).compress()
    _, masks = pruner_of(ours, config).compress()
    for name in ("0.0", "1.main.0.0", "1.main.1"):
        assert float(masks[name]["weight"].mean()) == float(expected[name]["weight"].mean()) == 0.5


def test_an_exact_ratio_holds_beside_a_global_one_of_a_coupled_layer() -> None:
    config = [
        {"op_names": ["0.0"], "sparse_ratio": 0.5},
        {"op_names": ["1.main.1", "1.main.0.0"], "sparse_ratio": 0.5, "global_group_id": 1},
    ]
    pruner = pruner_of(tiny("residual"), config)
    pruner.compress()
    assert pruner.plan is not None
    assert dict(zip(pruner.space.names, pruner.plan.widths, strict=True))["0.0"] == 4


def test_depthwise_convolutions_follow_named_or_not() -> None:
    network = tiny("depthwise")
    space = trace(network, example())
    makers = [s.module for group in space.groups for s in group.slots_as("producer")]
    others = {layer.name for layer in space.layers if layer.kind == "depthwise"}
    assert others
    pruner = pruner_of(network, [{"op_names": makers, "sparse_ratio": 0.5}])
    assert pruner.left_out == {}
    _, masks = pruner.compress()
    assert others <= set(masks)
    check_exact(pruner, masks, network)


def test_bounds_of_a_named_depthwise_convolution_count() -> None:
    network = tiny("depthwise")
    space = trace(network, example())
    slim = next(layer.name for layer in space.layers if layer.kind == "depthwise")
    config = [{"op_types": ["Conv2d"], "exclude_op_names": [slim]}]
    config.append({"op_names": [slim], "max_sparse_ratio": 0.25})
    pruner = pruner_of(network, config, steps=1, target=MacsTarget(fraction=0.6))
    index, _ = pruner.space.slots_of[slim, "out"][0]
    group = pruner.space.groups[index]
    assert group.floor == group.channels - group.channels // 4
    with pytest.raises(ConfigError, match=f"`{slim}`: it shares its channels with"):
        pruner_of(tiny("depthwise"), [{"op_names": [slim], "sparse_ratio": 0.5}])


def test_a_global_ratio_over_norms_counts_their_channels() -> None:
    config = [{"op_types": ["BatchNorm2d"], "global_group_id": "all", "sparse_ratio": 0.5}]
    pruner = pruner_of(tiny("plain"), config)
    pruner.compress()
    assert pruner.plan is not None
    assert 8 < sum(pruner.plan.widths) <= (8 + 12) / 2


def test_a_config_over_norms_prunes_the_layers_behind_them() -> None:
    network = tiny("residual")
    pruner = pruner_of(network, [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    smaller = check_exact(pruner, masks, network)
    assert width(smaller, "0.0") == 4


def test_layers_that_cannot_be_pruned_are_named_and_stay() -> None:
    network = tiny("residual")
    config = [{"op_names": ["0.0", "1.main.0.0", "2.fc"], "sparse_ratio": 0.5}]
    with pytest.warns(UserWarning, match="layers that stay whole") as found:
        pruner = pruner_of(network, config)
    assert "`0.0`: it shares its channels with `1.main.1`" in str(found[0].message)
    assert "`2.fc`: its channels are outputs of the network" in str(found[0].message)
    assert set(pruner.left_out) == {"0.0", "2.fc"}
    _, masks = pruner.compress()
    assert masks["0.0"]["weight"].all()
    smaller = check_exact(pruner, masks, network)
    assert [width(smaller, name) for name in ("0.0", "1.main.0.0")] == [8, 3]


FORMS: list[tuple[Any, list[int]]] = [
    # widths of 0.0, 1.main.0.0, 1.main.1; the first and the last are coupled
    ([{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], [4, 3, 4]),
    ([{"op_names_re": [r".*main\.0"], "op_types": ["Conv2d"], "sparse_ratio": 0.5}], [8, 3, 8]),
    ([{"op_names": ["0.0", "1.main.1"], "sparse_ratio": 0.5}], [4, 6, 4]),
    (
        [{"op_types": ["Conv2d"], "exclude_op_names_re": [r".*main\.0"], "sparse_ratio": 0.5}],
        [4, 6, 4],
    ),
    (
        [{"op_types": ["Conv2d"], "exclude_op_names": ["1.main.0.0"], "sparse_ratio": 0.5}],
        [4, 6, 4],
    ),
    ([{"op_types": ["Conv2d"], "sparsity": 0.5}], [4, 3, 4]),  # NNI 2's word
    (
        [
            {"op_types": ["Conv2d"], "sparsity": 0.5},
            {"exclude": True, "op_names": ["1.main.0.0"]},
        ],
        [4, 6, 4],
    ),
    ([{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "max_sparse_ratio": 0.25}], [6, 5, 6]),
    ([{"op_types": ["Conv2d"], "sparse_ratio": 0.1, "min_sparse_ratio": 0.5}], [4, 3, 4]),
    ([{**HALF[0], "granularity": "out_channel"}], [4, 3, 4]),
    ([{**HALF[0], "granularity": [1, -1, -1, -1]}], [4, 3, 4]),
    ([{**HALF[0], "dependency_group_id": "all"}], [4, 3, 4]),
    ([{**HALF[0], "dependency_group_id": "all", "global_group_id": "b"}], [4, 3, 4]),
    ([{"op_types": ["Conv2d"], "target_settings": {"weight": {"sparse_ratio": 0.5}}}], [4, 3, 4]),
]


@pytest.mark.filterwarnings("ignore:.*legacy")
@pytest.mark.parametrize(("config", "widths"), FORMS)
def test_every_form_of_config(config: Any, widths: list[int]) -> None:
    network = tiny("residual")
    pruner = pruner_of(network, config, steps=2)
    _, masks = pruner.compress()
    smaller = check_exact(pruner, masks, network)
    assert [width(smaller, name) for name in ("0.0", "1.main.0.0", "1.main.1")] == widths


BAD: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "at least one"),
    ("conv", {}, "needs a list of dicts"),
    ([{"op_types": ["Conv3d"], "sparse_ratio": 0.5}], {}, "names no layer.*Conv2d"),
    ([{"op_names": ["9.conv"], "sparse_ratio": 0.5}], {}, "no layer `9.conv`"),
    ([{"op_types": ["ReLU"], "sparse_ratio": 0.5}], {}, "is a ReLU"),
    ([{"op_names": ["2.fc"], "sparse_ratio": 0.5}], {}, "can be pruned.*outputs of the network"),
    ([{"op_types": ["Conv2d"], "sparse_ratio": 1.0}], {}, "sparse_ratio is 1.0, needs a number"),
    ([{"op_types": ["Conv2d"], "sparse_ratio": -0.1}], {}, "sparse_ratio is -0.1"),
    ([{"op_types": ["Conv2d"], "sparse_ratio": "half"}], {}, "sparse_ratio is 'half'"),
    ([{"op_types": ["Conv2d"], "max_sparse_ratio": 2}], {"target": 1e4}, "max_sparse_ratio is 2"),
    ([{"op_types": ["Conv2d"], "sparse_threshold": 0.1}], {}, "sparse_threshold"),
    ([{**HALF[0], "granularity": "in_channel"}], {}, "whole output channels"),
    ([{**HALF[0], "target_names": ["_output_"]}], {}, "inputs and outputs"),
    ([{**HALF[0], "pruner": "l1"}], {}, "pruner"),
    (HALF, {"target": 1e4}, "together with a target"),
    (HALF, {"target": LatencyTarget(milliseconds=2.0)}, "together with a target"),
    (FREE, {}, "neither `target` nor any sparse_ratio"),
    (HALF, {"efficiency": MacsModel}, "efficiency without a target"),
    (FREE, {"target": LatencyTarget(milliseconds=2.0)}, "needs an `LPNet`"),
    (HALF, {"training_steps": -1}, "whole number"),
    (HALF, {"evaluator": None}, "no evaluator"),
    (HALF, {"evaluator": training_func()}, "evaluator is a function"),
    (HALF, {"existed_wrappers": 1e-4}, "existed_wrappers is 0.0001, .* `regular_scale`"),
    (HALF, {"loss_scale": 1024.0}, "loss_scale is 1024.0, needs a function"),
    (
        [
            {"op_names": ["0.0"], "sparse_ratio": 0.5},
            {"op_names": ["1.main.1"], "sparse_ratio": 0.25},
        ],
        {},
        "contradictory sparse_ratio in one dependency group: 0.5 for `0.0`, 0.25 for `1.main.1`",
    ),
    (
        [
            {"op_names": ["0.0", "1.main.1"], "sparse_ratio": 0.5, "dependency_group_id": "a"},
            {"op_names": ["1.main.0.0"], "sparse_ratio": 0.25, "dependency_group_id": "a"},
        ],
        {},
        "dependency_group_id 'a': contradictory",
    ),
    (
        [{"op_names": ["0.0", "1.main.0.0", "1.main.1"], "dependency_group_id": "a"}],
        {"target": 1e4},
        "dependency_group_id 'a': `0.0`, `1.main.0.0` do not have all of their channels in common",
    ),
    (
        [{"op_names": ["0.0"], "sparse_ratio": 0.5}, {"op_names": ["0.0"], "sparse_ratio": 0.2}],
        {},
        "configured twice",
    ),
]


@pytest.mark.parametrize(("config", "options", "words"), BAD)
def test_bad_input_is_refused_before_anything_is_wrapped(
    config: Any, options: dict[str, Any], words: str
) -> None:
    network = tiny("residual").train()
    traced = evaluator(network, dummy_input=example())
    before = snapshot(network)
    given = {"evaluator": traced, "training_steps": 3, **options}
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        WGatesPruner(network, config, **given)
    assert snapshot(network) == before


def test_all_problems_come_at_once() -> None:
    network = tiny("residual")
    config = [
        {"op_names": ["nowhere"], "sparse_ratio": 0.5},
        {"op_types": ["Conv2d"], "sparse_ratio": 2.0, "granularity": "in_channel"},
    ]
    with pytest.raises(ConfigError) as found:
        WGatesPruner(network, config, None, -3)
    assert len(found.value.problems) >= 4


def test_an_unreachable_target_is_refused_before_training() -> None:
    network = tiny("plain")
    before = snapshot(network)
    with pytest.raises(InfeasibleTargetError, match="out of reach"):
        pruner_of(network, FREE, target=10.0, example_inputs=example())
    assert snapshot(network) == before


def test_a_wrapped_network_needs_from_compressor() -> None:
    network = tiny("plain")
    traced = evaluator(network, dummy_input=example())
    L1NormPruner(network, HALF)
    with pytest.raises(ConfigError, match="from_compressor"):
        WGatesPruner(network, HALF, traced, 3)


def test_an_untraced_optimizer_is_explained() -> None:
    network = tiny("plain")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"make it with nni.trace\(SGD\)") as found:
        torch_evaluator(training_func(), optimizer, "step")  # type: ignore[arg-type]
    assert len(found.value.problems) == 2


def test_an_optimizer_of_another_network_is_explained() -> None:
    network = tiny("plain")
    with pytest.raises(ConfigError, match="no parameter of this model"):
        WGatesPruner(network, HALF, evaluator(tiny("plain")), 3)
