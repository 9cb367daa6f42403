"""One trial: prune as the tuner says, remove, fine-tune, and report accuracy and measured latency."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import nni
import torch

from benchmarks.nni_experiment import timings_file
from benchmarks.nni_experiment.subject import (
    LEARNING_RATE,
    data_of,
    example_of,
    facts_of,
    fine_tune,
    latency_of,
    lpnet_of,
    network_of,
    training_func,
    training_step,
)
from wgates_plugin.files import write_json
from wgates_plugin.integrations.nni import build_pruner, remove, torch_evaluator
from wgates_plugin.training import evaluate, recalibrate_batchnorm


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--work", type=Path, required=True, help="folder that was prepared")
    options.add_argument("--epochs", type=int, default=4, help="of fine-tuning")
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

    optimizer = nni.trace(torch.optim.SGD)(network.parameters(), lr=LEARNING_RATE / 5)
    pruner = build_pruner(
        parameters,
        model=network,
        evaluator=torch_evaluator(training_func(data), optimizer, training_step),
        example_inputs=example,
        efficiency=lpnet_of(arguments.work, untouched, example),
        data=data.train_loader,
    )
    _, masks = pruner.compress()
    pruner.unwrap_model()
    remove(network, masks, example)
    recalibrate_batchnorm(network, data.train_loader)
    nni.report_intermediate_result(evaluate(network, data.val_loader).accuracy)
    for epoch in range(arguments.epochs):
        rate = LEARNING_RATE / 5 * (1 - epoch / arguments.epochs)
        fine_tune(network, data, epochs=1, learning_rate=rate)
        nni.report_intermediate_result(evaluate(network, data.val_loader).accuracy)
    found = latency_of(
        network, untouched, example, dense_ms=dense["latency_ms"], seconds=arguments.seconds
    )
    write_json(timings_file(arguments.work, nni.get_trial_id()), found.to_json())
    nni.report_final_result(
        {
            "default": evaluate(network, data.val_loader).accuracy,
            "latency_ms": found.latency_ms,
            "latency_ratio": found.latency_ms / dense["latency_ms"],
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
        }
    )


if __name__ == "__main__":
    main()
