"""Tables of the compared methods, as markdown, from the stored runs."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.comparison.again import MOST_APART, found_by_cell, read_replaced
from benchmarks.comparison.contests import always_there, contests, margin_over, margins
from benchmarks.comparison.experiment import Experiment, Method, runs_of, runtime_name
from benchmarks.comparison.runs import Places
from benchmarks.comparison.summary import (
    CHANCE,
    EQUAL_LATENCY,
    Cell,
    Difference,
    Row,
    Verdict,
    mean_and_spread,
    read_cells,
)
from benchmarks.tools.records import markdown
from wgates_plugin.files import read_json, write_text

PHASES = {
    "lpnet": "LPNet",
    "gates": "deciding",
    "start": "settling to learn at",
    "plan": "settling",
    "removal": "removal",
    "fine_tune": "fine-tuning",
}
"""Key of a report's seconds -> heading."""


def cell_table(cell: Cell) -> list[list[str]]:
    """One row per method: accuracy, loss, latency, MACs, parameters and where the time went."""
    return [_row(cell, row) for row in cell.rows.values()]


HEAD = [
    "method", "accuracy", "on other images", "lost", "right after the cut", "latency", "held", "MACs",
    "parameters", *(f"{name}, s" for name in PHASES.values()),
]  # fmt: skip


def _row(cell: Cell, row: Row) -> list[str]:
    if not row.accuracy:
        return [f"`{row.method}`", _gaps(row), *["-"] * (len(HEAD) - 2)]
    mark = "" if row.complete else f" ({len(row.accuracy)} seeds, {_gaps(row)})"
    lost = cell.lost(row.method)
    return [
        f"`{row.method}`",
        _percent(row.accuracy) + mark,
        _percent(row.other_images) if len(row.other_images) == len(row.seeds) else "-",
        "-" if lost is None else _points(lost),
        _percent(row.cut),
        _spread(row.ratio, "{:.3f}"),
        f"{sum(row.held)} of {len(row.held) + len(row.missing)}",
        _spread(row.macs, "{:.2f}"),
        _spread(row.parameters, "{:.2f}"),
        *(_seconds(row, phase) for phase in PHASES),
    ]


def _gaps(row: Row) -> str:
    """What is not there, and why."""
    if not row.refused:
        return f"{len(row.missing)} missing" if row.accuracy else "*missing*"
    words = f"{len(row.refused)} refused: {next(iter(row.refused.values()))}"
    return f"{words}; {len(row.missing)} missing" if row.missing else words


def _seconds(row: Row, phase: str) -> str:
    return f"{statistics.mean(seconds.get(phase, 0.0) for seconds in row.seconds):.0f}"


def _points(found: Difference) -> str:
    return f"{found.mean:+.2f}" + (f" ± {found.error:.2f}" if found.pairs > 1 else "")


def _percent(values: Sequence[float]) -> str:
    return _spread([100.0 * value for value in values], "{:.2f}") + " %"


def _spread(values: Sequence[float], form: str) -> str:
    mean, spread = mean_and_spread(values)
    return f"{form.format(mean)} ± {form.format(spread)}" if len(values) > 1 else form.format(mean)


def verdict(cell: Cell) -> str:
    """A cell's verdict in words, with the reason where it counts for nobody."""
    found = cell.verdict()
    why = {
        Verdict.INCOMPLETE: f": {cell.missing()} runs are missing",
        Verdict.OUT_OF_REACH: " of every method: even the least widths were measured over the target",
        Verdict.UNDECIDED: ": one seed decides nothing"
        if cell.seeds == 1
        else ": chance is within one standard error of the best",
        Verdict.UNEQUAL: f": the better one takes over {100 * EQUAL_LATENCY:.0f} % of the target more",
    }
    return f"*{found}*{why[found]}" if found in why else found


def experiment_text(experiment: Experiment, results: Path) -> str:
    """All cells of an experiment: a heading line and a table each."""
    parts = []
    for cell in read_cells(experiment, results):
        words = f"**{round(100 * cell.target)} % of the latency on {_where(cell)}**"
        if cell.dense:
            words += f": untouched {_percent(cell.dense)}, trained on {_percent(cell.trained_on)}"
        found = verdict(cell)
        if found.startswith("*"):
            words += f"; {found}"
        parts.append(words + "\n\n" + markdown(HEAD, cell_table(cell)))
    return "\n\n".join(parts)


def _where(cell: Cell) -> str:
    return f"{cell.runtime}, {cell.processor}" if cell.processor else cell.runtime


