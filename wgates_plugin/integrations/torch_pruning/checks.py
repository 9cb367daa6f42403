"""Everything wrong with the words of a pruner's constructor, before the network is traced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from wgates_plugin.integrations.torch_pruning.options import problems_of, schedule
from wgates_plugin.option_checks import is_whole
from wgates_plugin.strategies.criteria.refused import flaw_of
from wgates_plugin.strategies.criteria.repaired import HessianImportance, TaylorImportance
from wgates_plugin.strategies.wgates import WGatesSettings

_HEADS = (
    "attention heads are not pruned: removing some would leave the module's own head count behind "
    "(see the README on networks beyond CNNs)"
)
_STRENGTH = (
    "no coefficient weighs the budget here, its pressure is found while training "
    '(`settings=WGatesSettings(constraint="linear", alpha=...)` sets one)'
)
_PENALTY = "gates take the place of a norm penalty"
_WRAP = "wrap the network in a module whose forward takes the example inputs and returns the tensor"
_CONV_GROUPS = "conv groups are found by tracing and kept alike in every one"

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "customized_pruners": (
        (None, {}),
        "a gate cannot stand for the removal inside a layer it does not know; leave that layer out "
        "with `ignored_layers`",
    ),
    "forward_fn": ((None,), _WRAP),
    "output_transform": ((None,), _WRAP),
    "in_channel_groups": ((None, {}), _CONV_GROUPS),
    "out_channel_groups": ((None, {}), _CONV_GROUPS),
    "channel_groups": ((None, {}), _CONV_GROUPS),
    "num_heads": ((None, {}), _HEADS),
    "prune_num_heads": ((False,), _HEADS),
    "prune_head_dims": ((True,), _HEADS),
    "head_pruning_ratio": ((0.0,), _HEADS),
    "head_pruning_ratio_dict": ((None, {}), _HEADS),
    "ch_sparsity": ((None,), "renamed by torch-pruning; write `pruning_ratio`"),
    "ch_sparsity_dict": ((None, {}), "renamed by torch-pruning; write `pruning_ratio_dict`"),
    "reg": ((), _STRENGTH),
    "alpha": ((), _STRENGTH),
    "delta_reg": ((), _STRENGTH),
    "group_lasso": ((False,), _PENALTY),
    "bias": ((False,), _PENALTY),
}
"""Word -> (values that ask for nothing, why others cannot be honoured)."""


def refused_options(options: Mapping[str, Any]) -> list[str]:
    """One line per option that cannot be honoured, unknown ones included."""
    problems = []
    for name, value in options.items():
        if name not in REFUSED:
            problems.append(f"{name}: unknown option")
            continue
        neutral, reason = REFUSED[name]
        if not any(type(value) is type(n) and value == n for n in neutral):
            problems.append(f"{name}: {reason}")
    return problems


def ratio_problems(
    budget_given: bool,
    pruning_ratio: Any,
    by_module: Mapping[Any, float] | None,
    max_pruning_ratio: Any,
    iterative_steps: Any,
    isomorphic: bool,
    global_pruning: bool,
) -> list[str]:
    """Everything wrong with the ratio words, before the network is looked at."""
    problems = []
    if budget_given:
        given = {
            "pruning_ratio": pruning_ratio is not None,
            "pruning_ratio_dict": bool(by_module),
            "isomorphic": isomorphic,
            "global_pruning": global_pruning,
        }
        problems += [
            f"{name}: the budget decides every width; give either a target or ratios"
            for name, there in given.items()
            if there
        ]
    named = {"pruning_ratio": pruning_ratio, "max_pruning_ratio": max_pruning_ratio}
    for value in (by_module or {}).values():
        named.setdefault(f"pruning_ratio_dict value {value!r}", value)
    problems += [
        f"{name} {value!r}: needs a number from 0 to 1"
        for name, value in named.items()
        if value is not None and not _is_share(value)
    ]
    if not is_whole(iterative_steps, least=1):
        problems.append(f"iterative_steps {iterative_steps!r}: needs a whole number from 1")
    return problems


def _is_share(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0.0 <= value <= 1.0


def limit_problems(min_channels: Any, min_fraction: Any, floors: Any, caps: Any) -> list[str]:
    """Everything wrong with floors and caps, before groups are known."""
    problems = []
    if not is_whole(min_channels, least=0):
        problems.append(f"min_channels {min_channels!r}: needs a whole number from 0")
    if not _is_share(min_fraction):
        problems.append(f"min_fraction {min_fraction!r}: needs a number from 0 to 1")
    for word, given in (("floors", floors), ("caps", caps)):
        if given is None:
            continue
        if not isinstance(given, Mapping):
            problems.append(f"{word} {given!r}: needs a mapping, group name -> channels")
            continue
        problems += [
            f"{word} of {name!r} {value!r}: needs a whole number from 1"
            for name, value in given.items()
            if not is_whole(value, least=1)
        ]
    return problems


def round_to_problems(round_to: Any) -> list[str]:
    """What is wrong with the channel multiple; None leaves it to the pruner."""
    if round_to is None or is_whole(round_to, least=1):
        return []
    return [f"round_to {round_to!r}: needs a whole number from 1"]


def schedule_problems(
    scheduler: Any, pruning_ratio: Any, by_module: Mapping[Any, float] | None, steps: Any
) -> list[str]:
    """What is wrong with the scheduler, for every ratio that it will be asked for."""
    if not callable(scheduler):
        return [
            f"iterative_pruning_ratio_scheduler {scheduler!r}: needs a function (ratio, steps) -> "
            "ratios after each step"
        ]
    if not is_whole(steps, least=1):
        return []
    goals = [1.0 if pruning_ratio is None else pruning_ratio, *(by_module or {}).values()]
    checks = [
        lambda goal=goal: schedule(scheduler, goal, steps)
        for goal in dict.fromkeys(goal for goal in goals if _is_share(goal))
    ]
    return problems_of(*checks)


def importance_problems(network: nn.Module, importance: Any) -> list[str]:
    """Why an importance can give no scores, before it is asked."""
    if importance is None:
        return []
    name = type(importance).__name__
    if not callable(importance):
        return [f"importance {name}: is not callable; needs a torch-pruning importance, or None"]
    if reason := flaw_of(importance):
        return [f"importance {name}: {reason}"]
    taken = any(parameter.grad is not None for parameter in network.parameters())
    if isinstance(importance, TaylorImportance) and not taken:
        return [
            f"importance {name}: ranks by gradients, and the model has none; call "
            "`loss.backward()` on some batches before making the pruner"
        ]
    if isinstance(importance, HessianImportance) and not importance._accu_grad:
        return [
            f"importance {name}: ranks by squared gradients, and has none; call "
            "`loss.backward()` and its `accumulate_grad(model)` per sample before making the pruner"
        ]
    return []


def gate_problems(settings: WGatesSettings, importance: Any, steps: Any, average: Any) -> list[str]:
    """Everything wrong with what `WGatesPruner` is told of its gates."""
    problems = []
    if importance is not None and settings.start == "open":
        problems.append('importance: ranks where gates start, which start="open" leaves no say')
    if steps is not None and not is_whole(steps, least=1):
        problems.append(f"steps {steps!r}: needs a whole number from 1")
    if steps is None and settings.start == "open":
        problems.append(
            'steps None: start="open" slides the target over the gate phase; needs its length, '
            "a whole number from 1"
        )
    if average is not None and not callable(average):
        problems.append(f"average {average!r}: needs a function of the gates' gradient")
    return problems
