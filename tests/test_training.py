"""The training loop, evaluation, recalibration and distillation."""

from __future__ import annotations

import copy
import io
import logging
import math
import os
import subprocess
import sys
import threading
from collections import UserDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import example
from rich.console import Console
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    TensorDataset,
)

from wgates_plugin.catalogue.tensor_loader import TensorLoader
from wgates_plugin.errors import ConfigError, TrainingError
from wgates_plugin.strategies.metapruning.fitness import mean_loss
from wgates_plugin.training import (
    StepContext,
    Trainer,
    TrainingSettings,
    distillation_loss,
    evaluate,
    learning_rate_at,
    progress,
    recalibrate_batchnorm,
)
from wgates_plugin.training.as_found import random_state_kept, seed_epoch
from wgates_plugin.training.evaluation import cross_entropy
from wgates_plugin.training.progress import Bar

CPU: dict[str, Any] = {"accelerator": "cpu"}


def small_network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(32, 2),
    )


def quadrants(count: int = 96) -> tuple[Tensor, Tensor]:
    """8x8 images whose upper (class 0) or lower (class 1) half is brighter."""
    draws = torch.Generator().manual_seed(5)
    images = torch.randint(0, 100, (count, 1, 8, 8), generator=draws, dtype=torch.uint8)
    targets = torch.arange(count) % 2
    images[targets == 0, :, :4] += 120
    images[targets == 1, :, 4:] += 120
    return images, targets


def loader(**options: Any) -> TensorLoader:
    images, targets = quadrants()
    return TensorLoader(
        images, targets, 16, mean=(0.4,), std=(0.3,), **{"shuffle": True, "shift": 1, **options}
    )


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def numpy_words() -> Any:
    state: Any = np.random.get_state()
    return state[1]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


class Bad(nn.Module):
    """Gives `output(logits)` instead of logits from call number `after` on."""

    def __init__(self, output: Any, after: int = 0) -> None:
        super().__init__()
        self.inner, self.output, self.left = small_network(), output, after

    def forward(self, images: Tensor) -> Any:
        logits = self.inner(images)
        self.left -= 1
        return self.output(logits) if self.left < 0 else logits


# --- settings and schedule ---------------------------------------------------------------------


def test_settings_list_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingSettings(epochs=1.5, learning_rate=0, optimizer="lion", precision="16-mixed")  # type: ignore[arg-type]
    assert len(caught.value.problems) == 4
    assert "sgd, adamw" in str(caught.value)


def test_learning_rate_warms_up_then_falls_to_zero() -> None:
    settings = TrainingSettings(epochs=4, learning_rate=0.2, warmup_epochs=0.5)
    rates = [
        learning_rate_at(step, steps_per_epoch=10, total_epochs=4, settings=settings)
        for step in range(41)
    ]
    assert rates[:5] == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2])
    assert rates[5] == pytest.approx(0.2)
    assert all(after < before for before, after in pairwise(rates[5:]))
    assert rates[40] == pytest.approx(0.0, abs=1e-12)


def test_trainer_uses_the_schedule_and_spares_vectors_from_decay() -> None:
    settings = TrainingSettings(epochs=2, learning_rate=0.1, **CPU)
    network = small_network()
    trainer = Trainer(network, loader(), settings)
    decayed = {
        id(p)
        for group in trainer.optimizer.param_groups
        for p in group["params"]
        if group["weight_decay"] > 0
    }
    assert decayed == {id(network[0].weight), id(network[6].weight)}
    seen: list[tuple[int, float, int]] = []

    def note(where: StepContext) -> None:
        seen.append((where.step, trainer.optimizer.param_groups[0]["lr"], where.epoch))

    trainer.run(after_backward=note)
    steps = len(loader())
    expected = [
        learning_rate_at(step, steps_per_epoch=steps, total_epochs=2, settings=settings)
        for step in range(2 * steps)
    ]
    assert [step for step, _, _ in seen] == list(range(2 * steps))
    assert [rate for _, rate, _ in seen] == pytest.approx(expected)
    assert [epoch for _, _, epoch in seen] == [0] * steps + [1] * steps


