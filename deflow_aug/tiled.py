"""Samples of images and of image files, computed tile by tile and put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from deflow_aug.image_rows import Rows
from deflow_aug.images import Picture, unpack
from deflow_aug.model import DeFlow
from deflow_aug.pieces import Box, Canvas, cut, extent
from deflow_aug.sampling import Place, Request, sample
from deflow_aug.tiling import Tile


def sample_image(model: DeFlow, img: Picture, tiles: Sequence[Tile], request: Request) -> Any:
    """Samples of an image or a batch of any kind, of that kind; stacked if there are several.

    Raises as ``unpack`` does, before anything is computed.
    """
    stack = request.samples > 1
    if len(tiles) == 1:
        unpacked = unpack(img)
        return unpacked.pack(sample(model, unpacked.pixels, request), stack)
    for part in tiles:
        unpack(cut(img, part.box))  # what is wrong with it is found
    size = extent(img)
    canvas = Canvas(img, request.samples, stack)
    _fill(model, canvas, Box(*(slice(0, side) for side in size)), tiles, request, size)
    return canvas.result()


def sample_rows(
    model: DeFlow,
    photo: Rows,
    tiles: Sequence[Tile],
    request: Request,
    writers: Sequence[Callable[[Any], None]],
) -> None:
    """Samples of a picture that is read by rows of tiles, and given to a writer each."""
    size = (1, photo.height, photo.width)
    for rows, row in groupby(tiles, key=lambda part: part.window.rows):
        parts = list(row)
        frame = Box(slice(0, 1), rows, slice(0, photo.width))
        canvas = Canvas(photo.read(rows), request.samples, stack=True)
        _fill(model, canvas, frame, parts, request, size)
        inner = replace(frame, rows=parts[0].box.rows).within(frame)
        for write, result in zip(writers, canvas.result(), strict=True):
            write(cut(result, inner))


def _fill(
    model: DeFlow,
    canvas: Canvas,
    frame: Box,
    tiles: Sequence[Tile],
    request: Request,
    size: tuple[int, int, int],
) -> None:
    """Compute tiles of an image of this size; the canvas is of what is in the frame."""
    for part in tiles:
        window = part.window.within(frame)
        piece = unpack(cut(canvas.img, window))
        place = Place(part.window.rows.start, part.window.columns.start, *size[1:])
        samples = sample(model, piece.pixels, request.of(part.window.images), place)
        canvas.paste(piece.pack(samples, stack=True), window, part.box.within(frame))
