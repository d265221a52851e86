"""Large images: the tiles that they are computed in, and the memory that these take.

A tile is computed with a margin around it, its halo (:mod:`deflow_aug.halo`), which is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from deflow_aug.arguments import is_integer
from deflow_aug.config import ModelConfig
from deflow_aug.pieces import Box

WORKING_MEMORY = 2_800_000_000
"""Bytes that windows may take on a CPU, and on a GPU without asking how much of it is free.

With the libraries and a published x4 model, kernels kept between calls and all, a process stays
below 4 GB.
"""

QUICK = 2**19
"""Pixels beyond which windows take longer on a CPU, for each of their pixels.

Maps of more than 32 MB, those of 64 channels at half the size of such a window, are memory that
glibc gives back to the system each time and gets page by page: a fifth of the time at twice the
pixels. Overlaps of smaller windows cost less.
"""


@dataclass(frozen=True)
class Tile:
    """A part of an image, and the window around it that is computed to get it."""

    box: Box
    window: Box


def plan(
    extent: tuple[int, int, int],
    tile: int | str | None,
    multiple: int,
    limit: int,
    halo: Callable[[], int],
) -> list[Tile]:
    """Tiles that make up a batch of images, one if it is to be computed at once.

    Args:
        extent: number of images, height and width.
        tile: "auto", as few as keep windows within so many pixels: groups of whole images if one
            fits, else the grid of each image that computes the least in all; a side; None or 0,
            one tile.
        multiple: where tiles begin.
        limit: pixels that a window may have over all its images, for "auto".
        halo: a multiple of ``multiple``; asked only if images are cut.

    Raises:
        ValueError: for a tile that is none of these.
    """
    images, height, width = extent
    whole = Box(slice(0, images), slice(0, height), slice(0, width))
    everything = [Tile(whole, whole)]
    if tile == "auto":
        one = padded(height, multiple) * padded(width, multiple)
        if images * one <= limit:
            return everything
        group = max(1, limit // one)
        groups = [slice(i, min(i + group, images)) for i in range(0, images, group)]
        if one <= limit:
            boxes = [Box(some, slice(0, height), slice(0, width)) for some in groups]
            return [Tile(box, box) for box in boxes]
        margin = halo()
        grid = _cheapest_grid(height, width, multiple, margin, limit)
        sides = _even(height, grid[0], multiple), _even(width, grid[1], multiple)
    elif tile is None:
        return everything
    elif isinstance(tile, str) or not is_integer(tile) or tile < 0:
        raise ValueError(f'tile must be "auto", None, or the side of tiles in pixels, got {tile!r}')
    else:
        side = padded(tile, multiple) or max(height, width)
        if side >= height and side >= width:
            return everything
        margin, groups = halo(), [slice(0, images)]
        sides = _steps(height, side), _steps(width, side)
    return [
        Tile(
            Box(some, rows, columns),
            Box(some, _wider(rows, margin, height), _wider(columns, margin, width)),
        )
        for some in groups
        for rows in sides[0]
        for columns in sides[1]
    ]


def padded(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def _steps(side: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, side)) for start in range(0, side, step)]


def _even(side: int, parts: int, multiple: int) -> list[slice]:
    """A side cut into parts of nearly the same length, at multiples."""
    units = -(-side // multiple)
    cuts = [i * units // parts * multiple for i in range(parts)] + [side]
    return [slice(start, stop) for start, stop in pairwise(cuts)]


def _wider(one: slice, margin: int, side: int) -> slice:
    return slice(max(0, one.start - margin), min(side, one.stop + margin))


def _cheapest_grid(
    height: int, width: int, multiple: int, halo: int, limit: int
) -> tuple[int, int]:
    """Rows and columns of tiles whose windows have at most ``limit`` pixels, the fewest in all.

    Where little more than a halo fits into the limit, tiles are as large as their halo all the
    same: smaller ones would cost far more time than they save memory.
    """
    limit = max(limit, (3 * halo + multiple) ** 2)

    def longest(side: int, parts: int) -> int:
        return max(w.stop - w.start for w in windows(side, parts)) + multiple - 1

    def windows(side: int, parts: int) -> list[slice]:
        return [_wider(one, halo, side) for one in _even(side, parts, multiple)]

    def total(side: int, parts: int) -> int:
        return sum(w.stop - w.start for w in windows(side, parts))

    best: tuple[int, tuple[int, int]] | None = None
    most = [max(1, side // max(halo, multiple)) for side in (height, width)]
    columns = most[1]
    for rows in range(1, most[0] + 1):
        # The more rows, the fewer columns are needed.
        tall = longest(height, rows)
        if tall * longest(width, columns) > limit:
            continue
        while columns > 1 and tall * longest(width, columns - 1) <= limit:
            columns -= 1
        cost = total(height, rows) * total(width, columns)
        if best is None or cost < best[0]:
            best = cost, (rows, columns)
    return best[1] if best else (most[0], most[1])


# -- memory ----------------------------------------------------------------------------------------


def bytes_per_pixel(config: ModelConfig, samples: int) -> int:
    """About the most memory that a window takes at once, for each of its pixels.

    Fitted to measurements (``python benchmarks/large_images.py photo``) of windows whose maps take
    32 MB and more; memory for smaller ones is not always given back at once, and a process holds up
    to a third more. The sum is what the flow's steps have prepared from the features: the hidden
    channels of couplings, shift and scale of injectors. The rest is what there is of features,
    transformed too, when the most has been prepared. With many samples what is left of them,
    decoded and converted, takes more.
    """
    floats = 40 + 0.44 * config.encoder.feature_channels + 6 * samples
    for level, channels in enumerate(config.level_channels, start=1):
        floats += config.steps * (config.hidden + 2 * channels) / 4**level
    return int(4 * max(floats, 16 * samples + 30))


def most_pixels(config: ModelConfig, samples: int, device: torch.device, wanted: int) -> int:
    """How many pixels a window may have on this device, over all its images.

    Args:
        wanted: how many all images have. The GPU is only asked where that is much.
    """
    each = bytes_per_pixel(config, samples)
    if device.type != "cuda":
        return min(WORKING_MEMORY // each, QUICK)
    if wanted * each <= WORKING_MEMORY:
        return WORKING_MEMORY // each
    free, _ = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + idle) // 2 // each
