"""LPNet's interval as an efficiency model of its own: its upper end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from wgates_plugin.efficiency.lpnet.held_out import COVERAGE

if TYPE_CHECKING:
    from wgates_plugin.efficiency.lpnet.model import LPNet


@dataclass(frozen=True)
class UpperBound:
    """The latency that a measurement stays under with the upper half of LPNet's interval, ms."""

    lpnet: LPNet
    coverage: float = COVERAGE

    name, unit = "latency", "ms"

    @property
    def fingerprint(self) -> str:
        return self.lpnet.fingerprint

    @property
    def identity(self) -> dict[str, Any] | None:
        return self.lpnet.identity

    @property
    def grid(self) -> int:
        return self.lpnet.grid

    def __call__(self, widths: Tensor) -> Tensor:
        return self.lpnet.interval(widths, self.coverage)[1]
