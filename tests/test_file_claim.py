"""One writing process per sample file, and nothing written over what others wrote."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fake_bench import IDENTITY, measured
from lock_helpers import Other, needs_locks
from networks import example, tiny

from wgates_plugin import ChannelSpace, file_claim, trace
from wgates_plugin.efficiency.samples.file import SampleFile
from wgates_plugin.errors import FileFormatError, FileInUseError
from wgates_plugin.file_claim import claim
from wgates_plugin.files import create_text


@pytest.fixture(scope="module")
def space() -> ChannelSpace:
    return trace(tiny("plain"), example())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "samples.jsonl"


@needs_locks
def test_a_second_process_is_refused_until_the_first_is_killed(
    space: ChannelSpace, path: Path
) -> None:
    SampleFile.open(path, space, IDENTITY).add([4, 8], measured(1.5))
    before = path.read_bytes()
    with Other(path) as other:
        assert other.holds
        with pytest.raises(FileInUseError, match="another process is writing it; wait"):
            SampleFile.open(path, space, IDENTITY)
        reading = SampleFile.load(path)
        assert len(reading) == 1
        with pytest.raises(FileInUseError):
            reading.add([8, 12], measured(2.0))
    assert path.read_bytes() == before
    assert len(SampleFile.open(path, space, IDENTITY)) == 1


@needs_locks
@pytest.mark.parametrize("way", ["close", "with", "gone", "failed"])
def test_a_claim_ends_with_its_owner(space: ChannelSpace, path: Path, way: str) -> None:
    file = SampleFile.open(path, space, IDENTITY)
    with Other(path) as other:
        assert not other.holds
    if way == "close":
        file.close()
    elif way == "with":
        with file:
            pass
    elif way == "gone":
        del file
    else:
        del file
        with pytest.raises(FileFormatError, match="another runtime"):
            SampleFile.open(path, space, {"runtime": "another"})
    with Other(path) as other:
        assert other.holds


def test_one_process_may_open_a_file_again(space: ChannelSpace, path: Path) -> None:
    first = SampleFile.open(path, space, IDENTITY)
    second = SampleFile.open(path, space, IDENTITY)
    second.add([4, 8], measured(1.5))
    with pytest.raises(FileInUseError, match=r"written or removed by others.*open it again"):
        first.add([8, 12], measured(2.0))
    third = SampleFile.open(path, space, IDENTITY)
    third.add([8, 12], measured(2.0))
    assert [source.id for source in third.sources.values()] == [0]
    assert SampleFile.open(path, space, IDENTITY).widths == [(4, 8), (8, 12)]


def test_a_file_that_is_gone_is_not_begun_in_the_middle(space: ChannelSpace, path: Path) -> None:
    file = SampleFile.open(path, space, IDENTITY)
    path.unlink()
    with pytest.raises(FileInUseError, match="removed"):
        file.add([4, 8], measured(1.5))
    assert not path.exists()


def test_a_file_closed_for_writing_can_be_read_and_written_again(
    space: ChannelSpace, path: Path
) -> None:
    with SampleFile.open(path, space, IDENTITY) as file:
        file.add([4, 8], measured(1.5))
    assert file.widths == [(4, 8)]
    file.add([8, 12], measured(2.0))
    assert len(SampleFile.load(path)) == 2


def test_a_file_that_was_only_read_loses_its_torn_end_before_the_next_line(
    space: ChannelSpace, path: Path
) -> None:
    SampleFile.open(path, space, IDENTITY).add([4, 8], measured(1.5))
    with path.open("ab") as torn:
        torn.write(b'{"type": "sam')
    SampleFile.load(path).add([8, 12], measured(2.0))
    assert [sample.widths for sample in SampleFile.load(path).samples] == [(4, 8), (8, 12)]


@needs_locks
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_no_claim(path: Path) -> None:
    path.touch()
    mine = claim(path)
    child = os.fork()
    if child == 0:
        try:
            claim(path)
        except FileInUseError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert claim(path) is mine  # the child's end took nothing away


@needs_locks
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_claim_ends_though_a_forked_process_lives_on(path: Path) -> None:
    path.touch()
    mine = claim(path)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reading, 1)
        os._exit(0)
    try:
        del mine
        assert claim(path).ours
    finally:
        os.write(writing, b".")
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


def test_without_locks_nothing_is_claimed(
    space: ChannelSpace, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_claim, "fcntl", None)
    SampleFile.open(path, space, IDENTITY).add([4, 8], measured(1.5))
    assert len(SampleFile.open(path, space, IDENTITY)) == 1


def test_what_exists_is_not_created_over(path: Path) -> None:
    create_text(path, "first")
    create_text(path, "second")
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]
