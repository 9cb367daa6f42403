"""Pieces of the page as HTML. Everything that comes from a run is escaped here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from wgates_plugin.report.tables import (
    NOTHING,
    comparison_rows,
    duration,
    milliseconds,
    percent,
    runtime_words,
)

PHASES = {
    "baseline": "measuring the untouched network",
    "grid": "probing the channel grid",
    "sampling": "measuring sub-networks",
    "lpnet": "fitting LPNet",
    "feasibility": "checking that the target can be reached",
    "gates": "deciding which channels go",
    "start": "settling the widths to learn at",
    "plan": "settling the widths",
    "removal": "removing channels",
    "fine_tune": "fine-tuning",
    "delivery": "exporting and measuring the file",
    "export": "of this, exporting",
    "unification": "unifying weights",
    "total": "total",
}


def section(title: str, inside: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{inside}\n</section>" if inside else ""


def folded(title: str, inside: str) -> str:
    if not inside:
        return ""
    return f"<section><details><summary>{escape(title)}</summary>\n{inside}\n</details></section>"


def pair(*sections: str) -> str:
    """Sections side by side where there is room; empty ones are left out."""
    present = [each for each in sections if each]
    if len(present) < 2:
        return "".join(present)
    return f'<div class="pair">{"".join(present)}</div>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int) -> str:
    """A table of escaped cells; the last `numbers` columns are aligned right."""
    words = len(heads) - numbers

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{_number_class(place >= words)}>{escape(cell)}</{tag}>"
            for place, cell in enumerate(row)
        )

    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    head = f"<thead><tr>{cells(heads, 'th')}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>\n{body}\n</tbody></table></div>'


def _number_class(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values, one a line."""
    body = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in rows
    )
    return f'<table class="facts"><tbody>\n{body}\n</tbody></table>' if body else ""


def comparison(report: dict[str, Any]) -> str:
    """Before, after, change and target; a bar shows what is left of each cost."""
    lines = []
    for row in comparison_rows(report):
        mood = "" if row.better is None else (" good" if row.better else " bad")
        meter = ""
        if row.share is not None:
            left = min(100.0, 100.0 * row.share)
            meter = f'<div><span style="width:{left:.1f}%"></span></div>'
        numbers = "".join(
            f'<td class="number">{escape(text)}</td>' for text in (row.before, row.after)
        )
        lines.append(
            f'<tr><th scope="row">{escape(row.label)}</th>{numbers}'
            f'<td class="number{mood}">{escape(row.change)}</td>'
            f'<td class="number">{escape(row.target)}</td><td class="meter">{meter}</td></tr>'
        )
    heads = "".join(
        f'<th scope="col"{_number_class(bool(head))}>{head}</th>'
        for head in ("", "before", "after", "change", "target")
    )
    return (
        f'<div class="wide"><table><thead><tr>{heads}<th class="meter" scope="col">left</th></tr>'
        f"</thead><tbody>\n{chr(10).join(lines)}\n</tbody></table></div>"
    )


def lpnet(report: dict[str, Any]) -> str:
    found = report["lpnet"]
    if not found:
        return ""
    rows = [
        ("structure", str(found.get("structure", NOTHING))),
        ("measured sub-networks", str(found.get("samples", NOTHING))),
        ("of these held out for the error", str(found.get("held_out", NOTHING))),
        ("mean error, held out", percent(found.get("mape_held_out"))),
        ("held out within 10 %", percent(found.get("within_10_percent"), 0)),
        ("largest error, held out", percent(found.get("worst"))),
        ("90 % interval, half width", percent(found.get("half_width_90"))),
        ("held out inside their 90 % interval", percent(found.get("covered_90"), 0)),
        ("mean error, visited", percent(found.get("mape_visited"))),
        ("samples set aside (another environment)", _count(found.get("set_aside"))),
        ("measurements taken again", _count(found.get("measured_again"))),
        ("sampling time inside inference", percent(found.get("share_in_inference"), 0)),
    ]
    return facts(row for row in rows if row[1] != NOTHING)


def _count(value: int | None) -> str:
    return str(value) if value else NOTHING


def attempts(report: dict[str, Any]) -> str:
    """What the closed loop predicted, measured and decided."""
    stages = {"start": "widths to learn at", "plan": "widths", "delivery": "exported file"}
    rows = [
        (
            str(number),
            stages.get(one["stage"], one["stage"]),
            milliseconds(one.get("predicted_ms")),
            milliseconds(one.get("measured_ms")),
            one["verdict"],
        )
        for number, one in enumerate(report["attempts"], 1)
    ]
    if not rows:
        return ""
    return table(("", "what", "predicted", "measured", "verdict"), rows, numbers=3)


def seconds(report: dict[str, Any]) -> str:
    spent = _deliveries_as_one(report["seconds"])
    order = [*PHASES, *sorted(set(spent) - set(PHASES))]
    rows = [
        (
            PHASES.get(phase, phase.replace("_", " ").replace("-", " ")),
            duration(float(spent[phase])),
        )
        for phase in order
        if isinstance(spent.get(phase), (int, float))
    ]
    total = [row for row in rows if row[0] == "total"]
    return facts([row for row in rows if row[0] != "total"] + total)


def _deliveries_as_one(seconds: dict[str, Any]) -> dict[str, Any]:
    """
    >>> _deliveries_as_one({"gates": 2.0, "delivery-0": 3.0, "delivery-1": 4.0})
    {'gates': 2.0, 'delivery': 7.0}
    """
    parts = {key: value for key, value in seconds.items() if key.startswith("delivery-")}
    rest = {key: value for key, value in seconds.items() if key not in parts}
    return {**rest, "delivery": sum(parts.values())} if parts else rest


def environment(report: dict[str, Any]) -> str:
    """The runtime first, then the machine, then versions; nested values are spelled out."""
    rows = [("runtime", runtime_words(report))] if report["runtime"] else []
    shown = {"runtime", "device", "threads"}
    for source in (report["identity"], report["environment"]):
        for key, value in source.items():
            if key not in shown and value not in (None, "", {}, []):
                shown.add(key)
                rows.append((key.replace("_", " "), words(value)))
    if report["grid"]:
        how = "probed" if report["grid"].get("probed") else "given"
        rows.append(("channel grid", f"{report['grid'].get('multiple')} ({how})"))
    error = report.get("masked_equals_removed")
    if error is not None:
        rows.append(("largest difference, gated and removed network", f"{error:.1e}"))
    return facts(rows)


def words(value: Any) -> str:
    """
    >>> words({"input_0": [1, 3, 224, 224], "fast": True})
    'input_0 1x3x224x224, fast yes'
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {words(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        whole = bool(value) and all(isinstance(item, int) for item in value)
        return ("x" if whole else ", ").join(words(item) for item in value)
    return NOTHING if value is None else str(value)


def settings(report: dict[str, Any]) -> str:
    return nested(report["settings"])


def nested(values: dict[str, Any]) -> str:
    """Nested values as rows of dotted keys; nothing where there are none."""
    return facts(_flat(values, "")) if values else ""


def _flat(values: dict[str, Any], where: str) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{where}{key}.")
        else:
            rows.append((where + key, json.dumps(value, ensure_ascii=False)))
    return rows


def widths(report: dict[str, Any]) -> str:
    rows = [
        (row["group"], str(row["dense"]), str(row["kept"]), percent(row["kept"] / row["dense"], 0))
        for row in report["widths"]
        if row["dense"]
    ]
    return table(("group", "before", "kept", "share"), rows, numbers=3) if rows else ""
