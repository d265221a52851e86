"""The domain shift u ~ N(mu, M M^T) of one latent (paper, sections 3.2 and 4.1).

Clean latents are z_x ~ N(0, I); those of a degraded domain are z_y = z_x + u, with u independent
of z_x, hence z_y ~ N(mu, I + M M^T). The same mu and M hold at every position.

Domains are numbered: 0 is the clean one, i + 1 the i-th degraded one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deflow_aug.flow.base import pixels, sum_per_image

PAIRED_JITTER = 1e-6
"""Added to Sigma's diagonal in the conditional density, which a singular Sigma does not have."""


class DomainShift(nn.Module):
    """mu and M of every degraded domain, for a latent of ``channels`` channels.

    Args:
        channels: channels of the latent.
        domains: number of degraded domains.
        init: M starts at ``init`` times the identity (at zero it would never move).
    """

    def __init__(self, channels: int, domains: int, init: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(domains, channels))
        self.factor = nn.Parameter(torch.zeros(domains, channels, channels))
        with torch.no_grad():
            self.factor.diagonal(dim1=-2, dim2=-1).fill_(init)

    def means(self) -> Tensor:
        """mu of every domain, the clean one's (zero) first: [1 + domains, C]."""
        return torch.cat([torch.zeros_like(self.mean[:1]), self.mean])

    def factors(self) -> Tensor:
        """M of every domain, the clean one's (zero) first: [1 + domains, C, C]."""
        return torch.cat([torch.zeros_like(self.factor[:1]), self.factor])

    def log_prob(self, z: Tensor, domain: Tensor) -> Tensor:
        """Marginal log-density in nats, [B] (eq. 4): N(0, I) or N(mu, I + Sigma).

        Args:
            z: latents, [B, C, H, W].
            domain: the domain number of each, int64 [B].
        """
        factors = self.factors()
        covariance = _identity(factors) + factors @ factors.mT
        return _gaussian(z, domain, self.means(), covariance)

    def conditional_log_prob(self, z_degraded: Tensor, z_clean: Tensor, domain: Tensor) -> Tensor:
        """ln N(z_y; z_x + mu, Sigma) in nats, [B] (eq. 5), for paired images.

        Sigma may be singular; ``PAIRED_JITTER`` is added to its diagonal, and the factorisation
        runs in float64 (its condition number can reach 1 / PAIRED_JITTER).

        Args:
            z_degraded, z_clean: latents, [B, C, H, W].
            domain: the number of the degraded domain of each, int64 [B], no zeros.
        """
        factors = self.factors().double()
        covariance = PAIRED_JITTER * _identity(factors) + factors @ factors.mT
        difference = (z_degraded - z_clean).double()
        return _gaussian(difference, domain, self.means().double(), covariance).to(z_clean.dtype)

    def degrade(self, z: Tensor, noise: Tensor, domain: Tensor, temperature: Tensor) -> Tensor:
        """z + tau * (mu + M noise) (eq. 40).

        Args:
            z: clean latents, [B, C, H, W].
            noise: standard normal draws of the same shape.
            domain: domain numbers, int64 [B].
            temperature: tau, [B].
        """
        u = self.means()[domain][:, :, None, None] + _matmul(self.factors()[domain], noise)
        return z + temperature[:, None, None, None] * u

    def restore(self, z: Tensor, noise: Tensor | None, domain: Tensor) -> Tensor:
        """A draw of z_x given z_y, which is N((I+Sigma)^-1 (z_y - mu), Sigma (I+Sigma)^-1).

        Args:
            z: degraded latents, [B, C, H, W].
            noise: standard normal draws of the same shape, or None for the posterior mean.
            domain: domain numbers, int64 [B].
        """
        factors = self.factors()
        identity = _identity(factors)
        precision = torch.cholesky_inverse(torch.linalg.cholesky(identity + factors @ factors.mT))
        centred = z - self.means()[domain][:, :, None, None]
        mean = _matmul(precision[domain], centred)
        if noise is None:
            return mean
        # Sigma (I + Sigma)^-1 = M (I + M^T M)^-1 M^T = (M L^-T)(M L^-T)^T with L L^T = I + M^T M:
        # a square root of the posterior covariance that exists for every M, zero included.
        lower = torch.linalg.cholesky(identity + factors.mT @ factors)
        root = torch.linalg.solve_triangular(lower, factors.mT, upper=False).mT
        return mean + _matmul(root[domain], noise)


def _gaussian(z: Tensor, domain: Tensor, means: Tensor, covariance: Tensor) -> Tensor:
    """ln N(z; means[domain], covariance[domain]) summed over positions, [B]."""
    lower = torch.linalg.cholesky(covariance)
    whitening = torch.linalg.solve_triangular(lower, _identity(covariance), upper=False)
    half_logdet = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    white = _matmul(whitening[domain], z - means[domain][:, :, None, None])
    constant = half_logdet[domain] + 0.5 * z.shape[1] * math.log(2 * math.pi)
    return -0.5 * sum_per_image(white.square()) - pixels(z) * constant


def _matmul(matrices: Tensor, z: Tensor) -> Tensor:
    """matrices[b] @ z[b] at every position."""
    return (matrices @ z.flatten(2)).unflatten(2, z.shape[-2:])


def _identity(like: Tensor) -> Tensor:
    identity = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    return identity.expand(like.shape)


@dataclass(frozen=True)
class ShiftHealth:
    """Whether a shift carries randomness: |mu|, and the spectrum of Sigma = M M^T.

    Clean latents have unit variance; an eigenvalue is the variance added to them.
    """

    channels: int
    mean_norm: float
    eigenvalues: tuple[float, ...]

    @classmethod
    def of(cls, shift: DomainShift, domain: int) -> ShiftHealth:
        """The health of the domain with this number (1 for the first degraded one)."""
        singular = torch.linalg.svdvals(shift.factors()[domain].detach().double())
        return cls(
            singular.numel(),
            float(shift.means()[domain].detach().norm()),
            tuple(singular.square().tolist()),
        )

    @property
    def collapsed(self) -> bool:
        """No direction gets more than a thousandth of the clean latents' variance."""
        return self.eigenvalues[0] < 1e-3

    def __str__(self) -> str:
        middle = self.eigenvalues[self.channels // 2]
        return (
            f"{self.channels} channels, |mu| {self.mean_norm:.3f}, eigenvalues of Sigma "
            f"{self.eigenvalues[0]:.3g} (largest), {middle:.3g} (median), "
            f"{self.eigenvalues[-1]:.3g} (smallest)"
        )
