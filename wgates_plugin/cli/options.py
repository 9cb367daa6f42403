"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from wgates_plugin.cli.runtimes import NAMES
from wgates_plugin.cli.subject import DEFAULT_CLASSES, DEFAULT_SHAPE

RUNTIME_HELP = f"What executes the network: {', '.join(NAMES)}"


def _home(words: str) -> Path:
    """A shell leaves `~` as it is behind `--out=`."""
    from wgates_plugin.files import from_home

    try:
        return from_home(words)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def path_option(help: str, **more: Any) -> Any:
    """`typer.Option` of a path that may begin with `~`."""
    return typer.Option(help=help, parser=_home, metavar="PATH", **more)


def path_argument(help: str, *, metavar: str) -> Any:
    """`typer.Argument` of a path that may begin with `~`."""
    return typer.Argument(help=help, parser=_home, metavar=metavar)


Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads within one operator.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda where the runtime knows it.")]
Precision = Annotated[str, typer.Option(help="Number format the runtime computes in.")]
RuntimeOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--runtime-option",
        metavar="KEY=VALUE",
        help="An option of the runtime, its value as JSON: channels_last=true",
    ),
]
Shape = Annotated[
    str | None,
    typer.Option(
        help="Shape of one input, batch first; an exported file carries its own.",
        show_default=DEFAULT_SHAPE,
    ),
]
Classes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of classes of the network; an exported file has its own.",
        show_default=str(DEFAULT_CLASSES),
    ),
]
Weights = Annotated[Path | None, path_option("A .safetensors file or a plain state dict.")]
Model = Annotated[
    str,
    typer.Argument(
        help="A built-in or torchvision name, timm:NAME or package.module:factory, the current "
        "folder included."
    ),
]
