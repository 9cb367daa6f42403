"""The paper's plain LPNet: an MLP from the vector of widths to latency, kept for comparison.

W-Gates paper (arXiv 2007.02066), section 3.2.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.lpnet.data import LatencyData

_HIDDEN = 64
_STEPS, _FURTHER_STEPS = 800, 200
_RATE, _FURTHER_RATE = 3e-3, 1e-3
_WEIGHT_DECAY = 3e-2


class MlpStructure:
    """Two hidden layers of 64; trained on the mean squared error of log latency."""

    name = "mlp"

    def __init__(self, space: ChannelSpace) -> None:
        self._full = torch.tensor(space.full_widths, dtype=torch.float64)
        self.space = space
        self.seed = 0
        self.scale = torch.ones((), dtype=torch.float64)
        with torch.random.fork_rng(devices=[]):  # loading or copying must not move the user's RNG
            self.network = self._fresh(0)

    def _fresh(self, seed: int) -> nn.Sequential:
        torch.default_generator.manual_seed(seed)
        layers: list[nn.Module] = []
        size = len(self._full)
        for hidden in (_HIDDEN, _HIDDEN):
            layers += [nn.Linear(size, hidden), nn.SiLU()]
            size = hidden
        last = nn.Linear(size, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return nn.Sequential(*layers, last).double()

    @classmethod
    def fit(cls, space: ChannelSpace, data: LatencyData, *, seed: int) -> MlpStructure:
        self = cls(space)
        self.seed = seed
        with torch.random.fork_rng(devices=[]):
            self.network = self._fresh(seed)
        self.scale = data.latency_ms.log().mean().exp()
        self._descend(data, steps=_STEPS, rate=_RATE)
        return self

    def conditioned(self, data: LatencyData) -> MlpStructure:
        """A copy trained a little further on all of `data`."""
        twin = copy.deepcopy(self)
        twin._descend(data, steps=_FURTHER_STEPS, rate=_FURTHER_RATE)
        return twin

    def predict(self, widths: Tensor) -> Tensor:
        """Widths (..., G) -> ms (...)."""
        return self.scale * torch.exp(
            self.network(2.0 * widths.double() / self._full - 1.0)[..., 0]
        )

    def deviation(self, widths: Tensor) -> Tensor:
        """An MLP does not know how sure it is: widths (..., G) -> its own prediction (...)."""
        return self.predict(widths)

    def without(self, data: LatencyData, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and deviation (N,) of each measurement, had its part of `data` not been seen."""
        mean = torch.empty(len(data), dtype=torch.float64)
        every = torch.arange(len(data))
        for part in parts:
            rest = every[~torch.isin(every, part)]
            mean[part] = self.fit(self.space, data[rest], seed=self.seed).predict(data.widths[part])
        return mean, mean

    def tensors(self) -> dict[str, Tensor]:
        """All that `from_tensors` needs."""
        return {"scale": self.scale, **self.network.state_dict()}

    @classmethod
    def from_tensors(cls, space: ChannelSpace, tensors: Mapping[str, Tensor]) -> MlpStructure:
        """Raises KeyError or RuntimeError where the tensors are not whole."""
        self = cls(space)
        rest = dict(tensors)
        self.scale = rest.pop("scale")
        self.network.load_state_dict(rest)
        self.network.requires_grad_(False)
        return self

    def _descend(self, data: LatencyData, *, steps: int, rate: float) -> None:
        self.network.requires_grad_(True)
        optimizer = torch.optim.AdamW(self.network.parameters(), rate, weight_decay=_WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with torch.enable_grad():
            for _ in range(steps):
                loss = (self.predict(data.widths).log() - data.latency_ms.log()).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        self.network.requires_grad_(False)
