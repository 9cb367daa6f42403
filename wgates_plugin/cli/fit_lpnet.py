"""`wgates fit-lpnet`: sample a network's sub-networks on a runtime and learn their latency."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wgates_plugin.cli.app import app, guarded, log_shown, progress_console
from wgates_plugin.cli.options import (
    Classes,
    Debug,
    Device,
    Model,
    Precision,
    RuntimeOptions,
    Shape,
    Threads,
    Weights,
)
from wgates_plugin.cli.subject import Subject, parsed_options
from wgates_plugin.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from wgates_plugin.efficiency.lpnet import LPNet
    from wgates_plugin.efficiency.sampling import SamplingCost
    from wgates_plugin.latency_study import LatencyStudy

SAMPLES, SAMPLES_WITH_PRIOR = 100, 30


@app.command("fit-lpnet")
def fit_lpnet(
    model: Model,
    out: Annotated[Path, typer.Option(help="Where LPNet is written.")] = Path("lpnet.safetensors"),
    samples: Annotated[
        int | None, typer.Option(min=8, help="Sub-networks to measure. [100; with --prior 30]")
    ] = None,
    samples_file: Annotated[
        Path | None, typer.Option(help="Kept measurements; by default beside the output.")
    ] = None,
    structure: Annotated[
        str, typer.Option(help="layers, or mlp for the paper's plain form.")
    ] = "layers",
    prior: Annotated[
        Path | None,
        typer.Option(help="An LPNet of this network on another runtime or thread count."),
    ] = None,
    active: Annotated[
        bool | None,
        typer.Option("--active/--no-active", help="Measure where LPNet is least sure. [active]"),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that measure; more than one needs Ray.")
    ] = 1,
    profile: Annotated[
        bool, typer.Option("--profile/--no-profile", help="Take the layers' own times too.")
    ] = True,
    report: Annotated[Path | None, typer.Option(help="Folder for a page about the fit.")] = None,
    runtime: Annotated[str, typer.Option(help="What executes the network.")] = "onnxruntime",
    threads: Threads = 1,
    device: Device = "cpu",
    precision: Precision = "float32",
    runtime_options: RuntimeOptions = None,
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
    """Measure sub-networks and fit LPNet; measured ones are kept and not measured again."""
    kept = samples_file or out.with_name(out.stem + ".samples.jsonl")
    count = samples or (SAMPLES_WITH_PRIOR if prior else SAMPLES)
    given = {
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
    again = ["fit-lpnet", model]
    for name, value in given.items():
        again += [] if value is None else [name, str(value)]
    again += [] if active is None else ["--active" if active else "--no-active"]
    again += [] if profile else ["--no-profile"]
    again += [word for item in runtime_options or [] for word in ("--runtime-option", item)]
    with guarded(debug=debug, again=again):
        _check_structure(structure, active)
        from rich.console import Console

        from wgates_plugin.cli.live_samples import LiveSamples
        from wgates_plugin.efficiency.farm import Farm
        from wgates_plugin.efficiency.learner import Learner
        from wgates_plugin.efficiency.lpnet import LPNet, check_choice
        from wgates_plugin.latency_study import LatencyStudy
        from wgates_plugin.targets import LatencyTarget
        from wgates_plugin.tracing import trace

        console = progress_console()
        subject = Subject(model, input_shape, classes, weights)
        target = LatencyTarget(
            fraction=1.0,
            runtime=runtime,
            threads=threads,
            device=device,
            precision=precision,
            options=parsed_options(runtime_options),
        )
        with console.status(f"tracing {model}"):
            network, example = subject.network, subject.example
            space = trace(network, example, min_fraction=min_fraction)
            before = LPNet.load(prior, space=space) if prior else None
            check_choice(space, structure, before)
            study = LatencyStudy(network, space, example, target)
        with log_shown():
            file = study.open_samples(kept)
        if study.reference_ms is None:
            console.print(f"measuring the untouched {model}", markup=False)
            study.baseline(max(2.0, 4 * seconds))
        if grid is None:
            console.print("probing the channel grid")
            grid = int(study.probe()["grid"])
            again += ["--grid", str(grid)]
        start = len(file)
        wanted = structure == "layers" and active is not False
        learner = Learner(space, seed=seed, prior=before) if wanted else None
        with LiveSamples(file, space, count, console=console, learner=learner) as shown:
            cost = study.sample(
                count=count,
                grid=grid,
                seed=seed,
                seconds_per_sample=seconds,
                active=learner.active() if learner else None,
                profile=profile,
                farm=Farm(workers=workers),
                on_sample=shown,
            )
        with console.status("fitting LPNet"):
            lpnet = study.fit(seed=seed, structure=structure, prior=before)
            lpnet.save(out)
        Console().print(_table(model, study, lpnet, cost if len(file) > start else None))
        typer.echo(
            f"{len(file)} sub-networks on a grid of {grid} ({len(file) - start} measured now); "
            f"untouched network {study.reference_ms:.4g} ms\nLPNet:   {out}\nsamples: {kept}"
        )
        if report is not None:
            from wgates_plugin.report.lpnet_page import write_lpnet_report

            with console.status("drawing"):
                page = write_lpnet_report(
                    report, lpnet, file, name=model, identity=study.identity, cost=cost
                )
            typer.echo(f"page:    {page}")


def _check_structure(structure: str, active: bool | None) -> None:
    if structure == "mlp" and active:
        raise ConfigError(
            "--active",
            ["structure `mlp` does not know how sure it is; leave one of the two out"],
        )


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
        "90 % interval, half width": f"{found.half_width_90:.1%}",
        "samples set aside (another environment)": aside,
        "measured again (not trusted)": len(study.samples.rejected),
        "time inside timed inference": "-" if cost is None else f"{cost.share_in_inference:.0%}",
    }
    identity = study.identity
    title = f"LPNet of {model} on {identity['runtime']} {identity['library_version']}"
    table = Table(title=Text(title, style="bold"), show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table
