"""Settings of transforms, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np


def is_count(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 0)


def is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def span(name: str, value: Any, low: float, high: float = math.inf) -> tuple[float, float]:
    """A range of settings: a number, or (least, greatest), all within [low, high]."""
    pair = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(pair) != 2 or not all(map(is_number, pair)):
        raise ValueError(f"{name} must be a number or (least, greatest), got {value!r}")
    if not low <= pair[0] <= pair[1] <= high:
        bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(
            f"{name} must be {bounds}, and its least value no more than its greatest, got {value!r}"
        )
    return float(pair[0]), float(pair[1])


def checked_weights(weights: Sequence[Any]) -> list[float]:
    """Weights as floats: positive and finite."""
    return [span("a weight", weight, 1e-300)[0] for weight in weights]
