"""Files are whole or not there, with the rights of the user's other files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from wgates_plugin.files import save_tensors, write_json, write_text

posix = pytest.mark.skipif(os.name != "posix", reason="no links and no umask")


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "one")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "two\ud800")
    assert path.read_text() == "one"
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]


@posix
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "there" / "target.txt", tmp_path / "link.txt"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


@posix
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_rights_follow_the_users_mask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a.txt", "mine")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~mask


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@posix
def test_tensors_have_the_rights_of_other_files(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {})
    save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    assert mode_of(tmp_path / "a.safetensors") == mode_of(tmp_path / "a.json")


@posix
def test_a_file_that_was_there_keeps_its_rights(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for write in (
        lambda: write_text(path, "mine"),
        lambda: save_tensors(path, {"a": torch.ones(1)}),
    ):
        path.touch()
        path.chmod(0o640)
        write()
        assert mode_of(path) == 0o640
