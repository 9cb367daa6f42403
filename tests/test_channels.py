"""Tracing: what groups hold, and what is refused with which words."""

from __future__ import annotations

import copy
import json
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import random_plan
from networks import (
    TINY,
    Head,
    SqueezeExcite,
    conv,
    conv_bn,
    example,
    randomised,
    tiny,
    torchvision_network,
)
from torch import Tensor, nn

from wgates_plugin import ChannelGroup, ChannelSpace, PruningPlan, trace
from wgates_plugin.calling import copied, informative
from wgates_plugin.channels import _from_runs, _to_runs
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.errors import FileFormatError, PlanError, TraceError
from wgates_plugin.gating import Gating
from wgates_plugin.surgery import remove, resize
from wgates_plugin.verification import TOLERANCE, _irregular, carried_out, removal_error


class Wired(nn.Module):
    """Modules and the function that wires them."""

    def __init__(self, wire: Callable[[Any, Tensor], Any], *layers: nn.Module) -> None:
        super().__init__()
        self.m = nn.ModuleList(layers)
        self.wire = wire

    def forward(self, x: Tensor) -> Any:
        return self.wire(self.m, x)


def _group(channels: int = 64, ties: int = 1, floor: int = 1, cap: int = 64) -> ChannelGroup:
    return ChannelGroup("g", channels, ties, floor, cap, ())


@pytest.mark.parametrize(
    ("group", "grid", "allowed"),
    [
        (_group(8, cap=8), 1, [1, 2, 3, 4, 5, 6, 7, 8]),
        (_group(32, cap=32), 8, [8, 16, 24, 32]),
        (_group(20, cap=20), 8, [8, 16, 20]),
        (_group(6, cap=6), 8, [6]),
        (_group(32, floor=9, cap=32), 8, [16, 24, 32]),
        (_group(32, cap=17), 8, [8, 16]),
        (_group(32, cap=4), 8, [4]),
        (_group(32, floor=10, cap=12), 8, [12]),
        (_group(24, ties=3, floor=3, cap=24), 1, [3, 6, 9, 12, 15, 18, 21, 24]),
        (_group(24, ties=3, floor=3, cap=24), 4, [12, 24]),
    ],
)
def test_allowed_widths(group: ChannelGroup, grid: int, allowed: list[int]) -> None:
    assert group.allowed_widths(grid) == allowed
    assert all(group.floor <= width <= group.cap for width in allowed)
    assert group.round_up(0, grid) == allowed[0]
    assert group.round_up(allowed[-1] + 5, grid) == allowed[-1]
    assert group.round_up(allowed[0] + 0.5, grid) == (allowed + allowed)[min(1, len(allowed) - 1)]


@pytest.mark.parametrize(
    "units",
    [
        [],
        [-1],
        [0],
        [0, 1, 2],
        [0, 0, 0, 1, 1, 1],
        [-1, -1, 4, 5, 6, -1],
        [3, 1, 2, 0],
        [0, 1, 0, 1],
    ],
)
def test_index_maps_survive_their_short_form(units: list[int]) -> None:
    runs = _to_runs(np.array(units, dtype=np.int64))
    assert _from_runs(json.loads(json.dumps(runs))).tolist() == units


@pytest.mark.parametrize("name", TINY)
def test_spaces_survive_json_and_do_not_depend_on_weights(name: str) -> None:
    space = trace(tiny(name), example())
    again = ChannelSpace.from_json(json.loads(json.dumps(space.to_json())))
    assert again.to_json() == space.to_json()
    assert again.fingerprint == space.fingerprint
    other = trace(tiny(name, seed=1), example(3, seed=5), min_channels=2)
    assert other.fingerprint == space.fingerprint
    assert trace(TINY["plain"](), example(size=6)).fingerprint != space.fingerprint


