"""What real noise scores against other real noise: the floor that figures stand on.

A perfect degrader would draw a second shot of the same picture. There is none of it in pairs, so
that two kinds of real noise stand in, each nearer to it in one way and farther in another:

- *same picture*: other places of the same picture. It has the picture's own camera and ISO, which
  no degrader knows, but another motif beneath. Histograms: each half of a picture against the
  other, side by side and one above the other. Patches: each against its neighbour. Local variance:
  against that :data:`SHIFT` pixels away. Curves: left halves of all pictures against right halves.
- *other pictures*: what can be known without knowing the picture's ISO. Histograms and patches:
  each picture against all others together. Curves and pooled histograms: the mean of random
  halvings of the pictures. There is no local variance without the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from deflow_aug import randomness
from deflow_aug.randomness import Stream

from .curves import Sums
from .divergences import (
    PATCH,
    kld_noiseflow,
    kld_srgb,
    local_variance,
    smoothed_kl,
    variance_divergence,
)
from .noise import Array, Image8, resolution_kl

SHIFT = 16
"""Pixels that local variance is compared across: windows of 7, and noise that is correlated over
some pixels, have nothing in common any more."""

HALVINGS = 50


def halves_kl(noise: Array) -> Array:
    """KL [3] of the histograms of halves, mean over left and right, top and bottom, both ways."""
    y, x = noise.shape[0] // 2, noise.shape[1] // 2
    sides = ((noise[:, :x], noise[:, x:]), (noise[:y], noise[y:]))
    each = [kld_noiseflow(a, b) for one, other in sides for a, b in ((one, other), (other, one))]
    return np.asarray(np.mean(each, axis=0))


def neighbours_kl(noise: Array) -> float:
    """:func:`~.divergences.kld_srgb` against the noise of each patch's neighbour, right or left."""
    height, count = noise.shape[0], noise.shape[1] // (2 * PATCH)
    cut = noise[:, : count * 2 * PATCH]
    swapped = cut.reshape(height, count, 2, PATCH, -1)[:, :, ::-1]
    return kld_srgb(cut, swapped.reshape(cut.shape))


def shifted_akld(noise: Array) -> float:
    """Divergence of local variances from those SHIFT pixels away, mean over four directions."""
    v = local_variance(noise)
    sides = ((v[:, SHIFT:], v[:, :-SHIFT]), (v[SHIFT:], v[:-SHIFT]))
    both = [
        variance_divergence(a, b) for one, other in sides for a, b in ((one, other), (other, one))
    ]
    return float(np.mean(both))


def halves(noise: Array, clean: Image8) -> tuple[Sums, Sums]:
    """Sums of the left and of the right half of a picture."""
    x = noise.shape[1] // 2
    return Sums.of(noise[:, :x], clean[:, :x]), Sums.of(noise[:, x:], clean[:, x:])


def others_kl(counts: Array) -> Array:
    """KL [N, 3] of each picture's histograms, of [N, 3, 66], against all others' together."""
    total = counts.sum(0)
    return np.array([resolution_kl(one, total - one) for one in counts])


def others_srgb(patches: Sequence[NDArray[np.int64]]) -> Array:
    """KL [N] of the patches [P, 130] of each picture against the noise of all others together."""
    total = np.sum([p.sum(0) for p in patches], axis=0)
    return np.array([smoothed_kl(p, total - p.sum(0)) for p in patches])


def halvings(sums: Sums, pictures: int, figures: Callable[[Sums, Sums], Array], seed: int) -> Array:
    """Figures [F] of one half of the pictures as real against the other, mean of random halvings.

    Args:
        sums: of all pictures, stacked.
        pictures: how many there are, two or more.
        figures: [R, F] of the sums of R sets of real and of synthetic noise.
        seed: of the halvings.
    """
    weights = np.zeros((HALVINGS, pictures))
    for number, row in enumerate(weights):
        rng = randomness.generator(seed, Stream.EVALUATE, 1, number)
        row[rng.permutation(pictures)[: pictures // 2]] = 1
    return np.asarray(np.mean(figures(sums.weighted(weights), sums.weighted(1 - weights)), axis=0))
