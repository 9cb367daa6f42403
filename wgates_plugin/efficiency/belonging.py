"""Whether a budget's models were made for this network, and for this shape of its inputs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from wgates_plugin.efficiency.base import Budget
from wgates_plugin.errors import ConfigError

if TYPE_CHECKING:
    from wgates_plugin.calling import ExampleInputs
    from wgates_plugin.channels import ChannelSpace


def check_models(space: ChannelSpace, budget: Budget) -> None:
    """Refuse limits whose models were made for another network, before they predict anything.

    Raises:
        ConfigError: names them and both fingerprints.
    """
    foreign = []
    for limit in budget.limits:
        theirs = getattr(limit.model, "fingerprint", space.fingerprint)
        if theirs != space.fingerprint:
            foreign.append(
                f"limit on {limit.model.name}: its model was made for another network (fingerprint "
                f"{theirs}, this one has {space.fingerprint}), or with other ignored layers; make it "
                "from this network's channel space, an LPNet with `wgates fit-lpnet` and the same input "
                "shape, and keep a layer whole by `floors={group name: its width}` rather than by "
                "`ignored_layers`"
            )
    if foreign:
        raise ConfigError("budget", foreign)


def check_inputs(budget: Budget, example_inputs: ExampleInputs, *, stacklevel: int = 3) -> None:
    """Warn of an LPNet measured on another batch size than the example's.

    A training batch is often given where one inference was meant, so this is no error: the target
    then holds for the batch size that LPNet was measured on.

    Raises:
        ConfigError: shapes differ in more than the batch.
    """
    from wgates_plugin.latency.base import named_tensors

    identities = [getattr(limit.model, "identity", None) for limit in budget.limits]
    measured = [identity.get("inputs") or {} for identity in identities if identity]
    if not any(measured):
        return
    here = {name: list(tensor.shape) for name, tensor in named_tensors(example_inputs).items()}
    for inputs in measured:
        shapes = [list(shape) for shape in inputs.values()]
        given = [here[name] for name in inputs] if set(inputs) == set(here) else [*here.values()]
        if not shapes or shapes == given:
            continue
        if [shape[1:] for shape in shapes] != [shape[1:] for shape in given]:
            raise ConfigError(
                "budget",
                [
                    f"LPNet was measured on inputs of shape {_words(shapes)}, the example inputs "
                    f"are {_words(given)}; fit one for this shape (`wgates fit-lpnet "
                    "--input-shape`)"
                ],
            )
        warnings.warn(
            f"LPNet was measured on inputs of shape {_words(shapes)}, the example inputs are "
            f"{_words(given)}: the target is for a batch of {shapes[0][0]}, not of {given[0][0]}. "
            "Give example inputs of the measured shape, or fit an LPNet for this batch size "
            "(`wgates fit-lpnet --input-shape`)",
            stacklevel=stacklevel,
        )


def _words(shapes: Sequence[Sequence[int]]) -> str:
    return " and ".join(",".join(map(str, shape)) for shape in shapes)
