"""What all commands share: the application, its exit codes, and how errors and logs are shown."""

from __future__ import annotations

import io
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from wgates_plugin.errors import WGatesError

if TYPE_CHECKING:
    from rich.console import Console

BAD_INPUT, MISSED, INTERRUPTED = 2, 1, 130

app = typer.Typer(
    help="Make trained CNNs fast: channel pruning to a measured latency target.",
    epilog="Exit codes: 0 done, 1 done but the target was missed, 2 an error, 130 stopped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def progress_console() -> Console:
    """Where progress and messages go: standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def show_error(error: BaseException) -> None:
    progress_console().print(f"Error: {error}", style="red", markup=False, soft_wrap=True)


@contextmanager
def guarded(*, debug: bool, again: list[str]) -> Iterator[None]:
    """Errors become a message and exit code 2, a traceback too where they are not of this package;
    Ctrl-C says how to go on.

    `again` is the command that goes on with the work; it may be completed within the block.
    Factories and modules of the current folder can be imported within.
    """
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    for stream in (sys.stdout, sys.stderr):  # no locale's encoding ends a finished run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except WGatesError as error:
        if debug:
            traceback.print_exc()
        else:
            show_error(error)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        message = "Stopped."
        if again:
            message += f" What is finished is kept; go on with:\n  wgates {shlex.join(again)}"
        progress_console().print(message, markup=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:  # exit code 1 would say that a target was missed
        traceback.print_exc()
        show_error(RuntimeError(f"not foreseen ({type(error).__name__}: {error})"))
        raise typer.Exit(BAD_INPUT) from error


@contextmanager
def log_shown() -> Iterator[None]:
    """Lines of the package's logger on standard error, for the length of the block."""
    logger, handler = logging.getLogger("wgates_plugin"), logging.StreamHandler()
    handler.setFormatter(_Plain())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class _Plain(logging.Formatter):
    """The message alone; a warning says that it is one."""

    def format(self, record: logging.LogRecord) -> str:
        words = super().format(record)
        return f"Warning: {words}" if record.levelno >= logging.WARNING else words
