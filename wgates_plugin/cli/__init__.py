"""The command line, one file per command. Libraries that take long to import wait until needed."""

from wgates_plugin.cli import demo, fit_lpnet, measure, prune, report
from wgates_plugin.cli.app import BAD_INPUT, INTERRUPTED, MISSED, app

__all__ = [
    "BAD_INPUT",
    "INTERRUPTED",
    "MISSED",
    "app",
    "demo",
    "fit_lpnet",
    "measure",
    "prune",
    "report",
]
