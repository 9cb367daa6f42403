"""Weight unification of the delivered network, when it is asked for.

It comes after the last trim: cutting channels and retraining would break the structure, and with the
structure fixed nothing may move any more. Shapes do not change, so what was settled by measurement
holds; the file is still exported and measured again, and that measurement decides.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from wgates_plugin.calling import copied
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.pipeline import delivery
from wgates_plugin.pipeline.job import Job
from wgates_plugin.plan import PruningPlan
from wgates_plugin.transforms.unification import (
    Unified,
    cut_dead,
    dead_channels,
    layer_grids,
    load_unified,
)
from wgates_plugin.transforms.unification import (
    unify as unify_network,
)
from wgates_plugin.transforms.unification.file import zstandard

FILE = "unified.wgu"
"""In the run folder: the delivered weights, compactly; `load_unified` reads them."""

STAGE = "unification"
_PLAN = "unified-plan.json"


def check(job: Job) -> None:
    """Refuse before anything is trained what could not be done afterwards.

    Raises:
        ConfigError: the settings do not fit the network. MissingExtraError: no `zstandard`.
    """
    if job.settings.unification is not None:
        zstandard()
        layer_grids(job.dense, job.settings.unification)


def unify(job: Job, plan: PruningPlan, network: nn.Module) -> tuple[PruningPlan, nn.Module]:
    """Unify the network, hand channels that became all zero to the plan, store, export, measure.

    Layers that pruning left smaller than a block are left alone. Returns plan and network as they
    were given when no unification is asked for.
    """
    settings = job.settings.unification
    if settings is None:
        return plan, network
    unified = None
    if job.folder.stage(STAGE) is None:
        training = job.settings.training
        with job.folder.clock("unification"):
            unified = unify_network(
                network,
                job.train_loader,
                settings=settings,
                training=training,
                loss=job.loss,
                teacher=job.teacher(training),
                fabric=job.fabric,
                seed=job.settings.seed,
                checkpoints=job.folder,
                skip_small=True,
                recalibration_images=job.settings.recalibration_images,
                progress=job.progress,
            )
    facts = job.folder.once(STAGE, lambda: _finish(job, plan, network, unified))
    job.done(
        f"unifying weights: {facts['bytes']['unified']} bytes, after "
        f"{facts['bytes']['pruned']} packed without it; accuracy {facts['accuracy']:.2%}",
        STAGE,
    )
    plan = PruningPlan.load(job.folder.stage_file(_PLAN), space=job.space)
    network = job.rebuilt(plan, load_unified(job.folder.file(FILE)))
    delivery.export(job, network, "unified")
    return plan, network


def _finish(
    job: Job, plan: PruningPlan, before: nn.Module, unified: Unified | None
) -> dict[str, Any]:
    """Cut dead channels, write the file; what the report should say."""
    assert unified is not None
    accuracy_before, whole = job.accuracy(before), plan
    # Without pruning the widths stay too. Steps after the cut name parts of the network as the
    # strategy left it, so that it stays as it is.
    if job.folder.stage("grid") is not None and not plan.note.get("after"):
        plan, unified = _hand_over(job, plan, unified)
    size = unified.save(job.folder.file(FILE))
    plan.save(job.folder.stage_file(_PLAN))
    return {
        "bytes": {
            "unified": size,
            "pruned": _packed(before.state_dict()),
            "dense": _packed(job.dense.state_dict()),
        },
        "file": FILE,
        "accuracy_before": accuracy_before,
        "accuracy": job.accuracy(unified.network),
        "channels_removed": sum(whole.widths) - sum(plan.widths),
        **unified.facts,
        "training": unified.history,
    }


def _hand_over(job: Job, plan: PruningPlan, unified: Unified) -> tuple[PruningPlan, Unified]:
    """Give channels without effect to the plan, and cut them."""
    network = copied(unified.network)
    trace = DependencyTrace(network, job.example_inputs)
    space = trace.space(ignored_layers=job.settings.ignored_layers)
    floors = {group.name: group.floor for group in job.space.groups}
    groups = (dataclasses.replace(g, floor=floors.get(g.name, g.channels)) for g in space.groups)
    space = dataclasses.replace(space, groups=tuple(groups))
    dead = dead_channels(network, space, job.example_inputs, grid=job.grid)
    if dead.widths == space.full_widths:
        return plan, unified
    return plan.compose(dead), cut_dead(unified, dead, job.example_inputs)


def _packed(state: dict[str, Tensor]) -> int:
    """Bytes of a state dict as safetensors under Zstandard, what anybody could have."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    return len(zstandard().ZstdCompressor(level=19).compress(save(plain)))
