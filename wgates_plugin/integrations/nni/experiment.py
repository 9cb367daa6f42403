"""Pruners by name, for the search space of an NNI experiment.

NNI has no registry of pruners: `nnictl algo register` takes tuners and the like, and an experiment's
YAML knows no pruner. What its documentation shows instead is a name in the search space that the trial
turns into an object; `PRUNERS` is that table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from nni.compression.base.compressor import Pruner
from nni.compression.pruning import FPGMPruner, L1NormPruner, L2NormPruner, TaylorPruner
from nni.compression.utils import Evaluator
from torch import nn

from wgates_plugin.calling import ExampleInputs
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget, EfficiencyModel, Limit, measured_grid
from wgates_plugin.efficiency.counts import model_of
from wgates_plugin.errors import ConfigError
from wgates_plugin.integrations.nni.choices import ConfigList
from wgates_plugin.integrations.nni.config import make_config
from wgates_plugin.integrations.nni.pruner import WGatesPruner
from wgates_plugin.integrations.nni.slim import FoldedSlimPruner
from wgates_plugin.integrations.nni.strategies import NEED_A_TARGET, StrategyPruner
from wgates_plugin.integrations.strategy_checks import data_problems
from wgates_plugin.strategies.budgeting import uniform_widths
from wgates_plugin.strategies.table import STRATEGIES
from wgates_plugin.strategies.wgates import WGatesSettings
from wgates_plugin.tracing import trace

TRAINING_STEPS = 100
"""Steps of pruners that learn, where the parameters do not say."""

KEYS = ("pruner", "target", "target_fraction", "sparse_ratio", "training_steps", "grid")


@dataclass(frozen=True)
class Order:
    """What a builder is given.

    Attributes:
        sparse_ratio: share of every layer's channels to remove; else the budget counts.
        training_steps: for pruners that learn.
    """

    model: nn.Module
    example_inputs: ExampleInputs
    evaluator: Evaluator
    training_steps: int
    sparse_ratio: float | None
    budget: Budget | None
    space: ChannelSpace
    grid: int
    data: Iterable[Any] | None


def _by_strategy(name: str) -> Callable[[Order], Pruner]:
    return lambda order: _strategy(name, order)


def _every_producer(order: Order) -> ConfigList:
    """The config of this package's own pruners, which find by themselves what is coupled."""
    ratio = {} if order.sparse_ratio is None else {"sparse_ratio": order.sparse_ratio}
    producers = [s.module for group in order.space.groups for s in group.slots_as("producer")]
    return [{"op_names": list(dict.fromkeys(producers)), **ratio}]


def _strategy(name: str, order: Order) -> Pruner:
    batches = len(order.data) if isinstance(order.data, Sized) else 1
    return StrategyPruner(
        order.model,
        _every_producer(order),
        name,
        () if order.data is None else order.data,  # of no use to criteria by weights alone
        epochs=max(1, round(order.training_steps / max(1, batches))),
        example_inputs=order.example_inputs,
        efficiency=order.budget,
        grid=order.grid,
    )


def _wgates(order: Order) -> Pruner:
    return WGatesPruner(
        order.model,
        _every_producer(order),
        order.evaluator,
        order.training_steps,
        example_inputs=order.example_inputs,
        efficiency=order.budget,
        settings=WGatesSettings(grid=order.grid),
    )


def _by_metric(kind: Callable[..., Pruner]) -> Callable[[Order], Pruner]:
    return lambda order: kind(order.model, _ratio_config(order))


def _by_training(kind: Callable[..., Pruner]) -> Callable[[Order], Pruner]:
    return lambda order: kind(
        order.model, _ratio_config(order), order.evaluator, training_steps=order.training_steps
    )


PRUNERS: dict[str, Callable[[Order], Pruner]] = {
    "wgates": _wgates,
    "l1": _by_metric(L1NormPruner),
    "l2": _by_metric(L2NormPruner),
    "fpgm": _by_metric(FPGMPruner),
    "taylor": _by_training(TaylorPruner),
    "slim": _by_training(FoldedSlimPruner),
}
OF_DATA = tuple(name for name in STRATEGIES if name not in PRUNERS)
"""Strategies of this package that decide on the data handed to `build_pruner`."""
PRUNERS |= {name: _by_strategy(name) for name in OF_DATA}