def test_groups_come_in_module_order() -> None:
    network = tiny("projection")
    space = trace(network, example())
    order = [name for name, _ in network.named_modules()]
    assert sorted(space.names, key=order.index) == list(space.names)
    assert space.names == ("0.0", "1.main.0.0", "1.main.1")
    assert space.full_widths == (8, 6, 12)
    assert space.offsets == (0, 8, 14, 26)


def test_flattened_channels_own_their_stretch_of_the_linear_layer() -> None:
    space = trace(tiny("flattened"), example())
    (reader,) = space.group("0.0").slots_as("consumer")
    assert reader.module == "2"
    assert reader.units.tolist() == np.repeat(np.arange(8), 16).tolist()


def test_concatenated_groups_share_one_reader() -> None:
    space = trace(tiny("concat"), example())
    index = space.unit_index("1.layers.1.0", "in")
    assert index is not None
    names = np.repeat(space.names, [g.units for g in space.groups])
    assert [str(n) for n in names[index]] == ["0.0"] * 6 + ["1.layers.0.0"] * 4
    assert space.unit_index("5.fc", "out") is None


def test_ignored_layers_stay_whole() -> None:
    network = tiny("residual")
    by_name = trace(network, example(), ignored_layers=["1.main.0"])
    by_module = trace(network, example(), ignored_layers=[network.get_submodule("1.main.0.0")])
    assert by_name.names == by_module.names == ("0.0",)
    assert "ignored" in by_name.excluded["1.main.0.0"]
    with pytest.raises(TraceError, match="'nowhere', Conv2d not in the network"):
        trace(network, example(), ignored_layers=["nowhere", nn.Conv2d(1, 1, 1)])


def test_floors_and_caps() -> None:
    network = tiny("grouped")
    space = trace(network, example(), min_fraction=0.3, floors={"0.0": 7}, caps={"1.main.0.0": 8})
    first, inner = space.group("0.0"), space.group("1.main.0.0")
    assert (first.floor, first.cap) == (7, 8)
    assert (inner.floor, inner.cap) == (6, 6)  # both moved onto whole conv groups of 3 channels
    with pytest.raises(TraceError, match="`nowhere` is no prunable group"):
        trace(network, example(), floors={"nowhere": 3})
    with pytest.raises(TraceError, match="floor 9 and cap 8 of 8 channels leave no width"):
        trace(network, example(), floors={"0.0": 9})


def test_widths_are_checked() -> None:
    space = trace(tiny("grouped"), example())
    assert space.check_widths(space.full_widths) == space.full_widths
    with pytest.raises(PlanError, match="got 1 numbers for 4 groups"):
        space.check_widths([3])
    wrong = list(space.full_widths)
    wrong[1] = 4
    with pytest.raises(PlanError, match=r"`1.main.0.0`: width 4 .* multiple of 3"):
        space.check_widths(wrong)
    with pytest.raises(PlanError, match=r"known groups: 0\.0"):
        space.group("nowhere")


# What cannot be pruned is left whole and says why; the rest of the network stays prunable.


def _half(m: Any, x: Tensor) -> Tensor:
    first, second = m[0](x).chunk(2, 1)
    return m[2](m[1](first * torch.sigmoid(second)))


