"""Network Slimming: scales shrink, one threshold over all of them, frozen weights stay."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from networks import CLASSES, conv_bn, example, randomised, tiny
from torch import Tensor, nn

from wgates_plugin import trace
from wgates_plugin.efficiency import Budget, Limit, MacsModel
from wgates_plugin.errors import ConfigError, PlanError
from wgates_plugin.strategies import Task, make_strategy
from wgates_plugin.training import TrainingSettings


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (example(4, seed=seed), torch.randint(CLASSES, (4,), generator=generator))
        for seed in range(3)
    ]


def network() -> nn.Sequential:
    body = nn.Sequential(conv_bn(3, 16), conv_bn(16, 16), nn.Flatten(), nn.Linear(16 * 64, CLASSES))
    return randomised(body, 0)  # type: ignore[return-value]


def task(subject: nn.Module, *, epochs: int = 1, **changes: Any) -> Task:
    space = trace(subject, example(), min_channels=2)
    model = MacsModel(space)
    limit = Limit(model, 0.5 * float(model(torch.tensor(space.full_widths))))
    return Task(
        copy.deepcopy(subject),
        space,
        Budget.of(limit),
        example(),
        batches(),
        epochs=epochs,
        total_epochs=epochs + 1,
        training=TrainingSettings(learning_rate=0.02, accelerator="cpu"),
        progress=False,
        **changes,
    )


def scales(subject: nn.Module) -> Tensor:
    found = [m.weight.detach().abs() for m in subject.modules() if isinstance(m, nn.BatchNorm2d)]
    return torch.cat(found)


def test_the_penalty_shrinks_the_scales_and_they_are_the_scores() -> None:
    plain, sparse = (
        make_strategy("slim", {"sparsity": sparsity}).decide(task(network(), epochs=3))
        for sparsity in (0.0, 0.05)
    )
    assert scales(sparse.network).mean() < scales(plain.network).mean() - 0.01
    assert torch.allclose(sparse.scores, scales(sparse.network))
    assert sparse.monitor[-1]["scales"] == pytest.approx(float(scales(sparse.network).mean()), 0.05)


def test_one_threshold_holds_for_all_layers() -> None:
    """The layer of small scales loses more; relative to its own mean it would not."""
    subject = network()
    with torch.no_grad():
        for layer, size in ((0, 1.0), (1, 0.1)):
            subject[layer][1].weight.copy_(size * torch.linspace(0.9, 1.1, 16))
    widths = make_strategy("slim", {"sparsity": 0.0}).decide(task(subject, epochs=0)).widths
    assert widths[0] > 2 * widths[1]
    relative = make_strategy("bn-scale").decide(task(subject, epochs=0)).widths
    assert abs(relative[0] - relative[1]) <= 4


def test_without_epochs_the_scales_decide_as_they_are_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    subject = network()
    with caplog.at_level(logging.WARNING):
        decision = make_strategy("slim").decide(task(subject, epochs=0))
    assert "slim: without epochs" in caplog.text
    assert torch.equal(decision.scores, scales(subject))
    caplog.clear()
    make_strategy("slim").decide(task(subject))
    assert "without epochs" not in caplog.text


def test_without_epochs_nothing_of_a_training_is_asked_for() -> None:
    subject = network()
    given = task(subject, epochs=0)
    given.train_loader = iter(batches())  # no length
    decision = make_strategy("slim").decide(given)
    assert torch.equal(decision.scores, scales(subject))
    assert (decision.monitor, decision.history) == ([], [])


def test_scales_behind_a_flatten_count_by_their_mean() -> None:
    """Sixteen scales of each channel in one norm weigh as much as one would."""
    norm = nn.BatchNorm1d(8 * 16)
    body = (nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Flatten(), norm, nn.Linear(128, CLASSES))
    subject = randomised(nn.Sequential(*body), 0)
    decision = make_strategy("slim", {"sparsity": 0.0}).decide(task(subject, epochs=0))
    expected = norm.weight.detach().abs().view(8, 16).mean(1)
    assert torch.allclose(decision.scores, expected)


def test_frozen_weights_leave_the_scales_to_learn_alone() -> None:
    given = task(network(), train_weights=False)
    before = {name: value.clone() for name, value in given.network.named_parameters()}
    decided = make_strategy("slim", {"sparsity": 0.05}).decide(given).network
    changed = {n for n, value in decided.named_parameters() if not torch.equal(value, before[n])}
    assert changed == {"0.1.weight", "1.1.weight"}


def test_what_has_no_scale_is_said_before_training() -> None:
    with pytest.raises(PlanError, match="gives no score"):
        make_strategy("slim").decide(task(tiny("biased")))


def test_a_norm_without_scales_beside_one_with_them_has_no_part() -> None:
    subject = network()
    subject[0].append(nn.BatchNorm2d(16, affine=False))
    decision = make_strategy("slim").decide(task(subject))
    norms = [m.weight.detach().abs() for m in decision.network.modules() if hasattr(m, "affine")
             and m.affine]  # fmt: skip
    assert torch.equal(decision.scores, torch.cat(norms))


def test_the_penalty_cannot_be_negative() -> None:
    with pytest.raises(ConfigError, match="sparsity is -1"):
        make_strategy("slim", {"sparsity": -1.0})
