"""SCOP as a strategy: betas learn in a phase of training, the weights stay as they are."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wgates_plugin.calling import ExampleInputs, copied
from wgates_plugin.catalogue.factories import load_factory
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.errors import ConfigError
from wgates_plugin.strategies import budgeting
from wgates_plugin.strategies.base import Decision, Strategy, Task
from wgates_plugin.strategies.budgeting import threshold_widths
from wgates_plugin.strategies.dependence import check_all_see
from wgates_plugin.strategies.phase import run_phase
from wgates_plugin.strategies.scop.branches import coupled_by_sums, scatter_steps
from wgates_plugin.strategies.scop.gaussian import GaussianKnockoffs
from wgates_plugin.strategies.scop.knockoffs import (
    GAUSSIAN,
    KnockoffSource,
    collect_images,
    is_source_name,
    main_images,
    make_source,
)
from wgates_plugin.strategies.scop.two_stream import Betas, TwoStream, norms_behind
from wgates_plugin.strategies.without_learning import largest_filters
from wgates_plugin.training import StepContext
from wgates_plugin.training.as_found import random_state_kept, seed_epoch
from wgates_plugin.training.evaluation import to_device
from wgates_plugin.transforms import Step, apply_steps
from wgates_plugin.transforms.scatter import Scatter

logger = logging.getLogger("wgates_plugin")

QUOTAS = ("budget", "uniform")
RESIDUALS = ("coupled", "scatter")


@dataclass(frozen=True)
class ScopSettings:
    """How SCOP compares real with knockoff features; the paper's values where it has any.

    Attributes:
        learning_rate: Adam's, for the betas. adam_betas: its own decay rates.
        knockoffs: "gaussian" (fitted images that share nothing with the real one), "gaussian-pixel"
            (equicorrelated knockoffs of single pixels), "package.module:callable", or a callable
            that turns a batch of real images into one of knockoffs.
        knockoff_images: training images that the fit sees. knockoff_rank: directions it keeps.
        quota: "budget" ranks all groups together (ours); "uniform" takes the same share of each,
            as in the paper.
        residual: "coupled" cuts the channels of a residual stream through all its layers (ours);
            "scatter" prunes the last convolution of each branch on its own and adds what it has
            left to the stream's full width, as in the paper's code; branches that end in something
            else stay coupled, and it is refused where no other ones are.
    """

    learning_rate: float = 0.004
    adam_betas: tuple[float, float] = (0.5, 0.9)
    knockoffs: str | Callable[[Tensor], Tensor] = "gaussian"
    knockoff_images: int = 512
    knockoff_rank: int = 256
    quota: str = "budget"
    residual: str = "coupled"

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.learning_rate < math.inf:
            problems.append(f"learning_rate is {self.learning_rate!r}, needs a positive number")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            problems.append(
                f"adam_betas is {self.adam_betas!r}, needs two numbers from 0 to under 1"
            )
        if isinstance(self.knockoffs, str) and not is_source_name(self.knockoffs):
            problems.append(
                f"knockoffs is {self.knockoffs!r}, choose from {', '.join(GAUSSIAN)}, or name a "
                "callable as package.module:callable"
            )
        for name, least in (("knockoff_images", 2), ("knockoff_rank", 1)):
            if getattr(self, name) < least:
                problems.append(f"{name} is {getattr(self, name)!r}, needs {least} or more")
        if self.quota not in QUOTAS:
            problems.append(f"quota is {self.quota!r}, choose from {', '.join(QUOTAS)}")
        if self.residual not in RESIDUALS:
            problems.append(f"residual is {self.residual!r}, choose from {', '.join(RESIDUALS)}")
        if problems:
            raise ConfigError("SCOP settings", problems)


class ScopStrategy(Strategy):
    """Filters whose real features the network prefers to knockoff features."""

    settings_type = ScopSettings
    trains_weights: ClassVar[bool] = False
    summary = "filters compared with a control group of knockoff features (Tang et al., 2020)"
    settings: ScopSettings

    def __init__(self, settings: ScopSettings | None = None) -> None:
        super().__init__(settings)
        source = self.settings.knockoffs
        if isinstance(source, str) and source not in GAUSSIAN:
            try:
                load_factory(source)
            except ConfigError as error:
                problems = [f"knockoffs is {source!r}: {problem}" for problem in error.problems]
                raise ConfigError("SCOP settings", problems) from error

    def prepare(self, network: nn.Module, example_inputs: ExampleInputs) -> list[Step]:
        if self.settings.residual != "scatter":
            return []
        steps = scatter_steps(network, example_inputs)
        parted = apply_steps(copied(network), steps)
        left = coupled_by_sums(DependencyTrace(parted, example_inputs))
        words = (
            "sums of branches that end in something else than a convolution or its norm couple "
            f"groups ({', '.join(f'`{name}`' for name in left[:6])}{', ...' if left[6:] else ''})"
        )
        if left and not steps:
            raise ConfigError(
                "SCOP settings", [f'residual is "scatter", but {words}; choose residual "coupled"']
            )
        if left:
            logger.warning("scop: %s; they stay coupled, all other branches are scattered", words)
        return steps

    def decide(self, task: Task) -> Decision:
        budgeting.check_feasible(task.space, task.budget, task.grid)
        if task.epochs == 0:  # all betas would be one half, and every score zero
            return largest_filters(task, "scop")
        settings, network = self.settings, task.network
        betas = Betas(network, task.space)
        inputs: ExampleInputs = to_device(task.example_inputs, task.device)
        check_all_see(network, task.space, inputs, main_images(inputs), "scop")
        norms = norms_behind(network, betas.names, inputs)
        monitor, history = self._learn(task, betas)
        scores = unit_scores(task.space, betas, norms)
        if settings.quota == "uniform":
            widths = budgeting.uniform_widths(task.space, task.budget, task.grid)
        else:
            start = threshold_widths(task.space, scores, task.budget, task.grid)
            widths = budgeting.fit_to_budget(task.space, scores, start, task.budget, task.grid)
        facts = {
            **_facts(settings, betas, norms),
            "scattered_branches": [
                name for name, module in network.named_modules() if isinstance(module, Scatter)
            ],
            "coupled_groups": [
                group.name for group in task.space.groups if len(group.slots_as("producer")) > 1
            ],
        }
        return Decision(network, scores, widths, monitor, history, facts)

    def _learn(
        self, task: Task, betas: Betas
    ) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
        """The phase; the network's values and flags are afterwards what they were."""
        settings = self.settings
        streams = TwoStream(task.network, betas, fitted_source(task, settings))
        adam = torch.optim.Adam(
            betas.parameters(), lr=settings.learning_rate, betas=settings.adam_betas
        )

        def step(context: StepContext) -> dict[str, float]:
            adam.step()
            betas.clamp(task.space.total_units)
            # The trainer's own optimizer has nothing left to do.
            adam.zero_grad(set_to_none=True)
            return {"step": float(context.step), "mean_beta": betas.mean(task.space.total_units)}

        with _frozen(task.network):
            trainer = task.trainer(streams, "scop", total_epochs=task.epochs)
            streams.attach()
            try:
                monitor = run_phase(self, task, trainer, {"betas": betas, "adam": adam}, step)
            finally:
                streams.detach()
        return monitor, trainer.history


