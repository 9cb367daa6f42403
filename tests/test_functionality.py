"""Functionality-oriented pruning: patterns, contributions, clusters and ranks against slow twins."""

from __future__ import annotations

import builtins
import copy
import math
from typing import Any

import pytest
import torch
from helpers import snapshot
from networks import CLASSES, TINY, Head, conv, conv_bn, example, randomised, tiny
from torch import Tensor, nn
from torch.nn import functional

from wgates_plugin import ChannelSpace, trace
from wgates_plugin.efficiency import Budget, Limit, MacsModel
from wgates_plugin.errors import ConfigError, MissingExtraError, TraceError, TrainingError
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies.base import InMemory, Task
from wgates_plugin.strategies.functionality import FunctionalitySettings, FunctionalityStrategy
from wgates_plugin.strategies.functionality.clustering import (
    SILENT,
    cluster,
    distances,
    likeness,
)
from wgates_plugin.strategies.functionality.contribution import contribution_index
from wgates_plugin.strategies.functionality.inputs import Grey, ImageInput
from wgates_plugin.strategies.functionality.maximisation import LEAK, blurred, patterns
from wgates_plugin.strategies.functionality.pictures import TILE, picture, thumbnails
from wgates_plugin.strategies.functionality.points import Point, find_points
from wgates_plugin.strategies.functionality.ranking import SHARPNESS, covered_in_order, rank
from wgates_plugin.strategies.scop import ScopStrategy

pytest.importorskip("sklearn")

QUICK = FunctionalitySettings(steps=4, step=0.1, tried=4)
GREY = Grey(torch.zeros(1, 3, 1, 1), 1.0)


