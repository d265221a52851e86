"""Statistics of image noise: how alike are synthetic and real degradations?

Noise is the difference degraded - clean of two 8-bit pictures, an array [H, W, C] in *levels*
(units of 1/255).  Pictures are uint8 arrays [H, W, 3].  Everything here is a pure function of
arrays and needs numpy only (:func:`load_pairs` also Pillow); no model is involved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Image8 = NDArray[np.uint8]
Counts = NDArray[np.int64] | NDArray[np.float64]  # or means of them

BINS = 64
LIMIT = 0.1 * 255  # the histogram spans +-0.1 of the [0, 1] range; here in levels
FACTORS = (1, 2, 4)  # full, half and quarter resolution
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".ppm"}
# The search for the best white noise, in multiples of the real noise's standard deviation.  It
# needs a lower end: bins empty in either histogram are left out of the divergence, so noise of
# sigma -> 0 (a single occupied bin) would "win" with a value below zero.
_SIGMA_RANGE = (0.5, 3.0)


@dataclass(frozen=True)
class Pair:
    """A picture before (``clean``) and after (``degraded``) degradation, uint8 [H, W, 3]."""

    name: str
    clean: Image8
    degraded: Image8


def load_pairs(folder: str | Path) -> list[Pair]:
    """Read the pairs ``NAME_degraded.*`` and ``NAME_clean.*`` of a folder, sorted by name."""
    from PIL import Image  # here, so that the statistics need numpy alone

    folder = Path(folder)
    if not folder.is_dir():
        given = "a file" if folder.exists() else "not there"
        raise NotADirectoryError(
            f"expected a folder of pairs, NAME_clean.* and NAME_degraded.*, but {folder} is {given}"
        )
    found: dict[str, dict[str, Path]] = {"clean": {}, "degraded": {}}
    for path in sorted(folder.iterdir()):
        name, _, half = path.stem.rpartition("_")
        if path.suffix.lower() in _SUFFIXES and half in found:
            if name in found[half]:
                raise ValueError(f"{folder}: two files for {name}_{half}")
            found[half][name] = path
    clean, degraded = found["clean"], found["degraded"]
    if not clean and not degraded:
        raise ValueError(f"{folder}: no pairs NAME_degraded.* and NAME_clean.* found")
    if single := sorted(clean.keys() ^ degraded.keys()):
        missing = [f"{n}_{'clean' if n in degraded else 'degraded'}" for n in single]
        raise ValueError(f"{folder}: the other half is there, but not {', '.join(missing)}")

    def read(path: Path) -> Image8:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"), dtype=np.uint8)

    pairs = [Pair(name, read(clean[name]), read(degraded[name])) for name in sorted(clean)]
    for pair in pairs:
        if pair.clean.shape != pair.degraded.shape:
            sizes = [f"{a.shape[1]} x {a.shape[0]}" for a in (pair.clean, pair.degraded)]
            raise ValueError(f"{folder}: {pair.name} is {sizes[0]} clean, {sizes[1]} degraded")
    return pairs


def noise_of(degraded: Image8, clean: Image8) -> Array:
    """The noise degraded - clean in levels, float64 [H, W, C], of two uint8 [H, W, C]."""
    if degraded.dtype != np.uint8 or clean.dtype != np.uint8:
        raise TypeError(f"expected uint8 pictures, got {degraded.dtype} and {clean.dtype}")
    if degraded.shape != clean.shape or clean.ndim != 3:
        raise ValueError(f"expected two arrays [H, W, C], got {degraded.shape} and {clean.shape}")
    return degraded.astype(np.float64) - clean


def standard_deviation(noise: Array) -> float:
    """Standard deviation over all pixels and channels, in levels (1/255)."""
    return float(np.std(noise))


def correlation(a: Array, b: Array) -> float:
    """Pearson correlation of two arrays of equal size; nan where either is constant."""
    a, b = np.ravel(a) - np.mean(a), np.ravel(b) - np.mean(b)
    scale = float(np.sqrt(np.dot(a, a) * np.dot(b, b)))
    # Not "> 0": the mean of equal floats can differ from them in the last digit.
    return float(np.dot(a, b)) / scale if scale > 1e-12 else float("nan")


def rank_correlation(a: Array, b: Array) -> float:
    """Spearman's rank correlation (ties share their mean rank); nan where either is constant."""

    def ranks(values: Array) -> Array:
        _, inverse, counts = np.unique(np.ravel(values), return_inverse=True, return_counts=True)
        return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse], dtype=np.float64)

    return correlation(ranks(a), ranks(b))


