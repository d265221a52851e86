"""Unpaired training data: batches in which the domains take turns."""

from __future__ import annotations

from collections.abc import Mapping

from deflow_aug.data.batches import Batch, Batches, stack
from deflow_aug.data.folders import CropFolder, DataError, check_separate
from deflow_aug.randomness import Stream

__all__ = ["Batch", "CropFolder", "DataError", "UnpairedBatches"]


class UnpairedBatches(Batches[CropFolder]):
    """Batches of crops of the clean and the degraded domains, which share no image.

    Raises:
        DataError: as :class:`Batches`, and if two domains are the same folder or share images.
    """

    def __init__(self, domains: Mapping[str, CropFolder], batch_size: int, seed: int) -> None:
        super().__init__(domains, batch_size, seed)
        check_separate(domains)

    def batch(self, step: int, part: tuple[int, int] = (0, 1)) -> Batch:
        """The items of a step that part ``part[0]`` of ``part[1]`` makes."""
        chosen = self.items(step, part)
        crops = [
            self.domains[name].draw(self.seed, Stream.BATCH, step, index) for index, name in chosen
        ]
        indices, names = zip(*chosen, strict=True)
        return Batch(stack(crops), names, indices, step)
