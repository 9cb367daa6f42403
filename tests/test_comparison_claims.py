"""What the comparison claims and shows, from made-up runs with known answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import pytest
from comparison_helpers import filled, made_up

from benchmarks.comparison.again import first_draws
from benchmarks.comparison.claims import comparison_claims
from benchmarks.comparison.contests import compared, margins
from benchmarks.comparison.experiment import Experiment, load_experiment
from benchmarks.comparison.pictures import cells_by_runtime, draw_trade_off
from benchmarks.comparison.runs import Places
from benchmarks.comparison.summary import Difference, Verdict, read_cells
from benchmarks.comparison.tables import (
    ablations_table,
    margins_table,
    matrix_text,
    verdicts_table,
)
from benchmarks.report import pictures, scoreboard, tables
from wgates_plugin.files import read_json, write_json
from wgates_plugin.report.theme import LIGHT

LOW = [0.80, 0.81, 0.79]
GOOD = [0.900, 0.905, 0.910]
BETTER = [0.910, 0.915, 0.921]
NOISY = [0.95, 0.85, 0.93]


def values(experiments: list[Experiment], results: Path) -> dict[str, float | None]:
    return {claim.name: claim.value(results) for claim in comparison_claims(experiments)}


def several(folder: Path, cells: dict[str, dict[str, Any]]) -> tuple[list[Experiment], Path]:
    """One experiment and task per entry, all in one results folder."""
    made = [
        filled(folder, runs, name=name, task=name, ours="wgates", ablations=["free-gates"])
        for name, runs in cells.items()
    ]
    return made, folder / "results"


def last_sitting_found(one: Experiment, results: Path, method: str, ratio: float) -> None:
    """One method's latency there, the same with every seed."""
    path = results / "comparison" / one.name / "finals-eager.json"
    last = json.loads(path.read_text())
    last["ratio"].update({f"{method}-eager-50-{seed}": ratio for seed in range(3)})
    write_json(path, last)


def test_cells_are_won_lost_undecided_and_incomplete(tmp_path: Path) -> None:
    experiments, results = several(
        tmp_path,
        {
            "won": {"wgates": BETTER, "l1": GOOD, "random": LOW},
            "narrow": {"wgates": NOISY, "l1": GOOD, "random": LOW},
            "lost": {"wgates": GOOD, "l1": BETTER, "random": LOW},
            "undecided": {"wgates": BETTER, "l1": GOOD, "random": NOISY},
            "incomplete": {"wgates": BETTER, "l1": GOOD[:1], "random": LOW},
        },
    )
    found = values(experiments, results)
    # The undecided cell counts for nobody, the incomplete one as not won.
    assert found["wgates_wins_share"] == pytest.approx(2 / 4)
    assert found["wgates_wins_beyond_one_se_share"] == pytest.approx(1 / 4)
    assert found["wgates_wins_share_of_complete_cells"] == pytest.approx(2 / 3)
    assert found["comparison_cells_complete_share"] == pytest.approx(4 / 5)
    assert found["comparison_cells_decided_share"] == pytest.approx(3 / 4)
    lines = verdicts_table(experiments, results).splitlines()[2:]
    words = [line.split("|")[-2].strip() for line in lines]
    assert words == [
        "won beyond one standard error",
        "won",
        "lost",
        "*undecided*: chance is within one standard error of the best",
        "*incomplete*: 2 runs are missing",
    ]


def test_behind_the_best_is_lost_even_where_that_is_chance(tmp_path: Path) -> None:
    cells = {"lost": {"wgates": LOW, "l1": LOW, "random": GOOD}}
    experiments, results = several(tmp_path, cells)
    assert values(experiments, results)["wgates_wins_share"] == 0.0
    assert verdicts_table(experiments, results).endswith("| lost |")


def test_over_the_target_nothing_is_won(tmp_path: Path) -> None:
    runs: dict[str, Any] = {"wgates": BETTER, "l1": GOOD, "random": LOW}
    one = filled(tmp_path, runs, ours="wgates", task="t", finals=[0.49, 0.5, 0.52])
    found = values([one], tmp_path / "results")
    assert found["wgates_wins_share"] == found["wgates_wins_beyond_one_se_share"] == 0.0
    assert "lost: ours is over the target" in verdicts_table([one], tmp_path / "results")


