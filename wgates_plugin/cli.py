"""The command line. Libraries that take long to import are imported inside the commands."""

from __future__ import annotations

import logging
import shlex
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wgates_plugin.errors import ConfigError, WGatesError

if TYPE_CHECKING:
    from rich.console import Console

    from wgates_plugin.recipe import Recipe

BAD_INPUT, MISSED, INTERRUPTED = 2, 1, 130

app = typer.Typer(
    help="Make trained CNNs fast: channel pruning to a measured latency target.",
    epilog="Exit codes: 0 done, 1 done but the target was missed, 2 an error, 130 stopped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")]
Runtime = Annotated[str, typer.Option(help="What executes the network.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads within one operator.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda where the runtime knows it.")]
Shape = Annotated[str, typer.Option(help="Shape of one input, batch first.")]
Classes = Annotated[int, typer.Option(min=1, help="Number of classes of the network.")]
Weights = Annotated[Path | None, typer.Option(help="A .safetensors file or a plain state dict.")]
Model = Annotated[
    str,
    typer.Argument(help="A built-in or torchvision name, timm:NAME or package.module:factory."),
]


def _console() -> Console:
    """Where progress and messages go: standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@contextmanager
def _guarded(*, debug: bool, again: list[str]) -> Iterator[None]:
    """Errors of this package become one message and exit code 2; Ctrl-C says how to go on.

    `again` is the command that goes on with the work; it may be completed within the block.
    """
    try:
        yield
    except WGatesError as error:
        if debug:
            traceback.print_exc()
        else:
            _console().print(f"Error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        message = "Stopped."
        if again:
            message += f" What is finished is kept; go on with:\n  wgates {shlex.join(again)}"
        _console().print(message, markup=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _log_shown() -> Iterator[None]:
    """Lines of the package's logger on standard error, for the length of the block."""
    logger, handler = logging.getLogger("wgates_plugin"), logging.StreamHandler()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("wgates-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 0,
    resume: Resume = False,
    debug: Debug = False,
) -> None:
    """Train a small network on handwritten digits and make it twice as fast."""
    again = ["demo", "--out", str(out), "--seed", str(seed), "--resume"]
    with _guarded(debug=debug, again=again):
        import importlib.resources

        from wgates_plugin.recipe import load_recipe

        source = importlib.resources.files("wgates_plugin") / "recipes" / "demo.yaml"
        with importlib.resources.as_file(source) as path:
            recipe = load_recipe(path)
        recipe = recipe.model_copy(update={"run_folder": out, "seed": seed})
        held = _run(recipe, resume=resume)
    raise typer.Exit(0 if held else MISSED)


