"""Whether samples have the noise of the degraded photographs: what a training that is too short, or
has learned something else, does not reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from deflow_aug.config import CLEAN
from deflow_aug.data.folders import CropFolder
from deflow_aug.degrader import DeFlowDegrader
from deflow_aug.flat import (
    SIDE,
    Image8,
    NoFlatAreasError,
    flat_windows,
    measured,
    neighbours,
    windows,
)
from deflow_aug.model import DeFlow
from deflow_aug.noise_curve import neighbour_correlation, noise_level
from deflow_aug.randomness import Stream
from deflow_aug.training.samples import in_colours, is_collapsed
from deflow_aug.training.sources import SHEET
from deflow_aug.training.starting import MEASURED_IMAGES

CROPS = 32
"""Clean crops that are degraded; sheets show the first of them."""

BATCH, FEWEST = 8, 16
"""Crops at a time; flat windows of them that must be there."""

FACTOR, APART = 1.6, 0.3
"""Standard deviations and correlations that differ by more are far apart. Tried with the recipe
"small": on mild camera noise samples had 11 times the noise of the photographs after 20 steps
and 0.9 times after all 1550 (about 4, 2.3 and 1.5 after 200, 400 and 600, estimated from
samples before the corrections); on strong low-light noise with s = 4, 0.9 after 2000. In real
pairs the noise was 1.2 and 0.9 times what flat areas show. These also show more correlation
than there is, by 0.1 or so, for some texture is left in them."""


@dataclass(frozen=True)
class Noise:
    """Standard deviation in levels (1/255), and correlation of neighbouring pixels."""

    std: float
    lag: float

    def __str__(self) -> str:
        return f"{self.std:.1f} ({self.lag:.2f})"


@dataclass(frozen=True)
class Comparison:
    """The noise of samples and that of the degraded photographs, both in flat areas."""

    samples: Noise
    photographs: Noise

    @property
    def far_apart(self) -> bool:
        ratio = self.samples.std / self.photographs.std
        alike = 1 / FACTOR < ratio < FACTOR  # nan is not
        return not (alike and abs(self.samples.lag - self.photographs.lag) < APART)


def of_photographs(folders: Mapping[str, CropFolder], seed: int) -> dict[str, Noise]:
    """The noise of every degraded domain that has flat areas, as a recipe's is measured."""
    found = {}
    for name, folder in folders.items():
        if name == CLEAN:
            continue
        try:
            flat = flat_windows(folder.whole_pictures(MEASURED_IMAGES, seed), seed)
        except NoFlatAreasError:
            continue
        found[name] = Noise(noise_level(flat), neighbour_correlation(flat))
    return found


def clean_crops(folder: CropFolder, seed: int) -> Image8:
    """The clean crops of a run that are degraded for :func:`of_samples`, [CROPS, crop, crop, 3]."""
    return np.stack([folder.draw(seed, Stream.BATCH, SHEET + i) for i in range(CROPS)])


@torch.no_grad()
def of_samples(
    model: DeFlow, domain: str, crops: Image8, photographs: Noise, seed: int
) -> Noise | None:
    """The noise of samples where clean crops are flat, in windows as those of the photographs.

    Texture may well be degraded more than flat areas are (of old compact cameras 2.5 times). Flat
    are windows of clean crops that vary less than the noise of the photographs does. None where
    there are too few.
    """
    if crops.shape[1] < SIDE:
        return None
    device = next(model.parameters()).device
    degrader = DeFlowDegrader(model, device=device, dequantize=is_collapsed(model, domain))
    images = torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous()
    samples = [
        degrader.degrade(
            part, seed=[seed * CROPS + start + i for i in range(len(part))], domain=domain
        )
        for start, part in zip(range(0, CROPS, BATCH), images.split(BATCH), strict=True)
    ]
    degraded = torch.cat(samples).permute(0, 2, 3, 1).numpy()
    noise = degraded.astype(np.float64) - in_colours(model, crops, domain)
    _, spread, usable = measured(np.concatenate([windows(one, SIDE) for one in crops]))
    flat = usable & (spread.mean(1) <= photographs.std**2)
    if flat.sum() < FEWEST:
        return None
    cut = np.concatenate([windows(one, SIDE) for one in noise])[flat]
    variance = float(cut.var(axis=(1, 2), ddof=1).mean())
    covariance = float(neighbours(cut).mean())
    return Noise(variance**0.5, covariance / variance if variance else 0.0)
