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
    RUNTIME_HELP,
    Classes,
    Debug,
    Device,
    Precision,
    RuntimeOptions,
    Shape,
    Threads,
    Weights,
    path_option,
)
from wgates_plugin.cli.paths import check_files_apart, check_out_files
from wgates_plugin.cli.runtimes import DEFAULT, asked_runtimes
from wgates_plugin.cli.subject import Subject
from wgates_plugin.errors import MeasurementError, WGatesError, first_line

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
    reported_library: str | None = None

    @property
    def drift(self) -> float:
        """The later half of the rounds over the earlier one, less 1."""
        assert self.found is not None
        samples = self.found.samples_ms
        half = max(1, len(samples) // 2)
        return statistics.median(samples[-half:]) / statistics.median(samples[:half]) - 1.0

    @property
    def per_second(self) -> float:
        """Inputs per second over all timed inferences, one after the other."""
        assert self.found is not None
        assert self.found.inferences is not None
        batch = float(self.found.identity["batch"])
        return batch * self.found.inferences / self.found.inference_seconds

    @property
    def disturbed(self) -> float:
        """Share of the inferences from which the processor was taken away."""
        from wgates_plugin.efficiency.bench import disturbed_share

        assert self.found is not None
        return min(1.0, disturbed_share(self.found))

    @property
    def much_disturbed(self) -> bool:
        """Whether the figure needs a mark."""
        from wgates_plugin.efficiency.bench import MUCH_DISTURBED

        return self.disturbed > MUCH_DISTURBED

    @property
    def library(self) -> str:
        """What ran the network, with its version; "-" where only a device knows."""
        assert self.found is not None
        identity = self.found.identity
        if identity["library"] is None:
            return self.reported_library or "-"
        return f"{identity['library']} {identity['library_version']}"

    @property
    def elsewhere(self) -> str | None:
        """Name of the device where it is another machine's."""
        if self.found is None or self.found.identity["library"] is not None:
            return None
        return str(self.found.identity["device_name"])

    def cells(self) -> list[str]:
        if self.found is None:
            return [self.runtime, self.state, *[""] * 5]
        compiled = self.compile_seconds
        mark = "!" if self.much_disturbed else ""
        return [
            self.runtime,
            f"{self.found.latency_ms:.4g}",
            f"{100 * self.found.ratio_spread:.1f} %",
            f"{100 * self.drift:+.1f} %",
            "-" if self.elsewhere else f"{mark}{self.disturbed:.0%}",
            f"{self.per_second:.4g}",
            "-" if compiled is None else f"{compiled:.1f}",
        ]

    def to_json(self) -> dict[str, Any]:
        if self.found is None:
            return {"runtime": self.runtime, "error": str(self.error or self.state)}
        grid = self.grid and {"multiple": self.grid.grid, "evidence": list(self.grid.evidence)}
        return {
            "runtime": self.runtime,
            **({} if self.error is None else {"error": str(self.error)}),
            "measurement": self.found.to_json(),
            "drift_within": self.drift,
            "disturbed_share": self.disturbed,
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
    compiled = ["compile s"] if any(row.compile_seconds is not None for row in rows) else []
    for name in ("ms", "spread", "drift", "disturbed", "per s", *compiled):
        made.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        made.add_row(*(Text(cell) for cell in row.cells()[: len(made.columns)]))
    return made


@app.command()
def measure(
    model: Annotated[
        str, typer.Argument(help="A network's name, or an exported file such as model.onnx.")
    ],
    runtimes: Annotated[
        list[str] | None,
        typer.Option("--runtime", help=f"{RUNTIME_HELP}; may be repeated.", show_default=DEFAULT),
    ] = None,
    threads: Threads = 1,
    device: Device = "cpu",
    precision: Precision = "float32",
    runtime_options: RuntimeOptions = None,
    input_shape: Shape = None,
    classes: Classes = None,
    weights: Weights = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Timed inference each, s.")] = 3.0,
    grid: Annotated[bool, typer.Option("--grid", help="Also probe the channel grid.")] = False,
    out: Annotated[Path | None, path_option("Write the measurements as JSON.")] = None,
    debug: Debug = False,
) -> None:
    """Latency of a network on one or several runtimes, with its spread."""
    with guarded(debug=debug, again=[]):
        from wgates_plugin.files import write_json
        from wgates_plugin.latency import RuntimeSettings, get_runtime

        # What is wrong with these is wrong on every runtime, and known before anything is timed.
        check_out_files(out=out)
        check_files_apart(weights=weights, out=out)
        options = asked_runtimes(runtimes or [DEFAULT], runtime_options)
        settings = RuntimeSettings(threads=threads, device=device, precision=precision)
        subject = Subject(model, input_shape, classes, weights)
        _ = subject.example if subject.is_file else subject.network
        rows = [Row(name) for name in options]
        with Board(model, rows, progress_console()) as board:
            for row in rows:
                try:
                    runtime = get_runtime(row.runtime, settings, **options[row.runtime])
                    _measure(board, row, subject, runtime, seconds=seconds, grid=grid)
                except Exception as error:
                    if len(rows) == 1 and row.found is None:
                        raise
                    row.error = _told(error, row.runtime)
                    board.says(row, "failed")
        _say(model, subject, rows, f"threads: {threads}, {precision}", device)
        if out is not None:
            write_json(
                out,
                {
                    "kind": "wgates-measurements",
                    "version": 2,
                    "model": model,
                    "inputs": {name: list(shape) for name, shape in subject.shapes.items()},
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
        row.reported_library = getattr(session, "reported_library", None)
    row.found = found
    if grid:
        board.says(row, "probing the grid")
        row.grid = probe_grid(runtime)
    board.says(row, f"{found.latency_ms:.4g} ms")


def _told(error: Exception, runtime: str) -> WGatesError:
    """What a runtime's own library raises, in words of this package."""
    if isinstance(error, WGatesError):
        return error
    return MeasurementError(
        f"runtime `{runtime}`: failed ({type(error).__name__}: {first_line(error)})"
    )


def _say(model: str, subject: Subject, rows: list[Row], how: str, device: str) -> None:
    """The table of what was measured, and what its columns mean."""
    from rich.console import Console

    done = [row for row in rows if row.found is not None]
    if not done:
        return
    Console().print(table(model, rows))
    for row in done:
        if row.grid is not None:
            _print_grid(row.runtime, row.grid)
    where = f"{subject.shape_words} on {', '.join(_devices(done, device))}"
    typer.echo(f"one inference of {where}, {how}")
    typer.echo("library: " + ", ".join(f"{row.runtime}: {row.library}" for row in done))
    typer.echo(
        "ms: least time of each round's block of inferences, median over the rounds; spread: half "
        "the interquartile range of these; drift: later half of the rounds over the earlier; "
        "disturbed: inferences from which the processor was taken away (on one thread they count "
        "with the time they had it, else they are taken again); per s: inputs per second over all "
        "timed inferences, the slower ones included"
    )
    if much := [row.runtime for row in done if row.much_disturbed]:
        typer.echo(
            f"!: the machine was busy ({', '.join(much)}): what neighbours do to caches and "
            "memory is in these figures; measure again when it is left alone"
        )


def _devices(rows: list[Row], device: str) -> list[str]:
    """Where the networks ran: the device asked for, or one that a program drove."""
    return list(dict.fromkeys(row.elsewhere or device for row in rows))


def _print_grid(runtime: str, probe: GridProbe) -> None:
    typer.echo(f"{runtime}: channel grid, multiples of {probe.grid}")
    for width, milliseconds in probe.evidence:
        typer.echo(f"  {width:4d} channels  {milliseconds:.4f} ms")
