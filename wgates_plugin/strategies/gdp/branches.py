"""Which groups of channels may close altogether: those that the network computes on without."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.verification import relative_error


class Branches:
    """The groups that have closed altogether so far, and those that were found to be needed.

    Args:
        least: width that a needed group keeps, one per group.
        output: gates (total_units,), seed -> the network's output on noise of that seed; None keeps
            every group.
    """

    def __init__(
        self,
        space: ChannelSpace,
        least: Sequence[int],
        output: Callable[[Tensor, int], Tensor] | None,
    ) -> None:
        self.space, self._least, self._output = space, tuple(least), output
        self.closed: list[int] = []
        self.needed: list[int] = []

    @property
    def names(self) -> list[str]:
        """Of the groups that have closed."""
        return [self.space.names[index] for index in sorted(self.closed)]

    def may_close(self) -> Tensor:
        """Groups (G,) of which nobody knows yet that the network needs them: bool."""
        groups = range(len(self.space.groups))
        return torch.tensor([self._removable(g) and g not in self.needed for g in groups])

    def spare(self, before: Tensor, after: Tensor, smallest: float) -> Tensor:
        """Reopen groups that closed altogether, unless the network computes on without them.

        Args:
            before, after: gates' parameters (total_units,) of the step; `after` is written to.
            smallest: least size of a parameter that is opened again.
        """
        for index, (group, least) in enumerate(zip(self.space.groups, self._least, strict=True)):
            where = self.space.unit_slice(index)
            if index in self.closed or bool((after[where] != 0).any()):
                continue
            if index not in self.needed:
                if self._is_connected_without([*self.closed, index], after):
                    self.closed.append(index)
                    continue
                self.needed.append(index)
            order = before[where].abs().argsort(descending=True, stable=True)
            kept = where.start + order[: least // group.ties]
            after[kept] = before[kept].abs().clamp_min(smallest)
        return after

    def together(self, closed_at: Tensor, missed: Tensor) -> list[int]:
        """Those that closed in the last step that closed any, by what the task misses, without the
        least one: in the long steps of a short phase more close at once than a budget asks for (ours).

        Args:
            closed_at: step in which each unit closed. missed: what the task loses by it. Both
                (total_units,).
        """
        where = {index: self.space.unit_slice(index) for index in self.closed}
        steps = {index: int(closed_at[units].max()) for index, units in where.items()}
        last = [index for index, step in steps.items() if step == max(steps.values())]
        return sorted(last, key=lambda index: float(missed[where[index]].sum()))[1:]

    def _removable(self, index: int) -> bool:
        """Whether a group may close altogether if the network computes on without it."""
        return self._output is not None and not self.space.groups[index].floor_is_own

    @torch.no_grad()
    def _is_connected_without(self, closed: Sequence[int], like: Tensor) -> bool:
        """Does the output still depend on the input with these groups gated off?"""
        if self._output is None or not all(self._removable(index) for index in closed):
            return False
        gates = torch.ones_like(like)
        for index in closed:
            gates[self.space.unit_slice(index)] = 0.0
        return relative_error(self._output(gates, 1), self._output(gates, 0)) > 1e-4
