"""What makes a run this run, as far as it is known before the network is: told when it is resumed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from wgates_plugin.callables import name_of
from wgates_plugin.run_folder import first_batch_digest
from wgates_plugin.strategies import make_strategy
from wgates_plugin.strategies.base import option_names
from wgates_plugin.targets import LatencyTarget, PruningSettings, Target
from wgates_plugin.training.launch import batches_of


def identity_of_request(
    targets: Sequence[Target],
    settings: PruningSettings,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
) -> dict[str, Any]:
    """Targets, data and settings as plain values; the order of targets has no meaning.

    Of the training data, whose batches may be drawn and augmented at random, only their number.

    Raises:
        TrainingError: a loader does not know its length.
    """
    in_order = sorted(targets, key=lambda target: not isinstance(target, LatencyTarget))
    return {
        "targets": [{type(target).__name__: vars(target)} for target in in_order],
        "data": {
            "train_batches": batches_of(train_loader),
            "val_batches": batches_of(val_loader),
            "first_val_batch": first_batch_digest(val_loader),
        },
        "settings": {**settings_as_json(settings), "options": options_in_full(settings)},
    }


def options_in_full(settings: PruningSettings) -> dict[str, Any]:
    """The strategy's settings as plain values, those left at their defaults included: these change.

    Without the channel grid, which is the job's and no strategy's, and without those of None, which ask
    for nothing: a run from before there was such an option is the same.
    """
    strategy = make_strategy(settings.strategy, settings.options)
    found = settings_as_json(strategy.settings)
    names = option_names(type(strategy))
    return {name: found[name] for name in names if found[name] is not None}


def settings_as_json(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as plain values; a callable among the options by its `name_of`."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings), default=name_of))
    return plain
