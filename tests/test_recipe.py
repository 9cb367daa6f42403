"""Recipes: everything wrong is said at once, and what is right becomes a job."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from wgates_plugin.catalogue import Data
from wgates_plugin.errors import (
    ConfigError,
    FileFormatError,
    MissingExtraError,
    RunFolderError,
    TraceError,
)
from wgates_plugin.files import write_json
from wgates_plugin.pipeline.identity import identity_of_request, options_in_full
from wgates_plugin.recipe import Recipe, dense, job, load_recipe, prepare, run_recipe
from wgates_plugin.recipe.reading import read
from wgates_plugin.run_folder import RunFolder
from wgates_plugin.strategies import make_strategy
from wgates_plugin.targets import LatencyTarget, MacsTarget, ParametersTarget, PruningSettings
from wgates_plugin.training import TrainingSettings, default_fabric

DEMO = Path(dense.__file__).parent / "demo.yaml"


def sound(**changes: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "model": {"name": "digits_resnet"},
        "data": {"name": "digits", "batch_size": 32, "limit": 64},
        "target": {"fraction": 0.5, "runtime": "eager"},
        "dense_training": {"epochs": 2, "learning_rate": 0.02},
    }
    raw.update(changes)
    return raw


def loaded(raw: Any, folder: Path, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return load_recipe(path, overrides=overrides)


def problems(raw: Any, folder: Path, *overrides: str) -> dict[str, str]:
    """Path -> what is wrong with it."""
    with pytest.raises(ConfigError) as caught:
        loaded(raw, folder, *overrides)
    return {line.split("`")[1]: line.split("`", 2)[2] for line in caught.value.problems}


def test_the_demo_is_sound() -> None:
    recipe = load_recipe(DEMO)
    assert recipe.model.name == "digits_resnet"
    assert [target.build() for target in recipe.all_targets] == [
        LatencyTarget(fraction=0.5, runtime="onnxruntime", threads=1)
    ]
    assert recipe.trains_first


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(sound()))
    assert load_recipe(path) == loaded(sound(), tmp_path)


def test_numbers_in_exponent_form_are_numbers(tmp_path: Path) -> None:
    recipe = loaded(sound(pruning={"options": {"learning_rate": "3e-4"}}), tmp_path)
    strategy = make_strategy(recipe.pruning.strategy, recipe.pruning.options)
    assert strategy.settings.learning_rate == 3e-4


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    found = problems(
        {
            "nam": "x",
            "samples": 3,
            "model": {"name": "resnet81", "weigths": "a"},
            "data": {"name": "digitz", "batch_size": 0},
            "target": {
                "fraction": 0.5,
                "milliseconds": 2,
                "runtime": "onxruntime",
                "threads": True,
            },
            "dense_training": 7,
            "pruning": {
                "seed": 3,
                "samples": 3,
                "gate_epochs": "many",
                "ignored_layers": "fc",
                "options": {"spreed": 1, "alpha": "a", "spread": 3},
                "training": {"epochs": -1, "optimizer": "lion"},
            },
        },
        tmp_path,
        "nonsense",
    )
    expected = {
        "--set nonsense": "key=value",
        "nam": "did you mean `name`",
        "samples": "did you mean `pruning.samples`",
        "model.name": "unknown model `resnet81`",
        "model.weigths": "did you mean `model.weights`",
        "data.name": "unknown data set `digitz`",
        "data.batch_size": "greater than or equal to 1",
        "target": "fraction and milliseconds",
        "target.runtime": "did you mean `onnxruntime`",
        "target.threads": "is true",
        "dense_training": "needs keys below it",
        "pruning.seed": "top level",
        "pruning.samples": "whole number from 10",
        "pruning.gate_epochs": "valid integer",
        "pruning.ignored_layers": "not allowed",
        "pruning.options.spreed": "did you mean `spread`",
        "pruning.options.alpha": "valid number",
        "pruning.options.spread": "between 0 and 0.5",
        "pruning.training.epochs": "needs a whole number",
        "pruning.training.optimizer": "sgd, adamw",
    }
    for path, words in expected.items():
        assert path in found
        assert words in found[path]
    assert set(found) == set(expected)


@pytest.mark.parametrize(
    ("pruning", "path", "words"),
    [
        ({"strategy": "wgate"}, "pruning.strategy", "did you mean `wgates`? known: wgates"),
        (
            {"strategy": "wgate", "options": {"spreed": 1}},
            "pruning.options.spreed",
            "did you mean `spread`",
        ),
        (
            {"strategy": "scop", "options": {"knockoffs": "no_such_module:made"}},
            "pruning.options.knockoffs",
            "module `no_such_module` cannot be found",
        ),
        ({"strategy": "obdc"}, "pruning.strategy", "use `hessian`"),
        ({"strategy": "l1", "options": {"spread": 0.2}}, "pruning.options.spread", "known: scope"),
        ({"strategy": "l1", "options": {"scope": "all"}}, "pruning.options.scope", "global, local"),
    ],
)
def test_a_strategy_is_checked_with_its_own_options(
    pruning: dict[str, Any], path: str, words: str, tmp_path: Path
) -> None:
    assert words in problems(sound(pruning=pruning), tmp_path)[path]


def test_slips_in_names_hide_no_other_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = sound(target={"fraction": 2, "runtime": "onnxruntim", "options": {"foo": 1}}, seed="x")
    raw["model"]["name"], raw["data"]["name"] = "resnet_smal", "fashion"
    expected = {
        "target.fraction": "more than the untouched network",
        "target.runtime": "did you mean `onnxruntime`",
        "target.options.foo": "no option of runtime `onnxruntime`",
        "seed": "valid integer",
        "model.name": "resnet_small",
        "data.name": "unknown data set `fashion`",
    }

    def missing() -> None:
        raise MissingExtraError("torchvision", "vision", "this model")

    for hidden in (False, True):
        if hidden:
            monkeypatch.setattr("wgates_plugin.catalogue.import_torchvision", missing)
        found = problems(raw, tmp_path)
        assert set(found) == set(expected)
        for path, words in expected.items():
            assert words in found[path]
    lone = problems(sound(target={"macs": 0.5}), tmp_path)
    assert "less than one" in lone["target.macs"]
    assert (
        "more than the untouched"
        in problems(sound(), tmp_path, "target.fraction=1.5")["target.fraction"]
    )


def test_an_empty_recipe_names_what_is_missing(tmp_path: Path) -> None:
    assert set(problems({}, tmp_path)) == {"model", "data", "target"}


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    pruning = {"seed": 8, "training": {"epochs": 3}}
    found = problems(sound(pruning=pruning), tmp_path)
    assert "top level" in found["pruning.seed"]
    assert "fine_tune_epochs" in found["pruning.training.epochs"]


def test_an_untrained_network_is_refused_unless_weights_come_along(tmp_path: Path) -> None:
    raw = sound()
    del raw["dense_training"]
    assert "pruned untrained" in problems(raw, tmp_path)["model.weights"]
    weights = tmp_path / "weights.safetensors"
    weights.touch()
    raw["model"]["weights"] = str(weights)
    assert loaded(raw, tmp_path).model.weights == weights
    raw["model"]["weights"] = str(tmp_path / "nothing.safetensors")
    assert "no such file" in problems(raw, tmp_path)["model.weights"]


def test_weights_win_over_dense_training(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.touch()
    recipe = loaded(sound(model={"name": "digits_resnet", "weights": str(weights)}), tmp_path)
    assert not recipe.trains_first


def test_several_targets(tmp_path: Path) -> None:
    raw = sound(target=None, targets=[{"milliseconds": 2}, {"macs": 1e6}])
    raw["targets"].append({"kind": "parameters", "fraction": 0.5})
    assert [target.build() for target in loaded(raw, tmp_path).all_targets] == [
        LatencyTarget(milliseconds=2.0),
        MacsTarget(macs=1e6),
        ParametersTarget(fraction=0.5),
    ]


def test_bad_targets_in_a_list_are_named_by_position(tmp_path: Path) -> None:
    raw = sound(
        targets=[
            {"macs": 1e6, "runtime": "eager"},
            {"milliseconds": -1},
            {"macs": 2},
            {"kind": "macs", "milliseconds": 3},
        ],
    )
    found = problems(raw, tmp_path)
    assert found["targets.0.runtime"] == ": is for latency targets; this one counts macs"
    assert "greater than 0" in found["targets.1.milliseconds"]
    assert "second macs" in found["targets.2"]
    assert "not milliseconds" in found["targets.3"]


def test_runtime_settings_and_options_reach_the_target(tmp_path: Path) -> None:
    target = {"milliseconds": 2, "runtime": "eager", "precision": "bfloat16"}
    recipe = loaded(
        sound(target={**target, "options": {"channels_last": False}}),
        tmp_path,
        "target.options.channels_last=true",
    )
    assert recipe.all_targets[0].build() == LatencyTarget(
        milliseconds=2.0, runtime="eager", precision="bfloat16", options={"channels_last": True}
    )
    command = {"command": ["adb", "shell", "{model}"], "device_name": "a phone", "retries": 3}
    recipe = loaded(
        sound(target={"fraction": 0.5, "runtime": "command", "threads": 999, "options": command}),
        tmp_path,
    )
    (built,) = [target.build() for target in recipe.all_targets]
    assert isinstance(built, LatencyTarget)
    assert built.options == command


def test_runtime_problems_come_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wgates_plugin.latency.base.usable_cores", lambda: 2)
    eager = {"runtime": "eager", "precision": "int3", "threads": 3, "device": "tpu:0"}
    eager["options"] = {"channels_last": "yes", "chanels": 1}
    found = problems(sound(target={"fraction": 0.5, **eager}), tmp_path)
    assert "choose from float32, bfloat16, float16" in found["target.precision"]
    assert "choose from cpu, cuda" in found["target.device"]
    assert "valid boolean" in found["target.options.channels_last"]
    assert "did you mean `channels_last`" in found["target.options.chanels"]
    assert len(found) == 4
    found = problems(sound(target={"fraction": 0.5, "runtime": "eager", "threads": 3}), tmp_path)
    assert "this process may use 2 cores" in found["target.threads"]
    found = problems(sound(target={"fraction": 0.5, "runtime": "command"}), tmp_path)
    assert set(found) == {"target.options.command", "target.options.device_name"}
    found = problems(sound(target={"fraction": 0.5, "runtime": "cuda-graphs"}), tmp_path)
    assert "has no cpu; choose from cuda" in found["target.device"]
    found = problems(sound(target={"macs": 5, "options": {}, "precision": "float16"}), tmp_path)
    assert "for latency targets" in found["target.options"]
    assert "for latency targets" in found["target.precision"]


def test_overrides_reach_every_depth(tmp_path: Path) -> None:
    recipe = loaded(
        sound(targets=[{"macs": 5}]),
        tmp_path,
        "seed=3",
        "target.fraction=0.3",
        "targets.0.macs=1e6",
        "pruning.options.learning_rate=1e-2",
        "pruning.floors.layer1.0.conv1=8",
        "name=other",
    )
    assert (recipe.seed, recipe.title) == (3, "other")
    assert [target.build() for target in recipe.all_targets] == [
        LatencyTarget(fraction=0.3, runtime="eager"),
        MacsTarget(macs=1e6),
    ]
    assert recipe.pruning.options == {"learning_rate": 0.01}
    assert recipe.pruning.floors == {"layer1.0.conv1": 8}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "key=value"),
        ("seed.deeper=1", "no keys below it"),
        ("targets.7.macs=1", "no position"),
        ("targets.².macs=1", "no position"),
        ("targets.²=1", "no position"),
        ("name={", "no YAML"),
    ],
)
def test_bad_overrides(override: str, words: str, tmp_path: Path) -> None:
    raw = sound(targets=[{"macs": 5}], seed=1)
    assert words in problems(raw, tmp_path, override)[f"--set {override}"]


@pytest.mark.parametrize(
    "text",
    ["[1, 2]", "a: [", "\x00", "!!python/object/apply:os.getcwd []", "m: {{ m }}", "[a, b]: 1"],
)
def test_files_that_are_no_recipe(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(FileFormatError, match="recipe"):
        load_recipe(path)
    with pytest.raises(FileFormatError, match="no such file"):
        load_recipe(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("recipe.yaml", "pruning: {gate_epochs: 7}\npruning: {fine_tune_epochs: 9}"),
        ("recipe.yaml", "target: {fraction: 0.5, fraction: 0.6}"),
        ("recipe.json", '{"seed": 1, "seed": 2}'),
    ],
)
def test_a_key_given_twice_is_told(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(FileFormatError, match="given twice"):
        load_recipe(tmp_path / name)


def test_yaml_may_share_blocks(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert read(tmp_path / "r.yaml")["b"] == {"x": 1, "y": 3}
    nested = """
