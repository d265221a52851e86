"""Noise injection: what is left of smooth areas of real photographs, without their mean, added."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deflow_aug import randomness
from deflow_aug.arguments import is_integer, span, whole
from deflow_aug.baselines.base import Baseline
from deflow_aug.flat import (
    LUMA,
    SPREAD,
    Array,
    Image8,
    NoFlatAreasError,
    checked,
    grey_levels,
    grey_variance,
    windows,
)
from deflow_aug.randomness import Stream

_FEWEST = 16  # patches, below which the threshold gives way
_MOST = 512  # patches that are kept: 25 MB of 64 x 64


class NoisePatches(Baseline):
    """Noise injection of "Impressionism" (Ji et al., NTIRE 2020), the paper's strongest rival.

    **The method.** Degraded photographs are cut into patches side by side. Those whose grey values
    have a variance below a threshold, and a mean above another, hold noise and no content. For a
    clean training image one of them is drawn, a part of it of the image's size is cut out at
    random, the part's mean is taken off each channel, and it is added. The released code has
    patches of 256 x 256, variance below 20 (levels squared), mean above 0 (of 50 for the phone
    photographs of DPED), and training images of 32 x 32.

    **Here.** Patches are of 64 x 64 unless told, since photographs of half a megapixel hold next to
    no flat area of 256 x 256, and the parts are smaller than either; where the noise itself is
    above the threshold, that is raised (:meth:`fit`). An image that is larger than a
    part is covered by many: their grid has a random offset, they are drawn from the patches of one
    photograph, so that the noise has one level in an image, and cut out at random places. They
    overlap by a quarter of their stride, where they are cross-faded with weights whose squares add
    up to 1: that leaves the variance and the correlation of neighbours as they are, and no seams.

    Args:
        patches: uint8 [N, size, size, 3].
        photographs: [N], the number of the photograph that each comes from.
        settings: how they were chosen, JSON values, for :meth:`describe`.

    Raises:
        ValueError: for patches that are none, or not square, or smaller than 8 x 8.
    """

    name = "noise patches"

    def __init__(
        self,
        patches: NDArray[np.uint8],
        photographs: Sequence[int],
        settings: dict[str, Any] | None = None,
    ) -> None:
        shape = patches.shape
        if len(shape) != 4 or not shape[0] or shape[1] != shape[2] or shape[3] != 3:
            raise ValueError(f"patches must be an array [N, size, size, 3], got shape {shape}")
        if shape[1] < 8:
            raise ValueError(f"patches must have at least 8 x 8 pixels, got {shape[1]}")
        if len(photographs) != len(patches):
            raise ValueError(f"expected {len(patches)} photographs, got {len(photographs)}")
        self.patches, self.photographs = patches, np.asarray(photographs, dtype=np.int64)
        self.settings = dict(settings or {})
        self.stride = shape[1] // 2
        self.overlap = self.stride // 4

    @classmethod
    def fit(
        cls,
        degraded: Sequence[Image8],
        *,
        seed: int = 0,
        size: int = 64,
        max_variance: float = 20.0,
        min_mean: float = 0.0,
        raise_to_noise: bool = True,
    ) -> NoisePatches:
        """Patches from smooth areas of degraded photographs, uint8 [H, W, 3] each.

        A threshold below the variance of the noise itself would take the patches that happen to
        have the least, or dark ones. So it is raised, in photographs whose own noise is stronger,
        to twice the variance of their flat windows (``flat.grey_levels``).

        If fewer than 16 patches pass, it says so by a warning and in :meth:`describe`, and takes
        the 16 of least variance among those that are bright enough. Patches without any variance
        (borders, clipped areas) are never taken. Of more than 512, ``seed`` chooses.

        Args:
            degraded: the photographs.
            seed: of the choice.
            size: side of the patches, in pixels, at least 8.
            max_variance: their grey values' variance is below it, in levels squared.
            min_mean: their grey values' mean is above it, in levels.
            raise_to_noise: False leaves the threshold as it is, as published.

        Raises:
            TypeError, ValueError: for photographs of another kind, or none, and other settings.
            NoFlatAreasError: if no photograph has a patch of this size that is bright enough.
        """
        photographs = checked(degraded)
        if not is_integer(size) or size < 8:
            raise ValueError(f"size must be an integer of at least 8, got {size!r}")
        span("max_variance", max_variance, 0)
        span("min_mean", min_mean, 0, 255)
        whole("seed", seed)
        limits = np.full(len(photographs), float(max_variance))
        if raise_to_noise:
            limits = np.maximum(limits, SPREAD * grey_levels(photographs, seed))
        candidates = _candidates(photographs, size, min_mean, limits)
        chosen, passed = _chosen(candidates, limits, size, seed)
        facts = {
            "size": size,
            "max_variance": float(max_variance),
            "min_mean": float(min_mean),
            "raised_in": int(np.count_nonzero(limits > max_variance)),
            "passed": passed,
            "largest_variance": float(candidates.variance[chosen].max()),
        }
        return cls(candidates.patches[chosen], candidates.photographs[chosen].tolist(), facts)

    def _sample(self, image: Tensor, temperature: float, seed: int, number: int) -> Tensor:
        noise = self._noise(image.shape[-2], image.shape[-1], seed, number)
        return image + temperature / 255 * torch.from_numpy(noise).to(image)

    def _noise(self, height: int, width: int, seed: int, number: int) -> NDArray[np.float32]:
        """Noise [3, height, width] in levels."""
        draw = randomness.generator(seed, Stream.LATENT, number)
        # As a patch drawn among all, so that photographs with many come as often as in the method.
        photograph = self.photographs[draw.integers(len(self.patches))]
        own = np.flatnonzero(self.photographs == photograph)
        part = self.stride + self.overlap
        fade = _fade(part, self.overlap)
        # The first part's overlap lies outside, wherever the grid begins.
        offsets = draw.integers(self.stride, size=2)
        rows, columns = (
            math.ceil((side + offset + self.overlap) / self.stride)
            for side, offset in zip((height, width), offsets, strict=True)
        )
        canvas = np.zeros(
            (rows * self.stride + self.overlap, columns * self.stride + self.overlap, 3),
            np.float32,
        )
        which = draw.choice(own, size=(rows, columns))
        room = self.patches.shape[1] - part + 1
        tops, lefts = draw.integers(room, size=(2, rows, columns))
        for i, j in np.ndindex(rows, columns):
            top, left = tops[i, j], lefts[i, j]
            cut = self.patches[which[i, j], top : top + part, left : left + part]
            noise = (cut - cut.mean(axis=(0, 1))).astype(np.float32)
            y, x = i * self.stride, j * self.stride
            canvas[y : y + part, x : x + part] += noise * fade
        first, second = (offset + self.overlap for offset in offsets)
        window = canvas[first : first + height, second : second + width]
        return np.ascontiguousarray(window.transpose(2, 0, 1))

    def describe(self) -> dict[str, Any]:
        """The thresholds, how many patches passed, are kept, and of how many photographs."""
        return {
            **self.settings,
            "patches": len(self.patches),
            "photographs": len(np.unique(self.photographs)),
        }


@dataclass(frozen=True)
class _Candidates:
    patches: NDArray[np.uint8]  # [N, size, size, 3]
    variance: Array  # [N], of grey values
    photographs: NDArray[np.int64]  # [N]


def _candidates(
    photographs: Sequence[Image8], size: int, min_mean: float, limits: Array
) -> _Candidates:
    """Of each photograph the bright patches below its limit, or else some of least variance."""
    found, variances, sources = [], [], []
    for number, photograph in enumerate(photographs):
        cut = windows(photograph, size)
        variance, mean = grey_variance(cut), (cut @ LUMA).mean(axis=(1, 2))
        usable = np.flatnonzero((mean > min_mean) & (variance > 0))
        usable = usable[np.argsort(variance[usable], kind="stable")]
        # No more are ever kept, even if no other photograph has any.
        keep = max(_FEWEST, int(np.count_nonzero(variance[usable] < limits[number])))
        found.append(cut[usable[:keep]])
        variances.append(variance[usable[:keep]])
        sources.append(np.full(len(found[-1]), number))
    result = _Candidates(*(np.concatenate(one) for one in (found, variances, sources)))
    if not len(result.patches):
        raise NoFlatAreasError(
            f"no degraded photograph has a patch of {size} x {size} pixels that is brighter than "
            f"{min_mean:g} and not all of one colour; give larger photographs, or a smaller size "
            f"or min_mean"
        )
    return result


def _chosen(
    candidates: _Candidates, limits: Array, size: int, seed: int
) -> tuple[NDArray[np.intp], int]:
    """The numbers of the candidates to keep, and how many passed."""
    variance = candidates.variance
    chosen = np.flatnonzero(variance < limits[candidates.photographs])
    passed = len(chosen)
    if passed < _FEWEST:
        chosen = np.sort(np.argsort(variance, kind="stable")[:_FEWEST])
        warnings.warn(
            f"only {passed} patches of {size} x {size} pixels have a variance below "
            f"{limits.max():.4g}: taking the {len(chosen)} of least variance, up to "
            f"{variance[chosen].max():.4g}",
            stacklevel=3,
        )
    if len(chosen) > _MOST:
        draw = randomness.generator(seed, Stream.FIT)
        chosen = np.sort(draw.choice(chosen, _MOST, replace=False))
    return chosen, passed


def _fade(part: int, overlap: int) -> NDArray[np.float32]:
    """Weights [part, part, 1] whose squares add up to 1 where parts overlap."""
    angle = (np.arange(overlap) + 0.5) / overlap * (np.pi / 2)
    line = np.ones(part)
    line[:overlap], line[part - overlap :] = np.sin(angle), np.cos(angle)
    return (line[:, None] * line)[..., None].astype(np.float32)
