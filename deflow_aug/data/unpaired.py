"""Unpaired training data: random crops from a folder of each domain."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deflow_aug import randomness
from deflow_aug.image_files import UnreadableImageError, find_images, read_image
from deflow_aug.images import unpack

CACHE_BYTES = 2 * 2**30


class DataError(ValueError):
    """A folder cannot be trained on; the message says why and what to do."""


class CropFolder:
    """Random aligned crops of the images in a folder, as 8-bit RGB.

    Every file is opened once at the start: those that cannot be read are left out with one
    warning that names them. Decoded images are kept up to ``CACHE_BYTES`` a folder.

    Args:
        folder: searched recursively.
        crop: side of the crops.
        align: crops start at multiples of this, the downsampling factor s.

    Raises:
        DataError: if no readable image is at least ``crop`` pixels in both directions.
    """

    def __init__(self, folder: Path, crop: int, align: int) -> None:
        self.folder, self.crop, self.align = folder, crop, align
        self.pixels = 0  # of all images together
        self.cache: OrderedDict[Path, NDArray[np.uint8]] = OrderedDict()
        self.cached_bytes = 0
        files = find_images(folder)
        if not files:
            raise DataError(f"no image files in {folder}")
        self.files, broken, small = [], [], []
        for path in files:
            try:
                pixels = self._load(path)
            except (UnreadableImageError, ValueError) as error:
                broken.append(f"{path.name}: {error}")
                continue
            if min(pixels.shape[:2]) < crop:
                small.append(path.name)
            else:
                self.files.append(path)
                self.pixels += pixels.shape[0] * pixels.shape[1]
        if broken:
            warnings.warn(
                f"{len(broken)} of {len(files)} files in {folder} cannot be read and are left out: "
                + "; ".join(broken[:10]),
                stacklevel=2,
            )
        if small:
            warnings.warn(
                f"{len(small)} images in {folder} are smaller than the crop ({crop} x {crop}) and "
                f"are left out: {', '.join(small[:10])}",
                stacklevel=2,
            )
        if not self.files:
            raise DataError(
                f"none of the {len(files)} files in {folder} is a readable image of at least "
                f"{crop} x {crop} pixels: use a smaller crop or larger images"
            )

    def draw(self, *key: int) -> NDArray[np.uint8]:
        """The crop of this key, [crop, crop, 3]; flipped horizontally half of the time."""
        rng = randomness.generator(*key)
        pixels = self._load(self.files[rng.integers(len(self.files))])
        top, left = (
            self.align * int(rng.integers((side - self.crop) // self.align + 1))
            for side in pixels.shape[:2]
        )
        patch = pixels[top : top + self.crop, left : left + self.crop]
        return patch[:, ::-1] if rng.random() < 0.5 else patch

    def _load(self, path: Path) -> NDArray[np.uint8]:
        if path in self.cache:
            self.cache.move_to_end(path)
            return self.cache[path]
        values = unpack(read_image(path)).pixels[0].permute(1, 2, 0)
        pixels = (values * 255).round().byte().numpy()
        self.cache[path] = pixels
        self.cached_bytes += pixels.nbytes
        while self.cached_bytes > CACHE_BYTES and len(self.cache) > 1:
            _, evicted = self.cache.popitem(last=False)
            self.cached_bytes -= evicted.nbytes
        return pixels


class UnpairedBatches:
    """Batches in which the domains take turns, so that all are drawn equally often.

    Args:
        domains: the crops of every domain, by name.
        batch_size: images in a batch.
        seed: a batch depends on (seed, step) alone, so that a run can be taken up at any step.
    """

    def __init__(self, domains: Mapping[str, CropFolder], batch_size: int, seed: int) -> None:
        self.domains, self.batch_size, self.seed = dict(domains), batch_size, seed

    def batch(self, step: int) -> tuple[Tensor, Sequence[str]]:
        """Images in [0, 1], float32 [B, 3, crop, crop], and the name of each one's domain."""
        names = list(self.domains)
        patches, chosen = [], []
        for index in range(self.batch_size):
            # A batch that the domains do not divide gives the extra places to all in turn.
            name = names[(step * self.batch_size + index) % len(names)]
            patch = self.domains[name].draw(self.seed, randomness.Stream.BATCH, step, index)
            patches.append(np.ascontiguousarray(patch))
            chosen.append(name)
        images = torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2)
        return images.float() / 255, chosen