def _gated_by(attention: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def wire(m: Any, x: Tensor) -> Tensor:
        y = m[1](m[0](x))
        return m[3](y * torch.sigmoid(attention(m[2], y)))

    return wire


def _over_channels(layer: Any, y: Tensor) -> Tensor:
    """Efficient channel attention: one kernel slides over the means of neighbouring channels."""
    return layer(y.mean((2, 3))[:, None])[:, 0, :, None, None]


EXCLUDED: dict[str, tuple[nn.Module, str, str]] = {
    "spatial attention": (
        Wired(
            _gated_by(lambda layer, y: layer(y)),
            *(conv_bn(3, 8), conv_bn(8, 16), conv(16, 1, 1), Head(16)),
        ),
        "m.1.0",
        "`m.2` has one channel, which is spread over all of them",
    ),
    "channel attention by one kernel": (
        Wired(
            _gated_by(_over_channels),
            *(conv_bn(3, 8), conv_bn(8, 16), nn.Conv1d(1, 1, 3, padding=1), Head(16)),
        ),
        "m.1.0",
        "`m.2` has one channel, which is spread over all of them",
    ),
    "local response norm": (
        nn.Sequential(conv(3, 8), nn.ReLU(), nn.LocalResponseNorm(3), conv_bn(8, 6), Head(6)),
        "0",
        "`2` (LocalResponseNorm) mixes channels",
    ),
    "a local response norm that serves twice": (
        Wired(
            lambda m, x: m[4](m[3](m[2](m[1](m[2](m[0](x)))))),
            *(conv(3, 8), conv(8, 12), nn.LocalResponseNorm(3), conv_bn(12, 6), Head(6)),
        ),
        "m.1",
        "`m.2` (LocalResponseNorm) mixes channels",
    ),
    "local response norm across maps": (
        nn.Sequential(conv(3, 8), nn.CrossMapLRN2d(3), conv_bn(8, 6), Head(6)),
        "0",
        "`1` (CrossMapLRN2d) mixes channels",
    ),
    "concatenation into conv groups": (
        Wired(
            lambda m, x: m[3](m[2](torch.cat([m[0](x), m[1](x)], 1))),
            *(conv_bn(3, 8), conv_bn(3, 8), conv_bn(16, 8, groups=2), Head(8)),
        ),
        "m.0.0",
        "would keep different channels",
    ),
    "chunk": (Wired(_half, conv_bn(3, 16), conv_bn(8, 4), Head(4)), "m.0.0", "do not reach"),
    "pixel shuffle": (
        Wired(
            lambda m, x: m[2](m[1](nn.functional.pixel_shuffle(m[0](x), 2))),
            *(conv_bn(3, 16), conv_bn(4, 6), Head(6)),
        ),
        "m.0.0",
        "is not known",
    ),
    "group norm": (
        nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), conv_bn(8, 6), Head(6)),
        "0",
        "GroupNorm",
    ),
    "one channel per conv group": (
        nn.Sequential(conv_bn(3, 8), conv_bn(8, 16, groups=8), Head(16)),
        "0.0",
        "leave nothing to choose",
    ),
    "running statistics of an instance norm": (
        nn.Sequential(
            *(conv(3, 8), nn.InstanceNorm2d(8, track_running_stats=True), conv(8, 6), Head(6))
        ),
        "0",
        "running statistics",
    ),
}


@pytest.mark.parametrize("case", EXCLUDED)
def test_what_cannot_be_pruned_is_left_whole(case: str) -> None:
    network, name, reason = EXCLUDED[case]
    network = randomised(network, 0)
    space = trace(network, example())
    assert name not in space.names
    assert reason in space.excluded[name]
    assert len(space.groups) >= 1


def test_a_bare_parameter_that_shares_channels_excludes_them() -> None:
    network = Wired(
        lambda m, x: m[2](m[1](m[0](x) * m.scale)), conv_bn(3, 8), conv_bn(8, 4), Head(4)
    )
    network.m.scale = nn.Parameter(torch.ones(8, 1, 1))
    space = trace(randomised(network, 0), example())
    assert space.names == ("m.1.0",)
    assert "bare parameter" in space.excluded["m.0.0"]


# A layer that runs without its output being used reads channels like any other.


def _with_a_side_head(m: Any, x: Tensor) -> Tensor:
    y = m[0](x)
    m[2](y)
    return m[1](y)


def test_a_head_whose_output_is_dropped_follows_what_it_reads() -> None:
    side = nn.Sequential(conv_bn(8, 6, 1), Head(6))
    network = randomised(Wired(_with_a_side_head, conv_bn(3, 8), Head(8), side), 0)
    traced = DependencyTrace(network, example())
    space = traced.space()
    assert traced.keeps_channel_order
    assert space.names == ("m.0.0",)
    assert {slot.module for slot in space.group("m.0.0").slots_as("consumer")} == {
        "m.1.fc",
        "m.2.0.0",
    }
    assert "does not depend" in space.excluded["m.2.0.0"]
    plan = random_plan(space, 0)
    smaller = remove(copy.deepcopy(network), plan, example())
    assert removal_error(network, smaller, plan, example()) <= TOLERANCE


