"""The laws of the design, over one case table of networks."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import random_plan, recount, same_tensors, snapshot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as draw
from networks import (
    TINY,
    TORCHVISION,
    Add,
    Concat,
    Head,
    bottleneck,
    conv,
    conv_bn,
    example,
    inverted,
    randomised,
    tiny,
    torchvision_network,
)
from torch import nn

from wgates_plugin import ChannelSpace, PruningPlan, trace
from wgates_plugin.calling import batch_length, left_as_found
from wgates_plugin.efficiency import Budget, Limit, MacsModel, ParametersModel
from wgates_plugin.errors import InfeasibleTargetError, PlanError, TraceError
from wgates_plugin.files import save_tensors
from wgates_plugin.gating import Gating
from wgates_plugin.strategies import WGates, WGatesSettings, plan_for_budget
from wgates_plugin.surgery import rebuild, removals, remove, resize
from wgates_plugin.verification import TOLERANCE, masked_output, relative_error, removal_error

SLOW_TO_TRACE = ("densenet121", "vgg16_bn")


@cache
def _traced(name: str) -> tuple[nn.Module, ChannelSpace]:
    network = tiny(name)
    return network, trace(network, example())


def largest_law_1_error(
    network: nn.Module, space: ChannelSpace, inputs: torch.Tensor, plans: int
) -> float:
    """The worst relative error of removal and resize against the gated network."""
    with torch.no_grad():
        dense = network(inputs)
    worst = 0.0
    for seed in range(plans):
        plan = random_plan(space, seed)
        removed, resized = (
            remove(copy.deepcopy(network), plan, inputs),
            resize(network, space, plan),
        )
        assert same_tensors(removed.state_dict(), resized.state_dict())
        gated = masked_output(network, plan, inputs)
        assert relative_error(dense, gated) > 1e-3, "the plan changed nothing: no test at all"
        for smaller in (removed, resized):
            worst = max(worst, removal_error(network, smaller, plan, inputs))
    return worst


def assert_counts_are_exact(
    network: nn.Module, space: ChannelSpace, inputs: torch.Tensor, plans: int
) -> None:
    macs_of, parameters_of = MacsModel(space), ParametersModel(space)
    for seed in range(plans):
        plan = random_plan(space, seed)
        widths = torch.tensor(plan.widths)
        macs, parameters = recount(resize(network, space, plan), inputs)
        assert round(float(macs_of(widths)), 2) == macs
        assert round(float(parameters_of(widths)), 2) == parameters


@pytest.mark.parametrize("name", TINY)
def test_masked_equals_removed(name: str) -> None:
    network, space = _traced(name)
    assert largest_law_1_error(network, space, example(), plans=5) <= TOLERANCE


class Ghost(nn.Module):
    """Half of the outputs are cheap copies of the other half (GhostNet)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.primary = conv_bn(inputs, outputs // 2, 1)
        self.cheap = conv_bn(outputs // 2, outputs // 2, groups=outputs // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.primary(x)
        return torch.cat([first, self.cheap(first)], 1)


class Decoder(nn.Module):
    """Fine and coarse features concatenated, then read by a separable convolution (DeepLabV3+)."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = conv_bn(3, 8), conv_bn(3, 14, stride=2)
        self.read = nn.Sequential(conv_bn(22, 22, groups=22), conv_bn(22, 10, 1))
        self.out = conv(10, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        upsampled = nn.functional.interpolate(self.coarse(x), scale_factor=2.0)
        found: torch.Tensor = self.out(self.read(torch.cat([self.fine(x), upsampled], 1)))
        return found


class ConcatenatedSum(nn.Module):
    """`cat(a, b) + c`: the wide layer shares its channels with both narrow ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(3, 8), conv_bn(3, 6), conv_bn(3, 14)
        self.head = nn.Sequential(conv_bn(14, 7), Head(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(torch.cat([self.a(x), self.b(x)], 1) + self.c(x))
        return found


def ghost() -> nn.Module:
    layers = (conv_bn(3, 8), Ghost(8, 24), conv_bn(24, 24, groups=24, stride=2), Ghost(24, 16))
    return nn.Sequential(*layers, Head(16))


CONCATENATED = {
    "ghost": (ghost, ("0.0", "1.primary.0", "3.primary.0")),
    "separable decoder": (Decoder, ("fine.0", "coarse.0", "read.1.0")),
    "sum with a concatenation": (ConcatenatedSum, ("a.0", "b.0", "head.0.0")),
}


@pytest.mark.parametrize("case", CONCATENATED)
def test_what_is_concatenated_keeps_its_own_groups(case: str) -> None:
    """Whatever follows the concatenation: a depthwise convolution, or a sum with a wider layer."""
    make, names = CONCATENATED[case]
    torch.manual_seed(0)
    network = randomised(make(), 0)
    space = trace(network, example())
    assert space.names == names
    assert largest_law_1_error(network, space, example(), plans=5) <= TOLERANCE
    assert_counts_are_exact(network, space, example(), plans=3)


@pytest.mark.parametrize("name", TINY)
def test_counts_equal_a_recount_after_removal(name: str) -> None:
    assert_counts_are_exact(*_traced(name), example(), plans=3)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks_keep_the_laws(name: str) -> None:
    network, inputs = torchvision_network(name), example(1, 64)
    space = trace(network, inputs, verify=False)
    plans = 1 if name in SLOW_TO_TRACE else 2
    assert largest_law_1_error(network, space, inputs, plans) <= TOLERANCE
    assert_counts_are_exact(network, space, inputs, plans)


@draw.composite
def small_networks(choose: draw.DrawFn) -> nn.Module:
    """A stem, one to three blocks of any kind, and a head on features or on a 2x2 map."""
    torch.manual_seed(0)
    width = 2 * choose(draw.integers(1, 4))
    layers: list[nn.Module] = [conv_bn(3, width, stride=choose(draw.sampled_from([1, 2])))]
    for kind in choose(draw.lists(draw.sampled_from(sorted(BLOCKS)), min_size=1, max_size=3)):
        block, width = BLOCKS[kind](width, choose(draw.integers(1, 4)))
        layers.append(block)
    if choose(draw.booleans()):
        # torch-pruning loses a concatenation that runs straight into a flatten, hence the norm.
        layers += [nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        layers += [nn.Linear(4 * width, 3)]
    else:
        layers.append(Head(width))
    return randomised(nn.Sequential(*layers), seed=choose(draw.integers(0, 99)))


BLOCKS = {
    "plain": lambda w, n: (conv_bn(w, 2 * n, n), 2 * n),
    "residual": lambda w, n: (Add(conv_bn(w, w)), w),
    "projection": lambda w, n: (Add(conv_bn(w, 2 * n), conv_bn(w, 2 * n, 1)), 2 * n),
    "depthwise": lambda w, n: (Add(inverted(w, 2 * n + 1)), w),
    "grouped": lambda w, n: (Add(bottleneck(w, 3 * n, n)), w),
    "grouped-whole": lambda w, n: (conv_bn(w, 4 * n, groups=2), 4 * n),
    "concat": lambda w, n: (Concat(conv_bn(w, n), conv_bn(w + n, n)), w + 2 * n),
}


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(network=small_networks(), seed=draw.integers(0, 2**16), batch=draw.integers(1, 2))
def test_masked_equals_removed_on_drawn_networks(network: nn.Module, seed: int, batch: int) -> None:
    inputs = example(batch)
    try:
        space = trace(network, inputs)
    except TraceError as error:
        assert "no prunable channel group" in str(error)  # noqa: PT017 - the one honest refusal
        return
    plan = random_plan(space, seed)
    removed, resized = remove(copy.deepcopy(network), plan, inputs), resize(network, space, plan)
    assert same_tensors(removed.state_dict(), resized.state_dict())
    assert removal_error(network, removed, plan, inputs) <= TOLERANCE
    assert removal_error(network, resized, plan, inputs) <= TOLERANCE
    widths = torch.tensor(plan.widths)
    macs, parameters = recount(removed, inputs)
    assert float(MacsModel(space)(widths)) == pytest.approx(macs, abs=1e-3)
    assert float(ParametersModel(space)(widths)) == pytest.approx(parameters, abs=1e-3)


@pytest.mark.parametrize(("name", "ties"), [("grouped", 3), ("grouped-two-ways", 4)])
def test_grouped_convolutions_keep_the_same_channels_in_each_conv_group(
    name: str, ties: int
) -> None:
    network, space = _traced(name)
    assert max(group.ties for group in space.groups) == ties
    plan = random_plan(space, 3)
    for index, group in enumerate(space.groups):
        gone = set(plan.removed_channels(index))
        part = group.channels // group.ties
        parts = [{c - k * part for c in gone if c // part == k} for k in range(group.ties)]
        assert all(each == parts[0] for each in parts)
    smaller = resize(network, space, plan)
    groups = [m.groups for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert [m.groups for m in smaller.modules() if isinstance(m, nn.Conv2d)] == groups


def test_coupled_layers_share_one_gate() -> None:
    _, space = _traced("projection")
    shared = space.group("1.main.1")
    assert {slot.module for slot in shared.slots_as("producer")} == {"1.main.1", "1.shortcut.0"}
    assert {slot.module for slot in shared.slots_as("passenger")} == {"1.main.2", "1.shortcut.1"}
    assert {slot.module for slot in shared.slots_as("consumer")} == {"2.fc"}


@pytest.mark.parametrize("grid", [1, 4])
@pytest.mark.parametrize("name", ["plain", "grouped", "concat", "depthwise"])
def test_no_group_falls_under_its_floor(name: str, grid: int) -> None:
    network = tiny(name)
    space = trace(network, example(), min_channels=2, min_fraction=0.3)
    model = MacsModel(space)
    least = float(model(torch.tensor(space.least_widths(grid))))
    budget = Budget.of(Limit(model, least * 1.0001))
    scores = torch.randn(space.total_units)
    plan = plan_for_budget(space, scores, space.full_widths, budget, grid)
    for group, width in zip(space.groups, plan.widths, strict=True):
        assert width >= group.floor >= min(group.channels, max(2, 0.3 * group.channels))
    with pytest.raises(PlanError, match="its floor is"):
        PruningPlan.from_masks(space, torch.zeros(space.total_units))


def test_an_infeasible_target_names_the_least_cost_before_training() -> None:
    network = tiny("plain")
    space = trace(network, example(), min_channels=4)
    model = MacsModel(space)
    least = float(model(torch.tensor([4, 4])))
    before = snapshot(network)
    with pytest.raises(InfeasibleTargetError, match=rf"still cost {least:.6g}"):
        WGates(network, space, Budget.of(Limit(model, 0.9 * least)))
    assert snapshot(network) == before


def _half_frozen(name: str) -> nn.Module:
    """A network in the middle of its owner's work: mixed modes, frozen layers, a foreign hook."""
    network = tiny(name).train()
    for index, module in enumerate(network.modules()):
        module.training = index % 2 == 0
    for index, parameter in enumerate(network.parameters()):
        parameter.requires_grad_(index % 3 != 0)
    network.register_forward_hook(lambda *_: None)
    return network


@pytest.mark.parametrize("name", TINY)
def test_tracing_leaves_the_network_as_found(name: str) -> None:
    network = _half_frozen(name)
    before, state = snapshot(network), torch.get_rng_state()
    space = trace(network, example())
    resize(network, space, space.least_widths())
    assert snapshot(network) == before
    assert torch.equal(torch.get_rng_state(), state)


class Noise(nn.Module):
    """Draws random numbers in eval mode too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.0 * torch.rand_like(x)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
)
def test_tracing_leaves_the_random_state_of_a_noisy_network(device: str) -> None:
    network, inputs = nn.Sequential(Noise(), tiny("plain")).to(device), example().to(device)
    state_of = torch.get_rng_state if device == "cpu" else torch.cuda.get_rng_state
    state = state_of()
    space = trace(network, inputs)
    masked_output(network, random_plan(space, 0), inputs)
    assert torch.equal(state_of(), state)


class Remembering(nn.Module):
    """Keeps what it has seen, as for a map of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = None
        self.register_buffer("last", None)
        self.net = tiny("plain")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.net[0](x)
        self.last = self.maps = self.seen.mean(1)
        out: torch.Tensor = self.net(x)
        return out


def test_tracing_leaves_no_activation_on_the_network() -> None:
    """A tensor with a gradient's history cannot be copied, nor can a module that holds one."""
    network = Remembering()
    before = snapshot(network)
    trace(network, example())
    assert snapshot(network) == before
    copy.deepcopy(network)


def test_a_network_that_is_cast_meanwhile_stays_in_one_piece() -> None:
    """As by `model.to(device)` at the head of a training function that is run for its first batch."""
    network = tiny("plain")
    with left_as_found(network):
        network.double()
    assert {t.dtype for t in network.state_dict().values() if t.is_floating_point()} == {
        torch.float64
    }


def test_the_batch_is_told_by_inputs_that_agree() -> None:
    assert (
        batch_length((torch.zeros(8, 3), {"mask": torch.zeros(8, 1), "scale": torch.tensor(2.0)}))
        == 8
    )
    assert batch_length((torch.zeros(1), torch.zeros(8, 3))) is None
    assert batch_length(torch.zeros(4, 3)) == 4


def test_tracing_leaves_the_network_as_found_when_it_fails() -> None:
    network = _half_frozen("plain")
    before, state = snapshot(network), torch.get_rng_state()
    with pytest.raises(TraceError):
        trace(network, torch.zeros(1, 4, 8, 8))
    with pytest.raises(TraceError):
        trace(network, example(), floors={"nowhere": 2})
    assert snapshot(network) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["residual", "grouped", "flattened", "transposed"])
def test_no_trace_remains_after_detach(name: str) -> None:
    network = _half_frozen(name)
    space = trace(network, example())
    before, state = snapshot(network), torch.get_rng_state()
    budget = Budget.of(Limit(MacsModel(space), 1e9))
    gates = WGates(network, space, budget).attach()
    names = [n for n, _ in network.named_parameters()]
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 5, 8, 8))  # raised in mid-forward, with gates on
    with torch.no_grad():
        network.eval()(example())
    assert [n for n, _ in network.named_parameters()] == names
    assert gates.detach() is network
    for module, training in zip(network.modules(), _modes(name), strict=True):
        module.training = training
    assert snapshot(network) == before
    assert torch.equal(torch.get_rng_state(), state)


def _modes(name: str) -> list[bool]:
    return [index % 2 == 0 for index, _ in enumerate(tiny(name).modules())]


def test_surgery_keeps_frozen_what_was_frozen() -> None:
    network = _half_frozen("residual")
    flags = {name: p.requires_grad for name, p in network.named_parameters()}
    plan = random_plan(trace(network, example()), 0)
    remove(network, plan, example())
    assert {name: p.requires_grad for name, p in network.named_parameters()} == flags
    assert not all(flags.values())


def test_surgery_that_is_broken_off_keeps_frozen_what_was_frozen() -> None:
    network = _half_frozen("residual")
    flags = {name: p.requires_grad for name, p in network.named_parameters()}
    for group in removals(network, random_plan(trace(network, example()), 0), example()):
        group.prune()
        break
    assert {name: p.requires_grad for name, p in network.named_parameters()} == flags


def _learned_plan(seed: int) -> PruningPlan:
    network = tiny("concat", seed).train()
    space = trace(network, example())
    model = MacsModel(space)
    target = 0.5 * float(model(torch.tensor(space.full_widths)))
    settings_ = WGatesSettings(learning_rate=0.05)
    gates = WGates(network, space, Budget.of(Limit(model, target)), settings_).attach()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    for _ in range(6):
        labels = torch.randint(5, (4,), generator=generator)
        inputs = torch.randn(4, 3, 8, 8, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), labels).backward()
        gates.regularize()
        optimizer.step()
    return gates.plan()


def test_the_same_seed_gives_the_same_plan() -> None:
    first, second = _learned_plan(0), _learned_plan(0)
    assert first.kept == second.kept
    assert first.space.fingerprint == second.space.fingerprint
    assert _learned_plan(1).kept != first.kept


REBUILD = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from networks import TINY, example
from wgates_plugin.surgery import rebuild
network = rebuild(TINY[sys.argv[2]](), sys.argv[3], sys.argv[4]).eval()
with torch.no_grad():
    print(network(example()).double().flatten().tolist())
"""


def test_plans_rebuild_the_network_in_a_fresh_process(tmp_path: Path) -> None:
    network, space = tiny("grouped"), trace(tiny("grouped"), example())
    plan = random_plan(space, 1)
    remove(network, plan, example())
    plan.save(tmp_path / "plan.json")
    save_tensors(tmp_path / "weights.safetensors", network.state_dict())
    with torch.no_grad():
        expected = network(example()).double().flatten()
    here = Path(__file__).parent
    arguments = [here, "grouped", tmp_path / "plan.json", tmp_path / "weights.safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", REBUILD, *map(str, arguments)],
        cwd=here.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)).double(), expected)


@pytest.mark.parametrize("name", TINY)
def test_plans_rebuild_the_network_from_its_class(name: str, tmp_path: Path) -> None:
    network, space = _traced(name)
    plan = random_plan(space, 2)
    removed = remove(copy.deepcopy(network), plan, example())
    plan.save(tmp_path / "plan.json")
    save_tensors(tmp_path / "weights.safetensors", removed.state_dict())
    rebuilt = rebuild(TINY[name](), tmp_path / "plan.json", tmp_path / "weights.safetensors").eval()
    assert same_tensors(rebuilt.state_dict(), removed.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(example()), removed(example()))


def test_gates_of_a_plan_are_what_gating_reads() -> None:
    network, space = _traced("residual")
    plan = random_plan(space, 4)
    with torch.no_grad(), Gating(network, space, lambda: plan.mask.float()):
        found = network(example())
    assert torch.equal(found, masked_output(network, plan, example()))
