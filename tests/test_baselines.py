"""Baselines: what they fit on noise of known properties, and the face they share."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deflow_aug.baselines import (
    Baseline,
    ClassicalChain,
    NoFlatAreasError,
    NoisePatches,
    Nothing,
    SignalDependentNoise,
    WhiteNoise,
    fit_all,
)
from deflow_aug.baselines.gaussian import NoiseLevel, _non_negative, robust_level
from deflow_aug.evaluation.noise import channel_correlation, lag_correlation
from deflow_aug.flat import flat_windows

NAMES = ["nothing", "white", "signal-dependent", "noise patches", "classical chain"]


def content(seed: int, size: int = 256) -> np.ndarray:
    """Steps of grey, a colour cast, and a third full of texture, [size, size, 3] in levels."""
    rng = np.random.default_rng([7, seed])
    steps = np.kron(rng.uniform(50, 200, (4, 4)), np.ones((size // 4, size // 4)))
    picture = steps[..., None] + rng.uniform(-15, 15, 3)
    wide = size // 3
    picture[:, :wide] += 25 * rng.standard_normal((size, wide, 1))
    return picture


def photographs(
    noise: Callable[[np.random.Generator, np.ndarray], np.ndarray], count: int = 6, size: int = 256
) -> list[np.ndarray]:
    result = []
    for i in range(count):
        rng, picture = np.random.default_rng([3, i]), content(i, size)
        result.append(np.clip(np.rint(picture + noise(rng, picture)), 0, 255).astype(np.uint8))
    return result


def white(sigma: float) -> Callable[[np.random.Generator, np.ndarray], np.ndarray]:
    return lambda rng, picture: sigma * rng.standard_normal(picture.shape)


def correlated(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Boxes 2 x 2 of white noise, half of it shared by the channels: lag-1 1/2, R-G 1/2, std 4."""
    n = rng.standard_normal((picture.shape[0] + 1, picture.shape[1] + 1, 4))
    n = (n[1:, 1:] + n[:-1, 1:] + n[1:, :-1] + n[:-1, :-1]) / 2
    return 4 * (n[..., :3] + n[..., 3:]) / np.sqrt(2)


@pytest.fixture(scope="module")
def fitted() -> dict[str, Baseline]:
    return fit_all(photographs(correlated, 3), seed=0)


def grey(level: int = 128, height: int = 200, width: int = 240) -> np.ndarray:
    return np.full((height, width, 3), level / 255, np.float64)


def noise_in(baseline: Baseline, clean: np.ndarray, **settings: Any) -> np.ndarray:
    """The noise in levels that a float image gets: not rounded."""
    return 255 * (baseline.degrade(clean, **settings) - clean)


# -- what is fitted --------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1.5, 5.0, 12.0])
def test_white_noise_finds_the_level_beside_texture(sigma: float) -> None:
    found = WhiteNoise.fit(photographs(white(sigma)))
    # Rounding to 8 bits adds 1/12.
    assert found.sigma == pytest.approx(np.sqrt(sigma**2 + 1 / 12), rel=0.03)


def test_flat_windows_of_flat_photographs_are_all_of_them_and_without_bias() -> None:
    rng = np.random.default_rng(0)
    noise = 20 * rng.standard_normal((1024, 1024, 3))
    flat = np.rint(128 + noise).clip(0, 255).astype(np.uint8)
    (found,) = flat_windows([flat], seed=0)
    assert len(found.mean) == 64 * 64
    assert found.variance.mean() == pytest.approx(400 + 1 / 12, rel=0.0025)
    assert found.mean.mean() == pytest.approx(128, abs=0.1)


def test_white_noise_is_the_mean_variance_of_photographs_of_several_levels() -> None:
    levels = [2.0, 4.0, 8.0]
    mixed = [photographs(white(one), 1)[0] for one in levels]
    expected = np.sqrt(np.mean(np.square(levels)) + 1 / 12)
    assert WhiteNoise.fit(mixed).sigma == pytest.approx(expected, rel=0.03)