def test_a_last_layer_that_also_serves_earlier_keeps_its_outputs() -> None:
    network = Wired(
        lambda m, x: m[2](torch.relu(m[2](m[1](m[0](x))))),
        *(conv_bn(3, 6), conv_bn(6, 8), conv(8, 8)),
    )
    space = trace(randomised(network, 0), example())
    assert space.names == ("m.0.0",)
    assert "outputs of the network" in space.excluded["m.1.0"]


def _without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m[0](x)
    return m[2](m[1](y))


def test_a_stem_that_runs_without_gradients_stays_whole() -> None:
    stem = nn.Sequential(conv_bn(3, 6), conv_bn(6, 8))
    network = randomised(Wired(_without_gradient, stem, conv_bn(8, 6), Head(6)), 0)
    assert trace(network, example()).names == ("m.1.0",)


def test_frames_that_are_folded_into_the_batch_count_for_their_image() -> None:
    """(N, T, C, H, W) -> (N * T, C, H, W)."""
    network = Wired(
        lambda m, x: m[2](m[1](m[0](x.flatten(0, 1)))).unflatten(0, (-1, 3)).mean(1),
        *(conv_bn(3, 8), conv_bn(8, 4), Head(4)),
    )
    space = trace(network, torch.randn(2, 3, 3, 8, 8))
    assert {layer.name: layer.positions for layer in space.layers}["m.0.0"] == 3 * 8 * 8


def test_a_parameter_of_whole_numbers_is_left_alone() -> None:
    network = tiny("plain")
    network[0].table = nn.Parameter(torch.arange(3), requires_grad=False)
    assert trace(network, example()).names == ("0.0", "1.0")


def test_the_graph_holds_no_activations() -> None:
    """One that outlives tracing, as in a pruner, would otherwise hold those of a whole batch."""
    network = tiny("plain")
    node = DependencyTrace(network, example()).graph.module2node[network[1][0]]
    assert node.grad_fn._saved_input.numel() == 0


class Pair(NamedTuple):
    images: Tensor
    scale: Tensor


def test_inputs_that_are_named_tuples_are_verified() -> None:
    network = Wired(
        lambda m, pair: m[1](m[0](pair.images * pair.scale).transpose(2, 3)),
        *(conv_bn(3, 8), Head(8)),
    )
    assert trace(network, (Pair(example(), torch.ones(1)),)).names == ("m.0.0",)
    wrong = Wired(lambda m, pair: _read_backwards(m, pair.images), *network.m[:1], conv_bn(8, 4))
    wrong.m.append(Head(4))
    with pytest.raises(TraceError, match="disagree"):
        trace(wrong, (Pair(example(), torch.ones(1)),))


def test_verification_cuts_every_group() -> None:
    layers = [conv_bn(2, 2) for _ in range(7)]
    space = trace(nn.Sequential(conv_bn(3, 2), *layers, Head(2)), example())
    assert all(len(kept) == 1 for kept in _irregular(space, None).kept)


# What cannot be followed at all is refused before anything is changed.


def _asserted(m: Any, x: Tensor) -> Tensor:
    y = m[0](x).transpose(2, 3)
    assert y.shape[1] == 8, "eight channels"
    return m[1](y)


def _probed(m: Any, x: Tensor) -> Tensor:
    y = m[0](x)
    m[2](y.detach())
    return m[1](y)


def _shuffled(m: Any, x: Tensor) -> Tensor:
    y = m[0](x)
    n, c, h, w = y.shape
    return m[2](m[1](y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)))


def _tied() -> nn.Module:
    first, second = conv(8, 8), conv(8, 8)
    second.weight = first.weight
    return nn.Sequential(conv_bn(3, 8), first, nn.ReLU(), second, Head(8))


