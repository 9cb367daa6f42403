"""Removal and speedup of masks, whoever made them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("nni", reason='nni is not installed; pip install "wgates-plugin[nni]"')
pytest.importorskip("wgates_plugin.integrations.nni")  # first: it lets NNI import Lightning

import torch
from helpers import snapshot
from networks import example, tiny
from nni.compression.pruning import FPGMPruner, L1NormPruner, LevelPruner, SlimPruner
from nni_helpers import evaluator
from nni_pruner_helpers import HALF, output, width
from torch import Tensor, nn

from wgates_plugin import trace
from wgates_plugin.errors import ConfigError, SurgeryError
from wgates_plugin.integrations.nni import make_config, remove, speedup
from wgates_plugin.verification import TOLERANCE, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:WGatesPruner. layers that stay whole")


@pytest.mark.parametrize("name", ["plain", "residual", "projection", "depthwise", "preactivation"])
@pytest.mark.parametrize("theirs", [L1NormPruner, FPGMPruner])
def test_their_pruners_masks_are_removed_exactly_with_our_config(name: str, theirs: Any) -> None:
    network = tiny(name)
    before = copy.deepcopy(network)
    pruner = theirs(network, make_config(network, example(), sparse_ratio=0.5))
    _, masks = pruner.compress()
    masked = output(network)
    pruner.unwrap_model()
    remove(network, masks, example())
    assert relative_error(output(network), masked) <= TOLERANCE
    space = trace(before, example())
    smaller = trace(network, example())
    for group, now in zip(space.groups, smaller.groups, strict=True):
        assert now.channels == group.channels - int(group.channels * 0.5)


@pytest.mark.filterwarnings("ignore:make_config")
def test_a_config_leaves_grouped_convolutions_to_us() -> None:
    network = tiny("grouped")
    config = make_config(network, example(), sparse_ratio=0.5)
    _, masks = L1NormPruner(network, config).compress()
    assert not {"1.main.0.0", "1.main.1.0"} & set(masks)


def test_a_config_leaves_out_what_nni_has_no_words_for() -> None:
    network = tiny("concat")
    with pytest.warns(UserWarning, match="`2` holds the channels of several groups"):
        config = make_config(network, example(), sparse_ratio=0.5)
    pruner = L1NormPruner(network, config)
    _, masks = pruner.compress()
    masked = output(network)
    pruner.unwrap_model()
    remove(network, masks, example())
    assert relative_error(output(network), masked) <= TOLERANCE
    assert width(network, "4.0") == 5


def test_a_config_takes_ratios_by_group_and_refuses_wrong_ones() -> None:
    network = tiny("plain")
    config = make_config(network, example(), sparse_ratio={"0.0": 0.25})
    _, masks = L1NormPruner(network, config).compress()
    assert set(masks) == {"0.0", "0.1"}
    with pytest.raises(ConfigError, match="`nowhere` is no channel group") as found:
        make_config(tiny("plain"), example(), sparse_ratio={"nowhere": 0.5, "0.0": 1.5})
    assert len(found.value.problems) == 2


def conv_masks(network: nn.Module) -> Any:
    """Masks of convolutions alone, as a plain config of theirs leaves them."""
    pruner = L1NormPruner(network, HALF)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return masks


def test_masks_behind_which_channels_live_on_are_refused() -> None:
    network = tiny("plain")
    masks = conv_masks(network)
    before = snapshot(network)
    with pytest.raises(SurgeryError, match=r"`1.0`: read by `2.fc`, not masked: `1.1`"):
        remove(network, masks, example())
    assert snapshot(network) == before
    remove(network, masks, example(), align=True)
    assert [width(network, name) for name in ("0.0", "1.0")] == [4, 6]


def test_what_cannot_be_removed_stays_as_zeros() -> None:
    network = tiny("residual")
    single = LevelPruner(network, [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.6}])
    _, masks = single.compress()
    masked = output(network)
    single.unwrap_model()
    remove(network, masks, example())
    assert relative_error(output(network), masked) <= TOLERANCE
    assert float((network[0][0].weight == 0).float().mean()) >= 0.5
    half = tiny("residual")
    one_sided = {"0.0": {"weight": torch.ones(8, 3, 3, 3)}}
    one_sided["0.0"]["weight"][:4] = 0  # coupled layers disagree
    with pytest.warns(UserWarning, match="stay in the network, as zeros: 4 of `0.0`; a coupled"):
        remove(half, one_sided, example())
    assert width(half, "0.0") == 8
    assert not half[0][0].weight[:4].any()


def slim_masks(network: nn.Module, *, biases: bool) -> Any:
    """Masks of norms alone, as the usual config of SlimPruner leaves them; `biases` masks those too."""
    config = [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}]
    pruner = SlimPruner(network, config, evaluator(network), training_steps=3)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    if biases:
        for targets in masks.values():
            targets["bias"] = targets["weight"].clone()
    return masks


def test_masks_of_norms_alone_close_what_is_read_behind_them() -> None:
    network = tiny("plain")
    masks = slim_masks(network, biases=True)
    remove(network, masks, example())
    assert [width(network, name) for name in ("0.0", "1.0")] == [4, 6]


def test_norms_masked_without_their_biases_are_refused() -> None:
    network = tiny("plain")
    masks = slim_masks(network, biases=False)
    for block in network[:2]:
        block[1].bias.data.fill_(0.5)
    before = snapshot(network)
    with pytest.raises(SurgeryError, match=r"`1.0`: read by `2.fc`, not masked: the bias of `1.1`"):
        remove(network, masks, example())
    assert snapshot(network) == before
    remove(network, masks, example(), align=True)
    assert [width(network, name) for name in ("0.0", "1.0")] == [4, 6]


class Normed(nn.Module):
    """A residual sum whose one branch ends in a norm; the other brings the channels to life again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        scores: Tensor = self.fc((x + self.norm(self.conv(x))).relu().mean((2, 3)))
        return scores