common: &base {epochs: 1, lr: 0.1}
defaults:
  training: &t
    <<: *base
    lr: 0.2
training:
  <<: *t
  epochs: 5
"""
    (tmp_path / "r.yaml").write_text(nested)
    assert read(tmp_path / "r.yaml")["training"] == {"epochs": 5, "lr": 0.2}


def test_a_folder_of_images_is_looked_for(tmp_path: Path) -> None:
    for name in ("folder:nowhere", "folder:/no/where"):
        found = problems(sound(data={"name": name}), tmp_path)
        assert "no such folder" in found["data.name"]


def test_an_empty_amount_is_none(tmp_path: Path) -> None:
    both = [{"macs": None, "fraction": 0.5}, {"macs": 1000}]
    assert len(loaded(sound(target=None, targets=both), tmp_path).all_targets) == 2


def test_a_default_folder_has_a_name_that_every_system_takes(tmp_path: Path) -> None:
    recipe = loaded(sound(model={"name": "my_pkg.nets:make"}), tmp_path)
    assert recipe.folder == Path("wgates-runs") / "my_pkg.nets-make"


def test_prepare_is_reproducible_and_leaves_the_random_state(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    recipe = loaded(sound(), tmp_path, "seed=5")
    state = torch.get_rng_state()
    network, data, targets, settings = prepare(recipe)
    assert torch.equal(torch.get_rng_state(), state)
    again, *_ = prepare(recipe)
    for first, second in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)
    assert settings.seed == 5
    assert targets == [LatencyTarget(fraction=0.5, runtime="eager")]
    assert network(data.example_input).shape == (1, 10)


class Tiny:
    """Digits' stand-in: few images, and a wish to stop after some batches."""

    def __init__(self, stop_after: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            (torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8) % 4) for _ in range(2)
        ]
        self.left = stop_after

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        for batch in self.batches:
            if self.left is not None:
                if self.left == 0:
                    raise KeyboardInterrupt
                self.left -= 1
            yield batch


