"""`wgates demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wgates_plugin.cli.app import MISSED, app, guarded
from wgates_plugin.cli.options import Debug, Resume, path_option
from wgates_plugin.cli.paths import check_out_folders
from wgates_plugin.cli.running import carry_out


@app.command()
def demo(
    out: Annotated[Path, path_option("Run folder.")] = Path("wgates-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 0,
    resume: Resume = False,
    debug: Debug = False,
) -> None:
    """Train a small network on handwritten digits and make it twice as fast."""
    again = ["demo", "--out", str(out), "--seed", str(seed), "--resume"]
    with guarded(debug=debug, again=again):
        import importlib.resources

        from wgates_plugin.recipe import load_recipe

        check_out_folders(out=out)
        source = importlib.resources.files("wgates_plugin") / "recipe" / "demo.yaml"
        with importlib.resources.as_file(source) as path:
            recipe = load_recipe(path)
        recipe = recipe.model_copy(update={"run_folder": out, "seed": seed})
        held = carry_out(recipe, resume=resume)
    raise typer.Exit(0 if held else MISSED)
