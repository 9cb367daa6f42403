"""What the job does with its latency settings, and what it says on the way."""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from fake_bench import IDENTITY, measured, staircase_ms, steady_bench, steady_studies
from networks import example, tiny

from tests.test_pipeline import (
    EXAMPLE,
    SETTINGS,
    Interrupted,
    make_network,
    run,
    with_latency_ratios,
)
from wgates_plugin import closed_loop, trace
from wgates_plugin.efficiency import Budget, Limit, MacsModel, ParametersModel
from wgates_plugin.efficiency.lpnet import LPNet, UpperBound
from wgates_plugin.efficiency.samples.file import SampleFile
from wgates_plugin.efficiency.sampling import Active, collect
from wgates_plugin.errors import ConfigError, TargetError
from wgates_plugin.files import read_json
from wgates_plugin.latency_study import LatencyStudy
from wgates_plugin.pipeline import delivery, preparation
from wgates_plugin.pipeline.job import Job
from wgates_plugin.run_folder import RunFolder
from wgates_plugin.strategies import Decision, Task, uniform_widths
from wgates_plugin.strategies.wgates.strategy import WGatesStrategy
from wgates_plugin.targets import LatencyTarget

STAGES = (
    "measuring the untouched network: ",
    "wgates: deciding, 2 epochs: ",
    "settling the widths: ",
    "removing channels: ",
    "fine-tuning, 2 epochs: ",
    "exporting and measuring the file: ",
)


def test_every_stage_says_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="wgates_plugin"):
        run(tmp_path / "run")
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    found = [line for line in lines if line.startswith(STAGES)]
    assert [line.startswith(stage) for line, stage in zip(found, STAGES, strict=True)] == [True] * 6


