"""Torch eager, and exported programs that could execute code."""

from __future__ import annotations

import builtins
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from latency_helpers import assert_close, expected
from networks import example, tiny
from torch import Tensor, nn

from wgates_plugin.errors import (
    FileFormatError,
)
from wgates_plugin.latency import (
    EagerRuntime,
    RuntimeSettings,
    base,
    measure,
)


@pytest.mark.parametrize("threads", [1, 2])
def test_eager_threads_hold_only_inside(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "usable_cores", lambda: 2)
    before = torch.get_num_threads()
    seen: list[int] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            return x

    session = EagerRuntime(RuntimeSettings(threads=threads)).load(Spy(), example())
    measure(session, seconds=0, min_rounds=1, warmup=1)
    session.outputs()
    assert set(seen) == {threads}
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), session.active():
        raise KeyError
    assert torch.get_num_threads() == before


def test_eager_channels_last_and_bfloat16() -> None:
    network = tiny("plain")
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    last = EagerRuntime(channels_last=True)
    assert_close(last.load(network, example()).outputs(), expected(network, example()))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert last.identity(example())["options"] == {"channels_last": True}
    half = EagerRuntime(RuntimeSettings(precision="bfloat16"))
    found = half.load(network, example()).outputs()
    assert seen[2].dtype == torch.bfloat16
    assert_close(found, expected(network, example()), relative=0.05)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    return EagerRuntime().save(tiny("plain"), example(), path)


def _edited(source: Path, target: Path, member: str, old: str, new: str) -> Path:
    """Copy a zip with `old` replaced by `new` in one member; `old` must be there."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
        for info in before.infolist():
            content = before.read(info)
            if info.filename.endswith(member):
                assert old.encode() in content
                content = content.replace(old.encode(), new.encode(), 1)
            after.writestr(info.filename, content)
    return target


@pytest.mark.parametrize(
    ("member", "old", "new"),
    [
        ("weights_config.json", '"use_pickle": false', '"use_pickle": true'),
        ("weights_config.json", '"use_pickle": false', '"use_pickle": 1'),
        ("weights_config.json", '"weight_0"', '"../other"'),
        ("model.json", "torch.ops.aten.conv2d.default", "torch.serialization.os.system"),
        ("model.json", "torch.ops.aten.conv2d.default", "#example:conv2d"),
        ("model.json", "torch.ops.aten.conv2d.default", "torch.ops.aten.from_file.default"),
        ("model.json", "torch.ops.aten.conv2d.default", "torch.ops.image.write_file.default"),
        ("model.json", '"guards_code": []', '"guards_code": ["print(1)"]'),
        ("model.json", '{"as_int": 2}', '{"as_expr": {"expr_str": "print(1)"}}'),
        ("model.json", "builtins.tuple", "__enum__"),
        ("sample_inputs/model.pt", "PK", "XX"),
    ],
)
def test_a_program_that_could_execute_code_is_refused(
    program: Path, tmp_path: Path, member: str, old: str, new: str
) -> None:
    path = _edited(program, tmp_path / "edited.pt2", member, old, new)
    with pytest.raises(FileFormatError, match="could execute code"):
        EagerRuntime().load_file(path, example())


HALVED = torch.library.Library("wgates_plugin_tests", "DEF")
HALVED.define("halve(Tensor x, str how='exactly') -> Tensor")
HALVED.impl("halve", lambda x, how="exactly": x * 0.5, "CompositeExplicitAutograd")
torch.library.register_fake(
    "wgates_plugin_tests::halve", lambda x, how="exactly": torch.empty_like(x)
)


class Halving(nn.Module):
    def __init__(self, *words: str) -> None:
        super().__init__()
        self.words, self.layer = words, nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halved: torch.Tensor = torch.ops.wgates_plugin_tests.halve(self.layer(x), *self.words)
        return halved


def test_an_operator_of_the_users_own_is_taken_without_words(tmp_path: Path) -> None:
    inputs, path = torch.randn(1, 4), tmp_path / "own.pt2"
    network = Halving().eval()
    EagerRuntime().save(network, inputs, path)
    with EagerRuntime().load_file(path, inputs) as session, torch.no_grad():
        torch.testing.assert_close(session.outputs()[0], network(inputs))
    EagerRuntime().save(Halving("/a/path").eval(), inputs, path)
    with pytest.raises(FileFormatError, match=r"it calls `torch.ops.wgates_plugin_tests.halve"):
        EagerRuntime().load_file(path, inputs)


def test_a_program_with_foreign_members_is_refused(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "more.pt2"
    shutil.copy(program, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/data/constants/custom_obj_0", b"")
    with pytest.raises(FileFormatError, match="custom_obj_0"):
        EagerRuntime().load_file(path, example())


def test_a_pickle_named_like_a_program_is_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return builtins.open, (str(tmp_path / "exploded"), "w")

    torch.save(Bomb(), tmp_path / "model.pt2")
    with pytest.raises(FileFormatError):
        EagerRuntime().load_file(tmp_path / "model.pt2", example())
    assert not (tmp_path / "exploded").exists()


def test_delivered_networks_run_as_their_own_code_with_the_files_weights(tmp_path: Path) -> None:
    network, other = tiny("residual").eval(), tiny("residual").eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    runtime = EagerRuntime()
    path = tmp_path / "model.pt2"
    runtime.save(network, example(), path)
    with runtime.load_delivered(path, other, example()) as session:
        assert isinstance(session._network, type(network))
        with torch.no_grad():
            torch.testing.assert_close(session.outputs()[0], network(example()))
    with pytest.raises(FileFormatError, match="not those of the network given"):
        runtime.load_delivered(path, tiny("plain"), example())