# --- the loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"channels_last": True}, {"optimizer": "adamw", "learning_rate": 0.02},
     {"precision": "bf16-mixed"}, {"gradient_clip": 1.0, "label_smoothing": 0.1}],
    ids=["plain", "channels_last", "adamw", "bf16", "clip"],
)  # fmt: skip
def test_training_learns(options: dict[str, Any]) -> None:
    network = small_network()
    settings = TrainingSettings(**{"epochs": 4, "learning_rate": 0.1, **CPU, **options})
    history = Trainer(network, loader(), settings).run()
    assert [record["epoch"] for record in history] == [0, 1, 2, 3]
    assert history[-1]["loss"] < history[0]["loss"]
    score = evaluate(network, loader(shuffle=False, shift=0))
    assert score.accuracy >= 0.95
    assert score.images == 96
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in network.parameters())


def test_one_step_equals_plain_torch() -> None:
    images, targets = quadrants(16)
    data = TensorLoader(images, targets, 16)
    settings = TrainingSettings(epochs=1, learning_rate=0.1, weight_decay=0.01, **CPU)
    network = small_network()
    network[5].p = 0.0
    twin = copy.deepcopy(network)
    Trainer(network, data, settings).run()
    groups: list[dict[str, Any]] = [
        {"params": [p for p in twin.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in twin.parameters() if p.ndim == 1]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    functional.cross_entropy(twin(images.float() / 255), targets).backward()
    optimizer.step()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value)


def test_everything_is_left_as_found() -> None:
    network = small_network().eval()
    network[1].train()
    network[0].weight.requires_grad_(False)
    frozen = network[0].weight.clone()
    names = list(network.state_dict())
    torch_state, numpy_state = torch.get_rng_state(), numpy_words().copy()
    Trainer(network, loader(), TrainingSettings(epochs=1, **CPU)).run()
    evaluate(network, loader())
    recalibrate_batchnorm(network, loader())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(numpy_words(), numpy_state)
    assert [module.training for module in network] == [i == 1 for i in range(7)]
    assert list(network.state_dict()) == names
    assert torch.equal(network[0].weight, frozen)
    assert not network[0].weight.requires_grad
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in network.modules())
    assert all(p.grad is None for p in network.parameters())


def torch_loader() -> DataLoader[Any]:
    images, targets = quadrants()
    own = torch.Generator().manual_seed(1)
    return DataLoader(
        TensorDataset(images / 255, targets), batch_size=16, shuffle=True, generator=own
    )


def batch_sampled_loader() -> DataLoader[Any]:
    images, targets = quadrants()
    order = RandomSampler(range(96), generator=torch.Generator().manual_seed(1))
    return DataLoader(
        TensorDataset(images / 255, targets), batch_sampler=BatchSampler(order, 16, drop_last=False)
    )


def test_the_epoch_reaches_the_sampler_within_a_batch_sampler() -> None:
    dataset: Any = TensorDataset(torch.arange(8))
    order: Any = DistributedSampler(dataset, num_replicas=1, rank=0)
    batches = DataLoader(dataset, batch_sampler=BatchSampler(order, 4, drop_last=False))
    seed_epoch(0, 3, torch.device("cpu"), batches)
    assert order.epoch == 3


def test_a_samplers_seed_is_set_for_an_epoch_and_given_back() -> None:
    dataset: Any = TensorDataset(torch.arange(8))
    order: Any = DistributedSampler(dataset, num_replicas=1, rank=0, seed=5)
    batches, cpu = DataLoader(dataset, sampler=order), torch.device("cpu")
    found = []
    for seed in (0, 0, 1):
        with random_state_kept(cpu, batches):
            seed_epoch(seed, 3, cpu, batches)
            found.append(list(order))
    assert found[0] == found[1] != found[2]
    assert (order.seed, order.epoch) == (5, 0)


