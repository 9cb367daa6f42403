"""Weight unification: projection against a slow twin, exact files, training, channels, pipeline."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks import unification_promise
from benchmarks.unification_promise import bytes_at
from tests import networks
from wgates_plugin import trace
from wgates_plugin.errors import ConfigError, FileFormatError, RunFolderError, SurgeryError
from wgates_plugin.files import load_tensors, write_json
from wgates_plugin.pipeline import prune_to_target
from wgates_plugin.plan import PruningPlan
from wgates_plugin.recipe.checks import checked
from wgates_plugin.run_folder import RunFolder
from wgates_plugin.strategies.base import InMemory
from wgates_plugin.surgery import rebuild
from wgates_plugin.targets import MacsTarget, PruningSettings
from wgates_plugin.training import TrainingSettings
from wgates_plugin.transforms.unification import (
    BlockGrid,
    UnificationSettings,
    Unified,
    cut_dead,
    dead_channels,
    layer_grids,
    load_unified,
    project,
    save_unified,
    unify,
)
from wgates_plugin.transforms.unification.admm import Admm
from wgates_plugin.transforms.unification.file import MAGIC, decoded, encoded
from wgates_plugin.transforms.unification.projection import KEPT, PRUNED, UNIFIED

QUICK = TrainingSettings(learning_rate=0.02, accelerator="cpu")


def slow_projection(
    weight: Tensor, settings: UnificationSettings
) -> tuple[np.ndarray, dict[tuple[int, int], int]]:
    """The projection written out in loops over blocks and entries, ragged edges cut off."""
    matrix = weight.flatten(1).double().numpy().copy()
    r, c = settings.block_shape
    entries: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for row in range(matrix.shape[0]):
        for column in range(matrix.shape[1]):
            entries.setdefault((row // r, column // c), []).append((row, column))
    kinds = dict.fromkeys(entries, KEPT)

    def least(error: Any, share: float) -> list[tuple[int, int]]:
        free = sorted(block for block in entries if kinds[block] == KEPT)
        free.sort(key=lambda block: error([matrix[e] for e in entries[block]]))
        return free[: int(share * len(free) + 0.5)]

    def spread(values: list[float]) -> float:
        mean = sum(abs(v) for v in values) / len(values)
        return sum((abs(v) - mean) ** 2 for v in values)

    if settings.mode != "unify":
        for block in least(lambda values: sum(v * v for v in values), settings.prune_fraction):
            kinds[block] = PRUNED
    if settings.mode != "prune":
        for block in least(spread, settings.unify_fraction):
            kinds[block] = UNIFIED
    for block, kind in kinds.items():
        mean = sum(abs(matrix[e]) for e in entries[block]) / len(entries[block])
        for e in entries[block]:
            if kind == PRUNED:
                matrix[e] = 0.0
            elif kind == UNIFIED:
                matrix[e] = -mean if matrix[e] < 0 else mean
    return matrix, kinds


shapes = st.one_of(
    st.tuples(st.integers(1, 13), st.integers(1, 20)),
    st.tuples(st.integers(1, 10), st.integers(1, 5), st.just(3), st.just(3)),
)
settings_drawn = st.builds(
    UnificationSettings,
    mode=st.sampled_from(["prune", "unify", "combined"]),
    block=st.sampled_from(["4x4", "8x1", "1x8"]),
    prune_fraction=st.floats(0, 1),
    unify_fraction=st.floats(0, 1),
)


@settings(max_examples=80, deadline=None)
@given(shapes, settings_drawn, st.integers(0, 99))
def test_projection_equals_its_slow_twin(
    shape: tuple[int, ...], chosen: UnificationSettings, seed: int
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    grid = BlockGrid.over(shape, chosen.block_shape)
    found, structure = project(weight, grid, chosen)
    expected, kinds = slow_projection(weight, chosen)
    assert structure.kinds.tolist() == [kinds[b] for b in np.ndindex(grid.shape)]
    assert found.shape == weight.shape
    np.testing.assert_allclose(found.flatten(1).numpy(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(structure.fixed(found), found)
    assert torch.equal(grid.join(grid.split(weight), weight.shape), weight)


def test_zero_is_positive_and_pruned_blocks_are_plain_zero() -> None:
    weight = torch.zeros(8, 8)
    weight[0, 0] = -0.0
    weight[4, 4] = 1.0
    grid = BlockGrid.over(weight.shape, (4, 4))
    unified, _ = project(weight, grid, UnificationSettings(mode="unify", unify_fraction=1.0))
    assert (unified[4:, 4:] == 1 / 16).all()
    assert not torch.signbit(unified).any()
    pruned, _ = project(-weight, grid, UnificationSettings(mode="prune", prune_fraction=1.0))
    assert not torch.signbit(pruned).any()


def test_a_gradient_within_the_structure_is_the_steepest_one() -> None:
    """Against autograd through one magnitude per block."""
    weight = torch.randn(8, 8)
    chosen = UnificationSettings(prune_fraction=0.5, unify_fraction=0.5)
    projected, structure = project(weight, BlockGrid.over(weight.shape, (4, 4)), chosen)
    assert sorted(structure.kinds.tolist()) == [KEPT, UNIFIED, PRUNED, PRUNED]
    gradient = torch.randn(8, 8)
    fixed = structure.fixed(gradient)
    for number, kind in enumerate(structure.kinds.tolist()):
        rows, columns = number // 2 * 4, number % 2 * 4
        place = (slice(rows, rows + 4), slice(columns, columns + 4))
        if kind == UNIFIED:
            magnitude = torch.ones((), requires_grad=True)
            (magnitude * projected[place].sign() * gradient[place]).sum().backward()
            expected = magnitude.grad / 16 * projected[place].sign()
        else:
            expected = gradient[place] if kind == KEPT else torch.zeros(4, 4)
        torch.testing.assert_close(fixed[place], expected)


# Files


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(
        first[n].dtype == second[n].dtype
        and first[n].shape == second[n].shape
        and bits(first[n]) == bits(second[n])
        for n in first
    )


EDGE = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3.4e38]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@settings(max_examples=80, deadline=None)
@given(
    shapes,
    st.sampled_from([(4, 4), (8, 1), (1, 8)]),
    st.sampled_from(DTYPES),
    st.integers(0, 999),
    st.booleans(),
)
def test_any_weight_survives_the_file_bit_for_bit(
    shape: tuple[int, ...], block: tuple[int, int], dtype: torch.dtype, seed: int, structured: bool
) -> None:
    draws = np.random.default_rng(seed)
    if structured:  # blocks of one magnitude, among them zeros of both signs, infinities and nan
        pattern = draws.choice(EDGE[:7], size=(-(-shape[0] // block[0]), 400))
        values = np.kron(pattern, np.ones(block))[: shape[0], : math.prod(shape[1:])]
        values = np.copysign(values, draws.choice([1.0, -1.0], size=values.shape))
    else:
        values = draws.choice(EDGE, size=(shape[0], math.prod(shape[1:])))
    weight = torch.from_numpy(values.copy()).to(dtype).reshape(shape)
    state = {"w": weight, "n": torch.tensor(3), "e": torch.empty(0, 2), "b": torch.tensor([True])}
    found = decoded(encoded(state, {"w": BlockGrid.over(shape, block)}))
    assert same_bits(found, state)


def test_not_a_numbers_keep_their_payload() -> None:
    raw = np.arange(0x7FC00001, 0x7FC00041, dtype=np.uint32).reshape(8, 8)
    state = {"w": torch.from_numpy(raw.view(np.int32).copy()).view(torch.float32)}
    assert same_bits(decoded(encoded(state, {"w": BlockGrid.over((8, 8), (4, 4))})), state)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.sampled_from([(4, 4), (8, 1), (1, 8)]))
def test_a_cut_weight_keeps_its_blocks(seed: int, block: tuple[int, int]) -> None:
    draws = np.random.default_rng(seed)
    weight = torch.randn(16, 6, 3, 3, generator=torch.Generator().manual_seed(seed))
    grid = BlockGrid.over(weight.shape, block)
    unified, _ = project(weight, grid, UnificationSettings(mode="combined"))
    kept = {0: np.flatnonzero(draws.random(16) < 0.6), 1: np.flatnonzero(draws.random(6) < 0.6)}
    if not kept[0].size or not kept[1].size:
        return
    cut = unified[kept[0]][:, kept[1]]
    cut_grid = grid.cut(weight.shape, kept)
    assert torch.equal(cut_grid.join(cut_grid.split(cut), cut.shape), cut)
    data = encoded({"w": cut}, {"w": cut_grid})
    assert same_bits(decoded(data), {"w": cut})
    sizes = [magnitudes.abs() for magnitudes in cut_grid.split(cut)]
    for magnitudes, real in zip(sizes, cut_grid.real, strict=True):
        assert magnitudes[real].unique().numel() <= 1


def test_a_unified_file_is_as_small_as_its_structure(tmp_path: Path) -> None:
    weight = torch.randn(256, 256)
    grid = BlockGrid.over(weight.shape, (4, 4))
    unified, _ = project(weight, grid, UnificationSettings(mode="unify"))
    size = save_unified(tmp_path / "a.wgu", {"w": unified}, {"w": grid})
    assert size == (tmp_path / "a.wgu").stat().st_size
    # 16 signs and a 32-bit magnitude for 16 floats of 32 bits
    assert size < weight.numel() * 4 * (48 / 512) + 500
    pruned, _ = project(weight, grid, UnificationSettings(mode="prune", prune_fraction=1.0))
    assert save_unified(tmp_path / "b.wgu", {"w": pruned}, {"w": grid}) < 500


def example_file(path: Path) -> bytes:
    weight = torch.randn(16, 16)
    grid = BlockGrid.over(weight.shape, (4, 4))
    unified, _ = project(weight, grid, UnificationSettings())
    save_unified(path, {"w": unified, "b": torch.randn(5)}, {"w": grid})
    return path.read_bytes()


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.wgu"
    data = example_file(path)
    for length in (0, 5, 20, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(FileFormatError, match=r"w\.wgu"):
            load_unified(path)
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        with pytest.raises(FileFormatError):
            load_unified(path)
    with pytest.raises(FileFormatError, match="cannot be read"):
        load_unified(tmp_path / "none.wgu")
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(FileFormatError, match="no file of unified weights"):
        load_unified(path)
    path.write_bytes(data[:8] + struct.pack("<H", 99) + data[10:])
    with pytest.raises(FileFormatError, match="version 99, this package reads 1"):
        load_unified(path)


def forged(data: bytes, change: Any) -> bytes:
    """The file with a changed header and right checksums."""
    _, version, _, length, _ = struct.unpack_from("<8sHIII", data)
    header = json.loads(zstandard.decompress(data[22 : 22 + length]))
    body = data[22 + length :]
    change(header)
    packed = zstandard.compress(json.dumps(header).encode())
    return (
        struct.pack("<8sHIII", MAGIC, version, zlib.crc32(packed), len(packed), zlib.crc32(body))
        + packed
        + body
    )


FORGERIES: dict[str, Any] = {
    "larger shape": lambda h: h["tensors"][0].update(shape=[32, 16]),
    "smaller shape": lambda h: h["tensors"][1].update(shape=[4]),
    "negative shape": lambda h: h["tensors"][1].update(shape=[-5]),
    "endless shape": lambda h: h["tensors"][0].update(shape=[2**50, 2**50]),
    "other block": lambda h: h["tensors"][0]["grid"].update(block=[8, 1]),
    "empty block": lambda h: h["tensors"][0]["grid"].update(block=[0, 4]),
    "no grid": lambda h: h["tensors"][0].pop("grid"),
    "far rows": lambda h: h["tensors"][0]["grid"].update(rows=[2**40] * 16),
    "falling rows": lambda h: h["tensors"][0]["grid"].update(rows=[1] * 15 + [-3]),
    "unknown dtype": lambda h: h["tensors"][0].update(dtype="object"),
    "other dtype": lambda h: h["tensors"][0].update(dtype="float16"),
    "missing tensor": lambda h: h["tensors"].pop(),
    "missing frame": lambda h: h["frames"].pop(),
    "huge frame": lambda h: h["frames"][0].__setitem__(2, 2**60),
    "negative frame": lambda h: h["frames"][0].__setitem__(1, -1),
    "no frames": lambda h: h.pop("frames"),
    "words": lambda h: h.update(tensors="words"),
    "empty but endless shape": lambda h: h["tensors"][1].update(shape=[0, 10**30]),
    "empty but overflowing shape": lambda h: h["tensors"][1].update(shape=[0, 2**62, 2**62]),
    "infinite shape": lambda h: h["tensors"][1].update(shape=[math.inf]),
    "half a size": lambda h: h["tensors"][1].update(shape=[5.5]),
    "infinite frame": lambda h: h["frames"][0].__setitem__(1, math.inf),
    "frame of a foreign digit": lambda h: h["frames"][0].__setitem__(0, "kinds-²-0"),
    "endless rows": lambda h: h["tensors"][0]["grid"].update(rows=[1] * 15 + [10**30]),
    "overflowing rows": lambda h: h["tensors"][0]["grid"].update(rows=[2**62] * 16),
    "more weights than blocks": lambda h: h["tensors"][0].update(shape=[16, 10**9]),
    "named twice": lambda h: h["tensors"][1].update(name="w"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_header_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    data = example_file(tmp_path / "w.wgu")
    assert decoded(forged(data, lambda header: None)).keys() == {"w", "b"}
    with pytest.raises(FileFormatError):
        decoded(forged(data, FORGERIES[name]))


def test_a_header_that_only_takes_resources_is_refused(tmp_path: Path) -> None:
    """Too deep for the parser, or a small frame that unpacks to far too much."""
    path = tmp_path / "w.wgu"
    for text, why in ((b"[" * 100_000, "recursion"), (b" " * (2**26 + 1), "longer than")):
        packed = zstandard.compress(text)
        sums = (zlib.crc32(packed), len(packed), zlib.crc32(b""))
        path.write_bytes(struct.pack("<8sHIII", MAGIC, 1, *sums) + packed)
        with pytest.raises(FileFormatError, match=rf"w\.wgu.*{why}.*write it anew"):
            load_unified(path)


# Training


def batches(count: int = 3, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(3)
    targets = torch.randint(0, networks.CLASSES, (count, size), generator=draws)
    images = 0.3 * torch.randn(count, size, 3, 8, 8, generator=draws)
    for batch in range(count):
        for row, label in enumerate(targets[batch].tolist()):
            images[batch, row, label % 3, label] += 1.0
    return list(zip(images, targets, strict=True))


def has_structure(unified: Unified) -> bool:
    """Every block that is no longer free is zero or of one magnitude, to the bit."""
    exact = 0
    for name, grid in unified.grids.items():
        blocks = grid.split(unified.network.get_parameter(name).detach()).abs()
        for magnitudes, real in zip(blocks, grid.real, strict=True):
            exact += magnitudes[real].unique().numel() <= 1
    facts = unified.facts
    return exact >= facts["blocks_unified"] + facts["blocks_pruned"]


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "concat", "flattened"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_structure_is_exact_after_retraining(name: str, optimizer: str) -> None:
    network = networks.tiny(name)
    before = copy.deepcopy(network.state_dict())
    chosen = UnificationSettings("combined", "1x8", 0.3, rho=(1e-2, 1e-1), retrain_epochs=2)
    training = TrainingSettings(learning_rate=0.01, optimizer=optimizer, accelerator="cpu")
    unified = unify(
        network, batches(), settings=chosen, training=training, skip_small=True, progress=False
    )
    assert unified.grids
    assert has_structure(unified)
    assert unified.facts["blocks_kept"] == 0
    assert len(unified.history) == 4
    assert same_bits(dict(network.state_dict()), dict(before)), "the user's network was changed"
    moved = [
        n for n in unified.grids if not torch.equal(unified.network.state_dict()[n], before[n])
    ]
    assert moved == list(unified.grids)
    weighted = [n for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert not {f"{weighted[0]}.weight", f"{weighted[-1]}.weight"} & set(unified.grids)


def test_retraining_moves_magnitudes_and_learns() -> None:
    network, data = networks.tiny("plain"), batches()
    options: dict[str, Any] = {"training": QUICK, "progress": False}
    none = unify(network, data, settings=UnificationSettings(rho=(), retrain_epochs=0), **options)
    some = unify(network, data, settings=UnificationSettings(rho=(), retrain_epochs=8), **options)
    assert has_structure(none)
    assert has_structure(some)
    losses = [record["loss"] for record in some.history]
    assert losses[-1] < losses[0]
    for name, grid in some.grids.items():
        first, second = (
            grid.split(u.network.get_parameter(name).detach()).abs() for u in (none, some)
        )
        assert torch.equal(first == 0, second == 0)
        assert not torch.equal(first, second)


def test_admm_pulls_weights_toward_the_structure() -> None:
    data, network = batches(8), networks.tiny("plain")
    found = {}
    for pull in (1e-6, 1.0):
        chosen = UnificationSettings(rho=(pull,) * 4, retrain_epochs=0)
        found[pull] = unify(network, data, settings=chosen, training=QUICK, progress=False).facts
    for facts in found.values():
        assert facts["distance_before"] == pytest.approx(found[1.0]["distance_before"])
    assert found[1.0]["distance_after_admm"] < 0.7 * found[1.0]["distance_before"]
    assert found[1.0]["distance_after_admm"] < 0.7 * found[1e-6]["distance_after_admm"]


def test_admm_gradient_and_updates_are_those_of_the_paper() -> None:
    network, chosen = networks.tiny("plain"), UnificationSettings(rho=(0.5, 2.0))
    admm = Admm(network, layer_grids(network, chosen), chosen)
    name = next(iter(admm.grids))
    weight = network.get_parameter(name)
    with torch.no_grad():
        weight += 0.1
    old_dual, weight.grad = admm.dual[name].clone(), torch.zeros_like(weight)
    target = admm.target[name].clone()
    (0.25 * (weight - target + old_dual).square().sum()).backward()
    expected, weight.grad = weight.grad.clone(), torch.zeros_like(weight)
    admm.add_gradients()
    torch.testing.assert_close(weight.grad, expected)
    admm.next_round()
    projected, _ = project(weight + old_dual, admm.grids[name], chosen)
    assert torch.equal(admm.target[name], projected)
    # the scaled dual is y / rho, and rho has become four times as large
    torch.testing.assert_close(admm.dual[name], (old_dual + weight - projected).detach() / 4)


class Interrupted(Exception):
    pass


class StopsAt(InMemory):
    """Checkpoints that end the process after so many saves."""

    def __init__(self, saves: int) -> None:
        super().__init__()
        self.left = saves

    def save_state(self, name: str, state: dict[str, Any]) -> None:
        super().save_state(name, state)
        self.left -= 1
        if self.left == 0:
            raise Interrupted


@pytest.mark.parametrize("saves", range(1, 6))
def test_interrupted_it_goes_on_and_ends_in_the_same_place(saves: int) -> None:
    network, data = networks.tiny("residual"), batches()
    chosen = UnificationSettings(rho=(1e-2, 3e-2), epochs_per_round=2, retrain_epochs=2)
    options: dict[str, Any] = {"settings": chosen, "training": QUICK, "progress": False}
    whole = unify(network, data, **options)
    kept = StopsAt(saves)
    with pytest.raises(Interrupted):
        unify(network, data, checkpoints=kept, **options)
    again = unify(network, data, checkpoints=kept, **options)
    assert same_bits(dict(again.network.state_dict()), dict(whole.network.state_dict()))
    assert again.facts == whole.facts
    assert [r["epoch"] for r in again.history] == list(range(6))


def test_checkpoints_of_another_call_are_refused() -> None:
    chosen = UnificationSettings(rho=(1e-2,), retrain_epochs=1)
    network, kept = networks.tiny("residual"), InMemory()

    def unified(**changes: Any) -> Unified:
        told = {"settings": chosen, "training": QUICK, "checkpoints": kept, **changes}
        return unify(told.pop("network", network), batches(), progress=False, **told)

    first = unified()
    other = copy.deepcopy(network)
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    fewer, faster = ({"prune_fraction": 0.1}, {"learning_rate": 0.1})
    for changes, what in (
        ({"settings": dataclasses.replace(chosen, **fewer)}, r"settings\.prune_fraction"),
        ({"settings": dataclasses.replace(chosen, **faster)}, r"settings\.learning_rate, .*"),
        ({"training": dataclasses.replace(QUICK, momentum=0.5)}, r"training\.momentum"),
        ({"seed": 1}, "seed"),
        ({"network": other}, "weights"),
    ):
        with pytest.raises(RunFolderError, match=rf"`unification\.pt`.* \(different: {what}\)"):
            unified(**changes)
    again = unified(training=dataclasses.replace(QUICK, epochs=9))  # which have no say here
    assert same_bits(dict(again.network.state_dict()), dict(first.network.state_dict()))
    kept._states["unification.pt"].pop("identity")  # as an older version has left it
    assert same_bits(dict(unified().network.state_dict()), dict(first.network.state_dict()))


def test_the_saved_network_comes_back(tmp_path: Path) -> None:
    unified = unify(networks.tiny("residual"), batches(), training=QUICK, progress=False)
    unified.save(tmp_path / "w.wgu")
    assert same_bits(load_unified(tmp_path / "w.wgu"), dict(unified.network.state_dict()))


def test_bytes_at_equal_accuracy() -> None:
    points, whole = [(10.0, 0.86), (100.0, 0.88)], (1000.0, 0.9)
    assert bytes_at(0.87, points, whole) == pytest.approx(1000**0.5)
    assert bytes_at(0.89, points, whole) == pytest.approx(100_000**0.5)
    assert bytes_at(0.8, points, whole) == 10.0
    assert bytes_at(0.9, points, whole) == pytest.approx(1000.0)
    # a worse larger file does not hide a better smaller one
    assert bytes_at(0.88, [*points, (500.0, 0.5)], whole) == pytest.approx(100.0)


def test_a_stored_run_of_other_settings_is_not_taken(tmp_path: Path) -> None:
    path, mine = tmp_path / "pruning-0.5.json", UnificationSettings("prune", retrain_epochs=6)
    settings = unification_promise.settings_of(10_000, 0, mine)
    assert unification_promise.stored(path, settings) is None
    write_json(path, {"settings": settings, "result": {"accuracy": 0.9}})
    assert unification_promise.stored(path, settings) == {"accuracy": 0.9}
    other = unification_promise.settings_of(10_000, 1, UnificationSettings(retrain_epochs=6))
    with pytest.raises(RunFolderError, match=r"different: seed, unification\); choose another"):
        unification_promise.stored(path, other)
    write_json(path, {"accuracy": 0.9})
    with pytest.raises(RunFolderError, match="does not say so"):
        unification_promise.stored(path, settings)


def test_less_accuracy_asked_for_means_fewer_bytes() -> None:
    row: dict[str, Any] = {
        "dense": {"bytes": 1000.0, "accuracy": 0.9},
        "pruning": [{"bytes": 100.0, "accuracy": 0.88}],
        "unification": [{"bytes": 10.0, "accuracy": 0.88}],
    }
    asked, beside = (unification_promise.ratio([row], lost) for lost in (0.0, 0.01))
    assert asked["ratio"] == pytest.approx(1.0)
    assert beside["accuracy"] == pytest.approx(0.89)
    assert beside["ratio"] == pytest.approx(100.0 / 100_000**0.5)


# Settings and layers


def test_all_wrong_settings_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        UnificationSettings(
            mode="merge", block="3x3", prune_fraction=2, unify_fraction=math.nan, rho=(0.0,),
            epochs_per_round=0, retrain_epochs=-1, learning_rate=-1.0, ignored_layers="fc",
        )  # fmt: skip
    assert len(caught.value.problems) == 9


def test_small_and_unknown_layers_are_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3), nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="4x4 is larger than the 2x72 kernel matrix of layer `1`"):
        layer_grids(network, UnificationSettings())
    with pytest.raises(ConfigError) as caught:
        layer_grids(network, UnificationSettings(ignored_layers=("1", "head")))
    assert len(caught.value.problems) == 1
    assert list(layer_grids(network, UnificationSettings(block="1x8"))) == ["1.weight"]
    with pytest.raises(ConfigError, match="no layer to unify among 3"):
        layer_grids(network, UnificationSettings(ignored_layers=("1",)))
    assert not layer_grids(network, UnificationSettings(), skip_small=True)


def test_frozen_layers_are_left_alone() -> None:
    network = networks.tiny("residual")
    layer = network.get_submodule("1.main.1")
    layer.weight.requires_grad_(False)
    before = layer.weight.clone()
    settings = UnificationSettings(rho=(1e-2,), retrain_epochs=1)
    unified = unify(network, batches(), settings=settings, training=QUICK, progress=False)
    assert "1.main.1.weight" not in unified.grids
    assert unified.grids
    after = unified.network.get_submodule("1.main.1").weight
    assert torch.equal(after, before)
    assert not after.requires_grad
    network.requires_grad_(False)
    with pytest.raises(ConfigError, match="as are frozen ones"):
        layer_grids(network, settings)


def test_computed_weights_are_refused_by_name() -> None:
    for computed in (
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
    ):
        network = networks.tiny("residual")
        computed(network.get_submodule("1.main.1"))
        with pytest.raises(ConfigError, match=r"layer `1\.main\.1`: its weight is computed"):
            layer_grids(network, UnificationSettings())
        ignored = UnificationSettings(ignored_layers=("1.main.1",))
        assert "1.main.1.weight" not in layer_grids(network, ignored)


# Channels


def silence(network: nn.Module, name: str, channels: list[int], shift: float) -> None:
    """Zero filters, and the shift that the BatchNorm behind them makes of it."""
    found = dict(network.named_modules())
    norm = found[name.rsplit(".", 1)[0] + ".1"]
    with torch.no_grad():
        found[name].weight[channels] = 0
        norm.running_mean[channels] = 0
        norm.bias[channels] = shift


def test_a_dead_channel_goes_and_one_that_shifts_stays() -> None:
    network = networks.tiny("plain")
    example = networks.example(2, 8, 0)
    space = trace(network, example)
    assert dead_channels(network, space, example).widths == space.full_widths
    silence(network, "0.0", [1, 2], -0.5)  # ReLU makes it zero
    silence(network, "0.0", [5], 0.5)  # read as 0.5 everywhere but at the padding
    plan = dead_channels(network, space, example)
    assert plan.kept[0] == (0, 3, 4, 5, 6, 7)
    assert plan.widths[1:] == space.full_widths[1:]
    with torch.no_grad():
        network[1][0].weight[:, 5] = 0  # nobody reads it
    plan = dead_channels(network, space, example)
    assert plan.kept[0] == (0, 3, 4, 6, 7)
    grids = layer_grids(network, UnificationSettings())
    smaller = cut_dead(Unified(network, grids), plan, example)
    with torch.no_grad():
        torch.testing.assert_close(
            smaller.network.eval()(example), network(example), rtol=1e-5, atol=1e-6
        )
    name = next(iter(smaller.grids))
    assert smaller.grids[name].columns.size == smaller.network.get_parameter(name)[0].numel()


class ByKeyword(nn.Module):
    """Calls its second layer by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        seen = self.second(input=torch.relu(self.first(images)))
        logits: Tensor = self.head(torch.relu(seen).mean((2, 3)))
        return logits