@pytest.mark.parametrize(("ratio", "warned"), [(1.5, True), (0.7, False)])
def test_slower_after_all_is_said(
    ratio: float,
    warned: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_latency_ratios(monkeypatch, [ratio])
    with caplog.at_level(logging.WARNING, logger="wgates_plugin"):
        result = run(tmp_path / "run")
    assert result.held
    assert ("the smaller network is slower" in caplog.text) is warned


@pytest.mark.parametrize(("lpnet", "asked"), [("layers", True), ("mlp", False)])
def test_lpnet_is_asked_where_to_measure(
    lpnet: str, asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[int] = []
    plain = preparation.Learner.bring_up

    def bring_up(self: Any, file: SampleFile) -> None:
        fitted.append(len(file))
        plain(self, file)

    monkeypatch.setattr(preparation.Learner, "bring_up", bring_up)
    monkeypatch.setattr(Active, "covering", 9)
    result = run(
        tmp_path / "run",
        target=LatencyTarget(fraction=0.8, runtime="eager", bound="upper"),
        settings=dataclasses.replace(SETTINGS, samples=12, lpnet=lpnet),
    )
    assert fitted == ([9] if asked else [])
    found = result.report["lpnet"]
    assert (found["structure"], found["active"]) == (lpnet, asked)
    sampled = [row for row in found["predictions"] if row["set"] == "sampled"]
    assert len(sampled) == 12
    assert all(row["low_ms"] < row["predicted_ms"] < row["high_ms"] for row in sampled)
    assert 0.0 <= found["covered_90"] <= 1.0
    assert "held out inside their 90 % interval" in (result.run_folder / "report.html").read_text()


def test_the_budget_holds_what_the_target_says(tmp_path: Path) -> None:
    space = trace(tiny("residual"), example())
    file = SampleFile.open(tmp_path / "samples.jsonl", space, IDENTITY)
    collect(file, space, steady_bench(space), count=12, grid=1, seed=0, seconds_per_sample=0.0)
    lpnet = LPNet.fit(space, file.widths, file.latencies_ms)
    for bound, expected in (("expected", LPNet), ("upper", UpperBound)):
        job: Any = SimpleNamespace(bound=bound, aim_ms=1.0, count_limits=list)
        job.bounded = functools.partial(Job.bounded, job)
        (limit,) = Job.budget(job, lpnet).limits
        assert isinstance(limit.model, expected)
    with pytest.raises(TargetError, match="choose from expected, upper"):
        LatencyTarget(fraction=0.5, bound="lower")


def test_a_strategy_may_be_held_to_macs_instead_of_latency() -> None:
    """Those of the uniform widths that keep the latency; limits on counts stay beside them."""
    space = trace(tiny("residual"), example())
    macs = MacsModel(space)
    full = torch.tensor(space.full_widths, dtype=torch.float64)
    latency = Limit(ParametersModel(space), 0.5 * float(ParametersModel(space)(full)))
    count = Limit(macs, 0.9 * float(macs(full)))
    budget = Budget.of(latency, count)
    job: Any = SimpleNamespace(space=space, grid=2, lpnet=object(), count_limits=lambda: [count])
    job.budget = lambda _: budget
    job.settings = SimpleNamespace(efficiency="latency")
    assert Job.strategy_budget(job) is budget
    job.settings = SimpleNamespace(efficiency="macs")
    first, second = Job.strategy_budget(job).limits
    uniform = uniform_widths(space, budget, 2)
    assert isinstance(first.model, MacsModel)
    assert first.target == float(macs(torch.tensor(uniform, dtype=torch.float64)))
    assert second is count
    job.lpnet = None  # without a latency target there is nothing to put in MACs
    assert Job.strategy_budget(job) is budget
    with pytest.raises(ConfigError, match="efficiency is 'watts', choose from latency, macs"):
        dataclasses.replace(SETTINGS, efficiency="watts")


def test_the_job_hands_the_macs_over_and_settles_by_latency(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady_studies(monkeypatch, floor=0.2)
    given: list[Budget] = []
    decide = WGatesStrategy.decide

    def noted(self: Any, task: Task) -> Decision:
        given.append(task.budget)
        return decide(self, task)

    monkeypatch.setattr(WGatesStrategy, "decide", noted)
    result = run(
        tmp_path / "run",
        target=LatencyTarget(fraction=0.9, runtime="eager"),
        settings=dataclasses.replace(SETTINGS, samples=10, active=False, efficiency="macs"),
    )
    (limit,) = given[0].limits
    assert limit.model.name == "macs"
    assert limit.target < result.report["baseline"]["macs"]
    settled = [row for row in result.report["attempts"] if row["stage"] == "plan"]
    assert all(row["predicted_ms"] > 0 for row in settled)
    assert settled


def by_width(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Sub-networks take a share of the untouched one's time by their channels; returns the measured."""
    measure, seen = LatencyStudy.at, list[tuple[int, ...]]()

    def scripted(self: LatencyStudy, widths: Any, seconds: float, **trust: Any) -> Any:
        seen.append(tuple(widths))
        return measure(self, widths, seconds, **trust)

    steady_studies(monkeypatch, floor=0.2)
    monkeypatch.setattr(LatencyStudy, "at", scripted)
    return seen


@pytest.mark.parametrize("moved", [False, True])
def test_widths_that_gates_learned_at_are_measured_already(
    moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless learning moved them; then the prediction is the one that is exact where it started."""
    by_width(monkeypatch)
    decide = WGatesStrategy.decide

    def elsewhere(self: Any, task: Task) -> Decision:
        found = decide(self, task)
        return dataclasses.replace(found, widths=task.space.least_widths(task.grid))

    if moved:
        monkeypatch.setattr(WGatesStrategy, "decide", elsewhere)
    settings = dataclasses.replace(SETTINGS, options={"learning_rate": 0.0})
    result = run(
        tmp_path / "run", target=LatencyTarget(fraction=0.8, runtime="eager"), settings=settings
    )
    stages = [row["stage"] for row in result.report["attempts"]]
    start, plan = (
        read_json(result.run_folder / "stages" / f"{stage}.json", kind="stage")
        for stage in ("start", "plan")
    )
    assert start["held"]
    assert stages.count("start") == len(start["attempts"]) > 0
    assert ("plan" in stages) is moved
    if moved:
        space = trace(make_network(), EXAMPLE)
        lpnet = LPNet.load(result.run_folder / "lpnet.safetensors", space=space)
        exact = lpnet.corrected(start["widths"], start["measured_ms"])
        least = torch.tensor(space.least_widths(int(result.report["grid"]["multiple"])))
        assert plan["attempts"][0]["predicted_ms"] == pytest.approx(float(exact(least.double())))
    else:
        assert plan["widths"] == start["widths"]


@pytest.mark.parametrize("place", ["before", "within", "after", "an epoch later"])
def test_interrupted_where_gates_start_to_learn(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was settled stands: it is measured once, whatever happens after it."""
    seen = by_width(monkeypatch)
    settings = dataclasses.replace(SETTINGS, options={"measuring": 3})
    job = functools.partial(
        run,
        tmp_path / "run",
        target=LatencyTarget(fraction=0.8, runtime="eager"),
        settings=settings,
    )
    owner, method = {
        "before": (delivery, "_measured"),
        "within": (closed_loop, "fit_to_budget"),
        "after": (delivery, "_exact_at_start"),
        "an epoch later": (RunFolder, "save_state"),
    }[place]
    original = getattr(owner, method)
    calls = []

    def stop(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if place == "an epoch later":
            original(*args, **kwargs)
        elif place == "after" and len(calls) == 1:  # on the way in
            return original(*args, **kwargs)
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, stop)
        with pytest.raises(Interrupted):
            job()
    stage = tmp_path / "run" / "stages" / "start.json"
    settled = stage.read_text() if stage.exists() else None
    assert (settled is not None) is (place in ("after", "an epoch later"))
    seen.clear()
    result = job(resume=True)
    if settled is not None:
        assert stage.read_text() == settled
    starts = [row for row in result.report["attempts"] if row["stage"] == "start"]
    plans = [row for row in result.report["attempts"] if row["stage"] == "plan"]
    expected = plans if settled is not None else plans + starts
    assert len(seen) == sum(len(row["each_ms"]) for row in expected)


@pytest.mark.parametrize(
    ("ratio", "learned", "stay"),
    [(0.99, True, True), (1.01, True, False), (0.99, False, False)],
)
def test_what_has_learned_is_cut_only_where_it_is_over(
    ratio: float, learned: bool, stay: bool, tmp_path: Path
) -> None:
    """The margin is for widths that nothing has learned at yet; half of it is kept."""
    space = trace(tiny("residual"), example())
    file = SampleFile.open(tmp_path / "samples.jsonl", space, IDENTITY)
    collect(file, space, steady_bench(space), count=12, grid=1, seed=0, seconds_per_sample=0.0)
    lpnet = LPNet.fit(space, file.widths, file.latencies_ms)
    wanted = tuple(width - 1 for width in space.full_widths)

    def at(widths: Any, _: float) -> Any:
        return measured(staircase_ms(space, widths))

    study: Any = SimpleNamespace(space=space, at=at, refit=lambda lpnet: lpnet)
    settled = closed_loop.settle(
        study,
        lpnet,
        torch.linspace(-0.4, 0.4, space.total_units),
        wanted,
        target_ms=at(wanted, 0.0).latency_ms / ratio,
        margin=0.02,
        attempts=3,
        grid=1,
        seconds=0.0,
        learned=learned,
    )
    assert settled.held
    assert (settled.widths == wanted) is stay


@pytest.mark.parametrize("lucky", [True, False])
def test_one_lucky_measurement_settles_nothing(lucky: bool, tmp_path: Path) -> None:
    """What is over the aim, but was under it at first, is not taken for held."""
    space = trace(tiny("residual"), example())
    file = SampleFile.open(tmp_path / "samples.jsonl", space, IDENTITY)
    collect(file, space, steady_bench(space), count=12, grid=1, seed=0, seconds_per_sample=0.0)
    wanted = tuple(width - 1 for width in space.full_widths)
    true_ms = staircase_ms(space, wanted)
    luck = [0.97] if lucky else []

    def at(widths: Any, _: float) -> Any:
        return measured(staircase_ms(space, widths) * (luck.pop() if luck else 1.0))

    study: Any = SimpleNamespace(space=space, at=at, refit=lambda lpnet: lpnet)
    settled = closed_loop.settle(
        study,
        LPNet.fit(space, file.widths, file.latencies_ms),
        torch.linspace(-0.4, 0.4, space.total_units),
        wanted,
        target_ms=0.98 * true_ms,
        margin=0.0,
        attempts=3,
        grid=1,
        seconds=0.0,
        learned=True,
    )
    first = settled.attempts[0]
    assert len(first["each_ms"]) == (2 if lucky else 1)
    assert first["measured_ms"] == pytest.approx(true_ms * (0.985 if lucky else 1.0))
    assert first["verdict"] == "over"
    assert settled.held
    assert staircase_ms(space, settled.widths) <= 0.98 * true_ms


def test_active_sampling_may_go_where_the_optimiser_goes() -> None:
    """Widths at the target, as decided by the LPNet of the moment; the least where it fits none."""
    space = trace(tiny("plain"), example())
    macs = MacsModel(space)
    full = float(macs(torch.tensor(space.full_widths)))

    def job(target: float) -> Any:
        return SimpleNamespace(
            space=space,
            grid=1,
            settings=SimpleNamespace(seed=0),
            budget=lambda _: Budget.of(Limit(macs, target)),
        )

    found = preparation.destinations(job(0.5 * full), cast(Any, None))
    assert len(found) == 4
    assert len(set(found)) > 1
    costs = macs(torch.tensor(found, dtype=torch.float64))
    assert (costs <= 0.5 * full).all()
    assert (costs > 0.3 * full).all()
    assert preparation.destinations(job(1.0), cast(Any, None)) == [space.least_widths(1)]


def test_samples_of_an_earlier_run_are_taken_over_in_todays_clock(tmp_path: Path) -> None:
    target = LatencyTarget(fraction=0.8, runtime="eager")
    first = run(tmp_path / "first", target=target)
    samples = first.run_folder / "samples.jsonl"
    settings = dataclasses.replace(SETTINGS, samples_file=str(samples))
    second = run(tmp_path / "second", target=target, settings=settings)
    assert (second.run_folder / "samples.jsonl").read_text() == samples.read_text()
    network = make_network()
    study = LatencyStudy(network, trace(network, EXAMPLE), EXAMPLE, target)
    study.reference_ms = 2.0 * first.report["baseline"]["latency_ms"]
    found = study.open_samples(samples)
    _, latencies, _ = study._seen()
    stored = [sample.latency_ms for sample in found.usable]
    torch.testing.assert_close(torch.tensor(latencies), 2.0 * torch.tensor(stored))
    samples.unlink()  # the copy in the folder is what counts
    assert (
        run(tmp_path / "second", target=target, settings=settings, resume=True).held == second.held
    )
    with pytest.raises(ConfigError, match="no such file"):
        run(tmp_path / "third", target=target, settings=settings)
    assert not (tmp_path / "third").exists()
