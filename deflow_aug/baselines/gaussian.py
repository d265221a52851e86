"""Gaussian noise without correlation, of one level or of one that depends on the intensity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deflow_aug import randomness
from deflow_aug.arguments import is_number
from deflow_aug.baselines.base import Baseline
from deflow_aug.flat import Array, FlatWindows, Image8, flat_windows
from deflow_aug.randomness import Stream


class WhiteNoise(Baseline):
    """White Gaussian noise, independent for each pixel and channel: y = x + tau sigma n.

    Args:
        sigma: its standard deviation in levels (1/255).

    Raises:
        ValueError: for a sigma that is not finite or below 0.
    """

    name = "white"

    def __init__(self, sigma: float) -> None:
        if not is_number(sigma) or sigma < 0:
            raise ValueError(f"sigma must be finite and at least 0, in levels, got {sigma!r}")
        self.sigma = float(sigma)

    @classmethod
    def fit(cls, degraded: Sequence[Image8], *, seed: int = 0) -> WhiteNoise:
        """The noise level in flat areas of degraded photographs, uint8 [H, W, 3] each.

        sigma^2 is the mean over the photographs of the mean variance of their flat windows
        (``flat.flat_windows``): that of all photographs together, as a test on all of them sees it.

        Raises:
            TypeError, ValueError: for photographs of another kind, or none.
            NoFlatAreasError: if they have no flat areas.
        """
        each = [float(one.variance.mean()) for one in flat_windows(degraded, seed)]
        return cls(math.sqrt(float(np.mean(each))))

    def _sample(self, image: Tensor, temperature: float, seed: int, number: int) -> Tensor:
        return image + temperature * self.sigma / 255 * _white(image, seed, number)

    def describe(self) -> dict[str, Any]:
        """``sigma``, in levels."""
        return {"sigma": self.sigma}


@dataclass(frozen=True)
class NoiseLevel:
    """Variance of the noise of one channel, affine in the intensity I between two of them:

        v(I) = (1 - t) v_dark + t v_bright,  t = (I - dark) / (bright - dark) in [0, 1]

    Outside of them it is that at the nearer one. In levels (1/255), and levels squared.
    """

    dark: float
    bright: float
    variance_dark: float
    variance_bright: float

    def position(self, intensity: Tensor) -> Tensor:
        """t of intensities in levels."""
        width = self.bright - self.dark
        return ((intensity - self.dark) / width).clamp(0, 1) if width > 0 else 0 * intensity

    def variance(self, intensity: Tensor) -> Tensor:
        """v(I), of intensities in levels."""
        return self.variance_dark + self.position(intensity) * (
            self.variance_bright - self.variance_dark
        )


class SignalDependentNoise(Baseline):
    """White Gaussian noise whose variance is affine in the intensity: y = x + tau sqrt(v(x)) n.

    That is the Poisson-Gaussian model of sensors (Foi et al. 2008), a I + b for each channel. The
    tone curve of a camera bends it; two numbers a channel are kept all the same, since flat areas
    of a few photographs cover the intensities unevenly, and each camera and ISO has its own bend.

    Args:
        levels: of red, green and blue.
    """

    name = "signal-dependent"

    def __init__(self, levels: Sequence[NoiseLevel]) -> None:
        if len(levels) != 3:
            raise ValueError(f"expected a noise level for each of 3 channels, got {len(levels)}")
        self.levels = tuple(levels)

    @classmethod
    def fit(cls, degraded: Sequence[Image8], *, seed: int = 0) -> SignalDependentNoise:
        """Noise levels from flat areas of degraded photographs, uint8 [H, W, 3] each.

        The windows of all photographs (``flat.flat_windows``), each photograph with the same
        weight, by robust least squares of relative residuals: see ``robust_level``.

        Raises:
            TypeError, ValueError: for photographs of another kind, or none.
            NoFlatAreasError: if they have no flat areas.
        """
        found = flat_windows(degraded, seed)
        return cls([_level(found, channel) for channel in range(3)])

    def _sample(self, image: Tensor, temperature: float, seed: int, number: int) -> Tensor:
        variances = [
            one.variance(channel * 255) for one, channel in zip(self.levels, image, strict=True)
        ]
        sigma = torch.stack(variances).sqrt() / 255
        return image + temperature * sigma * _white(image, seed, number)

    def describe(self) -> dict[str, Any]:
        """For each channel the two intensities and the variances there, in levels."""
        names = ("red", "green", "blue")
        return {name: asdict(level) for name, level in zip(names, self.levels, strict=True)}


def _white(image: Tensor, seed: int, number: int) -> Tensor:
    return randomness.normal(tuple(image.shape), seed, Stream.LATENT, number).to(image.device)


def _level(found: Sequence[FlatWindows], channel: int) -> NoiseLevel:
    return robust_level(
        np.concatenate([one.mean[:, channel] for one in found]),
        np.concatenate([one.variance[:, channel] for one in found]),
        np.concatenate([np.full(len(one.mean), 1 / len(one.mean)) for one in found]),
    )


def robust_level(intensity: Array, variance: Array, weight: Array) -> NoiseLevel:
    """v(I) by reweighted least squares, [N] each.

    The spread of a window's variance grows with the variance itself, so residuals are relative:
    r = (variance - v) / v. Those beyond three times their scale (1.48 times the median of |r|, at
    least 0.1) count less, by Huber's weights: windows with texture in them. Most of the spread, of
    cameras and ISO, is within, so that v stays a mean. Neither end falls below 0.
    """
    dark, bright = np.quantile(intensity, [0.01, 0.99])
    width = float(bright - dark)
    t = np.clip((intensity - dark) / width, 0, 1) if width > 0 else np.zeros_like(intensity)
    design = np.stack([1 - t, t], axis=1)
    ends = np.full(2, np.average(variance, weights=weight))
    floor = 1e-3 * float(ends[0])  # residuals relative to next to nothing would rule
    for _ in range(50):
        fitted = np.maximum(design @ ends, floor)
        residual = np.abs(variance / fitted - 1)
        limit = 3 * max(1.4826 * float(np.median(residual)), 0.1)
        huber = np.minimum(1, limit / np.maximum(residual, limit))
        last, ends = ends, _non_negative(design, variance, weight * huber / fitted**2)
        if np.allclose(last, ends, rtol=1e-6):
            break
    return NoiseLevel(float(dark), float(bright), float(ends[0]), float(ends[1]))


def _non_negative(design: Array, target: Array, weight: Array) -> Array:
    """Weighted least squares of two coefficients that are at least 0."""
    root = np.sqrt(weight)
    scaled, wanted = design * root[:, None], target * root
    ends = np.asarray(np.linalg.lstsq(scaled, wanted, rcond=None)[0], dtype=np.float64)
    for negative in np.flatnonzero(ends < 0):  # of two at most one: the target is positive
        other = scaled[:, 1 - negative]
        ends[1 - negative] = other @ wanted / (other @ other)
        ends[negative] = 0
    return ends
