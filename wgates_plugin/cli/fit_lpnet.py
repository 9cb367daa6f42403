"""`wgates fit-lpnet`: sample a network's sub-networks on a runtime and learn their latency."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wgates_plugin.cli.app import app, guarded, log_shown, progress_console
from wgates_plugin.cli.fit_warnings import fit_warnings
from wgates_plugin.cli.options import (
    RUNTIME_HELP,
    Classes,
    Debug,
    Device,
    Model,
    Precision,
    RuntimeOptions,
    Shape,
    Threads,
    Weights,
    path_option,
)
from wgates_plugin.cli.paths import check_files_apart, check_out_files, check_out_folders
from wgates_plugin.cli.runtimes import DEFAULT, asked_runtimes
from wgates_plugin.cli.subject import Subject
from wgates_plugin.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from wgates_plugin.channels import ChannelSpace
    from wgates_plugin.efficiency.lpnet import LPNet
    from wgates_plugin.efficiency.samples.file import SampleFile
    from wgates_plugin.efficiency.sampling import SamplingCost
    from wgates_plugin.latency_study import LatencyStudy

SAMPLES, SAMPLES_WITH_PRIOR = 100, 30


@app.command("fit-lpnet")
def fit_lpnet(
    model: Model,
    out: Annotated[Path, path_option("Where LPNet is written.")] = Path("lpnet.safetensors"),
    samples: Annotated[
        int | None,
        typer.Option(min=8, help="Sub-networks to measure.", show_default="100; with --prior 30"),
    ] = None,
    samples_file: Annotated[
        Path | None,
        path_option("Kept measurements.", show_default="beside the output"),
    ] = None,
    structure: Annotated[
        str, typer.Option(help="layers, or mlp for the paper's plain form.")
    ] = "layers",
    prior: Annotated[
        Path | None,
        path_option("An LPNet of this network on another runtime or thread count."),
    ] = None,
    active: Annotated[
        bool | None,
        typer.Option(
            "--active/--no-active", help="Measure where LPNet is least sure.", show_default="active"
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            help="Processes that measure; more than one through Ray.",
        ),
    ] = 1,
    profile: Annotated[
        bool, typer.Option("--profile/--no-profile", help="Take the layers' own times too.")
    ] = True,
    report: Annotated[Path | None, path_option("Folder for a page about the fit.")] = None,
    runtime: Annotated[str, typer.Option(help=f"{RUNTIME_HELP}.")] = DEFAULT,
    threads: Threads = 1,
    device: Device = "cpu",
    precision: Precision = "float32",
    runtime_options: RuntimeOptions = None,
    input_shape: Shape = None,
    classes: Classes = None,
    weights: Weights = None,
    grid: Annotated[
        int | None,
        typer.Option(
            min=1, help="Channel multiple.", show_default="that of kept samples, else probed"
        ),
    ] = None,
    min_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Least share of a group's channels.")
    ] = 0.05,
    seconds: Annotated[float, typer.Option(min=0.01, help="Timed inference per sample, s.")] = 0.4,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    debug: Debug = False,
) -> None:
    """Measure sub-networks and fit LPNet; measured ones are kept and not measured again."""
    kept = samples_file or out.parent / f"{out.stem}.samples.jsonl"
    count = samples or (SAMPLES_WITH_PRIOR if prior else SAMPLES)
    options_given = {
        "--out": out,
        "--samples": count,
        "--samples-file": kept,
        "--structure": structure,
        "--prior": prior,
        "--workers": workers,
        "--report": report,
        "--runtime": runtime,
        "--threads": threads,
        "--device": device,
        "--precision": precision,
        "--input-shape": input_shape,
        "--classes": classes,
        "--weights": weights,
        "--grid": grid,
        "--min-fraction": min_fraction,
        "--seconds": seconds,
        "--seed": seed,
    }
    again = ["fit-lpnet", model, *_words(options_given)]
    again += [] if active is None else ["--active" if active else "--no-active"]
    again += [] if profile else ["--no-profile"]
    again += [word for item in runtime_options or [] for word in ("--runtime-option", item)]
    with guarded(debug=debug, again=again):
        _check_structure(structure, active)
        check_out_files(out=out, samples_file=kept)
        check_out_folders(report=report)
        options = asked_runtimes([runtime], runtime_options)[runtime]
        from rich.console import Console

        from wgates_plugin.cli.live_samples import LiveSamples
        from wgates_plugin.efficiency.learner import Learner
        from wgates_plugin.efficiency.lpnet import LPNet, check_choice
        from wgates_plugin.efficiency.lpnet.file import lpnet_file
        from wgates_plugin.efficiency.sampling import check_space, different_widths, mixed_grids
        from wgates_plugin.latency_study import LatencyStudy
        from wgates_plugin.targets import LatencyTarget
        from wgates_plugin.tracing import trace

        prior_file = lpnet_file(prior) if prior else None
        check_files_apart(weights=weights, prior=prior_file, samples_file=kept, out=out)
        console = progress_console()
        subject = Subject(model, input_shape, classes, weights)
        target = LatencyTarget(
            fraction=1.0,
            runtime=runtime,
            threads=threads,
            device=device,
            precision=precision,
            options=options,
        )
        with console.status(f"tracing {model}"):
            network, example = subject.network, subject.example
            space = trace(network, example, min_fraction=min_fraction)
            before = LPNet.load(prior, space=space) if prior else None
            study = LatencyStudy(network, space, example, target)
            check_choice(space, structure, before, study.identity)
            farm = study.farm(workers)
            if grid is not None:
                check_space(space, count, grid)
        with log_shown():
            file = study.open_samples(kept)
        if study.reference_ms is None:
            console.print(f"measuring the untouched {model}", markup=False)
            study.baseline(max(2.0, 4 * seconds))
        if grid is None and (grid := _grid_of(file, space)) is None:
            console.print("probing the channel grid")
            grid = int(study.probe()["grid"])
            again += ["--grid", str(grid)]
            check_space(space, count, grid)
        start = len(file)
        mixed = mixed_grids(space, file.widths, grid) if file.distinct < count else []
        wanted = structure == "layers" and active is not False
        learner = Learner(space, seed=seed, prior=before) if wanted else None
        live = LiveSamples(file, space, count, console=console, learner=learner)
        with live as shown, log_shown():  # so that log lines go above the live table
            cost = study.sample(
                count=count,
                grid=grid,
                seed=seed,
                seconds_per_sample=seconds,
                active=learner.active() if learner else None,
                profile=profile,
                farm=farm,
                on_sample=shown,
                retime=True,
            )
        with log_shown(), console.status("fitting LPNet"):
            lpnet = study.fit(seed=seed, structure=structure, prior=before)
            lpnet.save(out)
        measured = len(file) - start
        Console().print(_table(model, study, lpnet, cost if measured else None))
        typer.echo(
            f"{len(file)} sub-networks{_on_grid(space, file)} ({measured} measured now); "
            f"untouched network {study.reference_ms:.4g} ms\nLPNet:   {out}\nsamples: {kept}"
        )
        if report is not None:
            from wgates_plugin.report.lpnet_page import write_lpnet_report

            with console.status("drawing"):
                page = write_lpnet_report(
                    report, lpnet, file, name=model, identity=study.identity, cost=cost
                )
            typer.echo(f"page:    {page}")
        there = different_widths(space, grid)
        for warning in [*mixed, *shown.warnings(), *fit_warnings(lpnet, there=there, grid=grid)]:
            console.print(f"Warning: {warning}", style="yellow", markup=False, soft_wrap=True)


def _words(options: dict[str, Any]) -> list[str]:
    """The command line of these; None is left out."""
    words: list[str] = []
    for name, value in options.items():
        if value is not None:
            words += [name, str(value)]
    return words


def _grid_of(file: SampleFile, space: ChannelSpace) -> int | None:
    """The grid of kept samples, where they are enough to tell it."""
    from wgates_plugin.efficiency.lpnet import LEAST_SAMPLES
    from wgates_plugin.efficiency.lpnet.data import grid_of

    return grid_of(space, file.widths) if file.distinct >= LEAST_SAMPLES else None


def _check_structure(structure: str, active: bool | None) -> None:
    if structure == "mlp" and active:
        raise ConfigError(
            "--active",
            ["structure `mlp` does not know how sure it is; leave one of the two out"],
        )


def _share(value: float | None) -> str:
    return "none: needs 9 samples" if value is None else f"{value:.1%}"


def _on_grid(space: ChannelSpace, file: SampleFile) -> str:
    """The grid that the samples are on, whatever was asked for now."""
    from wgates_plugin.efficiency.lpnet.data import grid_of

    multiple = grid_of(space, file.widths)
    return "" if multiple is None else f" on multiples of {multiple} channels"


def _table(model: str, study: LatencyStudy, lpnet: LPNet, cost: SamplingCost | None) -> Table:
    from rich.table import Table
    from rich.text import Text

    found = lpnet.report
    assert found is not None
    assert study.samples is not None
    aside = sum(study.samples.set_aside().values())
    facts: dict[str, Any] = {
        f"held-out error, mean of {found.held_out}": f"{found.mape:.1%}",
        "within 10 %": f"{found.within_10_percent:.0%}",
        "worst": f"{found.worst:.1%}",
        "90 % interval, half width, median": _share(found.half_width_90),
        "the widest": _share(found.widest_90),
        "samples set aside (another environment)": aside,
        "measured again (not trusted)": len(study.samples.rejected),
        "time inside timed inference": "-" if cost is None else f"{cost.share_in_inference:.0%}",
    }
    identity = study.identity
    where = identity["library_version"] or f"({identity['device_name']})"
    title = f"LPNet of {model} on {identity['runtime']} {where}"
    table = Table(title=Text(title, style="bold"), show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table
