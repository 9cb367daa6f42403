"""Claim: pruners are interchangeable names in an NNI experiment, and every trial ends in SUCCEEDED.

Measured: an experiment on NNI's local service, with the search space of `experiment.yaml`: four pruners
by name, two latency targets as shares of the untouched network's. Each trial prunes a residual network
trained on scikit-learn's digits, removes the channels, fine-tunes and reports its accuracy and its
latency, timed in turn with the untouched network. All trials train for the same number of optimizer
steps, those in which a pruner learns included. NNI's own pruners, which know no latency, get the
smallest uniform ratio that LPNet finds sufficient. One seed, 450 validation images: the accuracies show
that trials work, and rank nobody. The dashboard listens on the loopback interface only.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tools.records import parser, write_record
from wgates_plugin.files import read_json
from wgates_plugin.latency.environment import library_version

CLAIM = "every trial of an experiment whose search space names pruners ends in SUCCEEDED"
HERE = Path(__file__).parent
YAML = HERE / "experiment.yaml"
LOOPBACK = HERE / "loopback.cjs"
ENDED = ("DONE", "ERROR", "STOPPED")


def options_of(argv: Sequence[str]) -> argparse.Namespace:
    options = parser("nni_experiment", __doc__)
    options.add_argument("--work", type=Path, default=Path("nni-work"), help="what trials share")
    options.add_argument("--prepare-only", action="store_true", help="no experiment, for nnictl")
    options.add_argument("--trials", type=int, default=None, help="default: the YAML's")
    options.add_argument("--port", type=int, default=0, help="of the dashboard; 0 takes a free one")
    options.add_argument("--dense-epochs", type=int, default=12)
    options.add_argument(
        "--epochs", type=int, default=4, help="of a trial's fine-tuning; more if less was learned"
    )
    options.add_argument("--steps", type=int, default=84, help="in which pruners learn")
    options.add_argument("--samples", type=int, default=40, help="sub-networks for LPNet")
    options.add_argument("--seconds", type=float, default=0.4, help="per measurement")
    options.add_argument("--images", type=int, default=None, help="training images; default all")
    options.add_argument("--limit-seconds", type=float, default=3600.0, help="of the experiment")
    return options.parse_args(list(argv))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the experiment to its end; one row per trial.

    Raises:
        TimeoutError: it took longer than `--limit-seconds`.
    """
    work: Path = arguments.work.resolve()
    # Read when nni is asked for it: what it keeps between runs stays in the work folder.
    os.environ.setdefault("NNI_CONFIG_DIR", str(work / "config"))
    given = os.environ.get("NODE_OPTIONS", "")
    os.environ["NODE_OPTIONS"] = f"{given} --require {shlex.quote(str(LOOPBACK))}".strip()
    from nni.experiment import Experiment, ExperimentConfig

    config = ExperimentConfig.load(str(YAML))
    config.trial_command = shlex.join(
        [
            *(sys.executable, "-m", "benchmarks.nni_experiment.trial"),
            *("--work", str(work), "--epochs", str(arguments.epochs)),
            *("--seconds", str(max(0.2, arguments.seconds))),
        ]
    )
    config.experiment_working_directory = work / "experiments"
    config.search_space["training_steps"] = {"_type": "choice", "_value": [arguments.steps]}
    if arguments.trials is not None:
        config.max_trial_number = arguments.trials
    experiment = Experiment(config)
    started = time.monotonic()
    try:
        experiment.start(arguments.port or free_port())
        check_loopback(experiment._proc.pid)
        while experiment.get_status() not in ENDED:
            if time.monotonic() - started > arguments.limit_seconds:
                raise TimeoutError(f"experiment: not done after {arguments.limit_seconds:g} s")
            time.sleep(1.0)
        jobs = experiment.list_trial_jobs()
        return [row_of(job, work) for job in sorted(jobs, key=lambda job: job.sequenceId)]
    finally:
        experiment.stop()
        os.environ["NODE_OPTIONS"] = given


def listening(pid: int) -> set[str]:
    """Addresses on which a process or a child of its accepts TCP connections."""
    psutil: Any = importlib.import_module("psutil")  # comes with nni
    process = psutil.Process(pid)
    return {
        connection.laddr.ip
        for one in [process, *process.children(recursive=True)]
        for connection in one.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def check_loopback(pid: int) -> None:
    """Refuse to go on with a dashboard that others can reach.

    Raises:
        RuntimeError: NNI's process listens on another address than 127.0.0.1, or on none.
    """
    found = listening(pid)
    if found != {"127.0.0.1"}:
        raise RuntimeError(
            f"NNI's dashboard listens on {', '.join(sorted(found)) or 'no address'}, must on "
            "127.0.0.1 alone; see loopback.cjs"
        )


def row_of(job: Any, work: Path) -> dict[str, Any]:
    """Status, parameters, final metrics and timings of a trial; None where it left nothing.

    `steps` are all optimizer steps of the trial, `pruning_steps` those until its channels were gone.
    """
    final = job.finalMetricData[0].data if job.finalMetricData else None
    while isinstance(final, str):
        final = json.loads(final)
    found = final or {}
    timings = timings_file(work, job.trialJobId)
    return {
        "trial": job.sequenceId,
        "status": job.status,
        "parameters": dict(job.hyperParameters[0].parameters),
        "accuracy": found.get("default"),
        "latency_ms": found.get("latency_ms"),
        "latency_ratio": found.get("latency_ratio"),
        "parameter_count": found.get("parameters"),
        "steps": found.get("steps"),
        "pruning_steps": found.get("pruning_steps"),
        "measurement": read_json(timings, kind="measurement") if timings.exists() else None,
    }


def timings_file(work: Path, trial: str) -> Path:
    """Where a trial leaves its raw timings."""
    return work / "timings" / f"{trial}.json"


def main(argv: Sequence[str] = ()) -> None:
    arguments = options_of(argv)
    import wgates_plugin.integrations.nni  # noqa: F401  says at once that nni is missing
    from benchmarks.nni_experiment.page import table
    from benchmarks.nni_experiment.subject import RUNTIME, prepare

    dense = prepare(
        arguments.work.resolve(),
        epochs=arguments.dense_epochs,
        samples=arguments.samples,
        seconds=arguments.seconds,
        limit=arguments.images,
        seed=arguments.seed,
    )
    if arguments.prepare_only:
        return
    rows = run(arguments)
    succeeded = [row for row in rows if row["status"] == "SUCCEEDED"]
    print(table(rows, dense))
    write_record(
        arguments.results,
        "nni_experiment",
        claim=CLAIM,
        settings={
            "dense_epochs": arguments.dense_epochs,
            "epochs": arguments.epochs,
            "steps": arguments.steps,
            "samples": arguments.samples,
            "seconds": arguments.seconds,
            "images": arguments.images,
            "runtime": RUNTIME,
            "threads": 1,
            "nni": library_version("nni"),
        },
        seed=arguments.seed,
        numbers={
            "trials": len(rows),
            "succeeded": len(succeeded),
            "succeeded_share": len(succeeded) / len(rows) if rows else 0.0,
            "dense": dense,
        },
        samples={"trials": rows},
    )