def tiny_network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(144, 4),
    )


def train(recipe: Recipe, loader: Tiny, *, resume: bool = False) -> torch.nn.Module:
    data = Data(loader, loader, 4, loader.batches[0][0][:1], "tiny")
    return dense.trained(tiny_network(), data, recipe, resume=resume, progress=False)


def test_stopped_dense_training_ends_in_the_same_place(tmp_path: Path) -> None:
    recipe = loaded(sound(), tmp_path, f"run_folder={tmp_path / 'stopped'}")
    straight = train(recipe.model_copy(update={"run_folder": tmp_path / "straight"}), Tiny())
    with pytest.raises(KeyboardInterrupt):
        train(recipe, Tiny(stop_after=3))
    assert (recipe.folder / dense.CHECKPOINT).exists()
    with pytest.raises(RunFolderError, match="--resume"):
        dense.check_folder(recipe.folder, resume=False)
    dense.check_folder(recipe.folder, resume=True)
    resumed = train(recipe, Tiny(), resume=True)
    for first, second in zip(
        straight.state_dict().values(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(first, second)
    assert [path.name for path in recipe.folder.iterdir()] == [dense.WEIGHTS]


def test_a_trained_network_is_taken_from_the_folder_but_not_for_another_recipe(
    tmp_path: Path,
) -> None:
    recipe = loaded(sound(), tmp_path, f"run_folder={tmp_path / 'run'}")
    trained = train(recipe, Tiny())
    again = train(recipe, Tiny(stop_after=0))
    assert torch.equal(trained.state_dict()["3.weight"], again.state_dict()["3.weight"])
    with pytest.raises(RunFolderError, match="different: `seed` was 0, is 9") as caught:
        train(recipe.model_copy(update={"seed": 9}), Tiny())
    assert "delete" not in str(caught.value)
    (recipe.folder / dense.WEIGHTS).write_bytes(b"broken")
    with pytest.raises(FileFormatError, match="cannot be read"):
        train(recipe, Tiny())


def test_options_that_ask_for_nothing_do_not_tell_runs_apart() -> None:
    assert options_in_full(PruningSettings(strategy="taylor")) == {"scope": "global"}
    some = PruningSettings(strategy="taylor", options={"batches": 3})
    assert options_in_full(some) == {"scope": "global", "batches": 3}


def test_a_run_begun_otherwise_is_told_before_the_dense_network(tmp_path: Path) -> None:
    begun = loaded(sound(), tmp_path, f"run_folder={tmp_path / 'run'}")
    train(begun, Tiny())
    _, data, targets, settings = prepare(begun)
    described = identity_of_request(targets, settings, data.train_loader, data.val_loader)
    write_json(begun.folder / "run.json", {"network": begun.title, **described})
    dense.check_same_run(begun, data, targets, settings)
    changes = ("data.limit=32", "target.fraction=0.4", "pruning.samples=50")
    other = loaded(sound(), tmp_path, f"run_folder={begun.folder}", *changes)
    with pytest.raises(RunFolderError, match="belongs to another run") as caught:
        run_recipe(other, resume=True, progress=False)
    for words in (
        "`data.limit` was 64, is 32",
        "`targets.0.LatencyTarget.fraction` was 0.5, is 0.4",
        "`settings.samples` was 100, is 50",
        "`data.train_batches` was 2, is 1",
    ):
        assert words in str(caught.value)
    assert "delete" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("pruning.floors={nothing: 4}", TraceError, "`nothing` is no prunable group"),
        ("pruning.training.accelerator=gpuu", ConfigError, "accelerator 'gpuu'"),
        ("pruning.samples_file=none.jsonl", ConfigError, "`none.jsonl`, no such file"),
        ("run_folder=/proc/nothing/here", RunFolderError, "cannot be written to"),
    ],
    ids=["floors", "accelerator", "samples", "folder"],
)
def test_what_the_pruning_would_refuse_is_told_before_the_dense_training(
    override: str,
    error: type[Exception],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job, "trained", unwanted)
    recipe = loaded(sound(), tmp_path, f"run_folder={tmp_path / 'run'}", override)
    with pytest.raises(error, match=re.escape(words)):
        run_recipe(recipe, progress=False)
    assert not (tmp_path / "run").exists()


