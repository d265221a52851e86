"""The number of the epoch and other counts, in memory that worker processes share."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from deflow_aug.arguments import is_integer

MOST_WORKERS = 256
"""So many can tell together that a stream has given nothing."""


class SharedEpoch:
    """A number that is seen by workers which already run, forked or spawned.

    With it they count what they serve. (Two that count at once may miss one, or both warn: no
    lock is worth that.) Copies and plain pickles have numbers of their own; what a spawned worker
    is given is shared.
    """

    # The epoch, whether it was ever set, and if not: the items served (of a stream, the passes
    # begun), and whether that was told;
    # the files that were skipped, and the largest number of them that was told;
    # whether a stream has given any pair.
    _EPOCH, _WAS_SET, _SERVED, _REPETITION_TOLD, _SKIPPED, _SKIPPING_TOLD, _ANY = range(7)

    def __init__(self) -> None:
        self._value = torch.zeros(7, dtype=torch.int64, device="cpu").share_memory_()
        # Of a stream: 1 + the samples that each worker skipped in the first pass that it ended. A
        # place for each, lest two that end at once miss one another.
        self._ended = torch.zeros(MOST_WORKERS, dtype=torch.int64, device="cpu").share_memory_()

    def get(self) -> int:
        return int(self._value[self._EPOCH])

    def set(self, epoch: int) -> None:
        number = checked_epoch(epoch)
        self._value[self._WAS_SET] = 1
        self._value[self._EPOCH] = number

    @property
    def skipped(self) -> int:
        """Files that were skipped, over all workers; each counts those that it met itself."""
        return int(self._value[self._SKIPPED])

    def skip(self) -> int:
        """Count a file; the number so far if it is to be told: 1, 10, 100 and so on, else 0."""
        self._value[self._SKIPPED] += 1
        told = 10 * int(self._value[self._SKIPPING_TOLD]) or 1
        if self.skipped < told:
            return 0
        self._value[self._SKIPPING_TOLD] = told
        return told

    def gave_one(self) -> None:
        """Note that a stream has given a pair."""
        self._value[self._ANY] = 1

    def nothing_came(self, worker: int, workers: int, skipped: int) -> int:
        """Note that a worker has ended a pass through a stream, in which it skipped so many.

        Returns:
            How many all workers have skipped, if this is the last of them to end its first pass
            and none has ever given a pair; else 0.
        """
        if workers > MOST_WORKERS:
            return 0
        ended = self._ended[:workers]
        if ended[worker] == 0:
            ended[worker] = 1 + skipped
        if self._value[self._ANY] or bool((ended == 0).any()):
            return 0
        return int((ended - 1).sum())

    def _first(self, what: int) -> bool:
        told = bool(self._value[what])
        self._value[what] = 1
        return not told

    def serve(self, images: int) -> None:
        """Count an item of a data set of so many images; warn, once, if they begin to repeat."""
        self._count(images, f"all {images} images were served once")

    def begin(self) -> None:
        """Count a pass through a stream; warn, once, if it repeats one."""
        self._count(1, "a second pass begins")

    def _count(self, most: int, told: str) -> None:
        if self._value[self._WAS_SET]:
            return
        self._value[self._SERVED] += 1
        if self._value[self._SERVED] > most and self._first(self._REPETITION_TOLD):
            warnings.warn(
                f"{told}, and set_epoch was never called: with a seed, every further pass has the "
                f"same crops and degradations, bit for bit. Call set_epoch(epoch) of this data set "
                f"before every epoch; or, in a framework that never does (BasicSR, KAIR), give it "
                f"seed=None, which draws anew each time. If the same pairs are wanted "
                f"(validation), call set_epoch(0) once.",
                stacklevel=5,
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for shared in (self._value, self._ended):
            shared.share_memory_()  # no effect on what is shared already


class HasEpoch:
    """A data set whose draws are named by an epoch that its workers share."""

    def __init__(self) -> None:
        self._epoch = SharedEpoch()

    @property
    def epoch(self) -> int:
        """The epoch of the next items."""
        return self._epoch.get()

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops and degradations; reaches workers that already run.

        Call it between epochs.
        """
        self._epoch.set(epoch)

    @property
    def skipped(self) -> int:
        """How many damaged files or samples were met so far; each worker counts its own."""
        return self._epoch.skipped


def checked_epoch(epoch: int) -> int:
    """
    Raises:
        ValueError: if it is no integer of at least 0.
    """
    if not is_integer(epoch) or epoch < 0:
        raise ValueError(f"an epoch is an integer of at least 0, got {epoch!r}")
    return int(epoch)