def test_white_noise_samples_have_its_statistics() -> None:
    noise = noise_in(WhiteNoise(6.0), grey(), seed=3)
    assert noise.std() == pytest.approx(6.0, rel=0.01)
    assert abs(noise.mean()) < 0.06
    assert np.abs([*lag_correlation(noise), *channel_correlation(noise)]).max() < 0.02


@pytest.mark.parametrize(("slope", "offset"), [(0.2, 4.0), (0.5, 0.0), (0.0, 25.0), (-0.1, 30.0)])
def test_signal_dependent_noise_finds_the_noise_level_function(slope: float, offset: float) -> None:
    def noise(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
        variance = np.maximum(slope * picture + offset, 0)
        return np.sqrt(variance) * rng.standard_normal(picture.shape)

    found = SignalDependentNoise.fit(photographs(noise, 12))
    for intensity in (70.0, 120.0, 180.0):
        expected = slope * intensity + offset + 1 / 12
        for level in found.levels:
            at = float(level.variance(torch.tensor(intensity, dtype=torch.float64)))
            assert at == pytest.approx(expected, rel=0.06)


def test_signal_dependent_samples_have_the_variance_of_their_intensity() -> None:
    level = NoiseLevel(dark=50, bright=200, variance_dark=4, variance_bright=34)
    baseline = SignalDependentNoise([level, level, NoiseLevel(50, 200, 9, 9)])
    for intensity, variance in ((20, 4), (50, 4), (100, 14), (200, 34), (220, 34)):
        noise = noise_in(baseline, grey(intensity), seed=1)
        assert noise[..., :2].var() == pytest.approx(variance, rel=0.03)
        assert noise[..., 2].var() == pytest.approx(9, rel=0.03)


def test_noise_levels_are_never_negative() -> None:
    t = np.linspace(0, 1, 200)
    design = np.stack([1 - t, t], axis=1)
    convex = 20 * t**4
    assert np.linalg.lstsq(design, convex, rcond=None)[0][0] < -1
    dark, bright = _non_negative(design, convex, np.ones(200))
    assert dark == 0
    assert bright == pytest.approx((t * convex).sum() / (t**2).sum())
    assert _non_negative(design, convex[::-1], np.ones(200)) == pytest.approx([bright, 0])
    steep = robust_level(200 * t, convex, np.ones(200))
    assert min(steep.variance_dark, steep.variance_bright) >= 0


def test_windows_with_texture_count_little_in_noise_levels() -> None:
    rng = np.random.default_rng(0)
    intensity = rng.uniform(0, 200, 4000)
    variance = (2 + 0.1 * intensity) * rng.normal(1, 0.1, 4000)
    variance[:200] *= 30  # a twentieth, with texture
    level = robust_level(intensity, variance, np.ones(4000))
    assert level.variance_dark == pytest.approx(2.2, rel=0.1)
    assert level.variance_bright == pytest.approx(21.8, rel=0.1)


def test_noise_levels_of_photographs_of_one_intensity() -> None:
    rng = np.random.default_rng(0)
    level = robust_level(np.full(500, 90.0), rng.normal(16, 1, 500), np.ones(500))
    at = level.variance(torch.tensor([0.0, 90.0, 255.0]))
    assert at.tolist() == pytest.approx([16, 16, 16], rel=0.02)


def test_noise_patches_keep_level_and_correlation_of_the_real_noise() -> None:
    real = photographs(correlated, 4, 384)
    baseline = NoisePatches.fit(real, size=64)
    noise = noise_in(baseline, grey(128, 400, 400), seed=5)
    # The mean that each part loses is 40 x 40 pixels': 4 / 1600 of the variance.
    assert noise.std() == pytest.approx(4.0, rel=0.03)
    assert lag_correlation(noise) == pytest.approx((0.5, 0.5), abs=0.03)
    assert channel_correlation(noise) == pytest.approx((0.5, 0.5, 0.5), abs=0.04)
    assert baseline.describe()["photographs"] == 4


def test_noise_patches_have_no_lattice() -> None:
    """Where parts meet, variance and correlation are as elsewhere, in one image and over many."""
    baseline = NoisePatches.fit(photographs(correlated, 4, 384), size=64)
    clean = grey(128, 1024, 1024)
    noise = noise_in(baseline, clean, seed=1)
    stride = 32  # of the parts: the grid's period, wherever it begins
    for lines in (noise, noise.swapaxes(0, 1)):
        squares = (lines**2).mean(axis=(0, 2)).reshape(-1, stride).mean(axis=0)
        products = (lines[:, :-1] * lines[:, 1:]).mean(axis=(0, 2))[: 31 * stride]
        correlation = products.reshape(-1, stride).mean(axis=0) / noise.var()
        assert squares / noise.var() == pytest.approx(np.ones(stride), abs=0.08)
        assert correlation == pytest.approx(np.full(stride, 0.5), abs=0.05)
    assert not np.array_equal(noise[:stride, :stride], noise[stride : 2 * stride, :stride])


def test_the_grid_of_parts_begins_anywhere() -> None:
    rng = np.random.default_rng(0)
    signs = rng.choice(np.array([100, 140], np.uint8), (40, 64, 64, 1)).repeat(3, axis=-1)
    baseline = NoisePatches(signs, [0] * len(signs))
    mixed = []
    for seed in range(200):
        # Levels of 20, but for the mean of a part, where only one part reaches.
        size = np.abs(noise_in(baseline, grey(128, 96, 96), seed=seed))
        mixed.append((np.abs(size - 20) > 4).mean(axis=(0, 2)) > 0.6)
    share = np.mean(mixed, axis=0)
    # Overlaps of 8 in strides of 32, less their two ends, where hardly anything is mixed.
    assert share == pytest.approx(np.full(96, 6 / 32), abs=0.1)


def test_noise_of_one_image_comes_from_one_photograph() -> None:
    two = [photographs(white(sigma), 1)[0] for sigma in (1.0, 4.0)]
    baseline = NoisePatches.fit(two, size=32)
    each = [noise_in(baseline, grey(128, 160, 160), seed=i).std() for i in range(30)]
    near = [abs(one - 1.04) < 0.2 or abs(one - 4.01) < 0.3 for one in each]
    assert all(near)
    assert min(each) < 2 < max(each)


def test_patches_are_smooth_bright_and_few() -> None:
    real = photographs(white(3.0), 4)
    patches = NoisePatches.fit(real, size=32, max_variance=10.0, raise_to_noise=False)
    values = patches.patches @ np.array([0.299, 0.587, 0.114])
    assert values.var(axis=(1, 2)).max() < 10
    bright = NoisePatches.fit(real, size=32, max_variance=10.0, min_mean=120.0)
    assert (bright.patches @ np.array([0.299, 0.587, 0.114])).mean(axis=(1, 2)).min() > 120
    many = NoisePatches.fit([np.tile(one, (3, 3, 1)) for one in real], size=16)
    assert len(many.patches) == 512 < many.describe()["passed"]


def test_the_threshold_is_raised_where_the_noise_itself_is_above_it() -> None:
    real = [photographs(white(sigma), 1)[0] for sigma in (3.0, 9.0, 12.0)]
    published = NoisePatches.fit(real, size=32, raise_to_noise=False)
    raised = NoisePatches.fit(real, size=32)
    assert published.describe()["raised_in"] == 0
    assert published.describe()["photographs"] == 1
    assert raised.describe()["raised_in"] == 2
    assert raised.describe()["photographs"] == 3
    # White noise of sigma has grey values of 0.669 sigma.
    assert 0.35 * 81 < raised.describe()["largest_variance"] < 2.1 * 0.447 * 144


def test_where_no_patch_passes_the_smoothest_are_taken_with_a_warning() -> None:
    real = photographs(white(12.0), 3)
    with pytest.warns(UserWarning, match=r"only 0 patches .* taking the 16 of least variance"):
        baseline = NoisePatches.fit(real, size=32, raise_to_noise=False)
    facts = baseline.describe()
    assert facts["passed"] == 0
    assert facts["patches"] == 16
    assert facts["largest_variance"] > facts["max_variance"]
    noise = noise_in(baseline, grey(), seed=0)
    assert noise.std() == pytest.approx(12, rel=0.1)


def test_chain_is_its_four_steps_with_the_strengths_it_draws() -> None:
    chain = ClassicalChain()
    draws = [chain.draw(1.0, seed, 0) for seed in range(200)]
    blur, scale, noise, quality = (
        np.array([one[i][name] for one in draws])
        for i, name in enumerate(("sigma", "scale", "sigma", "quality"))
    )
    for values, (low, high) in (
        (blur, (0.2, 1.5)),
        (scale, (0.5, 1.0)),
        (noise * 255, (1, 15)),
        (quality, (50, 95)),
    ):
        assert low <= values.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < values.max() <= high
    half = chain.draw(0.5, 0, 0)
    assert half[0]["sigma"] == pytest.approx(blur[0] / 2)
    assert half[1]["scale"] == pytest.approx(1 - (1 - scale[0]) / 2)
    assert half[2]["sigma"] == pytest.approx(noise[0] / 2)
    assert half[3]["quality"] == round(100 - (100 - quality[0]) / 2)
    strong = chain.draw(1000.0, 0, 0)
    assert strong[3]["quality"] == 1
    assert strong[1]["scale"] > 0


def test_chain_blurs_adds_noise_and_compresses() -> None:
    rng = np.random.default_rng(0)
    texture = rng.random((64, 64, 3)) * 0.5 + 0.25
    changed = ClassicalChain().degrade(texture, seed=2)
    assert changed.std() < 0.8 * texture.std()
    flat = noise_in(ClassicalChain(), grey(), seed=2)
    assert 0.3 < flat.std() < 15


# -- the face that all share -----------------------------------------------------------------------


def test_all_are_fitted_in_the_order_of_tables(fitted: dict[str, Baseline]) -> None:
    assert list(fitted) == NAMES
    assert [one.name for one in fitted.values()] == NAMES
    for baseline in fitted.values():
        assert json.loads(json.dumps(baseline.describe())) == baseline.describe()
    assert isinstance(fitted["nothing"], Nothing)


def test_fitting_depends_on_its_seed_alone() -> None:
    large = [np.tile(one, (6, 6, 1)) for one in photographs(white(3.0), 1)]
    first, second, other = (NoisePatches.fit(large, size=16, seed=one) for one in (0, 0, 1))
    assert np.array_equal(first.patches, second.patches)
    assert not np.array_equal(first.patches, other.patches)
    a, b, c = (WhiteNoise.fit(large, seed=one).sigma for one in (0, 0, 1))
    assert a == b != c


@pytest.mark.parametrize("name", NAMES)
def test_results_depend_on_the_seed_alone(name: str, fitted: dict[str, Baseline]) -> None:
    baseline = fitted[name]
    batch = (np.random.default_rng(0).random((3, 40, 56, 3)) * 255).astype(np.uint8)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    state, state_np = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    together = baseline.degrade(batch, [1.0, 0.5, 2.0], 2, seed=[5, 6, 7])
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(state_np, np.random.get_state()[1])  # noqa: NPY002
    assert together.shape == (2, 3, 40, 56, 3)
    alone = baseline.degrade(batch[1], 0.5, seed=6)
    assert np.array_equal(alone, together[0, 1])
    if name == "nothing":
        return
    assert not np.array_equal(together[0], together[1])
    assert not np.array_equal(alone, baseline.degrade(batch[1], 0.5, seed=7))
    fresh = [baseline.degrade(batch[0]) for _ in range(2)]
    assert not np.array_equal(*fresh)


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_image_comes_back_as_it_came(name: str, fitted: dict[str, Baseline]) -> None:
    baseline = fitted[name]
    rgb = (np.random.default_rng(1).random((33, 21, 3)) * 255).astype(np.uint8)
    rgba = np.dstack([rgb, np.arange(33 * 21).reshape(33, 21).astype(np.uint8)])
    images: list[Any] = [
        rgb,
        rgb[..., 0],
        rgba,
        rgb.astype(np.uint16) * 257,
        (rgb / 255).astype(np.float32),
        torch.from_numpy(rgb).permute(2, 0, 1),
        torch.from_numpy(rgb).permute(2, 0, 1).double()[None] / 255,
    ]
    for image in images:
        same = baseline.degrade(image, 0, seed=1)
        changed = baseline.degrade(image, 1, seed=1)
        for result in (same, changed):
            assert type(result) is type(image)
            assert result.shape == image.shape
            assert result.dtype == image.dtype
        as_float = [np.asarray(one, dtype=np.float64) for one in (same, image, changed)]
        assert np.abs(as_float[0] - as_float[1]).max() < 1e-6
        assert (np.abs(as_float[2] - as_float[1]).max() > 1e-3) == (name != "nothing")
    assert np.array_equal(baseline.degrade(rgba, seed=1)[..., 3], rgba[..., 3])
    samples = baseline.degrade(Image.fromarray(rgba), n_samples=2, seed=1)
    assert [one.mode for one in samples] == ["RGBA", "RGBA"]
    assert np.array_equal(np.asarray(samples[0]), baseline.degrade(rgba, n_samples=2, seed=1)[0])


@pytest.mark.parametrize("name", NAMES[1:4])
def test_temperature_scales_the_noise(name: str, fitted: dict[str, Baseline]) -> None:
    weak, strong = (noise_in(fitted[name], grey(), temperature=tau, seed=9) for tau in (0.5, 1.5))
    assert np.allclose(3 * weak, strong, atol=1e-3)
    assert strong.std() > 1


def test_noise_of_any_size_of_image(fitted: dict[str, Baseline]) -> None:
    for size in itertools.product((1, 7, 63, 130), repeat=2):
        noise = noise_in(fitted["noise patches"], grey(128, *size), seed=0)
        assert noise.shape == (*size, 3)
        assert np.abs(noise).min() < 20


# -- errors ----------------------------------------------------------------------------------------


def test_errors_say_what_is_wrong() -> None:
    for fit in (fit_all, WhiteNoise.fit, SignalDependentNoise.fit, NoisePatches.fit):
        with pytest.raises(ValueError, match="no degraded photographs"):
            fit([])
        with pytest.raises(TypeError, match=r"uint8 arrays \[H, W, 3\], got float64"):
            fit([np.zeros((64, 64, 3))])
        with pytest.raises(TypeError, match="got Image"):
            fit([Image.new("RGB", (64, 64))])  # type: ignore[list-item]
        with pytest.raises(ValueError, match=r"got shape \(64, 3\).*into a list"):
            fit(np.zeros((64, 64, 3), np.uint8))  # type: ignore[arg-type]
    for empty in (0, 90, 255):  # clipped, or without any noise
        with pytest.raises(NoFlatAreasError, match="none of the 2 degraded photographs"):
            WhiteNoise.fit([np.full((128, 128, 3), empty, np.uint8)] * 2)
        with pytest.raises(NoFlatAreasError, match="no degraded photograph has a patch of 64"):
            NoisePatches.fit([np.full((128, 128, 3), empty, np.uint8)])
    with pytest.raises(NoFlatAreasError, match="give larger photographs"):
        SignalDependentNoise.fit([photographs(white(3), 1)[0][:40, :40]])
    with pytest.raises(NoFlatAreasError, match="smaller size"):
        NoisePatches.fit([photographs(white(3), 1)[0][:40, :40]])
    with pytest.raises(ValueError, match="size must be an integer of at least 8"):
        NoisePatches.fit(photographs(white(3), 1), size=4)
    with pytest.raises(ValueError, match="sigma must be finite"):
        WhiteNoise(float("nan"))
    with pytest.raises(ValueError, match="each of 3 channels"):
        SignalDependentNoise([NoiseLevel(0, 255, 1, 1)])
    with pytest.raises(ValueError, match=r"\[N, size, size, 3\]"):
        NoisePatches(np.zeros((0, 64, 64, 3), np.uint8), [])
    with pytest.raises(ValueError, match="n_samples"):
        Nothing().degrade(np.zeros((8, 8, 3), np.uint8), n_samples=0)
    with pytest.raises(ValueError, match="temperature"):
        Nothing().degrade(np.zeros((8, 8, 3), np.uint8), -1)
    with pytest.raises(ValueError, match="one seed, or 1"):
        Nothing().degrade(np.zeros((8, 8, 3), np.uint8), seed=[1, 2])


def test_fitting_where_patches_pass_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_all(photographs(white(3.0), 3))
