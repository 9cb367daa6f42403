"""Masks as they are handed over: a plain dict, a file of one, and forms that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nni", reason='nni is not installed; pip install "wgates-plugin[nni]"')
pytest.importorskip("wgates_plugin.integrations.nni")  # first: it lets NNI import Lightning

import torch
from helpers import snapshot
from networks import example, tiny
from nni.compression.pruning import L1NormPruner
from nni_pruner_helpers import HALF
from torch import nn

from wgates_plugin.errors import ConfigError, FileFormatError
from wgates_plugin.integrations.nni import (
    ModelSpeedup,
    WGatesPruner,
    make_config,
    remove,
    speedup,
)

KEPT = torch.tensor([1.0, 0, 1, 0, 1, 1, 0, 1])


def plain_masks() -> dict[str, dict[str, torch.Tensor]]:
    """Half of the first layer of `tiny("plain")`, closed by hand, without any pruner."""
    network = tiny("plain")
    conv, norm = network[0][0], network[0][1]
    masks = {"0.0": {"weight": KEPT.view(8, 1, 1, 1).expand_as(conv.weight).clone()}}
    if conv.bias is not None:
        masks["0.0"]["bias"] = KEPT.clone()
    if isinstance(norm, nn.BatchNorm2d):
        masks["0.1"] = {"weight": KEPT.clone(), "bias": KEPT.clone()}
    return masks


@pytest.mark.parametrize("form", ["dict", "path", "text"])
@pytest.mark.parametrize("way", [remove, speedup])
def test_a_plain_dict_or_a_file_of_it_will_do(way: Any, form: str, tmp_path: Path) -> None:
    network, masks = tiny("plain"), plain_masks()
    given: Any = masks
    if form != "dict":
        given = tmp_path / "masks.pt"
        torch.save(masks, given)
        given = str(given) if form == "text" else given
    way(network, given, example())
    assert network[0][0].out_channels == int(KEPT.sum())


def test_model_speedup_reads_files_too(tmp_path: Path) -> None:
    torch.save(plain_masks(), tmp_path / "masks.pt")
    network = tiny("plain")
    ModelSpeedup(network, example(), str(tmp_path / "masks.pt")).speedup_model()
    assert network[0][0].out_channels == int(KEPT.sum())


@pytest.mark.parametrize("pruner_class", [WGatesPruner, L1NormPruner])
@pytest.mark.filterwarnings("ignore:WGatesPruner. no evaluator")
def test_a_file_of_what_compress_returns_will_do(pruner_class: Any, tmp_path: Path) -> None:
    network = tiny("plain")
    config = make_config(network, example(), sparse_ratio=0.5)
    pruner = pruner_class(network, config)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    torch.save(masks, tmp_path / "masks.pt")
    remove(network, tmp_path / "masks.pt", example())
    assert network[0][0].out_channels == 4


@pytest.mark.filterwarnings("ignore:WGatesPruner. no evaluator")
def test_our_masks_are_plain_dicts_that_any_torch_load_reads(tmp_path: Path) -> None:
    _, masks = WGatesPruner(tiny("plain"), HALF).compress()
    assert {type(masks), *map(type, masks.values())} == {dict}
    torch.save(masks, tmp_path / "masks.pt")
    assert list(torch.load(tmp_path / "masks.pt", weights_only=True)) == list(masks)


class Payload:
    """What a loader that executes code would run."""

    ran = False

    def __reduce__(self) -> Any:
        return _run, ()


def _run() -> dict[str, Any]:
    Payload.ran = True
    return {}


@pytest.mark.parametrize(
    "way", [remove, speedup, lambda *given: ModelSpeedup(given[0], example(), given[1])]
)
def test_a_file_executes_nothing(way: Any, tmp_path: Path) -> None:
    path = tmp_path / "masks.pt"
    torch.save({"0.0": Payload()}, path)
    network = tiny("plain")
    with pytest.raises(FileFormatError, match="not readable as plain tensors"):
        way(network, path, example())
    assert not Payload.ran
    with pytest.raises(FileFormatError, match="no such file"):
        way(network, tmp_path / "elsewhere.pt", example())


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ([torch.ones(8)], r"found a list of 1 entries, needs \{layer: "),
        (
            {"0.0": torch.ones(8, 3, 3, 3)},
            r"`0.0`: found a Tensor of shape \(8, 3, 3, 3\), expected \{\"weight\": tensor of shape "
            r"\(8, 3, 3, 3\)\}",
        ),
        (
            {"0.0": {"weight": KEPT}},
            r"`0.0.weight`: found a Tensor of shape \(8,\), expected shape \(8, 3, 3, 3\); spread",
        ),
        (
            {"0.0": {"weight": torch.ones(4, 3, 3, 3)}},
            r"found a Tensor of shape \(4, 3, 3, 3\), expected shape \(8, 3, 3, 3\); the network",
        ),
        ({"0.0": {"weight": [1, 0]}}, r"found a list of 2 entries, expected .* as a tensor"),
        ({"0.0": {"wait": torch.ones(8)}}, "`0.0` has no parameter `wait`"),
        ({0: {"weight": torch.ones(8)}}, "`0` is not in the network"),
    ],
)
@pytest.mark.parametrize("way", [remove, speedup])
def test_another_form_is_told_with_layer_and_shapes(way: Any, masks: Any, words: str) -> None:
    network = tiny("plain")
    before = snapshot(network)
    with pytest.raises(ConfigError, match=words):
        way(network, masks, example())
    assert snapshot(network) == before


def test_all_wrong_layers_are_told_at_once() -> None:
    masks: Any = {"0.0": KEPT, "1.0": {"weight": KEPT}, "gone": {}}
    with pytest.raises(ConfigError) as caught:
        remove(tiny("plain"), masks, example())
    assert len(caught.value.problems) == 3
