"""Iterative steps, histories and states of the torch-pruning door."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning as tp
from helpers import same_tensors, snapshot
from networks import example, tiny
from torch_pruning_helpers import AT_ONCE, SETTINGS, learn, macs

from wgates_plugin import rebuild
from wgates_plugin.efficiency import MacsModel
from wgates_plugin.errors import PlanError
from wgates_plugin.integrations.torch_pruning import WGatesPruner
from wgates_plugin.strategies import WGatesSettings


@pytest.mark.parametrize("goal", [{"pruning_ratio": 0.6}, {"target": None}])
@pytest.mark.parametrize("between", [0, 1])
def test_iterative_steps_end_where_one_would(goal: dict[str, Any], between: int) -> None:
    network = tiny("concat")
    full = macs(network)
    if "target" in goal:
        goal = {"target": 0.4 * full, "efficiency": MacsModel}
    pruner = WGatesPruner(network, example(), iterative_steps=3, settings=SETTINGS, **goal)
    learn(pruner, network, steps=2)
    sizes = [full]
    cost = MacsModel(pruner.space)
    for step in range(3):
        if step:
            learn(pruner, network, steps=between)  # 0: straight on, with what was learned
        pruner.step()
        assert pruner.plan is not None
        sizes.append(float(cost(torch.tensor(pruner.plan.widths))))
    assert sizes[-1] == macs(network)
    assert sizes == sorted(set(sizes), reverse=True)
    assert pruner.plan is not None
    if "target" in goal:
        for step, size in enumerate(sizes):
            assert size <= full - 0.6 * full * step / 3
    else:
        assert pruner.plan.widths == (2, 1, 1, 1, 3)
    # The composed plan rebuilds the network from the original class.
    twin = rebuild(tiny("concat"), pruner.plan, network.state_dict())
    assert torch.equal(twin(example()), network.eval()(example()))
    with pytest.raises(PlanError, match="pruned already, in 3"):
        pruner.step()
    with pytest.raises(PlanError, match="fine-tune it without"):
        pruner.regularize(network)


def test_gates_of_a_later_step_start_from_what_was_learned() -> None:
    network = tiny("plain")
    pruner = WGatesPruner(
        network, example(), pruning_ratio=0.5, iterative_steps=2, settings=AT_ONCE
    )
    learn(pruner, network, steps=1)
    order = torch.tensor([3, 1, 4, 0, 5, 7, 2, 6])
    with torch.no_grad():
        pruner.gates.scores.offset[:8] = order / 100
    pruner.step()
    pruner.step()
    assert pruner.plan is not None
    assert pruner.plan.kept[0] == (2, 4, 5, 7)


@pytest.mark.parametrize("goal", [{"pruning_ratio": 0.6}, {"target": 3e4}])
def test_gates_of_every_step_measure_anew(goal: dict[str, Any]) -> None:
    """Until they have, they hold to what the step before learned."""
    network = tiny("concat")
    settings = WGatesSettings(learning_rate=0.05, measuring=2, rounds=1)
    pruner = WGatesPruner(network, example(), iterative_steps=2, settings=settings, **goal)
    learn(pruner, network, steps=4)
    learned = pruner.gates.unit_scores()
    pruner.step()
    assert pruner.plan is not None
    kept = pruner.plan.kept
    left = [
        learned[pruner.space.unit_slice(index)][list(kept[index])].argsort().tolist()
        for index, name in enumerate(pruner.space.names)
        if name in pruner._now.names
    ]
    carried = pruner.gates.unit_scores()
    assert left == [
        carried[pruner._now.unit_slice(index)].argsort().tolist()
        for index in range(len(pruner._now.groups))
    ]
    assert pruner.gates.merits.wanted
    monitor = learn(pruner, network, steps=2)
    assert monitor["open_share"] == 1.0
    assert not pruner.gates.merits.wanted
    assert not torch.equal(pruner.gates.unit_scores(), carried)
    assert learn(pruner, network, steps=1)["open_share"] < 1.0
    pruner.step()


def test_a_given_importance_leaves_nothing_to_measure() -> None:
    network = tiny("plain")
    pruner = WGatesPruner(network, example(), tp.importance.LAMPImportance(), iterative_steps=2)
    for _ in range(2):
        assert not pruner.gates.merits.wanted
        assert learn(pruner, network, steps=1)["open_share"] < 1.0
        pruner.step()


def test_ratios_say_how_wide_and_measuring_says_which() -> None:
    network = tiny("plain")
    with torch.no_grad():  # nothing reads the larger half of the first layer
        network[0][0].weight[4:] *= 10
        network[1][0].weight[:, 4:] = 0
    kept = []
    for measuring in (0, 3):
        settings = WGatesSettings(measuring=measuring)
        pruner = WGatesPruner(copy.deepcopy(network), example(), settings=settings)
        learn(pruner, pruner.model, steps=3, rate=0.0)
        assert pruner.gates.widths() == (4, 6)
        pruner.step()
        assert pruner.plan is not None
        kept.append(pruner.plan.kept[0])
    assert kept == [(4, 5, 6, 7), (0, 1, 2, 3)]


def test_open_gates_have_to_learn_before_every_step() -> None:
    network = tiny("plain")
    settings = WGatesSettings(start="open", learning_rate=0.05)
    pruner = WGatesPruner(network, example(), iterative_steps=2, settings=settings, steps=1)
    learn(pruner, network, steps=1)
    pruner.step()
    with pytest.raises(PlanError, match="never learned"):
        pruner.step()


def test_an_unfinished_interactive_step_is_noticed() -> None:
    network = tiny("concat")
    pruner = WGatesPruner(network, example(), iterative_steps=2)
    learn(pruner, network, steps=1)
    groups = pruner.step(interactive=True)
    assert groups is not None
    next(groups).prune()
    with pytest.raises(PlanError, match="half pruned"):
        pruner.step()
    with pytest.raises(PlanError, match="not finished"):
        pruner.state_dict()


@pytest.mark.parametrize("name", ["residual", "grouped", "concat", "flattened"])
def test_a_history_prunes_a_fresh_network_alike(name: str) -> None:
    network = tiny(name)
    pruner = WGatesPruner(network, example(), iterative_steps=2)
    learn(pruner, network, steps=1)
    pruner.step()
    pruner.step()
    history = pruner.pruning_history()
    assert pruner.plan is not None
    fresh = tiny(name)
    other = WGatesPruner(fresh, example())
    other.load_pruning_history(history)
    assert other.plan is not None
    assert other.plan.kept == pruner.plan.kept
    assert other.pruning_history() == history
    other.detach()
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh.eval()(example()), network.eval()(example()))
    # torch-pruning's own reader understands it.
    third = tiny(name)
    tp.DependencyGraph().build_dependency(third, (example(),)).load_pruning_history(history)
    assert [p.shape for p in third.parameters()] == [p.shape for p in network.parameters()]


def test_a_history_of_torch_prunings_pruner_is_read() -> None:
    network = tiny("concat")
    theirs = tp.pruner.BasePruner(
        network,
        (example(),),
        tp.importance.RandomImportance(),
        pruning_ratio=0.5,
        ignored_layers=[network[-1].fc],
        in_channel_groups={},
        out_channel_groups={},
    )
    theirs.step()
    fresh = tiny("concat")
    ours = WGatesPruner(fresh, example())
    ours.load_pruning_history(theirs.pruning_history())
    ours.detach()
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh.eval()(example()), network.eval()(example()))


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ([["nowhere", True, [0]]], "in no group"),
        ([["0.0", True, [8]]], "which has 8"),
        ([["0.0", True, [0] * 1], ["0.0", True, [7]]], "which has 7"),
        ([["0.0", True, list(range(8))]], "its floor"),
        ([["0.0", "?"]], "is no"),
    ],
)
def test_wrong_histories_are_refused(history: list[Any], words: str) -> None:
    network = tiny("residual")
    pruner = WGatesPruner(network, example())
    before = snapshot(network)
    with pytest.raises(PlanError, match=words):
        pruner.load_pruning_history(history)
    assert snapshot(network) == before


def test_a_state_between_steps_resumes_on_a_fresh_network() -> None:
    network = tiny("residual")
    options: dict[str, Any] = {"iterative_steps": 2, "settings": SETTINGS}
    pruner = WGatesPruner(network, example(), **options)
    learn(pruner, network, steps=2)
    pruner.step()
    learn(pruner, network, steps=1)
    state = copy.deepcopy((pruner.state_dict(), network.state_dict()))
    twin = tiny("residual")
    resumed = WGatesPruner(twin, example(), **options)
    resumed.load_state_dict(state[0])
    twin.load_state_dict(state[1])
    for one, net in ((pruner, network), (resumed, twin)):
        learn(one, net, steps=1)
        one.step()
    assert same_tensors(network.state_dict(), twin.state_dict())
    assert pruner.plan is not None
    assert resumed.plan is not None
    assert pruner.plan.kept == resumed.plan.kept
    with pytest.raises(PlanError, match="pruned already"):
        resumed.load_state_dict(state[0])


def test_states_load_without_executing_anything(tmp_path: Any) -> None:
    network = tiny("residual")
    pruner = WGatesPruner(network, example(), iterative_steps=2)
    learn(pruner, network, steps=1)
    pruner.step()
    torch.save(pruner.state_dict(), tmp_path / "pruner.pt")
    twin = tiny("residual")
    resumed = WGatesPruner(twin, example(), iterative_steps=2)
    resumed.load_state_dict(torch.load(tmp_path / "pruner.pt", weights_only=True))
    assert [p.shape for p in twin.parameters()] == [p.shape for p in network.parameters()]
    with pytest.raises(PlanError, match="a field is missing"):
        WGatesPruner(tiny("residual"), example()).load_state_dict({"step": 1})
    other = WGatesPruner(tiny("residual"), example())
    with pytest.raises(PlanError, match="2 steps are done"):
        other.load_state_dict({**pruner.state_dict(), "step": 2})
    with pytest.raises(PlanError, match="its gates do not fit"):
        other.load_state_dict({**pruner.state_dict(), "kept": None, "step": 0})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("kept", 5, "a field is missing or wrong"),
        ("kept", [["x"]], "a field is missing or wrong"),
        ("history", 5, "a field is missing or wrong"),
        ("history", [5], "a field is missing or wrong"),
        ("history", [["conv", True]], "pruning history"),
        ("history", [], "leaves other channels than it keeps"),
        ("step", -1, "-1 steps are done"),
        ("gates", None, "a field is missing or wrong"),
    ],
)
def test_a_state_that_is_wrong_is_refused_before_anything_goes(
    field: str, value: object, words: str
) -> None:
    network = tiny("residual")
    pruner = WGatesPruner(network, example(), iterative_steps=2)
    learn(pruner, network, steps=1)
    pruner.step()
    twin = tiny("residual")
    resumed = WGatesPruner(twin, example(), iterative_steps=2)
    before = snapshot(twin)
    with pytest.raises(PlanError, match=words):
        resumed.load_state_dict({**pruner.state_dict(), field: value})
    assert snapshot(twin) == before
