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
from deflow_aug.flow.winograd import Multiply, Scratch, parts_of, rows_together


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
        parts = [grad[:, :, own].contiguous() for grad, count in taking_part if number < count]
        window, rows = Transform(parts, grid, often)(), region.seen(often)
        inside = slice(max(0, rows.start), min(rows.stop, total.shape[1]))
        own_rows = slice(inside.start - rows.start, inside.stop - rows.start)
        total[region.images, inside] += window[:, own_rows, 1 : 1 + total.shape[2]]


class Transform:
    """The transpose of a transform of the same memory, whenever it is called.

    Args:
        parts: [products, tiles, C] of all products, one tensor's after the other's.
        window: memory for the result, [elements], no fewer than of ``window`` below.
    """

    def __init__(
        self,
        parts: Sequence[Tensor],
        grid: Grid,
        repeats: int = 1,
        scratch: Scratch | None = None,
        window: Tensor | None = None,
    ) -> None:
        stride, further = 4 // repeats, -(-repeats // 2)
        side, channels = stride + 2, parts[0].shape[-1]
        batch, rows, columns = grid.batch, grid.rows, grid.columns
        each = rows_together(rows, columns * channels)
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
        if window is None:
            self._total = parts[0].new_empty(shape)
        else:
            self._total = window[: math.prod(shape)].view(shape)
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


def transform_kernel(grad: Tensor, start: int = 0) -> Tensor:
    """Of :func:`winograd.transform_kernel`: [products, O, C] -> [O, C, 3, 3].

    Args:
        start: the first of the 36 products that these are.
    """
    some = toom_cook.matrix("kernel", grad.dtype)[start : start + len(grad)]
    flat = some.mT @ grad.flatten(1)
    return flat.view(3, 3, *grad.shape[1:]).permute(2, 3, 0, 1)


def results(grads: Sequence[Tensor], grid: Grid, count: int = 36) -> Tensor:
    """Of :func:`winograd.results`, of maps [B, H, W, O] side by side: [count, tiles, O]."""
    bottom, right = 4 * grid.rows - grid.height, 4 * grid.columns - grid.width
    padded = [
        F.pad(grad, (0, 0, 0, right, 0, bottom)) if bottom or right else grad for grad in grads
    ]
    outputs = sum(grad.shape[-1] for grad in grads)
    out = grads[0].new_empty(count, grid.tiles, outputs)
    Results(padded, out, Scratch(out, 16 * grid.tiles * outputs, out.numel()))()
    return out


class Results:
    """:func:`results` of the same memory to the same place, whenever it is called.

    Args:
        grads: [B, H, W, O] of each, H and W multiples of four.
        out: [products, tiles, O], of all of them.
    """

    def __init__(self, grads: Sequence[Tensor], out: Tensor, scratch: Scratch) -> None:
        batch, height, width, _ = grads[0].shape
        rows, columns, outputs = height // 4, width // 4, out.shape[2]
        each = rows_together(rows, columns * outputs)
        copies = scratch.first((batch, rows // each, 4, 4, each, columns, outputs))
        places = copies.split([grad.shape[3] for grad in grads], -1)
        self._copies = [
            (place, grad.unflatten(2, (-1, 4)).unflatten(1, (-1, each, 4)))
            for place, grad in zip(places, grads, strict=True)
        ]
        blocks = copies.view(batch * rows // each, 16, -1)
        matrix = toom_cook.matrix("result", out.dtype)[:, : len(out)].mT
        self._multiply = Multiply(matrix, blocks, [out], scratch)

    def __call__(self) -> None:
        for place, tiles in self._copies:
            place.copy_(tiles.permute(0, 1, 3, 5, 2, 4, 6))
        self._multiply()
