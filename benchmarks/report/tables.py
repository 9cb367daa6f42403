"""The tables of both READMEs, rewritten between their markers from the stored results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import not_faster
from benchmarks.comparison.contests import always_there, compared, contests, has_rivals, margins
from benchmarks.comparison.summary import CHANCE, Verdict
from benchmarks.comparison.tables import (
    ablations_table,
    margins_table,
    matrix_text,
    page,
    verdicts_table,
)
from benchmarks.nni_experiment.page import table as trials_table
from benchmarks.report import scoreboard
from benchmarks.report.strategy_tables import promises_table, strategy_cost_table, systems_table
from benchmarks.tools.records import (
    HOME,
    NOT_RUN,
    fashion_mnist_reports,
    markdown,
    parser,
    read_record,
)
from wgates_plugin.files import write_text


def score_table(folder: Path) -> str:
    rows = [
        [
            f"`{entry.claim}`",
            _value(entry),
            _bar(entry),
            "" if entry.bar is None else "yes" if entry.holds else "**no**",
        ]
        for entry in scoreboard.entries(folder)
    ]
    return markdown(["claim", "value", "bar", "holds"], rows)


def _value(entry: scoreboard.Entry) -> str:
    if entry.value is None:
        return "-"
    words = f"{entry.value:.3g}"
    return (
        words if entry.interval is None else words + " ({:.3g} to {:.3g})".format(*entry.interval)
    )


def _bar(entry: scoreboard.Entry) -> str:
    if entry.bar is None:
        return "shown only"
    if entry.most is not None:
        return f"{entry.bar:g} to {entry.most:g}"
    return f"{'at most' if entry.better == 'lower' else 'at least'} {entry.bar:g}"


def _ratio(facts: dict[str, Any]) -> str:
    return f"{facts['ratio']:.3f} ± {facts['ratio_spread']:.3f}"


def gate_step_table(folder: Path) -> str:
    record = read_record(folder, "gate_step")
    rows = [
        [
            network,
            f"{numbers['plain_median_seconds']:.2f} s",
            _ratio(numbers["wgates"]),
            _ratio(numbers["activation_masking"]),
        ]
        for network, numbers in (record["numbers"] if record else {}).items()
    ]
    return markdown(["network", "plain step", "with W-Gates", "gates on feature maps"], rows)


REMOVAL_WAYS = {
    "torch_pruning": "torch-pruning",
    "ours": "ours, checked in numbers only where an operation might move channels",
    "ours_always_checked": "ours, always checked in numbers",
}


def removal_table(folder: Path) -> str:
    record = read_record(folder, "removal")
    if record is None:
        return NOT_RUN
    numbers = record["numbers"]
    rows = [
        [about, f"{numbers[way]['median_seconds']:.3f} s", _ratio(numbers[way])]
        for way, about in REMOVAL_WAYS.items()
    ]
    nni = numbers["nni"]
    if nni["installed"]:
        share = nni["ratio"] * numbers["ours"]["ratio"]
        rows.append(["NNI ModelSpeedup", f"{nni['median_seconds']:.2f} s", f"{share:.0f}"])
    else:
        rows.append(["NNI ModelSpeedup", "not installed", "-"])
    return markdown(["way", "median", "over torch-pruning"], rows)


def masked_table(folder: Path) -> str:
    record = read_record(folder, "masked_equals_removed")
    rows = [
        [network, str(len(record["samples"][network])), f"{worst:.1e}"]
        for network, worst in (record["numbers"]["worst_by_network"] if record else {}).items()
        if record
    ]
    return markdown(["network", "plans", "worst relative error"], rows)


def sampling_table(folder: Path) -> str:
    record = read_record(folder, "sampling")
    rows = [
        [
            pair,
            "ours" if way == "ours" else "copy, trace, prune, export each time",
            f"{facts['share_in_inference']:.0%}",
            f"{1000 * facts['overhead_seconds_per_sample']:.0f} ms",
            f"{facts['setup_seconds']:.1f} s",
        ]
        for pair, numbers in (record["numbers"] if record else {}).items()
        for way, facts in numbers.items()
    ]
    head = ["network/runtime", "way", "share in inference"]
    return markdown([*head, "overhead per sample", "once"], rows)


def targets_table(folder: Path) -> str:
    record = read_record(folder, "targets_at_224")
    rows = [
        [
            network,
            f"{n['baseline_ms']:.2f} ms",
            f"{n['target_ms']:.2f} ms",
            f"{n['latency_ms']:.2f} ms",
            n["contract"],
            f"{n['macs_share']:.0%}",
            f"{n['lpnet']['mape_held_out']:.1%}",
            "-" if n["lpnet"]["mape_visited"] is None else f"{n['lpnet']['mape_visited']:.1%}",
            f"{n['seconds']['total']:.0f} s",
        ]
        for network, n in (record["numbers"] if record else {}).items()
    ]
    head = ["network", "untouched", "target", "exported file", "target held", "MACs kept"]
    head += ["LPNet error, held out", "visited", "whole job"]
    return markdown(head, rows)


PREDICTORS = {
    "ours": "ours",
    "lpnet-mlp": "the paper's MLP",
    "macs-line": "line through MACs",
    "gradient-boosting": "gradient boosting",
    "lookup-table": "look-up table",
    "ours-without-profiles": "ours, no profiles",
}


def lpnet_accuracy_table(folder: Path) -> str:
    record = read_record(folder, "lpnet_accuracy")
    rows = []
    for pair, facts in (record["numbers"] if record else {}).items():
        for kind, by_size in facts["sets"].items():
            for size, found in by_size.items():
                row = [pair, kind, size]
                row += [f"{found[n]['mape']:.1%}" if n in found else "-" for n in PREDICTORS]
                row.append(f"{found['ours']['within_10_percent']:.1%}")
                covered = found["ours"].get("coverage_90", found["ours"].get("inside_90"))
                row.append("-" if covered is None else f"{covered:.1%}")
                floor = facts["noise_floor"].get(kind, {}).get("mean_error")
                row.append("-" if floor is None else f"{floor:.1%}")
                rows.append(row)
    head = ["network/runtime", "widths", "from", *PREDICTORS.values(), "ours within 10 %"]
    return markdown([*head, "in its 90 % interval", "error of one measurement"], rows)


def lpnet_transfer_table(folder: Path) -> str:
    record = read_record(folder, "lpnet_accuracy")
    rows = [
        [pair, kind, *(f"{facts['mape']:.1%}" for facts in found.values())]
        for pair, n in (record["numbers"] if record else {}).items()
        for kind, found in n.get("transfer", {}).items()
    ]
    head = ["to network/runtime", "widths", "adapted", "adapted, no profiles", "from scratch"]
    return markdown([*head, "from scratch, no profiles"], rows)


def not_faster_table(folder: Path) -> str:
    record = read_record(folder, "not_faster")
    rows = [
        [
            network,
            runtime,
            f"{n['dense_ms']:.2f} ms",
            *(_ratio_at_macs(n["ways"][way]) for way in not_faster.WAYS),
            f"{n['speed_ratio']:.2f} ± {n['speed_ratio_spread']:.2f}",
        ]
        for network, by_runtime in (record["numbers"] if record else {}).items()
        for runtime, n in by_runtime.items()
    ]
    head = ["network", "runtime", "untouched", "torch-pruning", "rounding to 8", "to 16"]
    head += ["our grid without LPNet", "ours", "times as fast as torch-pruning"]
    return markdown(head, rows)


def _ratio_at_macs(facts: dict[str, Any]) -> str:
    shown = f"{facts['ratio']:.2f} ± {facts['ratio_spread']:.2f}"
    shown = f"**{shown}**" if facts["slower_than_dense"] else shown
    return f"{shown} ({facts['macs_share']:.0%})"


def fashion_mnist_table(folder: Path) -> str:
    by_network: dict[str, list[dict[str, Any]]] = {}
    for name, report in fashion_mnist_reports(folder).items():
        by_network.setdefault(name.rpartition("-")[0], []).append(report)
    rows = [
        [
            network,
            str(len(reports)),
            _over_seeds(_each(reports, "baseline", "accuracy"), "{:.2%}"),
            _over_seeds(_each(reports, "dense_trained_on", "accuracy"), "{:.2%}"),
            _over_seeds(_each(reports, "final", "accuracy"), "{:.2%}"),
            _over_seeds(_each(reports, "baseline", "latency_ms"), "{:.3f} ms"),
            _over_seeds(_each(reports, "final", "latency_ms"), "{:.3f} ms"),
            f"held in {sum(r['contract'] == 'held' for r in reports)} of {len(reports)}",
            _over_seeds(_each(reports, "lpnet", "mape_held_out"), "{:.1%}"),
            _over_seeds(_each(reports, "lpnet", "mape_visited"), "{:.1%}"),
        ]
        for network, reports in by_network.items()
    ]
    head = ["network", "seeds", "dense", "dense, trained on for the same epochs", "pruned"]
    head += ["latency before", "after", "contract", "LPNet error, held out", "visited"]
    return markdown(head, rows)


def _each(reports: Sequence[dict[str, Any]], *keys: str) -> list[float | None]:
    """The number behind `keys` in every report, None where a report has none."""
    values: list[Any] = list(reports)
    for key in keys:
        values = [None if value is None else value.get(key) for value in values]
    return values


def _over_seeds(values: Sequence[float | None], form: str) -> str:
    """Mean and standard deviation; '-' unless all are there, as means over other seeds mislead.

    Example:
        >>> _over_seeds([0.5, 0.7], "{:.1%}"), _over_seeds([0.5], "{:.1%}"), _over_seeds([None], "{}")
        ('60.0% ± 14.1%', '50.0%', '-')
    """
    found = [value for value in values if value is not None]
    if not found or len(found) < len(values):
        return "-"
    mean = form.format(statistics.mean(found))
    return f"{mean} ± {form.format(statistics.stdev(found))}" if len(found) > 1 else mean


def demo_table(folder: Path) -> str:
    record = read_record(folder, "demo")
    if record is None:
        return NOT_RUN
    n = record["numbers"]
    row = [
        f"{n['seconds']:.0f} s",
        str(n["cores"]),
        f"{n['baseline_ms']:.3f} ms",
        f"{n['latency_ms']:.3f} ms",
        f"{100 * n['baseline_accuracy']:.1f} %",
        f"{100 * n['accuracy']:.1f} %",
        n["contract"],
    ]
    head = ["wall time", "cores", "latency before", "after", "accuracy before", "after", "target"]
    return markdown(head, [row])


def nni_experiment_table(folder: Path) -> str:
    record = read_record(folder, "nni_experiment")
    if record is None:
        return NOT_RUN
    return trials_table(record["samples"]["trials"], record["numbers"]["dense"])


def cell_pages(folder: Path) -> dict[Path, str]:
    """A page with all cells of every compared experiment of which anything ran, beside its runs."""
    return dict(
        page(experiment, folder)
        for experiment in compared()
        if (folder / "comparison" / experiment.name / "runs").is_dir()
    )


def comparison_table(folder: Path) -> str:
    return verdicts_table([e for e in compared() if has_rivals(e)], folder)


def comparison_methods_table(folder: Path) -> str:
    parts = [matrix_text(e, folder) for e in compared() if has_rivals(e)]
    return "\n\n".join(part for part in parts if part) or NOT_RUN


def comparison_ablations_table(folder: Path) -> str:
    return ablations_table(compared(), folder)


def comparison_margins_table(folder: Path) -> str:
    return margins_table(compared(), folder) or NOT_RUN


def in_short(folder: Path) -> str:
    """The comparison and the scoreboard in three sentences."""
    cells = contests(compared(), folder)
    verdicts = [cell.verdict() for cell in cells]
    decided = [verdict for verdict in verdicts if verdict.counts]
    good = sum(verdict.won for verdict in decided)
    missing = sum(verdict is Verdict.INCOMPLETE for verdict in verdicts)
    rivals = always_there(compared())
    alone = {rival: margins(cells, rival) for rival in rivals if rival != CHANCE}
    ahead = [(sum(margin > 0 for margin in found), len(found)) for found in alone.values() if found]
    ahead.sort(key=lambda pair: pair[0] / pair[1])
    least, most = (f"{a} of {b}" for a, b in (ahead[0], ahead[-1])) if ahead else ("none", "none")
    names = ", ".join(f"`{name}`" for name in alone)
    bars = [entry for entry in scoreboard.entries(folder) if entry.bar is not None]
    missed = sum(not entry.holds for entry in bars)
    nobodys = len(verdicts) - len(decided) - missing
    are = "is" if missing == 1 else "are"
    return (
        f"Held against the best of {len(rivals)} rivals or more, ours is level or ahead in {good} of the "
        f"{len(decided)} cells (task, target, runtime) that are complete and decided; of all "
        f"{len(verdicts)} cells, {nobodys} count for nobody (undecided, not at equal latency, or out of "
        f"every method's reach) and {missing} {are} incomplete. Against any one of them ({names}) it is "
        f"ahead in {least} to {most} at equal latency. Of the scoreboard's "
        f"{len(bars)} bars {missed} are missed."
    )


Tables = Mapping[str, Callable[[Path], str]]

FRONT_TABLES: Tables = {"in_short": in_short, "nni_experiment": nni_experiment_table}
"""Those of the project's own README."""