@pytest.mark.parametrize(
    ("ours", "theirs", "better", "verdict"),
    [
        (0.45, 0.48, True, Verdict.WON_BEYOND),
        (0.48, 0.45, True, Verdict.UNEQUAL),
        (0.48, 0.46, True, Verdict.WON_BEYOND),
        (0.45, 0.48, False, Verdict.LOST),  # the rival kept the target
        (0.49, 0.53, False, Verdict.UNEQUAL),
        (0.49, 0.51, False, Verdict.LOST),
        (0.48, 0.45, False, Verdict.LOST),
    ],
)
def test_who_is_better_with_more_latency_has_not_won_at_equal_latency(
    ours: float, theirs: float, better: bool, verdict: Verdict, tmp_path: Path
) -> None:
    first, second = (BETTER, GOOD) if better else (GOOD, BETTER)
    runs: dict[str, Any] = {"wgates": first, "l1": second, "random": LOW}
    one = filled(tmp_path, runs, ours="wgates", task="t", finals=[theirs] * 3)
    last_sitting_found(one, tmp_path / "results", "wgates", ours)
    (cell,) = read_cells(one, tmp_path / "results")
    assert cell.verdict() is verdict
    share = {Verdict.UNEQUAL: None, Verdict.LOST: 0.0, Verdict.WON_BEYOND: 1.0}[verdict]
    assert values([one], tmp_path / "results")["wgates_wins_share"] == share
    assert len(margins([cell], "l1")) == (verdict is not Verdict.UNEQUAL)


def test_any_rival_that_is_better_fairly_decides(tmp_path: Path) -> None:
    """The most accurate one is slower than it may be, the second is not."""
    runs: dict[str, Any] = {"wgates": GOOD, "l1": [0.95] * 3, "random": LOW, "uniform": BETTER}
    one = filled(tmp_path, runs, ours="wgates", task="t", finals=[0.49] * 3)
    last_sitting_found(one, tmp_path / "results", "l1", 0.54)
    (cell,) = read_cells(one, tmp_path / "results")
    assert cell.best(cell.rivals_here) == "l1"
    assert not cell.fair("l1")
    assert cell.verdict() is Verdict.LOST
    last_sitting_found(one, tmp_path / "results", "uniform", 0.54)
    (cell,) = read_cells(one, tmp_path / "results")
    assert cell.verdict() is Verdict.UNEQUAL


def test_where_only_ours_was_allowed_the_target_it_has_won(tmp_path: Path) -> None:
    runs: dict[str, Any] = {"wgates": BETTER, "l1": ["few"] * 3, "random": ["few"] * 3}
    one = filled(tmp_path, runs, ours="wgates", task="t")
    (cell,) = read_cells(one, tmp_path / "results")
    assert cell.verdict() is Verdict.WON
    turned: dict[str, Any] = {"wgates": ["few"] * 3, "l1": GOOD, "random": ["few"] * 3}
    two = filled(tmp_path, turned, ours="wgates", name="two", task="two")
    (cell,) = read_cells(two, tmp_path / "results")
    assert cell.verdict() is Verdict.LOST


def test_chance_that_was_refused_or_one_seed_alone(tmp_path: Path) -> None:
    runs: dict[str, Any] = {"wgates": BETTER, "l1": GOOD, "random": LOW}
    one = filled(tmp_path, runs, ours="wgates", task="t")
    for seed in range(3):
        path = tmp_path / "results/comparison" / one.name / f"runs/random-eager-50-{seed}.json"
        write_json(path, {"kind": "refused", "reason": "few"})
    (cell,) = read_cells(one, tmp_path / "results")
    assert cell.verdict() is Verdict.WON_BEYOND
    single = {name: accuracy[:1] for name, accuracy in runs.items()}
    two = filled(tmp_path, single, ours="wgates", name="two", task="two", seeds=[0])
    assert "one seed decides nothing" in verdicts_table([two], tmp_path / "results")


