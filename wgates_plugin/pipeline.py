"""The whole job: milliseconds in, a smaller exported network out, measured to hold them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from wgates_plugin import closed_loop
from wgates_plugin.efficiency.base import Budget, Limit
from wgates_plugin.efficiency.counts import MacsModel, ParametersModel
from wgates_plugin.efficiency.lpnet import LPNet
from wgates_plugin.errors import ConfigError, InfeasibleTargetError, SurgeryError
from wgates_plugin.files import load_tensors, read_json, save_tensors, write_json
from wgates_plugin.latency.base import Measurement
from wgates_plugin.latency.environment import describe_environment
from wgates_plugin.latency_study import LatencyStudy
from wgates_plugin.plan import PruningPlan
from wgates_plugin.run_folder import RunFolder, weights_digest
from wgates_plugin.strategies.budgeting import check_feasible, plan_for_budget
from wgates_plugin.strategies.wgates import WGates
from wgates_plugin.surgery import rebuild, remove
from wgates_plugin.targets import (
    LatencyTarget,
    MacsTarget,
    ParametersTarget,
    PruningSettings,
    Target,
)
from wgates_plugin.tracing import DependencyTrace, ExampleInputs, trace
from wgates_plugin.training import (
    StepContext,
    Trainer,
    default_fabric,
    evaluate,
    recalibrate_batchnorm,
)
from wgates_plugin.training.engine import LossFunction
from wgates_plugin.training.evaluation import rng_kept
from wgates_plugin.verification import removal_error

logger = logging.getLogger("wgates_plugin")

REMOVAL_TOLERANCE = 1e-4
"""Above this, the removed network is not the gated one; float noise stays far below."""


@dataclass(frozen=True)
class PruningResult:
    """What the job leaves behind.

    Attributes:
        network: the smaller network, in eval mode. artefact: the exported file that was measured.
        held: True when the artefact was measured at or under every target.
    """

    network: nn.Module
    plan: PruningPlan
    report: dict[str, Any]
    run_folder: Path
    artefact: Path
    held: bool


def prune_to_target(
    network: nn.Module,
    example_inputs: ExampleInputs,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    *,
    target: Target | Sequence[Target],
    settings: PruningSettings | None = None,
    run_folder: str | Path,
    resume: bool = False,
    loss: LossFunction | None = None,
    name: str | None = None,
    progress: bool | None = None,
) -> PruningResult:
    """Prune a trained network until its exported artefact keeps the target.

    Baseline measured, LPNet fitted, feasibility measured, gates and weights trained together,
    widths settled by measurement, channels removed, fine-tuned, exported, measured again; when that
    is over the target, trimmed and measured again. The given network is only read.

    Args:
        network: a trained classifier whose output is one tensor of logits (N, classes).
        example_inputs: what one inference looks like: its batch size is what is timed.
        train_loader, val_loader: iterables of (inputs, targets) with a length.
        target: one target, or several that must all hold (at most one `LatencyTarget`).
        run_folder: where everything is written; stopped at any moment, the job goes on from there
            with `resume=True`.
        loss: `loss(logits, targets)`; cross-entropy by default.
        progress: True or False for progress bars; None shows them on a terminal.

    Raises:
        TraceError, TargetError, InfeasibleTargetError, RuntimeUnavailableError: before any training.
        RunFolderError: the folder belongs to another run.
        TrainingError: the loss is no longer finite; the last good state is in the folder.
    """
    job = _Job(
        network,
        example_inputs,
        train_loader,
        val_loader,
        [target] if isinstance(target, Target) else list(target),
        settings or PruningSettings(),
        run_folder,
        loss,
        name or type(network).__name__,
        progress,
    )
    return job.run(resume)


class _Job:
    """One run of the pipeline; each method is a stage that is skipped when its file is there."""

    def __init__(
        self,
        network: nn.Module,
        example_inputs: ExampleInputs,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any],
        targets: list[Target],
        settings: PruningSettings,
        run_folder: str | Path,
        loss: LossFunction | None,
        name: str,
        progress: bool | None,
    ) -> None:
        self.settings, self.name, self.loss, self.progress = settings, name, loss, progress
        self.train_loader, self.val_loader = train_loader, val_loader
        self.example_inputs = example_inputs
        self.latency_target, self.count_targets = _sort_targets(targets)
        self.fabric = default_fabric(settings.training)
        self.folder = RunFolder(run_folder, self.fabric)
        self.dense = copy.deepcopy(network).cpu()
        self.space = trace(
            self.dense,
            example_inputs,
            ignored_layers=settings.ignored_layers,
            min_channels=settings.min_channels,
            min_fraction=settings.min_fraction,
            floors=settings.floors,
            caps=settings.caps,
        )
        self.study = LatencyStudy(
            self.dense,
            self.space,
            example_inputs,
            self.latency_target or LatencyTarget(fraction=1.0, runtime="eager"),
        )
        self.lpnet: LPNet | None = None
        self.lpnet_facts: dict[str, Any] | None = None
        self.total_epochs = settings.gate_epochs + settings.fine_tune_epochs

    # The order of the job

    def run(self, resume: bool) -> PruningResult:
        self.folder.claim(self._identity(), resume=resume)
        finished = self.folder.file("report.json")
        if finished.exists():
            return self._result(read_json(finished, kind="report"))
        self.baseline = self.folder.once("baseline", self._measure_baseline)
        self.study.reference_ms = self.baseline["latency_ms"]
        self.limits = self._limits()
        if self._already_there():
            logger.info("%s: within the target as it is; nothing to prune", self.name)
            plan = PruningPlan.leading(self.space, self.space.full_widths)
            self._store(plan, self.dense)
            return self._finish(plan, self.dense, removal={}, gate_log=[])
        self.grid = int(self.folder.once("grid", self._find_grid)["multiple"])
        if self.latency_target is not None:
            self._fit_lpnet()
        self.folder.once("feasibility", self._check_feasible)
        network, gates = self._learn_gates()
        scores, widths = gates.unit_scores().cpu(), gates.widths()
        settled = self.folder.once("plan", lambda: self._settle(scores, widths))
        plan = PruningPlan.top(self.space, scores, settled["widths"], strategy="wgates")
        network, removal = self._remove(network, plan)
        network = self._fine_tune(network)
        plan, network = self._deliver(plan, network, scores)
        log = self._state("gates.pt")["monitor"] if self.settings.gate_epochs else []
        return self._finish(plan, network, removal=removal, gate_log=log)

    def _identity(self) -> dict[str, Any]:
        targets = [t for t in (self.latency_target, *self.count_targets) if t is not None]
        return {
            "kind": "wgates-run",
            "version": 1,
            "network": self.name,
            "structure": self.space.fingerprint,
            "weights": weights_digest(self.dense),
            "targets": [{type(target).__name__: vars(target)} for target in targets],
            "runtime": self.study.identity,
            "settings": dataclasses.asdict(self.settings),
        }

    # Before any training

    def _measure_baseline(self) -> dict[str, Any]:
        found = self.study.baseline(self.settings.measure_seconds)
        return self._facts(self.dense, self.space.full_widths, found)

    def _facts(
        self, network: nn.Module, widths: Sequence[int], latency: Measurement
    ) -> dict[str, Any]:
        row = torch.tensor(widths, dtype=torch.float64)
        network.to(self.fabric.device)
        accuracy = evaluate(network, self.val_loader).accuracy
        network.cpu()
        return {
            "latency_ms": latency.latency_ms,
            "accuracy": accuracy,
            "macs": float(MacsModel(self.space)(row)),
            "parameters": float(ParametersModel(self.space)(row)),
            "latency": latency.to_json(),
        }

    def _limits(self) -> dict[str, float | None]:
        macs: float | None = None
        parameters: float | None = None
        latency: float | None = None
        if self.latency_target is not None:
            latency = self.latency_target.resolve(self.baseline["latency_ms"])
        for target in self.count_targets:
            if isinstance(target, MacsTarget):
                macs = target.resolve(self.baseline["macs"])
            else:
                parameters = target.resolve(self.baseline["parameters"])
        return {
            "latency_ms": latency,
            "macs": macs,
            "parameters": parameters,
        }

    def _already_there(self) -> bool:
        return all(
            limit is None or self.baseline[what] <= limit for what, limit in self.limits.items()
        )

    def _find_grid(self) -> dict[str, Any]:
        if self.settings.grid is not None:
            return {"multiple": self.settings.grid, "probed": False, "evidence": []}
        if self.latency_target is None:
            return {"multiple": 1, "probed": False, "evidence": []}
        probe = self.study.probe()
        return {"multiple": probe["grid"], "probed": True, "evidence": probe["evidence"]}

    def _fit_lpnet(self) -> None:
        path = self.folder.file("lpnet.safetensors")

        def compute() -> dict[str, Any]:
            self._open_study_files()
            with self.folder.clock("sampling"), self._bar("sampling", self.settings.samples) as bar:
                cost = self.study.sample(
                    count=self.settings.samples,
                    grid=self.grid,
                    seed=self.settings.seed,
                    seconds_per_sample=self.settings.seconds_per_sample,
                    on_sample=lambda done, _: bar(done),
                )
            lpnet = self.study.fit(seed=self.settings.seed)
            lpnet.save(path)
            assert lpnet.report is not None
            return {
                "structure": lpnet.structure,
                "samples": lpnet.report.samples,
                "held_out": lpnet.report.held_out,
                "mape_held_out": lpnet.report.mape,
                "within_10_percent": lpnet.report.within_10_percent,
                "share_in_inference": cost.share_in_inference,
            }

        self.lpnet_facts = self.folder.once("lpnet", compute)
        self.lpnet = LPNet.load(path, space=self.space)
        if self.folder.is_writer and self.study.samples is None:
            self._open_study_files()

    def _open_study_files(self) -> None:
        self.study.open_files(
            self.folder.file("samples.jsonl"), self.folder.stage_file("visited.jsonl")
        )

    def _count_limits(self) -> list[Limit]:
        limits = []
        if self.limits["macs"] is not None:
            limits.append(Limit(MacsModel(self.space), self.limits["macs"]))
        if self.limits["parameters"] is not None:
            limits.append(Limit(ParametersModel(self.space), self.limits["parameters"]))
        return limits

    def _budget(self) -> Budget:
        """The limits the gates are held to: a little under the target, corrected where measured."""
        limits = self._count_limits()
        if self.lpnet is not None:
            assert self.limits["latency_ms"] is not None
            aim = self.limits["latency_ms"] * (1.0 - self.settings.margin)
            limits.insert(0, Limit(self.lpnet, aim))
        return Budget.of(*limits)

    def _check_feasible(self) -> dict[str, Any]:
        """Measure the least allowed widths, so that no hour is spent on what cannot be."""
        counts = self._count_limits()
        if counts:
            check_feasible(self.space, Budget.of(*counts), self.grid)
        target = self.limits["latency_ms"]
        if target is None:
            return {}
        least = self.space.least_widths(self.grid)
        found = self.study.at(least, self.settings.seconds_per_sample)
        aim = target * (1.0 - self.settings.margin)
        if found.latency_ms > aim:
            raise InfeasibleTargetError(
                f"latency: target {target:.4g} ms is out of reach; the least allowed widths were "
                f"measured at {found.latency_ms:.4g} ms on {self.study.runtime.name} (the untouched "
                f"network takes {self.baseline['latency_ms']:.4g} ms); ask for more than "
                f"{found.latency_ms / (1.0 - self.settings.margin):.4g} ms, lower `min_fraction` "
                "or the floors, or start from a smaller network"
            )
        return {"least_ms": found.latency_ms, "widths": list(least)}

    # Gates and weights learn

    def _learn_gates(self) -> tuple[nn.Module, WGates]:
        settings = self.settings
        network = copy.deepcopy(self.dense).to(self.fabric.device)
        gates = WGates(
            network,
            self.space,
            self._feasible_budget(),
            dataclasses.replace(settings.gates, grid=self.grid),
            steps=max(1, settings.gate_epochs * len(self.train_loader)),  # type: ignore[arg-type]
            average=lambda gradient: self.fabric.all_reduce(gradient, reduce_op="mean"),  # type: ignore[arg-type, return-value]
        )
        if settings.gate_epochs == 0:
            return network, gates
        trainer = self._trainer(network, "gates", self.total_epochs, settings.training)
        monitor: list[dict[str, float]] = []
        state = self.folder.load_state("gates.pt")
        if state is not None:
            network.load_state_dict(state["network"])
            gates.load_state_dict(state["gates"])
            trainer.load_state_dict(state["trainer"])
            trainer.history, monitor = state["history"], state["monitor"]

        def step(context: StepContext) -> None:
            record = gates.regularize()
            if not settings.train_weights:
                for parameter in network.parameters():
                    parameter.grad = None
            monitor.append({"loss": float(context.loss or 0.0), **record})

        def save(*_: object) -> None:
            self.folder.save_state(
                "gates.pt",
                {
                    "network": network.state_dict(),
                    "gates": gates.state_dict(),
                    "trainer": trainer.state_dict(),
                    "history": trainer.history,
                    "monitor": monitor,
                },
            )

        gates.attach()
        try:
            if trainer.epoch < settings.gate_epochs:
                with self.folder.clock("gates"):
                    trainer.run(
                        epochs=settings.gate_epochs - trainer.epoch,
                        after_backward=step,
                        on_epoch_end=save,
                        progress=self.progress,
                    )
        finally:
            gates.detach()
        return network, gates

    def _feasible_budget(self) -> Budget:
        """The budget; if LPNet doubts what was measured to be possible, LPNet is put right."""
        budget = self._budget()
        try:
            check_feasible(self.space, budget, self.grid)
        except InfeasibleTargetError:
            measured: dict[str, Any] = self.folder.once("feasibility", dict)
            if self.lpnet is None or "least_ms" not in measured:
                raise
            self.lpnet = self.lpnet.corrected(measured["widths"], measured["least_ms"])
            budget = self._budget()
        return budget

    def _trainer(self, network: nn.Module, label: str, total: int, training: Any) -> Trainer:
        teacher = None
        if training.distillation_weight > 0:
            teacher = copy.deepcopy(self.dense)
        return Trainer(
            network,
            self.train_loader,
            training,
            fabric=self.fabric,
            loss=self.loss,
            teacher=teacher,
            total_epochs=total,
            seed=self.settings.seed,
            label=label,
        )

    def _state(self, name: str) -> dict[str, Any]:
        state = self.folder.load_state(name)
        assert state is not None
        return state

    # From scores to a smaller network

    def _settle(self, scores: Tensor, widths: Sequence[int]) -> dict[str, Any]:
        settings = self.settings
        if self.lpnet is None:
            plan = plan_for_budget(self.space, scores, widths, self._budget(), self.grid)
            return {"widths": list(plan.widths), "attempts": []}
        assert self.limits["latency_ms"] is not None
        settled = closed_loop.settle(
            self.study,
            self.lpnet,
            scores,
            widths,
            target_ms=self.limits["latency_ms"],
            others=self._count_limits(),
            margin=settings.margin,
            attempts=settings.attempts,
            grid=self.grid,
            seconds=settings.measure_seconds / 2,
        )
        return {"widths": list(settled.widths), "attempts": settled.attempts}

    def _remove(self, network: nn.Module, plan: PruningPlan) -> tuple[nn.Module, dict[str, Any]]:
        """Cut the plan's channels exactly, then bring BatchNorm up to date."""

        def compute() -> dict[str, Any]:
            gated = network.cpu()
            smaller = remove(copy.deepcopy(gated), plan, self.example_inputs)
            error = removal_error(gated, smaller, plan, self.example_inputs)
            if not error <= REMOVAL_TOLERANCE:
                raise SurgeryError(
                    f"network {self.name}: gated and removed network differ by {error:.1e} "
                    "relative; the plan was not carried out, please report the network"
                )
            smaller.to(self.fabric.device)
            before = evaluate(smaller, self.val_loader).accuracy
            self._recalibrate(smaller)
            after = evaluate(smaller, self.val_loader).accuracy
            self._store(plan, smaller)
            return {
                "masked_equals_removed": error,
                "accuracy": before,
                "accuracy_recalibrated": after,
            }

        facts = self.folder.once("removal", compute)
        return self._rebuilt(plan), facts

    def _recalibrate(self, network: nn.Module) -> None:
        with rng_kept(self.fabric.device):
            torch.default_generator.manual_seed(self.settings.seed)
            recalibrate_batchnorm(
                network, self.train_loader, images=self.settings.recalibration_images
            )

    def _store(self, plan: PruningPlan, network: nn.Module) -> None:
        if self.folder.is_writer:
            save_tensors(self.folder.file("pruned.safetensors"), network.state_dict())
            plan.save(self.folder.file("plan.json"))

    def _rebuilt(self, plan: PruningPlan) -> nn.Module:
        state = load_tensors(self.folder.file("pruned.safetensors"), kind="pruned weights")
        return rebuild(self.dense, plan, state)

    def _fine_tune(self, network: nn.Module) -> nn.Module:
        settings = self.settings
        if settings.fine_tune_epochs == 0:
            return network
        network.to(self.fabric.device)
        trainer = self._trainer(network, "fine-tune", self.total_epochs, settings.training)
        trainer.epoch = settings.gate_epochs
        state = self.folder.load_state("fine-tune.pt")
        if state is not None:
            network.load_state_dict(state["network"])
            trainer.load_state_dict(state["trainer"])
            trainer.history = state["history"]

        def save(*_: object) -> None:
            self.folder.save_state(
                "fine-tune.pt",
                {
                    "network": network.state_dict(),
                    "trainer": trainer.state_dict(),
                    "history": trainer.history,
                },
            )

        if trainer.epoch < self.total_epochs:
            with self.folder.clock("fine_tune"):
                trainer.run(on_epoch_end=save, progress=self.progress)
        return network.cpu()

    # Delivery: the artefact itself is measured

    def _deliver(
        self, plan: PruningPlan, network: nn.Module, scores: Tensor
    ) -> tuple[PruningPlan, nn.Module]:
        """Export and measure; while over the target, trim, retrain shortly, and measure again."""
        self._store(plan, network)
        target = self.limits["latency_ms"]
        for attempt in range(self.settings.attempts):
            export = functools.partial(self._export_and_measure, network)
            facts = self.folder.once(f"delivery-{attempt}", export)
            if target is None or facts["latency_ms"] <= target:
                break
            if attempt + 1 == self.settings.attempts:
                break
            plan, network = self._trim(plan, network, scores, facts["latency_ms"], attempt)
        return plan, network

    def _export_and_measure(self, network: nn.Module) -> dict[str, Any]:
        path = self.folder.file(self.study.runtime.artefact_name)
        with self.folder.clock("export"):
            self.study.runtime.save(network, self.example_inputs, path)
        found = self.study.of_file(path, self.settings.measure_seconds)
        return found.to_json()

    def _trim(
        self,
        plan: PruningPlan,
        network: nn.Module,
        scores: Tensor,
        measured_ms: float,
        attempt: int,
    ) -> tuple[PruningPlan, nn.Module]:
        assert self.lpnet is not None
        assert self.limits["latency_ms"] is not None
        aim = self.limits["latency_ms"] * (1.0 - self.settings.margin)
        exact_here = self.lpnet.corrected(plan.widths, measured_ms)
        budget = Budget((Limit(exact_here, aim), *self._count_limits()))
        smaller_plan = closed_loop.trimmed(plan, scores, budget, self.grid)
        name = f"trim-{attempt}.pt"
        state = self.folder.load_state(name)
        if state is None:
            graph = DependencyTrace(network, self.example_inputs)
            space = graph.space(ignored_layers=self.settings.ignored_layers, verify=False)
            inner = closed_loop.relative_plan(smaller_plan, plan, space)
            remove(network, inner, traced=graph)
            network.to(self.fabric.device)
            self._recalibrate(network)
            if self.settings.fine_tune_epochs:
                gentle = dataclasses.replace(
                    self.settings.training,
                    learning_rate=self.settings.training.learning_rate / 10,
                    warmup_epochs=0.0,
                )
                with self.folder.clock("fine_tune"):
                    self._trainer(network, "trim", 1, gentle).run(progress=self.progress)
            network.cpu()
            self.folder.save_state(name, {"network": network.state_dict()})
        else:
            network = rebuild(self.dense, smaller_plan, state["network"])
        self._store(smaller_plan, network)
        return smaller_plan, network

    # The record

    def _finish(
        self,
        plan: PruningPlan,
        network: nn.Module,
        *,
        removal: dict[str, Any],
        gate_log: list[dict[str, float]],
    ) -> PruningResult:
        network = network.cpu().eval()
        deliveries = self._deliveries()
        if not deliveries:
            facts = self.folder.once("delivery-0", lambda: self._export_and_measure(network))
            deliveries = [facts]
        if self.folder.is_writer:
            final = self._facts(network, plan.widths, Measurement.from_json(deliveries[-1]))
            self._store(plan, network)
            write_json(
                self.folder.file("report.json"),
                self._report(plan, final, deliveries, removal, gate_log),
            )
            from wgates_plugin.report import write_report

            write_report(self.folder.path)
        self.fabric.barrier()
        return self._result(read_json(self.folder.file("report.json"), kind="report"))

    def _deliveries(self) -> list[dict[str, Any]]:
        found = []
        for attempt in range(self.settings.attempts):
            path = self.folder.stage_file(f"delivery-{attempt}.json")
            if path.exists():
                found.append(read_json(path, kind="delivery"))
        return found

    def _report(
        self,
        plan: PruningPlan,
        final: dict[str, Any],
        deliveries: list[dict[str, Any]],
        removal: dict[str, Any],
        gate_log: list[dict[str, float]],
    ) -> dict[str, Any]:
        held = all(limit is None or final[what] <= limit for what, limit in self.limits.items())
        artefact = self.folder.file(self.study.runtime.artefact_name)
        seconds = self.folder.seconds()
        seconds["total"] = sum(
            value for key, value in seconds.items() if key not in ("lpnet", "export")
        ) + max(0.0, seconds.get("lpnet", 0.0) - seconds.get("sampling", 0.0))
        target = self.limits["latency_ms"]
        plan_stage = self.folder.stage_file("plan.json")
        attempts = read_json(plan_stage, kind="plan")["attempts"] if plan_stage.exists() else []
        for found in deliveries:
            over = target is not None and found["latency_ms"] > target
            attempts.append(
                {
                    "stage": "delivery",
                    "predicted_ms": None,
                    "measured_ms": found["latency_ms"],
                    "verdict": "over" if over else "held",
                }
            )
        thin = max(1, len(gate_log) // 500)
        return {
            "kind": "wgates-report",
            "version": 1,
            "name": self.name,
            "strategy": "wgates",
            "runtime": self.study.runtime.name,
            "device": self.study.runtime.settings.device,
            "identity": self.study.identity,
            "target": dict(self.limits),
            "target_ms": target,
            "contract": "held" if held else "missed",
            "seed": self.settings.seed,
            "baseline": {**self.baseline, "file_bytes": self._dense_bytes()},
            "final": {**final, "file_bytes": artefact.stat().st_size},
            "after_removal": removal or None,
            "seconds": seconds,
            "environment": describe_environment(),
            "grid": self._stage_or_none("grid"),
            "lpnet": self._lpnet_report(),
            "widths": [
                {"group": group.name, "dense": group.channels, "kept": width}
                for group, width in zip(self.space.groups, plan.widths, strict=True)
            ],
            "gates": gate_log[::thin],
            "training": self._training_log(),
            "attempts": attempts,
            "masked_equals_removed": removal.get("masked_equals_removed"),
            "settings": json.loads(json.dumps(dataclasses.asdict(self.settings))),
        }

    def _stage_or_none(self, name: str) -> Any:
        path = self.folder.stage_file(f"{name}.json")
        return read_json(path, kind=name) if path.exists() else None

    def _dense_bytes(self) -> int:
        path = self.folder.stage_file(f"dense-{self.study.runtime.artefact_name}")
        if not path.exists():
            self.study.runtime.save(self.dense, self.example_inputs, path)
        return path.stat().st_size

    def _lpnet_report(self) -> dict[str, Any] | None:
        if self.lpnet is None or self.lpnet_facts is None:
            return None
        first = LPNet.load(self.folder.file("lpnet.safetensors"), space=self.space)
        return {
            **self.lpnet_facts,
            "mape_visited": self.study.visited_error(first),
            "predictions": self.study.predictions(first),
        }

    def _training_log(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for name in ("gates.pt", "fine-tune.pt"):
            state = self.folder.load_state(name)
            rows += state["history"] if state else []
        return rows

    def _result(self, report: dict[str, Any]) -> PruningResult:
        plan = PruningPlan.load(self.folder.file("plan.json"), space=self.space)
        network = self._rebuilt(plan).eval()
        artefact = self.folder.file(self.study.runtime.artefact_name)
        held = report["contract"] == "held"
        return PruningResult(network, plan, report, self.folder.path, artefact, held)

    def _bar(self, label: str, total: int) -> _Bar:
        return _Bar(label, total, shown=self.progress is not False)


class _Bar:
    """A progress bar that is told how far things are."""

    def __init__(self, label: str, total: int, *, shown: bool) -> None:
        columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, disable=not shown, transient=True)
        self.task = self.progress.add_task(label, total=total)

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __call__(self, done: int) -> None:
        self.progress.update(self.task, completed=done)

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


def _sort_targets(
    targets: Sequence[Target],
) -> tuple[LatencyTarget | None, list[MacsTarget | ParametersTarget]]:
    """The one latency target, if any, and the others.

    Raises:
        ConfigError: none, one that is no target, or two of a kind.
    """
    kinds = [type(target).__name__ for target in targets]
    problems = [] if targets else ["no target given; give a LatencyTarget"]
    problems += [
        f"{target!r} is no target; use LatencyTarget, MacsTarget or ParametersTarget"
        for target in targets
        if not isinstance(target, Target)
    ]
    problems += [
        f"{kind} is given {kinds.count(kind)} times" for kind in {*kinds} if kinds.count(kind) > 1
    ]
    if problems:
        raise ConfigError("targets", problems)
    latency = next((t for t in targets if isinstance(t, LatencyTarget)), None)
    return latency, [t for t in targets if not isinstance(t, LatencyTarget)]
