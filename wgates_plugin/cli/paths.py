"""Where a command will write, looked at before it works for minutes."""

from __future__ import annotations

import os
from pathlib import Path

from wgates_plugin.errors import ConfigError


def check_out_files(**paths: Path | None) -> None:
    """Refuse paths that no file can be written to; folders that are missing will be made.

    Args:
        paths: option name, with `_` for `-`, -> path; None was not given.

    Raises:
        ConfigError: names every such option.
    """
    _refuse({name: file_problem(path) for name, path in paths.items() if path is not None})


def check_out_folders(**paths: Path | None) -> None:
    """The same for folders.

    Raises:
        ConfigError: names every such option.
    """
    _refuse({name: folder_problem(path) for name, path in paths.items() if path is not None})


def check_files_apart(**paths: Path | None) -> None:
    """Refuse two options with one file: what is read, or kept, would be written over.

    Args:
        paths: as for `check_out_files`; links and relative paths are followed.

    Raises:
        ConfigError: names every option whose file an earlier one has.
    """
    given = {name: path.resolve() for name, path in paths.items() if path is not None}
    problems: dict[str, str | None] = {}
    for name, path in given.items():
        first = next(other for other in given if given[other] == path)
        if first != name:
            problems[name] = (
                f"`{paths[name]}` is the file of {_option(first)} too; give another path"
            )
    _refuse(problems)


def file_problem(path: Path) -> str | None:
    """Why no file can be written at `path`; None where one can."""
    if path.is_dir():
        return f"`{path}` is a folder; give a file's path, such as `{path / 'figures.json'}`"
    return folder_problem(path.parent)


def folder_problem(path: Path) -> str | None:
    """Why nothing can be written into the folder `path`, made or yet to be made."""
    there = next(
        parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists()
    )
    if not there.is_dir():
        return f"`{there}` is a file, no folder; choose another path"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"the folder `{there}` cannot be written to; choose another path"
    return None


def _refuse(found: dict[str, str | None]) -> None:
    problems = {_option(name): words for name, words in found.items() if words}
    if len(problems) == 1:
        ((option, words),) = problems.items()
        raise ConfigError(option, [words])
    if problems:
        raise ConfigError("options", [f"{option}: {words}" for option, words in problems.items()])


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