def test_cells_that_ours_was_tuned_on_are_left_out_of_a_share_of_its_own(tmp_path: Path) -> None:
    won: dict[str, Any] = {"wgates": BETTER, "l1": GOOD, "random": LOW}
    lost: dict[str, Any] = {"wgates": GOOD, "l1": BETTER, "random": LOW}
    experiments = [
        filled(tmp_path, won, ours="wgates", name="a", task="a", tuned_on=True),
        filled(tmp_path, lost, ours="wgates", name="b", task="b"),
    ]
    found = values(experiments, tmp_path / "results")
    assert found["wgates_wins_share"] == 0.5
    assert found["wgates_wins_share/untuned"] == 0.0


def test_what_learning_exchanged_is_shown(tmp_path: Path) -> None:
    one = filled(tmp_path, {"wgates": GOOD, "uniform": LOW}, ours="wgates", task="t")
    name = "units_exchanged_by_learning/t"
    assert values([one], tmp_path / "results")[name] is None
    for seed, exchanged in enumerate((0, 3)):
        path = tmp_path / "results/comparison" / one.name / f"runs/wgates-eager-50-{seed}.json"
        facts = {"units_kept": 100, "units_exchanged_by_learning": exchanged}
        write_json(path, {**made_up(0.9), "decision": {"facts": facts}})
    assert values([one], tmp_path / "results")[name] == pytest.approx(0.015)


def test_a_network_that_the_last_sitting_did_not_time_is_not_held(tmp_path: Path) -> None:
    runs: dict[str, Any] = {"wgates": GOOD, "l1": GOOD}
    one = filled(tmp_path, runs, ours="wgates", task="t", finals=[0.5, 0.5, 0.5])
    assert values([one], tmp_path / "results")["target_held_share/comparison"] == 1.0
    path = tmp_path / "results/comparison" / one.name / "runs/l1-eager-50-0.json"
    write_json(path, {**made_up(0.9), "widths": [{"group": "a", "dense": 8, "kept": 4}]})
    assert values([one], tmp_path / "results")["target_held_share/comparison"] == 5 / 6


def test_cells_are_looked_at_on_other_images(tmp_path: Path) -> None:
    """There the rival stays the one that is best by the images that judge; without all scores there is
    no verdict."""
    runs = {"wgates": GOOD, "lamp": BETTER, "l1": LOW, "random": LOW}
    scores = {"wgates": [0.8] * 3, "lamp": [0.7] * 3, "l1": [0.81, 0.82, 0.83], "random": [0.5] * 3}
    options: dict[str, Any] = {"ours": "wgates", "finals": [0.5] * 3, "task": "t"}
    one = filled(tmp_path, runs, other_images=scores, **options)
    (cell,) = read_cells(one, tmp_path / "results")
    assert not cell.verdict().won
    there = cell.on_other_images()
    assert there.best(there.rivals_here) == "l1"
    assert there.lost("wgates") is None
    assert "| +10.00 ± 0.00 |" in verdicts_table([one], tmp_path / "results")
    found = values([one], tmp_path / "results")
    assert found["wgates_wins_share/other_images"] == 1.0
    assert found["wgates_wins_share/other_images_best_rival"] == 0.0
    scores["l1"] = [0.7] * 2
    one = filled(tmp_path, runs, other_images=scores, **options)
    (cell,) = read_cells(one, tmp_path / "results")
    assert cell.on_other_images().missing() == 3
    assert "| +10.00 ± 0.00 |" in verdicts_table([one], tmp_path / "results")
    assert values([one], tmp_path / "results")["wgates_wins_share/other_images"] is None


def test_equal_accuracy_is_a_win_but_not_beyond_an_error(tmp_path: Path) -> None:
    same = {"wgates": GOOD, "l1": GOOD, "random": LOW}
    found = values(*several(tmp_path, {"same": same}))
    assert found["wgates_wins_share"] == 1.0
    assert found["wgates_wins_beyond_one_se_share"] == 0.0


def test_a_refused_rival_is_out_and_ours_refused_is_lost(tmp_path: Path) -> None:
    no = ["out of reach"] * 3
    experiments, results = several(
        tmp_path,
        {
            "theirs": {"wgates": GOOD, "l1": no, "l2": LOW, "random": LOW},
            "ours": {"wgates": no, "l1": GOOD, "random": LOW},
        },
    )
    found = values(experiments, results)
    assert found["comparison_cells_complete_share"] == 1.0
    assert found["wgates_wins_share"] == 0.5


