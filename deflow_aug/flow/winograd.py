"""3x3 convolutions with fewer multiplications: Winograd's F(4x4, 3x3) (Lavin & Gray, 2016).

A tile of 4 x 4 results needs 6 x 6 pixels d and a kernel g: it is A^T [(G g G^T) * (B^T d B)] A,
36 products where the plain convolution takes 144, whose sums over channels are matrix products
(:mod:`deflow_aug.flow.products`). The three matrices, and how much they round:
:mod:`deflow_aug.flow.toom_cook`.

All here is without gradients, on pixels in the order [B, H, W, C]. Each transform has its
transpose, which gradients take, in :mod:`deflow_aug.flow.transposed`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from deflow_aug.flow import toom_cook
from deflow_aug.flow.grid import Grid, Region
from deflow_aug.flow.prepacked import Prepacked
from deflow_aug.flow.products import bias_of, by_convolution, multiply, new_tiles

TRANSFORMED = 128
"""Tiles of a whole map that are transformed at once: what is on the way stays in a cache."""


def transform_together(
    maps: Sequence[Tensor], repeats: Sequence[int], region: Region | None = None
) -> list[Tensor]:
    """B^T d B of every tile of maps side by side: [tiles, some products, their channels] each.

    Pixels that stand more often take part in fewer products: the first ones are of all maps, those
    that follow of some of them. Each part is one operand of :func:`convolve`.

    Args:
        maps: [B, H / repeats, W / repeats, C] of each.
        repeats: how often the pixels of each stand in both directions (1, 2, 4), in ascending
            order.
        region: of which tiles; without it of all.
    """
    regions = [region] if region else Grid.over(maps[0], repeats[0]).regions(TRANSFORMED)
    tiles = sum(one.tiles for one in regions)
    channels = [pixels.shape[3] for pixels in maps]
    out = [
        new_tiles(maps[0], tiles, some.stop - some.start, sum(channels[:count]))
        for some, count in parts_of(repeats)
    ]
    ends = list(accumulate(channels))
    for number, (pixels, often) in enumerate(zip(maps, repeats, strict=True)):
        own = slice(ends[number] - channels[number], ends[number])
        taking_part = zip(out, parts_of(repeats), strict=True)
        places = [o[:, :, own] for o, (_, count) in taking_part if number < count]
        _transform(pixels, often, regions, places)
    return out


def parts_of(repeats: Sequence[int]) -> list[tuple[slice, int]]:
    """Of which products how many maps are, the first ones; see :func:`transform_together`."""
    counts = [toom_cook.products(often) for often in repeats]
    ends = sorted(set(counts))
    return [
        (slice(start, end), sum(count >= end for count in counts))
        for start, end in zip([0, *ends], ends, strict=False)
    ]


def _transform(
    pixels: Tensor, repeats: int, regions: Sequence[Region], out: Sequence[Tensor]
) -> None:
    """Of one map and regions of it, written to tensors that have one product after the other."""
    most = max(region.tiles for region in regions)
    size, start = most * pixels.shape[3], 0
    sizes = [part.shape[1] for part in out]
    # Of windows as many pixels as a tile sees of the map.
    scratch = Scratch(pixels, (4 // repeats + 2) ** 2 * size, toom_cook.products(repeats) * size)
    for region in regions:
        transformed = TransformPadded(_window(pixels, region, repeats), scratch, repeats)()
        for part, own in zip(out, transformed.split(sizes, 1), strict=True):
            part[start : start + region.tiles] = own
        start += region.tiles


def _window(pixels: Tensor, region: Region, repeats: int) -> Tensor:
    """What a region's tiles see of maps [B, H, W, C], with zeros around these."""
    rows, (left, right) = region.seen(repeats), (1, 4 // repeats * region.columns + 1)
    above, below = max(0, -rows.start), max(0, rows.stop - pixels.shape[1])
    inside = pixels[region.images, max(0, rows.start) : rows.stop]
    return F.pad(inside, (0, 0, left, right - pixels.shape[2], above, below))


class TransformPadded:
    """B^T d B of every tile in the same memory, whenever it is called: [tiles, products, C].

    Args:
        padded: a map with the border that its tiles need.
        scratch: where the result lies, second, until this memory is used again.
    """

    def __init__(self, padded: Tensor, scratch: Scratch, repeats: int = 1) -> None:
        stride, channels = 4 // repeats, padded.shape[-1]
        side = stride + 2
        windows = padded.unfold(1, side, stride).unfold(2, side, stride)
        self._windows = windows.permute(0, 1, 2, 4, 5, 3)
        self._copies = scratch.first(self._windows.shape)
        self._blocks = self._copies.view(-1, side * side, channels)
        matrix = toom_cook.matrix("data", padded.dtype, repeats)
        self._multiply = Multiply(matrix, len(self._blocks), channels, scratch)

    def __call__(self) -> Tensor:
        self._copies.copy_(self._windows)
        return self._multiply(self._blocks)


def transform_kernel(weight: Tensor, repeats: int = 1) -> Tensor:
    """G g G^T of a kernel [O, C, 3, 3]: [products, O, C]."""
    return transform_taps(weight.permute(2, 3, 0, 1).flatten(0, 1), repeats)


def transform_taps(taps: Tensor, repeats: int = 1, out: Tensor | None = None) -> Tensor:
    """:func:`transform_kernel` of its nine taps, [9, O, C]; written to ``out`` if given."""
    matrix = toom_cook.matrix("kernel", taps.dtype, repeats)
    if out is None:
        out = taps.new_empty(len(matrix), *taps.shape[1:])
    flat, terms = taps.flatten(1), toom_cook.TERMS[repeats]
    # A product for each row of products, which are then computed at the same time.
    matrices = matrix.view(terms, terms, 9)
    torch.bmm(matrices, flat.expand(terms, *flat.shape), out=out.view(terms, terms, -1))
    return out


def transform_taps_back(taps: Tensor, repeats: int = 1, out: Tensor | None = None) -> Tensor:
    """The kernels that gradients go through, [products, C, O], in the order that their sums want.

    Args:
        out: what this returned before, of taps of the same shape.
    """
    if by_convolution(taps):
        return transform_taps(taps.mT, repeats, out)
    return transform_taps(taps, repeats, None if out is None else out.mT).mT


def results(sums: Sequence[Tensor]) -> Tensor:
    """A^T m A of sums of products, [tiles, some products, O] each: 4 x 4 pixels, [tiles, 16, O].

    Products that are left out, the last ones, count as nothing.
    """
    out = sums[0].new_empty(len(sums[0]), 16, sums[0].shape[2])
    counts = [part.shape[1] for part in sums]
    matrices = toom_cook.matrix("result", out.dtype)[:, : sum(counts)].split(counts, 1)
    for number, (matrix, part) in enumerate(zip(matrices, sums, strict=True)):
        some = matrix.expand(len(part), *matrix.shape)
        if number:
            torch.baddbmm(out, some, part, out=out)
        else:
            torch.bmm(some, part, out=out)
    return out


class Scratch:
    """Memory for what is computed on the way, which else comes page by page each time."""

    def __init__(self, like: Tensor, *sizes: int) -> None:
        self._buffers = [like.new_empty(size) for size in sizes]

    def first(self, shape: Sequence[int]) -> Tensor:
        return self._buffers[0][: math.prod(shape)].view(shape)

    def second(self, shape: Sequence[int]) -> Tensor:
        return self._buffers[1][: math.prod(shape)].view(shape)


class Multiply:
    """``matrix`` [m, n] times that of every tile, in scratch memory, second."""

    def __init__(self, matrix: Tensor, tiles: int, channels: int, scratch: Scratch) -> None:
        self._matrices = matrix.expand(tiles, *matrix.shape)
        self._out = scratch.second((tiles, len(matrix), channels))

    def __call__(self, tiles: Tensor) -> Tensor:
        """Of [tiles, n, C] the product [tiles, m, C], until the memory is used again."""
        return torch.bmm(self._matrices, tiles, out=self._out)


def convolve(
    parts: Sequence[Tensor],
    kernels: Sequence[Tensor | Prepacked],
    bias: Tensor,
    grid: Grid,
    chunks: int = 1,
) -> list[Tensor]:
    """The padded convolution of what was transformed: [B, H, W, O / chunks] of each chunk.

    Args:
        parts: transformed maps, [tiles, some products, C] of each, one after the other.
        kernels: theirs, [some products, O, C] of each, or these prepacked.
        bias: [O].
        chunks: of the O channels, each of which becomes a tensor with memory of its own.
    """
    batch, rows, columns = grid.batch, grid.rows, grid.columns
    outputs = len(bias)
    shape = batch * rows, 4, columns, 4, outputs // chunks
    result = [bias.new_empty(shape) for _ in range(chunks)]
    band = grid.rows_together
    added: list[Tensor | None] = [bias_of(kernels[0], bias), *[None] * (len(parts) - 1)]
    for top in range(0, batch * rows, band):
        some = slice(top * columns, min(top + band, batch * rows) * columns)
        sums = [
            multiply(part[some], kernel, own)
            for part, kernel, own in zip(parts, kernels, added, strict=True)
        ]
        corners = results(sums).view(-1, columns, 4, 4, outputs)
        for one, part in zip(result, corners.chunk(chunks, -1), strict=True):
            one[top : top + band] = part.permute(0, 2, 1, 3, 4)
    maps = [one.view(batch, 4 * rows, 4 * columns, -1) for one in result]
    return [one[:, : grid.height, : grid.width] for one in maps]
