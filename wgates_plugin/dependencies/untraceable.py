"""Networks that cannot be traced, told at the door: each refusal names the module and the next step."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from wgates_plugin import modules as kinds
from wgates_plugin.calling import ExampleInputs, refuse_other_device
from wgates_plugin.errors import TraceError
from wgates_plugin.gating import Gating


def refuse_untraceable(network: nn.Module, example_inputs: ExampleInputs) -> None:
    """Refuse what could not be traced, or not be pruned afterwards; nothing is run or changed.

    Raises:
        TraceError: names the module or parameter at fault.
    """
    for name, module in network.named_modules():
        _refuse_module(name or type(module).__name__, module)
    kind = type(network).__name__
    if not any(isinstance(module, kinds.WEIGHTED) for module in network.modules()):
        raise TraceError(f"network {kind}: no convolution or linear layer to prune")
    if not any(parameter.requires_grad for parameter in network.parameters()):
        count = len(list(network.parameters()))
        raise TraceError(
            f"network {kind}: all {count} parameters are "
            "frozen, so nothing could recover from pruning; call "
            "`network.requires_grad_(True)` on what may be trained"
        )
    tensors = itertools.chain(network.named_parameters(), network.named_buffers())
    if made := next((name for name, tensor in tensors if tensor.is_inference()), None):
        raise TraceError(
            f"network {kind}: `{made}` was made under torch.inference_mode and can never carry a "
            "gradient; make the network outside of it"
        )
    _refuse_tied_weights(network)
    refuse_other_device(network, example_inputs)


def _refuse_module(name: str, module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule) and any(True for _ in module.parameters()):
        raise TraceError(
            f"module `{name}`: is compiled by torch.jit, which hides its layers; put the plain "
            "module in its place and script the pruned network"
        )
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise TraceError(
            f"module `{name}`: is a {type(module).__name__} whose weight has no shape yet; run "
            "the network once on a batch before tracing it"
        )
    if "parametrizations" in module._modules:
        raise TraceError(
            f"module `{name}`: has a parametrization on its weight; remove it with "
            "torch.nn.utils.parametrize.remove_parametrizations first"
        )
    if isinstance(module, kinds.WEIGHTED) and module._parameters.get("weight") is None:
        raise TraceError(
            f"module `{name}`: its weight is computed, not a parameter (weight_norm, "
            "spectral_norm, a lazy or tied layer); make it a plain parameter first, for "
            "example with torch.nn.utils.remove_weight_norm"
        )
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    if any(isinstance(owner, Gating) and not owner.inert for owner in owners):
        raise TraceError(
            f"module `{name}`: gates are attached to it; call `detach()` on them before tracing"
        )


def _refuse_tied_weights(network: nn.Module) -> None:
    owners: dict[nn.Parameter, str] = {}
    for name, module in network.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            first = owners.setdefault(parameter, f"{name}.{key}")
            if first != f"{name}.{key}":
                raise TraceError(
                    f"parameter `{name}.{key}`: is the same as `{first}`; tied layers cannot "
                    "be cut apart, give each its own parameter or use one module twice"
                )
