"""The torch-pruning door in real training loops: mixed precision, bad batches, compiled models."""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import same_tensors, snapshot
from networks import example, tiny
from torch import Tensor, nn
from torch_pruning_helpers import AT_ONCE, law_1, learn, macs

from wgates_plugin import trace
from wgates_plugin.efficiency import MacsModel
from wgates_plugin.errors import InfeasibleTargetError, PlanError, TrainingError
from wgates_plugin.integrations.torch_pruning import WGatesPruner
from wgates_plugin.strategies import WGatesSettings
from wgates_plugin.verification import TOLERANCE


def pruner_of(name: str = "residual", **options: Any) -> WGatesPruner:
    options = {"pruning_ratio": 0.5, "settings": AT_ONCE, **options}
    return WGatesPruner(tiny(name).train(), example(), **options)


def backward(pruner: WGatesPruner, seed: int, factor: float = 1.0, call: Any = None) -> Tensor:
    """One batch through the network and back; returns the loss."""
    labels = torch.randint(5, (8,), generator=torch.Generator().manual_seed(seed))
    logits = (call or pruner.model)(example(8, seed=seed))
    loss = nn.functional.cross_entropy(logits.float(), labels)
    pruner.model.zero_grad()
    (loss * factor).backward()
    return loss


def scores_of(pruner: WGatesPruner) -> Tensor:
    return pruner.gates.unit_scores()


def bad_batch(pruner: WGatesPruner) -> None:
    """A batch of infinite loss, which leaves weights and running statistics as they were."""
    buffers = copy.deepcopy(dict(pruner.model.named_buffers()))
    backward(pruner, 99, float("inf"))
    pruner.model.zero_grad()
    with torch.no_grad():
        for name, buffer in pruner.model.named_buffers():
            buffer.copy_(buffers[name])


# Mixed precision


@pytest.mark.parametrize("name", ["residual", "grouped", "flattened"])
def test_a_loop_under_autocast_ends_in_an_exact_removal(name: str) -> None:
    pruner = pruner_of(name)
    optimizer = torch.optim.SGD(pruner.model.parameters(), lr=0.02)
    start = scores_of(pruner)
    for seed in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = pruner.model(example(8, seed=seed))
            assert logits.dtype == torch.bfloat16
            loss = nn.functional.cross_entropy(logits, torch.arange(8) % logits.shape[1])
            loss.backward()
            monitor = pruner.regularize(pruner.model, loss)
        optimizer.step()
    assert monitor["step"] == 3.0
    assert not torch.equal(scores_of(pruner), start)
    before = copy.deepcopy(pruner.model.state_dict())
    pruner.step()
    assert law_1(pruner, tiny(name), before, example()) <= TOLERANCE


@pytest.mark.parametrize("kind", ["weights", "free"])
def test_scores_and_their_steps_are_those_of_float32(kind: str) -> None:
    """A step of 0.001 at a score of 0.3 is half of what bfloat16 can tell apart."""
    settings = WGatesSettings(learning_rate=1e-3, scores=kind, measuring=0)
    pruners = [pruner_of(settings=settings, target=3e4, pruning_ratio=None) for _ in range(2)]
    for seed in range(3):
        for pruner, mixed in zip(pruners, (False, True), strict=True):
            backward(pruner, seed)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                pruner.regularize(pruner.model)
                found = scores_of(pruner)
                assert found.dtype == torch.float32
            assert torch.equal(found, scores_of(pruner))
    assert torch.equal(*(scores_of(pruner) for pruner in pruners))