def page(experiment: Experiment, results: Path) -> tuple[Path, str]:
    """Where the page of an experiment lies, beside its runs, and what it says."""
    home = results / "comparison" / experiment.name
    about = f"# {experiment.name}\n\n{experiment.about[0].upper()}{experiment.about[1:]}."
    words = [
        f"- `{name}`: {text}"
        for name, method in experiment.methods.items()
        if (text := _apart(method))
    ]
    if words:
        about += "\n\nAll methods take their defaults, but:\n\n" + "\n".join(words)
    about += _made_again(home / "replaced.json") + _disturbed(experiment, home)
    about += _led_astray(experiment, results) + _made_by(home)
    if experiment.ours and experiment.with_role("rival"):
        about += f"\n\n{verdicts_table([experiment], results)}"
    return home / "README.md", f"{about}\n\n{experiment_text(experiment, results)}\n"


def _made_again(path: Path) -> str:
    gone = read_replaced(path)
    refused = sum("refused" in one for one in gone)
    why = [
        f"{count} runs {words}"
        for count, words in (
            (len(gone) - refused, "of cells in which some were disturbed"),
            (refused, "refused a target that another method of their seed was not"),
        )
        if count
    ]
    if not why:
        return ""
    return f"\n\nMade again: {', '.join(why)}; `replaced.json` has what they had found."


def _made_by(home: Path) -> str:
    """By how many states of the package's code the runs were made; empty for one."""
    stored = [read_json(path, kind="run") for path in sorted((home / "runs").glob("*.json"))]
    known = Counter(one["code"] for one in stored if "code" in one)
    untold = len(stored) - known.total()
    if len(known) + bool(untold) < 2:
        return ""
    words = [f"{count} by `{code}`" for code, count in known.most_common()]
    words += [f"{untold} before that was kept"] if untold else []
    return f"\n\nRuns by state of the package's code: {', '.join(words)}."


def _disturbed(experiment: Experiment, home: Path) -> str:
    """How many networks the last sittings timed beside other work; empty for none."""
    lines = []
    for name in (runtime_name(block) for block in experiment.runtimes):
        path = home / f"finals-{name}.json"
        timed = read_json(path, kind="final latencies") if path.exists() else {"disturbed": []}
        if timed["disturbed"]:
            lines.append(
                f"- {name}: {len(timed['disturbed'])} of {len(timed['ratio'])} networks were timed "
                "beside other work in every pass of the last sitting (`disturbed`)."
            )
    return "\n\n" + "\n".join(lines) if lines else ""


def _led_astray(experiment: Experiment, results: Path) -> str:
    """How many runs of each cell aimed by another latency than the last sitting found; or nothing."""
    cells = found_by_cell(Places(experiment, results, results), runs_of(experiment))
    rows = []
    for (runtime, target), found in cells.items():
        apart = sum(one.apart for one in found.values())
        unjudged = sum(not one.judged for one in found.values())
        if apart or unjudged:
            rows.append([runtime, f"{target:.0%}", *map(str, (len(found), apart, unjudged))])
    if not rows:
        return ""
    head = ["runtime", "latency", "networks", "found otherwise", "not judged"]
    return (
        "\n\n*Found otherwise*: the last sitting found another latency of these networks than their runs "
        f"had, smaller or larger by more than {MOST_APART:.0%}, so that these aimed beside their target. "
        "*Not judged*: it timed them beside other work, or not at all.\n\n" + markdown(head, rows)
    )


def _apart(method: Method) -> str:
    """What a method has that is not its default, and how that was found; empty for nothing."""
    words = [
        f"{key}: {json.dumps(value)}"
        for key, value in {**method.options, **method.pruning}.items()
        if value is not None
    ]
    words += [] if method.fine_tuned else ["all epochs in its own phase"]
    said = "" if method.tuning == "defaults" else method.tuning
    return "; ".join(part for part in (", ".join(words), said) if part)


def write_page(experiment: Experiment, results: Path) -> Path:
    path, text = page(experiment, results)
    write_text(path, text)
    return path


def verdicts_table(experiments: Sequence[Experiment], results: Path) -> str:
    """One line per cell: ours, the best rival, uniform widths and chance, and who is ahead."""
    head = ["task", "runtime", "latency", "trained on", "ours", "lost", "rivals", "best rival",
            "margin", "on other images", "uniform", "chance", ""]  # fmt: skip
    rows = []
    for experiment in experiments:
        for cell in read_cells(experiment, results):
            best = cell.best(cell.rivals_here)
            lost, margin = cell.lost(cell.ours or ""), cell.margin()
            there = cell.margin_on_other_images()
            rows.append(
                [
                    experiment.task or experiment.name,
                    cell.runtime,
                    f"{round(100 * cell.target)} %",
                    _percent(cell.trained_on) if cell.trained_on else "-",
                    _with_latency(cell, cell.ours),
                    "-" if lost is None else _points(lost),
                    str(len(cell.rivals_here)),
                    "-" if best is None else f"`{best}` {_with_latency(cell, best)}",
                    "-" if margin is None else _points(margin),
                    "-" if there is None else _points(there),
                    _accuracy(cell, "uniform"),
                    _accuracy(cell, CHANCE),
                    verdict(cell),
                ]
            )
    return markdown(head, rows)


