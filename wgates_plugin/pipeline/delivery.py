"""From scores to the delivered artefact: settled by measurement, removed exactly, measured again."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from wgates_plugin import closed_loop
from wgates_plugin.calling import copied
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.efficiency.base import Budget, Limit
from wgates_plugin.efficiency.lpnet import LPNet
from wgates_plugin.errors import SurgeryError
from wgates_plugin.latency.base import Measurement
from wgates_plugin.pipeline.job import Job
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies.base import Decision
from wgates_plugin.strategies.budgeting import plan_for_budget
from wgates_plugin.surgery import remove
from wgates_plugin.transforms import Step, apply_steps
from wgates_plugin.verification import carried_out, removal_error

_SECOND_OPINIONS = 2
"""On a file that is over the target. A disturbed minute is no reason to cut a trained network again:
the median of three measurements is, which come with pauses as long as they take. A file under it at
first is taken at that: of networks that need exactly the target more than half are held, 5 in 8."""


_START = "start"


def settle_start(job: Job, scores: Tensor, widths: Sequence[int]) -> tuple[tuple[int, ...], Budget]:
    """Widths measured to keep the target, for a strategy to learn at, and the budget exact there.

    What is cut only after a network has learned, it learned in vain.
    """
    found = job.folder.once(_START, lambda: _measured(job, scores, widths, _START))
    exact, aim = _exact_at_start(job), job.aim_ms
    assert exact is not None
    assert aim is not None
    job.done(
        f"settling the widths to learn at: {len(found['attempts'])} measured, chosen "
        f"{found['measured_ms']:.4g} ms",
        _START,
    )
    # Measured: whatever the bound, nothing is left there to be cautious of.
    return tuple(found["widths"]), Budget((Limit(exact, aim), *job.count_limits()))


def settle(job: Job, decision: Decision) -> PruningPlan:
    """The plan: widths measured to keep the target, the highest scores of each group.

    Those that a strategy learned at are measured already.
    """
    scores, widths = decision.scores, decision.widths

    def compute() -> dict[str, Any]:
        start = job.folder.stage(_START)
        if start is not None and start["held"] and start["widths"] == list(widths):
            return {"widths": list(widths), "attempts": []}
        if job.lpnet is None:
            plan = plan_for_budget(job.space, scores, widths, job.budget(None), job.grid)
            return {"widths": list(plan.widths), "attempts": []}
        return _measured(job, scores, widths, "plan", learned=decision.learned)

    found = job.folder.once("plan", compute)
    plan = PruningPlan.top(
        job.space,
        scores,
        found["widths"],
        strategy=job.settings.strategy,
        **_steps(before=job.before),
    )
    kept = sum(plan.widths) / sum(job.space.full_widths)
    words = f"settling the widths: {kept:.0%} of all channels stay"
    if found["attempts"]:
        last = found["attempts"][-1]["measured_ms"]
        words += f", {len(found['attempts'])} measured, the last at {last:.4g} ms"
    job.done(words, "plan")
    return plan


def _measured(
    job: Job, scores: Tensor, widths: Sequence[int], stage: str, *, learned: bool = False
) -> dict[str, Any]:
    """Widths near `widths` that were measured to keep the latency target, as JSON."""
    settings, target, lpnet = job.settings, job.limits["latency_ms"], _exact_at_start(job)
    assert lpnet is not None
    assert target is not None
    settled = closed_loop.settle(
        job.study,
        lpnet,
        scores,
        widths,
        target_ms=target,
        others=job.count_limits(),
        margin=settings.margin,
        attempts=settings.attempts,
        grid=job.grid,
        seconds=settings.measure_seconds / 2,
        bounded=job.bounded,
        stage=stage,
        learned=learned,
    )
    return dataclasses.asdict(settled)


def _exact_at_start(job: Job) -> LPNet | None:
    """LPNet, exact at the widths that a strategy learned at, if any were settled for it."""
    start = job.folder.stage(_START)
    if start is None or job.lpnet is None:
        return job.lpnet
    return job.lpnet.corrected(start["widths"], start["measured_ms"])


def _steps(**steps: list[Step]) -> dict[str, Any]:
    """What of the steps a plan's note has to tell."""
    return {when: [dict(step) for step in mine] for when, mine in steps.items() if mine}


def remove_channels(
    job: Job, network: nn.Module, plan: PruningPlan
) -> tuple[PruningPlan, nn.Module]:
    """Cut the plan's channels, check that this changed nothing, bring BatchNorm up to date.

    Returns the plan, with what the strategy did after the cut in its note, and the network.

    Raises:
        SurgeryError: gated and removed network differ.
    """

    def compute() -> dict[str, Any]:
        gated = network.cpu()
        smaller = remove(copied(gated), plan, job.example_inputs)
        error = _compare(job, gated, smaller, plan)
        after_steps = job.strategy.finish(smaller, plan, job.example_inputs)
        smaller = apply_steps(smaller, after_steps)
        before = job.accuracy(smaller)
        job.recalibrate(smaller)
        after = job.accuracy(smaller)
        job.folder.save_state("removed.pt", {"network": smaller.state_dict()})
        return {
            "masked_equals_removed": error,
            "accuracy": before,
            "accuracy_recalibrated": after,
            "steps": _steps(after=after_steps),
        }

    facts = job.folder.once("removal", compute, leaves="removed.pt")
    job.done(
        f"removing channels: accuracy {facts['accuracy']:.2%}, with BatchNorm statistics renewed "
        f"{facts['accuracy_recalibrated']:.2%}",
        "removal",
    )
    state = job.folder.load_state("removed.pt")
    assert state is not None
    plan = dataclasses.replace(plan, note={**plan.note, **facts.get("steps", {})})
    return plan, job.rebuilt(plan, state["network"])


