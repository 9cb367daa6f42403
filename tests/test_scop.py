"""SCOP: knockoffs, the two streams and the scores, against slow twins; what is refused; its promise."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import snapshot
from networks import CLASSES, Head, conv, conv_bn, example, tiny
from sklearn.covariance import ledoit_wolf as sklearn_ledoit_wolf
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.scop_promise import SCHEME, layer_aucs, scheme_falls
from benchmarks.tools.planted_noise import train_planted
from wgates_plugin import ChannelSpace, MacsTarget, PruningSettings, prune_to_target, trace
from wgates_plugin.callables import name_of, untold
from wgates_plugin.catalogue import Data
from wgates_plugin.efficiency import Budget, Limit, MacsModel
from wgates_plugin.errors import ConfigError, RunFolderError, TrainingError
from wgates_plugin.pipeline import PruningResult
from wgates_plugin.strategies import Task, make_strategy
from wgates_plugin.strategies.scop import ScopSettings, ScopStrategy
from wgates_plugin.strategies.scop.gaussian import fit_gaussian, ledoit_wolf
from wgates_plugin.strategies.scop.knockoffs import make_source
from wgates_plugin.strategies.scop.strategy import unit_scores
from wgates_plugin.strategies.scop.two_stream import Betas, TwoStream, norms_behind
from wgates_plugin.surgery import rebuild
from wgates_plugin.training import TrainingSettings


def correlated_images(count: int, seed: int = 0) -> Tensor:
    """(N, 1, 2, 3) with a mean, correlations and unequal variances."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(99))
    flat = torch.randn(count, 6, generator=generator) @ mixing * 0.3 + torch.arange(6)
    return flat.view(count, 1, 2, 3)


def covariance_of(model: Any) -> tuple[Tensor, Tensor]:
    """(C, S) as matrices, from a fitted model's directions."""
    basis, eye = model.basis.double(), torch.eye(len(model.mean)).double()
    rest = eye - basis @ basis.T
    inner = basis * model.variances.double() @ basis.T
    shared = basis * (model.variances * model.shares).double() @ basis.T
    return inner + model.noise * rest, shared + model.noise * model.noise_share * rest


@pytest.mark.parametrize("kind", ["image", "pixel"])
@pytest.mark.parametrize("rank", [6, 3])
def test_knockoffs_are_alike_in_mean_and_covariance(kind: str, rank: int) -> None:
    """Second-order exchangeability: cov(x~) = C and cov(x, x~) = C - S, in the model fitted."""
    model = fit_gaussian(correlated_images(500), kind=kind, rank=rank)
    covariance, shared = covariance_of(model)
    assert torch.linalg.eigvalsh(2 * covariance - shared).min() > -1e-5
    object.__setattr__(model, "lowest", -1e9)  # clamping is ours, and no part of the law
    object.__setattr__(model, "highest", 1e9)
    torch.manual_seed(0)
    factor = torch.linalg.cholesky(covariance)
    real = (torch.randn(200_000, 6).double() @ factor.T + model.mean.double()).float()
    made = model(real.view(-1, 1, 2, 3)).flatten(1).double()
    joint = torch.cov(torch.cat([real.double(), made], 1).T)
    scale = covariance.diagonal().max()
    assert (made.mean(0) - model.mean).abs().max() < 0.02 * scale.sqrt()
    assert (joint[6:, 6:] - covariance).abs().max() < 0.02 * scale
    assert (joint[:6, 6:] - (covariance - shared)).abs().max() < 0.02 * scale


def test_a_fitted_covariance_is_the_shrunk_one() -> None:
    images = correlated_images(40)
    expected, intensity = sklearn_ledoit_wolf(images.flatten(1).double().numpy())
    centred = images.flatten(1).double()
    centred = centred - centred.mean(0)
    assert ledoit_wolf(centred @ centred.T / 40, 6) == pytest.approx(intensity, rel=1e-6)
    covariance, shared = covariance_of(fit_gaussian(images, kind="image"))
    assert torch.allclose(covariance, torch.from_numpy(expected), atol=1e-4)
    assert torch.allclose(shared, covariance)  # an image is one variable: S = C


