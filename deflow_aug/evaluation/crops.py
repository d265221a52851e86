"""Crops of two folders of images, for asking what tells them apart."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deflow_aug import randomness
from deflow_aug.evaluation.auc import Bools, Integers
from deflow_aug.evaluation.photographs import left_out, usable
from deflow_aug.evaluation.scenes import scene_of
from deflow_aug.image_files import LEFT_OUT, image_size
from deflow_aug.image_folders import find_images
from deflow_aug.randomness import Stream

CROP = 256
"""Largest side of the crops, in pixels of the image: about what a training crop shows."""

CROPS = 8
"""Crops of an image, at most."""

LEAST_UNITS = 4
"""Images (scenes) that each domain needs."""

SMALLEST_SIDE = 8
"""Pixels that h of a crop must have; a scale that leaves fewer is left out."""


class LeakError(ValueError):
    """Two folders cannot be compared; the message says why and what to do."""


@dataclass(frozen=True)
class Crops:
    """Crops of both domains, 8 bits, the clean ones first.

    Args:
        pixels: uint8 [N, 3, crop, crop].
        degraded: whether a crop is of the degraded domain, [N].
        units: number of the image (scene) that a crop is of, [N].
        images: how many images the crops of each domain are of, clean and degraded.
        notes: what was left out, in sentences.
    """

    pixels: Tensor
    degraded: Bools
    units: Integers
    images: tuple[int, int]
    notes: tuple[str, ...]

    @property
    def side(self) -> int:
        """Side of the crops in pixels."""
        return self.pixels.shape[-1]


def load(
    clean: Path,
    degraded: Path,
    scales: Sequence[int],
    *,
    crop: int | None = None,
    images: int = 64,
    scenes: str | None = None,
    seed: int = 0,
) -> Crops:
    """Random crops of random images of two folders, read recursively.

    Crops start at multiples of all ``scales`` and have a side that is one, so that every scale is
    asked about the same pixels. Files that cannot be read and images smaller than the crop are
    left out and counted.

    Args:
        crop: side of the crops; by default 256, or less if many images are smaller.
        images: how many images of each folder, at most.
        scenes: a regular expression; images in whose path (relative to the folder, with /) its
            first group (or all of it, without one) matches the same text are one unit. By default
            every image is one.

    Raises:
        LeakError: folders that share files, or too few images.
    """
    folders = (clean, degraded)
    found = [find_images(folder) for folder in folders]
    shared = {os.path.realpath(p) for p in found[0]} & {os.path.realpath(p) for p in found[1]}
    if shared:
        raise LeakError(
            f"{clean} and {degraded} share {len(shared)} of their files, {sorted(shared)[0]} for "
            "one: the two domains must be different folders, neither inside the other"
        )
    for folder, files in zip(folders, found, strict=True):
        if len(files) < LEAST_UNITS:
            raise LeakError(
                f"{folder} has {len(files)} image files; at least {LEAST_UNITS} are needed, and "
                "some dozens for a clear answer"
            )
    align = math.lcm(*scales)
    orders = [
        randomness.generator(seed, Stream.SUGGEST, 0, d).permutation(len(found[d])) for d in (0, 1)
    ]
    chosen = [[found[d][i] for i in orders[d]] for d in (0, 1)]
    if crop is None:
        crop = _fitting_crop([paths[:images] for paths in chosen], align)
    if crop < align or crop % align:
        raise LeakError(
            f"crops of {crop} pixels do not divide by the scales {', '.join(map(str, scales))}: "
            f"choose a multiple of {align}, or leave large scales out"
        )
    notes: list[str] = []
    parts = [
        _domain(d, folders[d], chosen[d], crop, align, images, scenes, seed, notes) for d in (0, 1)
    ]
    lengths = [len(pixels) for pixels, _, _ in parts]
    units = np.concatenate([parts[0][1], parts[0][1].max() + 1 + parts[1][1]])
    return Crops(
        torch.cat([pixels for pixels, _, _ in parts]),
        np.repeat([False, True], lengths),
        units,
        (parts[0][2], parts[1][2]),
        tuple(notes),
    )


def _fitting_crop(chosen: Sequence[Sequence[Path]], align: int) -> int:
    """The side that nine in ten images of each folder reach, at most CROP, a multiple of align.

    Where most are large enough for every scale, the others do not count: they are left out.
    """
    least = CROP
    for paths in chosen:
        sides = []
        for path in paths:
            try:
                sides.append(min(image_size(path)))
            except LEFT_OUT:
                continue  # counted when it is read in full
        enough = [side for side in sides if side >= align * SMALLEST_SIDE]
        if len(enough) > len(sides) / 2:
            sides = enough
        if sides:
            least = min(least, int(np.quantile(sides, 0.1, method="lower")))
    return max(least // align, 1) * align


def _domain(
    number: int,
    folder: Path,
    paths: Sequence[Path],
    crop: int,
    align: int,
    images: int,
    scenes: str | None,
    seed: int,
    notes: list[str],
) -> tuple[Tensor, Integers, int]:
    """Crops uint8 [N, 3, crop, crop] of a folder, their units, and the number of images."""
    patches: list[Tensor] = []
    names: list[str] = []
    broken: list[str] = []
    small: list[str] = []
    read = 0
    for index, path, pixels in usable(paths[:images], crop, broken, small):
        try:
            name = scene_of(path.relative_to(folder).as_posix(), scenes)
        except ValueError as error:
            raise LeakError(str(error)) from error
        read += 1
        rng = randomness.generator(seed, Stream.SUGGEST, 1, number, index)
        rows, columns = ((side - crop) // align + 1 for side in pixels.shape[1:])
        places = rng.choice(rows * columns, min(CROPS, rows * columns), replace=False)
        for place in places:
            top, left = (align * int(p) for p in divmod(place, columns))
            patches.append(pixels[:, top : top + crop, left : left + crop].clone())
            names.append(name)
    unit_names, units = np.unique(names, return_inverse=True)
    notes += left_out(folder, broken, small, f"the crop of {crop} x {crop} pixels")
    if len(paths) > images:
        notes.append(f"{images} of the {len(paths)} images in {folder} were drawn")
    if len(unit_names) < LEAST_UNITS:
        what = "images" if scenes is None else "scenes"
        raise LeakError(
            f"{folder} has only {len(unit_names)} {what} that can be used, of {len(paths)} files "
            f"({len(broken)} unreadable, {len(small)} smaller than {crop} x {crop} pixels); at "
            f"least {LEAST_UNITS} are needed: add some, or choose a smaller crop"
        )
    return torch.stack(patches), units.astype(np.int64), read
