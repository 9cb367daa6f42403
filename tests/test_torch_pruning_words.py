"""torch-pruning's own arguments and examples, as our pruner takes them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from helpers import options_named, snapshot
from networks import Head, conv_bn, example, tiny
from torch import Tensor, nn
from torch_pruning_helpers import AT_ONCE, SETTINGS, law_1, learn, macs

from wgates_plugin import LPNet, PruningPlan, trace
from wgates_plugin.efficiency import MacsModel
from wgates_plugin.errors import ConfigError, InfeasibleTargetError, PlanError
from wgates_plugin.integrations.torch_pruning import StrategyPruner, WGatesPruner
from wgates_plugin.strategies import WGatesSettings
from wgates_plugin.verification import TOLERANCE


def sparse_training(pruner_class: Any, network: nn.Module) -> Any:
    """torch-pruning's sparse-training example; the class is the only thing that differs."""
    example_inputs = example()
    imp = tp.importance.GroupMagnitudeImportance(p=2)
    ignored_layers = []
    for m in network.modules():
        if isinstance(m, torch.nn.Linear) and m.out_features == 5:
            ignored_layers.append(m)
    iterative_steps = 2
    pruner = pruner_class(
        network,
        example_inputs,
        importance=imp,
        iterative_steps=iterative_steps,
        pruning_ratio=0.5,
        ignored_layers=ignored_layers,
        unwrapped_parameters=[],
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
    for epoch in range(2):
        network.train()
        pruner.update_regularizer()
        for seed in range(3):
            data = example(8, seed=3 * epoch + seed)
            target = torch.randint(5, (8,), generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            out = network(data)
            loss = nn.functional.cross_entropy(out, target)
            loss.backward()
            pruner.regularize(network)
            optimizer.step()
    network.eval()
    base_macs, base_nparams = tp.utils.count_ops_and_params(network, example_inputs)
    for _ in range(iterative_steps):
        pruner.step()
        macs, nparams = tp.utils.count_ops_and_params(network, example_inputs)
        assert macs < base_macs
        assert nparams < base_nparams
    return pruner


@pytest.mark.parametrize("name", ["residual", "projection", "depthwise"])
def test_one_line_changes_in_torch_prunings_own_loop(name: str) -> None:
    theirs, ours = tiny(name), tiny(name)
    sparse_training(tp.pruner.GroupNormPruner, theirs)
    pruner = sparse_training(WGatesPruner, ours)
    assert pruner.current_step == 2
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in ours.modules())
    # Local pruning leaves both with the same widths.
    shapes = [[tuple(p.shape) for p in network.parameters()] for network in (theirs, ours)]
    assert shapes[0] == shapes[1]


def test_torch_prunings_progressive_loop() -> None:
    """Their benchmark's loop: many small steps after one training, until fast enough."""
    network = tiny("concat")
    pruner = WGatesPruner(network, example(), None, pruning_ratio=1.0, iterative_steps=12)
    learn(pruner, network, steps=2)
    network.eval()
    base_ops, _ = tp.utils.count_ops_and_params(network, example_inputs=example())
    current_speed_up = 1.0
    while current_speed_up < 2.0:
        pruner.step(interactive=False)
        pruned_ops, _ = tp.utils.count_ops_and_params(network, example_inputs=example())
        current_speed_up = float(base_ops) / pruned_ops
        if pruner.current_step == pruner.iterative_steps:
            break
    assert 2.0 <= current_speed_up < 3.0
    assert 2 < pruner.current_step < 12
    pruner.detach()(example())


def test_importance_says_where_the_gates_start() -> None:
    network = tiny("plain")
    with torch.no_grad():
        network[0][0].weight[:4] *= 10
        network[0][1].weight.copy_(torch.arange(8) * 1.0)
    starts = []
    for importance in (None, tp.importance.BNScaleImportance()):
        pruner = WGatesPruner(network, example(), importance, pruning_ratio=0.5)
        scores = pruner.gates.unit_scores()[:8]
        starts.append(scores.topk(4).indices.sort().values.tolist())
        pruner.detach()
    assert starts == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_every_option_that_cannot_be_honoured_is_named_at_once() -> None:
    network = tiny("residual").train()
    before = snapshot(network)
    with pytest.raises(ConfigError) as error:
        WGatesPruner(
            network,
            example(),
            customized_pruners={nn.ReLU: object()},
            num_heads={network[2].fc: 2},
            prune_num_heads=True,
            forward_fn=lambda *_: None,
            ch_sparsity=0.5,
            reg=1e-4,
            colour="red",
            pruning_ratio=3,
        )
    assert options_named(error.value) == [
        "ch_sparsity",
        "colour",
        "customized_pruners",
        "forward_fn",
        "num_heads",
        "prune_num_heads",
        "pruning_ratio",
        "reg",
    ]
    assert snapshot(network) == before


def test_contradictory_options_are_named_at_once() -> None:
    network = tiny("residual").train()
    before = snapshot(network)
    with pytest.raises(ConfigError) as error:
        WGatesPruner(
            network,
            example(),
            tp.importance.MagnitudeImportance(),
            settings=WGatesSettings(start="open"),
            efficiency=MacsModel,
            pruning_ratio=0.5,
            pruning_ratio_dict={network[0]: 0.2},
            isomorphic=True,
            max_pruning_ratio=2,
            iterative_steps=0,
            ignored_layers=[nn.LSTM],
            root_module_types=[nn.LSTM],
            unwrapped_parameters=[(nn.Parameter(torch.ones(2)), 0)],
            round_to=0,
            global_pruning=True,
            min_channels=-2,
            min_fraction=2.0,
            iterative_pruning_ratio_scheduler="linear",
            average=0.5,
        )
    assert error.value.subject == "WGatesPruner"
    assert options_named(error.value) == [
        "average",
        "efficiency",
        "global_pruning",
        "ignored_layers",
        "importance",
        "isomorphic",
        "iterative_pruning_ratio_scheduler",
        "iterative_steps",
        "max_pruning_ratio",
        "min_channels",
        "min_fraction",
        "pruning_ratio",
        "pruning_ratio_dict",
        "root_module_types",
        "round_to",
        "steps",
        "unwrapped_parameters",
    ]
    assert snapshot(network) == before


def test_a_wrong_target_is_named_among_other_problems() -> None:
    with pytest.raises(ConfigError) as error:
        WGatesPruner(tiny("plain"), example(), target=-3.0, iterative_steps=0)
    assert len(error.value.problems) == 2
    assert "target -3.0: must be a positive" in str(error.value)


def test_a_target_of_milliseconds_without_a_latency_model_is_seen_through() -> None:
    words = r"target 8 MACs: without `efficiency`.*milliseconds\? Give `efficiency=LPNet"
    with pytest.raises(InfeasibleTargetError, match=words):
        WGatesPruner(tiny("plain"), example(), target=8)
    with pytest.raises(InfeasibleTargetError, match=r"^macs: target 8 MACs is out of reach"):
        WGatesPruner(tiny("plain"), example(), efficiency=MacsModel, target=8)


@pytest.mark.parametrize("given", [{}, {"efficiency": MacsModel}])
def test_a_target_that_holds_already_is_warned_of(given: dict[str, Any]) -> None:
    network = tiny("plain")
    with pytest.warns(UserWarning, match="nothing will be removed") as found:
        WGatesPruner(network, example(), target=2 * macs(network), **given).detach()
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a cap is kept under any target
        capped: dict[str, Any] = {"target": 2 * macs(network), "caps": {"0.0": 4}, **given}
        WGatesPruner(network, example(), **capped).detach()


def test_the_network_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[Any] = []
    build = tp.DependencyGraph.build_dependency

    def counted(*args: Any, **words: Any) -> Any:
        traced.append(args)
        return build(*args, **words)

    monkeypatch.setattr(tp.DependencyGraph, "build_dependency", counted)
    pruner = WGatesPruner(tiny("plain"), example())
    assert len(traced) == 1
    assert traced[0][0] is pruner.DG


@pytest.mark.parametrize("name", ["residual", "grouped", "depthwise", "flattened"])
def test_it_has_what_its_siblings_have(name: str) -> None:
    network = tiny(name)
    words: dict[str, Any] = {"pruning_ratio": 0.6, "iterative_steps": 2, "round_to": 2}
    theirs = tp.pruner.BasePruner(
        network,
        example(),
        None,
        **words,
        ignored_layers=[network[0]],
        in_channel_groups={},
        out_channel_groups={},
    )
    ours = WGatesPruner(network, example(), ignored_layers=[network[0]], **words)
    assert vars(theirs).keys() <= vars(ours).keys()
    told_apart = {"DG", "importance", "iterative_pruning_ratio_scheduler", "initial_total_channels"}
    own = set(network.modules())  # graphs have nodes of their own for operations
    for key in vars(theirs).keys() - told_apart:
        values = [getattr(pruner, key) for pruner in (ours, theirs)]
        if isinstance(values[0], dict):
            values = [{k: v for k, v in value.items() if k in own} for value in values]
        assert values[0] == values[1], key
    assert ours.layer_init_out_ch[network[0][0]] > 1
    assert ours.pruning_history() == theirs.pruning_history() == []


@pytest.mark.parametrize("name", ["residual", "grouped", "concat", "flattened"])
@pytest.mark.parametrize("options", [{}, {"global_pruning": True}, {"floors": 3}])
def test_asking_for_everything_empties_no_layer(name: str, options: dict[str, Any]) -> None:
    network = tiny(name)
    if "floors" in options:
        options = {"floors": dict.fromkeys(trace(network, example()).names[:1], options["floors"])}
    pruner = WGatesPruner(network, example(), pruning_ratio=1.0, settings=SETTINGS, **options)
    learn(pruner, network, steps=1)
    before = copy.deepcopy(network.state_dict())
    pruner.step()
    assert pruner.plan is not None
    assert pruner.plan.widths == pruner.space.least_widths()
    assert min(pruner.plan.widths) >= 1
    assert law_1(pruner, tiny(name), before, example()) <= TOLERANCE


def test_masks_that_would_empty_a_layer_are_refused() -> None:
    network = tiny("residual")
    pruner = WGatesPruner(network, example(), pruning_ratio=0.5)
    nothing = torch.zeros(pruner.space.total_units, dtype=torch.bool)
    with pytest.raises(PlanError, match=r"keeps 0 of 8 channels, its floor is 1"):
        PruningPlan.from_masks(pruner.space, nothing)


def test_options_at_torch_prunings_defaults_ask_for_nothing() -> None:
    network = tiny("residual")
    WGatesPruner(
        network,
        example(),
        customized_pruners=None,
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        prune_num_heads=False,
        prune_head_dims=True,
        head_pruning_ratio=0.0,
        head_pruning_ratio_dict=None,
        forward_fn=None,
        output_transform=None,
        channel_groups={},
        ch_sparsity=None,
        ch_sparsity_dict=None,
        root_module_types=[tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR, tp.ops.TORCH_LSTM],
    ).detach()
    pruner = WGatesPruner(network, example())
    with pytest.raises(
        ConfigError, match=r"alpha: no coefficient[\s\S]*bias: gates take the place"
    ):
        pruner.regularize(network, alpha=4, bias=True)
    network.train()(example()).sum().backward()
    pruner.regularize(network, bias=False, group_lasso=False)
    assert pruner.gates.step == 1


@pytest.mark.parametrize(
    "flawed", [tp.importance.TaylorImportance(), tp.importance.HessianImportance()]
)
def test_flawed_importances_are_refused_with_the_reason(flawed: Any) -> None:
    with pytest.raises(ConfigError, match="use the criterion"):
        WGatesPruner(tiny("plain"), example(), flawed)


def test_ratios_of_single_modules_and_of_scopes() -> None:
    network = tiny("concat")
    own = {network[0]: 0.5, (network[1].layers[0], network[1].layers[1]): 0.25}
    pruner = WGatesPruner(network, example(), pruning_ratio=0.0, pruning_ratio_dict=own)
    learn(pruner, network, steps=1)
    pruner.step()
    assert pruner.plan is not None
    assert pruner.plan.widths == (3, 3, 3, 4, 9)


def test_two_ratios_for_coupled_layers_are_refused() -> None:
    network = tiny("residual")
    with pytest.raises(ConfigError, match=r"gets 0.5 and 0.2 .* are coupled"):
        WGatesPruner(
            network, example(), pruning_ratio_dict={network[0][0]: 0.5, network[1].main[1]: 0.2}
        )


def widths_both(name: str, by_layer: dict[str, float], **words: Any) -> tuple[list[int], list[int]]:
    """Channels of every convolution after the same ratios: torch-pruning's pruner, and ours."""
    found = []
    for kind in (tp.pruner.BasePruner, WGatesPruner):
        network = tiny(name)
        ratios = {network.get_submodule(layer): ratio for layer, ratio in by_layer.items()}
        imp = tp.importance.GroupMagnitudeImportance()
        ignored = [m for m in network.modules() if isinstance(m, nn.Linear)]
        given = {"pruning_ratio_dict": ratios, "ignored_layers": ignored, **words}
        if kind is WGatesPruner:
            pruner = kind(network, example(), imp, **given)
            learn(pruner, network, steps=1)
        else:
            pruner = kind(network, (example(),), imp, **given)
        pruner.step()
        found.append([m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)])
    return found[0], found[1]


