"""What is stored and shown of the NNI door: the experiment's trials, masked against removed."""

from __future__ import annotations

import re

import pytest

from benchmarks import nni_masked_equals_removed as exactness
from benchmarks.nni_experiment import page
from benchmarks.tools.records import RESULTS, read_record
from wgates_plugin.latency.measurement import Measurement
from wgates_plugin.verification import TOLERANCE


def test_every_stored_trial_succeeded_with_its_timings() -> None:
    record = read_record(RESULTS, "nni_experiment")
    assert record is not None
    rows = record["samples"]["trials"]
    assert len(rows) == record["numbers"]["succeeded"] >= 6
    assert {row["parameters"]["pruner"] for row in rows} == {"wgates", "l1", "fpgm", "taylor"}
    for row in rows:
        assert row["latency_ms"] == Measurement.from_json(row["measurement"]).latency_ms
        assert row["latency_ratio"] * record["numbers"]["dense"]["latency_ms"] == pytest.approx(
            row["latency_ms"]
        )


def test_every_stored_trial_trained_for_as_many_steps() -> None:
    record = read_record(RESULTS, "nni_experiment")
    assert record is not None
    rows = record["samples"]["trials"]
    assert len({row["steps"] for row in rows}) == 1
    learned = {row["parameters"]["pruner"]: row["pruning_steps"] for row in rows}
    steps = record["settings"]["steps"]
    assert learned == {"wgates": steps, "taylor": steps, "l1": 0, "fpgm": 0}


def test_the_readme_names_every_pruner() -> None:
    pytest.importorskip("nni", reason='nni is not installed; pip install "wgates-plugin[nni]"')
    from wgates_plugin.integrations.nni import PRUNERS

    readme = RESULTS.parents[1] / "README.md"
    lines = readme.read_text(encoding="utf-8").splitlines()
    (row,) = [line for line in lines if line.startswith("| `PRUNERS`")]
    named = set(re.findall(r"`([\w-]+)`", row)) - {"PRUNERS", "build_pruner", "training_steps"}
    assert named - {"sparse_ratio"} == set(PRUNERS)


def test_a_failed_trial_is_shown_as_such() -> None:
    row = {
        "status": "FAILED",
        "parameters": {"pruner": "l1", "target_fraction": 0.5},
        "accuracy": None,
    }
    dense = {"latency_ms": 1.0, "accuracy": 0.9, "parameters": 1234}
    assert (
        page.table([row], dense).splitlines()[-1] == "| `l1` | 0.50 | - | - | - | - | - | FAILED |"
    )


def test_stored_errors_are_within_tolerance() -> None:
    record = read_record(RESULTS, exactness.NAME)
    assert record is not None
    assert set(record["samples"]) == set(exactness.NETWORKS)
    errors = [row["error"] for rows in record["samples"].values() for row in rows]
    assert max(errors) == record["numbers"]["worst"] <= TOLERANCE


@pytest.mark.parametrize("masker", exactness.MASKERS)
def test_masked_equals_removed_as_the_benchmark_finds_it(masker: str) -> None:
    pytest.importorskip("nni", reason='nni is not installed; pip install "wgates-plugin[nni]"')
    found = exactness.error("mobilenet_v2", masker, 0.5, seed=1)
    # A budget of half of the MACs promises nothing of the parameters.
    least = 0.1 if masker == "wgates_target" else 0.2
    assert least < found["parameters_left"] < 0.8
    assert 0 < found["error"] <= TOLERANCE
