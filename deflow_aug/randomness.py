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
    INITIALIZATION = 4
    BATCH = 5


def generator(*key: int) -> torch.Generator:
    """A CPU generator for this key (non-negative integers)."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    # manual_seed takes signed 64-bit numbers; the top bit carries no needed entropy.
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def fresh_seed() -> int:
    """A seed from the operating system's entropy, for callers that gave none."""
    return int(np.random.SeedSequence().generate_state(1, np.uint64)[0] >> np.uint64(1))


def normal(shape: tuple[int, ...], *key: int) -> Tensor:
    """Standard normal draws, float32, on the CPU."""
    return torch.randn(shape, generator=generator(*key))


def uniform(shape: tuple[int, ...], *key: int) -> Tensor:
    """Draws uniform in [-1/2, 1/2), float32, on the CPU."""
    return torch.rand(shape, generator=generator(*key)) - 0.5
