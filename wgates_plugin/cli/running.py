"""Carrying out a recipe and saying what came of it: for `prune`, `demo` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from wgates_plugin.cli.app import log_shown

if TYPE_CHECKING:
    from wgates_plugin.recipe import Recipe


def carry_out(recipe: Recipe, *, resume: bool) -> bool:
    """Whether the target was held."""
    from wgates_plugin.recipe import run_recipe

    with log_shown():
        result = run_recipe(recipe, resume=resume)
    print_summary(result.report, result.run_folder, result.artefact)
    return result.held


def print_summary(report: dict[str, Any], folder: Path, artefact: Path | None) -> None:
    from rich.console import Console

    from wgates_plugin.report import headline, summary_table

    Console().print(summary_table(report))
    typer.echo(headline(report))
    paths = {"page": folder / "report.html", "figures": folder / "report.json"}
    if artefact is not None:
        paths["network"] = artefact
    for what, path in paths.items():
        typer.echo(f"{what + ':':9}{path}")
