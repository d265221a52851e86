"""Pieces of images: cut from an image of any kind, put together to one of the same kind.

A piece of a PIL image is a PIL image, one of an array an array, and so on: what is done to a whole
image can be done to its pieces, and nothing larger than a piece is ever converted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deflow_aug.images import Picture

ALL = slice(None)


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels of some images of a batch; each slice has a start and a stop."""

    images: slice
    rows: slice
    columns: slice

    @property
    def area(self) -> int:
        """Pixels of one image."""
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)

    def within(self, other: Box) -> Box:
        """This box counted from the first image, row and column of another, which holds it."""
        return Box(
            _shifted(self.images, other.images),
            _shifted(self.rows, other.rows),
            _shifted(self.columns, other.columns),
        )


def _shifted(one: slice, other: slice) -> slice:
    return slice(one.start - other.start, one.stop - other.start)


def extent(img: Picture) -> tuple[int, int, int]:
    """Number of images, height and width of an image or a batch of any supported kind.

    What is none counts as one image of one pixel: ``unpack`` will say what is wrong with it.
    """
    if isinstance(img, Image.Image):
        size = (1, img.height, img.width)
    elif isinstance(img, Tensor) and img.ndim in (3, 4):
        size = (len(img) if img.ndim == 4 else 1, img.shape[-2], img.shape[-1])
    elif isinstance(img, np.ndarray) and img.ndim in (2, 3, 4):
        batch = img.ndim == 4
        size = (len(img) if batch else 1, img.shape[batch], img.shape[1 + batch])
    else:
        return 1, 1, 1
    return size if all(size) else (1, 1, 1)


def cut(img: Picture, box: Box) -> Picture:
    """The piece in this box; arrays and tensors as views."""
    if isinstance(img, Image.Image):
        return img.crop((box.columns.start, box.rows.start, box.columns.stop, box.rows.stop))
    piece: Picture = img[_index(img, box)]
    return piece


def _index(img: Any, box: Box) -> tuple[Any, ...]:
    if isinstance(img, Tensor):
        return (*([box.images] if img.ndim == 4 else []), ..., box.rows, box.columns)
    return (*([box.images] if img.ndim == 4 else []), box.rows, box.columns)


class Canvas:
    """Samples of an image, to be filled piece by piece.

    Args:
        img: the image or batch that they are samples of.
        samples: their number.
        stack: whether they come as a list or with a new first axis, as in ``UnpackedImage.pack``.
    """

    def __init__(self, img: Picture, samples: int, stack: bool) -> None:
        self.img, self.samples, self.stack = img, samples, stack
        self.whole: Any = None

    def paste(self, pieces: Any, window: Box, box: Box) -> None:
        """Fill ``box``, the inner part of a window.

        Args:
            pieces: the window's samples, as a list or with a first axis (``stack=True``).
            window: the window's place in the image.
            box: the box's place in the image.
        """
        inner = box.within(window)
        if isinstance(self.img, Image.Image):
            if self.whole is None:
                self.whole = [_blank(pieces[0], self.img.size) for _ in range(self.samples)]
            for whole, piece in zip(self.whole, pieces, strict=True):
                whole.paste(cut(piece, inner), (box.columns.start, box.rows.start))
            return
        if self.whole is None:
            self.whole = _empty_stack(self.img, self.samples)
        if isinstance(pieces, Tensor):
            pieces = pieces.as_subclass(Tensor)
        self.whole[(ALL, *_index(self.img, box))] = pieces[(ALL, *_index(self.img, inner))]

    def result(self) -> Any:
        """The samples, of the kind that ``UnpackedImage.pack`` returns."""
        whole = self.whole if self.stack else self.whole[0]
        if not isinstance(self.img, Tensor) or isinstance(self.img, torch.nn.Parameter):
            return whole
        return whole.as_subclass(type(self.img))


def _blank(piece: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An image of this size with the mode and the metadata of a piece of it."""
    image = Image.new(piece.mode, size)
    image.info.update(piece.info)
    return image


def _empty_stack(img: Any, samples: int) -> Any:
    """Space for samples of an array or tensor, along a new first axis."""
    shape: Sequence[int] = tuple(img.shape)
    if isinstance(img, np.ndarray):
        return np.empty((samples, *shape), img.dtype)
    # A meta tensor works out the strides of a dense tensor in this memory format, for free.
    strides = torch.empty_like(img.detach().as_subclass(Tensor), device="meta").stride()
    # Like those of one window, results can be trained on: none is an inference tensor.
    with torch.inference_mode(False):
        return torch.empty_strided(
            (samples, *shape), (math.prod(shape), *strides), dtype=img.dtype, device=img.device
        )
