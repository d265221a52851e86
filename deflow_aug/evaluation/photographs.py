"""Photographs of a folder as 8-bit colour, large ones as the piece at their middle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from deflow_aug import randomness
from deflow_aug.image_files import LEFT_OUT, read_image
from deflow_aug.image_folders import find_images
from deflow_aug.images import unpack
from deflow_aug.randomness import Stream

from .noise import Image8

SIDE = 1024
"""Largest side of what is kept of a photograph, in pixels."""

LEAST_SIDE = 192
"""Photographs with shorter sides are left out: the scores without a reference need so much."""

MOST = 64
"""Photographs of a folder that are looked at, at most; of more, some are drawn."""


def load(folder: str | Path, seed: int = 0) -> tuple[list[Image8], list[str]]:
    """Photographs of a folder, read recursively, uint8 [H, W, 3] each, and notes on those left out.

    Raises:
        OSError: if it is no folder.
        ValueError: if no photograph in it can be used.
    """
    files = find_images(folder)
    notes = []
    if len(files) > MOST:
        notes.append(f"{MOST} of the {len(files)} photographs in {folder} were drawn")
        chosen = randomness.generator(seed, Stream.EVALUATE, 3).permutation(len(files))[:MOST]
        files = [files[i] for i in sorted(chosen.tolist())]
    found: list[Image8] = []
    broken: list[str] = []
    small: list[str] = []
    for _, _, pixels in usable(files, LEAST_SIDE, broken, small):
        picture = middle(pixels.permute(1, 2, 0).numpy(), SIDE)
        found.append(picture.copy())  # not a view that keeps the whole photograph
    notes += left_out(folder, broken, small, f"{LEAST_SIDE} x {LEAST_SIDE} pixels")
    if not found:
        raise ValueError(f"no photograph in {folder} can be used: " + ("; ".join(notes) or "none"))
    return found, notes


def usable(
    files: Sequence[Path], least: int, broken: list[str], small: list[str]
) -> Iterator[tuple[int, Path, Tensor]]:
    """Number, path and pixels, uint8 [3, H, W], of the image files that can be used.

    Args:
        files: of a folder.
        least: pixels that the sides need.
        broken, small: here the names of the files go that cannot be read, or are smaller.
    """
    for number, path in enumerate(tqdm(files, "reading", leave=False)):
        try:
            pixels = (unpack(read_image(path)).pixels[0] * 255).round().byte()
        except LEFT_OUT:
            broken.append(path.name)
            continue
        if min(pixels.shape[1:]) < least:
            small.append(path.name)
            continue
        yield number, path, pixels


def left_out(
    folder: str | Path, broken: Sequence[str], small: Sequence[str], least: str
) -> list[str]:
    """Sentences on files of a folder that cannot be read, or are smaller than ``least``."""
    each = ((broken, "cannot be read"), (small, f"are smaller than {least}"))
    return [
        f"{len(names)} files in {folder} {what}: {', '.join(names[:10])}"
        for names, what in each
        if names
    ]


def middle(picture: Image8, side: int) -> Image8:
    """What is at the middle of a picture, uint8 [H, W, 3], of at most so many pixels a side."""
    top, left = (max(size - side, 0) // 2 for size in picture.shape[:2])
    return picture[top : top + side, left : left + side]
