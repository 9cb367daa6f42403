"""Data sets and networks by name."""

from __future__ import annotations

import gzip
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wgates_plugin import catalogue
from wgates_plugin.catalogue import Data, TensorLoader, in_memory, load_data, load_model
from wgates_plugin.catalogue.in_memory import read_idx
from wgates_plugin.catalogue.tensor_loader import augment
from wgates_plugin.errors import ConfigError, FileFormatError, MissingExtraError
from wgates_plugin.files import save_tensors
from wgates_plugin.training import Trainer, TrainingSettings, evaluate

ROOT = Path(__file__).resolve().parent.parent

# Looked for, not imported: a plain import may fail for a wheel that import_torchvision can load.
needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)


def numbered(count: int = 21) -> TensorLoader:
    """Images whose every pixel is their number; the target is the number too."""
    numbers = torch.arange(count)
    images = numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    return TensorLoader(images, numbers, 4, shuffle=True)


# --- loader --------------------------------------------------------------------------------------


def test_a_pass_sees_every_image_once_with_its_target() -> None:
    loader = numbered()
    batches = list(loader)
    assert len(batches) == len(loader) == 6
    seen = torch.cat([targets for _, targets in batches])
    assert sorted(seen.tolist()) == list(range(21))
    assert seen.tolist() != list(range(21))
    for images, targets in batches:
        torch.testing.assert_close(images[:, 0, 0, 0] * 255, targets.float())


