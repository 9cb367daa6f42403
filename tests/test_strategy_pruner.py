"""`StrategyPruner`: every strategy through torch-pruning's interface."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch_pruning as tp
from helpers import MeasuredMacs, options_named, same_tensors, snapshot
from networks import example, tiny
from test_gdp import branchy
from test_strategies import SMALL, TRAINING, batches
from torch import Tensor, nn

from wgates_plugin import rebuild, trace
from wgates_plugin.efficiency import Budget, Limit, MacsModel
from wgates_plugin.errors import ConfigError, InfeasibleTargetError, PlanError, TrainingError
from wgates_plugin.integrations.torch_pruning import (
    PolarisedGates,
    StrategyPruner,
    WGatesPruner,
)
from wgates_plugin.strategies import STRATEGIES, Decision, Task
from wgates_plugin.strategies.budgeting import fit_to_budget
from wgates_plugin.verification import removal_error


def pruner_of(strategy: str = "l1", network: str = "residual", **words: Any) -> StrategyPruner:
    words = {"min_fraction": 0.2, "training": TRAINING, "options": SMALL.get(strategy), **words}
    return StrategyPruner(tiny(network), example(), strategy, batches(), **words)


@pytest.mark.filterwarnings("ignore:.*fresh weights")
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


@pytest.mark.parametrize(
    ("word", "multiple"), [({}, 4), ({"round_to": 1}, 1), ({"round_to": 2}, 2)]
)
@pytest.mark.parametrize("given", ["model", "function of the space"])
def test_widths_are_those_that_the_latency_model_has_seen(
    word: dict[str, int], multiple: int, given: str
) -> None:
    space = pruner_of().space
    model = MeasuredMacs(space, grid=4)
    full = float(model(torch.tensor(space.full_widths)))
    efficiency = model if given == "model" else lambda _: model
    limit: dict[str, Any] = {"efficiency": efficiency, "target": 0.5 * full, **word}
    pruner = pruner_of("l1", **limit)
    pruner.step()
    assert pruner.plan is not None
    widths = zip(pruner.plan.widths, space.full_widths, strict=True)
    cut = [width for width, whole in widths if width < whole]
    assert cut
    assert all(width % multiple == 0 for width in cut)
    in_loop = WGatesPruner(tiny("residual"), example(), **limit)
    assert (pruner.round_to or 1, in_loop.round_to or 1) == (multiple, multiple)
    in_loop.detach()
    gates = PolarisedGates(tiny("residual"), space, Budget.of(Limit(model, full)), steps=2)
    assert gates.grid == 4


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
            "l1",
            options={"scoop": 1},
            epochs=-1,
            iterative_steps=3,
            pruning_ratio=2,
            round_to=0,
            seed=1.5,
            loss="mean",
            training={"epochs": 1},
            min_channels=-1,
            min_fraction=float("nan"),
        )
    assert caught.value.subject == "StrategyPruner"
    assert options_named(caught.value) == [
        "epochs",
        "iterative_steps",
        "loss",
        "min_channels",
        "min_fraction",
        "options.scoop",
        "pruning_ratio",
        "round_to",
        "seed",
        "training",
    ]
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


def test_a_plan_that_closed_a_branch_can_be_repeated() -> None:
    network = branchy()
    space = trace(network, example())
    full = float(MacsModel(space)(torch.tensor(space.full_widths)))
    pruner = StrategyPruner(
        network, example(), "gdp", batches(), epochs=6, target=0.2 * full, training=TRAINING
    )
    pruner.step()
    assert pruner.plan is not None
    assert pruner.plan.note["after"]
    again = rebuild(branchy(), pruner.plan, pruner.model.state_dict())
    assert torch.equal(again.eval()(example()), pruner.model.eval()(example()))


# Subjects and targets at construction


@pytest.mark.parametrize("kind", [StrategyPruner, WGatesPruner])
def test_errors_name_the_class_that_was_called(kind: Any) -> None:
    class Mine(kind):  # type: ignore[misc]
        pass

    for called in (kind, Mine):
        words: dict[str, Any] = {} if kind is WGatesPruner else {"strategy": "l1"}
        network = tiny("residual")
        head = nn.Linear(2, 2)
        coupled = {network[0][0]: 0.5, network[1].main[1]: 0.2}
        for wrong in ({"pruning_ratio": 3}, {"pruning_ratio_dict": {head: 0.5}},
                      {"pruning_ratio_dict": coupled}):  # fmt: skip
            with pytest.raises(ConfigError) as caught:
                called(network, example(), **words, **wrong)
            assert caught.value.subject == called.__name__
            assert len(caught.value.problems) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_target_out_of_reach_is_told_at_construction(strategy: str) -> None:
    network = tiny("residual")
    before = snapshot(network)
    with pytest.raises(InfeasibleTargetError, match="out of reach"):
        StrategyPruner(network, example(), strategy, batches(), target=1.0)
    assert snapshot(network) == before


def test_widths_that_the_search_cannot_reach_are_told_at_construction() -> None:
    space = pruner_of(pruning_ratio=0.5, min_fraction=0.0).space
    least = float(MacsModel(space)(torch.tensor(space.least_widths())))
    words: dict[str, Any] = {"target": 1.05 * least, "min_fraction": 0.0}
    with pytest.raises(InfeasibleTargetError, match="least_share"):
        pruner_of("metapruning", options={"least_share": 0.5}, **words)
    pruner_of("l1", **words)


@pytest.mark.parametrize("strategy", ["taylor", "hessian", "scop", "wgates", "knapsack"])
@pytest.mark.parametrize("data", [None, [], iter([])])
def test_data_are_asked_for_at_construction(strategy: str, data: Any) -> None:
    with pytest.raises(ConfigError, match=f"data: got .*; `{strategy}` needs batches"):
        StrategyPruner(tiny("plain"), example(), strategy, data, pruning_ratio=0.5)


def test_criteria_of_weights_alone_need_no_data() -> None:
    pruner = StrategyPruner(tiny("plain"), example(), "l1", pruning_ratio=0.5)
    pruner.step()
    assert pruner.plan is not None
    assert pruner.plan.widths == (4, 6)


# MetaPruning gives up the trained weights


@pytest.mark.parametrize("strategy", ["taylor", "hessian", "knapsack"])
def test_gradients_of_some_batches(strategy: str) -> None:
    def looked_at(**options: Any) -> int:
        pruner = pruner_of(strategy, target=3e4, options=options, loss=counted)
        seen.clear()
        pruner.step()
        return len(seen)

    seen: list[int] = []

    def counted(logits: Tensor, targets: Tensor) -> Tensor:
        seen.append(len(logits))
        return nn.functional.cross_entropy(logits, targets)

    whole, some = looked_at(), looked_at(batches=2)
    assert some * len(batches()) == whole * 2
    with pytest.raises(ConfigError, match=r"options\.batches is 0"):
        pruner_of(strategy, target=3e4, options={"batches": 0})


def test_a_search_over_widths_takes_no_ratios() -> None:
    for ratios in ({"pruning_ratio": 0.5}, {}):
        with pytest.raises(ConfigError, match="searches widths within a budget"):
            pruner_of("metapruning", **ratios)


def test_fresh_weights_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    words: dict[str, Any] = {"target": 3e4, "epochs": 0, "min_fraction": 0.0}
    with pytest.warns(UserWarning, match="train it from scratch"):
        pruner = pruner_of("metapruning", **words)
    with caplog.at_level(logging.WARNING, "wgates_plugin"):
        pruner.step()
    assert "fresh weights" in caplog.text


def test_inherited_weights_are_the_trained_ones(recwarn: pytest.WarningsRecorder) -> None:
    pruner = pruner_of("metapruning", options={"weights": "inherit"}, target=3e4, epochs=0)
    assert not [one for one in recwarn if "scratch" in str(one.message)]
    pruner.step()
    assert pruner.plan is not None
    assert removal_error(tiny("residual"), pruner.model.eval(), pruner.plan, example()) <= 1e-5


# What is handed to the strategy, and what comes of its answer


class Told:
    """Stands for a strategy: notes its task and answers what the test says."""

    def __init__(self, pruner: StrategyPruner, answer: Any) -> None:
        self.task: Task | None = None
        self.has_phase = pruner.strategy.has_phase
        self.answer, pruner.strategy = answer, self  # type: ignore[assignment]

    def decide(self, task: Task) -> Decision:
        self.task = task
        with torch.no_grad():
            for parameter in task.network.parameters():
                parameter.mul_(1.5)  # as if it had trained
        if isinstance(self.answer, Exception):
            raise self.answer
        return Decision(task.network, *self.answer)

    def finish(self, *_: Any) -> list[Any]:
        return []


def loss_of(logits: Tensor, targets: Any) -> Tensor:
    return nn.functional.cross_entropy(logits, targets)


def test_every_word_reaches_the_strategy() -> None:
    data = batches()
    network = tiny("residual")
    pruner = StrategyPruner(
        network,
        example(),
        "wgates",
        data,
        target=3e4,
        epochs=3,
        training=TRAINING,
        loss=loss_of,
        seed=11,
        round_to=2,
    )
    scores = torch.arange(pruner.space.total_units).float()
    told = Told(pruner, (scores, pruner.space.least_widths(2)))
    pruner.step()
    task = told.task
    assert task is not None
    assert (task.seed, task.grid, task.epochs, task.total_epochs) == (11, 2, 3, 3)
    assert task.loss is loss_of
    assert task.training is TRAINING
    assert task.train_loader is data
    assert task.space is pruner.space
    assert task.network is not network
    assert [limit.target for limit in task.budget.limits] == [3e4]


def test_the_widths_that_a_strategy_wants_are_kept_where_the_budget_allows() -> None:
    """Two answers of the same scores and other widths, both of which fill the budget."""
    found = []
    for favoured in (0, 1):
        pruner = pruner_of("l1", "plain", target=2e4, min_fraction=0.0)
        space, budget = pruner.space, pruner._goal.budget(pruner.space, 1)
        taste = torch.full((space.total_units,), 0.1)
        taste[space.unit_slice(favoured)] = 1.0
        wanted = fit_to_budget(space, taste, space.full_widths, budget)
        Told(pruner, (torch.arange(space.total_units).float(), wanted))
        pruner.step()
        assert pruner.plan is not None
        assert pruner.plan.widths == wanted
        found.append(wanted)
        for kept, group in zip(pruner.plan.kept, space.groups, strict=True):
            assert kept == tuple(range(group.units - len(kept), group.units))  # by score
        weight = tiny("plain")[0][0].weight[list(pruner.plan.kept[0])]
        assert torch.equal(pruner.model[0][0].weight, 1.5 * weight)  # those it trained
    assert found[0] != found[1]


def test_a_decision_that_fails_leaves_network_and_pruner_usable() -> None:
    pruner = pruner_of("l1", pruning_ratio=0.5, min_fraction=0.0)
    strategy = pruner.strategy
    before = snapshot(pruner.model)
    Told(pruner, TrainingError("the loss is nan"))
    with pytest.raises(TrainingError, match="the loss is nan"):
        pruner.step()
    assert pruner.current_step == 0
    assert pruner.plan is None
    budgeted = pruner_of("l1", target=3e4)
    whole = snapshot(budgeted.model)
    Told(budgeted, (torch.zeros(budgeted.space.total_units), (1, 2, 3, 4, 5, 6, 7)))
    with pytest.raises(ValueError, match="zip"):
        budgeted.step()
    assert snapshot(budgeted.model) == whole
    assert snapshot(pruner.model) == before
    pruner.strategy = strategy
    pruner.step()
    assert pruner.model[0][0].out_channels == 4


def test_the_seed_decides_chance() -> None:
    plans = []
    for seed in (0, 0, 1):
        pruner = pruner_of("random", "plain", pruning_ratio=0.5, min_fraction=0.0, seed=seed)
        pruner.step()
        assert pruner.plan is not None
        plans.append(pruner.plan.kept)
    assert plans[0] == plans[1] != plans[2]


def test_the_loss_decides_criteria_of_gradients() -> None:
    """A loss that hears the network's first class only."""
    plans = []
    for loss in (None, lambda logits, _: logits[:, 0].square().mean()):
        pruner = pruner_of("taylor", "plain", pruning_ratio=0.5, min_fraction=0.0, loss=loss)
        pruner.step()
        assert pruner.plan is not None
        plans.append(pruner.plan.kept)
    assert plans[0] != plans[1]