@pytest.mark.parametrize("make", [loader, torch_loader, batch_sampled_loader])
def test_resuming_at_an_epoch_ends_in_the_same_place(make: Any) -> None:
    settings = TrainingSettings(epochs=3, **CPU)
    whole = small_network()
    Trainer(whole, make(), settings, seed=7).run()

    part = small_network()
    first = Trainer(part, make(), settings, seed=7)
    first.run(epochs=2)
    memory = io.BytesIO()
    torch.save(first.state_dict(), memory)
    memory.seek(0)
    resumed = small_network(seed=99)
    resumed.load_state_dict(part.state_dict())
    torch.manual_seed(12345)
    second = Trainer(resumed, make(), settings, seed=7)
    second.load_state_dict(torch.load(memory, weights_only=True))
    assert second.epoch == 2
    records = second.run()
    assert [record["epoch"] for record in records] == [2]
    assert same(weights(whole), weights(resumed))

    other = small_network()
    Trainer(other, make(), settings, seed=8).run()
    assert not same(weights(whole), weights(other))


def test_a_later_phase_continues_the_schedule_with_a_new_optimizer() -> None:
    settings = TrainingSettings(epochs=2, learning_rate=0.1, **CPU)
    steps: list[int] = []
    fractions: list[float] = []

    def note(where: StepContext) -> None:
        steps.append(where.step)
        fractions.append(where.fraction)

    trainer = Trainer(small_network(), loader(), settings, total_epochs=4)
    records = trainer.run(first_epoch=3, epochs=1, after_backward=note)
    assert steps == list(range(18, 24))
    assert fractions == pytest.approx([step / 24 for step in range(18, 24)])
    assert records[0]["steps"] == 24
    assert records[0]["learning_rate"] == pytest.approx(
        learning_rate_at(23, steps_per_epoch=6, total_epochs=4, settings=settings)
    )


def test_callbacks_come_in_order() -> None:
    network = small_network()
    calls: list[str] = []

    def before(where: StepContext) -> None:
        assert where.loss is None
        calls.append("before")

    def after(where: StepContext) -> None:
        assert where.loss is not None
        assert network[0].weight.grad is not None
        calls.append("after")

    def ended(epoch: int, record: dict[str, Any]) -> None:
        assert trainer.epoch == epoch + 1
        calls.append(f"end {epoch} {record['label']}")

    trainer = Trainer(network, loader(), TrainingSettings(epochs=1, **CPU), label="fine-tune")
    trainer.run(before_forward=before, after_backward=after, on_epoch_end=ended)
    assert calls == ["before", "after"] * 6 + ["end 0 fine-tune"]


def test_one_log_line_per_epoch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="wgates_plugin"):
        Trainer(small_network(), loader(), TrainingSettings(epochs=2, **CPU)).run(progress=False)
    lines = [record.message for record in caplog.records if record.name == "wgates_plugin"]
    assert [line[:19] for line in lines] == ["train: epoch 1 of 2", "train: epoch 2 of 2"]


