"""Checkpoints that know whose they are: the state of another decision is refused, not gone on from."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from wgates_plugin.callables import content_digest, name_of
from wgates_plugin.errors import RunFolderError
from wgates_plugin.strategies.base import Strategy, Task

_ANEW = (
    "give the task checkpoints of its own (`checkpoints=InMemory()`); in a run folder delete the file "
    "below `stages`, and the phase is done again"
)


class OwnCheckpoints:
    """A task's checkpoints as one strategy sees them: what it saves, it marks as its own.

    Attributes:
        identity: what its states depend on, as plain values: the strategy, its settings, and the
            task's network, seed and epochs.
    """

    def __init__(self, strategy: Strategy, task: Task) -> None:
        self._held = task.checkpoints
        kind, settings = type(strategy), strategy.settings
        # Told once, before anything runs: a callable among the settings may change by being called.
        self.identity: dict[str, Any] = {
            "strategy": f"{kind.__module__}:{kind.__qualname__}",
            "network": task.space.fingerprint,
            "seed": task.seed,
            "epochs": task.epochs,
            **{
                f"settings.{name}": told
                for name in (field.name for field in dataclasses.fields(settings))
                if (told := _told(getattr(settings, name))) is not None
            },
        }

    def save_state(self, name: str, state: dict[str, Any]) -> None:
        self._held.save_state(name, {**state, "identity": self.identity})

    def load_state(self, name: str) -> dict[str, Any] | None:
        """The state called `name`, or None when there is none yet.

        Raises:
            RunFolderError: it is another strategy's, or of other settings, another network, seed or
                number of epochs; names what differs.
        """
        state = self._held.load_state(name)
        if state is None:
            return None
        mine = self.identity
        theirs = state.get(
            "identity", mine
        )  # an older one has none: its run folder knows whose it is
        if not isinstance(theirs, dict):
            theirs = {"strategy": repr(theirs)}
        changed = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
        if "strategy" in changed:  # whose settings have nothing to do with these
            changed = [key for key in changed if not key.startswith("settings.")]
        if changed:
            raise RunFolderError(
                f"checkpoint `{name}`: belongs to another decision (different: "
                f"{', '.join(changed)}), which this one must not go on from; {_ANEW}"
            )
        return state


def _told(value: Any) -> str | None:
    """A setting in words that any process finds for it; None for one that asks for nothing, and for one
    that no words can tell from another."""
    if value is None:
        return None
    if callable(value):
        return name_of(value)
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        return content_digest(value) or None
