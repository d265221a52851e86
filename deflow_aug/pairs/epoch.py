"""The number of the epoch, in memory that worker processes share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class SharedEpoch:
    """A number that is seen by workers which already run, forked or spawned.

    Copies and plain pickles have a number of their own; what a spawned worker is given is shared.
    """

    def __init__(self) -> None:
        self._value = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()

    def get(self) -> int:
        return int(self._value)

    def set(self, epoch: int) -> None:
        self._value.fill_(checked_epoch(epoch))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._value.share_memory_()  # no effect on what is shared already


def checked_epoch(epoch: int) -> int:
    """
    Raises:
        ValueError: if it is no integer of at least 0.
    """
    if isinstance(epoch, bool) or not isinstance(epoch, (int, np.integer)) or epoch < 0:
        raise ValueError(f"an epoch is an integer of at least 0, got {epoch!r}")
    return int(epoch)
