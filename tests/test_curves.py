"""Curves and maps of noise of known properties, and their errors."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from deflow_aug.evaluation.curves import (
    BLOCK,
    LAGS,
    Curves,
    Sums,
    autocorrelation,
    errors,
    radial_power,
)

SIZE = 256


def ramp(size: int = SIZE) -> np.ndarray:
    row = np.linspace(0, 255, size).round().astype(np.uint8)
    return np.broadcast_to(row[:, None, None], (size, size, 3)).copy()


def white(seed: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((size, size, 3))


def test_level_by_intensity_and_channel() -> None:
    clean = ramp()
    sigma = (2 + clean / 64) * [1, 1.5, 2]
    curves = Curves.of(Sums.of(sigma * white(0) + 3, clean))  # a constant is no noise
    middles = 16 * np.arange(16) + 7.5
    expected = (2 + middles / 64) * np.array([[1], [1.5], [2]])
    assert curves.level == pytest.approx(expected, rel=0.05)
    assert curves.share == pytest.approx(np.full((3, 16), 1 / 48), rel=0.02)


def test_autocorrelation_is_its_literal_definition() -> None:
    noise = white(1, 24)[:, :18] + np.linspace(0, 2, 18)[None, :, None]
    found = autocorrelation(noise)
    assert found.shape == (17, 17)
    centred = noise - noise.mean(axis=(0, 1))
    for dy, dx in product((-8, -1, 0, 3), (-5, 0, 1, 8)):
        products = [
            [
                centred[y, x] * centred[y + dy, x + dx]
                for y, x in product(range(24), range(18))
                if 0 <= y + dy < 24 and 0 <= x + dx < 18
            ]
        ]
        expected = np.mean(np.mean(products[0], axis=0) / np.mean(centred**2, axis=(0, 1)))
        assert found[LAGS + dy, LAGS + dx] == pytest.approx(expected, abs=1e-12)


def test_autocorrelation_of_filtered_noise() -> None:
    n = white(2, SIZE + 2)
    smooth = n[2:] + n[1:-1] + n[:-2]  # along columns, box of 3
    found = autocorrelation(smooth[:, :SIZE])
    expected = np.zeros((17, 17))
    expected[LAGS - 2 : LAGS + 3, LAGS] = (1 / 3, 2 / 3, 1, 2 / 3, 1 / 3)
    assert found == pytest.approx(expected, abs=0.03)
    silent = autocorrelation(np.full((16, 16, 3), 0.1))
    assert (silent[LAGS, LAGS], np.abs(silent).sum()) == (1, 1)


def test_power_of_white_noise_is_its_variance_at_every_frequency() -> None:
    power = radial_power(5 * white(3))
    assert power.shape == (3, BLOCK // 2 + 1)
    assert power[:, 1:] == pytest.approx(np.full((3, BLOCK // 2), 25), rel=0.2)
    assert power.mean() == pytest.approx(25, rel=0.03)


def test_power_of_a_wave_lies_at_its_frequency() -> None:
    x = np.arange(SIZE)
    wave = np.broadcast_to(np.cos(2 * np.pi * 10 / BLOCK * x)[None, :, None], (SIZE, SIZE, 3))
    assert radial_power(wave).argmax(axis=1).tolist() == [10, 10, 10]
    assert radial_power(wave)[:, :7].max() < 1e-3 * radial_power(wave).max()


def test_power_of_filtered_noise_follows_its_transfer_function() -> None:
    n = white(4, SIZE + 1)
    smooth = (n[1:, 1:] + n[:-1, 1:] + n[1:, :-1] + n[:-1, :-1]) / 2
    frequency = np.fft.fftfreq(BLOCK)
    v, u = np.meshgrid(frequency, frequency)
    transfer = 4 * np.cos(np.pi * v) ** 2 * np.cos(np.pi * u) ** 2
    radius = np.rint(np.hypot(v, u) * BLOCK)
    expected = [transfer[radius == k].mean() for k in range(2, 14)]
    assert radial_power(smooth)[:, 2:14].mean(axis=0) == pytest.approx(expected, rel=0.1)


def test_small_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="block of 32 x 32"):
        radial_power(np.zeros((31, 64, 3)))
    with pytest.raises(ValueError, match="longer than 8"):
        autocorrelation(np.zeros((8, 64, 3)))


def test_errors_are_zero_for_the_same_and_one_for_nothing() -> None:
    clean, noise = ramp(), 4 * white(5)
    real = Curves.of(Sums.of(noise, clean))
    assert list(errors(real, real).values()) == [0, 0, 0, 0]
    nothing = Curves.of(Sums.of(0 * noise, clean))
    assert list(errors(real, nothing).values()) == [1, 1, 1, 1]


def test_errors_of_noise_of_the_wrong_strength() -> None:
    clean, noise = ramp(), 4 * white(6)
    real, strong = (Curves.of(Sums.of(factor * noise, clean)) for factor in (1, 1.5))
    assert errors(real, strong) == pytest.approx(
        {"level": 0.5, "correlation": 0, "covariance": 1.25, "spectrum": 0.5}
    )


def test_errors_of_what_is_not_correlated() -> None:
    clean, n = ramp(), white(7, SIZE + 1)
    smooth = (n[1:, 1:] + n[:-1, 1:] + n[1:, :-1] + n[:-1, :-1]) / 2
    grey = np.repeat(smooth[..., :1], 3, axis=2)
    real, other = Curves.of(Sums.of(4 * grey, clean)), Curves.of(Sums.of(4 * white(8), clean))
    found = errors(real, other)
    assert found["correlation"] == pytest.approx(1, abs=0.05)
    # Covariance 16 everywhere, against 16 on the diagonal alone: 6 of 9 equal entries are lost.
    assert found["covariance"] == pytest.approx(math.sqrt(6 / 9), abs=0.03)
    assert found["level"] < 0.03


def test_sums_of_pictures_are_pooled_by_their_weights() -> None:
    clean = ramp(64)
    parts = [Sums.of((i + 1) * white(i, 64), clean) for i in range(3)]
    both = Sums.stack(parts).weighted(np.array([2.0, 0.0, 1.0]))
    for name in ("counts", "level", "correlation", "covariance", "power"):
        a, c = (getattr(parts[i], name) for i in (0, 2))
        assert getattr(both, name) == pytest.approx((2 * a + c) / 3)
    mean = Sums.mean([parts[0], parts[0], parts[2]])
    assert mean.power == pytest.approx(both.power)
    level = Curves.of(mean).level
    assert np.mean(level**2) == pytest.approx((2 * 1 + 9) / 3, rel=0.1)