def _old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        normed = nn.utils.weight_norm(nn.Conv2d(8, 8, 3))
    return nn.Sequential(conv_bn(3, 8), normed, Head(8))


def _parametrized() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
    return nn.Sequential(conv_bn(3, 8), normed, Head(8))


def _frozen() -> nn.Module:
    return TINY["plain"]().requires_grad_(False)


def _buffered(combine: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    network = Wired(lambda m, x: m[1](combine(m[0](x), m.scale)), conv_bn(3, 8), Head(8))
    network.m.register_buffer("scale", torch.ones(8, 1, 1))
    return network


def _read_backwards(m: Any, x: Tensor) -> Tensor:
    return m[2](m[1](m[0](x).flip(1)))


def _ending_in(end: Callable[[Tensor], Tensor]) -> nn.Module:
    return Wired(lambda m, x: end(m[0](x)), TINY["plain"]())


def _with_normed_neighbours(m: Any, x: Tensor) -> Tensor:
    return m[2](m[1](nn.functional.local_response_norm(m[0](x), 3)))


def _poisoned() -> nn.Module:
    network = nn.Sequential(conv_bn(3, 8), nn.Upsample(scale_factor=2), conv_bn(8, 6), Head(6))
    nn.init.constant_(network[0][0].weight, float("nan"))
    return network


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a detached output": (lambda: _ending_in(Tensor.detach), "the output carries no gradient: det"),
    "an argmax": (lambda: _ending_in(lambda y: y.argmax(1)), "the output carries no gradient"),
    "a network under no_grad": (
        lambda: Wired(torch.no_grad()(lambda m, x: m[0](x)), TINY["plain"]()),
        "the output carries no gradient",
    ),
    "a network under inference_mode": (
        lambda: Wired(torch.inference_mode()(lambda m, x: m[0](x)), TINY["plain"]()),
        "the output carries no gradient",
    ),
    "a network made under inference_mode": (
        torch.inference_mode()(TINY["plain"]),
        r"`0\.0\.weight` was made under torch\.inference_mode .* outside of it",
    ),
    "weights without a shape": (
        lambda: nn.Sequential(nn.LazyConv2d(8, 3), conv_bn(8, 6), Head(6)),
        "`0`: is a LazyConv2d whose weight has no shape yet; run the network once",
    ),
    "a scripted part": (
        lambda: nn.Sequential(conv_bn(3, 8), torch.jit.script(conv_bn(8, 6)), Head(6)),
        "`1`: is compiled by torch.jit",
    ),
    "weights that are not finite": (_poisoned, "its output is not finite on the example inputs"),
    "a function that mixes neighbouring channels a little": (
        lambda: Wired(_with_normed_neighbours, conv_bn(3, 8), conv_bn(8, 4), Head(4)),
        "disagree for `m.0.0`;",
    ),
    "no weighted layer": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), "no convolution"),
    "no parameter": (lambda: nn.Flatten(), "no convolution"),
    "only an output": (lambda: nn.Conv2d(3, 4, 1), "no prunable channel group"),
    "fully frozen": (_frozen, "parameters are frozen"),
    "a pair": (lambda: Wired(lambda m, x: (m[0](x), x), TINY["plain"]()), "returns tuple, not a"),
    "a dict": (lambda: Wired(lambda m, x: {"y": m[0](x)}, TINY["plain"]()), "returns dict, not"),
    "a layer that never runs": (lambda: Wired(lambda m, x: m[0](x), *[TINY["plain"]()] * 1, conv(1, 1)),
                                "never run"),
    "tied weights": (_tied, "is the same as `1.weight`"),
    "old weight norm": (_old_weight_norm, "remove_weight_norm"),
    "a parametrization": (_parametrized, "remove_parametrizations"),
    "channel shuffle": (lambda: Wired(_shuffled, conv_bn(3, 8), conv_bn(8, 4), Head(4)), "`m.0.0`"),
    "channels read backwards": (
        lambda: Wired(_read_backwards, conv_bn(3, 8), conv_bn(8, 4), Head(4)),
        "disagree for `m.0.0`;",
    ),
    "a buffer that shares channels": (lambda: _buffered(operator.mul), "disagree"),
    "a buffer that is added": (lambda: _buffered(operator.add), "disagree"),
    "a sum with the input": (
        lambda: Wired(lambda m, x: m[1](m[0](x) + x), conv_bn(3, 3), Head(3)),
        "disagree",
    ),
    "a sum with what is cut off from the gradient": (
        lambda: Wired(
            lambda m, x: m[2](m[0](x) + m[1](x).detach()), conv_bn(3, 8), conv_bn(3, 8), Head(8)
        ),
        "disagree",
    ),
    "a head on what is cut off from the gradient": (
        lambda: Wired(_probed, conv_bn(3, 8), Head(8), Head(8)),
        r"disagree for `m.0.0` \(RuntimeError: ",
    ),
    "an assertion about widths": (
        lambda: Wired(_asserted, conv_bn(3, 8), Head(8)),
        r"disagree for `m.0.0` \(AssertionError: eight channels",
    ),
    "a fixed view": (
        lambda: Wired(
            lambda m, x: m[1](m[0](x).view(-1, 512)), conv_bn(3, 8), nn.Linear(512, 5)
        ),
        "a fixed view",
    ),
    "softmax over channels": (
        lambda: Wired(lambda m, x: m[1](m[0](x).softmax(1)), conv_bn(3, 8), Head(8)),
        "disagree",
    ),
    "a concatenation straight into a flatten": (
        lambda: Wired(
            lambda m, x: m[2](torch.cat([m[0](x), m[1](x)], 1).flatten(1)),
            *(conv_bn(3, 2), conv_bn(3, 2), nn.Linear(256, 5)),
        ),
        "disagree",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    factory, words = REFUSED[case]
    with pytest.raises(TraceError, match=words):
        trace(factory(), example())


@pytest.mark.parametrize("fill", [0.0, 1.0])
@pytest.mark.parametrize("wire", [_shuffled, _read_backwards])
def test_constant_example_inputs_hide_no_wrong_order(wire: Any, fill: float) -> None:
    """A fresh network maps zeros to its last bias, whatever becomes of the channels in between."""
    network = Wired(wire, conv_bn(3, 8), conv_bn(8, 4), Head(4)).eval()
    with pytest.raises(TraceError, match="disagree"):
        trace(network, torch.full((1, 3, 8, 8), fill))
    assert trace(tiny("plain"), torch.full((1, 3, 8, 8), fill)).names == ("0.0", "1.0")


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.zeros(2, 4, 8, 8), r"shape \(2, 4, 8, 8\): the network does not run on them"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.long), "does not run on them"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(1)), "does not run on them"),
        ({"nothing": torch.zeros(2, 3, 8, 8)}, "does not run on them"),
        (
            torch.zeros(2, 3, 8, 8, device="meta"),
            r"on meta, the network is on cpu; .*\.to\('cpu'\)",
        ),
    ],
)
def test_wrong_example_inputs(inputs: Any, words: str) -> None:
    with pytest.raises(TraceError, match=words):
        trace(tiny("plain"), inputs)


