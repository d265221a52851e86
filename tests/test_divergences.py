"""Divergences against their literal definitions, and against theory."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from deflow_aug.evaluation.divergences import (
    OPEN_BINS,
    PATCH,
    WINDOW_SIGMA,
    akld,
    kld_noiseflow,
    kld_srgb,
    local_variance,
    noiseflow_counts,
    smoothed_kl,
)
from deflow_aug.evaluation.variety import spread, variance


def integers(seed: int, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """Noise in whole levels, as 8-bit pictures have it."""
    return np.rint(np.random.default_rng(seed).normal(0, sigma, shape))


def literal_noiseflow(real: np.ndarray, fake: np.ndarray, factor: int) -> float:
    """By exact fractions: edges -1000, -0.1 + k 0.2 / 64, 1000 of noise in units of [0, 1]."""
    edges = [Fraction(-1000), *(Fraction(k, 320) - Fraction(1, 10) for k in range(65))]
    edges.append(Fraction(1000))
    counts = []
    for noise in (real, fake):
        histogram = [0] * (len(edges) - 1)
        height, width, channels = noise.shape
        for y, x, c in product(range(height // factor), range(width // factor), range(channels)):
            box = noise[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor, c]
            value = sum(Fraction(int(v)) for v in box.ravel()) / factor**2 / 255
            histogram[sum(edge <= value for edge in edges) - 1] += 1
        counts.append([Fraction(count, sum(histogram)) for count in histogram])
    pairs = [(p, q) for p, q in zip(*counts, strict=True) if p and q]
    return sum(float(p) * math.log(p / q) for p, q in pairs)


def test_kld_noiseflow_is_its_literal_definition() -> None:
    real, fake = integers(0, (17, 14, 3), 9.0), integers(1, (17, 14, 3), 14.0)
    real[0, 0], fake[3, 2] = 200, (-255, 51, -51)
    expected = [literal_noiseflow(real, fake, factor) for factor in (1, 2, 4)]
    assert kld_noiseflow(real, fake).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_ends_of_the_histogram_are_bins_of_their_own() -> None:
    noise = np.array([-100.0, -25.5, -25.0, 0.0, 25.4, 25.5, 100.0]).reshape(1, 7, 1)
    noise = np.tile(noise, (4, 1, 1))
    counts = noiseflow_counts(np.repeat(noise, 4, axis=1))[0] // 16
    assert {i: int(counts[i]) for i in np.flatnonzero(counts)} == {0: 1, 1: 2, 33: 1, 64: 1, 65: 2}
    assert counts.shape == (OPEN_BINS,)


def test_coarse_resolutions_see_correlation_that_single_values_hide() -> None:
    rng = np.random.default_rng(3)
    wide = rng.standard_normal((257, 257, 3))
    correlated = 5 * (wide[1:, 1:] + wide[:-1, 1:] + wide[1:, :-1] + wide[:-1, :-1]) / 2
    white = rng.normal(0, 5, (256, 256, 3))
    full, half, quarter = kld_noiseflow(np.rint(correlated), np.rint(white))
    # Box means 2 x 2 of [1 1; 1 1]/2-filtered white noise have 2.25 times the white one's variance.
    closed = (2.25 - 1 - math.log(2.25)) / 2
    assert full < 0.01
    assert 0.8 * closed < half < closed  # the tails of which white noise has none are left out
    assert quarter > 1.5 * half


def test_kld_srgb_is_its_literal_definition() -> None:
    real, fake = integers(0, (70, 100, 3), 9.0), integers(1, (70, 100, 3), 30.0)
    real[0, 0], fake[1, 1] = 255, -255
    edges, expected = np.arange(-260, 261, 4), []
    for top, left in product((0, 32), (0, 32, 64)):
        p, q = (
            np.histogram(noise[top : top + 32, left : left + 32], edges)[0] + 1.0
            for noise in (real, fake)
        )
        p, q = p / p.sum(), q / q.sum()
        expected.append(np.sum(p * np.log(p / q)))
    assert kld_srgb(real, fake) == pytest.approx(np.mean(expected), abs=1e-12)


def test_kld_srgb_of_gaussians_is_near_its_closed_form() -> None:
    narrow, wide = (
        np.random.default_rng(i).normal(0, s, (32, 32, 3)) for i, s in ((0, 20), (1, 26))
    )
    closed = math.log(26 / 20) + 20**2 / (2 * 26**2) - 0.5
    real, fake = (np.tile(n, (1, 40, 1)) for n in (narrow, wide))
    assert kld_srgb(real, fake) == pytest.approx(closed, abs=0.035)
    # The one added to every count pulls towards each other; without it nothing is left out.
    assert kld_srgb(real, real) == 0
    counts = np.array([[4, 0], [0, 4]])
    assert smoothed_kl(counts, counts[::-1]) == pytest.approx(4 / 6 * math.log(5))


def test_patches_need_room() -> None:
    with pytest.raises(ValueError, match="block of 32 x 32"):
        kld_srgb(np.zeros((PATCH - 1, 64, 3)), np.zeros((PATCH - 1, 64, 3)))
    with pytest.raises(ValueError, match="of the same picture"):
        kld_srgb(np.zeros((64, 64, 3)), np.zeros((64, 32, 3)))


def literal_variance(noise: np.ndarray) -> np.ndarray:
    """Each pixel from its 49 neighbours, indices reflected about the outermost pixels."""
    height, width, channels = noise.shape
    weights = {d: math.exp(-(d**2) / (2 * 1.4**2)) for d in range(-3, 4)}
    total = sum(weights.values())

    def reflected(i: int, size: int) -> int:
        i = abs(i)
        return 2 * (size - 1) - i if i >= size else i

    result = np.zeros(noise.shape)
    for y, x, c in product(range(height), range(width), range(channels)):
        for dy, dx in product(weights, weights):
            value = noise[reflected(y + dy, height), reflected(x + dx, width), c]
            result[y, x, c] += weights[dy] * weights[dx] / total**2 * value**2
    return result


def test_akld_is_its_literal_definition() -> None:
    real = integers(0, (9, 11, 2), 5.0)
    fakes = [integers(1, real.shape, 4.0), integers(2, real.shape, 16.0)]
    variance_ = literal_variance(real)
    assert local_variance(real) == pytest.approx(variance_, abs=1e-9)
    expected = []
    for fake in fakes:
        ratio = np.minimum(np.maximum(literal_variance(fake) / variance_, 0.1), 10)
        expected.append(np.mean((ratio - 1 - np.log(ratio)) / 2))
    assert (akld(real, fakes[1:]), akld(real, fakes)) == pytest.approx(
        (expected[1], np.mean(expected)), abs=1e-12
    )


@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
def test_akld_of_noise_of_known_variance_everywhere(ratio: float) -> None:
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (2, 24, 24, 3))
    # Squares are constant, and so is every local variance.
    found = akld(6 * signs[0], [6 * math.sqrt(ratio) * signs[1]])
    assert found == pytest.approx((ratio - 1 - math.log(ratio)) / 2)


def test_akld_clamps_the_ratio_and_takes_no_noise_at_all() -> None:
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (24, 24, 3))
    assert akld(signs, [0 * signs]) == pytest.approx((0.1 - 1 - math.log(0.1)) / 2)
    assert akld(0 * signs, [signs]) == pytest.approx((10 - 1 - math.log(10)) / 2)
    assert akld(0 * signs, [0 * signs]) == 0


@pytest.mark.parametrize("sigma", [3.0, 4.0, 5.0])
def test_akld_of_two_gaussian_noises(sigma: float) -> None:
    rng = np.random.default_rng(7)
    real, fake = rng.normal(0, 4, (400, 400, 3)), rng.normal(0, sigma, (400, 400, 3))
    # A local variance is nearly a gamma variable of this shape: the number of values that the
    # window is worth, halved. So E[1 / v] is shape / (shape - 1) / E[v].
    weights = np.exp(-0.5 * (np.arange(-3, 4) / WINDOW_SIGMA) ** 2)
    shape = (weights.sum() ** 2 / (weights**2).sum()) ** 2 / 2
    ratio = (sigma / 4) ** 2
    expected = (ratio * shape / (shape - 1) - 1 - math.log(ratio)) / 2
    assert akld(real, [fake]) == pytest.approx(expected, rel=0.04)


def test_akld_prefers_white_noise_to_a_second_shot_of_correlated_noise() -> None:
    rng = np.random.default_rng(8)

    def shot() -> np.ndarray:
        n = rng.standard_normal((302, 302, 3))
        rows = n[2:] + n[1:-1] + n[:-2]
        return (rows[:, 2:] + rows[:, 1:-1] + rows[:, :-2]) / 3

    real, white = shot(), rng.standard_normal((300, 300, 3))
    found = [akld(real, [fake]) for fake in (shot(), white, 0.8 * white)]
    assert found == pytest.approx([0.15, 0.105, 0.095], abs=0.006)


def test_akld_refuses_what_it_cannot_compare() -> None:
    noise = np.zeros((8, 8, 3))
    with pytest.raises(ValueError, match="no draws"):
        akld(noise, [])
    with pytest.raises(ValueError, match="of the same picture"):
        akld(noise, [noise[:4]])
    with pytest.raises(ValueError, match="longer than 3"):
        akld(noise[:3], [noise[:3]])


def test_variety_of_samples() -> None:
    rng = np.random.default_rng(0)
    samples = [rng.integers(96, 160, (64, 64, 3), dtype=np.uint8) for _ in range(4)]
    assert spread(samples) == pytest.approx((64**2 - 1) / 12, rel=0.02)
    assert spread([samples[0], samples[0]]) == 0
    assert math.isnan(spread(samples[:1]))
    # What is constant in a channel is no noise.
    assert variance(5 * rng.standard_normal((64, 64, 3)) + [1, 2, 3]) == pytest.approx(25, rel=0.03)
