"""`wgates report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from wgates_plugin.cli.app import app, guarded, progress_console
from wgates_plugin.cli.options import Debug, path_argument
from wgates_plugin.cli.running import print_summary


@app.command()
def report(
    run_folder: Annotated[Path, path_argument("Folder of a finished run.", metavar="RUN_FOLDER")],
    debug: Debug = False,
) -> None:
    """Make a finished run's page again and print its table."""
    with guarded(debug=debug, again=[]):
        from wgates_plugin.report import load_report, write_report

        with progress_console().status("drawing"):
            write_report(run_folder)
        found = sorted([*run_folder.glob("model.*"), *run_folder.glob("pruned.safetensors")])
        print_summary(load_report(run_folder), run_folder, found[0] if found else None)
