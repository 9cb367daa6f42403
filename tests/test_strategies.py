"""The laws of `Strategy`, for every strategy of the table."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CLASSES, example, tiny
from torch import Tensor, nn

from wgates_plugin import ChannelSpace, MacsTarget, PruningSettings, prune_to_target, trace
from wgates_plugin.efficiency import Budget, Limit, MacsModel
from wgates_plugin.errors import (
    ConfigError,
    InfeasibleTargetError,
    RunFolderError,
)
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies import STRATEGIES, Decision, Task, make_strategy, plan_for_budget
from wgates_plugin.strategies.base import InMemory
from wgates_plugin.strategies.budgeting import holds
from wgates_plugin.surgery import rebuild, remove
from wgates_plugin.training import TrainingSettings
from wgates_plugin.transforms import apply_steps
from wgates_plugin.verification import relative_error, removal_error

NETWORKS = ("plain", "residual", "depthwise", "concat")
SMALL: dict[str, dict[str, Any]] = {}
"""Strategy -> options that make it quick here; the laws hold for any."""

GRID = 2
TRAINING = TrainingSettings(learning_rate=0.02, accelerator="cpu", channels_last=True)


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (example(4, seed=seed), torch.randint(CLASSES, (4,), generator=generator))
        for seed in range(count)
    ]


class Interrupted(Exception):
    pass


class Fragile(InMemory):
    """Checkpoints of a process that dies right after its first save, or some training steps later."""

    alive = False
    saves = 0

    def __init__(self, steps_left: int = 0) -> None:
        super().__init__()
        self.steps_left = steps_left

    def save_state(self, name: str, state: dict[str, Any]) -> None:
        super().save_state(name, state)
        self.saves += 1
        self._live()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.saves:
            self.steps_left -= 1
            self._live()
        return nn.functional.cross_entropy(logits, targets)

    def _live(self) -> None:
        if not self.alive and self.steps_left <= 0:
            raise Interrupted


class Case:
    """One strategy on one network: prepared, traced, under half of its MACs."""

    states = itertools.count()

    def __init__(self, strategy: str, network: str, *, epochs: int = 1, seed: int = 0) -> None:
        self.strategy = make_strategy(strategy, SMALL.get(strategy))
        self.original = tiny(network)
        prepared = copy.deepcopy(self.original)
        self.before = self.strategy.prepare(prepared, example())
        self.network = apply_steps(prepared, self.before)
        self.space = trace(self.network, example(), min_fraction=0.2)
        model = MacsModel(self.space)
        full = float(model(torch.tensor(self.space.full_widths)))
        self.budget = Budget.of(Limit(model, 0.5 * full))
        self.epochs = epochs if self.strategy.has_phase else 0
        self.seed = seed

    def decide(self, checkpoints: InMemory | None = None) -> Decision:
        torch.manual_seed(next(self.states))  # nothing may hang on the global random state
        task = Task(
            copy.deepcopy(self.network),
            self.space,
            self.budget,
            example(),
            batches(),
            grid=GRID,
            epochs=self.epochs,
            total_epochs=self.epochs + 1,
            training=TRAINING,
            seed=self.seed,
            checkpoints=checkpoints or InMemory(),
            loss=checkpoints.loss if isinstance(checkpoints, Fragile) else None,
            progress=False,
        )
        return self.strategy.decide(task)

    def plan(self, decision: Decision) -> PruningPlan:
        return plan_for_budget(self.space, decision.scores, decision.widths, self.budget, GRID)


def same(first: Decision, second: Decision) -> bool:
    one, two = first.network.state_dict(), second.network.state_dict()
    return (
        first.widths == second.widths
        and torch.equal(first.scores, second.scores)
        and all(torch.equal(one[name], two[name]) for name in one)
    )


@pytest.fixture(params=NETWORKS)
def network_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_decision_keeps_the_laws(strategy: str, network_name: str) -> None:
    case = Case(strategy, network_name)
    before = case.network.state_dict()
    decision = case.decide()
    # Scores and widths are what a plan needs.
    assert decision.scores.shape == (case.space.total_units,)
    assert torch.isfinite(decision.scores).all()
    allowed = case.space.allowed_widths(GRID)
    assert all(width in mine for width, mine in zip(decision.widths, allowed, strict=True))
    plan = case.plan(decision)
    assert holds(case.budget, plan.widths)
    assert plan.widths != case.space.full_widths
    assert PruningPlan.from_json(json.loads(json.dumps(plan.to_json()))).kept == plan.kept
    # The network it returns is the given one, with other values at most, and nothing attached.
    after = decision.network.state_dict()
    assert {n: v.shape for n, v in after.items()} == {n: v.shape for n, v in before.items()}
    for module in decision.network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
        assert "weight" not in vars(module)
    assert all(parameter.requires_grad for parameter in decision.network.parameters())
    # What is cut computes what was gated, and what is done after the cut changes nothing.
    network = decision.network.eval()
    smaller = remove(copy.deepcopy(network), plan, example())
    assert removal_error(network, smaller, plan, example()) <= 1e-5
    with torch.no_grad():
        expected = smaller.eval()(example())
        steps = case.strategy.finish(smaller, plan, example())
        smaller = apply_steps(smaller, steps).eval()
        assert relative_error(smaller(example()), expected) <= 1e-5
    note = {"before": [dict(s) for s in case.before], "after": [dict(s) for s in steps]}
    stored = PruningPlan(plan.space, plan.kept, note)
    stored = PruningPlan.from_json(json.loads(json.dumps(stored.to_json())))
    again = rebuild(tiny(network_name), stored, smaller.state_dict())
    assert torch.equal(again(example()), smaller(example()))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_seed_gives_the_same_decision(strategy: str) -> None:
    assert same(Case(strategy, "residual").decide(), Case(strategy, "residual").decide())


@pytest.mark.parametrize("steps_left", [0, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_interrupted_phase_ends_in_the_same_place(strategy: str, steps_left: int) -> None:
    case = Case(strategy, "residual", epochs=2)
    uninterrupted = Fragile()
    uninterrupted.alive = True
    whole = case.decide(uninterrupted)
    checkpoints = Fragile(steps_left)
    try:
        case.decide(checkpoints)
    except Interrupted:
        assert steps_left or checkpoints.saves == 1
    else:
        assert steps_left or not case.strategy.has_phase
        return
    checkpoints.alive = True
    assert same(case.decide(checkpoints), whole)


OTHER_OPTIONS: dict[str, dict[str, Any]] = {
    "wgates": {"learning_rate": 0.01},
    "gdp": {"travel": 1.0},
    "scop": {"learning_rate": 0.2},
    "slim": {"sparsity": 1.0},
    "metapruning": {"hidden": 8},
    "functionality": {"step": 0.1},
}
"""Of strategies that keep checkpoints: an option that changes what they decide."""


def test_a_table_of_all_strategies_that_keep_checkpoints() -> None:
    for strategy in STRATEGIES:
        checkpoints = InMemory()
        Case(strategy, "plain").decide(checkpoints)
        assert bool(checkpoints._states) == (strategy in OTHER_OPTIONS), strategy


@pytest.mark.parametrize("strategy", OTHER_OPTIONS)
def test_checkpoints_of_another_decision_are_refused(strategy: str) -> None:
    checkpoints, case = InMemory(), Case(strategy, "residual")
    whole = case.decide(checkpoints)
    assert same(case.decide(checkpoints), whole)
    (option,) = OTHER_OPTIONS[strategy]
    case.strategy = make_strategy(strategy, OTHER_OPTIONS[strategy])
    with pytest.raises(RunFolderError, match=rf"different: settings\.{option}\)"):
        case.decide(checkpoints)
    with pytest.raises(RunFolderError, match=r"different: seed\)"):
        Case(strategy, "residual", seed=1).decide(checkpoints)
    with pytest.raises(RunFolderError, match=r"different: network\)"):
        Case(strategy, "plain").decide(checkpoints)
    if case.strategy.has_phase:
        with pytest.raises(RunFolderError, match=r"different: epochs\)"):
            Case(strategy, "residual", epochs=2).decide(checkpoints)
    (name, *_) = checkpoints._states
    checkpoints._states[name].pop("identity")  # as an older version has left it in a run folder
    assert same(Case(strategy, "residual").decide(checkpoints), whole)


@pytest.mark.parametrize("strategy", OTHER_OPTIONS)
def test_checkpoints_of_other_weights_are_refused(strategy: str) -> None:
    checkpoints, case = InMemory(), Case(strategy, "residual")
    whole = case.decide(checkpoints)
    other = Case(strategy, "residual")
    with torch.no_grad():
        next(other.network.parameters()).mul_(2)
    with pytest.raises(RunFolderError, match=r"another run \(different: weights\), which this one"):
        other.decide(checkpoints)
    (name, *_) = checkpoints._states
    checkpoints._states[name]["identity"].pop("weights")  # as an older version has left it
    assert same(case.decide(checkpoints), whole)


def test_checkpoints_of_another_strategy_are_refused() -> None:
    checkpoints = InMemory()
    Case("slim", "residual").decide(checkpoints)
    with pytest.raises(RunFolderError, match=r"`phase\.pt`: belongs to .*different: strategy\)"):
        Case("gdp", "residual").decide(checkpoints)


def test_generators_among_the_settings_are_told_apart() -> None:
    checkpoints, case = InMemory(), Case("scop", "residual")
    generator = nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        generator.weight.mul_(0.1)
    case.strategy = make_strategy("scop", {"knockoffs": generator})
    first = case.decide(checkpoints)
    case.strategy = make_strategy("scop", {"knockoffs": copy.deepcopy(generator)})
    assert same(case.decide(checkpoints), first)
    with torch.no_grad():
        generator.weight.mul_(2)
    case.strategy = make_strategy("scop", {"knockoffs": generator})
    with pytest.raises(RunFolderError, match=r"different: settings\.knockoffs\)"):
        case.decide(checkpoints)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_least_widths_are_refused_when_they_cost_too_much(strategy: str) -> None:
    case = Case(strategy, "residual")
    model = case.budget.limits[0].model
    least = float(model(torch.tensor(case.space.least_widths(GRID))))
    case.budget = Budget.of(Limit(model, 0.9 * least))
    with pytest.raises(InfeasibleTargetError, match="out of reach"):
        case.decide()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_unknown_options_are_refused(strategy: str) -> None:
    with pytest.raises(ConfigError, match=r"wigth is unknown to .*known: "):
        make_strategy(strategy, {"wigth": 1})


def test_an_unknown_strategy_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="known: wgates, "):
        make_strategy("magic")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_whole_job_by_any_strategy(strategy: str, tmp_path: Path) -> None:
    network = tiny("residual")
    before = copy.deepcopy(network.state_dict())
    data = batches()
    result = prune_to_target(
        network,
        example(),
        data,
        data,
        target=MacsTarget(fraction=0.5),
        settings=PruningSettings(
            strategy=strategy,
            options=SMALL.get(strategy, {}),
            gate_epochs=1,
            fine_tune_epochs=1,
            measure_seconds=0.01,
            min_fraction=0.2,
            training=TRAINING,
        ),
        run_folder=tmp_path / "run",
        progress=False,
    )
    assert result.held
    assert result.report["strategy"] == strategy
    assert result.plan.note["strategy"] == strategy
    kind = STRATEGIES[strategy]
    epochs = [row["epoch"] for row in result.report["training"] if row["label"] == "fine-tune"]
    first = 1 if kind.has_phase and kind.trains_weights else 0
    last = 2 if kind.trains_weights or not kind.has_phase else 1
    assert epochs == list(range(first, last))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    again = rebuild(
        tiny("residual"),
        result.run_folder / "plan.json",
        result.run_folder / "pruned.safetensors",
    )
    assert torch.equal(again(example()), result.network(example()))


def test_widths_of_a_space_say_what_is_left() -> None:
    """The suite's own networks can be halved: otherwise its budgets would ask for nothing."""
    for name in NETWORKS:
        space: ChannelSpace = trace(tiny(name), example(), min_fraction=0.2)
        model = MacsModel(space)
        rows = torch.tensor([space.full_widths, space.least_widths(GRID)])
        full, least = model(rows).tolist()
        assert least < 0.5 * full


def test_strategies_leave_modes_as_found() -> None:
    for strategy in STRATEGIES:
        case = Case(strategy, "plain")
        case.network.eval()
        assert not any(m.training for m in case.decide().network.modules()), strategy
    assert isinstance(case.network, nn.Module)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_no_numbers_are_told(wrong: float) -> None:
    space = trace(tiny("plain"), example())
    scores = torch.rand(space.total_units)
    decision = Decision(tiny("plain"), scores, space.full_widths, facts={"key": {1, 2}})
    with pytest.raises(ConfigError, match=r"mine: 1 problem\n.*facts"):
        decision.plain(space, "mine")
    scores[space.offsets[1]] = wrong
    with pytest.raises(ConfigError, match=rf"2 problems\n.*scores of `{space.names[1]}` are not"):
        decision.plain(space, "mine")
    short = Decision(tiny("plain"), torch.zeros(3), space.full_widths)
    with pytest.raises(ConfigError, match=rf"have shape \(3,\), needed \({space.total_units},\)"):
        short.plain(space, "mine")