@pytest.mark.parametrize("shift", [0.0, -50.0])
def test_a_norm_on_one_branch_closes_nothing(shift: float) -> None:
    """Not even where the example's channels happen to be dead behind it."""
    network = Normed()
    network.norm.bias.data.fill_(shift)
    mask = torch.ones(8)
    mask[:4] = 0
    with pytest.warns(UserWarning, match="as zeros: 4 of `norm`; a coupled layer keeps them"):
        remove(network, {"norm": {"weight": mask}}, example(), align=True)
    assert width(network, "stem") == 8


def test_a_bias_that_is_left_open_is_refused() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    )
    network[0].bias.data.fill_(0.5)
    config = [{"op_names": ["0"], "target_names": ["weight"], "sparse_ratio": 0.5}]
    pruner = L1NormPruner(network, config)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    before = snapshot(network)
    with pytest.raises(SurgeryError, match=r"`0`: read by `2`, not masked: the bias of `0`"):
        remove(network, masks, example())
    assert snapshot(network) == before
    remove(network, masks, example(), align=True)
    assert network[0].out_channels == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: m["0.0"].update(weight=torch.zeros(8, 3, 3, 3)),
            "close all 8 channels of `0.0`",
        ),
        (lambda m: m["0.0"].update(weight=torch.ones(9, 3, 3, 3)), "changed since the masks"),
        (lambda m: m.update(gone={"weight": torch.ones(1)}), "`gone` is not in the network"),
        (lambda m: m["0.0"].update(_output_0=torch.ones(1, 8, 1, 1)), "`_output_0`"),
        (lambda m: m["0.0"].update(weight=torch.full((8, 3, 3, 3), 0.5)), "other values"),
    ],
)
@pytest.mark.parametrize("way", [remove, speedup])
def test_wrong_masks_are_refused_and_the_network_left_as_found(
    change: Any, words: str, way: Any
) -> None:
    network = tiny("plain")
    masks = conv_masks(network)
    before = snapshot(network)
    change(masks)
    with pytest.raises(ConfigError, match=words):
        way(network, masks, example())
    assert snapshot(network) == before


def test_a_wrapped_network_is_not_cut() -> None:
    network = tiny("plain")
    _, masks = L1NormPruner(network, HALF).compress()
    for way in (remove, speedup):
        with pytest.raises(ConfigError, match="unwrap_model"):
            way(network, masks, example())


def test_speedup_says_when_it_computes_something_else() -> None:
    network = tiny("plain")
    masks = conv_masks(network)
    with pytest.raises(SurgeryError, match="computes something else"):
        speedup(network, masks, example())
