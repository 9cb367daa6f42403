"""Which structure, prior, network and runtime go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.lpnet.structure import STRUCTURES
from wgates_plugin.errors import ConfigError

if TYPE_CHECKING:
    from wgates_plugin.efficiency.lpnet.model import LPNet


def check_choice(
    space: ChannelSpace,
    structure: str,
    prior: LPNet | None,
    identity: Mapping[str, Any] | None = None,
) -> None:
    """Raises ConfigError where structure, prior, network and runtime do not go together."""
    problems = []
    if structure not in STRUCTURES:
        problems.append(f"structure `{structure}`: known: {', '.join(STRUCTURES)}")
    if prior is not None and (structure, prior.structure) != ("layers", "layers"):
        problems.append("prior: only the structure `layers` adapts, and only from `layers`")
    if prior is not None and prior.fingerprint != space.fingerprint:
        problems.append(
            f"prior: fitted for another network (fingerprint {prior.fingerprint}, this one has "
            f"{space.fingerprint})"
        )
    if prior is not None and prior.identity and identity and prior.identity == dict(identity):
        problems.append(
            "prior: fitted on this very runtime, device, thread count and input shape; it is no "
            "prior but the same thing. Leave it out and go on with the samples it was fitted to "
            "(`--samples-file`)"
        )
    if problems:
        raise ConfigError("LPNet", problems)
