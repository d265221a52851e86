"""3x3 convolutions with fewer multiplications: Winograd's F(4x4, 3x3) (Lavin & Gray, 2016).

A tile of 4 x 4 results needs 6 x 6 pixels d and a kernel g: it is A^T [(G g G^T) * (B^T d B)] A,
36 products where the plain convolution takes 144. Summed over channels each of the 36 is a matrix
product of its own. The three matrices, and how much they round: :mod:`deflow_aug.flow.toom_cook`.

All here is without gradients, on pixels in the order [B, H, W, C]; for each transform there is its
transpose, which gradients take (:mod:`deflow_aug.flow.convolution`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deflow_aug.flow import toom_cook
from deflow_aug.flow.grid import Grid
from deflow_aug.flow.toom_cook import products

COLUMNS = 640
"""Of a block that a transform's matrix is multiplied with, at most: what fits into a core's
cache, and on small maps makes enough blocks for several cores to share evenly."""


def transform(pixels: Tensor, repeats: int = 1) -> Tensor:
    """B^T d B of every tile of a map: [products, tiles, C].

    Args:
        pixels: [B, H / repeats, W / repeats, C].
        repeats: how often each stands in both directions: 1, 2 or 4.
    """
    batch, height, width, channels = pixels.shape
    grid, stride = Grid(batch, height * repeats, width * repeats), 4 // repeats
    bottom = grid.rows * stride + 1 - height
    right = grid.columns * stride + 1 - width
    padded = F.pad(pixels, (0, 0, 1, right, 1, bottom))
    out = pixels.new_empty(products(repeats), grid.tiles, channels)
    regions, start = grid.regions(), 0
    scratch = Scratch(pixels, len(out) * max(region.tiles for region in regions) * channels)
    for region in regions:
        some = out[:, start : start + region.tiles]
        TransformPadded(region.windows(padded, repeats), some, scratch, repeats)()
        start += region.tiles
    return out


class TransformPadded:
    """:func:`transform` of the same memory to the same place, whenever it is called.

    Args:
        padded: a map with the border that its tiles need.
        out: [products, tiles, C].
    """

    def __init__(self, padded: Tensor, out: Tensor, scratch: Scratch, repeats: int = 1) -> None:
        stride, channels = 4 // repeats, padded.shape[-1]
        side = stride + 2
        windows = padded.unfold(1, side, stride).unfold(2, side, stride)
        batch, rows, columns = windows.shape[:3]
        each = _rows_together(rows, columns * channels)
        self._windows = windows.unflatten(1, (-1, each)).permute(0, 1, 5, 6, 2, 3, 4)
        self._copies = scratch.first(self._windows.shape)
        blocks = self._copies.view(batch * rows // each, side * side, -1)
        self._multiply = _Multiply(
            toom_cook.matrix("data", padded.dtype, repeats), blocks, out, scratch
        )

    def __call__(self) -> None:
        self._copies.copy_(self._windows)
        self._multiply()


def transform_transposed(
    grad: Tensor, grid: Grid, repeats: int = 1, scratch: Scratch | None = None
) -> Tensor:
    """The transpose of :func:`transform`: [products, tiles, C] -> [B, H, W, C] / repeats."""
    stride, further = 4 // repeats, -(-repeats // 2)
    side, channels = stride + 2, grad.shape[-1]
    batch, rows, columns = grid.batch, grid.rows, grid.columns
    each = _rows_together(rows, columns * channels)
    blocks = grad.reshape(len(grad), batch * rows // each, -1).transpose(0, 1)
    matrix = toom_cook.matrix("data", grad.dtype, repeats).mT
    shape = len(blocks), len(matrix), blocks.shape[2]
    flat = grad.new_empty(shape) if scratch is None else scratch.first(shape)
    torch.bmm(matrix.expand(len(blocks), *matrix.shape), blocks, out=flat)
    windows = flat.view(batch, rows // each, side, side, each, columns, channels)
    # A window covers its own block of pixels, and parts of the ``further`` ones after it.
    total = grad.new_zeros(batch, rows + further, stride, columns + further, stride, channels)
    for i in range(further + 1):
        for j in range(further + 1):
            part = windows[:, :, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride]
            n, m = part.shape[2:4]
            place = total[:, i : i + rows, :n, j : j + columns, :m]
            place.unflatten(1, (-1, each)).add_(part.permute(0, 1, 4, 2, 5, 3, 6))
    whole = total.flatten(3, 4).flatten(1, 2)
    return whole[:, 1 : 1 + grid.height // repeats, 1 : 1 + grid.width // repeats]


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


def transform_kernel_transposed(grad: Tensor) -> Tensor:
    """The transpose of :func:`transform_kernel`: [products, O, C] -> [O, C, 3, 3]."""
    repeats = next(r for r, terms in toom_cook.TERMS.items() if terms**2 == len(grad))
    flat = toom_cook.matrix("kernel", grad.dtype, repeats).mT @ grad.flatten(1)
    return flat.view(3, 3, *grad.shape[1:]).permute(2, 3, 0, 1)


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


def results_transposed(
    grad: Tensor,
    grid: Grid,
    count: int = 36,
    out: Tensor | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """The transpose of :func:`results`, of maps [B, H, W, O]: [count, tiles, O].

    Args:
        out: where to write it.
    """
    outputs = grad.shape[-1]
    bottom, right = 4 * grid.rows - grid.height, 4 * grid.columns - grid.width
    if bottom or right:
        grad = F.pad(grad, (0, 0, 0, right, 0, bottom))
    each = _rows_together(grid.rows, grid.columns * outputs)
    tiles = grad.unflatten(2, (-1, 4)).unflatten(1, (-1, each, 4)).permute(0, 1, 3, 5, 2, 4, 6)
    if out is None:
        out = grad.new_empty(count, grid.tiles, outputs)
    if scratch is None:
        scratch = Scratch(grad, max(count, 16) * grid.tiles * outputs)
    copies = scratch.first(tiles.shape).copy_(tiles)
    blocks = copies.view(grid.batch * grid.rows // each, 16, -1)
    _Multiply(toom_cook.matrix("result", grad.dtype)[:, :count].mT, blocks, out, scratch)()
    return out


class Scratch:
    """Memory for what is computed on the way, which else comes page by page each time."""

    def __init__(self, like: Tensor, size: int) -> None:
        self._buffers = [like.new_empty(size) for _ in range(2)]

    def first(self, shape: Sequence[int]) -> Tensor:
        return self._buffers[0][: math.prod(shape)].view(shape)

    def second(self, shape: Sequence[int]) -> Tensor:
        return self._buffers[1][: math.prod(shape)].view(shape)


class _Multiply:
    """``matrix`` [m, n] times every block of columns, [blocks, n, N], to ``out``, [m, tiles, C].

    Blocks rather than the whole: they fit into a core's cache, and each core takes its own. (Of
    several products PyTorch computes all at once only where the result is contiguous.)
    """

    def __init__(self, matrix: Tensor, blocks: Tensor, out: Tensor, scratch: Scratch) -> None:
        count = len(blocks)
        self._matrices, self._blocks = matrix.expand(count, *matrix.shape), blocks
        self._products = scratch.second((count, len(matrix), blocks.shape[2]))
        in_order = self._products.view(count, len(matrix), -1, out.shape[2])
        self._products_in_order = in_order.transpose(0, 1)
        self._out = out.unflatten(1, (count, -1))

    def __call__(self) -> None:
        torch.bmm(self._matrices, self._blocks, out=self._products)
        self._out.copy_(self._products_in_order)


def _rows_together(rows: int, columns: int) -> int:
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
        parts: transformed maps, [products, tiles, C] of each, that with most products first.
        kernels: theirs, [products, O, C] of each.
        bias: [O].
        chunks: of the O channels, each of which becomes a tensor with memory of its own.
    """
    batch, rows, columns = grid.batch, grid.rows, grid.columns
    count, outputs = len(parts[0]), len(bias)
    shape = batch * rows, 4, columns, 4, outputs // chunks
    result = [bias.new_empty(shape) for _ in range(chunks)]
    band = min(batch * rows, grid.rows_together)
    buffer = bias.new_empty(count * band * columns * outputs)
    for top in range(0, batch * rows, band):
        some = slice(top * columns, min(top + band, batch * rows) * columns)
        tiles = some.stop - some.start
        sums = buffer[: count * tiles * outputs].view(count, tiles, outputs)
        torch.bmm(parts[0][:, some], kernels[0].mT, out=sums)
        for part, kernel in zip(parts[1:], kernels[1:], strict=True):
            own = sums[: len(part)]
            torch.baddbmm(own, part[:, some], kernel.mT, out=own)
        biases(sums).add_(bias)
        corners = results(sums).view(-1, columns, 4, 4, outputs)
        for one, part in zip(result, corners.chunk(chunks, -1), strict=True):
            one[top : top + band] = part.permute(0, 2, 1, 3, 4)
    maps = [one.view(batch, 4 * rows, 4 * columns, -1) for one in result]
    return [one[:, : grid.height, : grid.width] for one in maps]
