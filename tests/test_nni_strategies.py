"""Every strategy of the package as an NNI pruner, and by name in a search space."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("nni", reason='nni is not installed; pip install "wgates-plugin[nni]"')
pytest.importorskip("wgates_plugin.integrations.nni")  # first: it lets NNI import Lightning

import torch
from helpers import MeasuredMacs, options_named, snapshot
from networks import example, tiny
from nni_helpers import evaluator
from test_strategies import SMALL, TRAINING, batches
from torch import Tensor, nn

from wgates_plugin import trace
from wgates_plugin.efficiency import Budget, Limit, MacsModel
from wgates_plugin.errors import ConfigError, PlanError
from wgates_plugin.integrations.nni import (
    PRUNERS,
    StrategyPruner,
    WGatesPruner,
    build_pruner,
    remove,
)
from wgates_plugin.integrations.nni.experiment import OF_DATA
from wgates_plugin.strategies import STRATEGIES, WGatesSettings
from wgates_plugin.targets import MacsTarget
from wgates_plugin.training import TrainingSettings
from wgates_plugin.verification import masked_output, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:.*Pruner. layers that stay whole")

THEIRS = ("l1", "l2", "fpgm", "taylor", "slim")
"""Names that stand for NNI's own pruners."""

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


@pytest.mark.parametrize("form", ["model", "function", "budget"])
@pytest.mark.parametrize(("word", "multiple"), [({}, 2), ({"grid": 1}, 1), ({"grid": 4}, 4)])
def test_widths_are_those_that_the_latency_model_has_seen(
    word: dict[str, int], multiple: int, form: str
) -> None:
    space = trace(tiny("residual"), example())
    model = MeasuredMacs(space, grid=2)
    full = float(model(torch.tensor(space.full_widths)))
    efficiency: Any = model if form == "model" else lambda _: model
    limit: dict[str, Any] = {"efficiency": efficiency, "target": 0.6 * full}
    if form == "budget":
        limit = {"efficiency": Budget.of(Limit(model, 0.6 * full))}
    pruner = pruner_of("l1", **limit, **word)
    pruner.compress()
    assert pruner.plan is not None
    pairs = zip(pruner.plan.widths, pruner.space.full_widths, strict=True)
    assert all(width % multiple == 0 for width, whole in pairs if width < whole)
    assert pruner._grid == multiple
    parameters = {"pruner": "wgates", "target": 0.6 * full, **word}
    network = tiny("residual")
    named = build_pruner(
        parameters,
        model=network,
        evaluator=evaluator(network),
        example_inputs=example(),
        efficiency=efficiency,
    )
    assert isinstance(named, WGatesPruner)
    assert named._settings.grid == multiple
    network, settings = tiny("residual"), WGatesSettings(rounds=2, **word)
    own = WGatesPruner(
        network,
        [{"op_types": ["Conv2d"]}],
        training_steps=0,
        example_inputs=example(),
        settings=settings,
        **limit,
    )
    assert (own._settings.grid, own._settings.rounds) == (multiple, 2)


