"""Changes of a network other than removing channels.

Those that change its modules are recorded in the plan's note as steps, `{"transform": name, ...}`, so
that `rebuild` can repeat them: "before" the channels are removed, and "after".
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from wgates_plugin.errors import PlanError

STRUCTURAL: dict[str, str] = {
    "constant_branches": "wgates_plugin.transforms.constant_branches",
    "scatter": "wgates_plugin.transforms.scatter",
}
"""Name -> module with `apply(network, **arguments) -> network`, in place."""

Step = Mapping[str, Any]


def apply_steps(network: nn.Module, steps: Iterable[Step]) -> nn.Module:
    """Carry out recorded steps on `network`, in place where possible; returns the changed network.

    Raises:
        PlanError: an unknown step, or one that does not fit the network.
    """
    if isinstance(steps, str | bytes | Mapping) or not isinstance(steps, Iterable):
        raise PlanError(f"plan: its steps are {steps!r:.60}, not a list; make the plan anew")
    for step in steps:
        if not isinstance(step, Mapping) or not all(isinstance(key, str) for key in step):
            raise PlanError(
                f"plan: a step is {step!r:.60}, not a mapping with a `transform`; make the plan anew"
            )
        name = step.get("transform")
        if not isinstance(name, str) or name not in STRUCTURAL:
            raise PlanError(
                f"plan: step `{name}` is unknown; known: {', '.join(STRUCTURAL) or 'none'}; "
                "the plan is from another version of this package"
            )
        arguments = {key: value for key, value in step.items() if key != "transform"}
        try:
            network = importlib.import_module(STRUCTURAL[name]).apply(network, **arguments)
        except (TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(
                f"plan: step `{name}` does not fit this network ({error}); give the network that "
                "the plan was made for"
            ) from error
    return network
