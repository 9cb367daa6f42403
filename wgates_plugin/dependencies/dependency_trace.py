"""A network's dependencies between channels, traced once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from wgates_plugin.calling import ExampleInputs, left_as_found, map_tensors
from wgates_plugin.channels import ChannelGroup, ChannelSpace
from wgates_plugin.dependencies.channel_order import is_certain
from wgates_plugin.dependencies.exclusion import attention_of, attentions, reason_to_exclude
from wgates_plugin.dependencies.forward_pass import ForwardPass
from wgates_plugin.dependencies.group_record import group_record
from wgates_plugin.dependencies.limits import limit_problems, with_limits
from wgates_plugin.dependencies.raw_groups import raw_groups, root_of
from wgates_plugin.dependencies.untraceable import refuse_untraceable
from wgates_plugin.errors import TraceError


class DependencyTrace:
    """A torch-pruning dependency graph of one network, and the records made from it.

    Keeping the object lets surgery reuse the graph, so that trace plus removal trace once.
    """

    def __init__(
        self,
        network: nn.Module,
        example_inputs: ExampleInputs,
        *,
        parameter_dims: Sequence[tuple[nn.Parameter, int]] = (),
    ) -> None:
        """`parameter_dims` says which dimension of a bare parameter holds channels: the last one
        with more than one entry, unless it is named here."""
        refuse_untraceable(network, example_inputs)
        self.network = network
        self.example_inputs = example_inputs
        inferring = torch.is_inference_mode_enabled()
        with torch.inference_mode(False), left_as_found(network):
            if inferring:  # what was made under it enters no graph; a copy does
                self.example_inputs = map_tensors(Tensor.clone, example_inputs)
            network.eval()
            self._seen = ForwardPass(network, self.example_inputs, parameter_dims)
        self.names, self.layers, self.graph = self._seen.names, self._seen.layers, self._seen.graph

    @property
    def keeps_channel_order(self) -> bool:
        """True when no operation may move channels unseen, and no layer runs without gradients."""
        return not self._seen.cut_off and not self._seen.fixed_views and is_certain(self.graph)

    def space(
        self,
        *,
        ignored_layers: Sequence[nn.Module | str] = (),
        min_channels: int = 1,
        min_fraction: float = 0.0,
        floors: Mapping[str, int] | None = None,
        caps: Mapping[str, int] | None = None,
    ) -> ChannelSpace:
        """The records of this graph, unchecked; see `trace` for the arguments."""
        ignored, problems = self._resolve_ignored(ignored_layers)
        seen = self._seen
        found: list[ChannelGroup] = []
        excluded: dict[str, str] = {}
        # In whatever order the graph met them; sorted by name below.
        for raw in raw_groups(seen):
            name, numbers = root_of(raw, seen)
            reason = reason_to_exclude(raw, ignored, seen)
            group = None if reason else group_record(name, raw, numbers, seen)
            if group is None or isinstance(group, str):
                excluded[name] = reason or attention_of(name, self.network) or str(group)
            else:
                found.append(group)
        for name, reason in attentions(self.names).items():
            excluded.setdefault(name, reason)
        found.sort(key=lambda group: seen.order[group.name])
        problems += limit_problems(found, floors or {}, caps or {})
        if problems:
            raise TraceError("; ".join(problems))
        found = with_limits(found, min_channels, min_fraction, floors or {}, caps or {})
        if not found:
            why = "; ".join(f"`{name}`: {reason}" for name, reason in excluded.items())
            raise TraceError(f"no prunable channel group in the network; {why or 'none was found'}")
        return ChannelSpace(tuple(found), self.layers, excluded)

    def _resolve_ignored(
        self, ignored_layers: Sequence[nn.Module | str]
    ) -> tuple[set[nn.Module], list[str]]:
        """The modules, children included, and what is wrong with the rest."""
        by_name = {name: module for module, name in self.names.items()}
        resolved: set[nn.Module] = set()
        unknown = []
        for layer in ignored_layers:
            module = by_name.get(layer) if isinstance(layer, str) else layer
            if not isinstance(module, nn.Module) or module not in self.names:
                unknown.append(repr(layer) if isinstance(layer, str) else type(layer).__name__)
                continue
            resolved.update(module.modules())
        if not unknown:
            return resolved, []
        words = (
            f"ignored_layers: {', '.join(unknown)} not in the network; give modules of it or their "
            "`named_modules()` names"
        )
        return resolved, [words]
