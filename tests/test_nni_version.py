"""The NNI door says what it needs; the rest of the package does without it."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest

from wgates_plugin.errors import LibraryVersionError, MissingExtraError

DOOR = "wgates_plugin.integrations.nni"


def forget_door(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == DOOR or name.startswith(f"{DOOR}.")]:
        monkeypatch.delitem(sys.modules, name)


def test_without_nni_the_door_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_door(monkeypatch)
    monkeypatch.setitem(sys.modules, "nni", None)
    with pytest.raises(MissingExtraError, match=r"pip install \"wgates-plugin\[nni\]\""):
        importlib.import_module(DOOR)


@pytest.mark.parametrize("version", ["2.10.1", "3.1", "999.dev0"])
def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    forget_door(monkeypatch)
    monkeypatch.setitem(sys.modules, "nni", SimpleNamespace(__version__=version))
    with pytest.raises(LibraryVersionError, match=rf"nni {version} is installed.*nni==3\.0"):
        importlib.import_module(DOOR)
