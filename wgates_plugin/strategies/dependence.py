"""Which groups see the input that a strategy looks at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin.calling import ExampleInputs, call_with, left_as_found, map_tensors
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.errors import TraceError


def check_all_see(
    network: nn.Module, space: ChannelSpace, inputs: ExampleInputs, image: Tensor, strategy: str
) -> None:
    """Refuse groups that do not depend on `image`, one of the tensors of `inputs`.

    Raises:
        TraceError: names them; nothing that is found by the image could rank their channels.
    """
    run: set[str] = set()
    seen: set[str] = set()
    producers = {
        group.name: [slot.module for slot in group.slots_as("producer")] for group in space.groups
    }

    def watch(name: str) -> Any:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            run.add(name)
            if isinstance(output, Tensor) and output.requires_grad:
                seen.add(name)

        return look

    handles = [
        network.get_submodule(name).register_forward_hook(watch(name))
        for name in {module for modules in producers.values() for module in modules}
    ]
    followed = image.detach().clone().requires_grad_(True)
    try:
        with left_as_found(network), torch.enable_grad():
            network.eval().requires_grad_(False)
            # A clone: the network's first layer may work in place.
            call_with(
                network, map_tensors(lambda one: followed.clone() if one is image else one, inputs)
            )
    finally:
        for handle in handles:
            handle.remove()
    blind = [
        f"`{name}`"
        for name, modules in producers.items()
        if set(modules) & run and not set(modules) & seen
    ]
    if blind:
        raise TraceError(
            f"{strategy}: judges by one input, a tensor of shape {tuple(image.shape)}, and nothing of "
            f"it reaches {', '.join(blind)}, which another input feeds; leave these layers out with "
            "`ignored_layers`, or choose another strategy"
        )
