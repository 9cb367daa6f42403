"""MetaPruning: generated kernels, the search, held-out images, the winner's weights."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from networks import CLASSES, TINY, Head, conv_bn, example, tiny
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from wgates_plugin import ChannelSpace, PruningPlan, trace
from wgates_plugin.catalogue.tensor_loader import TensorLoader
from wgates_plugin.efficiency import Budget, Limit, MacsModel, ParametersModel
from wgates_plugin.errors import (
    ConfigError,
    FileFormatError,
    InfeasibleTargetError,
    RunFolderError,
    TrainingError,
)
from wgates_plugin.gating import Gating
from wgates_plugin.strategies import Decision, Task
from wgates_plugin.strategies.base import InMemory
from wgates_plugin.strategies.metapruning import (
    Evolution,
    Genes,
    MetaPruningSettings,
    MetaPruningStrategy,
    PruningNet,
)
from wgates_plugin.strategies.metapruning import fitness as fitness_module
from wgates_plugin.strategies.metapruning.fitness import Fitness, judges
from wgates_plugin.strategies.metapruning.generator import KernelGenerator, bases_for
from wgates_plugin.strategies.metapruning.genes import crossed, draw_within, shares
from wgates_plugin.strategies.metapruning.held_out import gathered, split
from wgates_plugin.strategies.metapruning.pruning_net import initialised
from wgates_plugin.strategies.metapruning.training import train
from wgates_plugin.strategies.metapruning.winner import from_scratch
from wgates_plugin.surgery import resize
from wgates_plugin.training import TrainingSettings, evaluate, recalibrate_batchnorm
from wgates_plugin.verification import TOLERANCE, relative_error, removal_error

SMALL = MetaPruningSettings(
    population=6, parents=3, mutations=2, crossovers=2, generations=3, recalibration_images=8
)


def batches(count: int = 4, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (example(size, seed=seed), torch.randint(CLASSES, (size,), generator=generator))
        for seed in range(count)
    ]


def budget_of(space: ChannelSpace, share: float = 0.5) -> Budget:
    macs = MacsModel(space)
    return Budget.of(Limit(macs, share * float(macs(torch.tensor(space.full_widths)))))


def task_for(network: nn.Module, space: ChannelSpace, **changed: Any) -> Task:
    options: dict[str, Any] = {
        "epochs": 2,
        "total_epochs": 2,
        "training": TrainingSettings(learning_rate=0.02, accelerator="cpu"),
        "progress": False,
        "train_loader": batches(),
        "budget": budget_of(space),
        **changed,
    }
    return Task(copy.deepcopy(network), space, example_inputs=example(), **options)


def decide(name: str = "residual", settings: Any = SMALL, **changed: Any) -> Decision:
    network = tiny(name)
    space = trace(network, example())
    return MetaPruningStrategy(settings).decide(task_for(network, space, **changed))


# Generated kernels


def test_a_kernel_is_two_fully_connected_layers_of_the_shares() -> None:
    """Against a plain `nn.Linear`, and cropping before against cropping after."""
    made = KernelGenerator(torch.randn(6, 4, 3, 3), inputs=2, hidden=16, bases=16)
    second = nn.Linear(16, 6 * 4 * 9)
    with torch.no_grad():
        second.weight.copy_(made.table.flatten(1).T)
        second.bias.copy_(made.base.flatten())
    encoding = torch.tensor([0.5, 0.7])
    expected = second(torch.relu(made.first(encoding))).view(6, 4, 3, 3)
    torch.testing.assert_close(made(encoding, {}), expected)
    slices = {0: np.arange(5), 1: np.array([0, 2])}
    torch.testing.assert_close(made(encoding, slices), expected[:5][:, [0, 2]])


def test_large_kernels_are_generated_through_fewer_bases() -> None:
    assert bases_for(1000, 32, None) == bases_for(1000, 32, 32_000) == 32
    assert bases_for(1000, 32, 5_999) == 5
    assert bases_for(1000, 32, 10) == 1
    made = KernelGenerator(torch.randn(8, 8, 3, 3), inputs=2, hidden=16, bases=3)
    kernels = [made(torch.rand(2), {}) - made.base for _ in range(20)]
    rank = int(torch.linalg.matrix_rank(torch.stack(kernels).flatten(1)))
    assert 1 <= rank <= 3
    assert made.table.numel() == 3 * 8 * 8 * 9


def without_dropout(network: nn.Module, training: bool) -> None:
    network.train(training)
    for module in network.modules():
        if isinstance(module, nn.Dropout):  # draws another mask for another size
            module.eval()


@pytest.mark.parametrize("name", TINY)
def test_masked_equals_cropped(name: str) -> None:
    """The cropped forward pass, the materialised network, and the full kernels under gates.

    In train mode first, so that running statistics have to agree in eval mode afterwards.
    """
    network = tiny(name)
    space = trace(network, example())
    pruning_net = PruningNet(network, space, hidden=8, largest_table=2000, seed=1)
    genes = Genes.of(space)
    for seed in range(3):
        widths = genes.draw(np.random.default_rng(seed))
        pruning_net.widths = widths
        small = pruning_net.materialised(widths)
        full = copy.deepcopy(pruning_net.network)
        with torch.no_grad():
            for weight, kernel in pruning_net.kernels(widths):
                full.get_parameter(weight).copy_(kernel)
        gates = PruningPlan.leading(space, widths).mask.float()
        for training in (True, False):
            for one in (pruning_net, small, full):
                without_dropout(one, training)
            inputs = example(4, seed=seed)
            with torch.no_grad(), Gating(full, space, gates.clone):
                expected = full(inputs)
                assert relative_error(pruning_net(inputs), expected) <= TOLERANCE
                assert relative_error(small(inputs), expected) <= TOLERANCE


def test_gradients_are_those_of_the_gated_network() -> None:
    network = tiny("residual")
    space = trace(network, example())
    pruning_net = PruningNet(network, space, hidden=8).train()
    pruning_net.widths = widths = (3, 5)
    inputs = example(4)
    pruning_net(inputs).square().sum().backward()
    found = {n: p.grad.clone() for n, p in pruning_net.named_parameters() if p.grad is not None}
    pruning_net.zero_grad()
    gates = PruningPlan.leading(space, widths).mask.float()
    full = pruning_net.network
    with Gating(full, space, lambda: gates):
        kernels = dict(pruning_net.kernels(widths))
        torch.func.functional_call(full, kernels, (inputs,)).square().sum().backward()
    for name, parameter in pruning_net.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 1e-6:
            error = (found[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
            assert error < 1e-3, name
    table = found["generators.0.table"]
    assert table[:, :3].abs().sum() > 0
    assert table[:, 3:].abs().sum() == 0


def test_layers_no_group_makes_and_frozen_ones_are_not_generated() -> None:
    network = tiny("plain")
    mine = network.get_parameter("1.0.weight").requires_grad_(False)
    space = trace(network, example())
    pruning_net = PruningNet(network, space)
    assert set(pruning_net.generated) == {"0.0"}
    assert torch.equal(pruning_net.network.get_parameter("1.0.weight"), mine)
    trained = {n for n, p in pruning_net.named_parameters() if p.requires_grad}
    assert "network.2.fc.weight" in trained
    assert not {"network.0.0.weight", "network.1.0.weight"} & trained


def test_the_trained_weights_have_no_part_in_it() -> None:
    first, second = tiny("residual", seed=0), tiny("residual", seed=7)
    space = trace(first, example())
    states = [PruningNet(net, space, seed=3).state_dict() for net in (first, second)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.slow
def test_resnet50_at_224_trains_in_bounded_memory() -> None:
    """Two training steps with momentum, by default settings: under 12 GB in all."""
    code = """