def test_a_rival_refused_for_some_seeds_leaves_the_cell_open(tmp_path: Path) -> None:
    some = [0.99, 0.99, "out of reach"]
    cells = {"wgates": GOOD, "l1": some, "random": LOW}
    found = values(*several(tmp_path, {"t": cells}))
    assert found["comparison_cells_complete_share"] == 0.0
    assert found["wgates_wins_share"] == 0.0


def test_an_ablation_is_nobodys_rival(tmp_path: Path) -> None:
    cells = {"wgates": GOOD, "free-gates": BETTER, "l1": LOW, "random": LOW}
    found = values(*several(tmp_path, {"t": cells}))
    assert found["wgates_wins_share"] == 1.0
    # Nor is its own experiment a contest: ours against chance alone is no win.
    cells = {"wgates": GOOD, "free-gates": BETTER, "random": LOW}
    found = values(*several(tmp_path / "other", {"t": cells}))
    assert found["wgates_wins_share"] is None


def test_margin_and_loss_are_those_of_the_worse_runtime(tmp_path: Path) -> None:
    runs: dict[str, Any] = {"wgates": GOOD, "uniform": LOW, "random": LOW}
    both = [{"runtime": "eager"}, {"runtime": "onnxruntime"}]
    one = filled(tmp_path, runs, ours="wgates", task="t", rgb=True, runtimes=both)
    results = tmp_path / "results"
    found = values([one], results)
    assert found["margin_over_uniform_50/t"] is None  # not before both runtimes are there
    assert found["accuracy_loss_50/t"] is None
    home = results / "comparison" / one.name / "runs"
    for path in list(home.glob("*eager*")):
        report = read_json(path, kind="run")
        report["final"]["accuracy"] -= 0.02 * path.name.startswith("wgates")
        write_json(path.with_name(path.name.replace("eager", "onnxruntime")), report)
    found = values([one], results)
    assert found["margin_over_uniform_50/t"] == pytest.approx(8.5)
    assert found["accuracy_loss_50/t"] == pytest.approx(3.5)


def test_bars_depend_on_colour(tmp_path: Path) -> None:
    runs: dict[str, Any] = {"wgates": GOOD, "uniform": LOW}
    grey = filled(tmp_path, runs, ours="wgates", name="grey", task="grey")
    rgb = filled(tmp_path, runs, ours="wgates", name="rgb", task="rgb", rgb=True)
    bars = {claim.name: claim.bar for claim in comparison_claims([grey, rgb])}
    assert bars["margin_over_uniform_50/grey"] is None
    assert bars["margin_over_uniform_50/rgb"] == 1.0
    assert bars["accuracy_loss_50/grey"] == 0.3
    assert bars["accuracy_loss_50/rgb"] == 1.0


def test_held_and_tight_are_read_in_the_last_sitting(tmp_path: Path) -> None:
    """The runs' own reports say 0.49 of the latency; the sitting at the end says otherwise."""
    runs: dict[str, Any] = {"wgates": GOOD, "l1": GOOD}
    one = filled(tmp_path, runs, ours="wgates", task="t", finals=[0.499, 0.47, 0.501])
    found = values([one], tmp_path / "results")
    assert found["target_held_share/comparison"] == pytest.approx(2 / 3)
    assert found["target_tight_share"] == pytest.approx(2 / 3)
    more: dict[str, Any] = {**runs, "l2": GOOD}  # nor is what was not timed held
    experiment = filled(tmp_path, more, ours="wgates", task="t")
    assert values([experiment], tmp_path / "results")["target_held_share/comparison"] == 4 / 9
    untimed = filled(tmp_path / "more", runs, ours="wgates", task="t")
    assert values([untimed], tmp_path / "more" / "results")["target_held_share/comparison"] is None
    begun: dict[str, Any] = {"wgates": GOOD, "l1": GOOD[:2]}  # a run is missing: no sitting yet
    last = filled(tmp_path / "begun", begun, ours="wgates", task="t", finals=[0.499, 0.47, 0.49])
    assert values([last], tmp_path / "begun" / "results")["target_held_share/comparison"] is None


