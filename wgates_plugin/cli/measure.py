"""`wgates measure`: one network on one or several runtimes."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wgates_plugin.cli.app import BAD_INPUT, app, guarded, progress_console, show_error
from wgates_plugin.cli.options import (
    Classes,
    Debug,
    Device,
    Precision,
    RuntimeOptions,
    Shape,
    Threads,
    Weights,
)
from wgates_plugin.cli.subject import Subject, options_for, parsed_options
from wgates_plugin.errors import WGatesError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from wgates_plugin.latency import GridProbe, Measurement
    from wgates_plugin.latency.base import BaseRuntime


@dataclass
class Row:
    """What is known of one runtime so far. `state` says what it is doing until it is done."""

    runtime: str
    state: str = "waiting"
    found: Measurement | None = None
    load_seconds: float | None = None
    compile_seconds: float | None = None
    grid: GridProbe | None = None
    error: WGatesError | None = None

    @property
    def drift(self) -> float:
        """The later half of the rounds over the earlier one, less 1."""
        assert self.found is not None
        samples = self.found.samples_ms
        half = max(1, len(samples) // 2)
        return statistics.median(samples[-half:]) / statistics.median(samples[:half]) - 1.0

    @property
    def per_second(self) -> float:
        """Inputs per second, one inference after the other."""
        assert self.found is not None
        return 1e3 * float(self.found.identity["batch"]) / self.found.latency_ms

    def cells(self) -> list[str]:
        if self.found is None:
            return [self.runtime, self.state, *[""] * 6]
        identity = self.found.identity
        compiled = self.compile_seconds
        return [
            self.runtime,
            f"{self.found.latency_ms:.4g}",
            f"{self.found.minimum_ms:.4g}",
            f"{100 * self.found.ratio_spread:.1f} %",
            f"{100 * self.drift:+.1f} %",
            f"{self.per_second:.4g}",
            "-" if compiled is None else f"{compiled:.1f}",
            f"{identity['library']} {identity['library_version']}",
        ]

    def to_json(self) -> dict[str, Any]:
        if self.found is None:
            return {"runtime": self.runtime, "error": str(self.error or self.state)}
        grid = self.grid and {"multiple": self.grid.grid, "evidence": list(self.grid.evidence)}
        return {
            "runtime": self.runtime,
            "measurement": self.found.to_json(),
            "drift_within": self.drift,
            "per_second": self.per_second,
            "load_seconds": self.load_seconds,
            "compile_seconds": self.compile_seconds,
            "grid": grid,
        }


@dataclass
class Board:
    """The table while it fills: redrawn on a terminal when something happened, lines elsewhere.

    Never drawn from a thread of its own, which would disturb inferences that are being timed.
    """

    title: str
    rows: list[Row]
    console: Console
    _live: Any = field(default=None, init=False)

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            from rich.live import Live

            self._live = Live(
                table(self.title, self.rows),
                console=self.console,
                auto_refresh=False,
                transient=True,
            )
            self._live.start(refresh=True)
        return self

    def says(self, row: Row, state: str) -> None:
        row.state = state
        if self._live is not None:
            self._live.update(table(self.title, self.rows), refresh=True)
        else:
            self.console.print(f"{row.runtime}: {state}", markup=False, soft_wrap=True)

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()


def table(title: str, rows: list[Row]) -> Table:
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(title, style="bold"))
    made.add_column("runtime", no_wrap=True)
    for name in ("ms", "least", "spread", "drift", "per s", "compile s"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("library", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row.cells()))
    return made


@app.command()
def measure(
    model: Annotated[
        str, typer.Argument(help="A network's name, or an exported file such as model.onnx.")
    ],
    runtimes: Annotated[
        list[str] | None,
        typer.Option("--runtime", help="What executes the network; may be repeated. [onnxruntime]"),
    ] = None,
    threads: Threads = 1,
    device: Device = "cpu",
    precision: Precision = "float32",
    runtime_options: RuntimeOptions = None,
    input_shape: Shape = "1,3,224,224",
    classes: Classes = 1000,
    weights: Weights = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Timed inference each, s.")] = 3.0,
    grid: Annotated[bool, typer.Option("--grid", help="Also probe the channel grid.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the measurements as JSON.")] = None,
    debug: Debug = False,
) -> None:
    """Latency of a network on one or several runtimes, with its spread."""
    names = list(dict.fromkeys(runtimes or ["onnxruntime"]))
    with guarded(debug=debug, again=[]):
        from rich.console import Console

        from wgates_plugin.files import write_json
        from wgates_plugin.latency import RUNTIMES, RuntimeSettings, get_runtime

        subject = Subject(model, input_shape, classes, weights)
        options = parsed_options(runtime_options)
        settings = RuntimeSettings(threads=threads, device=device, precision=precision)
        if not subject.is_file:
            _ = subject.network  # what is wrong with it is wrong on every runtime
        rows = [Row(name) for name in names]
        with Board(model, rows, progress_console()) as board:
            for row in rows:
                try:
                    own = options_for(row.runtime, options, list(RUNTIMES))
                    runtime = get_runtime(row.runtime, settings, **own)
                    _measure(board, row, subject, runtime, seconds=seconds, grid=grid)
                except WGatesError as error:
                    if len(rows) == 1:
                        raise
                    row.error = error
                    board.says(row, "failed")
        Console().print(table(model, rows))
        for row in rows:
            if row.grid is not None:
                _print_grid(row.runtime, row.grid)
        typer.echo(
            f"one inference of {input_shape} on {device}, threads: {threads}, {precision}; ms: "
            "median; spread: half the interquartile range; drift: later half of the rounds over "
            "the earlier"
        )
        if out is not None:
            write_json(
                out,
                {
                    "kind": "wgates-measurements",
                    "version": 1,
                    "model": model,
                    "input_shape": list(subject.example.shape),
                    "results": [row.to_json() for row in rows],
                },
            )
            typer.echo(f"figures: {out}")
        failed = [row for row in rows if row.error is not None]
        for row in failed:
            assert row.error is not None
            show_error(row.error)
        if failed:
            raise typer.Exit(BAD_INPUT)


def _measure(
    board: Board, row: Row, subject: Subject, runtime: BaseRuntime, *, seconds: float, grid: bool
) -> None:
    from wgates_plugin.latency import measure as time_it
    from wgates_plugin.latency import probe_grid

    board.says(row, "loading")
    started = time.perf_counter()
    session = subject.session(runtime)
    row.load_seconds = time.perf_counter() - started
    row.compile_seconds = getattr(session, "compile_seconds", None)
    with session:
        board.says(row, f"measuring {seconds:g} s")
        found = time_it(session, seconds=seconds, identity=runtime.identity(subject.example))
    if grid:
        board.says(row, "probing the grid")
        row.grid = probe_grid(runtime)
    row.found = found
    board.says(row, f"{found.latency_ms:.4g} ms")


def _print_grid(runtime: str, probe: GridProbe) -> None:
    typer.echo(f"{runtime}: channel grid, multiples of {probe.grid}")
    for width, milliseconds in probe.evidence:
        typer.echo(f"  {width:4d} channels  {milliseconds:.4f} ms")
