"""Comparing the noise of samples with that of the photographs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import small_model
from test_training_noise import SIGMA, flat_pictures
from tiny_run import write_noise

from deflow_aug.config import ChannelStatistics
from deflow_aug.data.folders import CropFolder
from deflow_aug.training import noise_check
from deflow_aug.training.noise_check import (
    Comparison,
    Noise,
    clean_crops,
    of_photographs,
    of_samples,
)


def test_photographs_show_their_noise_where_they_are_flat(tmp_path: Path) -> None:
    write_noise(tmp_path / "busy" / "a.png", 64, seed=0)
    folders = {
        "clean": flat_pictures(tmp_path / "clean", 1.0, 0),
        "degraded": flat_pictures(tmp_path / "degraded", SIGMA, 1),
        "busy": CropFolder(tmp_path / "busy", 8, 2),
    }
    found = of_photographs(folders, seed=0)
    assert list(found) == ["degraded"]
    assert found["degraded"].std == pytest.approx(SIGMA, rel=0.03)
    assert found["degraded"].lag == pytest.approx(0, abs=0.03)


class Known:
    """A degrader that adds noise of 5 levels to images in a domain's colours."""

    def __init__(self, model: Any, **_: Any) -> None:
        self.model = model

    def degrade(self, images: torch.Tensor, *, seed: list[int], domain: str) -> torch.Tensor:
        pixels = images.permute(0, 2, 3, 1).numpy()
        coloured = noise_check.in_colours(self.model, pixels, domain)
        noise = np.stack(
            [
                np.random.default_rng(s).normal(0, 5, one.shape)
                for s, one in zip(seed, pixels, strict=True)
            ]
        )
        noisy = np.clip(np.rint(coloured + noise), 0, 255).astype(np.uint8)
        return torch.from_numpy(noisy).permute(0, 3, 1, 2)


@pytest.mark.parametrize("recoloured", [False, True])
def test_noise_of_samples_is_what_degrading_adds(
    recoloured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statistics = ChannelStatistics((0.5,) * 3, (0.2,) * 3, (0.5, 0.45, 0.4), (0.15,) * 3)
    model = small_model(statistics={"degraded": statistics} if recoloured else None)
    flat_pictures(tmp_path / "clean", 1.0, 0)
    monkeypatch.setattr(noise_check, "DeFlowDegrader", Known)
    clean = clean_crops(CropFolder(tmp_path / "clean", 48, 2), seed=0)
    real = Noise(6.0, 0.5)
    found = of_samples(model, "degraded", clean, real, seed=0)
    assert found is not None
    assert found.std == pytest.approx(5, rel=0.02)
    assert found.lag == pytest.approx(0, abs=0.02)
    assert of_samples(model, "degraded", clean, real, seed=0) == found
    # Of less noise nothing in the crops is as flat; smaller crops have no windows.
    assert of_samples(model, "degraded", clean, Noise(0.5, 0.5), seed=0) is None
    small = clean_crops(CropFolder(tmp_path / "clean", 8, 2), seed=0)
    assert of_samples(model, "degraded", small, real, seed=0) is None


def test_noise_of_samples_is_that_of_flat_areas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is texture, degrading may add other things."""

    class Texture(Known):
        def degrade(self, images: torch.Tensor, *, seed: list[int], domain: str) -> torch.Tensor:
            degraded = super().degrade(images, seed=seed, domain=domain)
            busy = torch.arange(images.shape[-1]) >= images.shape[-1] - 16
            return torch.where(busy, 255 - degraded, degraded)

    rng = np.random.default_rng(9)
    pixels = 100 + rng.integers(-1, 2, (48, 48, 3))
    pixels[:, 32:] += rng.integers(-80, 80, (48, 16, 3))
    picture = pixels.astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    monkeypatch.setattr(noise_check, "DeFlowDegrader", Texture)
    monkeypatch.setattr(CropFolder, "draw", lambda self, *key: picture)  # not turned
    clean = clean_crops(CropFolder(tmp_path, 48, 2), seed=0)
    found = of_samples(small_model(), "degraded", clean, Noise(6.0, 0.5), seed=0)
    assert found is not None
    assert found.std == pytest.approx(5, rel=0.03)


@pytest.mark.parametrize(
    ("samples", "photographs", "apart"),
    [
        ((33.3, 0.86), (3.1, 0.74), True),  # 20 steps on camera noise
        ((7.4, 0.67), (3.1, 0.74), True),  # 400
        ((3.0, 0.58), (3.1, 0.74), False),  # 1550
        ((11.7, 0.46), (13.0, 0.56), False),  # 2000 on low light
        ((1.5, 0.7), (3.1, 0.74), True),
        ((3.0, 0.0), (3.1, 0.74), True),  # white
        ((math.nan, math.nan), (3.1, 0.74), True),
    ],
)
def test_what_is_far_apart(
    samples: tuple[float, float], photographs: tuple[float, float], apart: bool
) -> None:
    assert Comparison(Noise(*samples), Noise(*photographs)).far_apart == apart