TABLES: Tables = {
    "in_short": in_short,
    "scoreboard": score_table,
    "gate_step": gate_step_table,
    "removal": removal_table,
    "masked_equals_removed": masked_table,
    "sampling": sampling_table,
    "targets_at_224": targets_table,
    "lpnet_accuracy": lpnet_accuracy_table,
    "lpnet_transfer": lpnet_transfer_table,
    "not_faster": not_faster_table,
    "fashion_mnist": fashion_mnist_table,
    "comparison": comparison_table,
    "comparison_margins": comparison_margins_table,
    "comparison_methods": comparison_methods_table,
    "ablations": comparison_ablations_table,
    "systems": systems_table,
    "strategy_cost": strategy_cost_table,
    "promises": promises_table,
    "nni_experiment": nni_experiment_table,
    "demo": demo_table,
}


def rewritten(text: str, folder: Path, tables: Tables = TABLES) -> str:
    """`text` with the lines between `<!-- table NAME -->` and `<!-- end NAME -->` made anew.

    Raises:
        ValueError: a table of `tables` has no pair of markers.
    """
    for name, table in tables.items():
        start, end = f"<!-- table {name} -->\n", f"<!-- end {name} -->"
        head, found_start, rest = text.partition(start)
        _, found_end, tail = rest.partition(end)
        if not (found_start and found_end):
            raise ValueError(f"README: no markers `{start.strip()}`, `{end}`")
        text = f"{head}{start}{table(folder)}\n{end}{tail}"
    return text


def main(argv: Sequence[str] = ()) -> None:
    options = parser("tables", __doc__, seed=None)
    options.add_argument(
        "--readme", type=Path, help="rewrite this page alone, not the repository's"
    )
    arguments = options.parse_args(list(argv))
    pages = {HOME / "README.md": TABLES, HOME.parent / "README.md": FRONT_TABLES}
    for path, tables in ({arguments.readme: TABLES} if arguments.readme else pages).items():
        text = path.read_text(encoding="utf-8")
        write_text(path, rewritten(text, arguments.results, tables))
        print(f"rewrote {path}")
    for path, text in cell_pages(arguments.results).items():
        write_text(path, text)
        print(f"wrote {path}")
