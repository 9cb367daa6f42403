"""Beyond CNNs: hidden widths of MLPs through the same gates; attention is left whole, with the reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import random_plan
from networks import example
from torch import Tensor, nn

from wgates_plugin import rebuild, remove, trace
from wgates_plugin.catalogue.torchvision_import import import_torchvision
from wgates_plugin.efficiency import ParametersModel
from wgates_plugin.errors import ConfigError, TraceError
from wgates_plugin.integrations.torch_pruning import WGatesPruner
from wgates_plugin.latency.onnx_template import OnnxTemplate
from wgates_plugin.verification import TOLERANCE, removal_error


class Encoder(nn.Module):
    """torch's own encoder layer, whose fast path would read its weights past any hook."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        out: Tensor = self.head(self.layer(tokens).mean(1))
        return out


def telling(network: nn.Module) -> nn.Module:
    """Random values where torchvision starts with zeros and 1e-6, which would hide any mistake."""
    for parameter in network.parameters():
        if float(parameter.detach().abs().max()) <= 1e-5:
            nn.init.normal_(parameter)
    return network.eval()


def vit() -> nn.Module:
    models = import_torchvision().models
    return telling(models.VisionTransformer(16, 4, 2, 2, 8, 16, num_classes=5))


def convnext() -> nn.Module:
    import_torchvision()
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return telling(ConvNeXt([CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)], num_classes=5))


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=5
    )


NETWORKS: dict[str, Any] = {
    "vit": (
        vit,
        16,
        {"encoder.layers.encoder_layer_0.mlp.0", "encoder.layers.encoder_layer_1.mlp.0"},
    ),
    "convnext": (convnext, 32, {"features.1.0.block.3", "features.3.0.block.3"}),
    "timm-vit": (timm_vit, 16, {"blocks.0.mlp.fc1", "blocks.1.mlp.fc1"}),
    "encoder": (Encoder, 16, {"layer.linear1"}),
}


def test_a_profile_charges_linear_layers_with_their_products() -> None:
    """Over more than two dimensions the exporter writes them as a transposed weight and a MatMul."""
    network = convnext()
    owners = OnnxTemplate(network, example()).owners
    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert len(linear) == 5
    assert linear <= {found[0] for found in owners.values() if found}


@pytest.mark.parametrize("name", NETWORKS)
def test_mlp_widths_obey_the_laws(name: str) -> None:
    factory, size, groups = NETWORKS[name]
    network = factory().eval()
    inputs = example(2, size)
    space = trace(network, inputs)
    assert set(space.names) == groups
    for seed in range(3):
        plan = random_plan(space, seed)
        smaller = remove(copy.deepcopy(network), plan, inputs)
        assert removal_error(network, smaller, plan, inputs) <= TOLERANCE
        counted = sum(parameter.numel() for parameter in smaller.parameters())
        assert float(ParametersModel(space)(torch.tensor(plan.widths))) == counted
        again = rebuild(network, plan, smaller.state_dict())
        assert torch.equal(again(inputs), smaller(inputs))


@pytest.mark.parametrize("name", NETWORKS)
def test_gates_learn_on_them(name: str) -> None:
    factory, size, _ = NETWORKS[name]
    network = factory().train()
    pruner = WGatesPruner(network, example(2, size), pruning_ratio=0.5)
    loss = nn.functional.cross_entropy(network(example(4, size)), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    pruner.regularize(network)
    pruner.step()
    assert pruner.plan is not None
    assert pruner.plan.widths == tuple(width // 2 for width in pruner.space.full_widths)
    network.eval()(example(2, size))


def test_attention_is_left_whole_with_the_reason() -> None:
    space = trace(vit().eval(), example(2, 16))
    name = "encoder.layers.encoder_layer_0.self_attention"
    assert "only whole heads could go" in space.excluded[name]
    space = trace(timm_vit().eval(), example(2, 16))
    assert "only whole heads could go" in space.excluded["blocks.0.attn.qkv"]
    with pytest.raises(ConfigError, match="num_heads: attention heads are not pruned"):
        WGatesPruner(vit(), example(2, 16), num_heads={nn.Linear(1, 1): 2})


def test_norms_over_all_channels_keep_their_groups_whole_with_the_reason() -> None:
    space = trace(convnext().eval(), example(2, 32))
    assert "(LayerNorm2d) mixes channels" in space.excluded["features.0.0"]


def test_shifted_windows_are_refused_with_the_reason() -> None:
    models = import_torchvision().models
    swin = models.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=5)
    with pytest.raises(TraceError, match="read without being called"):
        trace(swin, example(2, 16))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("vit_b_16", {"image_size": 32}), ("convnext_tiny", {})]
)
def test_the_full_networks_obey_the_law(name: str, options: dict[str, Any]) -> None:
    factory = getattr(import_torchvision().models, name)
    network = telling(factory(weights=None, num_classes=10, **options))
    inputs = example(2, options.get("image_size", 64))
    space = trace(network, inputs)
    plan = random_plan(space, 0)
    smaller = remove(copy.deepcopy(network), plan, inputs)
    assert removal_error(network, smaller, plan, inputs) <= TOLERANCE