def test_example_inputs_as_tuple_and_as_keywords() -> None:
    network = tiny("plain")
    whole = Wired(lambda m, x: m[0](x), network).eval()
    expected = trace(whole, example()).fingerprint
    assert trace(whole, (example(),)).fingerprint == expected
    assert trace(whole, {"x": example()}).fingerprint == expected


@pytest.mark.parametrize(
    ("network", "inputs", "name"),
    [
        (nn.Sequential(conv(3, 8), conv(8, 6)), torch.rand(3, 8, 8), "0"),
        (nn.Sequential(nn.ConvTranspose1d(3, 8, 3), nn.Conv1d(8, 6, 3)), torch.rand(3, 8), "0"),
        (nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 6)), torch.rand(7), "0"),
    ],
    ids=["convolutions", "one dimension", "linear layers"],
)
def test_example_inputs_need_a_batch(network: nn.Module, inputs: Tensor, name: str) -> None:
    with pytest.raises(
        TraceError, match=rf"`{name}`: .* give a batch, or that tensor one: `x\.unsqueeze\(0\)`"
    ):
        trace(network, inputs)
    assert len(trace(network, inputs.unsqueeze(0)).groups) == 1


def test_layers_may_be_called_by_keyword() -> None:
    by_place, by_keyword = (
        Wired(wire, conv_bn(3, 6), nn.ConvTranspose2d(6, 8, 2), Head(8))
        for wire in (
            lambda m, x: m[2](m[1](m[0](x))),
            lambda m, x: m[2](m[1](input=m[0](x))),
        )
    )
    assert trace(by_keyword, example()).fingerprint == trace(by_place, example()).fingerprint