@pytest.mark.parametrize("spoil", [lambda x: x * float("nan"), lambda x: x * float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_step(spoil: Any) -> None:
    network = Bad(spoil, after=2)
    snapshots: list[dict[str, Tensor]] = []
    trainer = Trainer(network, loader(), TrainingSettings(epochs=1, **CPU))
    with pytest.raises(TrainingError, match=r"epoch 1, step 2: the loss is"):
        trainer.run(before_forward=lambda _: snapshots.append(weights(network)))
    assert len(snapshots) == 3
    assert same(weights(network), snapshots[-1])


def test_a_gradient_that_is_not_finite_stops_before_the_step() -> None:
    network = small_network()
    before = weights(network)

    def loss(logits: Tensor, _: Tensor) -> Tensor:
        return (logits - logits.detach()).sum().abs().sqrt()  # 0, with an infinite slope

    gates: list[StepContext] = []
    trainer = Trainer(network, loader(), TrainingSettings(epochs=1, **CPU), loss=loss)
    with pytest.raises(TrainingError, match="a gradient is not finite"):
        trainer.run(after_backward=gates.append)
    assert same(weights(network), before)
    assert gates == []


@pytest.mark.parametrize("channels_last", [False, True])
def test_inputs_may_be_a_tuple_or_keywords(channels_last: bool) -> None:
    settings = TrainingSettings(
        epochs=1, channels_last=channels_last, distillation_weight=0.5, **CPU
    )

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_network()

        def forward(self, one: Tensor, two: Tensor) -> Tensor:
            logits: Tensor = self.inner(one + 0.5 * two)
            return logits

    images, targets = quadrants(32)
    one, two = images / 255, images.flip(0) / 255
    found = []
    for inputs in ((one, two), [one, two], {"two": two, "one": one}, UserDict(one=one, two=two)):
        network = Sum()
        Trainer(network, [(inputs, targets)], settings, teacher=Sum()).run()
        score = evaluate(network, [(inputs, targets)])
        assert score.images == recalibrate_batchnorm(network, [(inputs, targets)]) == 32
        found.append((weights(network), score))
    assert all(same(state, found[0][0]) for state, _ in found)
    assert all(score == found[0][1] for _, score in found)
    assert not same(found[0][0], weights(Sum()))


def test_keyword_inputs_come_out_of_a_torch_loader() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_network()

        def forward(self, *, img: Tensor) -> Tensor:
            logits: Tensor = self.inner(img)
            return logits

    images, targets = quadrants(32)
    data: Any = [({"img": images[i] / 255}, int(targets[i])) for i in range(32)]
    score = evaluate(Named(), DataLoader(data, batch_size=8))
    assert score == evaluate(small_network(), TensorLoader(images, targets, 8))
    with pytest.raises(TrainingError, match="no tensor with a batch dimension"):
        recalibrate_batchnorm(Named(), [({"img": 1}, 0)])


def endless() -> Any:
    yield from loader()


@pytest.mark.parametrize(
    ("network", "data", "match"),
    [
        (Bad(lambda x: (x, x)), loader(), "auxiliary heads"),
        (small_network(), [torch.zeros(2)], "needed the pair"),
        (small_network(), [], "no batches"),
        (small_network(), endless(), "length is unknown"),
        (small_network().requires_grad_(False), loader(), "nothing to train"),
    ],
    ids=["output", "batch", "empty", "length", "frozen"],
)
def test_unusable_things_are_named(network: nn.Module, data: Any, match: str) -> None:
    with pytest.raises(TrainingError, match=match):
        Trainer(network, data, TrainingSettings(epochs=1, **CPU)).run()


def test_optimizer_state_of_another_network_is_refused() -> None:
    settings = TrainingSettings(epochs=1, **CPU)
    trainer = Trainer(small_network(), loader(), settings)
    trainer.run()
    narrow = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)
    )
    with pytest.raises(TrainingError, match="does not fit this network"):
        Trainer(narrow, loader(), settings).load_state_dict(trainer.state_dict())


def test_targets_that_are_no_classes_have_no_accuracy() -> None:
    images, _ = quadrants(32)
    batches = [(images / 255, torch.zeros(32, 3))]
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return functional.mse_loss(logits, targets[:, :2])

    history = Trainer(network, batches, TrainingSettings(epochs=1, **CPU), loss=loss).run()
    assert history[0]["accuracy"] is None
    with pytest.raises(TrainingError, match="no classification"):
        evaluate(network, batches)
    one_output = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    for targets in (torch.zeros(32, dtype=torch.long), torch.zeros(32, 1)):
        with pytest.raises(TrainingError, match=r"no classification; needed logits .* two classes"):
            evaluate(one_output, [(images / 255, targets)])


@pytest.mark.parametrize(
    "targets", [torch.randn(32, 2), torch.ones(32, 2), torch.tensor([[1.5, -0.5]] * 32)]
)
def test_numbers_that_are_no_probabilities_have_no_accuracy(targets: Tensor) -> None:
    """Of the logits' shape, as in regression and with several labels to an image."""
    images, labels = quadrants(32)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    batches = [(images / 255, targets)]
    settings = TrainingSettings(epochs=1, **CPU)
    history = Trainer(network, batches, settings, loss=functional.mse_loss).run()
    assert history[0]["accuracy"] is None
    with pytest.raises(TrainingError, match=r"no classification; .* whose sum is 1"):
        evaluate(network, batches)
    sure = functional.one_hot(labels, 2)
    for soft in (sure.double(), (0.9 * sure + 0.05).bfloat16().float()):
        scored = evaluate(network, [(images / 255, soft.float())])
        assert scored.accuracy == evaluate(network, [(images / 255, labels)]).accuracy