def fitted_source(task: Task, settings: ScopSettings) -> KnockoffSource:
    """The knockoff source, from the same training images on every run and process."""
    with random_state_kept(torch.device("cpu"), task.train_loader):
        seed_epoch(task.seed, 0, torch.device("cpu"), task.train_loader)
        images = collect_images(task.train_loader, settings.knockoff_images)
    source = make_source(settings.knockoffs, images, rank=settings.knockoff_rank)
    return source.to(task.device) if isinstance(source, GaussianKnockoffs) else source


@torch.no_grad()
def unit_scores(space: ChannelSpace, betas: Betas, norms: dict[str, Any]) -> Tensor:
    """Scores (total_units,), on the CPU: `|gamma| (beta - (1 - beta))` of each filter.

    Coupled producers add up, and a filter without a norm of its own has a gamma of 1 (both ours).
    Each group is divided by its producers' mean |gamma|, so that groups can be compared (ours): it
    changes no order within a group, and a norm's scale says nothing about its layer.
    """
    total = torch.zeros(space.total_units + 1, dtype=torch.float64)
    scale = torch.zeros_like(total)
    for (name, units), beta in zip(betas.units.items(), betas.values, strict=True):
        gamma = getattr(norms.get(name), "weight", None)
        gamma = torch.ones_like(beta) if gamma is None else gamma.detach().abs()
        total.index_add_(0, units.cpu(), (gamma * (2 * beta - 1)).double().cpu())
        scale.index_add_(0, units.cpu(), gamma.double().cpu())
    scores = torch.empty(space.total_units, dtype=torch.float64)
    for index in range(len(space.groups)):
        mine = space.unit_slice(index)
        scores[mine] = total[mine] / scale[mine].mean().clamp_min(1e-12)
    return scores.float()


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """No parameter learns within; statistics, other buffers and flags are put back on leaving."""
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    network.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _facts(settings: ScopSettings, betas: Betas, norms: dict[str, Any]) -> dict[str, Any]:
    values = torch.cat([value.detach().flatten().cpu() for value in betas.values])
    source = settings.knockoffs
    return {
        "knockoffs": source if isinstance(source, str) else "user's generator",
        "residual": settings.residual,
        "quota": settings.quota,
        "filters_preferring_real": float((values > 0.5).double().mean()),
        "filters_preferring_knockoff": float((values < 0.5).double().mean()),
        "producers_without_norm": [name for name in betas.names if name not in norms],
    }
