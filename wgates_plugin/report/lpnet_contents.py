"""What there is to say about a fitted LPNet, as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.counts import LayerShapes
from wgates_plugin.efficiency.lpnet import LPNet, weighted_names
from wgates_plugin.efficiency.samples.file import SampleFile
from wgates_plugin.efficiency.sampling import SamplingCost

KIND, VERSION = "wgates-lpnet-report", 1

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
CURVES = 6
POINTS = 160
SHARES = (1.0, 0.75, 0.5, 0.25)
"""Input widths, over the full one, that a layer's curve is drawn at."""


@torch.no_grad()
def contents(
    lpnet: LPNet,
    file: SampleFile,
    *,
    name: str,
    identity: Mapping[str, Any],
    cost: SamplingCost | None = None,
) -> dict[str, Any]:
    """Everything the page shows. `identity` is the runtime's; `cost` that of the sampling."""
    held_out = lpnet.held_out
    sampled = cost is not None and cost.inference_seconds > 0
    return {
        "kind": KIND,
        "version": VERSION,
        "name": name,
        "structure": lpnet.structure,
        "identity": dict(identity),
        "environment": file.environment,
        "sources": _sources(file),
        "errors": None if lpnet.report is None else asdict(lpnet.report),
        "profiled": lpnet.profiled,
        "set_aside": sum(file.set_aside().values()),
        "measured_again": len(file.rejected),
        "share_in_inference": cost.share_in_inference if cost is not None and sampled else None,
        "held_out": held_out.rows("held out"),
        "coverage": [{"nominal": x, "empirical": held_out.covered(x)} for x in LEVELS],
        "layers": layer_errors(lpnet) if lpnet.profiled else [],
        "curves": layer_curves(lpnet, file) if lpnet.profiled else [],
    }


def _sources(file: SampleFile) -> list[dict[str, Any]]:
    aside = file.set_aside()
    return [
        {
            "id": source.id,
            "worker": source.worker,
            "samples": sum(sample.source == source.id for sample in file.samples),
            "used": source.id not in aside,
            "reference_ms": source.reference_ms,
            "reference": source.reference.get("network", "?"),
            "device_name": source.environment.get("device_name") or source.environment.get("cpu"),
        }
        for source in file.sources.values()
    ]


def layer_errors(lpnet: LPNet) -> list[dict[str, Any]]:
    """Per layer, quantiles of (predicted unseen - profiled) over the layer's mean time."""
    predicted, profiled = lpnet.held_out_layers()
    scale = profiled.mean(0).clamp_min(1e-12)
    residuals = (predicted - profiled) / scale
    ends = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    rows = torch.quantile(residuals, ends, dim=0).T.tolist()
    share = (scale / scale.sum()).tolist()
    return [
        {"layer": name, "share": part, "quantiles": row}
        for name, part, row in zip(weighted_names(lpnet.space), share, rows, strict=True)
    ]


def layer_curves(lpnet: LPNet, file: SampleFile) -> list[dict[str, Any]]:
    """Latency over the output width of the layers that take longest: predicted and profiled."""
    space, names = lpnet.space, weighted_names(lpnet.space)
    outs, ins = _groups_of_layers(space)
    full = torch.tensor(space.full_widths, dtype=torch.float64)
    order = lpnet.profile_ms(full).argsort(descending=True).tolist()
    curves = []
    for layer in [index for index in order if outs[index] is not None][:CURVES]:
        group, inputs = outs[layer], [g for g in ins[layer] if g != outs[layer]]
        assert group is not None
        shares = SHARES if inputs else SHARES[:1]
        allowed = space.groups[group].allowed_widths(1)
        shown = allowed[:: max(1, len(allowed) // POINTS)]
        lines = []
        for share in shares:
            rows = full.repeat(len(shown), 1)
            for other in inputs:
                rows[:, other] = (share * full[other]).round().clamp_min(1.0)
            rows[:, group] = torch.tensor(shown, dtype=torch.float64)
            times = lpnet.profile_ms(rows)[:, layer].tolist()
            lines.append({"share": share, "points": [*zip(shown, times, strict=True)]})
        curves.append(
            {
                "layer": names[layer],
                "group": space.groups[group].name,
                "lines": lines,
                "profiled": _profiled(file, names[layer], group, inputs, full, shares),
            }
        )
    return curves


def _profiled(
    file: SampleFile,
    layer: str,
    group: int,
    inputs: list[int],
    full: Tensor,
    shares: tuple[float, ...],
) -> list[dict[str, float]]:
    """Profiled times of a layer; `share` is the curve that its input width is nearest to."""
    found = []
    for sample in file.usable:
        if not sample.layers_ms or layer not in sample.layers_ms:
            continue
        mine = sum(sample.widths[g] / float(full[g]) for g in inputs) / max(1, len(inputs))
        nearest = min(shares, key=lambda share: abs(share - mine))
        found.append(
            {
                "width": float(sample.widths[group]),
                "ms": float(sample.layers_ms[layer]),
                "share": nearest,
            }
        )
    return found


def _groups_of_layers(space: ChannelSpace) -> tuple[list[int | None], list[list[int]]]:
    """Per layer with a weight: the one group of its outputs (None if none or several), and those
    of its inputs; found by narrowing one group at a time."""
    shapes = LayerShapes(space)
    weighted = torch.tensor([layer.kernel > 0 for layer in space.layers])
    full = torch.tensor(space.full_widths, dtype=torch.float64)
    rows = full.repeat(len(full), 1) - 0.5 * torch.diag(full)
    out_moves = (shapes.outputs(rows) != shapes.outputs(full))[:, weighted].T
    in_moves = (shapes.inputs(rows) != shapes.inputs(full))[:, weighted].T
    outs = [row.nonzero()[:, 0].tolist() for row in out_moves]
    return (
        [found[0] if len(found) == 1 else None for found in outs],
        [row.nonzero()[:, 0].tolist() for row in in_moves],
    )