def unwanted(*_: object, **__: object) -> None:
    raise AssertionError("trained before the recipe was looked at")


def test_labels_that_the_network_has_no_output_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = Tiny()
    loader.batches = [(images, targets + 7) for images, targets in loader.batches]
    data = Data(loader, loader, 10, loader.batches[0][0][:1], "tiny")
    monkeypatch.setattr(job, "load_data", lambda *_, **__: data)
    monkeypatch.setattr(job, "trained", unwanted)
    recipe = loaded(sound(), tmp_path, f"run_folder={tmp_path / 'run'}")
    with pytest.raises(
        ConfigError, match=r"train_loader: holds class 10, the network has 10 outputs"
    ):
        run_recipe(recipe, progress=False)


def test_all_wrong_names_are_told_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "trained", unwanted)
    changes = ("pruning.ignored_layers=[nobody]", "pruning.caps={nothing: 4}")
    recipe = loaded(sound(), tmp_path, f"run_folder={tmp_path / 'run'}", *changes)
    with pytest.raises(TraceError, match=r"'nobody' not in the network.*`nothing` is no prunable"):
        run_recipe(recipe, progress=False)


def test_a_stop_between_weights_and_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    recipe = loaded(sound(), tmp_path, f"run_folder={tmp_path / 'run'}")
    train(recipe, Tiny())
    (recipe.folder / dense.CHECKPOINT).write_bytes(b"left behind")
    train(recipe, Tiny(stop_after=0), resume=True)
    assert [path.name for path in recipe.folder.iterdir()] == [dense.WEIGHTS]


