"""Why a set of coupled channels stays whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch_pruning import ops as tp_ops

from wgates_plugin import modules as kinds
from wgates_plugin.dependencies.forward_pass import ForwardPass

_ATTENTION = (
    "`{}` is an attention: only whole heads could go, and its own head count would not follow"
)


def reason_to_exclude(raw: Any, ignored: set[nn.Module], seen: ForwardPass) -> str | None:
    """What is in the way of cutting the channels of `raw`; None for nothing."""
    consumers = reaching = 0
    for item in raw:
        node, module = item.dep.target, item.dep.target.module
        is_out = seen.graph.is_out_channel_pruning_fn(item.dep.handler)
        name = seen.names.get(module, "")
        if mixer := seen.neighbourly.get(node.grad_fn):
            return _mixes(seen.names[mixer], mixer)
        if isinstance(module, nn.Parameter):
            return f"a bare parameter of shape {tuple(module.shape)} shares its channels"
        if isinstance(module, kinds.WEIGHTED) and not kinds.is_depthwise(module):
            if isinstance(module, kinds.TRANSPOSED) and module.groups > 1:
                return f"`{name}` is a grouped transposed convolution"
            if not is_out:
                consumers += 1
                continue
            reaching += module in seen.reaching
        elif isinstance(module, kinds.Scatter):
            if is_out:
                return f"`{name}` gives its stream all of its channels"
            consumers += 1
            continue
        elif isinstance(module, kinds.INSTANCE_NORMS) and module.track_running_stats:
            return f"torch-pruning does not cut the running statistics of `{name}`"
        elif isinstance(module, nn.Module) and name and not _acts_per_channel(module):
            return _mixes(name, module)
        if module in ignored:
            return f"`{name}` is ignored"
        if node.type == tp_ops.OPTYPE.OUTPUT or not node.outputs or module in seen.last:
            return "its channels are outputs of the network"
    if not consumers:
        return "no layer reads its channels"
    return None if reaching else "the network's output does not depend on its channels"


def attention_of(name: str, network: nn.Module) -> str | None:
    """Why an attention's queries, keys and values cannot be cut; None for another layer."""
    parent = name.rpartition(".")[0]
    owner = network.get_submodule(parent)
    called = parent or type(owner).__name__
    return _ATTENTION.format(called) if hasattr(owner, "num_heads") else None


def attentions(names: Mapping[nn.Module, str]) -> dict[str, str]:
    """Why torch's own attentions stay whole: name -> reason."""
    return {
        name: _ATTENTION.format(name)
        for module, name in names.items()
        if isinstance(module, nn.MultiheadAttention)
    }


def _mixes(name: str, module: nn.Module) -> str:
    return f"`{name}` ({type(module).__name__}) mixes channels outside a convolution"


def _acts_per_channel(module: nn.Module) -> bool:
    return kinds.is_depthwise(module) or isinstance(module, kinds.PER_CHANNEL)