def test_dead_channels_of_a_layer_that_is_called_by_keyword() -> None:
    network, example = ByKeyword(), networks.example(2, 8, 0)
    with torch.no_grad():
        network.first.weight[2] = 0
        network.first.bias[2] = -1  # type: ignore[index]
    assert dead_channels(network, trace(network, example), example).widths == (7, 6)


def test_an_interrupted_unification_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", 0.7)
    save = RunFolder.save_state

    def stops(folder: RunFolder, name: str, state: dict[str, Any]) -> None:
        save(folder, name, state)
        if name == "unification.pt":
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_state", stops)
        with pytest.raises(Interrupted):
            run(tmp_path / "run", 0.7)
    resumed = run(tmp_path / "run", 0.7, resume=True)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], value)


def test_dead_channels_stay_for_floor_and_grid() -> None:
    network, example = networks.tiny("plain"), networks.example(2, 8, 0)
    silence(network, "0.0", [1, 2, 3], -0.5)
    assert dead_channels(network, trace(network, example), example).widths[0] == 5
    assert dead_channels(network, trace(network, example), example, grid=4).widths[0] == 8
    assert dead_channels(network, trace(network, example), example, grid=2).widths[0] == 6
    floors = {"0.0": 7}
    plan = dead_channels(network, trace(network, example, floors=floors), example)
    assert plan.widths[0] == 7


