"""The noise-level function of photographs, against noise that was put into them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from deflow_aug.flat import flat_windows, neighbours
from deflow_aug.noise_curve import KNOTS, neighbour_correlation, noise_curve, noise_level

Array = NDArray[np.float64]


def photographs(
    deviation: Callable[[Array], Array], low: float = 10, high: float = 245
) -> list[NDArray[np.uint8]]:
    """Stripes of many intensities, some with texture, with white noise of this deviation."""
    rng, result = np.random.default_rng(0), []
    for _ in range(4):
        stripes = np.repeat(rng.uniform(low, high, (24, 1, 3)), 16, 0)
        clean = np.tile(stripes, (1, 320, 1))
        clean[:, 240:] += rng.normal(0, 30, (384, 80, 3))  # texture
        noisy = clean + deviation(clean.clip(0, 255)) * rng.standard_normal(clean.shape)
        result.append(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))
    return result


@pytest.mark.parametrize(
    "deviation",
    [
        lambda i: np.full_like(i, 5.0),
        lambda i: np.sqrt(4 + 0.2 * i),  # Poisson and Gaussian
        lambda i: 2 + 4 * np.sin(np.pi * i / 255),  # as a tone curve bends it
    ],
    ids=["constant", "affine", "hump"],
)
def test_the_curve_is_found(deviation: Callable[[Array], Array]) -> None:
    windows = flat_windows(photographs(deviation), seed=0)
    knots = np.linspace(0, 255, KNOTS)[1:-1]
    expected = np.sqrt(deviation(knots) ** 2 + 1 / 12)  # rounding adds the variance of a bin
    found = noise_curve(windows)[:, 1:-1]
    assert found.shape == (3, KNOTS - 2)
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=0.12)


def test_channels_have_curves_of_their_own() -> None:
    level = np.array([2.0, 4.0, 8.0])
    windows = flat_windows(photographs(lambda i: level * np.ones_like(i)), seed=0)
    np.testing.assert_allclose(noise_curve(windows).mean(1), level, rtol=0.1)
    assert noise_level(windows) == pytest.approx(float(np.sqrt(np.mean(level**2))), rel=0.1)


def test_intensities_without_windows_are_carried_over() -> None:
    windows = flat_windows(photographs(lambda i: 3 + i / 50, low=60, high=120), seed=0)
    curve = noise_curve(windows)
    assert (curve > 0).all()
    assert (np.diff(curve.mean(0)) > -0.5).all()  # no swing where nothing is known


def smoothed(rng: np.random.Generator, side: int) -> Array:
    """Noise of variance 1 whose neighbours across have the correlation 1/2, those down none."""
    white = rng.standard_normal((side, side + 1, 3))
    return (white[:, 1:] + white[:, :-1]) / 2**0.5


def test_the_correlation_of_neighbours_is_that_of_most_photographs() -> None:
    rng = np.random.default_rng(1)
    cut = np.stack([smoothed(rng, 16) for _ in range(2000)])
    # About the mean of the window, which takes a little of it.
    assert neighbours(4 * cut) == pytest.approx(np.full((2000, 3), 4.0), abs=8)
    assert neighbours(4 * cut).mean() == pytest.approx(4.0, abs=0.3)
    found = [128 + 6 * smoothed(rng, 320) for _ in range(3)]
    found[0] += np.linspace(0, 60, 320)[None, :, None]  # a slope, in one of three
    photographs_ = [np.rint(one).astype(np.uint8) for one in found]
    assert neighbour_correlation(flat_windows(photographs_, 0)) == pytest.approx(0.25, abs=0.03)
