"""GDP: the gate and its proximal step, absorption, polarisation under a budget, dead branches."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
from typing import Any

import pytest
import torch
import torch_pruning as tp
from helpers import ActivationGates, recount, same_tensors
from networks import TINY, Add, Head, conv, conv_bn, example, randomised, tiny
from torch import Tensor, nn

from wgates_plugin import ChannelSpace, MacsTarget, PruningSettings, prune_to_target, trace
from wgates_plugin.efficiency import Budget, Limit, MacsModel
from wgates_plugin.errors import (
    ConfigError,
    InfeasibleTargetError,
    PlanError,
    SurgeryError,
    TrainingError,
)
from wgates_plugin.integrations.torch_pruning import GDPImportance
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies import Task
from wgates_plugin.strategies.base import InMemory
from wgates_plugin.strategies.budgeting import holds
from wgates_plugin.strategies.gdp.absorption import absorb, rigid_units
from wgates_plugin.strategies.gdp.budget_pull import BudgetPull
from wgates_plugin.strategies.gdp.gates import PolarisedGates
from wgates_plugin.strategies.gdp.polarisation import (
    epsilon_at,
    smooth_l0,
    smooth_l0_slope,
    soft_threshold,
)
from wgates_plugin.strategies.gdp.settings import GDPSettings
from wgates_plugin.strategies.gdp.strategy import GDPStrategy
from wgates_plugin.surgery import rebuild, remove
from wgates_plugin.training import TrainingSettings
from wgates_plugin.verification import relative_error


def make(
    network: nn.Module,
    share: float = 0.5,
    steps: int = 20,
    min_fraction: float = 0.1,
    floors: dict[str, int] | None = None,
    **options: Any,
) -> PolarisedGates:
    network.train()
    space = trace(network, example(), min_fraction=min_fraction, floors=floors)
    model = MacsModel(space)
    full = float(model(torch.tensor(space.full_widths)))
    return PolarisedGates(
        network,
        space,
        Budget.of(Limit(model, share * full)),
        GDPSettings(**options),
        steps=steps,
        example_inputs=example(),
    ).attach()


def learn(gates: PolarisedGates, steps: int, *, first: int = 0, rate: float = 0.02) -> list[Any]:
    optimizer = torch.optim.SGD(gates.network.parameters(), lr=rate)
    records = []
    for seed in range(first, first + steps):
        labels = torch.randint(5, (8,), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        nn.functional.cross_entropy(gates.network(example(8, seed=seed)), labels).backward()
        records.append(gates.regularize())
        optimizer.step()
    return records


# The mathematics


@pytest.mark.parametrize("epsilon", [0.1, 1e-2, 1e-4])
def test_the_gate_and_its_slope(epsilon: float) -> None:
    x = torch.linspace(-1.5, 1.5, 301, dtype=torch.float64, requires_grad=True)
    gate = smooth_l0(x, epsilon)
    (slope,) = torch.autograd.grad(gate.sum(), x)
    torch.testing.assert_close(smooth_l0_slope(x.detach(), epsilon), slope)
    assert float(smooth_l0(torch.zeros(1), epsilon)) == 0.0
    torch.testing.assert_close(smooth_l0(-x, epsilon), gate)


def test_the_soft_threshold_minimises_its_objective() -> None:
    grid = torch.linspace(-2, 2, 400_001, dtype=torch.float64)
    for value in (-1.3, -0.2, 0.0, 0.3, 0.9):
        for weight in (0.0, 0.25, 1.0):
            twin = grid[((grid - value).square() / 2 + weight * grid.abs()).argmin()]
            found = soft_threshold(torch.tensor(value).double(), torch.tensor(weight).double())
            assert float(found) == pytest.approx(float(twin), abs=2e-5)


def test_epsilon_decays_geometrically_and_stays() -> None:
    values = [epsilon_at(f, start=0.1, end=1e-4, decay=0.6) for f in (0.0, 0.15, 0.3, 0.45, 0.6)]
    ratios = [second / first for first, second in itertools.pairwise(values)]
    assert ratios == pytest.approx([ratios[0]] * 4)
    assert epsilon_at(0.9, start=0.1, end=1e-4, decay=0.6) == pytest.approx(1e-4)


def test_settings_list_every_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        GDPSettings(epsilon_end=0.2, settle_fraction=0.3, travel=0.0, grid=0)
    assert len(caught.value.problems) == 4


# Absorption


@pytest.mark.parametrize("name", TINY)
def test_absorbed_and_cut_equals_multiplied_feature_maps(name: str) -> None:
    network = tiny(name)
    space = trace(network, example())
    generator = torch.Generator().manual_seed(3)
    gates = torch.rand(space.total_units, generator=generator)
    gates[torch.rand(space.total_units, generator=generator) < 0.4] = 0.0
    for index in range(len(space.groups)):
        gates[space.offsets[index]] = 0.3  # a small gate is no closed one
    with torch.no_grad():
        with ActivationGates(network, space, lambda: gates):
            expected = network(example())
        plan = PruningPlan.from_masks(space, gates > 0)
        smaller = remove(absorb(copy.deepcopy(network), space, gates), plan, example()).eval()
        assert relative_error(smaller(example()), expected) <= 1e-5
    assert not rigid_units(network, space).any()


# The phase


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "concat", "grouped"])
@pytest.mark.parametrize("grid", [1, 4])
def test_the_phase_ends_within_the_budget_and_absorbs_exactly(name: str, grid: int) -> None:
    gates = make(tiny(name), share=0.6, grid=grid)
    records = learn(gates, 20)
    assert records[-1]["violation"] <= 0
    assert holds(gates.budget, gates.widths())
    allowed = gates.space.allowed_widths(grid)
    assert all(width in mine for width, mine in zip(gates.widths(), allowed, strict=True))
    network = gates.network.eval()
    with torch.no_grad():
        expected = network(example()).clone()
        scores = gates.unit_scores()
        gates.absorb()
        assert torch.equal(network(example()), expected)
        plan = PruningPlan.top(gates.space, scores, gates.widths())
        smaller = remove(copy.deepcopy(network), plan, example()).eval()
        assert relative_error(smaller(example()), expected) <= 1e-5
    # What is cut are exact zeros, and nothing but those and what a floor asks for stays closed.
    assert not scores[~plan.mask].any()
    dead = gates.facts["closed_branches"]
    for index, group in enumerate(gates.space.groups):
        mine = scores[gates.space.unit_slice(index)]
        count = 0 if group.name in dead else gates.widths()[index] // group.ties
        assert int((mine > 0).sum()) == count


def test_gates_close_by_proximal_steps_before_they_are_settled() -> None:
    gates = make(tiny("residual"), steps=200)
    records = learn(gates, 160, rate=0.005)
    assert records[-2]["open_share"] < 0.9
    assert gates.facts["closed"] > gates.facts["closed_by_the_budget_alone"]
    learn(gates, 40, first=160)
    closed = gates.x == 0
    assert int(closed.sum()) == gates.facts["closed"]


class Told(nn.Module):
    """The answer is in channels 0 and 1 of the inner layer; the others carry noise."""

    def __init__(self) -> None:
        super().__init__()
        self.read = conv(3, 8, 1)
        self.fc = nn.Linear(8, 5)
        with torch.no_grad():
            self.fc.weight.mul_(0.05)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.read(x).mean((2, 3)))
        return out


def test_channels_that_the_task_needs_stay() -> None:
    torch.manual_seed(0)
    network = Told()
    gates = make(network, share=0.26, steps=120)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        network.fc.weight[:, 2:] *= 0.1
        network.fc.weight[:, :2] = 3 * torch.randn(5, 2, generator=generator)
    target = copy.deepcopy(network)
    gates.detach()
    target = copy.deepcopy(network).eval()
    gates.attach()
    for seed in range(120):
        x = 4 * example(8, seed=seed)
        with torch.no_grad():
            wanted = target(x)
        (network(x) - wanted).square().mean().backward()
        gates.regularize()
        network.zero_grad()
    assert gates.widths() == (2,)
    assert set(gates.unit_scores().nonzero().flatten().tolist()) == {0, 1}


def test_needless_training_state_is_refused() -> None:
    gates = make(tiny("plain"))
    with pytest.raises(TrainingError, match="no gradient reached"):
        gates.regularize()
    with pytest.raises(InfeasibleTargetError, match="out of reach"):
        make(tiny("plain"), share=0.01)


def backward(gates: PolarisedGates, seed: int, factor: float = 1.0) -> None:
    """One batch and its gradient; weights and running statistics stay."""
    buffers = copy.deepcopy(dict(gates.network.named_buffers()))
    (gates.network(example(8, seed=seed)).square().mean() * factor).backward()
    gates.network.zero_grad()
    with torch.no_grad():
        for name, buffer in gates.network.named_buffers():
            buffer.copy_(buffers[name])


@pytest.mark.parametrize("remedy", ["skipped", "discarded"])
def test_a_bad_batch_leaves_no_trace_in_the_gates(remedy: str) -> None:
    clean, hit = make(tiny("residual")), make(tiny("residual"))
    for seed in range(6):
        for gates in (clean, hit):
            if seed in (0, 3) and gates is hit:
                backward(gates, 99, float("inf"))
                if remedy == "discarded":
                    gates.discard()
                else:
                    gates.regularize()
            backward(gates, seed)
            record = gates.regularize()
    assert (hit.step, record["skipped"]) == (clean.step, 2.0 if remedy == "skipped" else 0.0)
    assert torch.equal(hit.x, clean.x)
    assert same_tensors(hit.constraint.state_dict(), clean.constraint.state_dict())


def test_gates_that_never_get_a_finite_gradient_are_told() -> None:
    gates = make(tiny("plain"))
    for _ in range(99):
        backward(gates, 0, float("nan"))
        gates.regularize()
    backward(gates, 0, float("nan"))
    with pytest.raises(TrainingError, match="100 calls in a row"):
        gates.regularize()
    assert (gates.step, gates.skipped) == (0, 100)


def test_gates_do_not_depend_on_the_scale_of_the_loss() -> None:
    plain, told = make(tiny("residual"), steps=6), make(tiny("residual"), steps=6)
    for seed in range(6):
        scale = 2.0 ** (16 - seed)  # a scaler that comes down
        backward(plain, seed)
        plain.regularize()
        backward(told, seed, scale)
        told.regularize(scale=scale)
    assert torch.equal(told.x, plain.x)  # powers of two are exact


def test_gates_are_absorbed_once() -> None:
    gates = make(tiny("residual"))
    learn(gates, 20)
    once = copy.deepcopy(gates.absorb().state_dict())
    assert same_tensors(gates.absorb().state_dict(), once)


def test_frozen_readers_keep_their_weights_for_the_channels_that_stay() -> None:
    network = tiny("residual")
    reader = network.get_submodule("1.main.1")  # reads the branch's inner group
    before = reader.weight.clone()
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.requires_grad_(False)
    gates = make(network, share=0.4, remove_branches=False)
    inner = gates.space.unit_slice(gates.space.names.index("1.main.0.0"))
    assert rigid_units(network, gates.space).all()
    learn(gates, 20)
    with torch.no_grad():
        expected = network.eval()(example()).clone()
        gates.absorb()
        assert relative_error(network(example()), expected) <= 1e-6
    opened = gates.unit_scores()[inner] > 0
    assert 0 < int(opened.sum()) < len(opened)
    assert torch.equal(reader.weight[:, opened], before[:, opened])
    # What stays is what the task would miss most, not what comes first.
    fisher = gates.gradient.fisher[inner]
    assert fisher[opened].min() >= fisher[~opened].max()


def test_a_phase_cut_short_is_settled_before_it_is_absorbed(monkeypatch: Any) -> None:
    network = tiny("residual")
    space = trace(network, example())
    model = MacsModel(space)
    limit = Limit(model, 0.5 * float(model(torch.tensor(space.full_widths))))
    data = [(example(8, seed=seed), torch.arange(8) % 5) for seed in range(4)]
    task = Task(
        network,
        space,
        Budget.of(limit),
        example(),
        data,
        epochs=1,
        training=TrainingSettings(accelerator="cpu"),
        progress=False,
    )
    monkeypatch.setattr(Task, "steps", 40)
    decision = GDPStrategy().decide(task)
    assert decision.facts["absorption_error"] <= 1e-5
    monkeypatch.setattr(PolarisedGates, "absorb", PolarisedGates.detach)
    with pytest.raises(SurgeryError, match="absorbed into the weights the outputs differ by"):
        GDPStrategy().decide(task)


def test_constant_example_inputs_do_not_blind_the_checks(monkeypatch: Any) -> None:
    """Without biases in its convolutions, a network answers zeros by its last bias alone."""
    torch.manual_seed(0)
    network = nn.Sequential(conv(3, 12), nn.ReLU(), conv(12, 12), nn.ReLU(), Head(12))
    space = trace(network, example())
    model = MacsModel(space)
    limit = Limit(model, 0.5 * float(model(torch.tensor(space.full_widths))))
    task = Task(
        network,
        space,
        Budget.of(limit),
        torch.zeros(2, 3, 8, 8),
        [(example(8, seed=seed), torch.arange(8) % 5) for seed in range(4)],
        epochs=1,
        training=TrainingSettings(learning_rate=0.01, accelerator="cpu"),
        progress=False,
    )
    monkeypatch.setattr(Task, "steps", 40)
    assert GDPStrategy().decide(task).facts["output_change_at_settling"] > 0
    monkeypatch.setattr(PolarisedGates, "absorb", PolarisedGates.detach)
    task = dataclasses.replace(task, checkpoints=InMemory())
    with pytest.raises(SurgeryError, match="absorbed into the weights the outputs differ by"):
        GDPStrategy().decide(task)


def test_state_resumes_in_the_middle() -> None:
    whole = make(tiny("residual"))
    learn(whole, 20)
    first = make(tiny("residual"))
    learn(first, 9)
    state = copy.deepcopy((first.network.state_dict(), first.state_dict()))
    second = make(tiny("residual"))
    second.network.load_state_dict(state[0])
    second.load_state_dict(state[1])
    learn(second, 11, first=9)
    assert torch.equal(second.x, whole.x)
    assert second.widths() == whole.widths()


# Branches


def branchy() -> nn.Module:
    """A residual network with one branch that costs much and does nothing but noise."""
    torch.manual_seed(0)
    main = nn.Sequential(conv_bn(8, 24), conv(24, 8), nn.BatchNorm2d(8))
    network = randomised(nn.Sequential(conv_bn(3, 8), Add(main), Head(8)), 0)
    with torch.no_grad():
        main[2].weight.mul_(1e-3)
    return network


def test_a_branch_may_close_altogether_and_a_stem_may_not() -> None:
    gates = make(branchy(), share=0.2, min_fraction=0.0, steps=60)
    learn(gates, 60, rate=0.001)
    inner = next(name for name in gates.space.names if name.startswith("1.main.0"))
    assert gates.facts["closed_branches"] == [inner]
    kept = make(branchy(), share=0.2, min_fraction=0.0, steps=60, remove_branches=False)
    learn(kept, 60, rate=0.001)
    assert kept.facts["closed_branches"] == []
    for index in range(len(kept.space.groups)):
        assert bool(kept.unit_scores()[kept.space.unit_slice(index)].any())


@pytest.mark.parametrize("steps", [2, 5])
def test_branches_that_close_together_open_again_while_there_is_room(
    steps: int, monkeypatch: Any
) -> None:
    torch.manual_seed(0)
    blocks = [
        Add(nn.Sequential(conv_bn(16, 16), conv(16, 16), nn.BatchNorm2d(16))) for _ in range(5)
    ]
    network = randomised(nn.Sequential(conv_bn(3, 16), *blocks, Head(16)), 0)
    gates = make(network, min_fraction=0.05, steps=steps)
    together, seen = gates.branches.together, []
    monkeypatch.setattr(
        gates.branches,
        "together",
        lambda *told: seen.append(list(gates.branches.closed)) or together(*told),
    )
    learn(gates, steps)
    (closed,) = seen
    assert len(closed) == 5
    model, target = gates.budget.limits[0].model, gates.budget.limits[0].target
    cost = float(model(torch.tensor(gates.widths(), dtype=torch.float64)))
    assert 0.9 * target < cost <= target
    left = [gates.space.names.index(name) for name in gates.facts["closed_branches"]]
    assert 1 <= len(left) < len(closed)
    # What opens again is what the task would miss most, of branches and within them.
    missed = {g: gates.gradient.fisher[gates.space.unit_slice(g)] for g in closed}
    opened = [g for g in closed if g not in left]
    for g in opened:
        assert float(missed[g].sum()) >= max(float(missed[other].sum()) for other in left)
        stays = gates.x[gates.space.unit_slice(g)] != 0
        if not stays.all():
            assert missed[g][stays].min() >= missed[g][~stays].max()


def test_a_branch_that_leaves_much_room_by_itself_is_told(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        learn(make(branchy(), share=0.2, min_fraction=0.0, steps=60), 60, rate=0.001)
    assert "closed altogether, which leaves" in caplog.text
    assert "`remove_branches`" in caplog.text
    caplog.clear()
    learn(make(branchy(), share=0.4, floors={"1.main.0.0": 4}, steps=60), 60, rate=0.001)
    assert caplog.text == ""


def test_what_a_closed_branch_leaves_is_measured_before_the_rest_is_trained() -> None:
    gates = make(branchy(), share=0.2, min_fraction=0.0, steps=60)
    asked = []

    def settle(scores: Tensor, widths: Any) -> tuple[tuple[int, ...], Budget]:
        asked.append(tuple(widths))
        return tuple(width + 1 for width in widths), gates.budget

    gates._measured = settle
    learn(gates, 48, rate=0.001)
    (before,) = asked
    (dead,) = (gates.space.names.index(name) for name in gates.facts["closed_branches"])
    least = gates.space.least_widths(1)[dead]
    assert before[dead] == least
    assert gates.widths() == tuple(
        least if index == dead else width + 1 for index, width in enumerate(before)
    )
    assert not gates.unit_scores()[gates.space.unit_slice(dead)].any()


@pytest.mark.parametrize("remove_branches", [False, True])
def test_a_group_at_its_least_width_is_pulled_only_if_all_of_it_may_close(
    remove_branches: bool,
) -> None:
    gates = make(branchy(), share=0.9, min_fraction=0.5, remove_branches=remove_branches)
    for index, group in enumerate(gates.space.groups):
        gates.x[gates.space.unit_slice(index)][group.units // 2 :] = 0.0
    assert gates.widths() == gates.space.least_widths(1)
    budget = Budget.of(*(dataclasses.replace(one, target=1.0) for one in gates.budget.limits))
    steps = gates.settings.decay_fraction * gates.steps
    assert gates.pull._steps == steps
    assert not gates.pull._rigid.any()
    rigid = gates.pull._rigid
    pull = BudgetPull(gates.space, budget, gates.constraint, rigid, grid=1, steps=steps)

    def asked() -> Tensor:
        return pull(
            gates.x,
            gates.unit_scores(),
            epsilon=gates.epsilon,
            step=gates.steps,
            may_close=gates.branches.may_close(),
        )

    gates.step = gates.steps
    assert bool((asked() > 0).any()) is remove_branches
    gates.x[:] = 1.0
    assert (asked() > 0).all()


def test_a_floor_of_its_own_keeps_a_branch() -> None:
    network = branchy()
    (inner,) = (n for n in trace(network, example()).names if n.startswith("1.main.0"))
    gates = make(network, share=0.4, min_fraction=0.0, floors={inner: 4}, steps=60)
    learn(gates, 60, rate=0.001)
    assert gates.facts["closed_branches"] == []
    assert gates.widths()[gates.space.names.index(inner)] >= 4


def test_the_whole_job_drops_the_branch(tmp_path: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [
        (example(8, seed=seed), torch.randint(5, (8,), generator=generator)) for seed in range(10)
    ]
    result = prune_to_target(
        branchy(),
        example(),
        data,
        data,
        target=MacsTarget(fraction=0.2),
        settings=PruningSettings(
            strategy="gdp",
            gate_epochs=6,
            fine_tune_epochs=1,
            measure_seconds=0.01,
            training=TrainingSettings(learning_rate=0.001, accelerator="cpu"),
        ),
        run_folder=tmp_path / "run",
        progress=False,
    )
    assert result.held
    (step,) = result.plan.note["after"]
    assert step["chain"] == ["1.main.1", "1.main.2"]
    assert type(result.network.get_submodule("1.main.0.0")).__name__ == "Hollow"
    again = rebuild(
        branchy(), result.run_folder / "plan.json", result.run_folder / "pruned.safetensors"
    )
    assert torch.equal(again(example()), result.network(example()))
    final = result.report["final"]
    assert (final["macs"], final["parameters"]) == recount(result.network, example())


# torch-pruning


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
@pytest.mark.parametrize("name", ["residual", "depthwise", "concat"])
def test_gate_values_serve_any_torch_pruning_pruner(name: str, scope: str) -> None:
    gates = make(tiny(name), remove_branches=False)
    learn(gates, 20)
    network = gates.absorb()
    words: dict[str, Any] = {
        "local": {},
        "global": {"global_pruning": True, "max_pruning_ratio": 0.9},
        "isomorphic": {"global_pruning": True, "isomorphic": True, "max_pruning_ratio": 0.9},
    }[scope]
    pruner = tp.pruner.BasePruner(
        network,
        (example(),),
        GDPImportance(gates),
        pruning_ratio=0.4,
        ignored_layers=[m for m in network.modules() if isinstance(m, nn.Linear)],
        in_channel_groups={},
        out_channel_groups={},
        **words,
    )
    before = sum(p.numel() for p in network.parameters())
    pruner.step()
    assert sum(p.numel() for p in network.parameters()) < before
    network.eval()(example())


def test_scores_by_root_index_and_who_may_ask() -> None:
    network = tiny("residual")
    gates = make(network)
    with pytest.raises(PlanError, match="never learned"):
        GDPImportance(gates)
    with pytest.raises(PlanError, match="got Sequential"):
        GDPImportance(network)  # type: ignore[arg-type]
    learn(gates, 20)
    gates.absorb()
    graph = tp.DependencyGraph().build_dependency(network, (example(),))
    group = graph.get_pruning_group(network[1].main[1], tp.prune_conv_out_channels, [6, 2, 5])
    found = GDPImportance(gates)(group)
    assert found is not None
    space: ChannelSpace = gates.space
    expected = gates.unit_scores()[space.unit_slice(0)][[6, 2, 5]]
    torch.testing.assert_close(found, expected)