def test_paths_of_a_recipe_may_begin_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "weights.safetensors").touch()
    raw = sound(run_folder="~/runs/a", model={"name": "digits_resnet"})
    raw["model"]["weights"] = "~/weights.safetensors"
    recipe = loaded(raw, tmp_path)
    assert recipe.folder == tmp_path / "runs" / "a"
    assert recipe.model.weights == tmp_path / "weights.safetensors"
    assert (
        RunFolder("~/b", default_fabric(TrainingSettings(accelerator="cpu"))).path == tmp_path / "b"
    )


def test_what_a_dense_training_cannot_do_is_refused(tmp_path: Path) -> None:
    raw = sound()
    raw["dense_training"]["distillation_weight"] = 0.5
    found = problems(raw, tmp_path)["dense_training.distillation_weight"]
    assert "has no teacher yet" in found


def test_a_network_of_timm_without_weights_is_refused_too(tmp_path: Path) -> None:
    raw = sound(model={"name": "timm:resnet18"})
    del raw["dense_training"]
    assert "pruned untrained" in problems(raw, tmp_path)["model.weights"]
    raw["model"]["options"] = {"pretrained": True}
    assert not loaded(raw, tmp_path).trains_first


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    recipe = loaded(sound(), tmp_path, f"run_folder={tmp_path / 'run'}")
    recipe.folder.mkdir()
    (recipe.folder / dense.CHECKPOINT).write_bytes(b"broken")
    with pytest.raises(FileFormatError, match="checkpoint"):
        train(recipe, Tiny(), resume=True)


