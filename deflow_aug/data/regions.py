"""Blocks of a picture, mirrored beyond its borders, and of a picture that is downscaled.

A block depends on its own pixels alone: every output pixel is the same sum, in the same order,
whatever else is computed with it. So a block of the downscaled picture, computed from the few
pixels that it needs, equals the block cut out of the whole downscaled picture bit by bit, which
lets a cache hold either of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Pixels: TypeAlias = NDArray[np.uint8]  # [H, W, 3]

_TILE = (128, 256)  # pixels downscaled at once, which fit into a processor's cache as float32


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture that stands for its downscaled version.

    pixels: uint8 [H, W, 3].
    factor: it is still to be downscaled by this.
    """

    pixels: Pixels
    factor: int = 1

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width after downscaling, rounded up."""
        height, width = self.pixels.shape[:2]
        return -(-height // self.factor), -(-width // self.factor)

    def block(self, top: int, left: int, height: int, width: int) -> Pixels:
        """Pixels [height, width, 3] of the downscaled picture; may be a view of it.

        The block may reach over the borders, where the picture is mirrored, edge pixel repeated.
        """
        if self.factor == 1:
            return mirrored(self.pixels, top, left, height, width)
        rows = _mirror(top, height, self.sides[0])
        columns = _mirror(left, width, self.sides[1])
        first, leftmost = int(rows.min()), int(columns.min())
        size = int(rows.max()) - first + 1, int(columns.max()) - leftmost + 1
        inner = downscaled_block(self.pixels, self.factor, first, leftmost, *size)
        if inner.shape[:2] == (height, width) and (first, leftmost) == (top, left):
            return inner
        return inner[rows - first][:, columns - leftmost]

    def downscaled(self) -> Picture:
        """The same with the downscaling done."""
        return self if self.factor == 1 else Picture(self.block(0, 0, *self.sides))


def mirrored(pixels: Pixels, top: int, left: int, height: int, width: int) -> Pixels:
    """The block [height, width, 3] of a picture, mirrored symmetrically beyond its borders."""
    if min(top, left) >= 0 and top + height <= pixels.shape[0] and left + width <= pixels.shape[1]:
        return pixels[top : top + height, left : left + width]
    rows = _mirror(top, height, pixels.shape[0])
    columns = _mirror(left, width, pixels.shape[1])
    first = int(rows.min())
    # Rows first, and no more than needed: the picture may be a file mapped into memory.
    return pixels[first : int(rows.max()) + 1][rows - first][:, columns]


def drawn_place(
    rng: np.random.Generator, sides: tuple[int, int], crop: int, align: int, rotations: bool
) -> tuple[int, int, bool, int]:
    """Top, left, flip and quarter turns of a random crop that starts at multiples of ``align``."""
    top, left = (align * int(rng.integers((side - crop) // align + 1)) for side in sides)
    flip = bool(rng.random() < 0.5)
    return top, left, flip, int(rng.integers(4)) if rotations else 0


def turned(block: Pixels, flip: bool, turns: int) -> Pixels:
    """A copy of a square block, flipped horizontally if asked, then turned by 90 degrees each."""
    # A copy, lest what a caller does to its crop reach a cache.
    return np.array(np.rot90(block[:, ::-1] if flip else block, turns), order="C")


def _mirror(start: int, length: int, size: int) -> NDArray[np.int64]:
    position = np.arange(start, start + length) % (2 * size)
    return np.minimum(position, 2 * size - 1 - position)


@cache
def _taps(factor: int) -> tuple[int, NDArray[np.float32]]:
    """Offset of the first tap from an output pixel's first input pixel, and the weights.

    The cubic (a = -1/2) of MATLAB's ``imresize``, stretched by the factor against aliasing.
    """
    first = (1 - 3 * factor) // 2 if factor % 2 else -3 * factor // 2
    count = 4 * factor - factor % 2
    distance = np.abs(np.arange(first, first + count) - (factor - 1) / 2) / factor
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
    return first, (weights / weights.sum()).astype(np.float32)


def downscaled_block(
    pixels: Pixels, factor: int, top: int, left: int, height: int, width: int
) -> Pixels:
    """A block of the picture downscaled by ``factor``, rounded to 8 bits: bicubic, antialiased.

    The downscaled picture is ``deflow_aug.resize.bicubic_downscale``'s, up to float32 rounding.
    Only the pixels that reach the block are touched.
    """
    first, weights = _taps(factor)
    block = np.empty((height, width, 3), np.uint8)
    step = [max(8, side // factor) for side in _TILE]
    for y in range(0, height, step[0]):
        rows = min(step[0], height - y)
        tall = (rows - 1) * factor + len(weights)
        for x in range(0, width, step[1]):
            columns = min(step[1], width - x)
            wide = (columns - 1) * factor + len(weights)
            source = mirrored(
                pixels, (top + y) * factor + first, (left + x) * factor + first, tall, wide
            )
            low = _sum(source.astype(np.float32), weights, factor, rows)
            # In memory by columns, which the sum over columns is quicker with.
            small = _sum(np.ascontiguousarray(low.swapaxes(0, 1)), weights, factor, columns)
            block[y : y + rows, x : x + columns] = np.rint(small.clip(0, 255)).swapaxes(0, 1)
    return block


def _sum(
    source: NDArray[np.float32], weights: NDArray[np.float32], factor: int, length: int
) -> NDArray[np.float32]:
    """Weighted sums of every ``factor``-th row of [N, ...]: [length, ...]; weights symmetric.

    Tap by tap, for a matrix product's order of summation may depend on the shapes.
    """
    total = np.zeros((length, *source.shape[1:]), np.float32)
    part = np.empty_like(total)
    last = (length - 1) * factor + 1
    for tap in range((len(weights) + 1) // 2):
        opposite = len(weights) - 1 - tap
        if opposite == tap:
            np.multiply(source[tap : tap + last : factor], weights[tap], out=part)
        else:
            one, other = (source[i : i + last : factor] for i in (tap, opposite))
            np.add(one, other, out=part)
            part *= weights[tap]
        total += part
    return total