def test_weights_against_free_gates_has_students_interval(tmp_path: Path) -> None:
    """Differences of 1, 2 and 3 points: mean 2, standard error 1 / sqrt(3), t(2) = 4.3027."""
    ours, free = [0.91, 0.92, 0.93], [0.90, 0.90, 0.90]
    runs: dict[str, Any] = {"wgates": ours, "free-gates": free, "random": LOW}
    one = filled(tmp_path, runs, ours="wgates", ablations=["free-gates"], task="t")
    (claim,) = (c for c in comparison_claims([one]) if c.name.endswith("free_gates/t"))
    assert claim.bar is None
    other = one.model_copy(update={"variant": "learned"})  # of which ours is not the default
    names = [c.name for c in comparison_claims([one, other])]
    assert len(set(names)) == len(names)
    assert "weight_dependent_vs_free_gates/t/learned" in names
    assert claim.value(tmp_path / "results") == pytest.approx(2.0)
    assert claim.interval is not None
    half = 4.3026527 / math.sqrt(3)
    assert claim.interval(tmp_path / "results") == pytest.approx((2 - half, 2 + half))
    assert Difference.of([0.9], [0.8]).interval() == (-math.inf, math.inf)


def test_the_scoreboard_shows_the_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: dict[str, Any] = {"wgates": [0.91, 0.92, 0.93], "free-gates": [0.9] * 3}
    one = filled(tmp_path, runs, ours="wgates", ablations=["free-gates"], task="t")
    monkeypatch.setattr(scoreboard, "claims", lambda: tuple(comparison_claims([one])))
    found = {entry.claim: entry for entry in scoreboard.entries(tmp_path / "results")}
    shown = found["weight_dependent_vs_free_gates/t"]
    assert shown.holds  # what has no bar is shown
    assert shown.to_json()["interval"] == shown.interval
    assert "interval" not in found["wgates_wins_share"].to_json()
    assert "2 (-0.484 to 4.48)" in tables.score_table(tmp_path / "results")


def test_ablations_are_compared_with_ours(tmp_path: Path) -> None:
    runs: dict[str, Any] = {
        "wgates": [0.91, 0.92, 0.93],
        "worse": [0.90, 0.909, 0.919],
        "same": [0.912, 0.918, 0.93],
        "gone": [0.9],
    }
    one = filled(tmp_path, runs, ours="wgates", ablations=["worse", "same", "gone"], task="t")
    lines = ablations_table([one], tmp_path / "results").splitlines()[2:]
    worse, same, gone = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert (worse[3], worse[6], worse[8], worse[9]) == ("`worse`", "-1.07", "3", "")
    assert (same[6], same[9]) == ("+0.00", "may be chance")
    assert gone[5:9] == ["90.00 % (1 seeds)", "-", "-", "0"]


def test_every_method_is_in_the_matrix(tmp_path: Path) -> None:
    runs: dict[str, Any] = {"wgates": GOOD, "l1": GOOD[:2], "l2": [], "wide": ["no", "no", "no"]}
    one = filled(tmp_path, runs, ours="wgates", task="t")
    text = matrix_text(one, tmp_path / "results")
    assert "| `wgates` | 90.50 ± 0.50 % |" in text
    assert "| `l1` | 90.25 ± 0.35 % (2 seeds) |" in text
    assert "| `l2` | *missing* |" in text
    assert "| `wide` | refused |" in text
    assert matrix_text(one, tmp_path / "nothing") == ""


def test_all_cells_get_a_page_beside_their_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: dict[str, Any] = {"wgates": GOOD, "wide": ["too few ms"] * 3, "l1": [], "random": NOISY}
    one = filled(tmp_path, runs, ours="wgates", task="t")
    monkeypatch.setattr(tables, "compared", lambda: (one,))
    ((path, page),) = tables.cell_pages(tmp_path / "results").items()
    assert path == tmp_path / "results" / "comparison" / "small" / "README.md"
    assert page.count("*incomplete*: 3 runs are missing") == 2  # among the verdicts and at the cell
    assert "timed beside other work" not in page
    assert "| `wide` | 3 refused: too few ms |" in page
    assert "| `l1` | *missing* |" in page
    last = {"ratio": {"a": 0.4, "b": 0.5}, "networks": {}, "disturbed": ["b"]}
    write_json(path.parent / "finals-eager.json", last)
    (page,) = tables.cell_pages(tmp_path / "results").values()
    assert "- eager: 1 of 2 networks were timed beside other work" in " ".join(page.split())
    assert tables.cell_pages(tmp_path / "nothing") == {}