def data(batches: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [
        (example(4, seed=seed), torch.arange(seed, seed + 4) % CLASSES) for seed in range(batches)
    ]


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy; of a map of logits, at its mean."""
    flat = logits if logits.ndim == 2 else logits.mean((2, 3))
    return functional.cross_entropy(flat, targets % flat.shape[1])


def task_of(network: nn.Module, share: float = 0.75, **options: Any) -> Task:
    space = trace(network, example())
    model = MacsModel(space)
    limit = Limit(model, share * float(model(torch.tensor(space.full_widths))))
    options = {"train_loader": data(), "loss": loss, **options}
    return Task(copy.deepcopy(network), space, Budget.of(limit), example(), **options)


def points_of(network: nn.Module, space: ChannelSpace, **options: Any) -> list[list[Point]]:
    options = {"producers": 9, "side": 64, **options}
    return find_points(network, space, ImageInput.of(example()), **options)


def frozen(network: nn.Module) -> nn.Module:
    return network.eval().requires_grad_(False)


# The whole strategy


@pytest.mark.parametrize("name", TINY)
def test_every_kind_of_network(name: str) -> None:
    network = tiny(name).train()
    first, second = task_of(network, 0.9), task_of(network, 0.9)
    before, state = snapshot(first.network), torch.get_rng_state()
    found = FunctionalityStrategy(QUICK).decide(first)
    assert snapshot(first.network) == before
    assert torch.equal(torch.get_rng_state(), state)
    again = FunctionalityStrategy(QUICK).decide(second)
    assert torch.equal(found.scores, again.scores)
    assert found.widths == again.widths
    assert torch.isfinite(found.scores).all()
    assert float(first.budget.excess(torch.tensor(found.widths))) <= 0
    kept = PruningPlan.top(first.space, found.scores, found.widths).widths
    for name, facts in found.facts["groups"].items():
        group = first.space.group(name)
        assert facts["units"] == group.units
        assert facts["kept"] * group.ties == kept[first.space.names.index(name)]
        # While the width allows it, every cluster keeps its representative.
        assert facts["representatives_kept"] == min(facts["clusters"], facts["kept"])


def test_an_interrupted_run_goes_on_and_ends_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny("depthwise")
    whole = FunctionalityStrategy(QUICK).decide(task_of(network))
    checkpoints = InMemory()
    judged: list[str] = []
    judge = FunctionalityStrategy._judge

    def stops(self: FunctionalityStrategy, *args: Any) -> dict[str, Any]:
        if len(judged) == 2:
            raise KeyboardInterrupt
        judged.append("")
        return judge(self, *args)

    monkeypatch.setattr(FunctionalityStrategy, "_judge", stops)
    with pytest.raises(KeyboardInterrupt):
        FunctionalityStrategy(QUICK).decide(task_of(network, checkpoints=checkpoints))
    judged.clear()
    rest = FunctionalityStrategy(QUICK).decide(task_of(network, checkpoints=checkpoints))
    assert len(judged) == len(whole.widths) - 2
    assert torch.equal(rest.scores, whole.scores)
    assert rest.facts == whole.facts
    assert all(torch.equal(rest.pictures[name], whole.pictures[name]) for name in whole.pictures)


def test_copies_in_disguise_are_found() -> None:
    """Six filters, three of them again at other sizes: one of each pair stays."""
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Sequential(conv(3, 9), nn.BatchNorm2d(9), nn.ReLU()), conv_bn(9, 6), Head(6)
    )
    randomised(network, 3)
    first, norm, reader = network[0][0], network[0][1], network[1][0]
    sizes = torch.tensor([3.0, 0.3, 2.0])
    with torch.no_grad():
        first.weight[6:] = first.weight[:3] * sizes.view(3, 1, 1, 1)
        norm.running_mean[6:] = norm.running_mean[:3] * sizes
        norm.running_var[6:] = (norm.running_var[:3] + norm.eps) * sizes.square() - norm.eps
        norm.weight[6:], norm.bias[6:] = norm.weight[:3], norm.bias[:3]
        reader.weight[:, :3] *= 0.6
        reader.weight[:, 6:] = reader.weight[:, :3] * (0.4 / 0.6)
    found = FunctionalityStrategy().decide(task_of(network, 1.0))
    plan = PruningPlan.top(trace(network, example()), found.scores, (6, 6))
    assert sorted(unit % 6 for unit in plan.kept[0]) == list(range(6))


def test_uniform_quotas_take_the_same_share() -> None:
    task = task_of(tiny("plain"), 0.5)
    options = FunctionalitySettings(steps=2, quotas="uniform", pictured=0)
    found = FunctionalityStrategy(options).decide(task)
    shares = [w / g.channels for w, g in zip(found.widths, task.space.groups, strict=True)]
    assert max(shares) - min(shares) < 0.2
    assert found.pictures == {}


# Patterns


def test_patterns_against_one_filter_at_a_time() -> None:
    network = tiny("depthwise")
    space = trace(network, example())
    frozen(network)
    settings = FunctionalitySettings(steps=3, step=0.3, blur=0, decay=0.1, memory_gib=1e-6)
    point = points_of(network, space)[1][1]
    assert point.layer == "1.main.1.0"  # the depthwise one, behind its BatchNorm
    found = patterns(network, point, ImageInput.of(example()), GREY, settings, seed=5)
    start = GREY.start((3, 8, 8), settings.noise, 5)
    for unit in range(12):
        image = start.clone()
        for _ in range(3):
            image.requires_grad_(True)
            inner = network[1].main[1][:2](network[1].main[0](network[0](image)))[:, unit]
            level = torch.where(inner > 0, inner, LEAK * inner).mean()
            (gradient,) = torch.autograd.grad(level, image)
            size = gradient.square().mean().sqrt().clamp_min(1e-20)  # 0 behind a closed ReLU
            image = (image.detach() + 0.3 * gradient / size) * 0.9
        assert torch.allclose(found[unit], (image - start * 0.9**3)[0], atol=1e-4)


def test_a_pattern_excites_its_own_filter_more_than_those_of_others_do() -> None:
    network = tiny("plain")
    space = trace(network, example())
    frozen(network)
    settings = FunctionalitySettings(steps=30, step=0.1)
    (point,) = points_of(network, space)[1]
    found = patterns(network, point, ImageInput.of(example()), GREY, settings, seed=0)
    start = GREY.start((3, 8, 8), settings.noise, 0)

    def levels(images: Tensor) -> Tensor:
        return functional.leaky_relu(network[1][:2](network[0](images)), LEAK).mean((2, 3))

    rise = levels(start + found) - levels(start)  # (image n, filter m)
    own = rise.diagonal()
    assert (own > 0).all()
    assert (own > (rise.sum(0) - own) / 11).all()


def test_the_sign_of_a_batchnorm_turns_a_function_round() -> None:
    network = tiny("plain")
    norm = network[0][1]
    with torch.no_grad():
        network[0][0].weight[1] = network[0][0].weight[0]
        for values in (norm.running_mean, norm.running_var, norm.weight):
            values[1] = values[0]
        norm.weight[1] *= -1
    frozen(network)
    (point,) = points_of(network, trace(tiny("plain"), example()))[0]
    assert (point.layer, point.module) == ("0.0", "0.1")
    found = patterns(network, point, ImageInput.of(example()), GREY, QUICK, seed=0)
    assert float(likeness(found)[0, 1]) < -0.3


class ByKeyword(nn.Module):
    """Calls its layers and norms by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        seen = torch.relu(self.norm(input=self.first(input=images)))
        logits: Tensor = self.head(input=self.second(input=seen).mean((2, 3)))
        return logits


def test_a_norm_that_is_called_by_keyword_is_seen() -> None:
    network = frozen(ByKeyword())
    (point,) = points_of(network, trace(ByKeyword(), example()))[0]
    assert (point.layer, point.module) == ("first", "norm")


def test_smaller_inputs_where_the_layer_allows_them() -> None:
    network = frozen(tiny("flattened"))
    points = points_of(network, trace(tiny("flattened"), example()), side=4)
    shapes = {point.layer: point.shape for group in points for point in group}
    assert shapes == {"0.0": (3, 4, 4), "2": (3, 8, 8)}


def test_tied_channels_are_one_unit() -> None:
    network = frozen(tiny("grouped"))
    space = trace(tiny("grouped"), example())
    index = next(i for i, group in enumerate(space.groups) if group.ties == 3)
    point = points_of(network, space)[index][0]
    shares = point.shares()
    assert shares.shape == (4, 12)
    assert torch.allclose(shares[1], torch.tensor([0.0, 1, 0, 0] * 3) / 3)


def test_producers_are_spread_over_a_group() -> None:
    network = tiny("preactivation")
    space = trace(network, example())
    stream = [group.name for group in space.groups].index("0")
    every = [point.layer for point in points_of(network, space)[stream]]
    assert len(every) == 3
    two = [point.layer for point in points_of(network, space, producers=2)[stream]]
    one = [point.layer for point in points_of(network, space, producers=1)[stream]]
    assert (two, one) == ([every[0], every[-1]], [every[-1]])


def test_blur_is_the_gaussians() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[..., 4, 4] = 1
    found = blurred(image, 1.0)[0, 0]
    weight = [math.exp(-0.5 * (place - 4) ** 2) * (abs(place - 4) <= 2) for place in range(9)]
    line = torch.tensor(weight) / sum(weight)
    assert torch.allclose(found, line[:, None] * line[None, :], atol=1e-6)
    level = torch.full((2, 3, 5, 1), 7.0)
    assert torch.allclose(blurred(level, 0.7), level)
    assert torch.equal(blurred(image, 0), image)


# Contributions


@pytest.mark.parametrize("name", ["plain", "residual", "grouped", "reused", "flattened"])
def test_contributions_against_one_image_at_a_time(name: str) -> None:
    network = frozen(tiny(name))
    space = trace(tiny(name), example())
    points = points_of(network, space)
    found = contribution_index(network, space, points, data(), loss)
    for index, group in enumerate(space.groups):
        expected = torch.zeros(group.units)
        for point in points[index]:
            norms = torch.zeros(group.units)
            for inputs, targets in data():
                for row in range(len(inputs)):
                    maps = _feature_maps(network, point.module, inputs[row : row + 1])
                    value = loss(maps[0], targets[row : row + 1])
                    for gradient in torch.autograd.grad(value, maps[1]):
                        for unit in range(group.units):
                            mine = gradient[0][point.units == unit]
                            norms[unit] += mine.norm()
            expected += norms / norms.mean() / len(points[index])
        assert torch.allclose(found[space.unit_slice(index)], expected, rtol=1e-3)


def _feature_maps(network: nn.Module, module: str, image: Tensor) -> tuple[Tensor, list[Tensor]]:
    maps: list[Tensor] = []
    handle = network.get_submodule(module).register_forward_hook(
        lambda _, __, output: maps.append(output)
    )
    with torch.enable_grad():
        output = network(image.clone().requires_grad_(True))
    handle.remove()
    return output, maps


# Clusters and ranks


def planted(clusters: int, each: int, spread: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(clusters, 40, generator=generator)
    noise = spread * torch.randn(clusters * each, 40, generator=generator)
    return centres.repeat_interleave(each, 0) + noise


def test_the_silhouette_finds_how_many_clusters() -> None:
    found = cluster(likeness(planted(7, 6, 0.2)), largest=64, tried=6, seed=0)
    assert int(found.labels.max()) == 6
    assert torch.equal(found.labels, torch.arange(7).repeat_interleave(6))
    assert found.silhouette is not None
    assert found.silhouette > 0.6
    few = cluster(likeness(planted(7, 6, 0.2)), largest=3, tried=6, seed=0)
    assert int(few.labels.max()) <= 2


@pytest.mark.parametrize(
    ("rows", "labels"),
    [
        ([[1.0, 0], [0, 1]], [0, 1]),
        ([[1.0, 1], [2, 2], [3, 3]], [0, 0, 0]),
        ([[0.0, 0], [0, 0]], [SILENT, SILENT]),
        ([[0.0, 0], [1, 0], [0, 0]], [SILENT, 0, SILENT]),
    ],
)
def test_clusters_where_there_is_little_to_cluster(rows: Any, labels: list[int]) -> None:
    found = cluster(likeness(torch.tensor(rows)), largest=8, tried=4, seed=0)
    assert found.labels.tolist() == labels
    assert found.silhouette is None


def test_distances_are_those_of_patterns_side_by_side() -> None:
    parts = [torch.randn(5, 3, 4), torch.randn(5, 2)]
    rows = [functional.normalize(part.flatten(1), dim=1) / 2**0.5 for part in parts]
    joint = torch.cat(rows, dim=1)
    averaged = sum(likeness(part) / 2 for part in parts)
    assert torch.allclose(distances(averaged).float(), torch.cdist(joint, joint), atol=1e-3)


def test_of_each_cluster_the_greatest_contribution_goes_last() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, SILENT])
    contribution = torch.tensor([0.2, 0.9, 0.3, 0.4, 0.1, 5.0])
    cosines = likeness(torch.randn(6, 30))
    for repeats in ("coverage", "contribution"):
        scores = rank(cosines, labels, contribution, repeats=repeats)
        assert set(scores.argsort(descending=True)[:2].tolist()) == {1, 3}
        assert (scores[[1, 3]] > 1).all()
        assert scores[5] == 0
        assert ((scores[[0, 2, 4]] > 0) & (scores[[0, 2, 4]] <= 1)).all()
    order = rank(cosines, labels, contribution, repeats="contribution").argsort(descending=True)
    assert order[2:].tolist() == [2, 0, 4, 5]