def test_order_follows_torch_random_state() -> None:
    def order(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return [int(t) for _, targets in numbered() for t in targets]

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize("world", [2, 3])
def test_shards_are_disjoint_equal_and_of_one_permutation(world: int) -> None:
    loader = numbered(20)
    parts = []
    for rank in range(world):
        torch.manual_seed(4)
        parts.append(torch.cat([targets for _, targets in loader.shard(rank, world)]).tolist())
    torch.manual_seed(4)
    whole = torch.cat([targets for _, targets in loader]).tolist()
    assert [len(part) for part in parts] == [20 // world] * world
    for rank, part in enumerate(parts):
        assert part == whole[rank::world][: 20 // world]


def test_a_part_has_no_last_batch_of_one_that_the_whole_has_not() -> None:
    def sizes(count: int, world: int = 1) -> list[int]:
        images = torch.zeros(count, 1, 2, 2, dtype=torch.uint8)
        part = TensorLoader(images, torch.zeros(count), 8).shard(0, world)
        assert len(part) == len(list(part))
        return [len(targets) for _, targets in part]

    assert sizes(18) == [8, 8, 2]
    assert sizes(18, 2) == [8]
    assert sizes(17) == [8, 8, 1]
    assert sizes(50, 2) == [8, 8, 8]
    assert sizes(33, 3) == [8, 3]
    assert sizes(2, 2) == [1]


def test_images_that_are_no_squares_are_made_squares() -> None:
    images = torch.zeros(2, 1, 6, 8, dtype=torch.uint8)
    (batch, _), *_ = TensorLoader(images, torch.zeros(2), 2, image_size=8)
    assert batch.shape == (2, 1, 8, 8)


def test_drop_last_leaves_out_a_small_batch_but_never_everything() -> None:
    images, targets = torch.zeros(10, 1, 2, 2, dtype=torch.uint8), torch.zeros(10)
    assert [len(t) for _, t in TensorLoader(images, targets, 4, drop_last=True)] == [4, 4]
    assert [len(t) for _, t in TensorLoader(images, targets, 16, drop_last=True)] == [10]


def test_augmentation_is_a_mirrored_shift_of_the_same_image() -> None:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(1, 255, (64, 3, 6, 5), generator=draws, dtype=torch.uint8)
    out = augment(images, draws, flip=True, shift=2)
    assert out.shape == images.shape
    shifts = set()
    for image, result in zip(images, out, strict=True):
        fits = [
            (flip, top, left)
            for flip in (False, True)
            for top in range(5)
            for left in range(5)
            if torch.equal(
                nn.functional.pad(image.flip(2) if flip else image, (2, 2, 2, 2))[
                    :, top : top + 6, left : left + 5
                ],
                result,
            )
        ]
        assert len(fits) == 1
        shifts.add(fits[0])
    assert len(shifts) > 20
    assert torch.equal(augment(images, draws, flip=False, shift=0), images)


# --- data ------------------------------------------------------------------------------------


def test_digits_are_standardised_and_split_alike_for_every_seed() -> None:
    data, other = load_data("digits", seed=0), load_data("digits", seed=9)
    assert isinstance(data.train_loader, TensorLoader)
    assert isinstance(data.val_loader, TensorLoader)
    assert isinstance(other.val_loader, TensorLoader)
    assert (len(data.train_loader.images), len(data.val_loader.images)) == (1347, 450)
    assert torch.equal(data.val_loader.images, other.val_loader.images)
    assert data.classes == 10
    assert isinstance(data.example_input, torch.Tensor)
    assert data.example_input.shape == (1, 1, 8, 8)
    plain = TensorLoader(
        data.train_loader.images, data.train_loader.targets, 2000,
        data.train_loader.mean, data.train_loader.std,
    )  # fmt: skip
    values, _ = next(iter(plain))
    assert values.mean().item() == pytest.approx(0, abs=1e-4)
    assert values.std().item() == pytest.approx(1, abs=1e-3)


def test_limit_and_image_size() -> None:
    data, other = (load_data("digits", limit=40, image_size=16, seed=seed) for seed in (0, 1))
    assert isinstance(data.train_loader, TensorLoader)
    assert isinstance(other.train_loader, TensorLoader)
    assert isinstance(data.example_input, torch.Tensor)
    assert len(data.train_loader.images) == len(data.val_loader.images) == 40  # type: ignore[attr-defined]
    assert data.example_input.shape == (1, 1, 16, 16)
    assert next(iter(data.train_loader))[0].shape == (40, 1, 16, 16)
    assert not torch.equal(data.train_loader.images, other.train_loader.images)
    assert data.train_loader.mean == load_data("digits").train_loader.mean  # type: ignore[attr-defined]


def write_idx(path: Path, values: torch.Tensor) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(gzip.compress(header + values.numpy().tobytes()))


def test_fashion_mnist_reads_idx_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_memory, "DEBIAN_FASHION_MNIST", tmp_path)
    images = torch.randint(0, 256, (6, 28, 28), dtype=torch.uint8)
    for short in ("train", "t10k"):
        write_idx(tmp_path / f"{short}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{short}-labels-idx1-ubyte.gz", torch.arange(6, dtype=torch.uint8))
    data = load_data("fashion-mnist", batch_size=4)
    assert isinstance(data.train_loader, TensorLoader)
    assert isinstance(data.val_loader, TensorLoader)
    assert torch.equal(data.train_loader.images[:, 0], images)
    assert data.train_loader.targets.tolist() == list(range(6))
    assert data.train_loader.flip
    assert not data.val_loader.flip
    assert not data.val_loader.shift


def test_a_root_that_is_given_is_the_only_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed, own, empty = (tmp_path / name for name in ("installed", "own", "empty"))
    monkeypatch.setattr(in_memory, "DEBIAN_FASHION_MNIST", installed)
    for number, folder in enumerate((installed, own)):
        folder.mkdir()
        for short in ("train", "t10k"):
            images = torch.full((6, 28, 28), number, dtype=torch.uint8)
            write_idx(folder / f"{short}-images-idx3-ubyte.gz", images)
            labels = torch.arange(6, dtype=torch.uint8)
            write_idx(folder / f"{short}-labels-idx1-ubyte.gz", labels)
    data = load_data("fashion-mnist", batch_size=4, root=own)
    assert isinstance(data.train_loader, TensorLoader)
    assert data.train_loader.images.unique().tolist() == [1]

    def unavailable() -> None:
        raise MissingExtraError("torchvision", "vision", "this data set")

    monkeypatch.setattr(in_memory, "import_torchvision", unavailable)
    with pytest.raises(ConfigError, match=f"no usable copy under {empty}.*torchvision"):
        load_data("fashion-mnist", root=empty)


@needs_torchvision
def test_a_download_that_fails_names_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory.import_torchvision()
    from torchvision import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(datasets, "FashionMNIST", offline)
    with pytest.raises(ConfigError, match=f"no usable copy under {tmp_path}"):
        load_data("fashion-mnist", root=tmp_path)


def test_damaged_idx_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    write_idx(path, torch.zeros(3, 4, dtype=torch.uint8))
    whole = path.read_bytes()
    assert read_idx(path).shape == (3, 4)
    damaged = [whole[:-9], b"no gzip", gzip.compress(b""), gzip.compress(b"\0\0\x08\2\0\0\0\1")]
    for content in [*damaged, gzip.compress(gzip.decompress(whole)[:-1])]:
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=r"x\.gz"):
            read_idx(path)


@needs_torchvision
def test_image_folder(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        for name, colour in (("blue", (0, 0, 250)), ("red", (250, 0, 0))):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(3):
                picture = image.new("RGB", (20, 30), colour)
                picture.save(tmp_path / part / name / f"{index}.png")
    data = load_data(f"folder:{tmp_path}", batch_size=2, image_size=16)
    assert data.classes == 2
    assert isinstance(data.example_input, torch.Tensor)
    assert data.example_input.shape == (1, 3, 16, 16)
    assert [tuple(x.shape) for x, _ in data.train_loader] == [(2, 3, 16, 16)] * 3
    for images, targets in data.val_loader:
        redder = images[:, 0].mean((1, 2)) > images[:, 2].mean((1, 2))
        assert torch.equal(redder, targets == 1)
    for part in ("train", "val"):
        (tmp_path / part / "blue" / "._0.png").write_bytes(b"what macOS leaves beside 0.png")
    data = load_data(f"folder:{tmp_path}", batch_size=2, image_size=16)
    assert [len(targets) for _, targets in data.val_loader] == [2, 2, 2]
    assert len(list(data.train_loader)) == 3
    whole = (tmp_path / "train" / "red" / "1.png").read_bytes()
    (tmp_path / "train" / "red" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        FileFormatError, match=r"image `.*red/1\.png`: cannot be read .*; delete or"
    ):
        list(data.train_loader)
    (tmp_path / "val" / "red").rename(tmp_path / "val" / "green")
    with pytest.raises(ConfigError, match="green, red"):
        load_data(f"folder:{tmp_path}")
    with pytest.raises(ConfigError, match="no folder"):
        load_data(f"folder:{tmp_path / 'train'}")


FACTORIES = """
import torch
from torch import nn

def triple(batch_size, limit=None):
    return [batch_size], [limit], torch.zeros(1, 3, 4, 4)

def wrong():
    return 5

def network(classes, depth=1):
    return nn.Sequential(*[nn.Linear(classes, classes) for _ in range(depth)])
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "catalogue_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "catalogue_factories", raising=False)
    return "catalogue_factories"


def test_data_factory(factories: str) -> None:
    data = load_data(f"{factories}:triple", batch_size=3, limit=7)
    assert isinstance(data, Data)
    assert (data.train_loader, data.val_loader, data.classes) == ([3], [7], None)
    with pytest.raises(ConfigError, match="returned int"):
        load_data(f"{factories}:wrong")
    with pytest.raises(ConfigError, match="no callable `missing`"):
        load_data(f"{factories}:missing")
    with pytest.raises(ConfigError, match="`no_such_module` cannot be found"):
        load_data("no_such_module:make")


@pytest.mark.parametrize(
    ("text", "line"),
    [("import torch\nfrom torch import no_such_thing\n", 2), ("def make(:\n", 1)],
)
def test_a_factory_that_cannot_be_imported_is_named_with_its_line(
    text: str, line: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"broken_factory_{line}.py"
    file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=rf"{file.name}, line {line}: ") as caught:
        load_data(f"{file.stem}:make")
    assert f"module `{file.stem}` cannot be imported" in str(caught.value)


def test_data_options_without_effect_are_refused(factories: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"image_size: the factory has no such parameter") as told:
        load_data(f"{factories}:triple", batch_size=3, image_size=32, root=tmp_path)
    assert len(told.value.problems) == 2
    for name in ("digits", f"folder:{tmp_path}"):
        with pytest.raises(ConfigError, match="root: its files are not taken from there"):
            load_data(name, root=tmp_path)


def test_wrong_data_requests_say_what_there_is() -> None:
    with pytest.raises(ConfigError, match="digits, fashion-mnist, cifar10, cifar100"):
        load_data("mnist")
    with pytest.raises(ConfigError) as caught:
        load_data("digits", batch_size=0, limit=-1)
    assert len(caught.value.problems) == 2


# --- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(catalogue.MODELS))
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 28)])
def test_built_in_networks_run_and_get_gradients(name: str, channels: int, side: int) -> None:
    network = load_model(name, classes=7, in_channels=channels)
    logits = network(torch.randn(4, channels, side, side))
    assert logits.shape == (4, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_options_reach_the_network() -> None:
    network = load_model(
        "resnet_small", classes=4, in_channels=1, options={"widths": (8, 16), "blocks": (2, 1)}
    )
    assert [len(stage) for stage in network.stages] == [2, 1]  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="depht"):
        load_model("resnet_small", classes=4, options={"depht": 3})


@needs_torchvision
def test_torchvision_networks_with_other_input_channels() -> None:
    network = load_model("mobilenet_v2", classes=5, in_channels=1).eval()
    assert network(torch.zeros(1, 1, 32, 32)).shape == (1, 5)


@needs_torchvision
def test_unknown_names_list_close_matches(factories: str) -> None:
    with pytest.raises(ConfigError, match="resnet_small"):
        load_model("resnet_smal", classes=2)
    with pytest.raises(ConfigError, match="mobilenet_v2"):
        load_model("mobilenetv2", classes=2)
    with pytest.raises(ConfigError, match="number of classes"):
        load_model("resnet18")
    with pytest.raises(ConfigError, match="returned int"):
        load_model(f"{factories}:wrong")
    network = load_model(f"{factories}:network", classes=3, options={"depth": 2})
    assert isinstance(network, nn.Sequential)
    assert len(network) == 2


def test_weights_are_read_and_checked(tmp_path: Path) -> None:
    source = load_model("digits_resnet", classes=10, in_channels=1)
    save_tensors(tmp_path / "w.safetensors", source.state_dict())
    torch.save(source.state_dict(), tmp_path / "w.pt")
    torch.save({"state_dict": source.state_dict(), "epoch": 3}, tmp_path / "nested.pt")
    for name in ("w.safetensors", "w.pt", "nested.pt"):
        path = tmp_path / name
        network = load_model("digits_resnet", classes=10, in_channels=1, weights=path)
        for key, value in source.state_dict().items():
            assert torch.equal(network.state_dict()[key], value)
    with pytest.raises(FileFormatError, match="do not fit"):
        load_model("digits_resnet", classes=9, in_channels=1, weights=tmp_path / "w.pt")
    with pytest.raises(FileFormatError, match="no such file"):
        load_model("digits_resnet", classes=9, weights=tmp_path / "none.pt")
    (tmp_path / "folder.safetensors").mkdir()
    for folder in (tmp_path, tmp_path / "folder.safetensors"):
        with pytest.raises(FileFormatError, match="cannot be read"):
            load_model("digits_resnet", classes=9, weights=folder)


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_weights_execute_nothing(tmp_path: Path) -> None:
    torch.save({"w": Harmful(tmp_path / "made")}, tmp_path / "bad.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "bad.pt").read_bytes()[:100])
    for name in ("bad.pt", "cut.pt"):
        with pytest.raises(FileFormatError, match="not readable as a plain state dict"):
            load_model("digits_resnet", classes=10, weights=tmp_path / name)
    assert not (tmp_path / "made").exists()


def test_digits_are_learnt() -> None:
    data = load_data("digits", batch_size=32)
    network = load_model("digits_resnet", classes=10, in_channels=1)
    settings = TrainingSettings(epochs=3, learning_rate=0.05, accelerator="cpu", channels_last=True)
    Trainer(network, data.train_loader, settings).run()
    assert evaluate(network, data.val_loader).accuracy >= 0.95


# --- torchvision's import ------------------------------------------------------------------------


@needs_torchvision
def test_torchvision_imports_in_a_fresh_process() -> None:
    script = (
        "from wgates_plugin.catalogue.torchvision_import import import_torchvision as load\n"
        "tv = load(); assert load() is tv\n"
        "import torch, torchvision\n"
        "network = torchvision.models.resnet18(num_classes=3).eval()\n"
        "assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_missing_torchvision_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"wgates-plugin\[vision\]"):
        catalogue.import_torchvision()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mobilenet_v2", "is a torchvision model by its name"),
        ("mobilenet_smal", "close to it: mobilenet_small"),
    ],
)
def test_without_torchvision_the_extra_is_named(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise MissingExtraError("torchvision", "vision", "models by name")

    monkeypatch.setattr("wgates_plugin.catalogue.models.import_torchvision", missing)
    with pytest.raises(ConfigError) as caught:
        load_model(name, classes=10)
    assert words in str(caught.value)
    assert "wgates-plugin[vision]" in str(caught.value)
    assert ("close to it" in str(caught.value)) == ("close to it" in words)


def test_every_torchvision_name_is_known_without_it() -> None:
    from wgates_plugin.catalogue.models import _TORCHVISION
    from wgates_plugin.catalogue.torchvision_import import import_torchvision

    models = import_torchvision().models
    assert [n for n in models.list_models(module=models) if not _TORCHVISION.match(n)] == []


def test_a_path_is_no_name() -> None:
    with pytest.raises(ConfigError, match="looks like a file, needs a name"):
        load_model("runs/model.onnx", classes=10)
