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


def transform(pixels: Tensor, repeats: int = 1) -> Tensor:
    """B^T d B of every tile of a map: [products, tiles, C].

    Args:
        pixels: [B, H / repeats, W / repeats, C].
        repeats: how often each stands in both directions: 1, 2 or 4.
    """
    (out,) = transform_together([pixels], [repeats])
    return out


def transform_together(
    maps: Sequence[Tensor], repeats: Sequence[int], region: Region | None = None
) -> list[Tensor]:
    """:func:`transform` of maps side by side: [some products, tiles, their channels] of each part.

    Pixels that stand more often take part in fewer products: the first ones are of all maps, those
    that follow of some of them. Each part is one operand of :func:`convolve`.

    Args:
        maps: as :func:`transform` takes them, all of the same size where their pixels are repeated.
        repeats: of each, in ascending order.
        region: of which tiles; without it of all.
    """
    grid = Grid(len(maps[0]), *(side * repeats[0] for side in maps[0].shape[1:3]))
    regions = [region] if region else grid.regions()
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
    """:func:`transform` of regions, written to tensors that have one product after the other."""
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
    rows, (left, right) = _seen(region, repeats), (1, 4 // repeats * region.columns + 1)
    above, below = max(0, -rows.start), max(0, rows.stop - pixels.shape[1])
    inside = pixels[region.images, max(0, rows.start) : rows.stop]
    return F.pad(inside, (0, 0, left, right - pixels.shape[2], above, below))


def _seen(region: Region, repeats: int) -> slice:
    """The rows of maps that a region's tiles see, from one above the first."""
    stride = 4 // repeats
    return slice(stride * region.rows.start - 1, stride * region.rows.stop + 1)


class TransformPadded:
    """:func:`transform` of the same memory to the same place, whenever it is called.

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


def transform_transposed(grad: Tensor, grid: Grid, repeats: int = 1) -> Tensor:
    """The transpose of :func:`transform`: [products, tiles, C] -> [B, H, W, C] / repeats."""
    window = TransformTransposed([grad], grid, repeats)()
    return window[:, 1 : 1 + grid.height // repeats, 1 : 1 + grid.width // repeats]


def transform_together_transposed(
    grads: Sequence[Tensor],
    region: Region,
    repeats: Sequence[int],
    to: Sequence[Tensor],
) -> None:
    """The transpose of :func:`transform_together`, added to what the maps' gradients are so far.

    Args:
        to: of each map, [B, H / repeats, W / repeats, C].
    """
    counts = [count for _, count in parts_of(repeats)]
    counted = [own.stop - own.start for own in (region.images, region.rows)]
    grid = Grid(counted[0], 4 * counted[1], 4 * region.columns)
    ends = list(accumulate(total.shape[3] for total in to))
    for number, (total, end, often) in enumerate(zip(to, ends, repeats, strict=True)):
        own = slice(end - total.shape[3], end)
        taking_part = zip(grads, counts, strict=True)
        parts = [grad[:, :, own].contiguous() for grad, count in taking_part if number < count]
        window, rows = TransformTransposed(parts, grid, often)(), _seen(region, often)
        inside = slice(max(0, rows.start), min(rows.stop, total.shape[1]))
        own_rows = slice(inside.start - rows.start, inside.stop - rows.start)
        total[region.images, inside] += window[:, own_rows, 1 : 1 + total.shape[2]]


class TransformTransposed:
    """The transpose of a transform of the same memory, whenever it is called.

    Args:
        parts: [products, tiles, C] of all products, one tensor's after the other's.
    """

    def __init__(
        self, parts: Sequence[Tensor], grid: Grid, repeats: int = 1, scratch: Scratch | None = None
    ) -> None:
        stride, further = 4 // repeats, -(-repeats // 2)
        side, channels = stride + 2, parts[0].shape[-1]
        batch, rows, columns = grid.batch, grid.rows, grid.columns
        each = _rows_together(rows, columns * channels)
        count = batch * rows // each
        matrix = toom_cook.matrix("data", parts[0].dtype, repeats).mT
        flat = count, len(matrix), each * columns * channels
        self._flat = parts[0].new_empty(flat) if scratch is None else scratch.first(flat)
        matrices = matrix.split([len(part) for part in parts], 1)
        self._products = [
            (own.expand(count, *own.shape), part.view(len(part), count, -1).transpose(0, 1))
            for own, part in zip(matrices, parts, strict=True)
        ]
        windows = self._flat.view(batch, rows // each, side, side, each, columns, channels)
        # A window covers its own block of pixels, and parts of the ``further`` ones after it.
        shape = batch, rows + further, stride, columns + further, stride, channels
        self._total = parts[0].new_empty(shape)
        self._sums = []
        for i in range(further + 1):
            for j in range(further + 1):
                part = windows[:, :, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride]
                n, m = part.shape[2:4]
                place = self._total[:, i : i + rows, :n, j : j + columns, :m]
                part = part.permute(0, 1, 4, 2, 5, 3, 6)
                self._sums.append((place.unflatten(1, (-1, each)), part))
        self.window = self._total.flatten(3, 4).flatten(1, 2)
        """The gradient of all that the tiles see, and of some more, [B, rows, columns, C]."""

    def __call__(self) -> Tensor:
        """The window."""
        for number, (matrices, blocks) in enumerate(self._products):
            if number:
                torch.baddbmm(self._flat, matrices, blocks, out=self._flat)
            else:
                torch.bmm(matrices, blocks, out=self._flat)
        self._total.zero_()
        for place, part in self._sums:
            place.add_(part)
        return self.window


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


def transform_kernel_transposed(grad: Tensor, products: slice = slice(None)) -> Tensor:
    """The transpose of :func:`transform_kernel`: [products, O, C] -> [O, C, 3, 3].

    Args:
        products: which of the 36 these are, the first ones if it is not said.
    """
    some = slice(len(grad)) if products == slice(None) else products
    flat = toom_cook.matrix("kernel", grad.dtype)[some].mT @ grad.flatten(1)
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


def results_transposed(grads: Sequence[Tensor], grid: Grid, count: int = 36) -> Tensor:
    """The transpose of :func:`results`, of maps [B, H, W, O] side by side: [count, tiles, O]."""
    bottom, right = 4 * grid.rows - grid.height, 4 * grid.columns - grid.width
    padded = [
        F.pad(grad, (0, 0, 0, right, 0, bottom)) if bottom or right else grad for grad in grads
    ]
    outputs = sum(grad.shape[-1] for grad in grads)
    out = grads[0].new_empty(count, grid.tiles, outputs)
    ResultsTransposed(padded, out, Scratch(out, 16 * grid.tiles * outputs, out.numel()))()
    return out


class ResultsTransposed:
    """:func:`results_transposed` of the same memory to the same place, whenever it is called.

    Args:
        grads: [B, H, W, O] of each, H and W multiples of four.
        out: [products, tiles, O], of all of them.
    """

    def __init__(self, grads: Sequence[Tensor], out: Tensor, scratch: Scratch) -> None:
        batch, height, width, _ = grads[0].shape
        rows, columns, outputs = height // 4, width // 4, out.shape[2]
        each = _rows_together(rows, columns * outputs)
        copies = scratch.first((batch, rows // each, 4, 4, each, columns, outputs))
        places = copies.split([grad.shape[3] for grad in grads], -1)
        self._copies = [
            (place, grad.unflatten(2, (-1, 4)).unflatten(1, (-1, each, 4)))
            for place, grad in zip(places, grads, strict=True)
        ]
        blocks = copies.view(batch * rows // each, 16, -1)
        matrix = toom_cook.matrix("result", out.dtype)[:, : len(out)].mT
        self._multiply = _Multiply(matrix, blocks, [out], scratch)

    def __call__(self) -> None:
        for place, tiles in self._copies:
            place.copy_(tiles.permute(0, 1, 3, 5, 2, 4, 6))
        self._multiply()


class Scratch:
    """Memory for what is computed on the way, which else comes page by page each time."""

    def __init__(self, like: Tensor, *sizes: int) -> None:
        self._buffers = [like.new_empty(size) for size in sizes]

    def first(self, shape: Sequence[int]) -> Tensor:
        return self._buffers[0][: math.prod(shape)].view(shape)

    def second(self, shape: Sequence[int]) -> Tensor:
        return self._buffers[1][: math.prod(shape)].view(shape)


class _Multiply:
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