def test_large_images_are_fitted_at_low_rank() -> None:
    images = torch.randn(12, 3, 224, 224)
    model = fit_gaussian(images, rank=5)
    assert model.basis.shape == (3 * 224 * 224, 5)
    torch.manual_seed(1)
    first = model(images)
    torch.manual_seed(1)
    assert torch.equal(model(images), first)
    assert first.shape == images.shape
    assert images.min() <= first.min() <= first.max() <= images.max()
    assert not torch.equal(model(images), first)


@pytest.mark.parametrize("count", [2, 20, 40])
def test_directions_are_at_right_angles_however_few_the_images(count: int) -> None:
    images = correlated_images(4).repeat(10, 1, 1, 1) if count == 40 else torch.rand(count, 3, 6, 6)
    basis = fit_gaussian(images, rank=256).basis.double()
    assert basis.shape[1] == min(count, 4 if count == 40 else count) - 1
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]).double(), atol=1e-4)


def test_constant_images_do_no_harm() -> None:
    assert torch.isfinite(fit_gaussian(torch.ones(4, 1, 3, 3))(torch.ones(2, 1, 3, 3))).all()


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (lambda x: x[:1], r"shape \(1, 3, 8, 8\), needed \(4, 3, 8, 8\)"),
        (lambda x: x * 200, "training images lie between"),
        (lambda x: x.double(), "returns torch.float64"),
        (lambda x: x.numpy(), "returns ndarray"),
        (lambda x: x * float("nan"), "not finite"),
        (lambda x: x, "the real images themselves"),
        (lambda x: x.mul_(1), "the real images themselves"),
        (lambda x: x @ torch.ones(3), "fails on a batch of shape"),
    ],
)
def test_unusable_generators_are_refused(generator: Callable[..., Any], message: str) -> None:
    source = make_source(generator, example(16))
    with pytest.raises(TrainingError, match=f"knockoff generator: .*{message}"):
        source(example(4))


def test_the_error_of_a_generator_is_told_in_short() -> None:
    def fails(_: Tensor) -> Tensor:
        raise ValueError("x" * 5000 + "\nand more")

    with pytest.raises(TrainingError, match=r"\(ValueError: x{200}\.\.\.\)") as caught:
        make_source(fails, example(16))(example(4))
    assert "and more" not in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_good_generator_is_taken_as_it_is() -> None:
    images = example(4)
    assert torch.equal(make_source(lambda x: x.flip(0), images)(images), images.flip(0))


def test_a_last_batch_of_one_may_be_its_own_knockoff() -> None:
    images = example(4)
    source = make_source(lambda x: x.flip(0), images)
    assert torch.equal(source(images[:1]), images[:1])


def test_a_batch_widens_the_range_that_the_first_images_had() -> None:
    """The images looked at first were dark ones."""
    images = example(4)
    source = make_source(lambda x: x.flip(0), 0.01 * images)
    assert torch.equal(source(images), images.flip(0))
    told = re.escape(f"lie between {float(images.min()):.4g} and {float(images.max()):.4g}")
    with pytest.raises(TrainingError, match=told):
        make_source(lambda x: x * 200, 0.01 * images)(images)


def test_a_generator_that_writes_on_its_batch_leaves_the_users_images() -> None:
    images = example(4)
    before = images.clone()
    made = make_source(lambda x: x.mul_(0.5), images)(images)
    assert torch.equal(images, before)
    assert torch.equal(made, 0.5 * before)