def _compare(job: Job, gated: nn.Module, smaller: nn.Module, plan: PruningPlan) -> float:
    """Relative error of the smaller network. Raises SurgeryError where it is more than rounding."""
    error = removal_error(gated, smaller, plan, job.example_inputs)
    if not carried_out(gated, smaller, plan, job.example_inputs, error):
        raise SurgeryError(
            f"network {job.name}: gated and removed network differ by {error:.1e} relative; "
            "the plan was not carried out, please report the network"
        )
    return error


def deliver(
    job: Job, plan: PruningPlan, network: nn.Module, scores: Tensor
) -> tuple[PruningPlan, nn.Module]:
    """Export and measure; while over the target, trim, retrain shortly, and measure again.

    Where nothing is left to trim it ends: measuring the same network until it passes would be
    picking the noise that suits. A network that was trained is not trimmed where no epoch may follow.
    """
    target, settings = job.limits["latency_ms"], job.settings
    attempts = settings.attempts if settings.trim_epochs or not job.total_epochs else 1
    for attempt in range(attempts):
        found = export(job, network, attempt)
        job.done(
            f"exporting and measuring the file: {found['latency_ms']:.4g} ms", f"delivery-{attempt}"
        )
        last = attempt + 1 == attempts
        if target is None or found["latency_ms"] <= target or last:
            break
        narrower = _narrower(job, plan, scores, attempt)
        if narrower.kept == plan.kept:
            break
        network = _trim(job, plan, narrower, network, attempt)
        plan = narrower
    return plan, network


def export(job: Job, network: nn.Module, attempt: int | str) -> dict[str, Any]:
    """Write the artefact and time it, run from its file; the measurement as JSON."""
    return job.folder.once(
        f"delivery-{attempt}", functools.partial(_export_and_measure, job, network)
    )


def _export_and_measure(job: Job, network: nn.Module) -> dict[str, Any]:
    with job.folder.clock("export"):
        job.study.runtime.save(network, job.example_inputs, job.artefact)
    take = functools.partial(job.study.of_file, job.artefact, network, job.settings.measure_seconds)
    target = job.limits["latency_ms"]
    taken = [take()]
    if target is not None and taken[0].latency_ms > target:
        for _ in range(_SECOND_OPINIONS):
            time.sleep(taken[-1].seconds)
            taken.append(take())
    return sorted(taken, key=lambda found: found.latency_ms)[len(taken) // 2].to_json()


def _narrower(job: Job, plan: PruningPlan, scores: Tensor, attempt: int) -> PruningPlan:
    """A plan inside `plan`, by LPNet refitted on what was delivered and exact there."""

    def compute() -> dict[str, Any]:
        assert job.lpnet is not None
        assert job.aim_ms is not None
        assert job.study.visited is not None
        found = Measurement.from_json(job.folder.stage(f"delivery-{attempt}"))
        job.study.visited.add(plan.widths, found)
        exact_here = job.study.refit(job.lpnet).corrected(plan.widths, found.latency_ms)
        budget = Budget((Limit(job.bounded(exact_here), job.aim_ms), *job.count_limits()))
        return {"widths": list(closed_loop.trimmed(plan, scores, budget, job.grid).widths)}

    widths = job.folder.once(f"narrower-{attempt}", compute)["widths"]
    return closed_loop.subset(plan, scores, widths)


def _trim(
    job: Job, plan: PruningPlan, narrower: PruningPlan, network: nn.Module, attempt: int
) -> nn.Module:
    """The network cut further, from `plan` to `narrower`, and trained a little."""
    name = f"trim-{attempt}.pt"
    state = job.folder.load_state(name)
    if state is not None:
        return job.rebuilt(narrower, state["network"])
    _cut_further(job, network, plan, narrower)
    job.folder.save_state(name, {"network": network.state_dict()})
    return network


def _cut_further(job: Job, network: nn.Module, plan: PruningPlan, smaller: PruningPlan) -> None:
    graph = DependencyTrace(network, job.example_inputs)
    space = graph.space(ignored_layers=job.settings.ignored_layers)
    whole, further = copied(network), closed_loop.relative_plan(smaller, plan, space)
    remove(network, further, traced=graph)
    _compare(job, whole, network, further)
    job.recalibrate(network)
    epochs = job.settings.trim_epochs
    if job.total_epochs and epochs:
        training = job.settings.training
        gentle = dataclasses.replace(
            training, learning_rate=training.learning_rate / 10, warmup_epochs=0.0
        )
        with job.folder.clock("fine_tune"):
            job.trainer(network, "trim", epochs, gentle).run(progress=job.progress)
        network.cpu()
