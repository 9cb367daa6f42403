"""Plans: validation, composition, files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_plan
from networks import example, tiny

from wgates_plugin import ChannelSpace, PruningPlan, trace
from wgates_plugin.closed_loop import capped, relative_plan, subset, trimmed
from wgates_plugin.efficiency import Budget, Limit, MacsModel
from wgates_plugin.errors import FileFormatError, PlanError
from wgates_plugin.surgery import remove
from wgates_plugin.verification import TOLERANCE, relative_error


@pytest.fixture
def space() -> ChannelSpace:
    return trace(tiny("grouped"), example())


def test_masks_and_kept_units_are_one(space: ChannelSpace) -> None:
    plan = random_plan(space, 0)
    assert PruningPlan.from_masks(space, plan.mask).kept == plan.kept
    assert PruningPlan.from_masks(space, plan.mask.numpy(), source="test").note == {
        "source": "test"
    }
    assert [int(plan.mask[space.unit_slice(g)].sum()) for g in range(4)] == [
        len(kept) for kept in plan.kept
    ]
    with pytest.raises(PlanError, match="mask of shape"):
        PruningPlan.from_masks(space, plan.mask[1:])


def test_top_keeps_the_best_and_breaks_ties_by_number(space: ChannelSpace) -> None:
    widths = [2, 6, 12, 3]
    scores = torch.zeros(space.total_units)
    scores[5] = 1.0
    plan = PruningPlan.top(space, scores, widths)
    assert plan.kept[0] == (0, 5)
    assert plan.kept[1] == (0, 1)
    assert plan.widths == tuple(widths)


def test_scores_that_order_nothing_are_refused(space: ChannelSpace) -> None:
    widths = space.full_widths
    scores = torch.rand(space.total_units)
    with pytest.raises(PlanError, match=rf"shape \(3,\), needed \({space.total_units},\)"):
        PruningPlan.top(space, scores[:3], widths)
    infinite = scores.clone()
    infinite[0], infinite[-1] = float("inf"), float("-inf")
    PruningPlan.top(space, infinite, widths)
    for index in (0, 2):
        scores[space.offsets[index]] = float("nan")
    with pytest.raises(PlanError, match=rf"of `{space.names[0]}`, `{space.names[2]}` are not fin"):
        PruningPlan.top(space, scores, widths)


@pytest.mark.parametrize("size", [1.0, 1e9, 1e30])
def test_what_is_gone_stays_gone_whatever_the_scores(size: float) -> None:
    """A float32 of a billion has no room for a difference of one."""
    space = trace(tiny("plain"), example())
    generator = torch.Generator().manual_seed(0)
    scores = size * (1.0 + 1e-3 * torch.rand(space.total_units, generator=generator))
    odd = PruningPlan.from_masks(space, torch.arange(space.total_units) % 2 == 1)
    scores[odd.kept[0][0]] = scores.min()
    scores[odd.kept[0][1]] = -torch.inf
    assert subset(odd, scores, odd.widths).kept == odd.kept
    best = subset(odd, scores, (2, 3)).kept
    for index, kept in enumerate(best):
        mine = scores[space.unit_slice(index)]
        order = sorted(odd.kept[index], key=lambda unit: -float(mine[unit]))
        assert kept == tuple(sorted(order[: len(kept)]))


@pytest.mark.parametrize(
    ("first", "words"),
    [
        ((), "keeps 0 of 8 channels, its floor is 1"),
        ((1, 1), "repeat or are out of order"),
        ((2, 1), "repeat or are out of order"),
        ((0, 8), "unit 8 of 8 does not exist"),
        ((-1, 3), "unit -1 of 8 does not exist"),
    ],
)
def test_invalid_units_are_refused(space: ChannelSpace, first: tuple[int, ...], words: str) -> None:
    rest = tuple(tuple(range(group.units)) for group in space.groups[1:])
    with pytest.raises(PlanError, match=words) as caught:
        PruningPlan(space, (first, *rest))
    assert "`0.0`" in str(caught.value)


def test_all_problems_are_told_at_once(space: ChannelSpace) -> None:
    with pytest.raises(PlanError) as caught:
        PruningPlan(space, ((), (0,), (9, 1), ()))
    assert str(caught.value).count("group `") == 3
    with pytest.raises(PlanError, match="1 entries for 4 groups"):
        PruningPlan(space, ((0,),))


def test_a_plan_keeps_to_caps(tmp_path: Path) -> None:
    six: Any = np.int64(6)
    space = trace(tiny("plain"), example(), caps={"0.0": six})
    with pytest.raises(PlanError, match=r"`0\.0`: keeps 7 of 8 channels, its cap is 6"):
        PruningPlan.top(space, torch.rand(20), (7, 12))
    PruningPlan.top(space, torch.rand(20), (6, 12)).save(tmp_path / "plan.json")
    assert PruningPlan.leading(space, space.full_widths).widths == (8, 12)


def test_steps_of_both_plans_are_told_in_their_order(space: ChannelSpace) -> None:
    def noted(**note: Any) -> PruningPlan:
        return PruningPlan(space, tuple(tuple(range(g.units)) for g in space.groups), note)

    outer = noted(strategy="gdp", before=[{"transform": "a"}], after=[{"transform": "b"}])
    assert outer.compose(noted(after=[{"transform": "c"}])).note == {
        "strategy": "gdp",
        "before": [{"transform": "a"}],
        "after": [{"transform": "b"}, {"transform": "c"}],
    }
    with pytest.raises(PlanError, match="changes layers before its cut"):
        noted().compose(outer)


def test_removed_channels_repeat_over_conv_groups(space: ChannelSpace) -> None:
    plan = PruningPlan(space, ((0,), (1, 3), (0, 1, 2, 3), (0,)))
    assert plan.removed_channels(1) == [0, 2, 4, 6, 8, 10]
    assert plan.removed_channels(2) == []


def test_composition_equals_two_removals() -> None:
    network = tiny("grouped")
    twice = copy.deepcopy(network)
    outer = random_plan(trace(network, example()), 1)
    remove(twice, outer, example())
    inner = random_plan(trace(twice, example()), 2)
    remove(twice, inner, example())
    both = outer.compose(inner)
    once = remove(copy.deepcopy(network), both, example())
    with torch.no_grad():
        assert relative_error(once(example()), twice(example())) <= TOLERANCE
    assert relative_plan(both, outer, inner.space).kept == inner.kept
    with pytest.raises(PlanError, match="keeps what is gone already"):
        both.compose(outer)


def test_floors_that_are_fractions_shrink_with_the_network() -> None:
    network = tiny("plain")
    twice = copy.deepcopy(network)
    outer = PruningPlan.leading(trace(network, example(), min_fraction=0.5), (4, 6))
    remove(twice, outer, example())
    inner = PruningPlan.leading(trace(twice, example(), min_fraction=0.5), (2, 4))
    both = outer.compose(inner)
    assert both.widths == (2, 4)
    assert [group.floor for group in both.space.groups] == [2, 3]
    assert both.space.fingerprint == outer.space.fingerprint
    assert PruningPlan.from_json(both.to_json()).kept == both.kept
    with pytest.raises(PlanError, match="is gone already"):
        relative_plan(outer, both, both.space)


def test_trimming_only_closes(space: ChannelSpace) -> None:
    model = MacsModel(space)
    plan = random_plan(space, 3)
    scores = torch.rand(space.total_units, generator=torch.Generator().manual_seed(0))
    cost = float(model(torch.tensor(plan.widths)))
    smaller = trimmed(plan, scores, Budget.of(Limit(model, 0.7 * cost)), grid=1)
    assert float(model(torch.tensor(smaller.widths))) <= 0.7 * cost
    for kept, before in zip(smaller.kept, plan.kept, strict=True):
        assert set(kept) <= set(before)
    assert [g.cap for g in capped(space, plan.widths).groups] == list(plan.widths)


def test_trimming_goes_by_merit_whatever_the_size_of_the_scores(space: ChannelSpace) -> None:
    model = MacsModel(space)
    plan = random_plan(space, 3)
    scores = torch.rand(space.total_units, generator=torch.Generator().manual_seed(0))
    budget = Budget.of(Limit(model, 0.7 * float(model(torch.tensor(plan.widths)))))
    small = trimmed(plan, 1e-4 * scores, budget, grid=1)
    assert trimmed(plan, scores, budget, grid=1).kept == small.kept


def test_plans_survive_their_file(space: ChannelSpace, tmp_path: Path) -> None:
    plan = random_plan(space, 4)
    plan.save(tmp_path / "plan.json")
    again = PruningPlan.load(tmp_path / "plan.json", space=space)
    assert again.kept == plan.kept
    assert again.space.to_json() == space.to_json()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_of_another_network_is_refused(space: ChannelSpace, tmp_path: Path) -> None:
    random_plan(space, 4).save(tmp_path / "plan.json")
    other = trace(tiny("plain"), example())
    with pytest.raises(PlanError, match="made for another network"):
        PruningPlan.load(tmp_path / "plan.json", space=other)


@pytest.mark.parametrize(
    "text", ["", "{", '{"kind": "pruning-plan", "ver', "[]", "null", "\xff\xfe", '{"kind": "x"}']
)
def test_corrupt_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FileFormatError, match="plan"):
        PruningPlan.load(tmp_path / "plan.json")
    with pytest.raises(FileFormatError, match="no such file"):
        PruningPlan.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: value.update(version=2),
        lambda value: value.pop("kept"),
        lambda value: value.update(kept=[1, 2]),
        lambda value: value["kept"].pop("0.0"),
        lambda value: value["kept"].update({"0.0": "ab"}),
        lambda value: value.update(space={}),
        lambda value: value["space"]["groups"][0].update(channels=10),
        lambda value: value.update(fingerprint="0" * 16),
    ],
)
def test_damaged_plans_are_refused(
    space: ChannelSpace, damage: Callable[[dict[str, Any]], Any]
) -> None:
    value = json.loads(json.dumps(random_plan(space, 5).to_json()))
    damage(value)
    with pytest.raises(FileFormatError):
        PruningPlan.from_json(value)


def test_a_file_with_an_impossible_unit_is_refused(space: ChannelSpace) -> None:
    value = json.loads(json.dumps(random_plan(space, 5).to_json()))
    value["kept"]["0.0"] = [0, 99]
    with pytest.raises(PlanError, match="unit 99 of 8 does not exist"):
        PruningPlan.from_json(value)


def test_a_group_cut_to_one_unit_can_still_be_followed() -> None:
    """One channel per conv group: the second trace sees a depthwise convolution, or no group."""
    network = tiny("grouped")
    space = trace(network, example())
    full = tuple(tuple(range(group.units)) for group in space.groups)
    outer = PruningPlan(space, (full[0], (2,), (1,), (3, 4, 6)))
    twice = remove(copy.deepcopy(network), outer, example())
    target = PruningPlan(space, ((1, 2, 5), (2,), (1,), (4, 6)))
    second = trace(twice, example())
    assert second.names != space.names
    inner = relative_plan(target, outer, second)
    remove(twice, inner, example())
    once = remove(copy.deepcopy(network), target, example())
    with torch.no_grad():
        assert relative_error(once(example()), twice(example())) <= TOLERANCE
    assert outer.compose(inner).kept == target.kept