def test_a_loss_of_one_number_in_any_shape_will_do() -> None:
    found = []
    for shape in ((), (1,), (1, 1)):
        network = small_network()
        Trainer(
            network,
            loader(),
            TrainingSettings(epochs=1, **CPU),
            loss=lambda y, t, shape=shape: functional.cross_entropy(y, t).view(shape),
        ).run()
        found.append(weights(network))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda y, t: functional.cross_entropy(y, t, reduction="none"), r"\(16,\)"),
        (lambda y, t: float(functional.cross_entropy(y, t).detach()), "float"),
    ],
)
def test_a_loss_that_is_no_single_number_is_refused(loss: Any, got: str) -> None:
    network = small_network()
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    trainer = Trainer(network, loader(), TrainingSettings(epochs=1, **CPU), loss=loss)
    with pytest.raises(TrainingError, match=rf"train: the loss gave {got}, needed a tensor of one"):
        trainer.run()
    assert same(before, weights(network))


def test_a_batch_of_labels_to_ignore_teaches_and_counts_nothing() -> None:
    logits, ignored = torch.randn(4, 2, requires_grad=True), torch.full((4,), -100)
    cross_entropy(logits, ignored, label_smoothing=0.1).backward()
    assert logits.grad is not None
    assert not logits.grad.any()
    assert cross_entropy(torch.zeros(2, 200), torch.tensor([156, 156]).byte()) > 1  # no -100
    images, targets = quadrants(32)
    without = (images[:4] / 255, ignored)

    def loss_of(*batches: Any, **options: Any) -> float:
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        with torch.no_grad():
            network[1].weight.zero_()  # type: ignore[operator, union-attr]
            network[1].bias.zero_()  # type: ignore[operator, union-attr]
        history = Trainer(network, batches, TrainingSettings(epochs=1, **CPU), **options).run()
        return float(history[0]["loss"])

    assert loss_of((images / 255, targets), without) == pytest.approx(math.log(2))
    with pytest.raises(TrainingError, match=r"epoch 1: .* one to ignore \(-100\)"):
        loss_of(without)
    # A loss of the user's own may judge what has no labels.
    assert loss_of(without, loss=lambda answers, _: (answers - 1).square().mean()) == 1.0


def test_a_batch_of_one_that_a_norm_cannot_train_on_is_named() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    images, targets = quadrants(17)
    trainer = Trainer(network, TensorLoader(images, targets, 16), TrainingSettings(**CPU))
    with pytest.raises(TrainingError, match=r"epoch 1, step 1: a BatchNorm has one value"):
        trainer.run()


class InPlace(nn.Module):
    """Normalises the very images that it is given."""

    def __init__(self, seen: list[Tensor] | None = None) -> None:
        super().__init__()
        self.inner, self.seen = small_network(), seen

    def forward(self, images: Tensor) -> Tensor:
        if self.seen is not None:
            self.seen.append(images.clone())
        logits: Tensor = self.inner(images.sub_(0.5).div_(0.25))
        return logits


def test_a_network_that_works_in_place_leaves_batches_and_teacher_theirs() -> None:
    images, targets = quadrants(32)
    batches = [(images / 255, targets)]
    seen: list[Tensor] = []
    settings = TrainingSettings(epochs=2, distillation_weight=0.5, **CPU)
    network = InPlace()
    Trainer(network, batches, settings, teacher=InPlace(seen)).run()
    assert len(seen) == 2
    assert all(torch.equal(found, images / 255) for found in seen)
    assert evaluate(network, batches) == evaluate(network, batches)
    recalibrate_batchnorm(network, batches)
    assert torch.equal(batches[0][0], images / 255)


# --- distillation ----------------------------------------------------------------------------


