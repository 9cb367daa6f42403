"""LPNet kept up with the samples while they are taken: it says where to measure next."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.lpnet import LPNet
from wgates_plugin.efficiency.samples.file import SampleFile
from wgates_plugin.efficiency.sampling import Active


class Learner:
    """An LPNet in the making.

    Parameters are learned once, after the covering part; from then on the LPNet is only told what
    was measured since (`LPNet.refit`), which costs a fraction of it. The final fit is the caller's.

    Args:
        towards: widths that an optimiser would end at, by an LPNet; they are candidates too.

    Attributes:
        lpnet: as of the last batch; None during the covering part.
    """

    def __init__(
        self,
        space: ChannelSpace,
        *,
        seed: int,
        prior: LPNet | None = None,
        towards: Callable[[LPNet], Sequence[Sequence[int]]] | None = None,
    ) -> None:
        self.space, self.seed, self.prior = space, seed, prior
        self.towards = towards
        self.lpnet: LPNet | None = None

    def active(self, *, covering: int | None = None) -> Active:
        """Settings of the sampling. With a prior less needs to be covered before asking it."""
        if covering is None:
            covering = 16 if self.prior is not None else Active.covering
        return Active(
            fit=self.bring_up, uncertainty=self.spread, covering=covering, towards=self.destinations
        )

    def destinations(self) -> Sequence[Sequence[int]]:
        """Where an optimiser would go by the LPNet of now."""
        if self.towards is None or self.lpnet is None:
            return ()
        return self.towards(self.lpnet)

    def bring_up(self, file: SampleFile) -> None:
        """Let the LPNet know all usable samples of `file`."""
        known = (file.widths, file.latencies_ms)
        if self.lpnet is None:
            self.lpnet = LPNet.fit(
                self.space, *known, layers_ms=file.layers_ms, seed=self.seed, prior=self.prior
            )
        else:
            self.lpnet = self.lpnet.refit(*known, layers_ms=file.layers_ms)

    @torch.no_grad()
    def spread(self, widths: Tensor) -> Tensor:
        """Relative standard deviation of the prediction: widths (N, G) -> (N,)."""
        assert self.lpnet is not None
        return self.lpnet.spread(widths)