def lag_correlation(noise: Array) -> tuple[float, float]:
    """Correlation of horizontal and of vertical neighbours (lag 1), the mean over channels."""
    channels = [noise[..., c] for c in range(noise.shape[-1])]
    horizontal = [correlation(n[:, :-1], n[:, 1:]) for n in channels]
    vertical = [correlation(n[:-1], n[1:]) for n in channels]
    return float(np.mean(horizontal)), float(np.mean(vertical))


def channel_correlation(noise: Array) -> tuple[float, float, float]:
    """Correlation R-G, G-B and R-B of noise [H, W, 3]."""
    r, g, b = (noise[..., c] for c in range(3))
    return correlation(r, g), correlation(g, b), correlation(r, b)


def box_average(noise: Array, factor: int) -> Array:
    """Means of boxes factor x factor, [H // factor, W // factor, C]; a rest is cut off."""
    if factor == 1:
        return noise
    h, w = noise.shape[0] // factor, noise.shape[1] // factor
    if not h or not w:
        raise ValueError(f"noise of shape {noise.shape} is smaller than a box of {factor}")
    rows = noise[: h * factor].reshape(h, factor, -1).sum(1)  # in two steps: several times faster
    cells = rows[:, : w * factor * noise.shape[2]].reshape(h, w, factor, -1).sum(2)
    return np.asarray(cells / factor**2)


def blocks(noise: Array, side: int) -> Array:
    """Noise cut into squares, [rows, columns, side, side, C]; a rest is cut off.

    Raises:
        ValueError: if there is not one whole square.
    """
    rows, columns = noise.shape[0] // side, noise.shape[1] // side
    if not rows or not columns:
        raise ValueError(
            f"noise of shape {noise.shape} is smaller than a block of {side} x {side} pixels"
        )
    cut = noise[: rows * side, : columns * side].reshape(rows, side, columns, side, -1)
    return cut.transpose(0, 2, 1, 3, 4)


def bin_index(noise: Array) -> NDArray[np.int64]:
    """Which of the 64 bins of [-0.1, 0.1) each value lies in, flat; less than 0 or more beyond."""
    # Zero lies on a bin's edge, and so may others: nudge, lest rounding errors decide.
    index = np.floor((np.ravel(noise) + LIMIT) * (BINS / (2 * LIMIT)) + 1e-6)
    return index.astype(np.int64)


def histogram(noise: Array) -> NDArray[np.int64]:
    """Counts [64] over [-0.1, 0.1] of the [0, 1] range; the first and last bin are open-ended.

    All channels count into the same histogram.
    """
    counts = np.bincount(np.clip(bin_index(noise), 0, BINS - 1), minlength=BINS)
    return counts.astype(np.int64)


def histograms(noise: Array) -> NDArray[np.int64]:
    """:func:`histogram` at full, half and quarter resolution, counts [3, 64]."""
    return np.stack([histogram(box_average(noise, factor)) for factor in FACTORS])


def kl_divergences(p: Counts, q: Counts) -> Array:
    """KL(p || q) = sum p ln(p / q) in nats of histograms of counts [..., bins]: [...].

    Each is normalised here. Bins empty in either are left out, without normalising again; the sum
    can then be negative. nan for a histogram without counts.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
        terms = np.where((p > 0) & (q > 0), a * np.log(a / b), 0.0)
    empty = (p.sum(-1) == 0) | (q.sum(-1) == 0)
    return np.where(empty, np.nan, terms.sum(-1))


def kl_divergence(p: Counts, q: Counts) -> float:
    """:func:`kl_divergences` of two histograms."""
    return float(kl_divergences(p, q))


def mass_left_out(p: Counts, q: Counts) -> float:
    """Share of p's counts in bins where q is empty, on which :func:`kl_divergence` is silent."""
    return float(p[q == 0].sum() / p.sum()) if p.sum() else float("nan")


def resolution_kl(real: Counts, synthetic: Counts) -> list[float]:
    """KL(real || synthetic) of histograms [3, bins] at full, half and quarter resolution."""
    return [kl_divergence(p, q) for p, q in zip(real, synthetic, strict=True)]


def summed_kl(real: Counts, synthetic: Counts) -> float:
    """Sum of :func:`resolution_kl` over the three resolutions."""
    return float(sum(resolution_kl(real, synthetic)))


