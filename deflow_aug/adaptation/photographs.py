"""Photographs of any number and size into the moments of their latents."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from deflow_aug import randomness
from deflow_aug.adaptation.closed_form import Moments, latent_moments
from deflow_aug.config import CLEAN
from deflow_aug.degrader import Images
from deflow_aug.image_files import LEFT_OUT, read_image
from deflow_aug.image_folders import find_images
from deflow_aug.images import unpack
from deflow_aug.model import DeFlow
from deflow_aug.randomness import Stream
from deflow_aug.resize import bicubic_downscale

TILE = 512
"""Largest side of what is encoded at once."""

TILES = 4
"""Tiles of a photograph that are looked at, at most."""

CORNER = 96
"""Side of the part of a photograph that is kept to see how the new domain changes its colours."""

PHOTOGRAPHS = 64
"""Photographs of a folder that are looked at, at most."""

Source = str | os.PathLike[str] | Iterable[Images]


class AdaptationError(ValueError):
    """A model cannot be adapted so; the message says why and what to do."""


@dataclass(frozen=True)
class Photograph:
    """Moments of one photograph's latents, and of those of its downscaled version (or None).

    Args:
        corner: a part of it in the flow's colours, [1, 3, H, W] in [0, 1].
    """

    latents: list[Moments]
    small: list[Moments] | None
    corner: Tensor

    def offset(self, i: int) -> Tensor:
        """Mean of latent i, less what downscaling leaves of it: content, which h keeps."""
        return self.latents[i].mean - (0 if self.small is None else self.small[i].mean)


class Reader:
    """Photographs into the moments of their latents, one at a time, tile by tile."""

    def __init__(
        self,
        model: DeFlow,
        name: str,
        seed: int,
        photographs: int,
        progress: Callable[[str, int], None] | None,
    ) -> None:
        self.model, self.seed, self.photographs = model, seed, photographs
        self.names = {"degraded": name, "clean": CLEAN}
        self.progress = progress

    def read(self, source: Source, side: str) -> tuple[list[Photograph], dict[str, Any]]:
        """The photographs that can be used, and the facts about them.

        Raises:
            AdaptationError: if there are none.
        """
        skipped: list[str] = []
        result: list[Photograph] = []
        pixels = 0
        folder = source if isinstance(source, (str, os.PathLike)) else None
        least = self.model.config.size_multiple
        for number, label, image in self._images(source, skipped):
            key = (self.seed, Stream.FIT, int(side == "clean"), number)
            tiles = list(tiles_of(image, least, key))
            if not tiles:
                skipped.append(f"{label} is smaller than {least} x {least} pixels")
                continue
            try:
                photo = self._photograph(image, tiles, side, key)
            except ValueError as error:
                if folder is None:  # what a caller gave can be mended; of files others may do
                    raise
                skipped.append(f"{label}: {error}")
                continue
            pixels += sum(box[2] * box[3] for box in tiles)
            result.append(photo)
            if self.progress is not None:
                self.progress(side, len(result))
        where = "the images given" if folder is None else str(folder)
        if skipped:
            warnings.warn(
                f"{len(skipped)} files or images of {where} are left out: "
                + "; ".join(skipped[:10]),
                stacklevel=3,
            )
        if not result:
            raise AdaptationError(
                f"no {side} photograph in {where} can be used"
                + (f" ({len(skipped)} are left out)" if skipped else ": there are none")
            )
        facts: dict[str, Any] = {"images": len(result), "left_out": len(skipped), "pixels": pixels}
        if folder is not None:
            facts = {"folder": Path(folder).resolve().name, **facts}
        return result, facts

    def _images(self, source: Source, skipped: list[str]) -> Iterator[tuple[int, str, Any]]:
        """Number, name and image; files that cannot be read are added to ``skipped``."""
        if not isinstance(source, (str, os.PathLike)):
            for number, one in enumerate(one for image in source for one in _singles(image)):
                yield number, f"image {number + 1}", one
            return
        files = find_images(source)
        if len(files) > self.photographs:
            draw = randomness.generator(self.seed, Stream.FIT, 2)
            chosen = draw.choice(len(files), self.photographs, replace=False)
            files = [files[i] for i in sorted(chosen.tolist())]
        for number, file in enumerate(files):
            try:
                yield number, file.name, read_image(file)
            except LEFT_OUT as error:
                skipped.append(str(error))

    def _photograph(
        self, image: Any, tiles: Sequence[tuple[int, int, int, int]], side: str, key: Sequence[int]
    ) -> Photograph:
        whole: list[list[Moments]] = []
        small: list[list[Moments]] = []
        config = self.model.config
        corner: Tensor | None = None
        for number, box in enumerate(tiles):
            x = unpack(_cut(image, *box)).pixels
            whole.append(latent_moments(self.model, x, self.names[side], *key, number))
            # In the flow's colours: those of the clean domain.
            x = self.model.match_colours(x, [self.names[side]])
            if corner is None:
                sides = (
                    min(CORNER // config.size_multiple * config.size_multiple, n) for n in box[2:]
                )
                height, width = sides
                corner = x[..., :height, :width]
            x = bicubic_downscale(x, config.scale)
            if min(x.shape[-2:]) >= config.size_multiple:
                moments = latent_moments(self.model, x.clamp(0, 1), CLEAN, *key, number, 1)
                small.append(moments)
        assert corner is not None  # there is at least one tile
        return Photograph(_pooled(whole), _pooled(small) if small else None, corner)


def _pooled(parts: Sequence[list[Moments]]) -> list[Moments]:
    return [reduce(add, of_one_latent) for of_one_latent in zip(*parts, strict=True)]


def _singles(image: Any) -> Iterator[Any]:
    """The images of a batch, or the one image."""
    if getattr(image, "ndim", 0) == 4:
        yield from image
    else:
        yield image


def _sides(image: Any) -> tuple[int, int]:
    """Height and width of an image of any kind."""
    if isinstance(image, Tensor):
        return image.shape[-2], image.shape[-1]
    if isinstance(image, Image.Image):
        return image.height, image.width
    if getattr(image, "ndim", 0) < 2:
        unpack(image)  # says what is wrong
    return image.shape[0], image.shape[1]


def tiles_of(image: Any, multiple: int, key: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """Top, left, height and width of at most ``TILES`` tiles that do not overlap."""
    sides = _sides(image)
    counts = [-(-side // TILE) for side in sides]
    height, width = (
        side // count // multiple * multiple for side, count in zip(sides, counts, strict=True)
    )
    if not height or not width:
        return
    total = counts[0] * counts[1]
    chosen: Sequence[int] = range(total)
    if total > TILES:
        draw = randomness.generator(*key)
        chosen = sorted(draw.choice(total, TILES, replace=False).tolist())
    for i in chosen:
        yield i // counts[1] * height, i % counts[1] * width, height, width


def _cut(image: Any, top: int, left: int, height: int, width: int) -> Any:
    if isinstance(image, Tensor):
        return image[..., top : top + height, left : left + width]
    if isinstance(image, Image.Image):
        return image.crop((left, top, left + width, top + height))
    return image[top : top + height, left : left + width]
