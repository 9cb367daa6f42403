"""NNI's `SlimPruner`, with the factors it learned folded into the weights."""

from __future__ import annotations

import torch
from nni.compression.pruning import SlimPruner


class FoldedSlimPruner(SlimPruner):
    """Network slimming (Liu et al., ICCV 2017) whose result outlives the wrappers.

    NNI's own multiplies weights by learned factors while wrapped, and forgets these factors in
    `unwrap_model`, so that the network then computes something else.
    """

    @torch.no_grad()
    def unwrap_model(self) -> None:
        for name, targets in getattr(self, "scaling_factors", {}).items():
            for key, factor in targets.items():
                self._module_wrappers[name].get_parameter(key).mul_(factor)  # (C, 1, ...)
                factor.fill_(1.0)
        super().unwrap_model()