class Plain(nn.Module):
    """conv, BatchNorm, ReLU, conv, pool, linear: small enough to compute by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = conv(3, 6), nn.BatchNorm2d(6)
        self.second, self.head = conv(6, 4, bias=True), Head(4)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(torch.relu(self.norm(self.first(images)))))
        return out


def by_hand(net: Plain, real: Tensor, made: Tensor, betas: list[Tensor]) -> Tensor:
    """Main logits, with the two streams written out."""
    first, second = (beta.view(1, -1, 1, 1) for beta in betas)
    z, k = net.first(real), net.first(made)
    z = first * z + (1 - first) * k
    both = torch.relu(net.norm(torch.cat([z, k])))
    z, k = net.second(both[: len(real)]), net.second(both[len(real) :])
    out: Tensor = net.head(second * z + (1 - second) * k)
    return out


def test_two_streams_equal_the_slow_twin() -> None:
    torch.manual_seed(0)
    net = Plain()
    twin = copy.deepcopy(net)
    space = trace(net, example())
    betas = Betas(net, space)
    assert betas.names == ("first", "second")
    with torch.no_grad():
        for value in betas.values:
            value.copy_(torch.rand(value.shape))
    before = snapshot(net)
    streams = TwoStream(net, betas, lambda images: images.flip(0)).attach()
    images, targets = example(4), torch.tensor([0, 1, 2, 3])
    logits = streams.train()(images)
    slow = [value.detach().clone().requires_grad_() for value in betas.values]
    expected = by_hand(twin.train(), images, images.flip(0), slow)
    assert torch.allclose(logits, expected, atol=1e-6)
    functional.cross_entropy(logits, targets).backward()
    functional.cross_entropy(expected, targets).backward()
    for fast, value in zip(betas.values, slow, strict=True):
        assert value.grad.abs().max() > 0
        assert torch.allclose(fast.grad, value.grad, atol=1e-6)
    streams.detach()
    net.eval()
    found = snapshot(net.requires_grad_(True))
    assert {k for k, v in found.items() if "hook" in k and v} == {
        k for k, v in before.items() if "hook" in k and v
    }


def test_betas_of_one_give_the_network_itself() -> None:
    net = Plain().eval()
    betas = Betas(net, trace(net, example()))
    with torch.no_grad():
        for value in betas.values:
            value.fill_(1.0)
    streams = TwoStream(net, betas, torch.zeros_like).attach().eval()
    logits = streams(example()).detach()
    streams.detach()
    assert torch.allclose(logits, net(example()), atol=1e-6)


def test_producers_that_are_in_no_group_have_no_betas() -> None:
    net = tiny("residual")
    space = trace(net, example(), ignored_layers=["1.main.0.0"])
    betas = Betas(net, space)
    assert "2.fc" not in betas.names
    assert "1.main.0.0" not in betas.names
    for value in betas.values:
        assert torch.equal(value, torch.full_like(value, 0.5))
    with torch.no_grad():
        for value in betas.values:
            value.fill_(3.0)
    betas.clamp(space.total_units)
    assert betas.mean(space.total_units) == 1.0


def test_channels_that_no_group_owns_stay_real() -> None:
    """On a space made by hand, whose first producer is a group's in all but its last two channels."""
    net = Plain()
    space = trace(net, example())
    (slot,) = space.group("first").slots_as("producer")
    units = slot.units.copy()
    units[-2:] = -1
    slots = tuple(
        dataclasses.replace(one, units=units) if one is slot else one
        for one in space.group("first").slots
    )
    first = dataclasses.replace(space.group("first"), slots=slots)
    space = dataclasses.replace(space, groups=(first, *space.groups[1:]))
    betas = Betas(net, space)
    assert betas.values[0].tolist() == [0.5] * 4 + [1.0] * 2
    assert betas.mean(space.total_units) == 0.5
    with torch.no_grad():
        betas.values[0].copy_(torch.tensor([-1.0, 0.25, 0.25, 2.0, 0.1, 0.2]))
    betas.clamp(space.total_units)
    assert betas.values[0].tolist() == [0.0, 0.25, 0.25, 1.0, 1.0, 1.0]
    assert betas.mean(space.total_units) == pytest.approx((1.5 + 4 * 0.5) / 8)
    # They have no say in the scores of those that are owned.
    with torch.no_grad():
        net.norm.weight.copy_(torch.tensor([1.0, 1.0, 1.0, 1.0, 50.0, 50.0]))
    scores = unit_scores(space, betas, norms_behind(net, betas.names, example()))
    # Over the mean |gamma| of all six units, of which two have no producer here.
    assert scores[:6].tolist() == pytest.approx([-1.5, -0.75, -0.75, 1.5, 0.0, 0.0])