class OwnName(nn.Conv2d):
    """A layer whose input has another name than torch's layers give it."""

    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(features)


def test_a_module_called_by_a_name_of_its_own_is_not_taken_for_cut_off() -> None:
    network = Wired(lambda m, x: m[1](features=m[0](x)), nn.Conv2d(3, 8, 3), OwnName(8, 4, 1))
    assert DependencyTrace(network, example()).keeps_channel_order


@pytest.mark.parametrize("name", ["plain", "squeeze-excite"])
def test_tracing_works_under_inference_mode(name: str) -> None:
    network = tiny(name)
    expected = trace(network, example()).fingerprint
    with torch.inference_mode():
        assert trace(network, example()).fingerprint == expected
    assert not any(parameter.is_inference() for parameter in network.parameters())


def test_a_scripted_function_is_no_obstacle() -> None:
    network = nn.Sequential(conv_bn(3, 8), torch.jit.script(nn.ReLU()), Head(8))
    assert trace(network, example()).names == ("0.0",)


class Unhookable(nn.Conv2d):
    def register_forward_hook(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no hooks here")


def test_hooks_that_cannot_be_set_leave_none_behind() -> None:
    network = nn.Sequential(conv_bn(3, 8), Unhookable(8, 6, 3), Head(6))
    with pytest.raises(RuntimeError, match="no hooks here"):
        trace(network, example())
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_inputs_of_any_size_prove_networks_right(size: float) -> None:
    """Exponentials overflow on large inputs, sigmoids saturate: neither is a wrong order."""
    network = randomised(
        Wired(
            lambda m, x: m[2](m[1](torch.exp(m[0](x)).transpose(2, 3))),
            *(conv(3, 8), SqueezeExcite(8, 4), Head(8)),
        ),
        0,
    )
    assert trace(network, size * example()).names == ("m.0", "m.1.reduce")


def test_an_attached_network_is_refused() -> None:
    network = tiny("plain")
    space = trace(network, example())
    with (
        Gating(network, space, lambda: torch.ones(space.total_units)),
        pytest.raises(TraceError, match=r"`detach\(\)`"),
    ):
        trace(network, example())


def test_auxiliary_heads_are_refused() -> None:
    network = torchvision_network("googlenet", init_weights=False).train()
    with pytest.raises(TraceError, match=r"never run in eval mode \(`aux1"):
        trace(network, example(1, 64))
    assert network.training


def test_shufflenet_is_refused() -> None:
    with pytest.raises(TraceError, match=r"ShuffleNetV2: .* such as a channel shuffle; take a"):
        trace(torchvision_network("shufflenet_v2_x0_5"), example(1, 64))


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: None,
        lambda value: {**value, "kind": "plan"},
        lambda value: {**value, "version": 2},
        lambda value: {**value, "groups": None},
        lambda value: {**value, "groups": [{}]},
        lambda value: {**value, "layers": [{"name": "x"}]},
        lambda value: {key: item for key, item in value.items() if key != "excluded"},
    ],
)
def test_damaged_spaces_are_refused(damage: Callable[[Any], Any]) -> None:
    value = trace(tiny("plain"), example()).to_json()
    with pytest.raises(FileFormatError, match="channel space"):
        ChannelSpace.from_json(damage(value))


