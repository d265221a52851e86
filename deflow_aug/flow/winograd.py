"""3x3 convolutions with fewer multiplications: Winograd's F(4x4, 3x3) (Lavin & Gray, 2016).

A tile of 4 x 4 results needs 6 x 6 pixels d and a kernel g: it is A^T [(G g G^T) * (B^T d B)] A,
36 products where the plain convolution takes 144. Summed over channels each of the 36 is a matrix
product of its own. The three matrices, and how much they round: :mod:`deflow_aug.flow.toom_cook`.

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
from deflow_aug.flow.toom_cook import products

COLUMNS = 640
"""Of a block that a transform's matrix is multiplied with, at most: what fits into a core's
cache, and on small maps makes enough blocks for several cores to share evenly."""


def transform_together(
    maps: Sequence[Tensor], repeats: Sequence[int], region: Region | None = None
) -> list[Tensor]:
    """B^T d B of every tile of maps side by side: [some products, tiles, their channels] each.

    Pixels that stand more often take part in fewer products: the first ones are of all maps, those
    that follow of some of them. Each part is one operand of :func:`convolve`.

    Args:
        maps: [B, H / repeats, W / repeats, C] of each.
        repeats: how often the pixels of each stand in both directions (1, 2, 4), in ascending
            order.
        region: of which tiles; without it of all.
    """
    regions = [region] if region else Grid.over(maps[0], repeats[0]).regions()
    tiles = sum(one.tiles for one in regions)
    channels = [pixels.shape[3] for pixels in maps]
    out = [
        maps[0].new_empty(some.stop - some.start, tiles, sum(channels[:count]))
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
    counts = [products(often) for often in repeats]
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
    # Of windows as many pixels as a tile sees of the map.
    scratch = Scratch(pixels, (4 // repeats + 2) ** 2 * size, products(repeats) * size)
    for region in regions:
        some = [part[:, start : start + region.tiles] for part in out]
        TransformPadded(_window(pixels, region, repeats), some, scratch, repeats)()
        start += region.tiles


def _window(pixels: Tensor, region: Region, repeats: int) -> Tensor:
    """What a region's tiles see of maps [B, H, W, C], with zeros around these."""
    rows, (left, right) = region.seen(repeats), (1, 4 // repeats * region.columns + 1)
    above, below = max(0, -rows.start), max(0, rows.stop - pixels.shape[1])
    inside = pixels[region.images, max(0, rows.start) : rows.stop]
    return F.pad(inside, (0, 0, left, right - pixels.shape[2], above, below))


class TransformPadded:
    """B^T d B of every tile in the same memory to the same place, whenever it is called.

    Args:
        padded: a map with the border that its tiles need.
        out: [products, tiles, C] of all products, one tensor's after the other's.
    """

    def __init__(
        self, padded: Tensor, out: Sequence[Tensor], scratch: Scratch, repeats: int = 1
    ) -> None:
        stride, channels = 4 // repeats, padded.shape[-1]
        side = stride + 2
        windows = padded.unfold(1, side, stride).unfold(2, side, stride)
        batch, rows, columns = windows.shape[:3]
        each = rows_together(rows, columns * channels)
        self._windows = windows.unflatten(1, (-1, each)).permute(0, 1, 5, 6, 2, 3, 4)
        self._copies = scratch.first(self._windows.shape)
        blocks = self._copies.view(batch * rows // each, side * side, -1)
        self._multiply = Multiply(
            toom_cook.matrix("data", padded.dtype, repeats), blocks, out, scratch
        )

    def __call__(self) -> None:
        self._copies.copy_(self._windows)
        self._multiply()


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


def results(sums: Tensor) -> Tensor:
    """A^T m A of sums of products [products, tiles, O]: of each tile 4 x 4 pixels, [tiles, 16, O].

    Products that are left out, the last ones, count as nothing.
    """
    out = sums.new_empty(sums.shape[1], 16, sums.shape[2])
    Results(sums, out)()
    return out


class Results:
    """:func:`results` of the same memory to the same place, whenever it is called."""

    def __init__(self, sums: Tensor, out: Tensor) -> None:
        matrix = toom_cook.matrix("result", sums.dtype)[:, : len(sums)]
        self._matrices = matrix.expand(len(out), *matrix.shape)
        self._sums, self._out = sums.transpose(0, 1), out

    def __call__(self) -> None:
        torch.bmm(self._matrices, self._sums, out=self._out)


class Scratch:
    """Memory for what is computed on the way, which else comes page by page each time."""

    def __init__(self, like: Tensor, *sizes: int) -> None:
        self._buffers = [like.new_empty(size) for size in sizes]

    def first(self, shape: Sequence[int]) -> Tensor:
        return self._buffers[0][: math.prod(shape)].view(shape)

    def second(self, shape: Sequence[int]) -> Tensor:
        return self._buffers[1][: math.prod(shape)].view(shape)


class Multiply:
    """``matrix`` [m, n] times every block of columns, [blocks, n, N], to ``out``, [m, tiles, C],
    or to several of them, which have the m one after the other.

    Blocks rather than the whole: they fit into a core's cache, and each core takes its own. (Of
    several products PyTorch computes all at once only where the result is contiguous.)
    """

    def __init__(
        self, matrix: Tensor, blocks: Tensor, out: Sequence[Tensor], scratch: Scratch
    ) -> None:
        count = len(blocks)
        self._matrices, self._blocks = matrix.expand(count, *matrix.shape), blocks
        self._products = scratch.second((count, len(matrix), blocks.shape[2]))
        in_order = self._products.view(count, len(matrix), -1, out[0].shape[2]).transpose(0, 1)
        self._parts = in_order.split([len(part) for part in out])
        self._out = [part.unflatten(1, (count, -1)) for part in out]

    def __call__(self) -> None:
        torch.bmm(self._matrices, self._blocks, out=self._products)
        for out, part in zip(self._out, self._parts, strict=True):
            out.copy_(part)


def rows_together(rows: int, columns: int) -> int:
    """How many rows of so many columns make a block; of an even number of rows an even one."""
    divisors = (n for n in range(rows, 0, -1) if rows % n == 0)
    even = rows % 2 == 0
    return next(
        n for n in divisors if n == 1 or (n * columns <= COLUMNS and not (even and rows // n % 2))
    )


def biases(sums: Tensor) -> Tensor:
    """Where in sums of products [products, tiles, O] to add what adds a bias to their results."""
    return sums[toom_cook.ALL_ONES]


def convolve(
    parts: Sequence[Tensor], kernels: Sequence[Tensor], bias: Tensor, grid: Grid, chunks: int = 1
) -> list[Tensor]:
    """The padded convolution of what was transformed: [B, H, W, O / chunks] of each chunk.

    Args:
        parts: transformed maps, [some products, tiles, C] of each, one after the other.
        kernels: theirs, [some products, O, C] of each.
        bias: [O].
        chunks: of the O channels, each of which becomes a tensor with memory of its own.
    """
    batch, rows, columns = grid.batch, grid.rows, grid.columns
    count, outputs = sum(map(len, parts)), len(bias)
    shape = batch * rows, 4, columns, 4, outputs // chunks
    result = [bias.new_empty(shape) for _ in range(chunks)]
    band = min(batch * rows, grid.rows_together)
    buffer = bias.new_empty(count * band * columns * outputs)
    sizes = [len(part) for part in parts]
    for top in range(0, batch * rows, band):
        some = slice(top * columns, min(top + band, batch * rows) * columns)
        tiles = some.stop - some.start
        sums = buffer[: count * tiles * outputs].view(count, tiles, outputs)
        for part, kernel, own in zip(parts, kernels, sums.split(sizes), strict=True):
            torch.bmm(part[:, some], kernel.mT, out=own)
        biases(sums).add_(bias)
        corners = results(sums).view(-1, columns, 4, 4, outputs)
        for one, part in zip(result, corners.chunk(chunks, -1), strict=True):
            one[top : top + band] = part.permute(0, 2, 1, 3, 4)
    maps = [one.view(batch, 4 * rows, 4 * columns, -1) for one in result]
    return [one[:, : grid.height, : grid.width] for one in maps]
