"""The transposes of the transforms of :mod:`deflow_aug.flow.winograd`, which gradients take.

All here is without gradients of its own, on pixels in the order [B, H, W, C].
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
from deflow_aug.flow.winograd import Multiply, Scratch, parts_of


def transform_together(
    grads: Sequence[Tensor],
    region: Region,
    repeats: Sequence[int],
    to: Sequence[Tensor],
) -> None:
    """Of :func:`winograd.transform_together`, added to what the maps' gradients are so far.

    Args:
        to: of each map, [B, H / repeats, W / repeats, C].
    """
    counts = [count for _, count in parts_of(repeats)]
    grid = Grid.over(to[0], repeats[0]).of(region)
    ends = list(accumulate(total.shape[3] for total in to))
    for number, (total, end, often) in enumerate(zip(to, ends, repeats, strict=True)):
        own = slice(end - total.shape[3], end)
        taking_part = zip(grads, counts, strict=True)
        parts = [grad[:, :, own] for grad, count in taking_part if number < count]
        products = torch.cat(parts, 1) if len(parts) > 1 else parts[0].contiguous()
        window, rows = Transform(grid, products, often)(products), region.seen(often)
        inside = slice(max(0, rows.start), min(rows.stop, total.shape[1]))
        own_rows = slice(inside.start - rows.start, inside.stop - rows.start)
        total[region.images, inside] += window[:, own_rows, 1 : 1 + total.shape[2]]


class Transform:
    """The transpose of a transform, whenever it is called.

    Args:
        like: has as many channels.
        window: memory for the result, [elements], no fewer than of ``window`` below.
    """

    def __init__(
        self,
        grid: Grid,
        like: Tensor,
        repeats: int = 1,
        scratch: Scratch | None = None,
        window: Tensor | None = None,
    ) -> None:
        stride, further = 4 // repeats, -(-repeats // 2)
        side, channels = stride + 2, like.shape[-1]
        batch, rows, columns = grid.batch, grid.rows, grid.columns
        matrix = toom_cook.matrix("data", like.dtype, repeats).mT
        self._matrices = matrix.expand(grid.tiles, *matrix.shape)
        flat = grid.tiles, len(matrix), channels
        self._flat = like.new_empty(flat) if scratch is None else scratch.first(flat)
        windows = self._flat.view(batch, rows, columns, side, side, channels)
        # A window covers its own block of pixels, and parts of the ``further`` ones after it.
        shape = batch, rows + further, stride, columns + further, stride, channels
        if window is None:
            self._total = like.new_empty(shape)
        else:
            self._total = window[: math.prod(shape)].view(shape)
        self._sums = []
        for i in range(further + 1):
            above = slice(i * stride, (i + 1) * stride)
            for j in range(further + 1):
                part = windows[:, :, :, above, j * stride : (j + 1) * stride]
                n, m = part.shape[3:5]
                place = self._total[:, i : i + rows, :n, j : j + columns, :m]
                self._sums.append((place, part.transpose(2, 3)))
        # The first part is of whole blocks: what they held does not matter.
        self._beyond = self._total[:, rows:], self._total[:, :rows, :, columns:]
        self.window = self._total.flatten(3, 4).flatten(1, 2)
        """The gradient of all that the tiles see, and of some more, [B, rows, columns, C]."""

    def __call__(self, products: Tensor) -> Tensor:
        """The window, of [tiles, products, C]."""
        torch.bmm(self._matrices, products, out=self._flat)
        for border in self._beyond:
            border.zero_()
        place, part = self._sums[0]
        place.copy_(part)
        for place, part in self._sums[1:]:
            place.add_(part)
        return self.window


def transform_kernel(grad: Tensor, start: int = 0) -> Tensor:
    """Of :func:`winograd.transform_kernel`: [products, O, C] -> [O, C, 3, 3].

    Args:
        start: the first of the 36 products that these are.
    """
    some = toom_cook.matrix("kernel", grad.dtype)[start : start + len(grad)]
    flat = some.mT @ grad.flatten(1)
    return flat.view(3, 3, *grad.shape[1:]).permute(2, 3, 0, 1)


def multiply_kernel(grads: Tensor, tiles: Tensor) -> Tensor:
    """Of :func:`products.multiply`, the gradient of the kernels: [products, O, C]."""
    return torch.bmm(grads.permute(1, 2, 0), tiles.transpose(0, 1))


def of_bias(grads: Tensor) -> Tensor:
    """What is added to all results gets the sum of their gradients: [tiles, products, O] -> [O].

    One of the transformed gradients, among the first ones, is that sum over a tile.
    """
    return grads[:, toom_cook.ALL_ONES].sum(0)


def results(grads: Sequence[Tensor], grid: Grid, counts: Sequence[int]) -> list[Tensor]:
    """Of :func:`winograd.results`, of maps [B, H, W, O] side by side.

    Args:
        counts: of how many products each of the results is, one after the other.

    Returns:
        [tiles, some products, O] each.
    """
    bottom, right = 4 * grid.rows - grid.height, 4 * grid.columns - grid.width
    padded = [
        F.pad(grad, (0, 0, 0, right, 0, bottom)) if bottom or right else grad for grad in grads
    ]
    tiles = torch.cat([_tiles_of(grad) for grad in padded], -1).view(grid.tiles, 16, -1)
    matrices = toom_cook.matrix("result", tiles.dtype).mT[: sum(counts)].split(list(counts))
    return [torch.bmm(some.expand(len(tiles), *some.shape), tiles) for some in matrices]


class Results:
    """:func:`results` of the same memory, whenever it is called: [tiles, 36, O].

    Args:
        grad: [B, H, W, O], H and W multiples of four.
        scratch: where the result lies, second, until this memory is used again.
    """

    def __init__(self, grad: Tensor, scratch: Scratch) -> None:
        self._pixels = _tiles_of(grad)
        self._copies = scratch.first(self._pixels.shape)
        self._tiles = self._copies.view(-1, 16, grad.shape[3])
        matrix = toom_cook.matrix("result", grad.dtype).mT
        self._multiply = Multiply(matrix, len(self._tiles), grad.shape[3], scratch)

    def __call__(self) -> Tensor:
        self._copies.copy_(self._pixels)
        return self._multiply(self._tiles)


def _tiles_of(pixels: Tensor) -> Tensor:
    """[B, H, W, O] as [B, H / 4, W / 4, 4, 4, O]."""
    return pixels.unflatten(2, (-1, 4)).unflatten(1, (-1, 4)).transpose(2, 3)
