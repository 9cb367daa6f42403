"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wgates_plugin.cli.runtimes import NAMES
from wgates_plugin.cli.subject import DEFAULT_SHAPE

RUNTIME_HELP = f"What executes the network: {', '.join(NAMES)}"

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
Classes = Annotated[int, typer.Option(min=1, help="Number of classes of the network.")]
Weights = Annotated[Path | None, typer.Option(help="A .safetensors file or a plain state dict.")]
Model = Annotated[
    str,
    typer.Argument(
        help="A built-in or torchvision name, timm:NAME or package.module:factory, the current "
        "folder included."
    ),
]
