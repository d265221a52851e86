"""The noise-level function of photographs: how strong noise is at each intensity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deflow_aug.flat import Array, FlatWindows

KNOTS = 9
"""Intensities, equally spaced from 0 to 255 levels, between which the variance is linear."""

_SMOOTHNESS = 0.02
_ROUNDS = 5
_LEAST = 0.1  # of the median variance: where hardly any window lies, smoothness could lead below 0


def noise_curve(photographs: Sequence[FlatWindows]) -> Array:
    """Standard deviation of red, green and blue noise at the knots, in levels (1/255), [3, KNOTS].

    Of raw pictures the variance is affine in the intensity; tone curves bend it, and in finished
    photographs it falls again towards white. So it is any curve here: linear between the knots,
    fitted by least squares to the variances of flat windows, relative to the curve itself (the
    estimate of a variance spreads in proportion to it; a few rounds of reweighting), with a penalty
    on second differences that carries it across intensities where no window lies:

        sum_w ((v(I_w) - v_w) / v(I_w))^2 + 0.02 N sum_k ((v_k-1 - 2 v_k + v_k+1) / median v_w)^2

    Args:
        photographs: flat windows of some photographs, see :func:`deflow_aug.flat.flat_windows`.
    """
    mean = np.concatenate([one.mean for one in photographs])
    variance = np.concatenate([one.variance for one in photographs])
    return np.stack([_fitted(mean[:, c], variance[:, c]) for c in range(3)])


def variance_at(curve: Array, mean: Array) -> Array:
    """Variance of the noise at intensities [N, 3], by a curve [3, KNOTS] of :func:`noise_curve`."""
    knots = np.linspace(0, 255, KNOTS)
    return np.stack([np.interp(mean[:, c], knots, curve[c] ** 2) for c in range(3)], axis=1)


def noise_level(photographs: Sequence[FlatWindows]) -> float:
    """Standard deviation of the noise in all flat windows and channels together, in levels."""
    return float(np.sqrt(np.concatenate([one.variance for one in photographs]).mean()))


def neighbour_correlation(photographs: Sequence[FlatWindows]) -> float:
    """Correlation of neighbouring pixels of the noise: the median of the photographs'.

    Those in whose flat windows some texture is left, which is correlated, would raise a mean.
    """
    each = [one.neighbours.sum() / one.variance.sum() for one in photographs]
    return float(np.median(each))


def _fitted(mean: Array, variance: Array) -> Array:
    position = np.clip(mean / 255 * (KNOTS - 1), 0, KNOTS - 1 - 1e-6)
    left = position.astype(int)
    rows = np.arange(len(mean))
    design = np.zeros((len(mean), KNOTS))
    design[rows, left], design[rows, left + 1] = 1 - (position - left), position - left
    usual = float(np.median(variance))
    bends = np.diff(np.eye(KNOTS), 2, axis=0) * np.sqrt(_SMOOTHNESS * len(mean)) / usual
    curve = np.full(KNOTS, usual)
    for _ in range(_ROUNDS):
        weight = 1 / np.maximum(design @ curve, _LEAST * usual)
        system = np.vstack([design * weight[:, None], bends])
        target = np.concatenate([variance * weight, np.zeros(len(bends))])
        curve = np.linalg.lstsq(system, target, rcond=None)[0]
    return np.sqrt(np.maximum(curve, _LEAST * usual))