def test_a_cut_that_changes_the_function_is_refused() -> None:
    network, example = networks.tiny("plain"), networks.example(2, 8, 0)
    space = trace(network, example)
    plan = PruningPlan.leading(space, [4, *space.full_widths[1:]])
    with pytest.raises(SurgeryError, match="dead channels the outputs differ"):
        cut_dead(Unified(network, {}), plan, example)


def test_a_cut_is_checked_on_more_than_zeros() -> None:
    """Without biases the first layers answer zeros by zeros, whatever is cut."""
    body = (networks.conv(3, 12), nn.ReLU(), networks.conv(12, 12), nn.ReLU(), networks.Head(12))
    network = nn.Sequential(*body).eval()
    plan = PruningPlan.leading(trace(network, networks.example()), [4, 4])
    with pytest.raises(SurgeryError, match="dead channels the outputs differ"):
        cut_dead(Unified(network, {}), plan, torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("name", sorted(networks.TINY))
def test_masked_equals_removed_for_dead_channels_of_any_network(name: str) -> None:
    """Every second filter of every layer zeroed: whatever is found can be cut without a trace."""
    network, example = networks.tiny(name), networks.example(2, 8, 0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups == 1:
                module.weight[::2] = 0
                if module.bias is not None:
                    module.bias[::2] = 0
    space = trace(network, example)
    plan = dead_channels(network, space, example)
    smaller = cut_dead(Unified(network, {}), plan, example).network
    other = torch.randn_like(example)
    with torch.no_grad():
        found, expected = smaller.eval()(other), network.eval()(other)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if name in ("biased", "prelu"):
        assert plan.widths < space.full_widths


# Pipeline


def test_it_is_no_strategy() -> None:
    with pytest.raises(ConfigError, match="saves bytes and leaves all shapes as they are"):
        PruningSettings(strategy="unification")


def test_recipe_problems_have_their_paths() -> None:
    raw = {
        "model": {"name": "digits_resnet"},
        "data": {"name": "digits"},
        "dense_training": {"epochs": 1},
        "target": {"macs": 1e6},
        "pruning": {"unification": {"block": "3x3", "prune_fraction": 2, "bloc": 1}},
    }
    with pytest.raises(ConfigError) as caught:
        checked(raw)
    assert "`pruning.unification.bloc`: unknown key" in str(caught.value)
    del raw["pruning"]["unification"]["bloc"]  # type: ignore[index]
    with pytest.raises(ConfigError) as caught:
        checked(raw)
    assert "`pruning.unification.block`: is '3x3'" in str(caught.value)
    raw["pruning"] = {"unification": {"mode": "unify", "rho": [0.1, 0.2]}}
    assert checked(raw).pruning.unification == UnificationSettings(mode="unify", rho=(0.1, 0.2))


def run(folder: Path, fraction: float, **changes: Any) -> Any:
    options = PruningSettings(
        gate_epochs=1,
        fine_tune_epochs=1,
        measure_seconds=0.05,
        recalibration_images=48,
        training=QUICK,
        unification=UnificationSettings(rho=(1e-2,), retrain_epochs=1, prune_fraction=0.6),
    )
    return prune_to_target(
        networks.tiny("residual"),
        networks.example(1, 8, 0),
        batches(),
        batches(),
        target=MacsTarget(fraction=fraction),
        settings=options,
        run_folder=folder,
        progress=False,
        **changes,
    )


@pytest.mark.parametrize("fraction", [0.7, 1.0])
def test_the_delivered_weights_have_the_structure(tmp_path: Path, fraction: float) -> None:
    result = run(tmp_path / "run", fraction)
    facts = result.report["unification"]
    file = tmp_path / "run" / facts["file"]
    assert facts["bytes"]["unified"] == file.stat().st_size
    assert facts["bytes"]["unified"] < facts["bytes"]["pruned"] <= facts["bytes"]["dense"]
    state = load_unified(file)
    stored = load_tensors(tmp_path / "run" / "pruned.safetensors", kind="weights")
    assert same_bits(dict(sorted(state.items())), dict(sorted(stored.items())))
    network = rebuild(networks.tiny("residual"), tmp_path / "run" / "plan.json", state)
    example = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(network(example), result.network(example))
    assert result.report["final"]["accuracy"] == pytest.approx(facts["accuracy"])
    assert facts["blocks_kept"] == 0
    assert result.held


def test_a_finished_unification_is_not_repeated(tmp_path: Path) -> None:
    result = run(tmp_path / "run", 0.7)
    before = (tmp_path / "run" / "unified.wgu").read_bytes()
    for name in ("report.json", "stages/finished.json", "stages/delivery-unified.json"):
        (tmp_path / "run" / name).unlink()
    again = run(tmp_path / "run", 0.7, resume=True)
    assert (tmp_path / "run" / "unified.wgu").read_bytes() == before
    assert again.report["unification"] == result.report["unification"]


def test_a_block_too_large_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    settings = PruningSettings(unification=UnificationSettings(block="8x1"), training=QUICK)
    with pytest.raises(ConfigError, match="8x1 is larger than"):
        prune_to_target(
            networks.tiny("residual"),
            networks.example(1, 8, 0),
            batches(),
            batches(),
            target=MacsTarget(fraction=0.5),
            settings=settings,
            run_folder=tmp_path / "run",
        )
    assert not (tmp_path / "run" / "stages").exists()