import resource, sys
sys.path.insert(0, "tests")
import torch
from networks import torchvision_network
from wgates_plugin import trace
from wgates_plugin.strategies.metapruning import PruningNet
network = torchvision_network("resnet50")
pruning_net = PruningNet(network, trace(network, torch.randn(1, 3, 224, 224))).train()
trained = [p for p in pruning_net.parameters() if p.requires_grad]
optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9)
for _ in range(2):
    optimizer.zero_grad()
    pruning_net(torch.randn(2, 3, 224, 224)).square().mean().backward()
    optimizer.step()
scale = 2**20 if sys.platform != "darwin" else 2**30
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale)
"""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < 12


# Genes and the search


def test_shares_and_the_widths_they_mean() -> None:
    assert shares()[:3] == [0.10, 0.13, 0.16]
    assert len(shares()) == 31
    assert shares(0.5, 0.4) == [0.5, 0.9, 1.0]
    space = trace(tiny("plain"), example(), floors={"0.0": 4})
    genes = Genes.of(space, grid=4)
    assert [sorted(set(mine)) for mine in genes.alleles] == [[4, 8], [4, 8, 12]]
    rng = np.random.default_rng(0)
    drawn = [genes.draw(rng) for _ in range(600)]
    assert set(drawn) == set(itertools.product([4, 8], [4, 8, 12]))
    # 12 of 12 channels are nearest to the shares from 10.5 of 12 on: 5 of the 31.
    twelve = sum(row[1] == 12 for row in drawn) / len(drawn)
    nearest = sum(mine == 12 for mine in genes.alleles[1]) / 31
    assert twelve == pytest.approx(nearest, abs=0.06)


def test_children_have_their_parents_genes() -> None:
    rng = np.random.default_rng(0)
    first, second = tuple(range(40)), tuple(range(100, 140))
    child = crossed(first, second, rng)
    assert all(gene in pair for gene, *pair in zip(child, first, second, strict=True))
    assert first != child != second
    space = trace(tiny("concat"), example())
    genes = Genes.of(space)
    mutants = [genes.mutated(space.full_widths, 0.1, rng) for _ in range(800)]
    changed = np.mean([np.not_equal(m, space.full_widths).mean() for m in mutants])
    # A tenth is drawn anew, and some draws mean the old width again.
    assert 0.06 < changed < 0.1


def test_draws_keep_tight_budgets() -> None:
    space = trace(tiny("concat"), example())
    genes, budget = Genes.of(space), budget_of(space, 0.06)
    everything = list(itertools.product(*(sorted(set(mine)) for mine in genes.alleles)))
    fitting = {row for row in everything if float(budget.excess(torch.tensor(row))) <= 0}
    drawn = draw_within(genes, budget, 12, np.random.default_rng(0))
    assert 0 < len(fitting) < len(everything) / 200
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) == fitting
    new = draw_within(genes, budget, 12, np.random.default_rng(1), drawn[:2])
    assert set(new) == fitting - set(drawn[:2])
    assert len(draw_within(genes, budget, 2, np.random.default_rng(0))) == 2


def run_search(search: Evolution, error: Any, stop_after: int | None = None) -> list[Any]:
    asked: list[Any] = []
    while candidates := search.ask():
        for widths in candidates:
            if stop_after is not None and len(asked) >= stop_after:
                return asked
            asked.append(widths)
            search.tell(widths, error(widths))
    return asked


def toy_search(**changed: Any) -> Evolution:
    space = changed.pop("space", None) or trace(tiny("concat"), example())
    settings = MetaPruningSettings(generations=changed.pop("generations", 8))
    budget = changed.pop("budget", None) or budget_of(space, 0.4)
    return Evolution(Genes.of(space, changed.get("grid", 1)), budget, settings, **changed)


def toy_error(widths: tuple[int, ...]) -> float:
    wanted = (3, 4, 1, 2, 8)
    return float(sum(abs(a - b) for a, b in zip(widths, wanted, strict=True)))


def test_the_search_judges_each_candidate_once_and_none_over_the_budget() -> None:
    search = toy_search()
    asked = run_search(search, toy_error)
    assert len(asked) == len(set(asked)) == 8 * 50
    assert [len(generation) for generation in search.generations] == [50] * 8
    assert all(float(search.budget.excess(torch.tensor(row))) <= 0 for row in asked)
    assert run_search(toy_search(), toy_error) == asked
    assert run_search(toy_search(seed=1), toy_error) != asked


def test_the_search_beats_random_draws() -> None:
    """Over five seeds, for the same number of candidates judged."""
    ours, random = [], []
    for seed in range(5):
        search = toy_search(seed=seed, generations=4)
        run_search(search, toy_error)
        ours.append(search.best[1])
        rng = np.random.default_rng(seed)
        rows = draw_within(search.genes, search.budget, len(search.errors), rng)
        random.append(min(map(toy_error, rows)))
    assert sum(ours) < sum(random)


def test_a_small_space_is_searched_to_its_end() -> None:
    network = nn.Sequential(conv_bn(3, 4), Head(4))
    space = trace(network, example())
    search = toy_search(space=space, budget=budget_of(space, 0.75))
    asked = run_search(search, lambda widths: 1 / widths[0])
    assert sorted(asked) == [(1,), (2,), (3,)]
    assert search.best == ((3,), 1 / 3)


@pytest.mark.parametrize("stop_after", [7, 50, 131])
def test_an_interrupted_search_goes_on_alike(stop_after: int) -> None:
    whole = toy_search()
    run_search(whole, toy_error)
    first = toy_search()
    run_search(first, toy_error, stop_after)
    second = toy_search()
    second.load_json(json.loads(json.dumps(first.to_json())))
    run_search(second, toy_error)
    assert second.to_json() == whole.to_json()
    assert second.best == whole.best


def other_runs() -> Iterator[tuple[str, Evolution]]:
    space = trace(tiny("concat"), example())
    yield "space", toy_search(space=trace(tiny("grouped"), example()))
    yield "budget", toy_search(budget=budget_of(space, 0.41))
    full = float(ParametersModel(space)(torch.tensor(space.full_widths)))
    yield "budget", toy_search(budget=Budget.of(Limit(ParametersModel(space), full)))
    yield "grid", toy_search(grid=2)
    yield "seed", toy_search(seed=3)
    yield "weights", toy_search(about={"weights": "abc"})


@pytest.mark.parametrize(("what", "other"), other_runs())
def test_the_population_of_another_run_is_refused(what: str, other: Evolution) -> None:
    search = toy_search()
    run_search(search, toy_error, 60)
    with pytest.raises(RunFolderError, match=rf"another run \(different: .*{what}"):
        other.load_json(search.to_json())


def test_what_is_no_population_is_refused() -> None:
    for state in (None, {}, {**toy_search().to_json(), "version": 2}):
        with pytest.raises(FileFormatError, match="no population"):
            toy_search().load_json(state)
    row = list(toy_search().ask()[0])
    broken: list[Any] = [
        5,
        [[[1, 2]]],
        [[[[*row, 1], 0.1]]],
        [[[[-1, *row[1:]], 0.1]]],
        [[[[row[0] + 0.5, *row[1:]], 0.1]]],
        [[["many", 0.1]]],
        [[[row, math.nan]]],
        [[[row, "0.1"]]],
        [[[row, 10**400]]],
        [[[row, 0.1], [row, 0.2]]],
    ]
    for generations in broken:
        search = toy_search()
        with pytest.raises(FileFormatError, match=r"missing or wrong.*delete `population\.pt`"):
            search.load_json({**search.to_json(), "generations": generations})
        assert search.generations == []
    for identity in ([], None, "me"):
        with pytest.raises(FileFormatError, match="its identity is"):
            toy_search().load_json({**toy_search().to_json(), "identity": identity})
    search = toy_search()
    search.load_json({**search.to_json(), "generations": [[[row, 1]]]})
    assert search.best == (tuple(row), 1.0)
    with pytest.raises(ValueError, match="not asked for"):
        toy_search().tell((1, 1, 1, 1, 1), 0.5)


class NeverRead:
    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        raise AssertionError("the data were read")


def test_a_budget_without_candidates_is_said_before_training() -> None:
    settings = MetaPruningSettings(least_share=0.7)
    space = trace(tiny("residual"), example())
    with pytest.raises(InfeasibleTargetError, match="lower `least_share`"):
        decide(settings=settings, budget=budget_of(space, 0.2), train_loader=NeverRead())
    with pytest.raises(InfeasibleTargetError, match="out of reach"):
        decide(budget=budget_of(space, 1e-4), train_loader=NeverRead())


def test_all_wrong_options_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        MetaPruningSettings(population=0, held_out=1.0, weights="best", mutation_probability=0)
    assert len(caught.value.problems) == 4


def test_parents_are_some_of_the_population() -> None:
    with pytest.raises(ConfigError, match=r"parents is 7, population 6.*up to population"):
        MetaPruningSettings(population=6, parents=7)
    MetaPruningSettings(population=6, parents=6)


# Held-out images and the fitness


def numbered(count: int) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 1, 1) that hold their own number."""
    return torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1), torch.zeros(count).long()


