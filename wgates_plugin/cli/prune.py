"""`wgates prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wgates_plugin.cli.app import MISSED, app, guarded
from wgates_plugin.cli.options import Debug, Resume, path_argument, path_option
from wgates_plugin.cli.paths import check_out_folders
from wgates_plugin.cli.running import carry_out


@app.command()
def prune(
    recipe: Annotated[Path, path_argument("A YAML or JSON file.", metavar="RECIPE")],
    resume: Resume = False,
    out: Annotated[Path | None, path_option("Run folder; overrides the recipe's.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key: target.fraction=0.3"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Prune a network to its target as a recipe says."""
    again = ["prune", str(recipe)]
    again += ["--out", str(out)] if out else []
    again += [word for item in overrides or [] for word in ("--set", item)]
    with guarded(debug=debug, again=[*again, "--resume"]):
        from wgates_plugin.recipe import load_recipe

        check_out_folders(out=out)
        job = load_recipe(recipe, overrides=overrides or [])
        if out is not None:
            job = job.model_copy(update={"run_folder": out})
        held = carry_out(job, resume=resume)
    raise typer.Exit(0 if held else MISSED)