@pytest.mark.filterwarnings("ignore:.*has no effect")
@pytest.mark.parametrize(
    ("name", "by_layer"),
    [
        ("projection", {"1": 0.25, "1.main.0.0": 0.5}),  # the later entry of nested ones
        ("projection", {"1.main.0.0": 0.5, "1": 0.25}),
        ("projection", {"1": 0.25, "1.main.0.1": 0.5}),  # the layer before its norm
        ("residual", {"0.1": 0.75}),  # a norm by itself
        ("depthwise", {"1.main.1.0": 0.75}),
        ("concat", {"1.layers.1": 0.5}),
        ("residual", {"2.fc": 0.5, "0.2": 0.5, "1.main": 0.75}),  # two without effect
    ],
)
def test_ratios_by_module_are_torch_prunings(name: str, by_layer: dict[str, float]) -> None:
    theirs, ours = widths_both(name, by_layer, pruning_ratio=0.0)
    assert ours == theirs
    assert ours != widths_both(name, {}, pruning_ratio=0.0)[1]


def test_a_ratio_for_what_stays_is_warned_of_unless_it_is_zero() -> None:
    network = tiny("residual")
    words = (
        r"WGatesPruner: pruning_ratio_dict: 0.3 for `2.fc` has no effect, .* \(its channels are out"
    )
    with pytest.warns(UserWarning, match=words) as found:
        WGatesPruner(network, example(), pruning_ratio_dict={network[2].fc: 0.3}).detach()
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WGatesPruner(network, example(), pruning_ratio_dict={network[2].fc: 0.0}).detach()