def test_scores_are_the_papers_and_sum_over_coupled_producers() -> None:
    net = tiny("projection")
    space = trace(net, example())
    betas = Betas(net, space)
    with torch.no_grad():
        for value in betas.values:
            value.copy_(torch.rand(value.shape))
    norms = norms_behind(net, betas.names, example())
    assert {n: type(m).__name__ for n, m in norms.items()} == dict.fromkeys(
        betas.names, "BatchNorm2d"
    )
    scores = unit_scores(space, betas, norms)
    values = dict(zip(betas.names, betas.values, strict=True))
    for index, group in enumerate(space.groups):
        members = [slot.module for slot in group.slots_as("producer")]
        gammas = [norms[name].weight.abs() for name in members]
        pairs = zip(members, gammas, strict=True)
        expected = sum(gamma * (values[name] - (1 - values[name])) for name, gamma in pairs)
        expected = expected / sum(gamma.mean() for gamma in gammas)
        assert torch.allclose(scores[space.unit_slice(index)], expected, atol=1e-6)
    assert max(len(group.slots_as("producer")) for group in space.groups) == 2


def test_norms_are_those_that_read_the_producer_itself() -> None:
    net = tiny("preactivation")
    names = Betas(net, trace(net, example())).names
    norms = norms_behind(net, names, example())
    # The stream's norms read sums; only a block's own norm reads one convolution.
    assert set(norms) == {"0", "1.main.2", "2.main.2"}
    scores = unit_scores(trace(net, example()), Betas(net, trace(net, example())), norms)
    assert torch.equal(scores, torch.zeros_like(scores))  # every beta is one half


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = conv(3, 8), nn.BatchNorm2d(8), Head(8)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.norm(input=self.conv(input=images))))
        return logits


def test_a_norm_that_is_called_by_keyword_is_found() -> None:
    net = ByKeyword()
    assert norms_behind(net, ("conv",), example()) == {"conv": net.norm}


def scop_task(net: nn.Module, loader: Any, **options: Any) -> tuple[Task, ChannelSpace]:
    images = loader[0][0]
    space = trace(net, images[:2])
    model = MacsModel(space)
    budget = Budget.of(Limit(model, 0.5 * float(model(torch.tensor(space.full_widths)))))
    settings = TrainingSettings(accelerator="cpu")
    return (
        Task(net, space, budget, images[:2], loader, training=settings, progress=False, **options),
        space,
    )


