"""The mathematics of polarising gates: pure functions.

Guo et al., "GDP: Stabilized Neural Network Pruning via Gates with Differentiable Polarization"
(ICCV 2021). What is ours is marked.
"""

from __future__ import annotations

from torch import Tensor


def smooth_l0(x: Tensor, epsilon: float) -> Tensor:
    """The gate `g(x) = x^2 / (x^2 + epsilon)`: 0 at 0, near 1 from a few `sqrt(epsilon)` on.

    Example:
        >>> import torch
        >>> smooth_l0(torch.tensor([0.0, 0.01, 1.0]), 1e-4)
        tensor([0.0000, 0.5000, 0.9999])
    """
    square = x.square()
    return square / (square + epsilon)


def smooth_l0_slope(x: Tensor, epsilon: float) -> Tensor:
    """`g'(x) = 2 epsilon x / (x^2 + epsilon)^2`; zero at a closed gate, which stays closed."""
    return 2.0 * epsilon * x / (x.square() + epsilon).square()


def soft_threshold(x: Tensor, threshold: Tensor) -> Tensor:
    """`sign(x) max(|x| - threshold, 0)`, the proximal map of `threshold * |x|`: exact zeros."""
    return x.sign() * (x.abs() - threshold).clamp_min(0)


def epsilon_at(fraction: float, *, start: float, end: float, decay: float) -> float:
    """Epsilon at `fraction` of the phase: geometric from start to end over `decay` of it (ours).

    Example:
        >>> [round(epsilon_at(f, start=0.1, end=1e-4, decay=0.6), 6) for f in (0, 0.2, 0.6, 1)]
        [0.1, 0.01, 0.0001, 0.0001]
    """
    done = min(1.0, fraction / decay)
    return float(start * (end / start) ** done)
