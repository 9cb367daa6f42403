"""ADMM: the structure as a constraint that training is pulled toward.

`min f(W) s.t. W in S` by rounds: some epochs of `min f(W) + rho/2 |W - Z + U|^2`, then
`Z <- Proj_S(W + U)`, `U <- U + W - Z` (Lin, Jiang, Wang 2021, section 3; Boyd et al. 2011, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin.transforms.unification.blocks import BlockGrid
from wgates_plugin.transforms.unification.projection import project
from wgates_plugin.transforms.unification.settings import UnificationSettings


class Admm:
    """Target `Z` and scaled dual `U` of every layer, and which round it is."""

    def __init__(
        self, network: nn.Module, grids: Mapping[str, BlockGrid], settings: UnificationSettings
    ) -> None:
        self.settings, self.grids = settings, grids
        self.weights = {name: network.get_parameter(name) for name in grids}
        self.round = 0
        self.dual = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.target = {name: self._projection(name) for name in grids}

    def _projection(self, name: str) -> Tensor:
        shifted = self.weights[name].detach() + self.dual[name]
        return project(shifted, self.grids[name], self.settings)[0]

    @property
    def rho(self) -> float:
        return self.settings.rho[min(self.round, len(self.settings.rho) - 1)]

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the gradient of `rho/2 |W - Z + U|^2` to the weights' gradients."""
        for name, weight in self.weights.items():
            if weight.grad is not None:
                pull = weight - self.target[name] + self.dual[name]
                weight.grad.add_(pull, alpha=self.rho)

    @torch.no_grad()
    def next_round(self) -> None:
        """New `Z` and `U`; `U` is scaled to the next `rho` (Boyd et al. 2011, section 3.4.1)."""
        old = self.rho
        for name, weight in self.weights.items():
            self.target[name] = self._projection(name)
            self.dual[name] += weight - self.target[name]
        self.round += 1
        for dual in self.dual.values():
            dual *= old / self.rho

    @torch.no_grad()
    def distance(self) -> float:
        """How far the weights are from the structure: `|W - Proj_S(W)| / |W|` over all layers."""
        off = total = 0.0
        for name, weight in self.weights.items():
            projected, _ = project(weight, self.grids[name], self.settings)
            off += float((weight - projected).square().sum())
            total += float(weight.square().sum())
        return (off / total) ** 0.5 if total else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"round": self.round, "target": self.target, "dual": self.dual}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.round = int(state["round"])
        for mine, stored in ((self.target, state["target"]), (self.dual, state["dual"])):
            for name in mine:
                mine[name] = stored[name].to(self.weights[name].device)
