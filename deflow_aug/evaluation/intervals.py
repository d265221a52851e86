"""How sure is a figure? Bootstrap intervals over pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deflow_aug import randomness
from deflow_aug.randomness import Stream

from .noise import Array

RESAMPLES = 1000
COVERAGE = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of its 95 % interval, which are nan where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @classmethod
    def of(cls, values: Array) -> Interval:
        """The percentile interval (Efron 1979) of a figure and its resamples, [1 + R].

        With few scenes such intervals are too narrow: with five, by about a third. There is none
        where all resamples are the same, as those of a single scene are.
        """
        value, resampled = float(values[0]), values[1:]
        if np.isnan(values).any() or not len(resampled) or (resampled == value).all():
            return cls(value)
        tail = (1 - COVERAGE) / 2
        low, high = np.quantile(resampled, (tail, 1 - tail))
        return cls(value, float(low), float(high))

    def text(self, digits: int = 3) -> str:
        """As it stands in tables: "0.123 [0.101, 0.145]", or "-" for nan."""
        if math.isnan(self.value):
            return "-"
        ends = "" if math.isnan(self.low) else f" [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return f"{self.value:.{digits}f}{ends}"


def resample_weights(scenes: Sequence[str], seed: int, resamples: int = RESAMPLES) -> Array:
    """How often each picture counts, [1 + resamples, N]: once each, then in bootstrap resamples.

    Scenes are drawn with replacement, as many as there are, and all their pictures come along. The
    same seed draws the same for every method, so that two can be compared resample by resample.

    Args:
        scenes: the scene of each picture, N names.
        seed: of the draws.
        resamples: how many.
    """
    names, number = np.unique(list(scenes), return_inverse=True)
    rng = randomness.generator(seed, Stream.EVALUATE, 0)
    draws = rng.integers(len(names), size=(resamples, len(names)))
    times = np.stack([np.bincount(draw, minlength=len(names)) for draw in draws])
    return np.concatenate([np.ones((1, len(number))), times[:, number]])