@pytest.mark.parametrize(
    ("words", "channels", "kept"),
    [
        ({"pruning_ratio": 0.7, "max_pruning_ratio": 0.7}, 40, 12),
        ({"pruning_ratio": 1.0, "min_fraction": 0.07}, 100, 7),
    ],
)
def test_shares_round_as_they_are_written(
    words: dict[str, float], channels: int, kept: int
) -> None:
    """1 - 0.7, and 0.07 * 100, are a little too large in floating point."""
    network = nn.Sequential(conv_bn(3, channels), Head(channels))
    pruner = WGatesPruner(network, example(), settings=AT_ONCE, **words)  # type: ignore[arg-type]
    learn(pruner, network, steps=1)
    pruner.step()
    assert network[0][0].out_channels == kept


class LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.1, 1.0, channels).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


@pytest.mark.parametrize("named", [False, True])
def test_channels_of_a_bare_parameter_stay_where_torch_pruning_cuts_it(named: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(conv_bn(3, 8), LayerScale(8), conv_bn(8, 6), Head(6))
    other = copy.deepcopy(network)
    tp.pruner.BasePruner(
        other,
        (example(),),
        tp.importance.GroupMagnitudeImportance(),
        ignored_layers=[other[3]],
        unwrapped_parameters=[(other[1].gamma, 0)],
    ).step()
    assert (other[0][0].out_channels, len(other[1].gamma), other[2][0].out_channels) == (4, 4, 3)
    words = {"unwrapped_parameters": [(network[1].gamma, 0)]} if named else {}
    pruner = WGatesPruner(network, example(), pruning_ratio=0.5, settings=AT_ONCE, **words)
    assert "a bare parameter" in pruner.space.excluded["0.0"]
    learn(pruner, network, steps=1)
    pruner.step()
    assert (network[0][0].out_channels, len(network[1].gamma)) == (8, 8)
    assert network[2][0].out_channels == 3
    network.eval()(example())


@pytest.mark.parametrize(
    ("efficiency", "words"),
    [
        ("lpnet.safetensors", r"is a path; give `LPNet.load\('lpnet.safetensors'\)`"),
        (Path("lpnet.safetensors"), r"is a path; give `LPNet.load\('lpnet.safetensors'\)`"),
        (LPNet, r"is the class `LPNet`; give a fitted one, `LPNet.load"),
        (8.0, r"efficiency 8.0: needs an `LPNet`"),
    ],
)
@pytest.mark.parametrize("kind", [WGatesPruner, StrategyPruner])
def test_what_is_no_efficiency_is_named_among_other_problems(
    kind: Any, efficiency: Any, words: str
) -> None:
    strategy = ["l1"] if kind is StrategyPruner else []
    with pytest.raises(ConfigError, match=words) as caught:
        kind(tiny("plain"), example(), *strategy, efficiency=efficiency, round_to=0)
    assert options_named(caught.value) == ["efficiency", "efficiency", "round_to"]  # no target


def test_a_function_that_returns_no_model_is_named() -> None:
    with pytest.raises(ConfigError, match="returned float for the channel space; it must return"):
        WGatesPruner(tiny("plain"), example(), efficiency=lambda space: 8.0, target=8.0)


def test_global_ranking_keeps_the_share_over_all_groups() -> None:
    network = tiny("plain")
    pruner = WGatesPruner(
        network,
        example(),
        pruning_ratio=0.5,
        global_pruning=True,
        max_pruning_ratio=0.75,
        settings=AT_ONCE,
    )
    learn(pruner, network, steps=1)
    with torch.no_grad():  # the first layer's gates all say no, the second's all yes
        pruner.gates.scores.offset[:8] = -0.4
        pruner.gates.scores.offset[8:] = 0.4
    pruner.step()
    assert pruner.plan is not None
    assert pruner.plan.widths == (2, 8)


def test_isomorphic_ranking_is_by_structure() -> None:
    network = tiny("preactivation")
    pruner = WGatesPruner(network, example(), pruning_ratio=0.5, isomorphic=True, settings=AT_ONCE)
    learn(pruner, network, steps=1)
    with torch.no_grad():  # of the two inner layers, of like structure, the first says no
        where = [pruner.space.unit_slice(index) for index in range(3)]
        pruner.gates.scores.offset[where[1]] = -0.4
        pruner.gates.scores.offset[where[2]] = 0.4
    pruner.step()
    assert pruner.plan is not None
    assert pruner.plan.widths == (4, 1, 4)


def test_root_module_types_choose_the_groups() -> None:
    network = tiny("flattened")
    pruner = WGatesPruner(network, example(), root_module_types=[nn.Linear])
    assert pruner.space.names == ("2",)
    pruner.detach()


def test_layer_types_can_be_ignored() -> None:
    pruner = WGatesPruner(tiny("flattened"), example(), ignored_layers=[nn.Conv2d])
    assert pruner.space.names == ("2",)