def test_repeats_of_large_gains_keep_their_order() -> None:
    """A gain is a sum over units: three and six copies are worth more than the greatest unit."""
    cosines = torch.block_diag(*(torch.ones(size, size) for size in (1, 3, 6))).double()
    contribution = torch.tensor([1.0] + [0.9] * 9)
    scores = rank(cosines, torch.zeros(10).long(), contribution, repeats="coverage")
    best = scores[1:].argsort(descending=True, stable=True)[:2] + 1
    assert best.tolist() == [4, 1]
    assert scores[best].tolist() == pytest.approx([1.0, 0.5])  # of gains 5.4 and 2.7
    assert ((scores[1:] > 0) & (scores[1:] <= 1)).all()
    # Gains below the greatest contribution count as they are.
    small = rank(cosines, torch.zeros(10).long(), contribution**20, repeats="coverage")
    assert small[4] == pytest.approx(6 * 0.9**20)


def test_coverage_against_trying_every_unit() -> None:
    cosines = likeness(planted(5, 4, 0.7))
    weight = torch.rand(20, dtype=torch.float64)
    rest = torch.ones(20, dtype=torch.bool)
    rest[[3, 9]] = False
    found = list(covered_in_order(cosines, weight, [3, 9], rest))

    def covers(units: list[int]) -> float:
        return sum(
            float(weight[v])
            * max(0.0, *(min(1.0, float(cosines[u, v])) for u in units)) ** SHARPNESS
            for v in range(20)
        )

    chosen = [3, 9]
    for unit, gain in found:
        left = [other for other in range(20) if other not in chosen]
        gains = {other: covers([*chosen, other]) - covers(chosen) for other in left}
        assert gain == pytest.approx(max(gains.values()), abs=1e-9)
        assert gains[unit] == pytest.approx(gain, abs=1e-9)
        chosen.append(unit)
    assert sorted(chosen) == list(range(20))


