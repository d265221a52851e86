"""3x3 convolutions with fewer multiplications: Winograd's F(2x2, 3x3) (Lavin & Gray, 2016).

A tile of 2 x 2 results needs 4 x 4 pixels d and a kernel g: it is A^T [(G g G^T) * (B^T d B)] A,
16 products where the plain convolution takes 36. Summed over channels each of the 16 is a matrix
product of its own. Two things make this pay for the conditioning features: their transform B^T d B
is the same for the kernels of all steps of a level; and where pixels are repeated twice in height
and width (see :mod:`deflow_aug.flow.features`), d = (a, b, b, c) in each direction, of whose
transform (a - b, 2 b, 0, b - c) one term is nothing: 9 products are left of the 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

_DATA = [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]  # B^T
_REPEATED = [[1, -1, 0], [0, 2, 0], [0, 1, -1]]  # rows 0, 1 and 3 of B^T, of (a, b, b, c)
_KERNEL = [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]  # G
_RESULT = [[1, 1, 1, 0], [0, 1, -1, -1]]  # A^T

# The 16 products, those first that repeated pixels take part in.
_ORDER = [4 * i + j for i in (0, 1, 3) for j in (0, 1, 3)] + [2, 6, 14, 8, 9, 11, 10]
_SHARED = 9
_ALL_ONES = _ORDER.index(5)
"""A^T of this one is 1 everywhere in the tile: what is added to it is a bias."""

_BAND = 512
"""Tiles whose products are computed at once: what fits into a core's cache."""

Tiles = tuple[Tensor, ...]
"""Transformed pixels of all tiles, [products, B * tiles, channels]; in two parts, of 9 and of 7
products, where only some of the channels take part in the latter."""


def transform(fine: Tensor, doubled: Tensor | None = None) -> Tiles:
    """B^T d B of every tile of a map, and of another one's pixels repeated twice.

    Args:
        fine: [B, C, H, W].
        doubled: [B, D, H / 2, W / 2].
    """
    height, width = fine.shape[-2:]
    data = _square("data", fine)
    x = F.pad(fine.movedim(1, -1), (0, 0, 1, 1 + width % 2, 1, 1 + height % 2))
    tiles = _transformed(data, x, 2)
    if doubled is None:
        return (tiles,)
    x = F.pad(doubled.movedim(1, -1), (0, 0, 1, 1, 1, 1))
    repeated = _transformed(_square("repeated", fine), x, 1)
    return torch.cat([tiles[:_SHARED], repeated], 2), tiles[_SHARED:]


@dataclass(frozen=True)
class Kernels:
    """G g G^T of each part of the tiles, [products, O, channels], and the bias."""

    parts: list[Tensor]
    bias: Tensor


def transform_kernel(weight: Tensor, bias: Tensor, tiles: Tiles) -> Kernels:
    """Weight [O, C + D, 3, 3] and bias [O] for such tiles."""
    parts, start = [], 0
    for part in tiles:
        g = weight[:, : part.shape[2]].permute(2, 3, 0, 1).reshape(9, -1)
        kernel = _square("kernel", weight)[start : start + len(part)] @ g
        parts.append(kernel.unflatten(1, (len(weight), -1)))
        start += len(part)
    return Kernels(parts, bias)


def convolve(tiles: Tiles, kernels: Kernels, size: tuple[int, int, int]) -> Tensor:
    """The padded convolution of what was transformed; [B, O, H, W], in channels-last memory.

    For inference alone: gradients do not pass.

    Args:
        size: B, H and W.
    """
    batch, height, width = size
    rows, columns, outputs = (height + 1) // 2, (width + 1) // 2, len(kernels.bias)
    matrix = _square("result", kernels.bias)
    result = matrix.new_empty(batch * rows, 2, columns, 2, outputs)
    band = min(batch * rows, max(1, _BAND // columns))
    buffer = matrix.new_empty(16 * band * columns * outputs)
    for top in range(0, batch * rows, band):
        some = slice(top * columns, min(top + band, batch * rows) * columns)
        corners = matrix @ _products(tiles, kernels, some, buffer).flatten(1)
        grid = corners.view(2, 2, -1, columns, outputs).permute(2, 0, 3, 1, 4)
        result[top : top + band] = grid
    whole = result.view(batch, 2 * rows, 2 * columns, outputs)
    return whole[:, :height, :width].movedim(-1, 1)


def _transformed(matrix: Tensor, x: Tensor, stride: int) -> Tensor:
    """[products, B * tiles, C] of channels-last pixels [B, H, W, C]."""
    side, channels = round(matrix.shape[1] ** 0.5), x.shape[-1]
    windows = x.unfold(1, side, stride).unfold(2, side, stride).permute(4, 5, 0, 1, 2, 3)
    return (matrix @ windows.reshape(side * side, -1)).unflatten(1, (-1, channels))


def _products(tiles: Tiles, kernels: Kernels, some: slice, buffer: Tensor) -> Tensor:
    """Of some of the tiles, [16, tiles, O], in a buffer."""
    count, outputs = some.stop - some.start, len(kernels.bias)
    products, start = buffer[: 16 * count * outputs].view(16, count, outputs), 0
    for part, kernel in zip(tiles, kernels.parts, strict=True):
        torch.bmm(part[:, some], kernel.mT, out=products[start : start + len(part)])
        start += len(part)
    products[_ALL_ONES] += kernels.bias
    return products


def _square(name: str, like: Tensor) -> Tensor:
    return _matrix(name, like.dtype)


@cache
def _matrix(name: str, dtype: torch.dtype) -> Tensor:
    """The matrices of the two-dimensional transforms, products in the order of ``_ORDER``."""
    rows = {"data": _DATA, "repeated": _REPEATED, "kernel": _KERNEL, "result": _RESULT}[name]
    with torch.inference_mode(False):  # used later wherever
        one = torch.tensor(rows, dtype=dtype, device="cpu")
        square = torch.kron(one, one)
        if name == "result":
            return square[:, _ORDER].contiguous()
        return square if name == "repeated" else square[_ORDER].contiguous()
