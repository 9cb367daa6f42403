"""Second-order Gaussian knockoffs of images, from a shrunk covariance of low rank plus white noise.

Candès et al., "Panning for gold: model-X knockoffs" (JRSS B 2018), section 3.4.2: for X ~ N(mu, C)
the knockoff given x is drawn from N(x - S C^-1 (x - mu), 2 S - S C^-1 S), which makes x and its
knockoff alike in mean and covariance, their cross-covariance C - S. S is free as long as
0 <= S <= 2 C. C comes from Ledoit and Wolf, "A well-conditioned estimator" (2004), and S shares its
eigenvectors, so that images of 3 x 224 x 224 need no matrix larger than (images, pixels).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

KINDS = ("image", "pixel")


@dataclass(frozen=True, eq=False)
class GaussianKnockoffs:
    """Images (N, *shape) -> knockoffs (N, *shape); what is random comes from torch's own state.

    Attributes:
        mean: (pixels,). basis: (pixels, rank), orthonormal.
        variances: (rank,) eigenvalues of the covariance along the basis. noise: all other ones.
        shares: (rank,) eigenvalues of S over those of the covariance, in (0, 2].
        noise_share: the same for all other directions.
        lowest, highest: range of the training images, which knockoffs are clamped to (ours).
    """

    mean: Tensor
    basis: Tensor
    variances: Tensor
    noise: float
    shares: Tensor
    noise_share: float
    lowest: float
    highest: float

    def to(self, device: torch.device) -> GaussianKnockoffs:
        """The same model there, so that no call has to move it."""
        tensors = ("mean", "basis", "variances", "shares")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        here = self.to(images.device)
        basis, mean, variances, shares = here.basis, here.mean, here.variances, here.shares
        centred = images.flatten(1).float() - mean
        along = centred @ basis
        drawn = torch.randn_like(centred)
        drawn_along = drawn @ basis
        # What S does along a direction: shrink by its share of the variance, fill up with noise.
        inner = (1 - shares) * along + _spread(variances, shares) * drawn_along
        white = torch.tensor(self.noise_share, device=images.device)
        outer_scale = _spread(torch.tensor(self.noise, device=images.device), white)
        outer = (1 - white) * (centred - along @ basis.T)
        outer = outer + outer_scale * (drawn - drawn_along @ basis.T)
        made = mean + inner @ basis.T + outer
        return made.clamp(self.lowest, self.highest).view_as(images).to(images.dtype)


def _spread(variances: Tensor, shares: Tensor) -> Tensor:
    """Standard deviation of what is drawn: sqrt(2 s - s^2 / v) with s = share * v."""
    return (variances * (2 * shares - shares**2).clamp_min(0)).sqrt()


@torch.no_grad()
def fit_gaussian(images: Tensor, *, kind: str = "image", rank: int = 256) -> GaussianKnockoffs:
    """Fit to training images (N, *shape), N >= 2.

    Args:
        kind: what S is. "image" takes S = C: all pixels of an image are one variable (a group
            knockoff), so its knockoff is a new image that shares nothing with it, like those of the
            generator in the paper's code. "pixel" is the equicorrelated S = s I, with s = min(1 *
            mean variance, 2 * least eigenvalue): every pixel is a variable, and neighbours that
            nearly determine it leave its knockoff hardly another choice than to be like it.
        rank: most directions kept; the variance of the others is spread evenly (ours).
    """
    flat = images.flatten(1).float()
    count, pixels = flat.shape
    mean = flat.mean(0)
    centred = flat - mean
    # Eigenvectors of the covariance through the (images, images) Gram matrix.
    gram = (centred @ centred.T).double() / count
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    # Centred images span one direction less than there are of them; of that one only rounding is left.
    spanned = min(count - 1, int((values > values[0].clamp_min(1e-30) * 1e-9).sum()))
    rank = min(rank, pixels, spanned)
    lengths = (count * values[:rank].clamp_min(1e-30)).sqrt()
    basis = centred.T @ (vectors[:, :rank] / lengths).float()
    average = float(values.sum()) / pixels
    shrinkage = ledoit_wolf(gram, pixels)
    kept = float(values[:rank].sum())
    rest = (average * pixels - kept) / max(1, pixels - rank) if pixels > rank else average
    variances = (1 - shrinkage) * values[:rank] + shrinkage * average
    noise = max((1 - shrinkage) * max(rest, 0.0) + shrinkage * average, 1e-12)
    if kind == "image":
        shares, noise_share = torch.ones(rank).double(), 1.0
    else:
        least = noise if pixels > rank else float(variances.min())
        s = min(average, 2 * least)
        shares, noise_share = (s / variances.clamp_min(1e-12)).clamp(max=2), min(2.0, s / noise)
    return GaussianKnockoffs(
        mean,
        basis,
        variances.float(),
        noise,
        shares.float(),
        noise_share,
        float(images.min()),
        float(images.max()),
    )


def ledoit_wolf(gram: Tensor, pixels: int) -> float:
    """The shrinkage intensity of Ledoit and Wolf (2004), from inner products alone.

    Args:
        gram: inner products of the centred images over their number (N, N).
    """
    count = gram.shape[0]
    average = float(gram.trace()) / pixels
    squared = float((gram**2).sum())  # squared Frobenius norm of the sample covariance
    distance = squared / pixels - average**2
    fourth = float((gram.diagonal() * count).square().sum()) / pixels
    error = min((fourth / count - squared / pixels) / count, distance)
    return 0.0 if distance <= 0 else max(0.0, error / distance)
