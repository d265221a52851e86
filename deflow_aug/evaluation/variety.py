"""Do samples of one picture differ from each other as much as real shots of it would?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .noise import Array, Image8


def spread(samples: Sequence[Image8]) -> float:
    """Variance between samples of one picture, unbiased, the mean over pixels, levels squared.

    Divided by the variance of the real noise it is the *variety*: 0 for whatever gives the same
    result each time, 1 where samples differ as real shots do.

    Args:
        samples: uint8 [H, W, C] each, of the same clean picture; two or more, else nan.
    """
    if len(samples) < 2:
        return float("nan")
    return float(np.mean(np.var(np.asarray(samples, np.float64), axis=0, ddof=1)))


def variance(noise: Array) -> float:
    """Variance of real noise [H, W, C] about its mean in each channel, levels squared."""
    return float(np.mean(np.var(noise, axis=(0, 1))))
