"""What noise looks like beyond its histogram: curves and maps, and one error figure of each.

Of every picture, sums are kept (:class:`Sums`), so that curves of any set of pictures, a bootstrap
resample for one, are a sum and a few divisions (:class:`Curves`). Noise is degraded - clean,
[H, W, 3] in levels (units of 1/255).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from .divergences import noiseflow_counts
from .noise import Array, Image8, blocks

INTENSITIES = 16
"""Bins of the clean picture's intensity, 16 levels each."""

LAGS = 8
"""Autocorrelation is measured for shifts of up to so many pixels, both ways."""

BLOCK = 32
"""Side of the blocks that power spectra are measured in; frequencies are multiples of 1/32."""


@dataclass(frozen=True)
class Sums:
    """What is kept of the noise of one picture; or of several, or of sets, with axes before.

    Args:
        counts: of histograms, [3, 66] (:func:`~.divergences.noiseflow_counts`).
        level: number of values, sum of the noise, sum of its squares, for each channel and
            intensity of the clean picture, [3, 3, 16].
        correlation: the autocorrelation map (:func:`autocorrelation`), [17, 17].
        covariance: between the channels, [3, 3], levels squared.
        power: the spectrum (:func:`radial_power`), [3, 17], levels squared.
    """

    counts: Array
    level: Array
    correlation: Array
    covariance: Array
    power: Array

    @classmethod
    def of(cls, noise: Array, clean: Image8) -> Sums:
        """Of noise [H, W, 3] and its clean picture, uint8 [H, W, 3]."""
        return cls(
            noiseflow_counts(noise).astype(np.float64),
            levels(noise, clean),
            autocorrelation(noise),
            np.cov(noise.reshape(-1, noise.shape[-1]), rowvar=False, ddof=0),
            radial_power(noise),
        )

    @classmethod
    def mean(cls, sums: Sequence[Sums]) -> Sums:
        """The mean of several, of draws of one picture for one."""
        return cls(*(np.mean([getattr(s, f.name) for s in sums], axis=0) for f in fields(cls)))

    @classmethod
    def stack(cls, sums: Sequence[Sums]) -> Sums:
        """Several with a first axis for them."""
        return cls(*(np.stack([getattr(s, f.name) for s in sums]) for f in fields(cls)))

    def weighted(self, weights: Array) -> Sums:
        """Of a stack [N, ...], the mean with weights [N]; with weights [R, N], R such means."""
        shares = weights / weights.sum(-1, keepdims=True)
        return Sums(*(np.tensordot(shares, getattr(self, f.name), 1) for f in fields(self)))


def levels(noise: Array, clean: Image8) -> Array:
    """Number, sum and sum of squares of noise by channel and intensity, [3, C, 16]."""
    channels = noise.shape[-1]
    index = clean.astype(np.int64) * INTENSITIES // 256 + INTENSITIES * np.arange(channels)
    sums = [
        np.bincount(index.ravel(), values.ravel(), INTENSITIES * channels)
        for values in (np.ones_like(noise), noise, noise**2)
    ]
    return np.asarray(sums, np.float64).reshape(3, channels, INTENSITIES)


def autocorrelation(noise: Array) -> Array:
    """Correlation with itself shifted by (dy, dx), [17, 17], the mean over channels.

    Entry [8 + dy, 8 + dx]: sum of n(y, x) n(y + dy, x + dx) over the pixels that have such a
    neighbour, by their number, by the variance; n is the noise less its mean. Noise that is
    constant is taken to be uncorrelated: 1 at the centre, else 0.

    Raises:
        ValueError: if the picture has sides of less than 9 pixels.
    """
    height, width, channels = noise.shape
    if min(height, width) <= LAGS:
        raise ValueError(f"noise of shape {noise.shape}: sides must be longer than {LAGS} pixels")
    centred = noise - noise.mean(axis=(0, 1))
    # Zeros on two sides keep what is shifted out from coming in again on the other side.
    spectrum = np.fft.rfft2(centred, (height + LAGS, width + LAGS), axes=(0, 1))
    products = np.fft.irfft2(np.abs(spectrum) ** 2, (height + LAGS, width + LAGS), axes=(0, 1))
    shifts = np.arange(-LAGS, LAGS + 1)
    pairs = np.outer(height - np.abs(shifts), width - np.abs(shifts))
    covariance = products[np.ix_(shifts, shifts)] / pairs[..., None]
    variance = covariance[LAGS, LAGS]
    silent = variance < 1e-12  # levels squared: rounding errors of constant noise
    result = covariance / np.where(silent, 1, variance)
    result[..., silent] = 0
    result[LAGS, LAGS] = 1
    return np.asarray(result.sum(-1) / channels)


