"""The whole job on a tiny network: contract, resume, refusal of bad input."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from fake_bench import REFERENCE_MS, measured, steady_studies
from lock_helpers import Other, needs_locks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from wgates_plugin.errors import (
    ConfigError,
    FileFormatError,
    InfeasibleTargetError,
    RunFolderError,
    RuntimeUnavailableError,
    TargetError,
    TraceError,
    TrainingError,
)
from wgates_plugin.latency.base import Measurement
from wgates_plugin.latency.timing import measure
from wgates_plugin.latency_study import LatencyStudy
from wgates_plugin.pipeline import (
    PruningResult,
    delivery,
    learning,
    make_job,
    preparation,
    prune_to_target,
    record,
)
from wgates_plugin.pipeline.identity import settings_as_json
from wgates_plugin.pipeline.job import Job
from wgates_plugin.run_folder import LOCK, RunFolder, first_batch_digest
from wgates_plugin.strategies.base import Decision, Task
from wgates_plugin.strategies.criteria.strategy import criterion_strategies
from wgates_plugin.strategies.wgates import WGatesSettings, WGatesStrategy
from wgates_plugin.targets import LatencyTarget, MacsTarget, ParametersTarget, PruningSettings
from wgates_plugin.training import Trainer, TrainingSettings, evaluate
from wgates_plugin.transforms.unification.settings import UnificationSettings
from wgates_plugin.verification import relative_error

EXAMPLE = torch.randn(1, 1, 12, 12, generator=torch.Generator().manual_seed(3))


class Tiny(nn.Module):
    """A residual network of a few thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.conv1 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 32, 3, stride=2)
        self.fc = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.stem(x)).relu()
        x = (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()
        return self.fc(self.conv3(x).relu().mean((2, 3)))


class Reversed:
    """A loader that hands its batches out from the last to the first, and tells nothing else."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        return iter(list(self.loader)[::-1])


def make_data(count: int = 96, batch: int = 32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three classes of stripes in noise."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, 3, (count,), generator=generator)
    images = 0.3 * torch.randn(count, 1, 12, 12, generator=generator)
    for row, label in enumerate(targets.tolist()):
        images[row, 0, label::3] += 1.0
    return list(zip(images.split(batch), targets.split(batch), strict=True))


def make_network() -> nn.Module:
    torch.manual_seed(0)
    return Tiny()


SETTINGS = PruningSettings(
    gate_epochs=2,
    fine_tune_epochs=2,
    samples=10,
    seconds_per_sample=0.02,
    measure_seconds=0.1,
    grid=2,
    recalibration_images=96,
    training=TrainingSettings(learning_rate=0.02, accelerator="cpu"),
)


def run(folder: Path, **changes: Any) -> PruningResult:
    options: dict[str, Any] = {
        "target": MacsTarget(fraction=0.5),
        "settings": SETTINGS,
        "run_folder": folder,
        "progress": False,
    }
    options.update(changes)
    network = options.pop("network", None) or make_network()
    example = options.pop("example", EXAMPLE)
    data = make_data()
    return prune_to_target(network, example, data, data, **options)


@pytest.fixture(scope="module")
def latency_run(tmp_path_factory: pytest.TempPathFactory) -> PruningResult:
    folder = tmp_path_factory.mktemp("run") / "latency"
    return run(folder, target=LatencyTarget(fraction=0.8, runtime="onnxruntime"))


def test_the_artefact_is_delivered_with_its_record(latency_run: PruningResult) -> None:
    report = latency_run.report
    for key in ("runtime", "device", "target_ms", "contract", "seed", "seconds", "environment"):
        assert key in report
    for side in ("baseline", "final"):
        assert {"latency_ms", "accuracy", "macs", "parameters"} <= set(report[side])
    assert report["target_ms"] == pytest.approx(0.8 * report["baseline"]["latency_ms"])
    on_target = report["final"]["latency_ms"] <= report["target_ms"]
    assert report["contract"] == ("held" if on_target else "missed")
    assert latency_run.held == on_target
    for name in (
        "model.onnx",
        "plan.json",
        "pruned.safetensors",
        "report.html",
        "lpnet.safetensors",
    ):
        assert (latency_run.run_folder / name).is_file(), name
    assert report["masked_equals_removed"] <= 1e-5
    assert report["lpnet"]["samples"] >= 8
    assert report["final"]["parameters"] == sum(p.numel() for p in latency_run.network.parameters())


def test_the_artefact_computes_what_the_network_computes(latency_run: PruningResult) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(latency_run.artefact), providers=["CPUExecutionProvider"]
    )
    x = torch.randn(1, 1, 12, 12)
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.no_grad():
        assert relative_error(found, latency_run.network(x)) < 1e-4


def test_the_users_network_is_only_read(tmp_path: Path) -> None:
    network = make_network()
    network.stem.eval()
    before = copy.deepcopy(network.state_dict())
    state = torch.get_rng_state()
    run(tmp_path / "run", network=network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training
    assert not network.stem.training
    assert torch.equal(state, torch.get_rng_state())
    assert not network._forward_pre_hooks
    assert not network.conv1._forward_pre_hooks


def test_nothing_to_do_is_a_success(tmp_path: Path) -> None:
    result = run(tmp_path / "run", target=LatencyTarget(milliseconds=1e6, runtime="eager"))
    assert result.held
    assert result.plan.widths == result.plan.space.full_widths
    assert result.artefact.is_file()
    assert not (tmp_path / "run" / "stages" / "phase.pt").exists()


def test_a_cap_is_kept_where_the_target_holds_already(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, caps={"conv3": 20}, fine_tune_epochs=1)
    result = run(tmp_path / "run", target=MacsTarget(fraction=1.0), settings=settings)
    assert result.held
    assert result.network.conv3.out_channels <= 20


def test_before_and_after_are_timed_alike_without_a_latency_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[type] = []

    def noted(session: Any, **options: Any) -> Measurement:
        timed.append(type(session._network))
        return measure(session, **options)

    monkeypatch.setattr("wgates_plugin.latency_study.measure", noted)
    monkeypatch.setattr("wgates_plugin.latency_study.QUIET", math.inf)
    monkeypatch.setattr("wgates_plugin.efficiency.bench.QUIET", math.inf)  # nothing is timed twice
    run(tmp_path / "run")
    assert timed == [Tiny, Tiny]


def test_several_targets_hold_together(tmp_path: Path) -> None:
    result = run(
        tmp_path / "run", target=[MacsTarget(fraction=0.6), ParametersTarget(fraction=0.4)]
    )
    final, baseline = result.report["final"], result.report["baseline"]
    assert final["macs"] <= 0.6 * baseline["macs"]
    assert final["parameters"] <= 0.4 * baseline["parameters"]
    assert result.held


def test_gates_learn_with_frozen_weights(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, train_weights=False, fine_tune_epochs=0)
    network = make_network()
    result = run(tmp_path / "run", network=network, settings=settings)
    kept = list(result.plan.kept[0])
    assert torch.equal(result.network.stem.weight, network.stem.weight[kept])


def test_frozen_weights_leave_the_whole_schedule_to_the_fine_tuning(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, gate_epochs=3, fine_tune_epochs=2)
    for train_weights, first, total in ((True, 3, 5), (False, 0, 2)):
        job = Job(
            make_network(),
            EXAMPLE,
            make_data(),
            make_data(),
            [MacsTarget(fraction=0.5)],
            dataclasses.replace(settings, train_weights=train_weights),
            tmp_path,
            None,
            "",
            False,
        )
        assert (job.first_fine_tune_epoch, job.total_epochs) == (first, total)


def test_a_target_below_the_least_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleTargetError, match="least allowed widths") as error:
        run(tmp_path / "run", target=LatencyTarget(milliseconds=1e-4, runtime="eager"))
    assert "ask for more" in str(error.value)
    assert not (tmp_path / "run" / "stages" / "phase.pt").exists()


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "8", None, True])
def test_impossible_targets(value: Any) -> None:
    with pytest.raises(TargetError):
        LatencyTarget(milliseconds=value)


def test_targets_that_contradict() -> None:
    with pytest.raises(TargetError, match="not both"):
        LatencyTarget(milliseconds=1.0, fraction=0.5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"unification": True}, "unification is True, needs UnificationSettings or a dict"),
        ({"unification": {"prune_fracton": 0.3}}, "did you mean `prune_fraction`"),
        ({"unification": {"prune_fraction": 3}}, "unification.prune_fraction is 3.0, needs"),
        ({"training": 3}, "training is 3, needs TrainingSettings or a dict"),
        ({"training": {"epochs": "many"}}, "training.epochs is 'many'"),
        ({"options": ["a"]}, r"options is \['a'\], needs a dict"),
        ({"floors": 3}, "floors is 3, needs a dict"),
        ({"train_weights": "no"}, "train_weights is 'no', needs true or false"),
        ({"ignored_layers": "fc"}, "ignored_layers is 'fc', needs a list"),
        ({"samples_file": 3}, "samples_file is 3, needs a path"),
        ({"floors": {"stem": "8"}}, "floors.stem is '8', needs a whole number"),
        ({"caps": {"stem": 2.5}}, r"caps.stem is 2\.5, needs a whole number"),
    ],
)
def test_settings_of_the_wrong_form_are_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PruningSettings(**given)


def test_settings_may_be_spelt_out_as_dicts() -> None:
    spelt: Any = {"unification": {"prune_fraction": 0.3}, "training": {"learning_rate": 0.1}}
    settings = PruningSettings(**spelt)
    assert settings.unification == UnificationSettings(prune_fraction=0.3)
    assert settings.training == TrainingSettings(learning_rate=0.1)


def test_arguments_of_the_wrong_form_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is 8.0, needs a .*LatencyTarget\(milliseconds=8.0\)"):
        run(tmp_path, target=8.0)
    with pytest.raises(ConfigError, match=r"settings.*\n.*needs PruningSettings"):
        run(tmp_path, settings={"samples": 50})
    with pytest.raises(TargetError, match="options is"):
        LatencyTarget(fraction=0.5, options=["a"])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["list", "data set", "loader"])
def test_labels_beyond_the_outputs_are_refused_before_training(kind: str, tmp_path: Path) -> None:
    images, labels = torch.randn(32, 1, 12, 12), torch.arange(32) % 3
    labels[-1] = 3
    whole: Any = [(images[:16], labels[:16]), (images[16:], labels[16:])]
    if kind != "list":
        whole = DataLoader(TensorDataset(images, labels), batch_size=16)
    if kind == "loader":
        whole = Reversed(whole)
    told: dict[str, Any] = {
        "target": MacsTarget(fraction=0.5),
        "settings": SETTINGS,
        "run_folder": tmp_path / "run",
    }
    with pytest.raises(ConfigError, match="train_loader: holds class 3, the network has 3 outputs"):
        prune_to_target(make_network(), EXAMPLE, whole, make_data(), **told)
    assert not (tmp_path / "run" / "stages").exists()


def test_data_without_accuracy_or_length_are_refused_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (logits - targets).square().mean()

    told: dict[str, Any] = {
        "target": MacsTarget(fraction=0.5),
        "settings": SETTINGS,
        "loss": loss,
    }
    odd = [(torch.randn(4, 1, 12, 12), torch.randn(4))]
    with pytest.raises(TrainingError, match="no classification"):
        prune_to_target(make_network(), EXAMPLE, odd, odd, run_folder=tmp_path / "odd", **told)
    assert not (tmp_path / "odd" / "stages" / "baseline.json").exists()
    with pytest.raises(TrainingError, match="loader `generator`: its length is unknown"):
        prune_to_target(
            make_network(),
            EXAMPLE,
            (batch for batch in odd),
            odd,
            run_folder=tmp_path / "endless",
            **told,
        )


def test_a_label_found_later_is_named_too() -> None:
    with pytest.raises(TrainingError, match="classes go from 1 to 7, the network has 3 outputs"):
        evaluate(make_network(), [(torch.zeros(2, 1, 12, 12), torch.tensor([1, 7]))])


def test_numbers_of_numpy_and_paths_are_plain_in_the_record() -> None:
    settings = PruningSettings(samples_file=Path("a") / "b.jsonl", floors={"stem": np.int64(8)})
    assert settings_as_json(settings)["samples_file"] == str(Path("a") / "b.jsonl")
    assert settings.floors == {"stem": 8}
    assert LatencyTarget(milliseconds=np.float32(0.5)) == LatencyTarget(milliseconds=0.5)
    targets = [MacsTarget(macs=np.int64(10**6)), LatencyTarget(fraction=np.float32(0.5))]
    assert json.loads(json.dumps([vars(target) for target in targets]))[0]["macs"] == 1e6
    threads = LatencyTarget(fraction=0.5, threads=np.int64(4)).threads
    assert (type(threads), threads) == (int, 4)
    with pytest.raises(ConfigError, match=r"learning_rate is '0\.1'.*\n.*momentum is None"):
        TrainingSettings(learning_rate="0.1", momentum=None)


def test_fresh_weights_that_nothing_would_train_are_refused(tmp_path: Path) -> None:
    settings = dataclasses.replace(
        SETTINGS, strategy="metapruning", options={"weights": "scratch"}, fine_tune_epochs=0
    )
    with pytest.raises(ConfigError, match="fine_tune_epochs is 0, and `metapruning` hands over"):
        run(tmp_path / "run", settings=settings)
    assert not (tmp_path / "run").exists()


def test_renewed_statistics_do_not_depend_on_what_came_before(tmp_path: Path) -> None:
    images, targets = (torch.cat(parts) for parts in zip(*make_data(), strict=True))
    loader = DataLoader(
        TensorDataset(images, targets),
        batch_size=16,
        shuffle=True,
        generator=torch.Generator().manual_seed(7),
    )
    settings = dataclasses.replace(SETTINGS, recalibration_images=32)
    job = make_job(
        make_network(),
        EXAMPLE,
        loader,
        make_data(),
        target=MacsTarget(fraction=0.5),
        settings=settings,
        run_folder=tmp_path,
    )
    found = []
    for _ in range(2):
        network = copy.deepcopy(job.dense)
        job.recalibrate(network)
        found.append(network.state_dict())
        next(iter(loader))
        np.random.rand()
    for first, second in zip(found[0].values(), found[1].values(), strict=True):
        assert torch.equal(first, second)


def test_two_targets_of_a_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="given 2 times"):
        run(tmp_path / "run", target=[MacsTarget(fraction=0.5), MacsTarget(fraction=0.4)])


def test_unknown_runtime(tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match="onnxruntime"):
        run(tmp_path / "run", target=LatencyTarget(fraction=0.5, runtime="no-such"))


def test_example_of_wrong_shape(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="example inputs"):
        run(tmp_path / "run", example=torch.zeros(1, 3, 12, 12))


class Interrupted(BaseException):
    """Stands for Ctrl-C at a chosen place."""


def raise_interrupted(*_: Any, **__: Any) -> None:
    raise Interrupted


PLACES = {
    "baseline": (preparation, "find_grid"),
    "grid": (preparation, "check_target_is_feasible"),
    "after one gate epoch": (RunFolder, "save_state"),
    "deciding": (delivery, "settle"),
    "removal": (Job, "recalibrate"),
    "fine-tuning": (learning, "fine_tune"),
    "delivery": (delivery, "_export_and_measure"),
    "report": (record, "_report"),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> PruningResult:
    return run(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("place", list(PLACES))
def test_interrupted_anywhere_it_ends_in_the_same_place(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: PruningResult
) -> None:
    owner, method = PLACES[place]
    original = getattr(owner, method)

    def stop(*args: Any, **kwargs: Any) -> Any:
        if place == "after one gate epoch":
            original(*args, **kwargs)
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, stop)
        with pytest.raises(Interrupted):
            run(tmp_path / "run")
    resumed = run(tmp_path / "run", resume=True)
    assert resumed.plan.kept == uninterrupted.plan.kept
    expected = uninterrupted.network.state_dict()
    for name, value in resumed.network.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert not list((tmp_path / "run").rglob("*.part"))


def test_the_same_seed_gives_the_same_plan(tmp_path: Path, uninterrupted: PruningResult) -> None:
    again = run(tmp_path / "run")
    assert again.plan.kept == uninterrupted.plan.kept


def test_a_finished_run_is_read_not_repeated(
    uninterrupted: PruningResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Trainer, "run", never)
    again = run(uninterrupted.run_folder, resume=True)
    assert again.report == uninterrupted.report


def test_a_folder_is_not_overwritten(uninterrupted: PruningResult) -> None:
    with pytest.raises(RunFolderError, match=r"already holds this run.*`resume=True`"):
        run(uninterrupted.run_folder)
    with pytest.raises(RunFolderError, match=r"`settings.samples` was 10, is 11.*`resume=True`"):
        run(uninterrupted.run_folder, settings=dataclasses.replace(SETTINGS, samples=11))


def test_a_folder_of_another_run(uninterrupted: PruningResult) -> None:
    with pytest.raises(RunFolderError, match=r"targets.0.MacsTarget.fraction` was 0.5, is 0.3"):
        run(uninterrupted.run_folder, resume=True, target=MacsTarget(fraction=0.3))
    with pytest.raises(RunFolderError, match=r"`loss` was not given, is .*cross_entropy"):
        run(uninterrupted.run_folder, resume=True, loss=nn.functional.cross_entropy)
    with pytest.raises(ConfigError, match=r"(?s)loss.*is 3, needs a callable"):
        run(uninterrupted.run_folder, resume=True, loss=3)


@needs_locks
def test_two_processes_do_not_work_in_one_folder(
    tmp_path: Path, uninterrupted: PruningResult
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted.run_folder, folder)
    (folder / LOCK).touch()
    with Other(folder / LOCK):  # who is done with it is in nobody's way
        assert run(folder, resume=True).report == uninterrupted.report
    (folder / "report.json").unlink()
    (folder / "stages" / "finished.json").unlink()
    with Other(folder / LOCK) as other:
        assert other.holds
        with pytest.raises(RunFolderError, match="another process is at work in it; wait"):
            run(folder, resume=True)
    assert run(folder, resume=True).report["final"] == uninterrupted.report["final"]


def test_a_folder_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(RunFolderError, match=r"no run\.json"):
        run(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_corrupt_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(delivery, "settle", stop)
        with pytest.raises(Interrupted):
            run(tmp_path / "run")
    checkpoint = tmp_path / "run" / "stages" / "decision.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(FileFormatError, match=r"decision\.pt"):
        run(tmp_path / "run", resume=True)


def test_a_loss_that_turns_nan_keeps_the_last_good_state(tmp_path: Path) -> None:
    calls = 0

    def spoilt(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = nn.functional.cross_entropy(logits, targets)
        return loss * float("nan") if calls == 5 else loss

    with pytest.raises(TrainingError, match="epoch 2, step 4"):
        run(tmp_path / "run", loss=spoilt)
    assert (
        torch.load(tmp_path / "run" / "stages" / "phase.pt", weights_only=True)["gates"]["step"]
        == 3
    )
    state = torch.load(tmp_path / "run" / "stages" / "phase-last-good.pt", weights_only=True)
    assert state["gates"]["step"] == 4
    assert all(torch.isfinite(v).all() for v in state["network"].values() if v.is_floating_point())
    assert run(tmp_path / "run", resume=True, loss=spoilt).held


def test_over_target_at_delivery_is_trimmed_and_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_latency_ratios(monkeypatch, [1.28] * 3 + [0.4])
    result = run(tmp_path / "run", target=LatencyTarget(fraction=0.8, runtime="eager"))
    verdicts = [a["verdict"] for a in result.report["attempts"] if a["stage"] == "delivery"]
    assert verdicts == ["over", "held"]
    settled = json.loads((tmp_path / "run" / "stages" / "plan.json").read_text())["widths"]
    assert all(a <= b for a, b in zip(result.plan.widths, settled, strict=True))
    assert sum(result.plan.widths) < sum(settled)
    with torch.no_grad():
        assert torch.isfinite(result.network(EXAMPLE)).all()


def test_one_measurement_alone_cuts_no_trained_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_latency_ratios(monkeypatch, [1.28, 0.6, 0.7])
    result = run(tmp_path / "run", target=LatencyTarget(fraction=0.8, runtime="eager"))
    delivered = [a for a in result.report["attempts"] if a["stage"] == "delivery"]
    assert [a["verdict"] for a in delivered] == ["held"]
    assert result.report["final"]["latency"]["ratio"] == pytest.approx(0.7)


def test_what_was_trained_is_not_cut_where_no_epoch_may_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_latency_ratios(monkeypatch, [1.28] * 3)
    result = run(
        tmp_path / "run",
        target=LatencyTarget(fraction=0.8, runtime="eager"),
        settings=dataclasses.replace(SETTINGS, trim_epochs=0),
    )
    assert not result.held
    settled = json.loads((tmp_path / "run" / "stages" / "plan.json").read_text())["widths"]
    assert list(result.plan.widths) == settled


@pytest.mark.parametrize(("gate_epochs", "labels"), [(1, ["gates", "trim"]), (0, [])])
def test_a_trimmed_network_is_trained_on_unless_nothing_trained_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate_epochs: int, labels: list[str]
) -> None:
    seen: list[str] = []

    def noted(*arguments: Any, **options: Any) -> Trainer:
        seen.append(options["label"])
        return Trainer(*arguments, **options)

    monkeypatch.setattr("wgates_plugin.pipeline.job.Trainer", noted)
    monkeypatch.setattr("wgates_plugin.strategies.base.Trainer", noted)
    with_latency_ratios(monkeypatch, [1.28] * 3 + [0.4])
    run(
        tmp_path / "run",
        target=LatencyTarget(fraction=0.8, runtime="eager"),
        settings=dataclasses.replace(SETTINGS, gate_epochs=gate_epochs, fine_tune_epochs=0),
    )
    assert seen == labels


def test_a_run_of_other_defaults_is_not_continued(
    uninterrupted: PruningResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = dataclasses.replace(WGatesSettings(), rounds=3)
    monkeypatch.setattr(
        "wgates_plugin.pipeline.identity.make_strategy", lambda *_: WGatesStrategy(later)
    )
    with pytest.raises(RunFolderError, match=r"`settings.options.rounds` was 4, is 3"):
        run(uninterrupted.run_folder, resume=True)


def with_latency_ratios(monkeypatch: pytest.MonkeyPatch, ratios: list[float | None]) -> None:
    """Deliveries that measure at these ratios in turn, None is a kill; widths cost their share."""
    left = list(ratios)

    def scripted(self: LatencyStudy, path: Path, network: nn.Module, seconds: float) -> Any:
        ratio = left.pop(0)
        if ratio is None:
            raise Interrupted
        return measured(ratio * REFERENCE_MS)

    steady_studies(monkeypatch)
    monkeypatch.setattr(LatencyStudy, "of_file", scripted)


def test_killed_after_a_trim_it_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = LatencyTarget(fraction=0.8, runtime="eager")
    with monkeypatch.context() as patch:
        with_latency_ratios(patch, [1.28] * 3 + [None])
        with pytest.raises(Interrupted):
            run(tmp_path / "run", target=target)
    with monkeypatch.context() as patch:
        with_latency_ratios(patch, [0.5])
        result = run(tmp_path / "run", target=target, resume=True)
    assert result.held
    verdicts = [a["verdict"] for a in result.report["attempts"] if a["stage"] == "delivery"]
    assert verdicts == ["over", "held"]


def test_a_stage_whose_checkpoint_was_deleted_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = LatencyTarget(fraction=0.8, runtime="eager")
    with monkeypatch.context() as patch:
        with_latency_ratios(patch, [None])
        with pytest.raises(Interrupted):
            run(tmp_path / "run", target=target)
    removed = tmp_path / "run" / "stages" / "removed.pt"
    before = torch.load(removed, weights_only=True)["network"]
    removed.unlink()
    with_latency_ratios(monkeypatch, [0.5])
    assert run(tmp_path / "run", target=target, resume=True).held
    again = torch.load(removed, weights_only=True)["network"]
    assert all(torch.equal(value, again[name]) for name, value in before.items())


def test_the_first_batch_is_looked_at_and_nothing_drawn_from_the_loaders_generator() -> None:
    images = torch.arange(32.0).view(32, 1)
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(images), batch_size=4, shuffle=True, generator=generator)
    state = generator.get_state()
    assert first_batch_digest(loader) == first_batch_digest(loader)
    assert torch.equal(generator.get_state(), state)


def test_the_floors_are_not_measured_until_they_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery.closed_loop, "trimmed", lambda plan, *_: plan)
    with_latency_ratios(monkeypatch, [1.28, 0.5, 1.28])
    result = run(tmp_path / "run", target=LatencyTarget(fraction=0.8, runtime="eager"))
    assert not result.held
    assert result.report["contract"] == "missed"


def test_an_untouched_network_is_not_judged_by_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_latency_ratios(monkeypatch, [1.004] * 3)
    result = run(tmp_path / "run", target=LatencyTarget(fraction=1.0, runtime="eager"))
    assert result.held
    assert [attempt["verdict"] for attempt in result.report["attempts"]] == ["held"]


@pytest.mark.parametrize("unified", [False, True])
def test_an_untouched_network_that_is_slow_is_not_held(
    unified: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS
    if unified:  # its weights are others: the measurement decides
        quick = UnificationSettings(rho=(1e-3,), retrain_epochs=1)
        settings = dataclasses.replace(SETTINGS, unification=quick)
    with_latency_ratios(monkeypatch, [1.004 if unified else 1.6] * 6)
    target = LatencyTarget(fraction=1.0, runtime="eager")
    result = run(tmp_path / "run", target=target, settings=settings)
    assert not result.held
    assert result.report["attempts"][-1]["verdict"] == "over"


class Keeping(Tiny):
    """Keeps an activation, as hooks and visualisations do."""

    kept: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = [self.bn(self.stem(x))]
        return super().forward(x)


@pytest.mark.parametrize("strategy", ["wgates", "metapruning", "l1"])
def test_a_network_that_keeps_an_activation_is_pruned(strategy: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Keeping()
    kept = network(make_data()[0][0]) is not None and network.kept[0]
    settings = dataclasses.replace(SETTINGS, strategy=strategy)
    result = run(tmp_path / strategy, network=network, settings=settings)
    assert result.held
    assert network.kept[0] is kept  # the user's own is as it was
    assert kept.grad_fn is not None


class NumpyWords(criterion_strategies()["l1"]):  # type: ignore[misc]
    """A strategy as users write them: in numpy's numbers."""

    said: ClassVar[Any] = np.float32(1.5)

    def decide(self, task: Task) -> Decision:
        found = super().decide(task)
        widths = tuple(np.array(found.widths))
        return dataclasses.replace(found, widths=widths, facts={"mean": self.said})


def test_a_strategy_may_answer_in_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(SETTINGS, strategy=f"{__name__}:NumpyWords")
    with monkeypatch.context() as patch:
        patch.setattr(delivery, "settle", raise_interrupted)
        with pytest.raises(Interrupted):
            run(tmp_path / "run", settings=settings)
    result = run(tmp_path / "run", settings=settings, resume=True)
    assert result.report["decision"]["facts"] == {"mean": 1.5}
    monkeypatch.setattr(NumpyWords, "said", float("nan"))
    with pytest.raises(ConfigError, match=r"decision.facts: .* give finite numbers"):
        run(tmp_path / "other", settings=settings)


def test_samples_of_another_network_do_not_spoil_the_folder(
    tmp_path: Path, latency_run: PruningResult
) -> None:
    theirs = latency_run.run_folder / "samples.jsonl"
    text = theirs.read_text().replace('"fingerprint": "', '"fingerprint": "0', 1)
    (tmp_path / "theirs.jsonl").write_text(text)
    settings = dataclasses.replace(SETTINGS, samples_file=tmp_path / "theirs.jsonl")
    target = LatencyTarget(fraction=0.8, runtime="onnxruntime")
    with pytest.raises(FileFormatError, match=r"theirs.jsonl` line 1: measured on another network"):
        run(tmp_path / "run", target=target, settings=settings)
    assert not (tmp_path / "run").exists()


class Augmented(torch.utils.data.Dataset[Any]):
    """Draws from Python's and numpy's random states, as many data sets do."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        noise = np.random.normal() + random.random()
        return torch.full((1, 12, 12), float(noise)) * torch.rand(1, 12, 12), index % 3


def test_all_random_states_are_left_as_found(tmp_path: Path) -> None:
    loader: Any = torch.utils.data.DataLoader(Augmented(), batch_size=32)
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    prune_to_target(
        make_network(),
        EXAMPLE,
        loader,
        loader,
        target=MacsTarget(fraction=0.5),
        settings=SETTINGS,
        run_folder=tmp_path / "run",
        progress=False,
    )
    after = random.getstate(), np.random.get_state()[1]  # type: ignore[index]
    assert after[0] == before[0]
    assert (after[1] == before[1]).all()


def test_a_run_is_not_resumed_on_other_data(uninterrupted: PruningResult) -> None:
    data = make_data(count=64)
    with pytest.raises(RunFolderError, match=r"belongs to another run.*data"):
        prune_to_target(
            make_network(),
            EXAMPLE,
            data,
            data,
            target=MacsTarget(fraction=0.5),
            settings=SETTINGS,
            run_folder=uninterrupted.run_folder,
            resume=True,
        )


def test_a_lost_page_is_made_again(uninterrupted: PruningResult) -> None:
    page = uninterrupted.run_folder / "report.html"
    page.unlink()
    run(uninterrupted.run_folder, resume=True)
    assert page.is_file()


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's background job
sys.path.insert(0, {tests!r})
import test_pipeline as t
from wgates_plugin.targets import LatencyTarget
from pathlib import Path
print("started", flush=True)
t.run(Path({folder!r}), target=LatencyTarget(fraction=0.8, runtime="eager"), resume={resume})
"""


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_killed_from_outside_and_resumed(kind: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder), resume=False)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for _ in range(3000):
        if (folder / "samples.jsonl").exists() or process.poll() is not None:
            break
        time.sleep(0.02)
    process.send_signal(kind)
    assert process.wait(timeout=60) != 0
    assert not (folder / "report.json").exists()
    seen = (folder / "samples.jsonl").read_text().rpartition("\n")[0]
    result = run(folder, target=LatencyTarget(fraction=0.8, runtime="eager"), resume=True)
    assert (folder / "samples.jsonl").read_text().startswith(seen)
    assert result.artefact.is_file()
    assert result.held == (result.report["final"]["latency_ms"] <= result.report["target_ms"])
