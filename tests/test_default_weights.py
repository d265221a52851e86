"""The weights that ship: small, alive, and adding noise like a camera's to clean photographs."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deflow_aug import DeFlowDegrader
from deflow_aug.evaluation.noise import NoiseStatistics
from deflow_aug.hub import bundled_weights
from deflow_aug.latent import ShiftHealth

IMAGES = Path(__file__).parents[1] / "examples" / "images"
NAMES = ("dog", "city", "flowers")


@pytest.fixture(scope="module")
def degrader() -> DeFlowDegrader:
    return DeFlowDegrader.from_pretrained(device="cpu")


def photo(name: str) -> np.ndarray:
    with Image.open(IMAGES / f"{name}.png") as image:
        return np.asarray(image.convert("RGB"))[:256, :256]


def test_they_are_small_enough_to_ship() -> None:
    folder = bundled_weights()["camera-noise"]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8e6


def test_the_shift_has_not_collapsed(degrader: DeFlowDegrader) -> None:
    for shift in degrader.model.domain_shifts():
        assert not ShiftHealth.of(shift, 1).collapsed


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_like_that_of_the_cameras(degrader: DeFlowDegrader, name: str) -> None:
    """Wide bounds around the real noise of the validation pairs: level 2.2 to 5.8, lag-1
    correlation 0.5 to 0.8, R-G correlation 0.4 to 0.9. White noise has correlations of 0."""
    clean = photo(name)
    noise = NoiseStatistics.between(degrader.degrade(clean, seed=0), clean)
    assert 1.5 < noise.std < 12
    assert 0.4 < noise.lag < 0.9
    assert 0.3 < noise.rg < 0.95


def test_samples_differ_and_keep_the_picture(degrader: DeFlowDegrader) -> None:
    clean = photo("dog")
    first, second = degrader.degrade(clean, n_samples=2, seed=1).astype(float)
    assert np.abs(first - second).mean() > 1
    # What is added averages out: the picture keeps its brightness and colours.
    for sample in (first, second):
        assert np.abs((sample - clean).mean((0, 1))).max() < 3


def test_temperature_zero_gives_the_photo_back(degrader: DeFlowDegrader) -> None:
    clean = photo("city")
    assert (degrader.degrade(clean, 0, seed=2) == clean).all()


def test_temperature_scales_the_noise(degrader: DeFlowDegrader) -> None:
    clean = photo("flowers")
    levels = [
        NoiseStatistics.between(degrader.degrade(clean, tau, seed=3), clean).std
        for tau in (0.25, 0.5, 1.0, 1.5)
    ]
    assert levels == sorted(levels)
    assert levels[-1] > 3 * levels[0]


def test_a_noisy_photo_is_more_likely_noisy(degrader: DeFlowDegrader) -> None:
    clean = photo("dog")
    noisy = degrader.degrade(clean, seed=4)
    gain = {
        domain: degrader.log_prob(noisy, domain) - degrader.log_prob(clean, domain)
        for domain in ("clean", "degraded")
    }
    assert gain["degraded"] > gain["clean"]