def test_changed_results_are_read_anew(tmp_path: Path) -> None:
    filled(tmp_path, {"wgates": GOOD}, ours="wgates")
    (first,) = read_cells(load_experiment(tmp_path / "small.yaml"), tmp_path / "results")
    filled(tmp_path, {"wgates": LOW}, ours="wgates")
    (second,) = read_cells(load_experiment(tmp_path / "small.yaml"), tmp_path / "results")
    assert first.row("wgates").accuracy == GOOD
    assert second.row("wgates").accuracy == LOW


def test_only_experiments_with_a_task_are_compared() -> None:
    names = [experiment.name for experiment in compared()]
    assert "systems" not in names
    assert "imagefolder" not in names
    assert {"fashion_resnet20", "ablations_fashion_resnet20"} <= set(names)
    claims = [claim.name for claim in scoreboard.claims()]
    assert len(set(claims)) == len(claims)
    assert "weight_dependent_vs_free_gates/emoji_mobilenet_v2" in claims


def test_trade_offs_are_drawn_over_latency_and_macs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs: dict[str, Any] = {"wgates": GOOD, "l1": LOW, "fpgm": LOW, "random": LOW}
    one = filled(tmp_path, runs, ours="wgates", task="t")
    cells = cells_by_runtime(one, tmp_path / "results")["eager"]
    figure = draw_trade_off("t on eager", cells, LIGHT)
    latency, macs = (cast(Any, panel) for panel in figure.axes)
    places = {bar.get_label(): bar.lines[0].get_data() for bar in latency.containers}
    assert places["W-Gates"][0] == pytest.approx([0.49])
    assert places["W-Gates"][1] == pytest.approx([90.5])
    assert macs.containers[-1].lines[0].get_data()[0] == pytest.approx([0.5])
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["not pruned", "other methods", "chance", "W-Gates"]


def test_pictures_of_the_comparison_lie_beside_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    runs: dict[str, Any] = {"wgates": GOOD, "l1": LOW, "random": LOW}
    one = filled(tmp_path, runs, ours="wgates", task="t")
    monkeypatch.setattr(pictures, "compared", lambda: (one,))
    results = tmp_path / "results"
    written = pictures.draw(results)
    home = results / "comparison" / "small"
    assert written == [home / "eager.svg", home / "eager-dark.svg"]
    before = written[0].read_bytes()
    assert ElementTree.fromstring(before).tag.endswith("svg")
    pictures.draw(results)
    assert written[0].read_bytes() == before
    assert pictures.draw(tmp_path / "nothing") == []
    assert "small: no runs" in capsys.readouterr().out


def test_nothing_stored_claims_nothing(tmp_path: Path) -> None:
    assert set(values(list(compared()), tmp_path).values()) == {None}


CORE = {
    "wgates": {"strategy": "wgates", "role": "ours", "core": True},
    "l1": {"strategy": "l1", "core": True},
    "random": {"strategy": "random", "core": True},
}


def test_ours_is_held_against_each_rival_over_all_cells_too(tmp_path: Path) -> None:
    runs: dict[str, Any] = {"wgates": BETTER, "l1": GOOD, "random": LOW}
    worse: dict[str, Any] = {"wgates": GOOD, "l1": BETTER, "random": LOW}
    begun: dict[str, Any] = {"wgates": BETTER, "l1": LOW[:2], "random": LOW}
    experiments = [
        filled(tmp_path, cell, ours="wgates", name=name, task=name, methods=CORE, tuned_on=tuned)
        for name, cell, tuned in (("a", runs, True), ("b", worse, False), ("c", begun, False))
    ]
    results = tmp_path / "results"
    claims = {claim.name: claim for claim in comparison_claims(experiments)}
    ahead = 100 * (sum(BETTER) - sum(GOOD)) / 3
    assert claims["margin_over/l1"].value(results) == pytest.approx(0.0)  # once ahead, once behind
    low, high = cast("Any", claims["margin_over/l1"].interval)(results)
    assert (low, high) == pytest.approx((-12.706 * ahead, 12.706 * ahead), rel=1e-3)
    (line,) = [x for x in margins_table(experiments, results).splitlines() if "`l1`" in x]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == ["2", "1", "+0.00"]  # the incomplete cell is in no margin
    assert cells[5] == f"{-ahead:+.2f}"


