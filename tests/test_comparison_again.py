"""Which runs are made again, and that what they had found is kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from comparison_helpers import filled, stored

from benchmarks import comparison
from benchmarks.comparison import again, runs
from benchmarks.comparison.experiment import Run, load_experiment, runs_of
from benchmarks.comparison.tables import page
from wgates_plugin.files import write_json


def test_a_cell_with_a_disturbed_run_is_forgotten_as_a_whole(tmp_path: Path) -> None:
    experiment = filled(tmp_path, {"random": [0.8] * 3}, finals=[0.51, 0.49, 0.5])
    places = runs.Places(experiment, tmp_path / "results", tmp_path / "work")
    chosen = list(runs_of(experiment))
    places.run_folder(chosen[2]).mkdir(parents=True)
    assert "| eager | 50% | 3 | 1 | 0 |" in page(experiment, tmp_path / "results")[1]
    (line,) = again.forget_disturbed(places, chosen)
    assert line == (
        "eager, 50%: 1 of 3 runs found another latency than the last sitting; all of them again"
    )
    assert runs.missing(places, chosen) == chosen
    assert again.read_replaced(places.replaced) == [
        {"run": chosen[index].key, "accuracy": 0.8, "own": 0.49, "last": last}
        for index, last in ((1, 0.49), (2, 0.5), (0, 0.51))
    ]  # the one that is apart is the last: stopped before it, a second call goes on
    words = "Made again: 3 runs of cells in which some were disturbed; "
    assert words in page(experiment, tmp_path / "results")[1]
    assert not places.run_folder(chosen[2]).exists()
    assert json.loads(places.finals("eager").read_text())["ratio"] == {}
    assert again.forget_disturbed(places, chosen) == []


def test_other_cells_stay_and_a_refusal_is_made_again_with_its_cell(tmp_path: Path) -> None:
    experiment = filled(tmp_path, {"random": [0.8] * 3}, finals=[0.49, 0.5, 0.51])
    places = runs.Places(experiment, tmp_path / "results", tmp_path / "work")
    chosen = list(runs_of(experiment))
    others = [dataclasses.replace(run, target=0.3) for run in chosen]
    for run in others:
        write_json(places.result(run), json.loads(places.result(chosen[0]).read_text()))
    write_json(places.result(chosen[0]), {"kind": "refused", "reason": "few"})
    again.forget_disturbed(places, [*others, *chosen])
    assert runs.missing(places, chosen) == chosen
    assert runs.missing(places, others) == []
    assert again.read_replaced(places.replaced)[0] == {"run": chosen[0].key, "refused": "few"}


def test_what_the_last_sitting_timed_beside_other_work_stays(tmp_path: Path) -> None:
    experiment = filled(tmp_path, {"random": [0.8] * 3}, finals=[0.49, 0.5, 0.51])
    places = runs.Places(experiment, tmp_path / "results", tmp_path / "work")
    chosen = list(runs_of(experiment))
    last = json.loads(places.finals("eager").read_text())
    write_json(places.finals("eager"), {**last, "disturbed": [chosen[2].key]})
    assert again.forget_disturbed(places, chosen) == []
    assert runs.missing(places, chosen) == []


@pytest.mark.parametrize("words", [["--methods", "random"], ["--seeds", "0"]])
def test_a_part_of_a_cell_is_not_drawn_again(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        comparison.main(["fashion_resnet20", "--again-disturbed", *words])
    assert "as a whole" in capsys.readouterr().err


def test_a_refusal_that_another_method_did_not_meet_is_made_again(tmp_path: Path) -> None:
    """Of the same cell, seed and least widths: what is refused to all, or for a coarser grid, stays."""
    experiment = load_experiment(stored(tmp_path, seeds=[0, 1]))
    places = runs.Places(experiment, tmp_path, tmp_path)
    chosen = comparison.choose(experiment)
    first, second, third, fourth = chosen  # two methods with seed 0, then with seed 1
    assert (first.seed, second.seed, third.seed) == (0, 0, 1)

    def refuse(run: Run, **settings: object) -> None:
        write_json(places.result(run), {"kind": "refused", "reason": "few", "settings": settings})

    refuse(second)
    write_json(places.result(first), {"final": {}, "settings": {"grid": 4}})
    refuse(third, grid=4)
    refuse(fourth, grid=4)
    assert again.forget_refused(experiment, places, chosen) == []
    refuse(second, grid=4)
    places.run_folder(second).mkdir(parents=True)
    (line,) = again.forget_refused(experiment, places, [second])
    assert line == f"{second.key}: refused, where another method was not; again"
    assert not places.run_folder(second).exists()
    assert runs.missing(places, chosen) == [second]
    assert again.read_replaced(places.replaced) == [{"run": second.key, "refused": "few"}]
    refuse(second, grid=4)
    own_samples = experiment.methods[second.method].model_copy(
        update={"pruning": {"samples_file": None}}
    )
    other = experiment.model_copy(
        update={"methods": {**experiment.methods, second.method: own_samples}}
    )
    assert again.forget_refused(other, places, chosen) == []


def test_a_page_says_when_its_runs_are_of_several_states_of_the_code(tmp_path: Path) -> None:
    experiment = filled(tmp_path, {"random": [0.8] * 3})
    places = runs.Places(experiment, tmp_path / "results", tmp_path / "work")
    first, second, third = runs_of(experiment)

    def page_with(codes: dict[Run, str]) -> str:
        for run, code in codes.items():
            stored_run = json.loads(places.result(run).read_text())
            write_json(places.result(run), {**stored_run, "code": code})
        return page(experiment, tmp_path / "results")[1]

    said = "Runs by state of the package's code"
    assert said not in page_with({})
    assert f"{said}: 2 by `new`, 1 before that was kept." in page_with({first: "new", third: "new"})
    assert f"{said}: 2 by `new`, 1 by `old`." in page_with({second: "old"})
    assert said not in page_with({second: "new"})