def seen_by(loader: Any) -> list[int]:
    return sorted(round(float(x) * 255) for images, _ in loader for x in images.flatten())


@pytest.mark.parametrize("kind", ["in memory", "data loader", "list"])
def test_held_out_images_are_never_trained_on(kind: str) -> None:
    images, targets = numbered(100)
    in_memory = TensorLoader(images, targets, batch_size=8, shuffle=True, drop_last=True)
    data_set = TensorDataset(images.float() / 255, targets)
    loader: Any = {
        "in memory": in_memory,
        "data loader": DataLoader(data_set, batch_size=8, shuffle=True, drop_last=True),
        "list": list(TensorLoader(images, targets, batch_size=8)),
    }[kind]
    parts = split(loader, 0.04, seed=0)
    held = seen_by(parts.held_out)
    assert held == seen_by(parts.held_out)
    assert len(held) == len(set(held)) >= (20 if kind != "list" else 4)
    trained = {number for _ in range(5) for number in seen_by(parts.train)}
    assert not trained & set(held)
    assert trained | set(held) == set(range(100))
    assert seen_by(split(loader, 0.04, seed=0).held_out) == held
    assert seen_by(split(loader, 0.04, seed=1).held_out) != held


class Opaque:
    """Batches that only an iterator gives out."""

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Any]:
        return iter(batches(4))


