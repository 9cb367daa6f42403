"""Ratios over several groups: the torch-pruning door takes channels from where they do least."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from networks import conv_bn
from torch import Tensor, nn

from wgates_plugin.integrations.torch_pruning import WGatesImportance, WGatesPruner
from wgates_plugin.strategies import WGatesSettings

SCOPES: dict[str, dict[str, Any]] = {
    "local": {},
    "global": {"global_pruning": True},
    "isomorphic": {"isomorphic": True},
}


def lopsided() -> nn.Sequential:
    """Three layers of one structure and 32 channels each; 24 of the middle one's do nothing."""
    torch.manual_seed(0)
    layers = [conv_bn(3, 32), conv_bn(32, 32), conv_bn(32, 32)]
    with torch.no_grad():
        for layer, dead in zip(layers, (0, 24, 0), strict=True):
            nn.init.uniform_(layer[1].weight, 0.5, 1.0)
            layer[1].bias.zero_()
            layer[1].weight[:dead] = 0.0
    head = nn.Conv2d(32, 4, 1)
    return nn.Sequential(*layers, head, nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()


def images(seed: int) -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def learn(pruner: WGatesPruner, steps: int = 8, start: int = 0) -> None:
    optimizer = torch.optim.SGD(pruner.model.parameters(), lr=0.01)
    for seed in range(start, start + steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(pruner.model(images(seed)), torch.arange(16) % 4)
        loss.backward()
        pruner.regularize(pruner.model)
        optimizer.step()


def pruner_of(scope: str, *, ranked: bool = False, **words: Any) -> WGatesPruner:
    importance = tp.importance.BNScaleImportance() if ranked else None
    words = {"pruning_ratio": 0.25, "steps": 8, **SCOPES[scope], **words}
    return WGatesPruner(lopsided(), images(0), importance, **words)


def is_right(widths: tuple[int, ...], scope: str) -> bool:
    aims = (24, 24, 24) if scope == "local" else (32, 8, 32)
    return all(abs(width - aim) <= 1 for width, aim in zip(widths, aims, strict=True))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("ranked", [False, True], ids=["measured", "importance"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("between", [0, 8])
def test_channels_go_where_they_do_nothing(
    scope: str, ranked: bool, steps: int, between: int
) -> None:
    pruner = pruner_of(scope, ranked=ranked, iterative_steps=steps)
    learn(pruner)
    for step in range(steps):
        if step:
            learn(pruner, between)  # 0: straight on, with what is known from the step before
        pruner.step()
    assert pruner.plan is not None
    assert is_right(pruner.plan.widths, scope)


def test_what_closes_in_a_round_is_what_does_nothing() -> None:
    pruner = pruner_of("global", settings=WGatesSettings(measuring=4, rounds=2))
    learn(pruner, 3)
    opened = pruner.gates.starting.opened()
    assert [int(part.sum()) for part in opened.split(32)] == [32, 20, 32]


def test_filter_norms_leave_all_groups_equally_wide() -> None:
    pruner = pruner_of("global", settings=WGatesSettings(measuring=0))
    assert pruner.gates.widths() == (24, 24, 24)


@pytest.mark.parametrize("ranked", [False, True], ids=["measured", "importance"])
@pytest.mark.parametrize("stop", ["measuring", "between"])
def test_a_resumed_pruner_takes_channels_from_the_same_groups(ranked: bool, stop: str) -> None:
    whole = pruner_of("global", ranked=ranked, iterative_steps=2)
    learn(whole, 3 if stop == "measuring" else 8)
    if stop == "between":
        whole.step()
    resumed = pruner_of("global", ranked=ranked, iterative_steps=2)
    resumed.load_state_dict(whole.state_dict())
    resumed.model.load_state_dict(whole.model.state_dict())
    plans = []
    for pruner in (whole, resumed):
        if stop == "measuring":
            learn(pruner, 5, start=3)
            pruner.step()
        pruner.step()
        assert pruner.plan is not None
        plans.append(pruner.plan.kept)
    assert plans[0] == plans[1]


@pytest.mark.parametrize("scope", SCOPES)
def test_soft_scores_know_the_scope_that_they_were_learned_in(scope: str) -> None:
    learner = pruner_of(scope)
    learn(learner)
    importance = WGatesImportance(learner)
    network: Any = learner.detach()
    words = {"global_pruning": scope != "local", "isomorphic": scope == "isomorphic"}
    theirs = tp.pruner.BasePruner(
        network,
        (images(0),),
        importance,
        pruning_ratio=0.25,
        ignored_layers=[network[3]],
        in_channel_groups={},
        out_channel_groups={},
        **words,
    )
    theirs.step()
    assert is_right(tuple(network[layer][0].out_channels for layer in range(3)), scope)
