"""Moments of latents, and the shift that follows from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deflow_aug import randomness
from deflow_aug.dequantization import bin_widths
from deflow_aug.latent import psd_root
from deflow_aug.model import DeFlow

POSITIONS_PER_CHANNEL = 10
"""Fewer positions than this many times the channels make a poor estimate of a covariance."""


@dataclass(frozen=True)
class Moments:
    """Of latents [N, C]: their number, mean [C] and (biased) covariance [C, C], float64, CPU."""

    count: int
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, z: Tensor, where: Tensor | None = None) -> Moments:
        """Of the positions of latents [B, C, H, W], or those of a mask [B, H, W], at least one."""
        vectors = z.detach().movedim(1, 0).flatten(1)
        if where is not None:
            vectors = vectors[:, where.flatten().to(vectors.device)]
        vectors = vectors.cpu().double()
        mean = vectors.mean(1)
        centred = vectors - mean[:, None]
        return cls(vectors.shape[1], mean, centred @ centred.mT / vectors.shape[1])

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets of latents together."""
        count = self.count + other.count
        share = other.count / count
        apart = other.mean - self.mean
        between = share * (1 - share) * torch.outer(apart, apart)
        covariance = (1 - share) * self.covariance + share * other.covariance + between
        return Moments(count, self.mean + share * apart, covariance)


def latent_moments(model: DeFlow, x: Tensor, domain: str, *key: int) -> list[Moments]:
    """Moments of each latent of images; see :func:`latents_as_in_training`."""
    return [Moments.of(z) for z in latents_as_in_training(model, x, domain, *key)]


@torch.no_grad()
def latents_as_in_training(model: DeFlow, x: Tensor, domain: str, *key: int) -> list[Tensor]:
    """Latents of images, with noise as in training, drawn by ``key``.

    Args:
        x: images in [0, 1] in the colours of ``domain``, [B, 3, H, W]; what exceeds a multiple of
            ``config.size_multiple`` at the right and the bottom is cut off.
    """
    multiple, scale = model.config.size_multiple, model.config.scale
    height, width = (side // multiple * multiple for side in x.shape[-2:])
    x = x[..., :height, :width].to(next(model.parameters()).device)
    x = model.match_colours(x, [domain] * len(x))
    draws = randomness.uniform(tuple(x.shape), *key, 0).to(x.device)
    noise = randomness.normal((*x.shape[:2], height // scale, width // scale), *key, 1)
    features = model.features(x, noise.to(x.device))
    latents, _ = model.encode(x + draws * bin_widths(x, model.config), features)
    return latents


def closed_form(mean: Tensor, excess: Tensor, diagonal: bool) -> tuple[Tensor, Tensor]:
    """mu [C] and M [C, C] of a shift with this mean and C_y - C_x = ``excess`` [C, C]."""
    if diagonal:
        return mean, excess.diagonal().clamp(min=0).sqrt().diag()
    return mean, psd_root(excess)


def ascend(factor: Tensor, reference: Tensor, excess: Tensor, steps: int, diagonal: bool) -> Tensor:
    """M of higher likelihood: of z_y ~ N(mu, C_x + M M^T) whose covariance is C_x + excess."""
    target = reference + excess

    def loss(root: Tensor) -> Tensor:
        matrix = root.diag() if diagonal else root
        lower = torch.linalg.cholesky(reference + matrix @ matrix.mT)
        return lower.diagonal().log().sum() + 0.5 * torch.cholesky_solve(target, lower).trace()

    start = factor.diagonal().clone() if diagonal else factor.clone()
    # The gradient in M is 2 G M, zero where M is: directions that were clipped must be let go.
    nudge = 0.1 * (torch.ones_like(start) if diagonal else torch.eye(len(start)).to(start))
    root = (start + nudge).requires_grad_(True)
    optimizer = torch.optim.LBFGS([root], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(root)
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        best = root.detach() if loss(root) < loss(start) else start
    return best.diag() if diagonal else best