def test_the_core_alone_is_not_everyone(tmp_path: Path) -> None:
    runs: dict[str, Any] = {"wgates": BETTER, "l1": GOOD, "random": LOW}
    everyone = {**CORE, "l2": {"strategy": "l2"}}
    core = filled(tmp_path, runs, name="a", task="a", methods=CORE)
    whole = filled(tmp_path, {**runs, "l2": LOW}, name="b", task="b", methods=everyone)
    begun = filled(tmp_path, {**runs, "l2": LOW[:1]}, name="c", task="c", methods=everyone)
    found = values([core, whole, begun], tmp_path / "results")
    assert found["comparison_cells_with_everyone_share"] == pytest.approx(1 / 3)


def test_runs_of_ablations_are_not_in_the_shares_of_runs(tmp_path: Path) -> None:
    rivals: dict[str, Any] = {"wgates": GOOD, "l1": GOOD, "random": LOW}
    parts: dict[str, Any] = {"wgates": GOOD, "free-gates": GOOD, "random": LOW}
    over, under = [0.51] * 3, [0.49] * 3
    experiments = [
        filled(tmp_path, rivals, ours="wgates", name="a", task="t", finals=over),
        filled(
            tmp_path,
            parts,
            ours="wgates",
            ablations=["free-gates"],
            name="b",
            task="t",
            finals=under,
        ),
    ]
    found = values(experiments, tmp_path / "results")
    assert found["target_held_share/comparison"] == 0.0
    assert found["target_held_again_share"] == 0.0


def test_an_ablation_beside_rivals_is_in_no_share_of_runs_and_in_every_table(
    tmp_path: Path,
) -> None:
    runs: dict[str, Any] = {"wgates": BETTER, "l1": GOOD, "free-gates": LOW, "random": LOW}
    one = filled(
        tmp_path, runs, ours="wgates", task="t", ablations=["free-gates"], finals=[0.49] * 3
    )
    last_sitting_found(one, tmp_path / "results", "free-gates", 0.6)
    found = values([one], tmp_path / "results")
    assert found["target_held_share/comparison"] == found["target_held_again_share"] == 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "compared", lambda: (one,))
        assert "won beyond" in tables.comparison_table(tmp_path / "results")
        assert "`free-gates`" in tables.comparison_ablations_table(tmp_path / "results")


def test_first_draws_are_counted_too(tmp_path: Path) -> None:
    runs: dict[str, Any] = {"wgates": BETTER, "l1": GOOD, "random": LOW}
    one = filled(tmp_path, runs, ours="wgates", task="t")
    results = tmp_path / "results"
    assert values([one], results)["wgates_wins_share/first_draws"] == 1.0
    gone = [
        {"run": f"wgates-eager-50-{seed}", "accuracy": accuracy, "own": 0.49, "last": None}
        for seed, accuracy in enumerate(LOW)
    ]
    again = [{**found, "accuracy": 0.99} for found in gone]  # a second draw is no first one
    path = results / "comparison" / one.name / "replaced.json"
    write_json(path, {"kind": "replaced runs", "runs": [*gone, *again]})
    found = values([one], results)
    assert (found["wgates_wins_share"], found["wgates_wins_share/first_draws"]) == (1.0, 0.0)
    refused = {"run": "random-eager-50-1", "refused": "few"}
    write_json(path, {"kind": "replaced runs", "runs": [refused]})
    (cell,) = read_cells(one, results)
    drawn = first_draws(cell, Places(one, results, results))
    assert drawn.verdict() is Verdict.INCOMPLETE
    assert (drawn.rows["random"].seeds, drawn.rows["random"].refused) == ([0, 2], {1: "few"})
    late = {"run": "random-eager-50-1", "accuracy": 0.8, "own": 0.49, "last": None}
    write_json(path, {"kind": "replaced runs", "runs": [refused, late]})
    assert first_draws(cell, Places(one, results, results)).verdict() is Verdict.INCOMPLETE
