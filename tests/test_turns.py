"""Several runs on one machine, of which one measures."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.comparison import turns as turns_module
from benchmarks.comparison.turns import Turns, folder_of


def test_whoever_measures_is_alone(tmp_path: Path) -> None:
    """A child of a process notes the time again and again; it stands still while another measures."""
    ticking = (
        "import sys, time, pathlib\n"
        "last = time.time(); end = last + 30; here = pathlib.Path(sys.argv[1])\n"
        "(here / 'begun').touch()\n"
        "while not (here / 'enough').exists() and last < end:\n"
        "    time.sleep(0.01); now = time.time()\n"
        "    (here / 'gaps').open('a').write(f'{now - last}\\n'); last = now\n"
    )
    measuring = (
        "import sys, time, pathlib\n"
        "from benchmarks.comparison.turns import Turns\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "while not (here / 'begun').exists(): time.sleep(0.01)\n"
        "with Turns(here).alone():\n"
        "    before = (here / 'gaps').stat().st_size if (here / 'gaps').exists() else 0\n"
        "    time.sleep(1.0)\n"
        "    after = (here / 'gaps').stat().st_size if (here / 'gaps').exists() else 0\n"
        "(here / 'ticks').write_text(str(after - before))\n"
        "time.sleep(0.2); (here / 'enough').touch()\n"
    )
    turns = Turns(tmp_path)
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    commands = [
        [sys.executable, "-c", *words, str(tmp_path)] for words in ([parent, ticking], [measuring])
    ]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(turns.call, commands)) == [0, 0]
    assert int((tmp_path / "ticks").read_text()) <= 64  # at most the line it was writing
    assert max(map(float, (tmp_path / "gaps").read_text().split())) >= 1.0
    assert not list(tmp_path.glob("*.worker"))


def test_a_file_left_by_a_killed_process_stops_nobody(tmp_path: Path) -> None:
    """Its number may be another's by now."""
    turns = Turns(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        (tmp_path / f"{stranger.pid}.worker").write_text("1")
        with turns.alone():
            state = Path(f"/proc/{stranger.pid}/stat").read_text().rpartition(")")[2].split()[0]
            assert state != "T"
            assert not list(tmp_path.glob("*.worker"))
        stranger.communicate(b"\n")


def test_machines_that_share_a_folder_sign_up_apart(tmp_path: Path) -> None:
    assert folder_of(tmp_path) == folder_of(tmp_path / "." / "x" / "..")
    assert folder_of(tmp_path) != folder_of(tmp_path / "x")
    assert tmp_path not in folder_of(tmp_path).parents


def test_a_command_runs_as_one_of_those_who_take_turns(tmp_path: Path) -> None:
    word = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpgrp() == os.getpid()))"
    out = tmp_path / "out"
    command = [sys.executable, turns_module.__file__, str(tmp_path), sys.executable, "-c", word]
    assert subprocess.run([*command, str(out)], check=False).returncode == 0
    assert out.read_text() == "True"


def test_an_interrupt_ends_all_who_work(tmp_path: Path) -> None:
    turns = Turns(tmp_path)
    code = (  # a shell's background job ignores Ctrl-C, and so do its children
        "import pathlib, signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
    )
    with ThreadPoolExecutor(1) as pool:
        begun = tmp_path / "begun"
        status = pool.submit(turns.call, [sys.executable, "-c", code, str(begun)])
        while not begun.exists():
            time.sleep(0.01)
        turns.interrupt()
        assert status.result(timeout=30) != 0
    assert not list(tmp_path.glob("*.worker"))