def test_a_ratio_says_how_many() -> None:
    pruner = pruner_of("taylor", config_list=[{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    pruner.compress()
    assert pruner.plan is not None
    chosen = [n for n in pruner.space.names if n not in pruner.left_out]
    widths = dict(zip(pruner.space.names, pruner.plan.widths, strict=True))
    full = dict(zip(pruner.space.names, pruner.space.full_widths, strict=True))
    assert all(widths[name] == full[name] // 2 for name in chosen if widths[name] != full[name])
    assert any(widths[name] != full[name] for name in chosen)


@torch.no_grad()
def trained(model: nn.Module) -> None:
    """What a long training does: the channels' scales and BatchNorm's statistics change."""
    generator = torch.Generator().manual_seed(3)
    model.train()
    model(example(4))
    for parameter in model.parameters():
        factors = 0.2 + 2 * torch.rand(len(parameter), generator=generator)
        parameter.mul_(factors.view(-1, *[1] * (parameter.dim() - 1)))


@pytest.mark.parametrize("strategy", ["l1", "bn-scale", "taylor", "knapsack"])
def test_it_decides_on_the_weights_of_the_moment(strategy: str) -> None:
    half = {"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]}
    untrained = pruner_of(strategy, **half)
    untrained.compress()
    late = pruner_of(strategy, **half)
    model = late.bound_model
    trained(model)
    late.unwrap_model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    late.wrap_model()
    late.compress()
    late.unwrap_model()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    fresh = tiny("residual")
    fresh.load_state_dict(state)
    fresh_pruner = StrategyPruner(
        fresh, half["config_list"], strategy, batches(), training=TRAINING
    )
    fresh_pruner.compress()
    assert late.plan is not None
    assert fresh_pruner.plan is not None
    assert untrained.plan is not None
    assert late.plan.kept == fresh_pruner.plan.kept != untrained.plan.kept


def test_a_phase_starts_from_the_weights_of_the_moment() -> None:
    barely = TrainingSettings(learning_rate=1e-9, weight_decay=0.0, accelerator="cpu")
    pruner = pruner_of("wgates", target=MacsTarget(fraction=0.5), training=barely)
    trained(pruner.bound_model)
    pruner.unwrap_model()
    state = {name: value.clone() for name, value in pruner.bound_model.state_dict().items()}
    pruner.wrap_model()
    pruner.compress()
    found = pruner.decision.network.state_dict()
    for name, value in tiny("residual").named_parameters():
        assert torch.allclose(found[name], state[name], atol=1e-5), name
        if value.dim() > 1:
            assert not torch.allclose(found[name], value, atol=1e-3), name


def test_gates_without_training_go_by_the_norms_of_the_moment() -> None:
    half = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]

    def made(network: nn.Module) -> WGatesPruner:
        return WGatesPruner(network, half, training_steps=0, example_inputs=example())

    late = made(tiny("residual"))
    trained(late.bound_model)
    late.compress()
    late.unwrap_model()
    fresh = tiny("residual")
    fresh.load_state_dict(late.bound_model.state_dict())
    others = [made(fresh), made(tiny("residual"))]
    for other in others:
        other.compress()
    plans = [pruner.plan for pruner in (late, *others)]
    kept = [plan.kept for plan in plans if plan is not None]
    assert kept[0] == kept[1] != kept[2]


def test_every_strategy_is_a_pruner_by_name() -> None:
    assert set(STRATEGIES) <= set(PRUNERS)
    assert set(OF_DATA) == set(STRATEGIES) - {"wgates", *THEIRS}


@pytest.mark.parametrize("name", OF_DATA)
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


def test_ratios_that_leave_nothing_to_search_are_refused() -> None:
    model = tiny("residual")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    half = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    with pytest.raises(ConfigError, match="`metapruning` searches widths"):
        StrategyPruner(model, half, "metapruning", batches())
    with pytest.raises(ConfigError, match="`metapruning` searches widths"):
        by_name(model, pruner="metapruning", sparse_ratio=0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_grid_beside_ratios_is_refused() -> None:
    half = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    with pytest.raises(ConfigError, match=r"grid 4 together with sparse_ratio of `0\.0`"):
        pruner_of("l1", config_list=half, grid=4)
    words: Any = {"training_steps": 0, "example_inputs": example()}
    with pytest.raises(ConfigError, match=r"grid 4 together with sparse_ratio of `0\.0`"):
        WGatesPruner(tiny("residual"), half, settings=WGatesSettings(grid=4), **words)
    for name in ("l1", "wgates", "lamp"):
        with pytest.raises(ConfigError, match="grid 4 together with sparse_ratio: "):
            by_name(tiny("residual"), pruner=name, sparse_ratio=0.5, grid=4)
    by_name(tiny("residual"), pruner="lamp", sparse_ratio=0.5, grid=1)


def by_name(model: nn.Module, **parameters: Any) -> Any:
    return build_pruner(
        parameters,
        model=model,
        evaluator=evaluator(model),
        example_inputs=example(),
        data=batches(),
    )


def test_a_ratio_over_several_layers_leaves_room_for_a_grid() -> None:
    together = [{"op_types": ["Conv2d"], "sparse_ratio": 0.3, "global_group_id": 1}]
    pruner = pruner_of("l1", config_list=together, grid=4)
    pruner.compress()
    assert pruner.plan is not None
    groups = zip(pruner.space.groups, pruner.plan.widths, strict=True)
    assert all(width % 4 == 0 or width == group.channels for group, width in groups)


@pytest.mark.parametrize("data", [None, [], iter([])])
def test_data_are_asked_for_before_anything_is_wrapped(data: Any) -> None:
    for strategy, example_inputs in (("taylor", example()), ("l1", None)):
        network = tiny("residual")
        before = snapshot(network)
        with pytest.raises(ConfigError, match=r"data: got .* batches"):
            StrategyPruner(
                network,
                CONVOLUTIONS,
                strategy,
                data,
                target=MacsTarget(fraction=0.5),
                example_inputs=example_inputs,
            )
        assert snapshot(network) == before


@pytest.mark.parametrize("data", [None, [], iter([])])
def test_a_search_space_asks_for_data_too(data: Any) -> None:
    model = tiny("residual")
    words = {
        "model": model,
        "evaluator": evaluator(model),
        "example_inputs": example(),
        "data": data,
    }
    with pytest.raises(ConfigError, match=r"data: got .*; `gdp` needs batches") as caught:
        build_pruner({"pruner": "gdp", "sparse_ratio": 2.0}, **words)
    assert len(caught.value.problems) == 2
    _, masks = build_pruner({"pruner": "lamp", "sparse_ratio": 0.5}, **words).compress()
    assert masks  # LAMP looks at weights alone


def test_problems_come_at_once() -> None:
    wrong: dict[str, Any] = {
        "epochs": -2,
        "seed": 1.5,
        "training": {"epochs": 1},
        "loss": "mean",
        "grid": 0,
        "efficiency": "latency",
    }
    with pytest.raises(ConfigError) as caught:
        pruner_of("l1", target=0.5, **wrong)
    assert options_named(caught.value) == sorted(wrong)


def test_it_is_traced_on_a_few_images_and_leaves_the_loader_as_found() -> None:
    images, labels = zip(*batches(), strict=True)
    data = torch.utils.data.TensorDataset(torch.cat(images), torch.cat(labels))
    loader: Any = torch.utils.data.DataLoader(
        data, 8, shuffle=True, generator=torch.Generator().manual_seed(3)
    )
    network = tiny("residual")
    state, own = torch.get_rng_state(), loader.generator.get_state()
    pruner = StrategyPruner(network, CONVOLUTIONS, "l1", loader, target=MacsTarget(fraction=0.5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loader.generator.get_state(), own)
    assert isinstance(pruner._example, Tensor)
    assert len(pruner._example) == 2


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ConfigError, match="known: wgates"):
        pruner_of("magic")
    with pytest.raises(ConfigError, match="epochs"):
        pruner_of("l1", epochs=-2)
    with pytest.raises(ConfigError, match="before it is traced"):
        pruner_of("scop", options={"residual": "scatter"})
    model = tiny("residual")
    with pytest.raises(ConfigError, match=r"StrategyPruner: .*\n.*neither `target` nor any"):
        StrategyPruner(model, CONVOLUTIONS, "l1", batches())
    some = [{"op_names": ["0.0", "1.main.0.0"], "sparse_ratio": 0.5}]
    with pytest.warns(UserWarning, match="StrategyPruner: layers that stay whole") as told:
        pruner_of("l1", config_list=some)
    with pytest.warns(UserWarning, match="WGatesPruner: layers that stay whole") as told_too:
        WGatesPruner(model, some, training_steps=0, example_inputs=example())
    both = [one for one in (*told, *told_too) if "stay whole" in str(one.message)]
    assert [one.filename for one in both] == [__file__] * 2
    pruner = pruner_of("l1", config_list=[{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    with pytest.raises(ConfigError, match="epochs"):
        pruner.compress(max_steps=3)
    pruner.compress()
    with pytest.raises(PlanError, match="compressed already"):
        pruner.compress()
    with pytest.raises(PlanError, match="unwrap the first"):
        StrategyPruner.from_compressor(pruner, CONVOLUTIONS)
