"""The figures of a report as text: formatting, before/after rows, headline, terminal table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "-"

_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def significant(value: float, digits: int = 3) -> str:
    """At least `digits` significant digits, never with an exponent.

    >>> significant(2.4), significant(0.01234), significant(1234.5)
    ('2.40', '0.0123', '1234')
    """
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def milliseconds(value: float | None, digits: int = 3) -> str:
    return NOTHING if value is None else f"{significant(value, digits)} ms"


def percent(value: float | None, decimals: int = 1) -> str:
    """A share 0..1 as per cent.

    >>> percent(0.913)
    '91.3 %'
    """
    return NOTHING if value is None else f"{value * 100:.{decimals}f} %"


def count(value: float | None, unit: str = "") -> str:
    """A large number with an SI prefix.

    >>> count(10_400_000, "MACs"), count(512)
    ('10.4 M MACs', '512')
    """
    if value is None:
        return NOTHING
    for size, prefix in _PREFIXES:
        if abs(value) >= size:
            return f"{significant(value / size)} {prefix}{' ' + unit if unit else ''}"
    return f"{value:.0f}{' ' + unit if unit else ''}"


def file_size(value: float | None) -> str:
    """Bytes in units of 1000.

    >>> file_size(918_000)
    '918 kB'
    """
    return NOTHING if value is None else (f"{value:.0f} B" if value < 1e3 else count(value) + "B")


def duration(seconds: float) -> str:
    """
    >>> duration(0.24), duration(42.0), duration(250.0)
    ('0.2 s', '42 s', '4 min 10 s')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


@dataclass(frozen=True)
class Row:
    """One figure before and after. `share` is after/before for costs; `better` judges the change."""

    label: str
    before: str
    after: str
    change: str
    target: str
    share: float | None
    better: bool | None


def comparison_rows(report: dict[str, Any]) -> list[Row]:
    """Latency, accuracy, MACs, parameters and sizes; figures that nobody took are left out."""
    before, after, target = report["baseline"], report["final"], targets_of(report)
    digits = _latency_digits(report)
    rows = []
    for key, label, text in (
        ("latency_ms", "Latency", lambda value: milliseconds(value, digits)),
        ("accuracy", "Accuracy", percent),
        ("macs", "MACs", count),
        ("parameters", "Parameters", count),
        ("file_bytes", "File size", file_size),
        ("packed_bytes", "Packed weights", file_size),
    ):
        old, new = before.get(key), after.get(key)
        if old is None and new is None:
            continue
        change, share, better = NOTHING, None, None
        if old is not None and new is not None:
            if key == "accuracy":
                change = f"{(new - old) * 100:+.1f} points"
                # Half a point either way is what another seed gives.
                better = None if abs(new - old) < 0.005 else new > old
            elif old > 0:
                share, better = new / old, new <= old
                change = f"{(share - 1) * 100:+.0f} %"
                if new > 0 and share < 1:
                    change += f"  ({old / new:.1f}x less)"
        limit = target.get(key)
        aim = NOTHING if limit is None else f"≤ {text(limit)}"
        rows.append(Row(label, text(old), text(new), change, aim, share, better))
    return rows


def targets_of(report: dict[str, Any]) -> dict[str, float]:
    """Figure -> the most it may be, by the keys of `baseline` and `final`."""
    given = {key: value for key, value in report["target"].items() if value is not None}
    if report["target_ms"] is not None:
        given["latency_ms"] = report["target_ms"]
    return given


def _latency_digits(report: dict[str, Any]) -> int:
    """Three digits, unless they would hide on which side of the target the latency lies."""
    final, target = report["final"]["latency_ms"], report["target_ms"]
    if final is None or target is None:
        return 3
    digits = 3
    while final != target and significant(final, digits) == significant(target, digits):
        digits += 1
        if digits == 6:
            break
    return digits if final > target else 3


def headline(report: dict[str, Any], *, arrow: str = "->") -> str:
    """The run in one sentence.

    Example: "2.40 ms -> 1.18 ms on onnxruntime (cpu, 1 thread), target 1.20 ms: held; accuracy
    91.3 % -> 91.0 %".
    """
    before, after, target = report["baseline"], report["final"], targets_of(report)
    digits = _latency_digits(report)
    texts = {
        "latency_ms": lambda value: milliseconds(value, digits),
        "macs": lambda value: count(value, "MACs"),
        "parameters": lambda value: count(value, "parameters"),
    }
    shown = [key for key in texts if key in target] or ["latency_ms"]
    parts = []
    for key in shown:
        text = texts[key]
        part = f"{text(before[key])} {arrow} {text(after[key])}"
        if key == "latency_ms" and report["runtime"]:
            part += f" on {runtime_words(report)}"
        if key in target:
            part += f", target {text(target[key])}"
        parts.append(part)
    sentence = " and ".join(parts) + f": {report['contract']}"
    if after["accuracy"] is not None:
        sentence += f"; accuracy {percent(before['accuracy'])} {arrow} {percent(after['accuracy'])}"
    return sentence


def runtime_words(report: dict[str, Any]) -> str:
    """Runtime, device and threads, as in "onnxruntime (cpu, 1 thread)"."""
    details = [report["device"]] if report["device"] else []
    threads = report["identity"].get("threads")
    if threads is not None and (report["device"] or "cpu") == "cpu":
        details.append(f"{threads} thread{'s' if threads != 1 else ''}")
    inside = f" ({', '.join(details)})" if details else ""
    return f"{report['runtime']}{inside}"


def _held_to(report: dict[str, Any]) -> str:
    """What the verdict is about: the runtime, or counts, with which latency is only told."""
    where = f" on {runtime_words(report)}" if report["runtime"] else ""
    target = targets_of(report)
    if "latency_ms" in target or not target:
        return where
    names = {"macs": "MACs", "parameters": "parameters"}
    words = f": {' and '.join(names.get(key, key) for key in target)}"
    return f"{words}; latency for information{where}" if where else words


def summary_table(report: dict[str, Any]) -> Table:
    """Before and after for the terminal, with targets and the contract."""
    from rich.table import Table
    from rich.text import Text

    rows = comparison_rows(report)
    held = report["contract"] == "held"
    caption = Text(f"target {report['contract']}", style="bold green" if held else "bold red")
    caption.append(_held_to(report), style="default")
    table = Table(title=Text(report["name"], style="bold"), caption=caption)
    table.add_column("")
    for name in ("before", "after", "change", "target"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        style = "" if row.better is None else ("green" if row.better else "yellow")
        table.add_row(row.label, row.before, row.after, Text(row.change, style=style), row.target)
    return table
