"""What both `StrategyPruner`s ask of a strategy's data and training, before they look at the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from wgates_plugin.calling import ExampleInputs, copied
from wgates_plugin.option_checks import is_whole
from wgates_plugin.strategies.base import Strategy
from wgates_plugin.strategies.criteria import CRITERIA
from wgates_plugin.training.settings import TrainingSettings


def data_problems(strategy: str, data: Any, *, traced_on: bool = False) -> list[str]:
    """Criteria by weights alone look at no data; all others need batches and their number.

    With `traced_on`, every strategy needs one, for the network is traced on the first batch.
    """
    needs_none = strategy in CRITERIA and not CRITERIA[strategy].needs_data
    if needs_none and not traced_on:
        return []
    try:
        count = len(data)
    except TypeError:
        count = None
    if isinstance(data, Iterable) and (count or (needs_none and count is None)):
        return []
    got = "no batches" if count == 0 else f"{type(data).__name__}"
    if needs_none:
        return [f"data: got {got}; give batches (inputs, targets), or `example_inputs` to trace on"]
    return [f"data: got {got}; `{strategy}` needs batches (inputs, targets), with a length"]


def preparation_problems(
    strategy: Strategy,
    name: str,
    options: Mapping[str, Any] | None,
    model: nn.Module,
    example_inputs: ExampleInputs,
) -> list[str]:
    """Strategies that change modules before the network is traced need a door that traces later."""
    if not strategy.prepare(copied(model), example_inputs):
        return []
    return [
        f"options {dict(options or {})}: `{name}` would have to change the network's modules before it "
        "is traced; use `prune_to_target`, or leave the option out"
    ]


def learning_problems(*, epochs: Any, seed: Any, training: Any, loss: Any) -> list[str]:
    """What is wrong with the words about a strategy's own phase, one line each."""
    problems = [
        f"{word} {value!r}: needs a whole number from 0"
        for word, value in (("epochs", epochs), ("seed", seed))
        if not is_whole(value, least=0)
    ]
    if training is not None and not isinstance(training, TrainingSettings):
        problems.append(f"training {training!r}: needs TrainingSettings")
    if loss is not None and not callable(loss):
        problems.append(f"loss {loss!r}: needs a function of logits and targets")
    return problems
