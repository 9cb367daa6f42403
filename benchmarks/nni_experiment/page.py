"""The trials as a table; `python -m benchmarks.nni_experiment.page` makes the README's copy anew."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import HOME, RESULTS, read_record
from wgates_plugin.files import write_text

README = HOME.parent / "README.md"
START, END = "<!-- table nni_experiment -->\n", "<!-- end nni_experiment -->"


def table(rows: Sequence[Mapping[str, Any]], dense: Mapping[str, Any]) -> str:
    """One line per trial, below the untouched network's."""
    lines = [
        "| pruner | target | latency | of the untouched network's | accuracy | parameters "
        "| steps: pruning + fine-tuning | trial |",
        "|---|---|---|---|---|---|---|---|",
        f"| none | | {dense['latency_ms']:.3f} ms | 1.00 | {dense['accuracy']:.2%} "
        f"| {dense['parameters']:,} | | |",
    ]
    for row in rows:
        asked = row["parameters"]
        cells = [f"`{asked['pruner']}`", f"{asked['target_fraction']:.2f}"]
        if row["accuracy"] is None:
            cells += ["-"] * 5
        else:
            cells += [
                f"{row['latency_ms']:.3f} ms",
                f"{row['latency_ratio']:.2f}",
                f"{row['accuracy']:.2%}",
                f"{row['parameter_count']:,}",
                f"{row['pruning_steps']} + {row['steps'] - row['pruning_steps']}",
            ]
        lines.append("| " + " | ".join([*cells, row["status"]]) + " |")
    return "\n".join(lines)


def stored_table(folder: Path = RESULTS) -> str:
    """The table of the stored result.

    Raises:
        FileNotFoundError: the experiment has not been run.
    """
    record = read_record(folder, "nni_experiment")
    if record is None:
        raise FileNotFoundError(f"no nni_experiment.json in `{folder}`; run the experiment first")
    return table(record["samples"]["trials"], record["numbers"]["dense"])


def rewritten(text: str, new: str) -> str:
    """`text` with the lines between the markers replaced.

    Raises:
        ValueError: the markers are not there.
    """
    head, found_start, rest = text.partition(START)
    _, found_end, tail = rest.partition(END)
    if not (found_start and found_end):
        raise ValueError(f"README: no markers `{START.strip()}`, `{END}`")
    return f"{head}{START}{new}\n{END}{tail}"


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--results", type=Path, default=RESULTS)
    options.add_argument("--readme", type=Path, default=README)
    arguments = options.parse_args()
    text = arguments.readme.read_text(encoding="utf-8")
    write_text(arguments.readme, rewritten(text, stored_table(arguments.results)))
    print(f"rewrote {arguments.readme}")


if __name__ == "__main__":
    main()
