"""The domain shift u ~ N(mu, M M^T) of one latent (paper, sections 3.2 and 4.1).

Clean latents are z_x ~ N(0, I); those of a degraded domain are z_y = z_x + u, with u independent
of z_x, hence z_y ~ N(mu, I + M M^T). The same mu and M hold at every position.

Domains are numbered: 0 is the clean one, i + 1 the i-th degraded one. Between them lie mixed ones:
mu = sum_d w_d mu_d and Sigma = sum_d w_d M_d M_d^T, with weights w_d that sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn

from deflow_aug.flow.base import pixels, sum_per_image

PAIRED_JITTER = 1e-6
"""Added to Sigma's diagonal in the conditional density, which a singular Sigma does not have."""


def psd_root(covariance: Tensor) -> Tensor:
    """The symmetric root R of the positive part of symmetric matrices [..., C, C]; R R = part.

    Negative eigenvalues count as zero. Computed and returned in float64.
    """
    covariance = covariance.double()
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    return vectors * values.clamp(min=0).sqrt()[..., None, :] @ vectors.mT


class DomainShift(nn.Module):
    """mu and M of every degraded domain, for a latent of ``channels`` channels.

    Args:
        channels: channels of the latent.
        domains: number of degraded domains.
        init: M starts at ``init`` times the identity (at zero it would never move).
        kind: what is learned, see ``ModelConfig.shift``. "full": mu and any M; "diagonal": mu and
            the diagonal of M; "zero": mu, with M = 0; "fitted": nothing, mu = 0 and M = 0 until
            :meth:`assign` gives them values.
    """

    mean: Tensor
    factor: Tensor

    def __init__(self, channels: int, domains: int, init: float, kind: str = "full") -> None:
        super().__init__()
        self.kind = kind
        mean = torch.zeros(domains, channels)
        if kind == "fitted":  # buffers: saved and loaded, but neither trained nor averaged
            self.register_buffer("mean", mean)
            self.register_buffer("factor", torch.zeros(domains, channels, channels))
            return
        self.mean = nn.Parameter(mean)
        if kind == "full":
            factor = torch.zeros(domains, channels, channels)
            # On the meta device, where weights to be loaded are laid out, all but the plainest
            # operations make PyTorch import for a second.
            if not factor.is_meta:
                factor.diagonal(dim1=-2, dim2=-1).fill_(init)
            self.factor = nn.Parameter(factor)
        elif kind == "diagonal":
            self.factor = nn.Parameter(torch.full((domains, channels), init))
        elif kind != "zero":
            raise ValueError(f"no kind of shift is called {kind!r}")

    def means(self) -> Tensor:
        """mu of every domain, the clean one's (zero) first: [1 + domains, C]."""
        return torch.cat([torch.zeros_like(self.mean[:1]), self.mean])

    def factors(self) -> Tensor:
        """M of every domain, the clean one's (zero) first: [1 + domains, C, C]."""
        if self.kind == "zero":
            return torch.zeros_like(torch.diag_embed(self.means()))
        factor = torch.diag_embed(self.factor) if self.kind == "diagonal" else self.factor
        return torch.cat([torch.zeros_like(factor[:1]), factor])

    @torch.no_grad()
    def assign(self, domain: int, mean: Tensor, factor: Tensor) -> None:
        """Set mu [C] and M [C, C] of the degraded domain with this number (1 for the first).

        Of a "diagonal" shift M becomes the root of the diagonal of M M^T; of a "zero" one it stays
        zero.
        """
        if not 1 <= domain <= len(self.mean):
            raise ValueError(f"degraded domains go from 1 to {len(self.mean)}, got {domain}")
        self.mean[domain - 1].copy_(mean)
        if self.kind == "diagonal":
            self.factor[domain - 1].copy_(factor.square().sum(-1).sqrt())
        elif self.kind != "zero":
            self.factor[domain - 1].copy_(factor)

    def mixed(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """mu [B, C] and a root of Sigma [B, C, C] of mixed domains, in the parameters' dtype.

        The root is the symmetric one; where one domain has all the weight it is that domain's M.

        Args:
            weights: of every domain, the clean one first; rows that sum to 1, [B, 1 + domains].
        """
        means, factors, weights = self.means(), self.factors(), weights.double()
        exact = factors.double()
        covariance = torch.einsum("bd,dij->bij", weights, exact @ exact.mT)
        largest, index = weights.max(1)
        pure = (largest == 1)[:, None, None]
        root = torch.where(pure, exact[index], psd_root(covariance))
        return (weights @ means.double()).to(means.dtype), root.to(factors.dtype)

    def _chosen(self, domain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means [R, C] and factors [R, C, C], and which row each image takes, int64 [B]."""
        if not domain.is_floating_point():
            return self.means(), self.factors(), domain
        weights, rows = torch.unique(domain, dim=0, return_inverse=True)
        return *self.mixed(weights), rows

    def log_prob(self, z: Tensor, domain: Tensor) -> Tensor:
        """Marginal log-density in nats, [B] (eq. 4): N(0, I) or N(mu, I + Sigma).

        Args:
            z: latents, [B, C, H, W].
            domain: the domain number of each, int64 [B].
        """
        # In float64: of a large M, I + M M^T is not positive definite any more when rounded.
        factors = self.factors().double()
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
            domain: domain numbers, int64 [B], or weights of all domains (see :meth:`mixed`).
            temperature: tau, [B].
        """
        means, factors, row = self._chosen(domain)
        u = means[row][:, :, None, None] + _matmul(factors[row], noise)
        return z + temperature[:, None, None, None] * u

    def restore(self, z: Tensor, noise: Tensor | None, domain: Tensor) -> Tensor:
        """A draw of z_x given z_y, which is N((I+Sigma)^-1 (z_y - mu), Sigma (I+Sigma)^-1).

        Args:
            z: degraded latents, [B, C, H, W].
            noise: standard normal draws of the same shape, or None for the posterior mean.
            domain: domain numbers, int64 [B], or weights of all domains (see :meth:`mixed`).
        """
        means, factors, row = self._chosen(domain)
        identity = _identity(factors)
        precision = torch.cholesky_inverse(torch.linalg.cholesky(identity + factors @ factors.mT))
        centred = z - means[row][:, :, None, None]
        mean = _matmul(precision[row], centred)
        if noise is None:
            return mean
        # Sigma (I + Sigma)^-1 = M (I + M^T M)^-1 M^T = (M L^-T)(M L^-T)^T with L L^T = I + M^T M:
        # a square root of the posterior covariance that exists for every M, zero included.
        lower = torch.linalg.cholesky(identity + factors.mT @ factors)
        root = torch.linalg.solve_triangular(lower, factors.mT, upper=False).mT
        return mean + _matmul(root[row], noise)


def _gaussian(z: Tensor, domain: Tensor, means: Tensor, covariance: Tensor) -> Tensor:
    """ln N(z; means[domain], covariance[domain]) summed over positions, [B], in z's dtype.

    The covariances [D, C, C] are factored in their own dtype. nan where they are not positive
    definite: of a step in training that is a bad one, in one process of several as in all; an
    exception would leave the others waiting.
    """
    lower, failed = torch.linalg.cholesky_ex(covariance)
    lower = lower.masked_fill((failed != 0)[:, None, None], math.nan)
    whitening = torch.linalg.solve_triangular(lower, _identity(covariance), upper=False).to(z.dtype)
    half_logdet = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1).to(z.dtype)
    white = _matmul(whitening[domain], z - means[domain][:, :, None, None])
    constant = half_logdet[domain] + 0.5 * z.shape[1] * math.log(2 * math.pi)
    return -0.5 * sum_per_image(white.square()) - pixels(z) * constant


def _matmul(matrices: Tensor, z: Tensor) -> Tensor:
    """matrices[b] @ z[b] at every position."""
    return (matrices @ z.flatten(2)).unflatten(2, z.shape[-2:])


def _identity(like: Tensor) -> Tensor:
    identity = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    return identity.expand(like.shape)


def normalized_weights(weights: Mapping[str, float], known: Sequence[str]) -> dict[str, float]:
    """The weights of a mix of degraded domains, those above 0, divided by their sum.

    Raises:
        TypeError, ValueError: for names that are not ``known``, and weights that are not numbers
            from 0, or all 0.
    """
    for name, weight in weights.items():
        if name not in known:
            raise ValueError(
                f"a mix of domains takes this model's degraded ones ({', '.join(known)}), "
                f"got {name!r}"
            )
        given: object = weight
        if isinstance(given, bool) or not isinstance(given, Real):
            raise TypeError(f"the weight of a domain is a number, got {weight!r} for {name!r}")
        if not 0 <= weight < math.inf:
            raise ValueError(
                f"the weight of a domain must be finite and at least 0, got {weight} for {name!r}"
            )
    total = math.fsum(weights.values())
    if not 0 < total < math.inf:
        raise ValueError(f"a mix of domains needs a weight above 0, got {dict(weights)}")
    return {name: float(weight) / total for name, weight in weights.items() if weight > 0}


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
