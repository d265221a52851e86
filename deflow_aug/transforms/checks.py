"""Settings of transforms, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deflow_aug.arguments import is_integer, is_number, span

__all__ = ["checked_weights", "is_count", "is_number", "span"]


def is_count(value: Any) -> bool:
    return is_integer(value) and bool(value >= 0)


def checked_weights(weights: Sequence[Any]) -> list[float]:
    """Weights as floats: positive and finite."""
    return [span("a weight", weight, 1e-300)[0] for weight in weights]