def test_distillation_loss_is_the_scaled_divergence() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    soft = torch.softmax(teacher / 3, 1)
    expected = 9 * (soft * (soft.log() - torch.softmax(student / 3, 1).log())).sum(1).mean()
    loss = distillation_loss(student, teacher, 3.0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_a_student_follows_its_teacher_without_true_labels() -> None:
    data = loader()
    teacher = small_network()
    Trainer(teacher, data, TrainingSettings(epochs=4, learning_rate=0.1, **CPU)).run()
    teacher.train()
    before = weights(teacher)
    wrong = TensorLoader(data.images, torch.zeros(96, dtype=torch.long), 16, (0.4,), (0.3,), True)
    settings = TrainingSettings(epochs=4, learning_rate=0.1, distillation_weight=1.0, **CPU)
    student = small_network(seed=3)
    Trainer(student, wrong, settings, teacher=teacher).run()
    assert evaluate(student, loader(shift=0)).accuracy >= 0.9
    assert teacher.training
    assert same(weights(teacher), before)
    with pytest.raises(TrainingError, match="no teacher"):
        Trainer(student, wrong, settings)


# --- progress ----------------------------------------------------------------------------------


def drawn_by(use: Any, *, terminal: bool, wanted: bool | None) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100)
    threads = threading.active_count()
    with Bar("sampling", 50, wanted=wanted, console=console) as bar:
        use(bar)
        assert threading.active_count() == threads
    return text.getvalue()


def test_a_bar_is_told_how_far_things_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def use(bar: Bar) -> None:
        bar.reach(30, "resumed")
        bar.advance("one more")
        assert bar.done == 31
        bar.reach(50)

    assert drawn_by(use, terminal=True, wanted=True) == ""  # over within two seconds
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0.0)
    seen = drawn_by(use, terminal=True, wanted=None)
    assert "sampling" in seen
    assert "30/50" in seen
    assert "resumed" in seen
    assert "50/50" in seen
    assert drawn_by(use, terminal=False, wanted=None) == ""
    assert drawn_by(use, terminal=True, wanted=False) == ""


# --- evaluation and recalibration --------------------------------------------------------------


def test_evaluation_counts_every_image_once() -> None:
    images, targets = quadrants(21)
    network = small_network()
    score = evaluate(network, TensorLoader(images, targets, 8))
    network.eval()
    with torch.no_grad():
        logits = network(images / 255)
    assert score.images == 21
    assert score.accuracy == pytest.approx((logits.argmax(1) == targets).float().mean().item())
    assert score.loss == pytest.approx(functional.cross_entropy(logits, targets).item(), rel=1e-5)
    with pytest.raises(TrainingError, match="no batches"):
        evaluate(network, [])


def test_recalibration_is_the_average_over_batches() -> None:
    network = small_network()
    network[1].momentum = 0.3
    network[1].running_mean.fill_(50.0)
    data = loader(shuffle=False, shift=0)
    assert recalibrate_batchnorm(network, data, images=40) == 48
    with torch.no_grad():
        maps = [network[0](batch) for batch, _ in list(data)[:3]]
    mean = torch.stack([x.mean((0, 2, 3)) for x in maps]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in maps]).mean(0)
    torch.testing.assert_close(network[1].running_mean, mean)
    torch.testing.assert_close(network[1].running_var, variance)
    assert network[1].momentum == 0.3
    assert network.training


def test_a_small_batch_has_a_small_part_in_recalibration() -> None:
    norm = nn.BatchNorm1d(1)
    batches = [(torch.randn(count, 1) + count, torch.zeros(count)) for count in (16, 16, 2)]
    assert recalibrate_batchnorm(norm, batches, images=100) == 34
    every = torch.cat([batch for batch, _ in batches])
    torch.testing.assert_close(norm.running_mean, every.mean(0))
    variance = sum(len(batch) * batch.var(0) for batch, _ in batches) / 34
    torch.testing.assert_close(norm.running_var, variance)


def test_ignored_labels_are_neither_right_nor_wrong() -> None:
    logits = functional.one_hot(torch.tensor([0, 1, 2, 1]), 3).float() * 20
    ignored = torch.full((4,), -100)
    partly = torch.tensor([0, 1, -100, 2])
    found = evaluate(nn.Identity(), [(logits, partly), (logits, ignored)])
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.loss == pytest.approx(float(functional.cross_entropy(logits, partly)))
    assert found.images == 8
    with pytest.raises(TrainingError, match="all 4 images are ones to ignore"):
        evaluate(nn.Identity(), [(logits, ignored)])


