"""Settings of transforms, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deflow_aug.sampling import is_number, span

__all__ = ["checked_weights", "is_count", "is_number", "span"]


def is_count(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 0)


def checked_weights(weights: Sequence[Any]) -> list[float]:
    """Weights as floats: positive and finite."""
    return [span("a weight", weight, 1e-300)[0] for weight in weights]
