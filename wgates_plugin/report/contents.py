"""Reading report.json: complete and of the right kind, or an error that names what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wgates_plugin.errors import FileFormatError
from wgates_plugin.files import read_json

KIND = "wgates-report"
VERSION = 1

_NUMBER = (int, float)
_MAYBE_NUMBER = (int, float, type(None))
_STATE = {
    "latency_ms": _MAYBE_NUMBER,
    "accuracy": _MAYBE_NUMBER,
    "macs": _NUMBER,
    "parameters": _NUMBER,
    "file_bytes": _MAYBE_NUMBER,
}
_SHAPE: dict[str, Any] = {
    "name": str,
    "strategy": str,
    "runtime": (str, type(None)),
    "device": (str, type(None)),
    "identity": dict,
    "target": dict,
    "target_ms": _MAYBE_NUMBER,
    "contract": str,
    "seed": int,
    "baseline": _STATE,
    "final": _STATE,
    "after_removal": (dict, type(None)),
    "seconds": dict,
    "environment": dict,
    "grid": (dict, type(None)),
    "lpnet": (dict, type(None)),
    "widths": [{"group": str, "dense": int, "kept": int}],
    "gates": [{"step": _NUMBER}],
    "training": [{"label": str, "epoch": int}],
    "attempts": [{"stage": str, "verdict": str}],
    "settings": dict,
}
_PREDICTIONS = [{"measured_ms": _NUMBER, "predicted_ms": _NUMBER, "set": str}]


def load_report(run_folder: str | Path) -> dict[str, Any]:
    """The report of a finished run.

    Raises:
        FileFormatError: report.json is missing, unreadable, of another kind or version, or lacks
            keys; all of them are named.
    """
    path = Path(run_folder) / "report.json"
    if not path.is_file():
        raise FileFormatError(
            f"report `{path}`: no such file; a run writes it when it ends, finish the run with "
            "--resume or check the folder"
        )
    report = read_json(path, kind="report")
    if not isinstance(report, dict) or report.get("kind") != KIND:
        raise FileFormatError(f"report `{path}`: the JSON is no report of this package")
    if report.get("version") != VERSION:
        raise FileFormatError(
            f"report `{path}`: version {report.get('version')!r}, this package reads {VERSION}; "
            "read it with the version of the package that wrote it"
        )
    missing, wrong = _compare(report, _SHAPE, "")
    lpnet = report.get("lpnet")
    if isinstance(lpnet, dict):
        lacking, mistyped = _compare(lpnet, {"predictions": _PREDICTIONS}, "lpnet.")
        missing, wrong = missing + lacking, wrong + mistyped
    if report.get("contract") not in ("held", "missed", None):
        wrong.append(f"`contract` is {report['contract']!r}, expected 'held' or 'missed'")
    if missing or wrong:
        problems = [f"missing {', '.join(f'`{key}`' for key in missing)}"] if missing else []
        raise FileFormatError(
            f"report `{path}`: {'; '.join(problems + wrong)}; the file is incomplete, make it "
            "again by finishing the run with --resume"
        )
    return report


def _compare(value: Any, shape: Any, where: str) -> tuple[list[str], list[str]]:
    """(missing keys, descriptions of wrong types) of `value` against `shape`."""
    missing: list[str] = []
    wrong: list[str] = []
    for key, expected in shape.items():
        path = where + key
        if key not in value:
            missing.append(path)
            continue
        found = value[key]
        if isinstance(expected, Mapping):
            parts = [(path, found, expected)]
        elif isinstance(expected, list):
            if not isinstance(found, list):
                wrong.append(f"`{path}` is {type(found).__name__}, expected a list")
                continue
            parts = [(f"{path}[{n}]", item, expected[0]) for n, item in enumerate(found)]
        else:
            if not isinstance(found, expected) or isinstance(found, bool):
                wrong.append(f"`{path}` is {found!r}, expected {_name(expected)}")
            continue
        for inner_path, inner, inner_shape in parts:
            if not isinstance(inner, dict):
                wrong.append(f"`{inner_path}` is {type(inner).__name__}, expected an object")
                continue
            lacking, mistyped = _compare(inner, inner_shape, inner_path + ".")
            missing += lacking
            wrong += mistyped
    return missing, wrong


def _name(kinds: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", dict: "an object"}
    all_kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    parts = [
        names.get(kind, "null") for kind in all_kinds if not (kind is int and float in all_kinds)
    ]
    return " or ".join(parts)
