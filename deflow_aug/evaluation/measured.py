"""Every figure of synthetic noise against real noise, as a function of how much pictures count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .curves import Curves, Sums, errors
from .divergences import local_variance, smoothed_kl, srgb_counts, variance_divergence
from .noise import (
    FACTORS,
    Array,
    Image8,
    Pair,
    kl_divergences,
    mass_left_out,
    noise_of,
    resolution_kl,
)
from .variety import spread, variance

BY_RESOLUTION = tuple(f"kld_noiseflow_{factor}" for factor in FACTORS)
FIGURES = (
    "kld_noiseflow",  # the sum of BY_RESOLUTION
    *BY_RESOLUTION,
    "missed",  # share of the real values in bins that kld_noiseflow leaves out
    "kld_pooled",
    "kld_srgb",
    "akld",
    "level",
    "correlation",
    "covariance",
    "spectrum",
    "variety",
)
"""Names of the figures, in order; the best value is 0 of all but ``variety``, of which it is 1."""


@dataclass(frozen=True)
class Real:
    """The real noise of some pictures.

    Args:
        noises: the noise of each, [H, W, 3] in levels.
        patches: histograms of its patches, [P, 130].
        local: its local variance, [H, W, 3].
        variances: its variance, [N].
        sums: of all, stacked.
    """

    noises: list[Array]
    patches: list[NDArray[np.int64]]
    local: list[Array]
    variances: Array
    sums: Sums

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Real:
        """The noise of pairs."""
        noises = [noise_of(pair.degraded, pair.clean) for pair in pairs]
        return cls(
            noises,
            [srgb_counts(noise) for noise in noises],
            [local_variance(noise) for noise in noises],
            np.array([variance(noise) for noise in noises]),
            Sums.stack([Sums.of(n, p.clean) for n, p in zip(noises, pairs, strict=True)]),
        )


@dataclass(frozen=True)
class Measured:
    """Figures of synthetic noise of N pictures, each the mean over draws.

    Args:
        kl: kld_noiseflow at three resolutions, [N, 3].
        missed: share of the real values that it leaves out, mean over the resolutions, [N].
        srgb: kld_srgb, [N].
        akld: [N].
        spread: variance between the draws, [N].
        sums: of all, stacked.
    """

    kl: Array
    missed: Array
    srgb: Array
    akld: Array
    spread: Array
    sums: Sums

    @classmethod
    def stack(cls, parts: Sequence[tuple[Array, Sums]]) -> Measured:
        """Of several pictures, each measured by :func:`measure`."""
        scalars = np.stack([part for part, _ in parts])
        missed, srgb, akld, spreads = scalars[:, 3:].T
        sums = Sums.stack([sums for _, sums in parts])
        return cls(scalars[:, :3], missed, srgb, akld, spreads, sums)


def measure(real: Real, index: int, clean: Image8, samples: Sequence[Image8]) -> tuple[Array, Sums]:
    """Of samples of a picture: kl (three), missed, srgb, akld and spread, [7], and its sums.

    Args:
        real: the real noise of several pictures.
        index: which of them this is.
        clean: its clean half, uint8 [H, W, 3].
        samples: of it, as many draws.
    """
    fakes = [noise_of(sample, clean) for sample in samples]
    sums = [Sums.of(fake, clean) for fake in fakes]
    # kld_noiseflow, kld_srgb and akld, without measuring the real noise for each draw.
    counts, patches = real.sums.counts[index], real.patches[index]
    scalars = [
        [
            *resolution_kl(counts, s.counts),
            sum(mass_left_out(p, q) for p, q in zip(counts, s.counts, strict=True)) / len(FACTORS),
            smoothed_kl(patches, srgb_counts(fake)),
            variance_divergence(real.local[index], local_variance(fake)),
            spread(samples),
        ]
        for fake, s in zip(fakes, sums, strict=True)
    ]
    return np.asarray(np.mean(scalars, axis=0)), Sums.mean(sums)


def figures(real: Real, measured: Measured, weights: Array) -> Array:
    """FIGURES of the pictures with weights [R, N]: [R, F]."""
    shares = weights / weights.sum(-1, keepdims=True)
    kl, missed = shares @ measured.kl, shares @ measured.missed
    pooled, *of_curves = of_sums(real.sums.weighted(shares), measured.sums.weighted(shares)).T
    srgb, akld = shares @ measured.srgb, shares @ measured.akld
    variety = shares @ measured.spread / (shares @ real.variances)
    columns = (kl.sum(-1), *kl.T, missed, pooled, srgb, akld, *of_curves, variety)
    return np.stack(columns, axis=-1)


def of_sums(real: Sums, fake: Sums) -> Array:
    """The pooled KL and the errors of the curves, [R, 5], of sums with a first axis."""
    pooled = kl_divergences(real.counts, fake.counts).sum(-1)
    return np.stack([pooled, *errors(Curves.of(real), Curves.of(fake)).values()], axis=-1)
