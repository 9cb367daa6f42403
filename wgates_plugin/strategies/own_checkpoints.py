"""Checkpoints that know whose they are: the state of another run is refused, not gone on from."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from wgates_plugin.callables import content_digest, name_of
from wgates_plugin.errors import RunFolderError
from wgates_plugin.strategies.base import Checkpoints, Strategy, Task

_ANEW = (
    "give it checkpoints of its own (`checkpoints=InMemory()`); in a run folder delete the file below "
    "`stages`, and the phase is done again"
)


class OwnCheckpoints:
    """Checkpoints as one run sees them: what it saves, it marks as its own.

    Attributes:
        identity: what its states depend on, as plain values by name; "weights" among them.
    """

    def __init__(self, held: Checkpoints, identity: dict[str, Any]) -> None:
        self._held, self.identity = held, identity

    def save_state(self, name: str, state: dict[str, Any]) -> None:
        self._held.save_state(name, {**state, "identity": self.identity})

    def load_state(self, name: str) -> dict[str, Any] | None:
        """The state called `name`, or None when there is none yet.

        Raises:
            RunFolderError: it is another run's; names what of the identity differs.
        """
        state = self._held.load_state(name)
        if state is None:
            return None
        mine = self.identity
        # An older one tells nothing, or nothing of weights: its run folder knows whose it is.
        theirs = state.get("identity", mine)
        if not isinstance(theirs, dict):
            theirs = {"strategy": repr(theirs)}
        theirs = {"weights": mine["weights"], **theirs}
        changed = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
        if "strategy" in changed:  # whose settings have nothing to do with these
            changed = [key for key in changed if not key.startswith("settings.")]
        if "network" in changed:  # no weights are those of another structure
            changed = [key for key in changed if key != "weights"]
        if changed:
            raise RunFolderError(
                f"checkpoint `{name}`: belongs to another run (different: {', '.join(changed)}), which "
                f"this one must not go on from; {_ANEW}"
            )
        return state


def own_checkpoints(strategy: Strategy, task: Task) -> OwnCheckpoints:
    """A task's checkpoints as one strategy sees them.

    Their identity is the strategy, its settings, and the task's network, weights, seed and epochs. To be
    made before anything learns: a callable among the settings may change by being called, too.
    """
    kind = type(strategy)
    identity = {
        "strategy": f"{kind.__module__}:{kind.__qualname__}",
        "network": task.space.fingerprint,
        "weights": task.weights_digest,
        "seed": task.seed,
        "epochs": task.epochs,
        **told_fields("settings", strategy.settings),
    }
    return OwnCheckpoints(task.checkpoints, identity)


def told_fields(prefix: str, settings: Any) -> dict[str, str]:
    """A dataclass of settings as "prefix.field" -> words that any process finds for the value, without
    fields of None, which ask for nothing, and those that no words can tell from another."""
    named = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {
        f"{prefix}.{name}": told
        for name, value in named.items()
        if (told := _told(value)) is not None
    }


def _told(value: Any) -> str | None:
    if value is None:
        return None
    if callable(value):
        return name_of(value)
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        return content_digest(value) or None
