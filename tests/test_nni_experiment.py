"""Pruners by name, and an experiment whose trials use them."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nni", reason='nni is not installed; pip install "wgates-plugin[nni]"')
pytest.importorskip("wgates_plugin.integrations.nni")  # first: it lets NNI import Lightning

import nni_node
import torch
from networks import example, tiny
from nni.compression.pruning import SlimPruner
from nni_helpers import evaluator
from test_strategies import batches
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks import nni_experiment
from benchmarks.nni_experiment import subject, trial
from benchmarks.tools.records import read_record
from wgates_plugin import trace
from wgates_plugin.catalogue.models import load_model
from wgates_plugin.efficiency import MacsModel, ParametersModel
from wgates_plugin.errors import ConfigError, InfeasibleTargetError
from wgates_plugin.integrations.nni import PRUNERS, build_pruner, make_config, remove
from wgates_plugin.integrations.nni.strategies import NEED_A_TARGET
from wgates_plugin.latency.measurement import Measurement
from wgates_plugin.verification import TOLERANCE, relative_error


def built(network: nn.Module, **parameters: Any) -> Any:
    return build_pruner(
        {"training_steps": 3, **parameters},
        model=network,
        evaluator=evaluator(network),
        example_inputs=example(),
        data=batches(),
    )


def cost(network: nn.Module) -> float:
    space = trace(network, example())
    return float(MacsModel(space)(torch.tensor(space.full_widths)))


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("kind", ["projection", "grouped"])
def test_every_pruner_ends_under_the_target_exactly(name: str, kind: str) -> None:
    network = tiny(kind)
    full = cost(network)
    pruner = built(network, pruner=name, target_fraction=0.5)
    _, masks = pruner.compress()
    with torch.no_grad():
        masked = network.eval()(example(4))
        pruner.unwrap_model()
        remove(network, masks, example())
        assert relative_error(network.eval()(example(4)), masked) <= TOLERANCE
    assert 0.2 * full < cost(network) <= 0.5 * full


@pytest.mark.parametrize("name", [name for name in PRUNERS if name not in NEED_A_TARGET])
def test_every_pruner_takes_a_ratio(name: str) -> None:
    network = tiny("plain")
    pruner = built(network, pruner=name, sparse_ratio=0.25)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    remove(network, masks, example())
    assert [network[0][0].out_channels, network[1][0].out_channels] == [6, 9]


@pytest.mark.parametrize("name", ["wgates", "group-norm"])
@pytest.mark.parametrize("amount", [{"sparse_ratio": 0.5}, {"target_fraction": 0.5}])
def test_depthwise_layers_keep_nothing_whole(name: str, amount: dict[str, float]) -> None:
    network = load_model("mobilenet_small", classes=4, in_channels=3)
    pruner = build_pruner(
        {"pruner": name, **amount},
        model=network,
        evaluator=evaluator(network),
        example_inputs=example(2, 32),
        data=batches(),
    )
    assert pruner.left_out == {}
    groups = pruner.space.groups
    if "sparse_ratio" in amount:
        assert all(group.cap == group.floor == group.channels // 2 for group in groups)
    else:
        assert all(group.floor < group.cap == group.channels for group in groups)


def test_slim_factors_would_be_lost_without_us() -> None:
    network = tiny("plain")
    config = make_config(network, example(), sparse_ratio=0.5)
    theirs = SlimPruner(network, config, evaluator(network), training_steps=3)
    _, masks = theirs.compress()
    with torch.no_grad():
        masked = network.eval()(example(4))
        theirs.unwrap_model()
        remove(network, masks, example())
        assert relative_error(network.eval()(example(4)), masked) > 1e-3


def test_another_efficiency_model_counts() -> None:
    network = tiny("plain")
    pruner = build_pruner(
        {"pruner": "l2", "target": 700.0},
        model=network,
        evaluator=evaluator(network),
        example_inputs=example(),
        efficiency=ParametersModel,
    )
    _, masks = pruner.compress()
    pruner.unwrap_model()
    remove(network, masks, example())
    assert sum(p.numel() for p in network.parameters()) <= 700


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"pruner": "magic", "sparse_ratio": 0.5}, "choose from wgates, l1, l2, fpgm"),
        ({"pruner": "l1"}, "got none"),
        ({"pruner": "l1", "sparse_ratio": 0.5, "target": 3.0}, "got sparse_ratio, target"),
        ({"pruner": "l1", "sparse_ratio": 1.5}, "sparse_ratio is 1.5"),
        ({"pruner": "l1", "target_fraction": 0}, "target_fraction is 0"),
        ({"pruner": "l1", "sparse_ratio": 0.5, "lr": 0.1}, "`lr` is unknown"),
        ({"pruner": "taylor", "sparse_ratio": 0.5, "training_steps": 0}, "whole number from 1"),
    ],
)
def test_wrong_parameters_are_refused(parameters: dict[str, Any], words: str) -> None:
    network = tiny("plain")
    with pytest.raises(ConfigError, match=words):
        build_pruner(
            parameters,
            model=network,
            evaluator=evaluator(network),
            example_inputs=example(),
        )


@pytest.mark.parametrize("name", ["wgates", "l1"])
def test_an_unreachable_target_is_refused(name: str) -> None:
    with pytest.raises(InfeasibleTargetError):
        built(tiny("plain"), pruner=name, target=10.0)


def test_the_dashboard_listens_on_loopback_alone() -> None:
    node = Path(nni_node.__path__[0]) / "node"
    code = """
        const server = require('http').createServer();
        server.listen(0, () => { console.log(server.address().address); server.close(); });
    """
    command = [str(node), "--require", str(nni_experiment.LOOPBACK), "-e", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "127.0.0.1"


def test_a_dashboard_that_others_can_reach_is_refused() -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        with pytest.raises(RuntimeError, match=r"listens on .*0\.0\.0\.0.*, must on"):
            nni_experiment.check_loopback(os.getpid())


@pytest.mark.parametrize(
    ("name", "learned"),
    # Strategies learn for whole epochs, of 4 batches here.
    [("wgates", 6), ("taylor", 6), ("l1", 0), ("fpgm", 0), ("gdp", 8), ("knapsack", 0)],
)
def test_every_pruner_trains_for_as_many_steps(name: str, learned: int) -> None:
    data = subject.data_of(limit=4 * subject.BATCH)
    network = subject.network_of()
    parameters = {"pruner": name, "target_fraction": 0.6, "training_steps": 6}
    total = trial.total_steps(parameters, data, epochs=1)
    assert total == 10
    taken = []

    def count(optimizer: Any, *_: Any) -> None:
        if isinstance(optimizer, torch.optim.SGD):  # the scores of gates have an Adam
            taken.append(name)

    handle = register_optimizer_step_post_hook(count)
    try:
        model = MacsModel(trace(network, subject.example_of(data)))
        assert trial.pruned(parameters, network, data, model) == learned == len(taken)
        reports: list[int] = []
        subject.fine_tune(
            network,
            data,
            steps=total - learned,
            learning_rate=0.01,
            after_epoch=lambda: reports.append(len(taken)),
        )
    finally:
        handle.remove()
    assert len(taken) == total == reports[-1]
    assert len(reports) == -(-(total - learned) // 4)


@pytest.mark.slow
def test_three_trials_succeed(tmp_path: Path) -> None:
    small = {"dense-epochs": 2, "epochs": 1, "steps": 5, "samples": 24, "images": 512}
    options = [item for key, value in small.items() for item in (f"--{key}", str(value))]
    nni_experiment.main(
        [
            *("--work", str(tmp_path / "work"), "--results", str(tmp_path)),
            *("--trials", "3", "--seconds", "0.1", *options),
        ]
    )
    record = read_record(tmp_path, "nni_experiment")
    assert record is not None
    assert record["numbers"]["succeeded_share"] == 1.0
    rows = record["samples"]["trials"]
    assert len(rows) == 3
    assert len({row["steps"] for row in rows}) == 1
    for row in rows:
        assert row["parameters"]["pruner"] in PRUNERS
        assert row["latency_ms"] == Measurement.from_json(row["measurement"]).latency_ms
        assert 0 <= row["accuracy"] <= 1
    assert (tmp_path / "work" / "config").is_dir()