# Criteria over all groups


def uneven(name: str) -> nn.Module:
    """A network whose layers have weights of very different size."""
    network = tiny(name)
    with torch.no_grad():
        for power, module in enumerate(m for m in network.modules() if isinstance(m, nn.Conv2d)):
            module.weight.mul_(10.0 ** (power % 3))
    return network


def globally(network: nn.Module, strategy: str, **words: Any) -> StrategyPruner:
    pruner = StrategyPruner(
        network,
        example(),
        strategy,
        batches(),
        pruning_ratio=0.5,
        global_pruning=True,
        **words,
    )
    pruner.step()
    assert pruner.plan is not None
    return pruner


@pytest.mark.parametrize("strategy", ["l1", "l2"])
def test_global_ranking_does_not_see_the_scale_of_layers(strategy: str) -> None:
    even, other = (globally(make("plain"), strategy) for make in (tiny, uneven))
    assert even.plan is not None
    assert other.plan is not None
    assert even.plan.kept == other.plan.kept
    units = sum(group.units for group in even.space.groups)
    assert sum(len(kept) for kept in even.plan.kept) == units // 2
    assert even.plan.widths != tuple(group.channels // 2 for group in even.space.groups)


@pytest.mark.parametrize("name", ["plain", "concat"])
def test_lamp_ranks_over_all_groups_as_in_torch_pruning(name: str) -> None:
    ours, theirs = uneven(name), uneven(name)
    pruner = globally(ours, "lamp", max_pruning_ratio=0.9)
    heads = [m for m in theirs.modules() if isinstance(m, nn.Linear)]
    other = tp.pruner.BasePruner(
        theirs,
        (example(),),
        tp.importance.LAMPImportance(),
        pruning_ratio=0.5,
        global_pruning=True,
        max_pruning_ratio=0.9,
        ignored_layers=heads,
        in_channel_groups={},
        out_channel_groups={},
    )
    other.step()
    widths = dict(zip(pruner.space.names, pruner.plan.widths, strict=True))  # type: ignore[union-attr]
    left = trace(theirs, example())
    assert widths == dict(zip(left.names, left.full_widths, strict=True))
    assert same_tensors(ours.state_dict(), theirs.state_dict())