def margins_table(experiments: Sequence[Experiment], results: Path) -> str:
    """One line per rival that runs everywhere: how far ours is ahead, over the cells of `margins`; empty
    without any."""
    head = ["rival", "cells", "ours ahead in", "margin", "95 % interval, over tasks",
            "on tasks that ours was not tuned on"]  # fmt: skip
    untuned = [experiment for experiment in experiments if not experiment.tuned_on]
    rows = []
    for rival in always_there(experiments):
        every = margins(contests(experiments, results), rival)
        found = margin_over(experiments, rival)(results)
        if found is None:
            continue
        elsewhere = margin_over(untuned, rival)(results)
        low, high = found.interval()
        rows.append(
            [
                f"`{rival}`",
                str(len(every)),
                str(sum(margin > 0 for margin in every)),
                f"{found.mean:+.2f}",
                f"{low:+.2f} to {high:+.2f}",
                "-" if elsewhere is None else f"{elsewhere.mean:+.2f}",
            ]
        )
    return markdown(head, rows) if rows else ""


def matrix_text(experiment: Experiment, results: Path) -> str:
    """Accuracy of every method at every target, one table per runtime; empty without any run."""
    cells = read_cells(experiment, results)
    parts = []
    for runtime in dict.fromkeys(cell.runtime for cell in cells):
        mine = [cell for cell in cells if cell.runtime == runtime]
        if not any(row.accuracy or row.refused for cell in mine for row in cell.rows.values()):
            continue
        head = ["method", *(f"{round(100 * cell.target)} %" for cell in mine)]
        rows = [
            [f"`{method}`", *(_accuracy(cell, method) for cell in mine)]
            for method in experiment.methods
            if any(method in cell.rows for cell in mine)
        ]
        name = experiment.task or experiment.name
        parts.append(f"**{name} on {_where(mine[0])}**\n\n{markdown(head, rows)}")
    return "\n\n".join(parts)


def _accuracy(cell: Cell, method: str | None) -> str:
    """Of a method in a cell; a dash where it does not run."""
    row = cell.rows.get(method or "")
    if row is None:
        return "-"
    if not row.accuracy:
        return "refused" if row.refused else "*missing*"
    return _percent(row.accuracy) + ("" if row.complete else f" ({len(row.accuracy)} seeds)")


def _with_latency(cell: Cell, method: str | None) -> str:
    row = cell.rows.get(method or "")
    if row is None or not row.ratio:
        return _accuracy(cell, method)
    own = "" if len(row.finals) == len(row.ratio) else " by its own measurement"
    return f"{_accuracy(cell, method)} at {statistics.mean(row.ratio):.3f}{own}"


def ablations_table(experiments: Sequence[Experiment], results: Path) -> str:
    """One line per ablation: its mean paired difference from ours and 95 % interval; one line for all
    of a cell of which nothing is stored."""
    head = ["task", "runtime", "latency", "changed", "ours", "then", "difference",
            "95 % interval", "seeds", "", "on other images"]  # fmt: skip
    rows = []
    for experiment in experiments:
        for cell in read_cells(experiment, results):
            there = cell.on_other_images()
            task = experiment.task or experiment.name
            place = [
                f"{task}, `{cell.ours}`" if experiment.variant else task,
                cell.runtime,
                f"{round(100 * cell.target)} %",
            ]
            changed = [m for m in experiment.with_role("ablation") if m in cell.rows]
            if changed and not any(row.seeds for row in cell.rows.values()):
                missing = f"*all {len(changed)}*"
                rows.append([*place, missing, "*missing*", "*missing*", "-", "-", "0", "", "-"])
                continue
            for method in changed:
                found = cell.between(method, cell.ours or "")
                numbers = ["-", "-", "0"]
                if found is not None:
                    low, high = found.interval()
                    numbers = [f"{found.mean:+.2f}", f"{low:+.2f} to {high:+.2f}", str(found.pairs)]
                rows.append(
                    [
                        *place,
                        f"`{method}`",
                        _accuracy(cell, cell.ours),
                        _accuracy(cell, method),
                        *numbers,
                        "" if found is None or not low <= 0 <= high else "may be chance",
                        _interval(there.between(method, cell.ours or "")),
                    ]
                )
    return markdown(head, rows)


def _interval(found: Difference | None) -> str:
    if found is None:
        return "-"
    low, high = found.interval()
    return f"{found.mean:+.2f} ({low:+.2f} to {high:+.2f})"
