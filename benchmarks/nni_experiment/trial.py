"""One trial: prune as the tuner says, remove, fine-tune, and report accuracy and measured latency.

Every trial trains for the same number of optimizer steps: those that its pruner learns in count, and
fine-tuning gets the rest.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nni
import torch
from torch import nn

from benchmarks.nni_experiment import timings_file
from benchmarks.nni_experiment.subject import (
    LEARNING_RATE,
    data_of,
    epoch_steps,
    example_of,
    facts_of,
    fine_tune,
    latency_of,
    lpnet_of,
    network_of,
    training_func,
    training_step,
)
from wgates_plugin.catalogue.base import Data
from wgates_plugin.efficiency.base import EfficiencyModel
from wgates_plugin.files import write_json
from wgates_plugin.integrations.nni import StrategyPruner, build_pruner, remove, torch_evaluator
from wgates_plugin.integrations.nni.experiment import TRAINING_STEPS
from wgates_plugin.training import evaluate, recalibrate_batchnorm


def total_steps(parameters: Mapping[str, Any], data: Data, epochs: int) -> int:
    """Optimizer steps of a trial, pruning and fine-tuning together: the same for every pruner."""
    asked: int = parameters.get("training_steps", TRAINING_STEPS)
    return asked + epochs * epoch_steps(data)


def pruned(
    parameters: Mapping[str, Any],
    network: nn.Module,
    data: Data,
    efficiency: EfficiencyModel,
) -> int:
    """Prune the network in place; returns the optimizer steps this took."""
    taken: list[None] = []
    optimizer = nni.trace(torch.optim.SGD)(network.parameters(), lr=LEARNING_RATE / 5)
    pruner = build_pruner(
        parameters,
        model=network,
        evaluator=torch_evaluator(training_func(data, taken), optimizer, training_step),
        example_inputs=example_of(data),
        efficiency=efficiency,
        data=data.train_loader,
    )
    _, masks = pruner.compress()
    pruner.unwrap_model()
    remove(network, masks, example_of(data))
    recalibrate_batchnorm(network, data.train_loader)
    # A strategy learns in a loop of its own, which notes down every step.
    own = len(pruner.decision.monitor) if isinstance(pruner, StrategyPruner) else 0
    return len(taken) + own


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--work", type=Path, required=True, help="folder that was prepared")
    options.add_argument(
        "--epochs", type=int, default=4, help="of fine-tuning, beside `training_steps` of pruning"
    )
    options.add_argument("--seconds", type=float, default=1.0, help="of the measurement")
    arguments = options.parse_args()
    parameters = nni.get_next_parameter()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dense = facts_of(arguments.work)
    data = data_of(dense["limit"])
    example = example_of(data)
    untouched = network_of(arguments.work).eval()
    network = copy.deepcopy(untouched)

    total = total_steps(parameters, data, arguments.epochs)
    learned = pruned(parameters, network, data, lpnet_of(arguments.work, untouched, example))

    def report() -> None:
        nni.report_intermediate_result(evaluate(network, data.val_loader).accuracy)

    report()
    fine_tune(
        network,
        data,
        steps=max(0, total - learned),
        learning_rate=LEARNING_RATE / 5,
        after_epoch=report,
    )
    found = latency_of(
        network, untouched, example, dense_ms=dense["latency_ms"], seconds=arguments.seconds
    )
    write_json(timings_file(arguments.work, nni.get_trial_id()), found.to_json())
    nni.report_final_result(
        {
            "default": evaluate(network, data.val_loader).accuracy,
            "latency_ms": found.latency_ms,
            "steps": max(total, learned),
            "pruning_steps": learned,
            "latency_ratio": found.latency_ms / dense["latency_ms"],
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
        }
    )


if __name__ == "__main__":
    main()
