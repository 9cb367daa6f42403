"""What a benchmark leaves behind: one JSON file with numbers, raw samples, surroundings and seed."""

from __future__ import annotations

import argparse
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wgates_plugin
from wgates_plugin.errors import FileFormatError
from wgates_plugin.files import read_json, write_json
from wgates_plugin.latency.environment import describe_environment

HOME = Path(__file__).parents[1]
RESULTS = HOME / "results"
KIND = "wgates-benchmark"
NOT_RUN = "*not run yet*"


def parser(name: str, about: str | None, *, seed: int | None = 0) -> argparse.ArgumentParser:
    """Options every benchmark has: where to write, and the seed; None for one without."""
    options = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=(about or "").split("\n")[0],
        allow_abbrev=False,
    )
    options.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON")
    if seed is not None:
        options.add_argument("--seed", type=int, default=seed)
    return options


@functools.cache
def code_digest() -> str:
    """Short hash of the package's sources: settings alone do not say what a result was made by."""
    home = Path(wgates_plugin.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(home.rglob("*.py")):
        digest.update(f"{path.relative_to(home).as_posix()}\0".encode())
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:16]


def write_record(
    folder: Path,
    name: str,
    *,
    claim: str,
    settings: Mapping[str, Any],
    seed: int,
    numbers: Any,
    samples: Any,
) -> Path:
    """Write `folder/name.json`.

    Args:
        numbers: what the benchmark found. samples: the raw values it was computed from.
    """
    path = folder / f"{name}.json"
    value = {
        "kind": KIND,
        "version": 1,
        "benchmark": name,
        "claim": claim,
        "numbers": numbers,
        "samples": samples,
        "settings": dict(settings),
        "seed": seed,
        "environment": describe_environment(),
        "code": code_digest(),
    }
    write_json(path, value)
    print(f"wrote {path}")
    return path


def read_record(folder: Path, name: str) -> dict[str, Any] | None:
    """The record `folder/name.json`, None when the benchmark has not been run.

    Raises:
        FileFormatError: the file is no record of this benchmark.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    value = read_json(path, kind="benchmark result")
    if not isinstance(value, dict) or value.get("kind") != KIND or value.get("benchmark") != name:
        raise FileFormatError(
            f"benchmark result `{path}`: no record of `{name}`; run `python -m benchmarks {name}`"
        )
    return value


def fashion_mnist_reports(folder: Path) -> dict[str, dict[str, Any]]:
    """Reports of all stored Fashion-MNIST runs by "<network>-<seed>", in the order of names."""
    return {
        path.stem: read_json(path, kind="report")
        for path in sorted((folder / "fashion_mnist").glob("*.json"))
    }


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; a note instead where there are no rows.

    Example:
        >>> print(markdown(["a", "b"], [["1", "2"]]))
        | a | b |
        |---|---|
        | 1 | 2 |
    """
    if not rows:
        return NOT_RUN
    text = ["| " + " | ".join(line) + " |" for line in (head, *rows)]
    return "\n".join([text[0], "|" + "---|" * len(head), *text[1:]])
