"""The README's tables name what there is, with the defaults it has."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
import typer
import typer.main
from networks import CLASSES, conv_bn, example, tiny
from torch import Tensor, nn

from wgates_plugin import (
    MacsModel,
    MacsTarget,
    PruningSettings,
    TrainingSettings,
    prune_to_target,
    trace,
)
from wgates_plugin.cli import app
from wgates_plugin.errors import ConfigError
from wgates_plugin.integrations.torch_pruning import WGatesPruner
from wgates_plugin.latency import RUNTIMES
from wgates_plugin.latency.options import options_of
from wgates_plugin.recipe import Recipe
from wgates_plugin.recipe.meaning import NO_EFFECT
from wgates_plugin.recipe.schema import all_places, fields_of, inner_type, type_at
from wgates_plugin.strategies import CRITERIA, STRATEGIES
from wgates_plugin.strategies.base import option_names

README = Path(__file__).parent.parent / "README.md"


def rows(heading: str) -> dict[str, list[str]]:
    """First cell -> further cells of the tables below a heading, without back-quotes."""
    text = README.read_text(encoding="utf-8")
    part = re.split(r"^##+ ", text.split(f" {heading}\n", 1)[1], flags=re.M)[0]
    found = {}
    for line in part.splitlines():
        if line.startswith("| `"):
            first, *rest = (cell.strip() for cell in line.strip().strip("|").split("|"))
            found[first.replace("`", "")] = [cell.replace("`", "") for cell in rest]
    return found


def default_of(place: tuple[str, ...]) -> Any:
    parent = inner_type(type_at(place[:-1])) if len(place) > 1 else Recipe
    if dataclasses.is_dataclass(parent):
        found = {field.name: field.default for field in dataclasses.fields(parent)}[place[-1]]
        return None if found is dataclasses.MISSING else found
    return parent.model_fields[place[-1]].default


def test_every_recipe_key_is_explained_with_its_default() -> None:
    table = rows("Recipe keys")
    known = {place for place in all_places() if not fields_of(inner_type(type_at(place)))}
    wanted = {
        place
        for place in known
        if place not in NO_EFFECT
        and place[0] != "targets"
        and (place[1:2] != ("training",) or ("dense_training", place[-1]) in NO_EFFECT)
    }
    assert {".".join(place) for place in wanted} == set(table) - {"targets", "pruning.training"}
    for place in wanted:
        value = default_of(place)
        if isinstance(value, (bool, int, float, str)):
            shown = str(value).lower() if isinstance(value, bool) else str(value)
            assert table[".".join(place)][0] == shown, place


@pytest.mark.parametrize("command", ["measure", "fit-lpnet"])
def test_every_option_is_explained(command: str) -> None:
    words = " ".join(rows("Measure, and learn what latency depends on"))
    table = set(re.findall(r"--[\w-]+", words))
    found = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    options = {name for option in found.params for name in option.opts if name.startswith("--")}
    assert {name for name in options - {"--debug"} if name not in table} == set()


def strategy_rows() -> tuple[dict[str, list[str]], dict[tuple[str, str], str]]:
    """Strategies of the table; (strategy or "criteria", option) -> default."""
    text = README.read_text(encoding="utf-8").split("### Strategies\n", 1)[1].split("\n### ", 1)[0]
    lines = [line.replace("`", "").strip("| ").split("|") for line in text.splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines if len(line) > 2]
    heads = [number for number, row in enumerate(cells) if set(row[0]) == {"-"}]
    names = {
        name: row[1:] for row in cells[heads[0] + 1 : heads[1] - 1] for name in row[0].split(", ")
    }
    options = {}
    for row in cells[heads[1] + 1 :]:
        keys = row[0].split(", ")
        # "(0.5, 0.9)" is one value of one option.
        values = row[2].split(", ") if len(keys) > 1 else [row[2]]
        for owner in row[1].split(", "):
            options |= {(owner, key): value for key, value in zip(keys, values, strict=True)}
    return names, options


def test_every_strategy_and_option_is_in_the_tables() -> None:
    names, shown = strategy_rows()
    assert set(names) == set(STRATEGIES)
    wanted = {}
    for name, kind in STRATEGIES.items():
        owner = "criteria" if name in CRITERIA else name
        for field in dataclasses.fields(kind.settings_type):
            if field.name in option_names(kind):
                wanted[owner, field.name] = str(field.default)
        assert bool(names[name][0]) == kind.has_phase, name
    assert set(shown) == set(wanted)
    for key, default in wanted.items():
        if default not in ("None", "True", "False"):
            assert shown[key] == default, key


def test_every_extra_is_in_the_table() -> None:
    project = tomllib.loads((README.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(rows("See it work")) == set(project["project"]["optional-dependencies"])


def test_the_snippet_on_polarised_gates_runs() -> None:
    text = README.read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.S)
               if "PolarisedGates" in block]  # fmt: skip
    model = nn.Sequential(
        OrderedDict(body=conv_bn(3, 16), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(),
                    fc=nn.Linear(16, CLASSES))
    ).train()  # fmt: skip
    macs = MacsModel(trace(model, example()))

    class Milliseconds:
        name, unit, fingerprint = "latency", "ms", macs.fingerprint

        def __call__(self, widths: Tensor) -> Tensor:
            return 16.0 * macs(widths) / macs(torch.tensor([16]))

    names: dict[str, Any] = {
        "model": model,
        "example_inputs": example(),
        "lpnet": Milliseconds(),
        "loader": [(example(8, seed=s), torch.arange(8) % CLASSES) for s in range(8)],
        "criterion": nn.functional.cross_entropy,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
    }
    before_removal, after = code.split("plan = ")
    exec(before_removal, names)
    pruned = names["model"].eval()
    expected = pruned(example())
    exec("plan = " + after, names)
    assert pruned.body[0].out_channels == 8
    assert torch.allclose(pruned(example()), expected, atol=1e-5)


def test_the_snippet_on_learned_scores_runs() -> None:
    text = README.read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.S)
               if "WGatesImportance" in block]  # fmt: skip
    model = tiny("residual").train()
    pruner = WGatesPruner(model, example(), pruning_ratio=0.5)
    nn.functional.cross_entropy(model(example(8)), torch.arange(8) % CLASSES).backward()
    pruner.regularize(model)
    names: dict[str, Any] = {"pruner": pruner}
    exec(code, names)
    before = sum(parameter.numel() for parameter in model.parameters())
    heads = [m for m in model.modules() if isinstance(m, nn.Linear)]
    tp.pruner.BasePruner(
        model,
        (example(),),
        names["importance"],
        pruning_ratio=0.5,
        ignored_layers=heads,
        in_channel_groups={},
        out_channel_groups={},
    ).step()
    assert sum(parameter.numel() for parameter in model.parameters()) < before
    model.eval()(example())


def test_every_runtime_is_in_the_table() -> None:
    table = rows("Runtimes")
    assert list(table) == list(RUNTIMES)
    for name, kind in RUNTIMES.items():
        _, devices, artefact, precisions, options = table[name]
        assert devices == ", ".join(kind.device_kinds), name
        assert [word for word in options.split(", ") if word] == list(options_of(kind)), name
        if name != "command":
            assert artefact == kind.artefact_name
            same = "as eager" if kind.precisions == RUNTIMES["eager"].precisions else ""
            assert precisions in (", ".join(kind.precisions), same)


def test_the_snippet_of_a_strategy_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = README.read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.S)
               if "class Mine(Strategy)" in block]  # fmt: skip
    (tmp_path / "my_strategies.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    data = [(torch.randn(4, *example().shape[1:]), torch.randint(CLASSES, (4,)))]
    result = prune_to_target(
        tiny("residual"),
        example(),
        data,
        data,
        target=MacsTarget(fraction=0.6),
        settings=PruningSettings(
            strategy="my_strategies:Mine",
            options={"p": 1},
            gate_epochs=0,
            fine_tune_epochs=1,
            measure_seconds=0.01,
            min_fraction=0.2,
            training=TrainingSettings(accelerator="cpu"),
        ),
        run_folder=tmp_path / "run",
        progress=False,
    )
    assert result.held
    assert result.report["strategy"] == "my_strategies:Mine"
    assert sum(result.plan.widths) < sum(result.plan.space.full_widths)
    with pytest.raises(ConfigError, match=r"options\.q is unknown to `my_strategies:Mine`"):
        PruningSettings(strategy="my_strategies:Mine", options={"q": 1})
    with pytest.raises(ConfigError, match=r"my_strategies.+has no callable `Yours`"):
        PruningSettings(strategy="my_strategies:Yours")
    with pytest.raises(ConfigError, match="no subclass of"):
        PruningSettings(strategy="my_strategies:MySettings")