def test_recalibration_keeps_dropout_off_and_statistics_on_failure() -> None:
    network: Any = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.BatchNorm1d(64))
    data = loader(shuffle=False, shift=0)
    recalibrate_batchnorm(network, data, images=96)
    values = torch.cat([batch.flatten(1) for batch, _ in data])
    torch.testing.assert_close(network[2].running_mean, values.mean(0), atol=1e-5, rtol=1e-4)
    before = weights(network)
    with pytest.raises(TrainingError, match="no batches"):
        recalibrate_batchnorm(network, [])
    with pytest.raises(TrainingError, match="batch of one"):
        recalibrate_batchnorm(network, [(torch.zeros(1, 1, 8, 8), 0)])
    assert same(weights(network), before)
    assert recalibrate_batchnorm(nn.Linear(2, 2), data) == 0


class Levels(nn.Module):
    """One norm over two levels, and one that runs in the network's train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.training_only = nn.BatchNorm2d(1), nn.BatchNorm2d(1)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.shared(images) + self.shared(input=10 * images)
        return self.training_only(found) if self.training else found


def test_recalibration_averages_over_all_calls_of_a_norm_and_only_of_those_that_run() -> None:
    network: Any = Levels()
    network.training_only.running_mean.fill_(7.0)
    data = [(example(4, seed=seed)[:, :1] + seed, None) for seed in range(3)]
    assert recalibrate_batchnorm(network, data) == 12
    calls = [level for images, _ in data for level in (images, 10 * images)]
    mean, var = (
        torch.stack([statistic(call) for call in calls]).mean()
        for statistic in (torch.mean, torch.var)
    )
    torch.testing.assert_close(network.shared.running_mean, mean[None])
    torch.testing.assert_close(network.shared.running_var, var[None])
    assert network.training_only.running_mean == 7.0
    assert network.shared.momentum == 0.1


def test_instance_norms_that_track_statistics_are_recalibrated_too() -> None:
    network: Any = nn.Sequential(nn.InstanceNorm2d(1, track_running_stats=True))
    network[0].running_mean.fill_(7.0)
    data = [(example(4, seed=seed)[:, :1] + seed, None) for seed in range(3)]
    assert recalibrate_batchnorm(network, data) == 12
    mean = torch.cat([images for images, _ in data]).mean((0, 2, 3))
    torch.testing.assert_close(network[0].running_mean, mean)


def test_recalibration_waits_for_no_other_process() -> None:
    """`SyncBatchNorm` would: on a GPU it meets the other processes, on the CPU it refuses to."""
    network: Any = nn.Sequential(nn.SyncBatchNorm(3))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        recalibrate_batchnorm(network, [(example(8), None)])
    finally:
        distributed.destroy_process_group()
    torch.testing.assert_close(network[0].running_mean, example(8).mean((0, 2, 3)))
    assert "forward" not in vars(network[0])


class Lazy(nn.Module):
    """Makes its table when it first sees the inputs' shape."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.table = nn.Linear(4, 2), torch.empty(0)

    def forward(self, inputs: Tensor) -> Tensor:
        if not len(self.table):
            self.table = torch.linspace(0, 1, inputs.shape[1])
        logits: Tensor = self.fc(inputs * self.table)
        return logits


@pytest.mark.parametrize(
    "judge", [evaluate, lambda *told: mean_loss(told[0], told[1], functional.cross_entropy)]
)
def test_what_a_network_keeps_of_its_evaluation_does_for_training(judge: Any) -> None:
    network = Lazy()
    judge(network, [(torch.randn(3, 4), torch.tensor([0, 1, 1]))])
    inputs = torch.randn(3, 4, requires_grad=True)
    network(inputs).sum().backward()
    assert inputs.grad is not None


# --- several processes ---------------------------------------------------------------------------