def test_a_loader_that_cannot_be_split_by_image_is_said(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        parts = split(Opaque(), 0.04, seed=0)
    assert "held out by their number" in caplog.text
    assert len(parts.train) == len(list(parts.train)) == 3
    assert len(list(parts.held_out)) == 1
    with pytest.raises(TrainingError, match="1 batch leaves none"):
        split(batches(1), 0.04, seed=0)
    with pytest.raises(TrainingError, match="1 training images"):
        split(TensorLoader(*numbered(1), batch_size=1), 0.04, seed=0)


def test_batches_that_were_given_are_not_made_anew() -> None:
    """Their sampler leaves images out; split by image, these would come back."""
    images, targets = numbered(24)
    chosen = SequentialSampler(range(16))
    given = DataLoader(
        TensorDataset(images.float() / 255, targets),
        batch_sampler=BatchSampler(chosen, 4, drop_last=False),
    )
    parts = split(given, 0.25, seed=0)
    assert sorted(seen_by(parts.train) + seen_by(parts.held_out)) == list(range(16))


def test_what_draws_given_batches_is_seeded_and_given_back() -> None:
    images, targets = numbered(24)
    data_set, own = TensorDataset(images.float() / 255, targets), torch.Generator()
    drawn = BatchSampler(RandomSampler(data_set, generator=own), 4, drop_last=False)
    given = DataLoader(data_set, batch_sampler=drawn)
    orders = []
    for state in (1, 2):
        before = own.manual_seed(state).get_state()
        parts = split(given, 0.25, seed=0)
        train = gathered(parts.train, seed=0)
        orders.append([seen_by([batch]) for batch in [*train, *parts.held_out]])
        assert torch.equal(own.get_state(), before)
    assert orders[0] == orders[1]


@pytest.mark.parametrize("count", [101, 103, 17])
def test_no_last_batch_of_one_is_made(count: int) -> None:
    for loader in (
        TensorLoader(*numbered(count), batch_size=16),
        DataLoader(TensorDataset(*numbered(count)), batch_size=16),
    ):
        parts = split(loader, 0.04, seed=0)
        left = len(seen_by(parts.train))
        assert left % 16 != 1 or count % 16 == 1
        assert left + len(seen_by(parts.held_out)) == count


def test_fitness_is_the_error_of_the_gated_network_with_its_own_statistics() -> None:
    network = tiny("residual")
    space = trace(network, example())
    pruning_net = PruningNet(network, space, hidden=8)
    data, held = batches(3, 32), batches(5, 40)[3:]
    fitness = Fitness(pruning_net, data, held)
    for widths in ((2, 3), (8, 6), (5, 1)):
        full = copy.deepcopy(pruning_net.network)
        with torch.no_grad():
            for name, kernel in pruning_net.kernels(widths):
                full.get_parameter(name).copy_(kernel)
        gates = PruningPlan.leading(space, widths).mask.float()
        with Gating(full, space, gates.clone):
            recalibrate_batchnorm(full, data, images=96)
            expected = 1.0 - evaluate(full, held).accuracy
        assert fitness(widths) == pytest.approx(expected, abs=1e-9)
        assert fitness(widths) == fitness(widths)


def test_data_that_are_no_classes_are_refused_before_training() -> None:
    odd = [(example(4, seed=seed), torch.randn(4, 2)) for seed in range(3)]
    with pytest.raises(TrainingError, match="no classification"):
        decide(train_loader=odd)
    with pytest.raises(TrainingError, match=r"loss gave \(6, 5\), needed a tensor of one number"):
        decide(loss=lambda logits, _: logits.square())


class OneNumber(nn.Module):
    """A network that answers one number, whose accuracy is 1 whatever it says."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny("residual")
        self.answer = nn.Linear(CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.body(x))


def test_a_loss_of_ones_own_judges_the_candidates() -> None:
    torch.manual_seed(0)
    network = OneNumber()
    space = trace(network, example())
    data = [(images, images.mean((2, 3))[:, :1]) for images, _ in batches(6, 8)]
    loss = nn.functional.mse_loss
    task = task_for(network, space, train_loader=data, loss=loss)
    search = MetaPruningStrategy(SMALL).decide(task).facts["search"]
    assert search["judged_by"] == "held-out loss"
    assert 0 < search["best_loss"] == min(g["least"] for g in search["generations"])
    assert any(g["least"] < g["median"] for g in search["generations"])  # it tells them apart
    assert decide().facts["search"]["judged_by"] == "held-out error"
    pruning_net = PruningNet(network, space, hidden=8)
    fitness = Fitness(pruning_net, data[:3], data[4:], loss=loss)
    widths = space.least_widths()
    with torch.no_grad():
        full = pruning_net.materialised(widths)
        recalibrate_batchnorm(full, data[:3], images=100)
        expected = sum(float(loss(full.eval()(x), y)) for x, y in data[4:]) / 2
    assert fitness(widths) == pytest.approx(expected, rel=1e-5)
    lost = Fitness(pruning_net, data[:3], data[4:], loss=lambda out, _: out.sum() / 0)
    assert math.isfinite(lost(widths))


def test_losses_that_are_not_finite_are_counted_and_can_be_written_down() -> None:
    network = tiny("residual")
    space = trace(network, example())

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        found = nn.functional.cross_entropy(logits, targets)
        return found if torch.is_grad_enabled() else found * math.inf

    decision = MetaPruningStrategy(SMALL).decide(task_for(network, space, loss=loss))
    search = decision.plain(space, "metapruning").facts["search"]
    assert search["best_loss"] is search["uniform_loss"] is None
    for generation in search["generations"]:
        assert generation["not_finite"] == generation["candidates"] > 0
        assert generation["least"] is generation["median"] is None


class InPlace(nn.Module):
    """Normalises the very images that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny("residual")

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.body(images.sub_(0.5).div_(0.5))
        return logits


def test_candidates_of_a_network_that_works_in_place_all_see_the_same_images() -> None:
    network = InPlace()
    pruning_net = PruningNet(network, trace(network, example()), hidden=8)
    data, loss = batches(4), nn.functional.cross_entropy
    fitness = Fitness(pruning_net, data[:2], data[2:], loss=loss)
    widths = trace(network, example()).full_widths
    assert fitness(widths) == fitness(widths)
    assert all(map(torch.equal, (x for x, _ in data), (x for x, _ in batches(4))))


def test_rays_store_has_room_for_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def init(**options: Any) -> None:
        asked.update(options)
        raise Interrupted

    ray = SimpleNamespace(init=init, is_initialized=lambda: False, cloudpickle=pickle)
    monkeypatch.setattr(fitness_module, "_ray", lambda *_: ray)
    network = tiny("plain")
    pruning_net = PruningNet(network, trace(network, example()), hidden=8)
    images, targets = torch.zeros(1000, 3, 32, 32, dtype=torch.uint8), torch.zeros(1000).long()
    held_out, recalibration = TensorLoader(images, targets, 64), batches()
    with pytest.raises(Interrupted), judges(Fitness(pruning_net, recalibration, held_out), 2):
        pass
    cached = sum(part.nbytes for batch in recalibration for part in batch)
    assert asked["object_store_memory"] >= fitness_module._STORE_BYTES + images.nbytes + cached


def test_without_ray_one_process_judges(monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    alone = decide()
    with caplog.at_level(logging.WARNING):
        asked = decide(settings=MetaPruningSettings(**{**vars(SMALL), "workers": 2}))
    assert "wgates-plugin[ray]" in caplog.text
    assert asked.widths == alone.widths


@pytest.mark.slow
def test_workers_judge_as_one_process_does() -> None:
    ray = pytest.importorskip("ray")
    network = tiny("concat")
    space = trace(network, example())
    fitness = Fitness(PruningNet(network, space, hidden=8), batches(2, 16), batches(4, 32)[2:])
    rows = draw_within(Genes.of(space), budget_of(space), 6, np.random.default_rng(0))
    with judges(fitness, workers=2) as crew:
        found = list(crew.errors(rows))
    assert found == pytest.approx([fitness(row) for row in rows], abs=0.02)
    assert not ray.is_initialized()


# The decision


def test_epochs_train_the_pruning_net_and_the_winner_starts_from_scratch() -> None:
    decision = decide("residual")
    space = trace(decision.network, example())
    expected = initialised(resize(tiny("residual"), space, decision.widths), seed=0)
    found = resize(decision.network, space, decision.widths)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    plan = PruningPlan.top(space, decision.scores, decision.widths)
    assert plan.kept == PruningPlan.leading(space, decision.widths).kept
    assert removal_error(decision.network, found, plan, example()) <= TOLERANCE
    assert len(decision.monitor) == 2 * 3  # one of the four batches is held out
    assert len({record["width_share"] for record in decision.monitor}) > 1
    judged = decision.facts["search"]
    assert judged["best_error"] == min(g["least"] for g in judged["generations"])


def test_from_scratch_initialises_by_the_small_fan_in() -> None:
    network = nn.Sequential(conv_bn(3, 64), conv_bn(64, 64), Head(64))
    space = trace(network, example())
    fresh = from_scratch(network, space, (4, 64), seed=0)
    weight = fresh.get_parameter("1.0.weight").detach()
    # Kaiming's bound is 1 / sqrt(fan_in) of the layer as it will be, 4 channels of 9 weights.
    assert float(weight[:, :4].abs().max()) > 0.95 / 6
    assert float(weight[:, 4:].abs().max()) <= 1 / 24 + 1e-6


def test_the_winner_may_inherit_the_trained_channels() -> None:
    network = tiny("residual")
    settings = MetaPruningSettings(**{**vars(SMALL), "weights": "inherit"})
    decision = decide("residual", settings)
    assert decision.widths == decide("residual").widths
    for name, value in network.state_dict().items():
        assert torch.equal(decision.network.state_dict()[name], value)
    space = trace(network, example())
    norms = network.get_parameter("0.0.weight").detach().abs().sum((1, 2, 3))
    plan = PruningPlan.top(space, decision.scores, decision.widths)
    best = norms.topk(decision.widths[0]).indices.sort().values.tolist()
    assert list(plan.kept[0]) == best


def test_without_epochs_widths_are_uniform_and_said_to_be(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        decision = decide(epochs=0, train_loader=NeverRead())
    assert "without epochs" in caplog.text
    assert decision.facts["search"] is None


class Interrupted(Exception):
    pass


class Stops(InMemory):
    """Checkpoints that break off after so many have been saved."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def save_state(self, name: str, state: dict[str, Any]) -> None:
        super().save_state(name, state)
        self.left -= 1
        if self.left == 0:
            raise Interrupted


@pytest.mark.parametrize("after", [1, 3, 4])
def test_interrupted_and_resumed_it_decides_alike(after: int) -> None:
    """In the phase, after the first generation, and after the second."""
    whole = decide()
    checkpoints = Stops(after)
    with pytest.raises(Interrupted):
        decide(checkpoints=checkpoints)
    resumed = decide(checkpoints=checkpoints)
    assert resumed.widths == whole.widths
    assert resumed.facts == whole.facts
    assert [r["loss"] for r in resumed.monitor] == [r["loss"] for r in whole.monitor]
    assert torch.equal(resumed.scores, whole.scores)


def test_a_population_of_other_weights_is_refused() -> None:
    """The phase was repeated with other data: errors of before do not compare."""
    checkpoints = InMemory()
    decide(checkpoints=checkpoints)
    phase = checkpoints.load_state("phase.pt")
    assert phase is not None
    phase["network"] = {k: v + 1 for k, v in phase["network"].items()}
    checkpoints.save_state("phase.pt", phase)
    with pytest.raises(RunFolderError, match="different: weights"):
        decide(checkpoints=checkpoints)


# Its promise, in small


def test_a_trained_pruning_net_tells_wide_from_starved() -> None:
    """Digits: before training it cannot, after it the fitness falls with the width."""
    from wgates_plugin.catalogue.data import load_data

    data = load_data("digits", batch_size=64)
    torch.manual_seed(0)
    network = nn.Sequential(conv_bn(1, 16), conv_bn(16, 24, stride=2), nn.Flatten())
    network.append(nn.Linear(24 * 16, 10))
    space = trace(network, data.example_input)
    genes = Genes.of(space)
    parts = split(data.train_loader, 0.2, seed=0)
    pruning_net = PruningNet(network, space)
    task = Task(
        network,
        space,
        budget_of(space),
        data.example_input,
        parts.train,
        epochs=8,
        total_epochs=8,
        training=TrainingSettings(learning_rate=0.05, warmup_epochs=1, accelerator="cpu"),
        progress=False,
    )
    fitness = Fitness(pruning_net, gathered(parts.train, 0, 256), parts.held_out)
    untrained = fitness(space.full_widths)
    train(MetaPruningStrategy(), task, pruning_net, genes)
    starved, middle, wide = (fitness(w) for w in (genes.least, (6, 9), space.full_widths))
    assert wide < 0.15 < 0.5 < untrained
    assert wide < middle < starved
