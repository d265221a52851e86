"""Explicit randomness: every draw is named by integers, and no global generator is touched.

A draw depends on its key alone, so it is the same whatever else is computed with it (batch size,
number of samples, workers) and on whatever device: numbers are drawn on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """What a draw is for. Values are part of what a seed means: never renumber them."""

    CONDITIONING = 1
    DEQUANTIZATION = 2
    LATENT = 3
    BATCH = 4
    PAIRED = 5
    TEMPERATURE = 6
    CHOICE = 7
    CROP = 8
    SUGGEST = 9
    FIT = 10
    TWO_SAMPLE = 11
    EVALUATE = 12
    CAST = 13


def generator(*key: int) -> np.random.Generator:
    """A generator for this key: non-negative integers of any size."""
    # The length is a part of the key, since SeedSequence takes (1,) and (1, 0) for the same.
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((len(key), *key))))


def fresh_seed() -> int:
    """A seed from the operating system's entropy, for callers that gave none."""
    return int(np.random.SeedSequence().generate_state(1, np.uint64)[0] >> np.uint64(1))


def normal(shape: tuple[int, ...], *key: int) -> Tensor:
    """Standard normal draws, float32, on the CPU."""
    return torch.from_numpy(generator(*key).standard_normal(shape, np.float32))


def uniform(shape: tuple[int, ...], *key: int) -> Tensor:
    """Draws uniform in [-1/2, 1/2), float32, on the CPU."""
    return torch.from_numpy(generator(*key).random(shape, np.float32)) - 0.5


BLOCK = 64
"""Side of the blocks, in positions, that draws of a plane are made in."""


def normal_part(shape: tuple[int, int, int], rows: slice, columns: slice, *key: int) -> Tensor:
    """A window of standard normal draws [C, H, W]: [C, rows, columns], float32, on the CPU.

    Each block of 64 x 64 positions is named by the key and its own row and column, so that a
    window of a large plane is the same whether or not the rest is drawn. Blocks at the right and
    the bottom have the size of what is left of the plane.

    Args:
        shape: of the whole plane.
        rows, columns: the window, with start and stop, within the plane.
    """
    return _part(normal, shape, rows, columns, key)


def uniform_part(shape: tuple[int, int, int], rows: slice, columns: slice, *key: int) -> Tensor:
    """As :func:`normal_part`, uniform in [-1/2, 1/2)."""
    return _part(uniform, shape, rows, columns, key)


Part = Callable[..., Tensor]
"""normal_part or uniform_part."""


def _part(
    draw: Callable[..., Tensor],
    shape: tuple[int, int, int],
    rows: slice,
    columns: slice,
    key: tuple[int, ...],
) -> Tensor:
    channels, height, width = shape
    size_of_window = (channels, rows.stop - rows.start, columns.stop - columns.start)
    result = torch.empty(size_of_window, dtype=torch.float32, device="cpu")  # whatever the defaults
    for i in range(rows.start // BLOCK, -(-rows.stop // BLOCK)):
        for j in range(columns.start // BLOCK, -(-columns.stop // BLOCK)):
            top, left = i * BLOCK, j * BLOCK
            size = (min(BLOCK, height - top), min(BLOCK, width - left))
            block = draw((channels, *size), *key, i, j)
            inside, here = _overlap(rows, top, size[0])
            inside_columns, here_columns = _overlap(columns, left, size[1])
            result[:, here, here_columns] = block[:, inside, inside_columns]
    return result


def _overlap(window: slice, start: int, size: int) -> tuple[slice, slice]:
    """Where a block meets the window, counted from the block's start and from the window's."""
    low, high = max(window.start, start), min(window.stop, start + size)
    return slice(low - start, high - start), slice(low - window.start, high - window.start)