@dataclass(frozen=True)
class NoiseStatistics:
    """The figures of one picture's noise; see the functions of the same names."""

    std: float  # levels (1/255)
    lag_horizontal: float
    lag_vertical: float
    rg: float
    gb: float
    rb: float
    counts: NDArray[np.int64]  # [3, 64], so that pooling pictures is a sum

    @classmethod
    def of(cls, noise: Array) -> NoiseStatistics:
        """The statistics of noise [H, W, 3] in levels."""
        lags, channels = lag_correlation(noise), channel_correlation(noise)
        return cls(standard_deviation(noise), *lags, *channels, histograms(noise))

    @classmethod
    def between(cls, degraded: Image8, clean: Image8) -> NoiseStatistics:
        """The statistics of the noise degraded - clean of uint8 [H, W, 3]."""
        return cls.of(noise_of(degraded, clean))

    @property
    def lag(self) -> float:
        """Lag-1 correlation, the mean of horizontal and vertical."""
        return (self.lag_horizontal + self.lag_vertical) / 2


def pooled(statistics: Iterable[NoiseStatistics]) -> NDArray[np.int64]:
    """Histograms [3, 64] of the noise of several pictures together."""
    counts = [s.counts for s in statistics]
    if not counts:
        raise ValueError("nothing to pool")
    return np.asarray(np.sum(counts, axis=0), dtype=np.int64)


def mean_kl(real: Sequence[NoiseStatistics], synthetic: Sequence[NoiseStatistics]) -> float:
    """Summed KL of each picture on its own, averaged over the pictures."""
    each = [summed_kl(r.counts, s.counts) for r, s in zip(real, synthetic, strict=True)]
    return float(np.mean(each))


def add_white_noise(clean: Image8, sigma: float, rng: np.random.Generator) -> Image8:
    """White Gaussian noise of ``sigma`` levels added, then rounded and clipped to uint8."""
    noise = rng.standard_normal(clean.shape, dtype=np.float32)
    return np.clip(np.rint(clean + np.float32(sigma) * noise), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class WhiteNoise:
    """The best white Gaussian noise of one sigma (levels) for all pairs, by both figures."""

    sigma_pooled: float
    kl_pooled: float  # least summed KL of the pooled noise
    sigma_mean: float
    kl_mean: float  # least mean over the pairs of the summed KL


def white_noise(pairs: Sequence[Pair], sigma: float, seed: int = 0) -> list[Image8]:
    """The clean pictures with white noise; each gets the same draw, scaled, at every sigma."""
    streams = [np.random.default_rng([seed, index]) for index in range(len(pairs))]
    return [add_white_noise(p.clean, sigma, rng) for p, rng in zip(pairs, streams, strict=True)]


def best_white_noise(pairs: Sequence[Pair], seed: int = 0) -> WhiteNoise:
    """Find the sigma of white noise that comes closest to the real one, for each figure.

    Searched between 0.5 and 3 times the real noise's root mean square, on a grid refined once
    around its best: leaving out empty bins makes the figures too jagged for a descent.
    """
    noise = [noise_of(p.degraded, p.clean) for p in pairs]
    real = [histograms(n) for n in noise]
    scale = float(np.sqrt(np.mean([np.mean(n**2) for n in noise])))
    if scale == 0:
        raise ValueError("the pairs hold no noise: clean and degraded pictures are the same")

    @cache
    def figures(sigma: float) -> tuple[float, float]:
        noisy = white_noise(pairs, sigma, seed)
        white = [histograms(noise_of(n, p.clean)) for n, p in zip(noisy, pairs, strict=True)]
        each = [summed_kl(r, w) for r, w in zip(real, white, strict=True)]
        return summed_kl(np.sum(real, axis=0), np.sum(white, axis=0)), float(np.mean(each))

    def search(figure: int) -> tuple[float, float]:
        coarse = [float(s) for s in scale * np.geomspace(*_SIGMA_RANGE, 13)]
        best = int(np.argmin([figures(s)[figure] for s in coarse]))
        low, high = coarse[max(best - 1, 0)], coarse[min(best + 1, len(coarse) - 1)]
        fine = [float(s) for s in np.geomspace(low, high, 9)[1:-1]]
        sigma = min([coarse[best], *fine], key=lambda s: figures(s)[figure])
        return sigma, figures(sigma)[figure]

    return WhiteNoise(*search(0), *search(1))