def build_pruner(
    parameters: Mapping[str, Any],
    *,
    model: nn.Module,
    evaluator: Evaluator,
    example_inputs: ExampleInputs,
    efficiency: EfficiencyModel | Callable[[ChannelSpace], EfficiencyModel] | None = None,
    data: Iterable[Any] | None = None,
) -> Pruner:
    """The pruner that an experiment's parameters name, ready for `compress()`.

    NNI's own pruners know ratios only; under a target they get one ratio for all layers, the
    smallest that the efficiency model finds sufficient.

    Args:
        parameters: `pruner`, a key of `PRUNERS`; one of `sparse_ratio`, `target` (in the unit of
            `efficiency`) and `target_fraction` (of what the untouched network costs); optionally
            `training_steps` (100) and, under a target, `grid`, the channel multiple that widths keep
            to (that of the widths which an `LPNet` has measured, otherwise 1).
        evaluator: for pruners that learn; its optimizer belongs to `model`.
        efficiency: what the target limits, such as an `LPNet`; by default MACs.
        data: batches (inputs, targets) with a length, for this package's other strategies; they
            learn for as many epochs of it as `training_steps` make, at least one.

    Raises:
        ConfigError: a parameter is unknown, missing or out of range; all at once.
        InfeasibleTargetError: no widths reach the target.
    """
    problems = _problems(parameters)
    if parameters.get("pruner") in OF_DATA:
        problems += data_problems(parameters["pruner"], data)
    if problems:
        raise ConfigError("experiment parameters", problems)
    space = trace(model, example_inputs)
    budget = _budget(space, parameters, efficiency)
    grid = parameters.get("grid") or (1 if budget is None else measured_grid(budget))
    order = Order(
        model,
        example_inputs,
        evaluator,
        parameters.get("training_steps", TRAINING_STEPS),
        parameters.get("sparse_ratio"),
        budget,
        space,
        grid,
        data,
    )
    return PRUNERS[parameters["pruner"]](order)


def _problems(parameters: Mapping[str, Any]) -> list[str]:
    problems = [
        f"`{key}` is unknown; known: {', '.join(KEYS)}" for key in parameters if key not in KEYS
    ]
    name = parameters.get("pruner")
    if name not in PRUNERS:
        problems.append(f"pruner is {name!r}; choose from {', '.join(PRUNERS)}")
    amounts = [key for key in ("sparse_ratio", "target", "target_fraction") if key in parameters]
    if len(amounts) != 1:
        found = ", ".join(amounts) or "none"
        problems.append(f"one of sparse_ratio, target and target_fraction is needed, got {found}")
    for key in amounts:
        value = parameters[key]
        most = 1.0 if key != "target" else float("inf")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < most:
            problems.append(f"{key} is {value!r}, needs a number above 0 and below {most:g}")
    if "sparse_ratio" in parameters:
        if name in NEED_A_TARGET:
            problems.append(NEED_A_TARGET[name])
        if parameters.get("grid", 1) != 1:
            problems.append(
                f"grid {parameters['grid']!r} together with sparse_ratio: a ratio says to the channel "
                "how much a layer loses; leave out grid, or give a target"
            )
    for key in ("training_steps", "grid"):
        value = parameters.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            problems.append(f"{key} is {value!r}, needs a whole number from 1")
    return problems


def _budget(
    space: ChannelSpace,
    parameters: Mapping[str, Any],
    efficiency: EfficiencyModel | Callable[[ChannelSpace], EfficiencyModel] | None,
) -> Budget | None:
    if "sparse_ratio" in parameters:
        return None
    model = model_of(space, efficiency)
    full = torch.tensor(space.full_widths, dtype=torch.float64)
    share = parameters.get("target_fraction")
    return Budget.of(
        Limit(model, parameters["target"] if share is None else share * float(model(full)))
    )


def _ratio_config(order: Order) -> ConfigList:
    """The config of a pruner that knows ratios only: uniform, and as small as the budget allows."""
    model, example_inputs = order.model, order.example_inputs
    if order.budget is None:
        return make_config(model, example_inputs, sparse_ratio=order.sparse_ratio)
    named = {entry["op_names"][0] for entry in make_config(model, example_inputs)}
    fixed = {group.name: group.channels for group in order.space.groups if group.name not in named}
    space = trace(model, example_inputs, floors=fixed, caps=fixed, verify=False)
    widths = uniform_widths(space, order.budget, order.grid)
    ratios = {}
    for group, width in zip(space.groups, widths, strict=True):
        closed = group.units - width // group.ties
        # Half a channel more, for NNI rounds the product down.
        ratios[group.name] = (closed + 0.5) / group.units if closed else 0.0
    return make_config(
        model,
        example_inputs,
        sparse_ratio={name: ratio for name, ratio in ratios.items() if name in named},
    )