def test_used_folders_are_refused_before_any_work(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    dense.check_folder(folder, resume=False)
    folder.mkdir()
    dense.check_folder(folder, resume=False)
    (folder / "holiday.png").touch()
    with pytest.raises(RunFolderError, match=r"no run\.json"):
        dense.check_folder(folder, resume=True)
    (folder / "run.json").touch()
    with pytest.raises(RunFolderError, match=r"already holds a run.*`resume=True`, `--resume`"):
        dense.check_folder(folder, resume=False)
    dense.check_folder(folder, resume=True)
    with pytest.raises(RunFolderError, match="is a file"):
        dense.check_folder(folder / "run.json", resume=False)


def test_lpnet_settings_reach_the_job(tmp_path: Path) -> None:
    raw = sound(pruning={"lpnet": "mlp", "active": False, "workers": 2})
    raw["target"]["bound"] = "upper"
    _, _, (target,), settings = prepare(loaded(raw, tmp_path))
    assert isinstance(target, LatencyTarget)
    assert target.bound == "upper"
    assert (settings.lpnet, settings.active, settings.workers) == ("mlp", False, 2)
    defaults = prepare(loaded(sound(), tmp_path))[3]
    assert (defaults.lpnet, defaults.active, defaults.workers) == ("layers", True, 1)


def test_wrong_lpnet_settings_are_named(tmp_path: Path) -> None:
    raw = sound(pruning={"lpnet": "tree", "active": 3.5, "workers": 0})
    raw["target"]["bound"] = "lower"
    found = problems(raw, tmp_path)
    assert set(found) == {"pruning.lpnet", "pruning.active", "pruning.workers", "target.bound"}
    assert "choose from layers, mlp" in found["pruning.lpnet"]


def test_a_bound_is_for_latency(tmp_path: Path) -> None:
    raw = sound(target={"macs": 1e6, "bound": "upper"})
    assert "is for latency targets" in problems(raw, tmp_path)["target.bound"]