def labelled(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images whose class is the row that is bright, in the first colour only."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES, (count,), generator=generator)
    images = 0.5 * torch.randn(count, 3, 8, 8, generator=generator)
    images[torch.arange(count), 0, targets + 1] += 2.0
    return images, targets


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(3, 12), nn.BatchNorm2d(12)
        self.read = nn.Linear(12 * 8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.read(torch.relu(self.norm(self.conv(images))).mean(3).flatten(1))
        return out


def test_filters_that_nobody_uses_score_lowest_though_magnitude_prefers_them() -> None:
    torch.manual_seed(0)
    net = Rows()
    useless = torch.arange(12) % 3 == 0
    with torch.no_grad():
        net.conv.weight[useless, 0] = 0.0  # they see only the colours without a signal
        net.conv.weight[useless] *= 5.0
        net.norm.weight[useless] = 3.0
    mask = (~useless).float().view(-1, 1, 1, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for step in range(120):
        images, targets = labelled(64, step)
        optimizer.zero_grad()
        functional.cross_entropy(net(images), targets).backward()
        net.conv.weight.grad *= mask
        optimizer.step()
    loader = [labelled(32, 1000 + index) for index in range(12)]
    before = copy.deepcopy(net.state_dict())
    task, space = scop_task(net.eval(), loader, epochs=6)
    decision = ScopStrategy().decide(task)
    scores = decision.scores[space.unit_slice(space.names.index("conv"))]
    ranking = (scores[~useless][:, None] > scores[useless][None]).float().mean()
    magnitude = net.conv.weight.flatten(1).norm(dim=1)
    assert magnitude[useless].min() > magnitude[~useless].median()
    assert ranking > 0.9
    # Weights frozen, statistics as found, and the betas did learn.
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert decision.facts["filters_preferring_real"] > 0.4


@pytest.mark.parametrize("name", ["flattened", "one-dimensional", "transposed", "grouped-two-ways"])
def test_other_kinds_of_layers_take_part(name: str) -> None:
    net = tiny(name)
    with torch.no_grad():
        shape = net(example()).shape
    targets = torch.zeros(shape[0], *shape[2:], dtype=torch.long)
    loader = [(example(2, seed=seed), targets) for seed in range(3)]
    task, _ = scop_task(net, loader, epochs=1)
    decision = ScopStrategy(ScopSettings(quota="uniform")).decide(task)
    assert decision.scores.abs().max() > 0
    assert len(decision.monitor) == 3


def test_a_dictionary_of_inputs_gets_knockoffs_of_its_images_alone() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Plain()

        def forward(self, scale: Tensor, images: Tensor) -> Tensor:
            out: Tensor = self.net(images) * scale
            return out

    net = Scaled()
    inputs = {"scale": torch.tensor([[1.0], [2.0]]), "images": example(2)}
    space = trace(net, inputs, verify=False)
    seen: list[Tensor] = []
    streams = TwoStream(net, Betas(net, space), lambda x: seen.append(x) or x.flip(0)).attach()
    assert streams(**inputs).shape == (2, CLASSES)
    assert len(seen) == 1
    assert seen[0] is inputs["images"]
    streams.detach()


def test_a_network_that_mixes_its_batch_is_refused() -> None:
    class Averaged(Plain):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).mean(0, keepdim=True)

    net = Averaged()
    with pytest.raises(TrainingError, match="one output per image"):
        TwoStream(net, Betas(net, trace(net, example())), lambda x: x)(example())


def test_all_bad_options_are_told_at_once() -> None:
    options = {
        "learning_rate": 0.0,
        "knockoffs": "deepfake",
        "quota": "fair",
        "residual": "loose",
        "knockoff_images": 1,
    }
    with pytest.raises(ConfigError) as caught:
        make_strategy("scop", options)
    assert len(caught.value.problems) == len(options)


def test_a_generator_is_found_by_its_name() -> None:
    strategy = make_strategy("scop", {"knockoffs": "torch:zeros_like"})
    loader = [(example(4, seed=seed), torch.arange(4)) for seed in range(2)]
    task, _ = scop_task(tiny("plain"), loader, epochs=1)
    assert strategy.decide(task).facts["knockoffs"] == "torch:zeros_like"


def test_under_mixed_precision_a_generator_gets_float32_and_no_autocast() -> None:
    seen: list[tuple[torch.dtype, bool]] = []

    def mirrored(images: Tensor) -> Tensor:
        made = functional.conv2d(images, torch.eye(3)[:, :, None, None])
        seen.append((made.dtype, torch.is_autocast_enabled("cpu")))
        return torch.from_numpy(made.numpy()[..., ::-1].copy())

    loader = [(example(4, seed=seed), torch.arange(4)) for seed in range(2)]
    task, _ = scop_task(tiny("plain"), loader, epochs=1)
    mixed = TrainingSettings(accelerator="cpu", precision="bf16-mixed")
    task = dataclasses.replace(task, training=mixed, fabric=None)
    decision = ScopStrategy(ScopSettings(knockoffs=mirrored)).decide(task)
    assert seen == [(torch.float32, False)] * 2
    assert decision.scores.abs().max() > 0


def test_a_generator_that_cannot_be_imported_is_refused_at_once() -> None:
    for name, words in (("nowhere.at_all:fn", "cannot be found"), ("math:pi", "no callable")):
        with pytest.raises(ConfigError, match=f"knockoffs is '{name}': .*{words}"):
            make_strategy("scop", {"knockoffs": name})


@pytest.mark.parametrize(
    ("strategy", "options"), [("scop", {}), ("gdp", {}), ("wgates", {"start": "open"})]
)
def test_without_epochs_the_largest_filters_stay_and_it_is_said(
    strategy: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    net = nn.Sequential(conv_bn(3, 8), Head(8))
    with torch.no_grad():
        net[0][0].weight[[1, 4, 6]] *= 9
    with caplog.at_level(logging.WARNING):
        task, _ = scop_task(net, [(example(4), torch.arange(4))], epochs=0)
        decision = make_strategy(strategy, options).decide(task)
    assert f"{strategy}: without epochs it learns nothing" in caplog.text
    assert set(decision.scores.topk(3).indices.tolist()) == {1, 4, 6}
    assert decision.facts == {"learned": False}


class Blurred:
    """A generator with a setting."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, images: Tensor) -> Tensor:
        return (1 - self.share) * images


def shrunk(images: Tensor, *, share: float) -> Tensor:
    return share * images


def test_generators_are_told_apart_by_what_they_hold() -> None:
    for make in (Blurred, lambda share: functools.partial(shrunk, share=share)):
        assert name_of(make(0.1)) == name_of(make(0.1)) != name_of(make(0.5))
    assert name_of(shrunk) == f"{__name__}:shrunk"
    assert name_of(Blurred(0.1).__call__) != name_of(Blurred(0.2).__call__)
    options = {"a": shrunk, "b": Blurred(0.1), "c": lambda x: x, "d": 3}
    assert list(untold(options)) == [f"`c` ({name_of(options['c'])[:-1]})"]


def test_tensors_are_told_by_their_content_in_every_process() -> None:
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))
    words = (
        "import torch; from torch import nn; from wgates_plugin.callables import name_of; "
        "print(name_of(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))))"
    )
    other = subprocess.run(
        [sys.executable, "-c", words], capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == name_of(weighted)
    assert name_of(weighted) != name_of(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])))
    assert name_of(weighted) != name_of(nn.CrossEntropyLoss(weight=torch.tensor([[1.0], [2.0]])))


def test_sets_among_options_are_the_same_in_every_process() -> None:
    code = (
        "import functools; from wgates_plugin.callables import name_of; "
        "print(name_of(functools.partial(print, sep={'alpha', 'beta', 'gamma', 'delta'})))"
    )
    names = set()
    for seed in "123":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        names.add(run.stdout.strip())
    assert len(names) == 1
    other = functools.partial(print, sep={"alpha", "beta"})
    assert name_of(other) not in names


def test_a_run_is_not_resumed_with_another_generator(tmp_path: Path) -> None:
    data = [(example(4, seed=seed), torch.arange(4)) for seed in range(3)]

    def run(name: str, knockoffs: Callable[..., Any], **options: Any) -> PruningResult:
        return prune_to_target(
            tiny("residual"),
            example(),
            data,
            data,
            target=MacsTarget(fraction=0.6),
            settings=PruningSettings(
                strategy="scop",
                options={"knockoffs": knockoffs},
                gate_epochs=1,
                fine_tune_epochs=0,
                measure_seconds=0.01,
                training=TrainingSettings(accelerator="cpu"),
            ),
            run_folder=tmp_path / name,
            progress=False,
            **options,
        )

    first = run("told", Blurred(0.1))
    assert run("told", Blurred(0.1), resume=True).plan.kept == first.plan.kept
    with pytest.raises(
        RunFolderError, match=r"another run \(different: `settings\.options\.knockoffs`"
    ):
        run("told", Blurred(0.5), resume=True)
    run("untold", lambda x: 0.5 * x, resume=True)  # nothing is there to be resumed yet
    with pytest.raises(RunFolderError, match=r"cannot be resumed.*`knockoffs`"):
        run("untold", lambda x: 0.5 * x, resume=True)


@pytest.mark.parametrize(("network", "share", "parameters", "macs"), SCHEME)
def test_the_scatter_scheme_has_the_papers_arithmetic(
    network: str, share: float, parameters: float, macs: float
) -> None:
    found = scheme_falls(network, share)
    assert found == (pytest.approx(parameters, abs=0.06), pytest.approx(macs, abs=0.06))


def black_images(images: Tensor) -> Tensor:
    return torch.zeros_like(images)


def test_the_whole_job_with_scatter_and_a_generator_of_ones_own(tmp_path: Path) -> None:
    network = tiny("residual")
    data = [(example(4, seed=seed), torch.arange(4)) for seed in range(3)]
    result = prune_to_target(
        network,
        example(),
        data,
        data,
        target=MacsTarget(fraction=0.6),
        settings=PruningSettings(
            strategy="scop",
            options={"residual": "scatter", "quota": "uniform", "knockoffs": black_images},
            gate_epochs=1,
            fine_tune_epochs=1,
            measure_seconds=0.01,
            training=TrainingSettings(learning_rate=0.02, accelerator="cpu"),
        ),
        run_folder=tmp_path / "run",
        progress=False,
    )
    assert result.held
    assert [step["transform"] for step in result.plan.note["before"]] == ["scatter"]
    assert result.report["settings"]["options"]["knockoffs"].endswith(":black_images")
    kept = result.network.get_submodule("1.main.2.scatter").index
    assert 0 < len(kept) < 8
    again = rebuild(
        network, result.run_folder / "plan.json", result.run_folder / "pruned.safetensors"
    )
    assert torch.equal(again(example()), result.network(example()))


def test_planted_filters_cannot_be_told_by_size_or_scale() -> None:
    images, targets = labelled(96, 0)
    loader = [(images[i : i + 32, :1], targets[i : i + 32]) for i in (0, 32, 64)]
    data = Data(loader, loader, CLASSES, images[:1, :1], "rows")
    training = TrainingSettings(epochs=1, learning_rate=0.01, accelerator="cpu")
    network, planted = train_planted(data, training, seed=1)
    assert not any(module._forward_hooks for module in network.modules())
    for name, mask in planted.items():
        weight = network.get_submodule(name).weight.flatten(1).abs().sum(1)
        place = name.rpartition(".")[2]
        gamma = network.get_submodule(f"features.{int(place) + 1}").weight
        assert 0.3 < mask.float().mean() < 0.37
        for values in (weight, gamma):
            apart = (values[mask][:, None] - values[~mask][None]).abs().min(1).values
            assert apart.max() < 1e-5  # each is the copy of one of the others


def test_the_auc_of_a_layer_counts_pairs_in_order() -> None:
    space = trace(Plain(), example())
    planted = {
        "first": torch.tensor([True, False, False, True, False, False]),
        "second": torch.tensor([False, True, False, False]),
    }
    scores = torch.tensor([0.1, 0.5, 0.2, 0.3, 0.9, 0.4, 0.0, 1.0, 0.0, 0.0])
    aucs = layer_aucs(space, scores, planted)
    assert aucs == {"first": pytest.approx(7 / 8), "second": 0.0}