TWO_PROCESSES = '''
import sys
import torch
from torch import nn
from torch.utils.data import (
    DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler
)
from wgates_plugin.catalogue.tensor_loader import TensorLoader
from wgates_plugin.errors import TrainingError
from wgates_plugin.training import Trainer, TrainingSettings

torch.set_num_threads(1)
images = torch.randint(0, 255, (32, 1, 4, 4), generator=torch.Generator().manual_seed(0))
data, targets = images.to(torch.uint8), torch.arange(32) % 2


def train(loader, seed=3, first=0):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    settings = TrainingSettings(epochs=2, learning_rate=0.1, accelerator="cpu")
    trainer = Trainer(network, loader, settings, seed=seed)
    history = trainer.run(first_epoch=first)
    return trainer, network, history


def batches(loader, epoch, seed=3):
    """What this process sees in `epoch` when training starts there."""
    trainer, seen = train(loader, seed, first=2)[0], []
    trainer.total_epochs = 3
    trainer.network.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    trainer.run(first_epoch=epoch, epochs=1)
    return torch.cat(seen)


in_memory = TensorLoader(data, targets, 8, shuffle=True)
trainer, network, history = train(in_memory)
refused = ""


class Numbered(Dataset):
    """Its number and a random one."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(())] + [0.0] * 14).view(1, 4, 4), index % 2


class Stream(IterableDataset):
    def __len__(self):
        return 32

    def __iter__(self):
        return iter([Numbered()[index] for index in range(32)])


try:
    train(DataLoader(Stream(), batch_size=8))
except TrainingError as error:
    refused = str(error)
assert trainer.fabric.world_size == 2 and trainer.steps_per_epoch == 2
shuffled = DataLoader(TensorDataset(data / 255, targets), batch_size=8, shuffle=True)
mine = {"weight": network[1].weight.detach(), "loss": history[-1]["loss"]}
mine["tensor"] = batches(in_memory, 1)
for name, seed in (("drawn", 3), ("other", 4)):
    mine[name] = batches(DataLoader(Numbered(), batch_size=8, shuffle=True), 0, seed)[:, 0, 0, :2]
weighted = WeightedRandomSampler(torch.arange(1.0, 33), 32, replacement=False)
mine["weighted"] = batches(DataLoader(Numbered(), batch_size=8, sampler=weighted), 0)[:, 0, 0, :2]
mine["refused"] = refused
mine["first"], mine["second"] = batches(shuffled, 0), batches(shuffled, 1)
torch.save(mine, f"{sys.argv[1]}/{trainer.fabric.global_rank}.pt")

# gloo's threads can abort the interpreter's exit, which is not what is tested here.
import os, sys
import torch
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)
'''


def test_two_processes_share_data_and_agree(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(one["weight"], two["weight"])
    assert one["loss"] == two["loss"]
    for part in ("tensor", "first", "second"):
        both = torch.cat([one[part], two[part]]).flatten(1)
        assert len(both.unique(dim=0)) == 32
    assert not torch.equal(one["first"], one["second"])
    for part in ("drawn", "weighted"):  # one order in common, shared out
        orders = torch.cat([one[part], two[part]])[:, 0]
        assert sorted(orders.tolist()) == list(range(32))
    assert not torch.equal(one["drawn"][:, 0], one["other"][:, 0])  # which the seed decides on
    assert not (one["drawn"][:, 1] == two["drawn"][:, 1]).any()  # all else each for itself
    assert not (one["weighted"][8:, 1] == two["weighted"][8:, 1]).any()
    for found in (one, two):
        assert "DataLoader`: 2 processes cannot share it" in found["refused"]


def test_a_part_of_the_schedule_counts_its_own_epochs(caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(
        small_network(), loader(), TrainingSettings(**CPU), total_epochs=3, label="gates"
    )
    with caplog.at_level(logging.INFO, logger="wgates_plugin"):
        trainer.run(first_epoch=1, epochs=2, progress=False)
    words = "gates: epoch 1 of 2 (epoch 2 of 3 on the learning-rate schedule), loss"
    assert any(record.message.startswith(words) for record in caplog.records)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_may_be_of_any_whole_type(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    assert torch.equal(cross_entropy(logits, labels.to(dtype)), cross_entropy(logits, labels))
