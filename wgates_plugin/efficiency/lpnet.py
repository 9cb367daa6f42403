"""LPNet: predicts a network's latency from the widths of all its layers.

W-Gates paper (arXiv 2007.02066), section 3.2: an MLP from the vector of widths to measured latency,
trained offline and frozen. That plain form is `structure="mlp"`. The default, `"layers"` (ours), adds
what is known about the network: latency is first a sum of non-negative per-layer terms in MACs and
memory traffic, whose coefficients are learned, and the MLP only corrects that sum.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.counts import LayerShapes
from wgates_plugin.errors import ConfigError, FileFormatError, MeasurementError
from wgates_plugin.files import atomic_path

STRUCTURES = ("layers", "mlp")


@dataclass(frozen=True)
class FitReport:
    """How good a fit is. Errors are relative; `held_out` counts measurements the fit never saw."""

    samples: int
    held_out: int
    mape: float
    within_10_percent: float
    worst: float


class LPNet(nn.Module):
    """Widths (..., G) -> latency in ms (...). An `EfficiencyModel`, differentiable in the widths.

    Make one with `LPNet.fit`, keep it with `save`, read it with `load`.
    """

    name, unit = "latency", "ms"

    def __init__(self, space: ChannelSpace, *, structure: str = "layers", hidden: int = 64) -> None:
        super().__init__()
        if structure not in STRUCTURES:
            raise ConfigError("LPNet", [f"structure `{structure}`: known: {', '.join(STRUCTURES)}"])
        self.structure, self.hidden = structure, hidden
        self.fingerprint = space.fingerprint
        self.report: FitReport | None = None
        self._shapes = LayerShapes(space)
        self._full = torch.tensor(space.full_widths, dtype=torch.float64)
        self._positions = torch.tensor([layer.positions for layer in space.layers]).double()
        self._weighted = torch.tensor([layer.kernel > 0 for layer in space.layers])
        features = self._features(self._full)
        self.register_buffer("feature_scale", features.clamp_min(1e-12))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("correction", torch.ones((), dtype=torch.float64))
        self.feature_scale: Tensor
        self.scale: Tensor
        self.correction: Tensor
        # softplus keeps every per-layer coefficient positive
        self.coefficients = nn.Parameter(torch.zeros(features.shape[-1], dtype=torch.float64))
        self.constant = nn.Parameter(torch.zeros((), dtype=torch.float64))
        with torch.random.fork_rng(devices=[]):  # loading or copying must not move the user's RNG
            self.mlp = nn.Sequential(
                nn.Linear(len(space.groups), hidden),
                nn.SiLU(),
                nn.Linear(hidden, hidden),
                nn.SiLU(),
                nn.Linear(hidden, 1),
            ).double()

    def _features(self, widths: Tensor) -> Tensor:
        """Per-layer work: MACs, then values read and written, (..., 2 * L)."""
        macs = self._shapes.macs_per_layer(widths)
        traffic = self._shapes.inputs(widths) + self._shapes.outputs(widths)
        traffic = traffic * self._positions
        return torch.cat([macs[..., self._weighted], traffic[..., self._weighted]], dim=-1)

    def forward(self, widths: Tensor) -> Tensor:
        features = self._features(widths) / self.feature_scale
        return self.correction * self._predict(widths, features)

    def _predict(self, widths: Tensor, features: Tensor) -> Tensor:
        residual = self.mlp(2.0 * widths.double() / self._full - 1.0).squeeze(-1)
        if self.structure == "mlp":
            return self.scale * torch.exp(residual)
        work = features @ nn.functional.softplus(self.coefficients)
        base = work + nn.functional.softplus(self.constant)
        return self.scale * base * torch.exp(0.5 * torch.tanh(residual))

    @classmethod
    def fit(
        cls,
        space: ChannelSpace,
        widths: Sequence[Sequence[int]],
        latencies_ms: Sequence[float],
        *,
        structure: str = "layers",
        hidden: int = 64,
        steps: int = 1500,
        seed: int = 0,
        held_out_share: float = 0.2,
    ) -> LPNet:
        """Train on (widths, ms) pairs; the error is taken on pairs held out, then all are used.

        Raises:
            MeasurementError: too few or useless measurements.
        """
        inputs = torch.tensor(widths, dtype=torch.float64)
        targets = torch.tensor(latencies_ms, dtype=torch.float64)
        _check_samples(space, inputs, targets)
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
        held = max(1, round(held_out_share * len(targets)))
        trial = cls._train(
            space, inputs[order[held:]], targets[order[held:]], structure, hidden, steps, seed
        )
        errors = trial.relative_errors(inputs[order[:held]], targets[order[:held]]).abs()
        final = cls._train(space, inputs, targets, structure, hidden, steps, seed)
        final.report = FitReport(
            len(targets),
            held,
            float(errors.mean()),
            float((errors <= 0.1).double().mean()),
            float(errors.max()),
        )
        return final

    @classmethod
    def _train(
        cls,
        space: ChannelSpace,
        inputs: Tensor,
        targets: Tensor,
        structure: str,
        hidden: int,
        steps: int,
        seed: int,
    ) -> LPNet:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(space, structure=structure, hidden=hidden)
        with torch.no_grad():
            model.scale.copy_(targets.mean())
            count = model.coefficients.numel()
            share = targets.new_tensor(1.0 / count)
            model.coefficients.copy_(torch.log(torch.expm1(share)).expand(count))
            model.constant.fill_(float(torch.log(torch.expm1(targets.new_tensor(0.1)))))
            model.mlp[-1].weight.zero_()  # type: ignore[operator]
            model.mlp[-1].bias.zero_()  # type: ignore[operator]
        return model._descend(inputs, targets, steps=steps, rate=1.0)

    def _descend(self, inputs: Tensor, targets: Tensor, *, steps: int, rate: float) -> LPNet:
        """Minimise the mean squared log error over all pairs at once."""
        self.requires_grad_(True)
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": [self.coefficients, self.constant],
                    "lr": 3e-2 * rate,
                    "weight_decay": 0.0,
                },
                {"params": self.mlp.parameters(), "lr": 3e-3 * rate, "weight_decay": 3e-2},
            ]
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        features = self._features(inputs) / self.feature_scale
        for _ in range(steps):
            loss = (self._predict(inputs, features).log() - targets.log()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return self.requires_grad_(False).eval()

    def refit(
        self, widths: Sequence[Sequence[int]], latencies_ms: Sequence[float], *, steps: int = 300
    ) -> LPNet:
        """A copy trained a little further on all pairs, after new ones were measured."""
        inputs = torch.tensor(widths, dtype=torch.float64)
        targets = torch.tensor(latencies_ms, dtype=torch.float64)
        _check_samples(self._shapes.space, inputs, targets)
        twin = self._twin()
        twin.correction.fill_(1.0)
        return twin._descend(inputs, targets, steps=steps, rate=0.3)

    def _twin(self) -> LPNet:
        twin = LPNet(self._shapes.space, structure=self.structure, hidden=self.hidden)
        twin.load_state_dict(self.state_dict())
        twin.report = self.report
        return twin.requires_grad_(False).eval()

    @torch.no_grad()
    def relative_errors(self, widths: Tensor, latencies_ms: Tensor) -> Tensor:
        """(predicted - measured) / measured, shape (N,)."""
        return self(widths) / latencies_ms - 1.0

    def corrected(self, widths: Sequence[int], measured_ms: float) -> LPNet:
        """A copy scaled so that it is exact at `widths`: for the neighbourhood of one network."""
        twin = self._twin()
        predicted = float(self(torch.tensor(widths, dtype=torch.float64)))
        twin.correction.mul_(measured_ms / predicted)
        return twin

    def save(self, path: str | Path) -> None:
        """Write weights and description to one safetensors file, atomically."""
        about = {
            "kind": "lpnet",
            "version": 1,
            "fingerprint": self.fingerprint,
            "structure": self.structure,
            "hidden": self.hidden,
            "report": asdict(self.report) if self.report else None,
            "space": self._shapes.space.to_json(),
        }
        tensors = {name: tensor.contiguous().clone() for name, tensor in self.state_dict().items()}
        with atomic_path(path) as part:
            save_file(tensors, str(part), metadata={"about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path, *, space: ChannelSpace | None = None) -> LPNet:
        """Read what `save` wrote; with `space`, insist that it is for that network.

        Raises:
            FileFormatError: missing, corrupt, of another kind, or for another network.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                about: dict[str, Any] = json.loads((file.metadata() or {}).get("about", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise FileFormatError(
                f"LPNet `{path}`: cannot be read ({error}); it is missing, corrupt or cut off, fit "
                "it again"
            ) from error
        if not isinstance(about, dict) or (about.get("kind"), about.get("version")) != ("lpnet", 1):
            raise FileFormatError(f"LPNet `{path}`: the file is no LPNet of a known version")
        fields = ("fingerprint", "structure", "hidden", "report", "space")
        if missing := [name for name in fields if name not in about]:
            raise FileFormatError(f"LPNet `{path}`: lacks {', '.join(missing)}; fit it again")
        if space is not None and about["fingerprint"] != space.fingerprint:
            raise FileFormatError(
                f"LPNet `{path}`: fitted for another network (fingerprint "
                f"{about['fingerprint']}, this one has {space.fingerprint}); fit one for this network"
            )
        own = space or ChannelSpace.from_json(about["space"])
        try:
            model = cls(own, structure=about["structure"], hidden=about["hidden"])
            model.load_state_dict(tensors)
            model.report = FitReport(**about["report"]) if about["report"] else None
        except (RuntimeError, TypeError, ValueError) as error:
            raise FileFormatError(
                f"LPNet `{path}`: description and weights do not fit together ({error}); fit it again"
            ) from error
        return model.requires_grad_(False).eval()


def _check_samples(space: ChannelSpace, inputs: Tensor, targets: Tensor) -> None:
    if inputs.dim() != 2 or inputs.shape[1] != len(space.groups):
        raise MeasurementError(
            f"LPNet: widths of shape {tuple(inputs.shape)}, needed (N, {len(space.groups)})"
        )
    if len(targets) < 8 or len(targets) != len(inputs):
        raise MeasurementError(f"LPNet: {len(targets)} measurements; at least 8 are needed")
    if not (torch.isfinite(targets).all() and (targets > 0).all()):
        raise MeasurementError("LPNet: a measured latency is not a positive finite number")
    if (inputs == inputs[0]).all():
        raise MeasurementError(
            "LPNet: all measurements are of the same widths; sample different ones"
        )