def test_removal_error_sees_a_wrong_removal() -> None:
    network = tiny("residual")
    space = trace(network, example())
    plan = random_plan(space, 0)
    other = resize(network, space, plan.widths)  # the same widths, but the leading channels
    assert removal_error(network, other, plan, example()) > 1e-2


def test_a_single_wrong_weight_is_no_rounding() -> None:
    network = tiny("residual")
    space = trace(network, example())
    plan = random_plan(space, 0)
    smaller = remove(copy.deepcopy(network), plan, example())
    weight = max((p for p in smaller.parameters() if p.ndim == 4), key=torch.Tensor.numel)
    with torch.no_grad():
        weight[0, 0, 0, 0] += 1e-3 * weight.abs().max()
    error = removal_error(network, smaller, plan, example())
    assert TOLERANCE < error < 100 * TOLERANCE
    assert not carried_out(network, smaller, plan, example(), error)


def test_constant_inputs_hide_no_wrong_removal() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, bias=False),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    inputs = torch.zeros(1, 3, 8, 8)
    space = trace(network, inputs)
    plan = random_plan(space, 0)
    smaller = remove(copy.deepcopy(network), plan, inputs)
    assert removal_error(network, smaller, plan, inputs) <= TOLERANCE
    nn.init.normal_(smaller[0].weight)  # type: ignore[index, arg-type]
    assert removal_error(network, smaller, plan, inputs) > 1e-2


def test_noise_is_of_a_kind_that_the_network_takes() -> None:
    class Logarithmic(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = super().forward(torch.log(x + 1e-6))
            return found

    network = Logarithmic(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    for inputs in (torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)):
        seen = informative(network, inputs)
        assert isinstance(seen, torch.Tensor)
        assert 0 <= seen.min() < seen.max() < 1
        space = trace(network, inputs)
        plan = random_plan(space, 0)
        smaller = remove(copy.deepcopy(network), plan, inputs)
        assert removal_error(network, smaller, plan, inputs) <= TOLERANCE
    given = example()
    assert informative(network, given) is given
    only_zeros = torch.zeros(
        1, 4, 8, 8
    )  # the network takes no input of this shape, whatever is in it
    assert informative(network, only_zeros) is only_zeros


class Wild(dict[str, int]):
    """A mapping that may be copied and not looked into."""

    def values(self) -> Any:
        raise LookupError("a value is missing")


def test_copies_look_into_no_attribute_without_need() -> None:
    network: Any = tiny("plain")
    network.settings, network.loop = Wild(a=1), []
    network.loop.append(network.loop)
    assert copied(network).settings == {"a": 1}
    network.kept = [network(example())]
    found: Any = copied(network)
    assert torch.equal(found.kept[0], network.kept[0])
    assert found.kept[0].grad_fn is None is not network.kept[0].grad_fn


def test_rounding_is_told_from_a_wrong_removal_in_float64() -> None:
    """Whatever float32 found: the right channels agree in float64, others do not."""
    network = tiny("residual")
    space = trace(network, example())
    plan, wrong = random_plan(space, 0), random_plan(space, 1)
    smaller = remove(copy.deepcopy(network), plan, example())
    assert carried_out(network, smaller, plan, example(), 0.05)
    shifted = [
        tuple((unit + 1) % g.units for unit in kept)
        for g, kept in zip(space.groups, plan.kept, strict=True)
    ]
    other = PruningPlan(space, tuple(tuple(sorted(kept)) for kept in shifted))
    assert not carried_out(network, smaller, other, example(), 0.05)
    assert not carried_out(network, smaller, wrong, example(), float("inf"))
    assert next(network.parameters()).dtype == torch.float32
