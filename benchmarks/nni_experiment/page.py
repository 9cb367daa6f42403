"""The trials as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


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