def test_limits_are_computed_without_autocast() -> None:
    """A user's model of the cost may multiply float32 matrices, which autocast would round."""
    seen: list[bool] = []

    class Cost(MacsModel):
        def __call__(self, widths: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().__call__(widths)

    pruner = pruner_of(efficiency=Cost, target=3e4, pruning_ratio=None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backward(pruner, 0)
        seen.clear()
        pruner.regularize(pruner.model)
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_are_scored_in_float32(dtype: torch.dtype) -> None:
    network = tiny("residual").to(dtype).train()
    pruner = WGatesPruner(network, example().to(dtype), pruning_ratio=0.5, settings=AT_ONCE)
    start = scores_of(pruner)
    network(example(8).to(dtype)).float().square().mean().backward()
    pruner.regularize(network)
    assert scores_of(pruner).dtype == start.dtype == torch.float32
    assert not torch.equal(scores_of(pruner), start)
    pruner.step()
    assert network[0][0].out_channels == 4


def test_gates_do_not_depend_on_the_scale_of_the_loss() -> None:
    plain, told, untold = (pruner_of(target=3e4, pruning_ratio=None) for _ in range(3))
    for seed in range(6):
        for pruner, factor, scale in (
            (plain, 1.0, 1.0),
            (told, 2.0 ** (16 - seed), 2.0 ** (16 - seed)),  # a scaler that comes down
            (untold, 2.0**16, 1.0),
        ):
            backward(pruner, seed, factor)
            pruner.regularize(pruner.model, scale=scale)
    assert torch.equal(scores_of(told), scores_of(plain))  # powers of two are exact
    assert (scores_of(untold) - scores_of(plain)).abs().max() < 0.01 * AT_ONCE.learning_rate
    plans = []
    for pruner in (plain, told, untold):
        pruner.step()
        assert pruner.plan is not None
        plans.append(pruner.plan.kept)
    assert plans[0] == plans[1] == plans[2]


def test_an_overflow_under_a_loss_scaler_steps_no_gate() -> None:
    pruner = pruner_of()
    optimizer = torch.optim.SGD(pruner.model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    steps, scales = [], []
    for seed in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = pruner.model(example(8, seed=seed)).square().mean()
        scaler.scale(loss * (1e36 if seed == 1 else 1.0)).backward()
        before = scores_of(pruner)
        scaler.unscale_(optimizer)
        monitor = pruner.regularize(pruner.model, scale=scaler.get_scale())
        assert torch.equal(scores_of(pruner), before) == (seed == 1)
        scaler.step(optimizer)
        scaler.update()
        steps.append(monitor["step"])
        scales.append(scaler.get_scale())
    assert steps == [1.0, 1.0, 2.0, 3.0]
    assert scales[0] == 2 * scales[1]  # the scaler saw it too
    assert monitor["skipped"] == 1.0
    pruner.step()


@pytest.mark.parametrize("clipped", [False, True])
def test_weights_under_a_loss_scaler_take_the_same_steps(clipped: bool) -> None:
    """With what the gates add to the weights' gradient."""
    found = []
    for scaled in (False, True):
        pruner = pruner_of()
        network, first = pruner.model, pruner.model[0][0].weight
        optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
        scaler = torch.amp.GradScaler("cpu", growth_interval=2, enabled=scaled)
        shares = []
        for seed in range(6):
            optimizer.zero_grad()
            scaler.scale(network(example(8, seed=seed)).square().mean()).backward()
            scaler.unscale_(optimizer)
            before = first.grad.clone()
            pruner.regularize(network, scale=scaler.get_scale())
            shares.append(first.grad - before)
            if clipped:
                nn.utils.clip_grad_norm_(network.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        assert shares[-1].abs().sum() > 0
        found.append({"shares": torch.stack(shares), **network.state_dict()})
    assert same_tensors(*found)  # powers of two are exact


def test_regularize_after_the_optimizers_step_is_refused() -> None:
    pruner = pruner_of()
    optimizer = torch.optim.SGD(pruner.model.parameters(), lr=0.02)
    pruner.model(example(8)).square().mean().backward()
    optimizer.step()
    with pytest.raises(
        TrainingError, match=r"between `loss.backward\(\)` and `optimizer.step\(\)`"
    ):
        pruner.regularize(pruner.model)


# Copies


def test_a_copy_of_the_network_is_plain_whenever_it_is_made() -> None:
    """As a running average or the best network so far is."""
    pruner = pruner_of()
    network = pruner.model
    copies = [copy.deepcopy(network)]
    loss = network(example(8)).square().mean()
    copies.append(copy.deepcopy(network))  # gates hold what the backward pass needs
    loss.backward()
    copies.append(copy.deepcopy(network))
    pruner.regularize(network)
    copies.append(copy.deepcopy(network))
    pruner.step()
    for twin in copies:
        plain = tiny("residual")
        plain.load_state_dict(twin.state_dict())
        assert torch.equal(twin.eval()(example()), plain.eval()(example()))
        another = WGatesPruner(twin, example(), pruning_ratio=0.5, settings=AT_ONCE)
        learn(another, twin, steps=1)
        another.step()
        assert twin[0][0].out_channels == network[0][0].out_channels


# Bad batches


@pytest.mark.parametrize("remedy", ["skipped", "discarded"])
def test_a_bad_batch_leaves_no_trace_in_the_gates(
    remedy: str, caplog: pytest.LogCaptureFixture
) -> None:
    clean, hit = (pruner_of(target=3e4, pruning_ratio=None) for _ in range(2))
    for seed in range(4):
        for pruner in (clean, hit):
            if seed == 2 and pruner is hit:
                bad_batch(pruner)
                if remedy == "discarded":
                    pruner.discard()
                else:
                    with caplog.at_level(logging.WARNING, "wgates_plugin"):
                        assert pruner.regularize(pruner.model)["skipped"] == 1.0
                    assert "not finite at gate step 2" in caplog.text
                assert pruner.gates._leaf is None
            backward(pruner, seed)
            pruner.regularize(pruner.model)
    assert hit.gates.step == clean.gates.step == 4
    assert torch.equal(scores_of(hit), scores_of(clean))
    state = hit.gates.state_dict()
    assert state["balance"] == clean.gates.balance
    assert same_tensors(hit.gates.constraint.state_dict(), clean.gates.constraint.state_dict())


def test_gates_that_never_get_a_finite_gradient_are_told() -> None:
    pruner = pruner_of("plain")
    for _ in range(99):
        bad_batch(pruner)
        pruner.regularize(pruner.model)
    bad_batch(pruner)
    with pytest.raises(TrainingError, match="100 calls in a row"):
        pruner.regularize(pruner.model)
    assert pruner.gates.skipped == 100
    with pytest.raises(PlanError, match="never learned"):
        pruner.step()


def test_weights_that_are_not_finite_decide_nothing() -> None:
    pruner = pruner_of()
    learn(pruner, pruner.model, steps=1)
    good = copy.deepcopy(pruner.model.state_dict())
    with torch.no_grad():
        pruner.model[0][0].weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"1 group\(s\) \(`0\.0`\) are not finite"):
        pruner.step()
    assert pruner.current_step == 0
    assert pruner.model[0][0].out_channels == 8
    pruner.model.load_state_dict(good)
    pruner.step()
    assert pruner.model[0][0].out_channels == 4


# What acts when


def evaluated(network: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = network.eval()(example(4))
    network.train()
    return out


def test_gates_act_from_the_first_training_pass_on() -> None:
    pruner = pruner_of(iterative_steps=2, pruning_ratio=0.8)
    network = pruner.model
    for step in range(2):
        # Neither the untouched network nor the one after a step is judged by the gates to come.
        bare = copy.deepcopy(network)
        for module in bare.modules():
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
        plain = evaluated(bare)
        assert torch.equal(evaluated(network), plain)
        with torch.no_grad():  # nor do passes that only renew statistics
            assert torch.equal(network(example(4)), bare.train()(example(4)))
        plain = evaluated(bare)
        network(example(8))
        assert not torch.equal(evaluated(network), plain)
        pruner.discard()
        assert not torch.equal(evaluated(network), plain)
        learn(pruner, network, steps=1)
        pruner.step()
        assert pruner.current_step == step + 1


@pytest.mark.parametrize("steps", [2, 1])  # measured, or in the midst of it
def test_gates_close_once_they_are_measured(steps: int) -> None:
    pruner = pruner_of(settings=replace(AT_ONCE, measuring=2, rounds=1))
    learn(pruner, pruner.model, steps=steps)
    gated = evaluated(pruner.model)
    pruner.detach()
    assert torch.equal(evaluated(pruner.model), gated) == (steps == 1)


@pytest.mark.parametrize("measuring", [2, 3])
def test_a_loop_that_only_measured_is_warned_of(measuring: int) -> None:
    """Also where the measuring was just done: no gate learned yet."""
    settings = replace(AT_ONCE, measuring=measuring)
    pruner = pruner_of(settings=settings)
    learn(pruner, pruner.model, steps=2)
    with pytest.warns(UserWarning, match=r"all 2 gate steps were spent.*Pass steps=2 ") as found:
        pruner.step()
    assert found[0].filename == __file__


@pytest.mark.parametrize("given", [{"measuring": 2}, {"measuring": 50, "steps": 3}])
def test_a_loop_that_learned_is_not_warned_of(given: dict[str, Any]) -> None:
    settings = replace(AT_ONCE, measuring=given["measuring"])
    pruner = pruner_of(settings=settings, steps=given.get("steps"))
    learn(pruner, pruner.model, steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pruner.step()


def test_gates_of_a_resumed_phase_act_at_once() -> None:
    pruner = pruner_of()
    learn(pruner, pruner.model, steps=2)
    twin = pruner_of()
    twin.load_state_dict(pruner.state_dict())
    twin.model.load_state_dict(pruner.model.state_dict())
    assert torch.equal(evaluated(twin.model), evaluated(pruner.model))
    pruner.detach()
    assert not torch.equal(evaluated(twin.model), evaluated(pruner.model))


# Compiled and parallel models


def compiled(network: nn.Module) -> Any:
    return torch.compile(network, backend="eager")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("measuring", [0, 1])
def test_a_compiled_model_learns_the_same(measuring: int) -> None:
    settings = replace(AT_ONCE, measuring=measuring)
    plain, other = (pruner_of("plain", settings=settings) for _ in range(2))
    model = compiled(other.model)
    for seed in range(3):
        backward(plain, seed)
        plain.regularize(plain.model)
        backward(other, seed, call=model)
        assert other.regularize(model)["step"] == seed + 1
    assert torch.equal(scores_of(plain), scores_of(other))
    with pytest.raises(PlanError, match="another model"):
        other.regularize(compiled(plain.model))


@pytest.mark.parametrize("layers", [(compiled,), (compiled, "module"), ("module", compiled)])
def test_wrappers_of_the_network_are_seen_through(layers: tuple[Any, ...]) -> None:
    pruner = pruner_of("plain")
    model: Any = pruner.model
    for wrap in layers:
        if wrap == "module":
            outer = nn.Module()
            outer.module = model
            model = outer
        else:
            model = wrap(model)
    backward(pruner, 0)
    assert pruner.regularize(model)["step"] == 1.0


def test_a_compiled_model_is_pruned_within_its_wrapper() -> None:
    network = tiny("plain")
    pruner = WGatesPruner(compiled(network), example(), pruning_ratio=0.5)
    assert pruner.model is network
    assert pruner.space.names == trace(tiny("plain"), example()).names
    learn(pruner, network, steps=1)
    pruner.step()
    assert network[0][0].out_channels == 4


# Several steps under limits


def closed_to(pruner: WGatesPruner, group: int, units: int) -> None:
    """As if learning had left `units` of a group and favoured all others."""
    where = pruner._now.unit_slice(group)
    with torch.no_grad():
        pruner.gates.scores.offset.fill_(0.4)
        pruner.gates.scores.offset[where] = -0.4
        pruner.gates.scores.offset[where][:units] = 0.3


def test_costs_of_the_smaller_network_are_those_of_the_network() -> None:
    """Groups that are down to one unit leave the space, and are still paid for."""
    pruner = pruner_of("concat", target=2e4, pruning_ratio=None, iterative_steps=2)
    learn(pruner, pruner.model, steps=1)
    closed_to(pruner, 0, 1)
    pruner.step()
    assert pruner.plan is not None
    assert pruner.plan.widths[0] == 1
    assert pruner.space.names[0] not in pruner._now.names
    whole = torch.tensor(pruner._now.full_widths)
    predicted = float(pruner.budget.limits[0].model(whole))
    network = copy.deepcopy(pruner.detach())
    assert predicted == macs(network)


@pytest.mark.parametrize("goal", [{"pruning_ratio": 1.0}, {"target": None}])
@pytest.mark.parametrize(
    ("limits", "least"),
    [({"floors": 5}, 5), ({"min_fraction": 0.5}, 4), ({"min_channels": 3}, 3)],
)
def test_floors_are_those_of_the_untouched_network_in_every_step(
    goal: dict[str, Any], limits: dict[str, Any], least: int
) -> None:
    first = "0.0"  # of 8 channels
    if "floors" in limits:
        limits = {"floors": {first: limits["floors"]}}
    if "target" in goal:
        space = trace(tiny("plain"), example(), **limits)
        goal = {"target": float(MacsModel(space)(torch.tensor(space.least_widths())))}
        goal["pruning_ratio"] = None
    pruner = pruner_of("plain", iterative_steps=3, **goal, **limits)
    learn(pruner, pruner.model, steps=1)
    widths = []
    for _ in range(3):
        assert pruner._now.groups[0].floor == least
        pruner.step()
        assert pruner.plan is not None
        widths.append(pruner.plan.widths[0])
    assert widths[-1] == least
    assert 8 >= widths[0] >= widths[1] >= least


def test_caps_hold_from_the_first_step_on() -> None:
    pruner = pruner_of("plain", pruning_ratio=0.1, iterative_steps=2, caps={"0.0": 5})
    learn(pruner, pruner.model, steps=1)
    for _ in range(2):
        pruner.step()
        assert pruner.plan is not None
        assert pruner.plan.widths[0] == 5
    assert pruner.plan.widths[1] == 10


def test_a_target_out_of_reach_at_the_last_step_is_told_at_once() -> None:
    network = tiny("plain").train()
    before = snapshot(network)
    with pytest.raises(InfeasibleTargetError, match="out of reach"):
        WGatesPruner(network, example(), target=100.0, iterative_steps=10)
    assert snapshot(network) == before