# Pictures


def test_pictures_show_clusters_in_rows_and_frame_what_stays() -> None:
    tiles = thumbnails(torch.randn(5, 1, 9, 9))
    assert tiles is not None
    assert tiles.shape == (5, 3, TILE, TILE)
    labels = torch.tensor([0, 1, 1, 1, 0])
    image = picture(tiles, labels, torch.tensor([2.0, 1.5, 0.1, 0.2, 0.3]), {0, 1})
    assert image.dtype == torch.uint8
    cell = TILE + 4
    assert image.shape == (2 * (cell + 2) + 2, 3 * (cell + 2) + 2, 3)
    corners = [[image[2 + d * (cell + 2), 2 + r * (cell + 2)] for r in range(3)] for d in range(2)]
    green, grey, white = [0, 150, 80], [200, 200, 200], [255, 255, 255]
    colours = [[corner.tolist() for corner in row] for row in corners]
    assert colours == [[green, grey, grey], [green, grey, white]]
    # The larger cluster first, of it the best filter first.
    assert torch.equal(image[4 : 4 + TILE, 4 : 4 + TILE], tiles[1].permute(1, 2, 0))
    assert thumbnails(torch.randn(5, 12)) is None


# Refusals


def test_all_wrong_options_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        FunctionalitySettings(steps=0, decay=1.0, repeats="none", memory_gib=-1.0, blur=-1.0)
    assert len(caught.value.problems) == 5


