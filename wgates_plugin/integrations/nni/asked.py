"""What a pruner is asked for, beside its config list: checked against it, and made into a budget."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget, EfficiencyModel, Limit
from wgates_plugin.efficiency.counts import (
    MacsModel,
    ParametersModel,
    efficiency_problems,
    model_of,
)
from wgates_plugin.errors import ConfigError
from wgates_plugin.integrations.nni.choices import LayerChoice
from wgates_plugin.integrations.nni.selection import Selection, select_groups
from wgates_plugin.option_checks import is_whole
from wgates_plugin.strategies.budgeting import nothing_to_remove
from wgates_plugin.strategies.wgates import WGatesSettings
from wgates_plugin.targets import LatencyTarget, MacsTarget, ParametersTarget, Target

Efficiency = EfficiencyModel | Budget | Callable[[ChannelSpace], EfficiencyModel]


def ratios_decide(efficiency: object, target: object) -> bool:
    """Whether the config's ratios say how much goes, rather than a target."""
    return target is None and not isinstance(efficiency, Budget)


def contradictions(
    choices: dict[str, LayerChoice], efficiency: object, target: object, *, grid: object = None
) -> list[str]:
    by_ratio = ratios_decide(efficiency, target)
    problems = [] if efficiency is None else efficiency_problems(efficiency)
    if grid is not None and not is_whole(grid, least=1):
        problems.append(f"grid is {grid!r}, needs a whole number from 1")
    ratios = [name for name, choice in choices.items() if choice.ratio is not None]
    exact = [name for name in ratios if choices[name].exact]
    if by_ratio and exact and is_whole(grid, least=2):
        problems.append(
            f"grid {grid} together with sparse_ratio of {_shown(exact)}: a ratio says to the channel "
            "how much a layer loses; drop one of them, or give a target or a global_group_id"
        )
    if not by_ratio and ratios:
        problems.append(
            f"sparse_ratio of {_shown(ratios)} together with a target: the target decides how much "
            "each layer loses; drop one of them (max_sparse_ratio and min_sparse_ratio may stay)"
        )
    if by_ratio and efficiency is not None:
        problems.append("efficiency without a target: give `target` in the model's unit")
    if isinstance(efficiency, Budget) and target is not None:
        problems.append("a Budget holds its targets: leave out `target`")
    if isinstance(target, LatencyTarget) and efficiency is None:
        problems.append("a LatencyTarget needs an `LPNet` of this network as `efficiency`")
    if isinstance(target, (MacsTarget, ParametersTarget)) and efficiency is not None:
        problems.append(f"{type(target).__name__} says what is limited: leave out `efficiency`")
    if by_ratio and choices and not ratios:
        problems.append(
            "neither `target` nor any sparse_ratio: say how much is to go, for the whole network or "
            "in the config list"
        )
    return problems


def _shown(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:3]) + " ..." * (len(names) > 3)


def duration_problems(
    training_steps: object, evaluator: object, settings: WGatesSettings
) -> list[str]:
    problems = []
    if training_steps is not None and not is_whole(training_steps, least=0):
        problems.append(f"training_steps is {training_steps!r}, needs a whole number from 0")
    if evaluator is None and training_steps != 0:
        problems.append(
            "no evaluator: gates learn in its training; give one, or training_steps=0 to decide by "
            "filter norms"
        )
    if settings.start == "open" and not training_steps:
        problems.append(
            'settings start="open" slide the target over the phase: give training_steps'
        )
    return problems


def training_problems(
    max_steps: object, max_epochs: object, training_steps: int | None, evaluator: object
) -> list[str]:
    """What is wrong with the duration that `compress` is given."""
    given = {"max_steps": max_steps, "max_epochs": max_epochs}
    given = {word: value for word, value in given.items() if value is not None}
    least = 0 if training_steps == 0 else 1  # which decides by norms, and may train on after that
    problems = [
        f"{word} is {value!r}, needs a whole number from {least}"
        for word, value in given.items()
        if not is_whole(value, least=least)
    ]
    if any(given.values()) and evaluator is None:
        problems.append(
            f"{', '.join(given)}: nothing is trained without an evaluator; leave the duration out, or "
            "give the pruner an evaluator"
        )
    if not given and training_steps is None:
        problems.append(
            "how long may the gates learn? give `training_steps`, `max_steps` or `max_epochs`"
        )
    if isinstance(max_steps, int) and 0 < max_steps < (training_steps or 0):
        problems.append(f"max_steps {max_steps} end before training_steps {training_steps}")
    return problems


def checked_selection(
    subject: str, space: ChannelSpace, choices: dict[str, LayerChoice], by_ratio: bool
) -> Selection:
    selection = select_groups(space, choices, by_ratio=by_ratio)
    if not selection.chosen and not selection.problems:
        why = "; ".join(f"`{name}`: {reason}" for name, reason in selection.left_out.items())
        selection.problems.append(f"no layer that the config names can be pruned ({why})")
    if selection.problems:
        raise ConfigError(subject, selection.problems)
    return selection


def budget_of(
    subject: str,
    space: ChannelSpace,
    selection: Selection,
    efficiency: Efficiency | None,
    target: float | Target | None,
) -> Budget:
    """What the config's ratios, or efficiency and target, come to."""
    if isinstance(efficiency, Budget):
        return efficiency
    full = torch.tensor(space.full_widths, dtype=torch.float64)
    if target is None:
        macs = MacsModel(space)
        # Ratios fix the widths between floors and caps; the largest of them set no limit of their own.
        largest = torch.tensor([group.cap for group in space.groups], dtype=torch.float64)
        return Budget.of(Limit(macs, float(macs(largest))), *selection.limits)
    model: EfficiencyModel
    if isinstance(target, ParametersTarget):
        model = ParametersModel(space)
    else:
        model = model_of(space, efficiency)
    if getattr(model, "fingerprint", space.fingerprint) != space.fingerprint:
        raise ConfigError(
            subject,
            [f"{model.name}: made for another network; make it from this network's channel space"],
        )
    if isinstance(target, (LatencyTarget, MacsTarget, ParametersTarget)):
        if isinstance(target, LatencyTarget) and target.bound == "upper":
            upper = getattr(model, "upper", None)
            model = upper() if upper is not None else model
        amount = target.resolve(float(model(full)))
    else:
        amount = target
    budget = Budget.of(Limit(model, amount))
    if why := nothing_to_remove(space, budget):
        warnings.warn(f"{subject}: {why}", stacklevel=4)
    return budget