@app.command()
def prune(
    recipe: Annotated[Path, typer.Argument(help="A YAML or JSON file.", metavar="RECIPE")],
    resume: Resume = False,
    out: Annotated[Path | None, typer.Option(help="Run folder; overrides the recipe's.")] = None,
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
    with _guarded(debug=debug, again=[*again, "--resume"]):
        from wgates_plugin.recipe import load_recipe

        job = load_recipe(recipe, overrides=overrides or [])
        if out is not None:
            job = job.model_copy(update={"run_folder": out})
        held = _run(job, resume=resume)
    raise typer.Exit(0 if held else MISSED)


def _run(recipe: Recipe, *, resume: bool) -> bool:
    from wgates_plugin.recipe import run_recipe

    with _log_shown():
        result = run_recipe(recipe, resume=resume)
    _print_summary(result.report, result.run_folder, result.artefact)
    return result.held


def _print_summary(report: dict[str, Any], folder: Path, artefact: Path | None) -> None:
    from rich.console import Console

    from wgates_plugin.report import headline, summary_table

    Console().print(summary_table(report))
    typer.echo(headline(report))
    paths = {"page": folder / "report.html", "figures": folder / "report.json"}
    if artefact is not None:
        paths["network"] = artefact
    for what, path in paths.items():
        typer.echo(f"{what + ':':9}{path}")


@app.command()
def measure(
    model: Annotated[
        str, typer.Argument(help="A network's name, or an exported file such as model.onnx.")
    ],
    runtime: Runtime = "onnxruntime",
    threads: Threads = 1,
    device: Device = "cpu",
    input_shape: Shape = "1,3,224,224",
    classes: Classes = 1000,
    weights: Weights = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Timed inference, s.")] = 3.0,
    grid: Annotated[bool, typer.Option("--grid", help="Also probe the channel grid.")] = False,
    debug: Debug = False,
) -> None:
    """Latency of a network, with its spread."""
    with _guarded(debug=debug, again=[]):
        import torch

        from wgates_plugin.latency import RuntimeSettings, get_runtime, probe_grid
        from wgates_plugin.latency import measure as time_it

        console = _console()
        found = get_runtime(runtime, RuntimeSettings(threads=threads, device=device))
        example = torch.zeros(_shape(input_shape))
        with console.status(f"loading {model}"):
            if Path(model).is_file():
                session = found.load_file(model, example)
            else:
                session = found.load(_network(model, example, classes, weights), example)
        with session, console.status(f"measuring {model} for {seconds:g} s"):
            result = time_it(session, seconds=seconds, identity=found.identity(example))
        _print_measurement(model, result)
        if grid:
            with console.status("probing the channel grid"):
                probe = probe_grid(found)
            typer.echo(f"channel grid: multiples of {probe.grid}")
            for width, milliseconds in probe.evidence:
                typer.echo(f"  {width:4d} channels  {milliseconds:.4f} ms")


def _print_measurement(model: str, result: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    identity = result.identity
    table = Table(title=Text(model, style="bold"), show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for name, value in (
        ("latency", f"{result.latency_ms:.4g} ms"),
        ("spread (half the interquartile range)", f"{100 * result.ratio_spread:.1f} %"),
        ("least", f"{result.minimum_ms:.4g} ms"),
        ("rounds", str(result.rounds)),
        ("runtime", f"{identity['library']} {identity['library_version']}"),
        ("device", f"{identity['device_name']}, threads: {identity['threads']}"),
    ):
        table.add_row(name, Text(value))
    Console().print(table)


@app.command("fit-lpnet")
def fit_lpnet(
    model: Model,
    out: Annotated[Path, typer.Option(help="Where LPNet is written.")] = Path("lpnet.safetensors"),
    samples: Annotated[int, typer.Option(min=8, help="Sub-networks to measure.")] = 100,
    samples_file: Annotated[
        Path | None, typer.Option(help="Kept measurements; by default beside the output.")
    ] = None,
    runtime: Runtime = "onnxruntime",
    threads: Threads = 1,
    device: Device = "cpu",
    input_shape: Shape = "1,3,224,224",
    classes: Classes = 1000,
    weights: Weights = None,
    grid: Annotated[
        int | None, typer.Option(min=1, help="Channel multiple; probed if left out.")
    ] = None,
    min_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Least share of a group's channels.")
    ] = 0.05,
    seconds: Annotated[float, typer.Option(min=0.01, help="Timed inference per sample, s.")] = 0.4,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    debug: Debug = False,
) -> None:
    """Measure random sub-networks and fit LPNet; measured ones are kept and not measured again."""
    kept = samples_file or out.with_name(out.stem + ".samples.jsonl")
    given = {
        "--out": out,
        "--samples": samples,
        "--samples-file": kept,
        "--runtime": runtime,
        "--threads": threads,
        "--device": device,
        "--input-shape": input_shape,
        "--classes": classes,
        "--weights": weights,
        "--grid": grid,
        "--min-fraction": min_fraction,
        "--seconds": seconds,
        "--seed": seed,
    }
    again = ["fit-lpnet", model]
    for name, value in given.items():
        again += [] if value is None else [name, str(value)]
    with _guarded(debug=debug, again=again):
        import torch

        from wgates_plugin.efficiency.lpnet import LPNet
        from wgates_plugin.efficiency.sampling import SampleFile
        from wgates_plugin.latency_study import LatencyStudy
        from wgates_plugin.targets import LatencyTarget
        from wgates_plugin.tracing import trace
        from wgates_plugin.training.progress import Bar

        console = _console()
        example = torch.randn(_shape(input_shape), generator=torch.Generator().manual_seed(0))
        target = LatencyTarget(fraction=1.0, runtime=runtime, threads=threads, device=device)
        with console.status(f"tracing {model}"):
            network = _network(model, example, classes, weights)
            space = trace(network, example, min_fraction=min_fraction)
            study = LatencyStudy(network, space, example, target)
        if kept.exists():
            study.samples = SampleFile.open(kept, space, study.identity, 1.0)
        else:
            with console.status(f"measuring the untouched {model}"):
                calibrated = study.baseline(max(2.0, 4 * seconds)).latency_ms
            study.samples = SampleFile.open(kept, space, study.identity, calibrated)
        if grid is None:
            with console.status("probing the channel grid"):
                grid = int(study.probe()["grid"])
            again += ["--grid", str(grid)]
        start = len(study.samples)
        with Bar("measuring sub-networks", max(samples - start, 0)) as bar:
            study.sample(
                count=samples,
                grid=grid,
                seed=seed,
                seconds_per_sample=seconds,
                on_sample=lambda _, found: bar.advance(f"{found.latency_ms:.3g} ms"),
            )
        with console.status("fitting LPNet"):
            file = study.samples
            lpnet = LPNet.fit(space, file.widths, file.latencies_ms, seed=seed)
            lpnet.save(out)
        report = lpnet.report
        assert report is not None
        typer.echo(
            f"{report.samples} sub-networks on a grid of {grid} ({len(file) - start} measured now); "
            f"untouched network {file.header['reference_ms']:.4g} ms\n"
            f"held-out error on {report.held_out}: mean {100 * report.mape:.1f} %, worst "
            f"{100 * report.worst:.1f} %, within 10 %: {100 * report.within_10_percent:.0f} %\n"
            f"LPNet:   {out}\nsamples: {kept}"
        )


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    debug: Debug = False,
) -> None:
    """Make a finished run's page again and print its table."""
    with _guarded(debug=debug, again=[]):
        from wgates_plugin.report import load_report, write_report

        with _console().status("drawing"):
            write_report(run_folder)
        found = sorted([*run_folder.glob("model.*"), *run_folder.glob("pruned.safetensors")])
        _print_summary(load_report(run_folder), run_folder, found[0] if found else None)


def _shape(text: str) -> tuple[int, ...]:
    """ "1,3,224,224" as numbers.

    Raises:
        ConfigError: it is something else.
    """
    try:
        sides = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        sides = ()
    if len(sides) < 2 or min(sides) < 1:
        raise ConfigError("--input-shape", [f"got {text!r}, needs a form like 1,3,224,224"])
    return sides


def _network(name: str, example: Any, classes: int, weights: Path | None) -> Any:
    from wgates_plugin.catalogue import load_model

    channels = int(example.shape[1])
    return load_model(name, classes=classes, in_channels=channels, weights=weights)