def radial_power(noise: Array) -> Array:
    """Power of the noise at |frequency| k / 32 cycles a pixel, k = 0 ... 16, [C, 17].

    Means over blocks 32 x 32 under a Hann window, and over the frequencies that round to k / 32;
    the mean of each channel is taken away before. White noise of variance v has power v
    everywhere. Corners beyond the Nyquist frequency of rows and columns are left out.

    Raises:
        ValueError: if there is not one whole block.
    """
    window = np.hanning(BLOCK + 1)[:-1]
    window = np.outer(window, window)
    cut = blocks(noise - noise.mean(axis=(0, 1)), BLOCK)
    spectra = np.fft.fft2(cut * window[..., None], axes=(2, 3))
    power = np.mean(np.abs(spectra) ** 2, axis=(0, 1)) / np.sum(window**2)
    frequency = np.fft.fftfreq(BLOCK, 1 / BLOCK)
    radius = np.rint(np.hypot(*np.meshgrid(frequency, frequency))).astype(np.int64).ravel()
    inside = radius <= BLOCK // 2
    number = np.bincount(radius[inside])
    return np.stack(
        [
            np.bincount(radius[inside], channel.ravel()[inside]) / number
            for channel in np.moveaxis(power, -1, 0)
        ]
    )


@dataclass(frozen=True)
class Curves:
    """Curves and maps of a set of pictures, from the mean of their :class:`Sums`.

    Where those have axes before, as those of several sets have, so have all of these.

    Args:
        share: of the values that each intensity has, by channel, [3, 16].
        level: standard deviation of the noise by channel and intensity, [3, 16], levels; 0 where
            there are no values.
        correlation: mean autocorrelation map, [17, 17].
        covariance: mean covariance between channels, [3, 3], levels squared.
        amplitude: root of the mean power spectrum, [3, 17], levels.
    """

    share: Array
    level: Array
    correlation: Array
    covariance: Array
    amplitude: Array

    @classmethod
    def of(cls, sums: Sums) -> Curves:
        """Of the mean of the pictures' sums."""
        number, first, second = (sums.level[..., i, :, :] for i in range(3))
        some = np.where(number > 0, number, 1)
        variance = np.maximum(second / some - (first / some) ** 2, 0)
        return cls(
            number / number.sum(axis=(-2, -1), keepdims=True),
            np.sqrt(variance),
            sums.correlation,
            sums.covariance,
            np.sqrt(sums.power),
        )


def errors(real: Curves, fake: Curves) -> dict[str, Array]:
    """How far curves are from the real ones: 0 if equal, 1 for no noise at all.

    Each is a relative L2 distance, |fake - real| / |real|, over all channels, for each set:

    ``level``         standard deviations by intensity, values weighted as they are frequent
    ``correlation``   autocorrelation for all shifts but zero (1 for any white noise)
    ``covariance``    all entries of the covariance between channels
    ``spectrum``      roots of the power at frequencies 0 ... 1/2
    """
    shifts = np.ones(real.correlation.shape[-2:])
    shifts[LAGS, LAGS] = 0
    return {
        "level": _distance(real.level, fake.level, real.share),
        "correlation": _distance(real.correlation, fake.correlation, shifts),
        "covariance": _distance(real.covariance, fake.covariance),
        "spectrum": _distance(real.amplitude, fake.amplitude),
    }


def _distance(real: Array, fake: Array, weights: Array | float = 1.0) -> Array:
    """Over the last two axes; nan where the real one is zero."""
    scale = np.sum(weights * real**2, axis=(-2, -1))
    square = np.sum(weights * (fake - real) ** 2, axis=(-2, -1))
    return np.sqrt(square / np.where(scale > 0, scale, np.nan))
