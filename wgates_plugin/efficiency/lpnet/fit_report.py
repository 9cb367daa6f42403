"""How good a fit of LPNet is."""

from __future__ import annotations

from dataclasses import dataclass

from wgates_plugin.efficiency.lpnet.held_out import COVERAGE, HeldOut


@dataclass(frozen=True)
class FitReport:
    """How good a fit is. Errors are relative, each on a measurement its fit had not seen.

    Attributes:
        samples: measurements fitted. held_out: how many of them were predicted without being seen.
        mape: mean absolute error. within_10_percent: share of errors up to 10 %. worst: the largest.
        half_width_90: typical (median) half width of the 90 % interval, relative; None where there
            are too few measurements to promise one. widest_90: the largest of the same.
    """

    samples: int
    held_out: int
    mape: float
    within_10_percent: float
    worst: float
    half_width_90: float | None
    widest_90: float | None = None

    @classmethod
    def of(cls, held_out: HeldOut) -> FitReport:
        errors, half = held_out.errors, None
        if held_out.most_coverage >= COVERAGE:
            half = held_out.quantile(COVERAGE) * held_out.deviation_ms / held_out.predicted_ms
        return cls(
            samples=len(held_out),
            held_out=len(held_out),
            mape=float(errors.mean()),
            within_10_percent=float((errors <= 0.1).double().mean()),
            worst=float(errors.max()),
            half_width_90=None if half is None else float(half.median()),
            widest_90=None if half is None else float(half.max()),
        )