def test_what_the_strategy_cannot_work_on() -> None:
    with pytest.raises(TrainingError, match="no batches"):
        FunctionalityStrategy(QUICK).decide(task_of(tiny("plain"), train_loader=[]))
    with pytest.raises(TrainingError, match="nan"):
        FunctionalityStrategy(QUICK).decide(
            task_of(tiny("plain"), loss=lambda logits, _: logits.sum() * math.nan)
        )
    with pytest.raises(TrainingError, match=r"functionality: the loss gave \(4, 5\), needed"):
        FunctionalityStrategy(QUICK).decide(task_of(tiny("plain"), loss=lambda logits, _: logits))
    with pytest.raises(TraceError, match="floating-point"):
        ImageInput.of(torch.zeros(2, 3, dtype=torch.long))


class TwoInputs(nn.Module):
    """An image, and numbers beside it that have layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(5, 8)
        self.e, self.head = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, images: Tensor, numbers: Tensor) -> Tensor:
        seen = self.a(images).relu().mean((2, 3))
        out: Tensor = self.head(self.e(torch.cat([seen, self.b(numbers).relu()], 1)).relu())
        return out


@pytest.mark.parametrize("strategy", [FunctionalityStrategy(QUICK), ScopStrategy()])
def test_groups_that_do_not_see_the_image_are_refused(strategy: Any) -> None:
    network, inputs = TwoInputs(), (torch.randn(6, 3, 8, 8), torch.randn(6, 5))
    batches = [(inputs, torch.arange(6) % 4)]
    space = trace(network, inputs)
    model = MacsModel(space)
    budget = Budget.of(Limit(model, 0.6 * float(model(torch.tensor(space.full_widths)))))
    task = Task(copy.deepcopy(network), space, budget, inputs, batches, epochs=1)
    with pytest.raises(TraceError, match=r"nothing of it reaches `b`, which another input feeds"):
        strategy.decide(task)
    space = trace(network, inputs, ignored_layers=["b"])
    model = MacsModel(space)
    budget = Budget.of(Limit(model, 0.6 * float(model(torch.tensor(space.full_widths)))))
    task = Task(copy.deepcopy(network), space, budget, inputs, batches, epochs=1)
    assert strategy.decide(task).widths
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_networks_of_double_precision() -> None:
    given = task_of(tiny("plain"), train_loader=[(x.double(), y) for x, y in data()])
    given.network.double()
    given.example_inputs = example().double()
    assert FunctionalityStrategy(QUICK).decide(given).widths


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    real = __import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "sklearn":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(MissingExtraError, match=r"wgates-plugin\[functionality\]"):
        FunctionalityStrategy(QUICK).decide(task_of(tiny("plain")))
