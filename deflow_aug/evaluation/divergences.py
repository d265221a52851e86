"""Divergences of synthetic from real noise, by the definitions that published figures use.

There are several, and they are not comparable with each other. All take noise, degraded - clean,
as arrays [H, W, C] in levels (units of 1/255; :func:`~.noise.noise_of`), and are in nats.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .noise import BINS, FACTORS, Array, bin_index, blocks, box_average, kl_divergence

OPEN_BINS = BINS + 2
"""Bins of :func:`noiseflow_counts`: those of [-0.1, 0.1], and an open one at either end."""

PATCH = 32
"""Side of the patches of :func:`kld_srgb`, in pixels."""

_SRGB_LOW, _SRGB_WIDTH = -260, 4
SRGB_BINS = 130

WINDOW, WINDOW_SIGMA = 7, 1.4
"""The Gaussian that :func:`local_variance` weights with, in pixels."""

RATIOS = (0.1, 10.0)
"""Ratios of variances are clamped to this range in :func:`akld`."""

# Levels squared, 1e-10 in [0, 1]: far less than one level of error adds anywhere in a window.
_LEAST_VARIANCE = 1e-10 * 255**2


def noiseflow_counts(noise: Array) -> NDArray[np.int64]:
    """Counts [3, 66] at full, half and quarter resolution (means of boxes), all channels together.

    Edges, in units of [0, 1]: -1000, then -0.1 to 0.1 in 64 equal bins, 1000.
    """
    index = [np.clip(bin_index(box_average(noise, f)), -1, BINS) + 1 for f in FACTORS]
    return np.stack([np.bincount(i, minlength=OPEN_BINS) for i in index]).astype(np.int64)


def kld_noiseflow(real: Array, fake: Array) -> Array:
    """KL(real || fake) of histograms, [3]: at full, half and quarter resolution.

    The definition of Noise Flow (Abdelhamed et al. 2019): bins that are empty in either histogram
    are left out. Box averages of white noise are narrower than those of correlated noise, so the
    coarser resolutions see what the histogram of single values cannot.

    Args:
        real, fake: noise [H, W, C] in levels; the sizes may differ.
    """
    both = zip(noiseflow_counts(real), noiseflow_counts(fake), strict=True)
    return np.array([kl_divergence(p, q) for p, q in both])


def srgb_counts(noise: Array) -> NDArray[np.int64]:
    """Counts [P, 130] of the patches 32 x 32 of noise, row by row, all channels together.

    Edges, in levels: -260, -256 ... 260. What is left at the right and the bottom is cut off.

    Raises:
        ValueError: if there is not one whole patch.
    """
    index = np.floor((blocks(noise, PATCH) - _SRGB_LOW) / _SRGB_WIDTH).astype(np.int64)
    patches = index.clip(0, SRGB_BINS - 1).reshape(index.shape[0] * index.shape[1], -1)
    numbered = patches + SRGB_BINS * np.arange(len(patches))[:, None]
    counts = np.bincount(numbered.ravel(), minlength=len(patches) * SRGB_BINS)
    return counts.reshape(-1, SRGB_BINS).astype(np.int64)


def smoothed_kl(real: NDArray[np.int64], fake: NDArray[np.int64]) -> float:
    """KL(p || q) of counts [P, bins] or [bins] with one added to each, the mean over patches."""
    p, q = (
        (counts + 1) / (counts.sum(-1, keepdims=True) + counts.shape[-1]) for counts in (real, fake)
    )
    return float(np.mean(np.sum(p * np.log(p / q), axis=-1)))


def kld_srgb(real: Array, fake: Array) -> float:
    """KL(real || fake) of the histograms of patches, averaged over the patches.

    The definition of later work on noise of sRGB pictures (Kousha et al. 2022): values of 0 to
    255, edges -260, -256 ... 260, one added to every count, patches of 32 x 32 pixels.

    Args:
        real, fake: noise [H, W, C] in levels, of the same clean picture.

    Raises:
        ValueError: if the shapes differ, or are smaller than a patch.
    """
    _check_shapes(real, fake)
    return smoothed_kl(srgb_counts(real), srgb_counts(fake))


def local_variance(noise: Array) -> Array:
    """Mean of the squared noise under a 7 x 7 Gaussian (sigma 1.4), [H, W, C], levels squared.

    Borders are reflected about the centres of the outermost pixels. (Published code takes OpenCV's
    table of this Gaussian, rounded to multiples of 1/64.)

    Raises:
        ValueError: if a side is shorter than 4 pixels, where there is nothing to reflect.
    """
    half = WINDOW // 2
    if min(noise.shape[:2]) <= half:
        raise ValueError(f"noise of shape {noise.shape}: sides must be longer than {half} pixels")
    weights = np.exp(-0.5 * (np.arange(-half, half + 1) / WINDOW_SIGMA) ** 2)
    weights /= weights.sum()
    height, width = noise.shape[:2]
    squares = np.pad(noise**2, ((half, half), (half, half), (0, 0)), mode="reflect")
    rows = np.zeros((height, *squares.shape[1:]))
    for offset, weight in enumerate(weights):
        rows += weight * squares[offset : offset + height]
    result = np.zeros(noise.shape)
    for offset, weight in enumerate(weights):
        result += weight * rows[:, offset : offset + width]
    return np.maximum(result, _LEAST_VARIANCE)


def variance_divergence(real: Array, fake: Array) -> float:
    """Mean of (r - 1 - ln r) / 2 with r = fake / real clamped to [0.1, 10], of local variances.

    Each term is KL(N(0, fake) || N(0, real)).
    """
    ratio = np.clip(fake / real, *RATIOS)
    return float(np.mean(ratio - 1 - np.log(ratio)) / 2)


def akld(real: Array, fakes: Sequence[Array]) -> float:
    """Average KL divergence of local noise levels, averaged over draws (Yue et al. 2020, DANet).

    Unlike histograms it asks whether noise is strong where it should be. Read it with care: it is
    not zero for a second draw of the very same noise, since variances of so few pixels scatter. Of
    white Gaussian noise a second draw has about 0.044; of noise that is correlated over 3 x 3
    pixels (neighbours by 0.67) 0.15, while *white* noise of the same variance has 0.11 against it,
    as it scatters less, and 0.09 with four fifths of the standard deviation.

    Args:
        real: noise [H, W, C] in levels.
        fakes: draws of synthetic noise of the same clean picture, at least one.

    Raises:
        ValueError: without draws, or if shapes differ.
    """
    if not len(fakes):
        raise ValueError("no draws of synthetic noise were given")
    for fake in fakes:
        _check_shapes(real, fake)
    variance = local_variance(real)
    return float(np.mean([variance_divergence(variance, local_variance(f)) for f in fakes]))


def _check_shapes(real: Array, fake: Array) -> None:
    if real.shape != fake.shape or real.ndim != 3:
        raise ValueError(
            f"expected noise [H, W, C] of the same picture, got {real.shape} and {fake.shape}"
        )
