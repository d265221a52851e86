"""Explicit randomness: every draw is named by integers, and no global generator is touched.

A draw depends on its key alone, so it is the same whatever else is computed with it (batch size,
number of samples, workers) and on whatever device: numbers are drawn on the CPU.
"""

from __future__ import annotations

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
