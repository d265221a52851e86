"""A batch, and what all kinds of batches have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from deflow_aug.data.pictures import DataError, Pictures
from deflow_aug.data.regions import Pixels


@dataclass(frozen=True, eq=False)
class Batch:
    """Crops of one step, as many as one process has to make.

    images: uint8 [B, 3, crop, crop], of any domain.
    domains: the name of each one's domain.
    indices: the place of each in the whole batch of the step, of all processes.
    step: 0, 1, ...
    clean: the other halves of paired crops, uint8 [B, 3, crop, crop]; None in unpaired batches.
    """

    images: Tensor
    domains: tuple[str, ...]
    indices: tuple[int, ...]
    step: int
    clean: Tensor | None = None

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[object, ...]]:
        # As bytes: sent as tensors, batches would pass through shared memory, of which containers
        # often have too little.
        clean = None if self.clean is None else self.clean.numpy()
        return _from_arrays, (self.images.numpy(), self.domains, self.indices, self.step, clean)

    def pin_memory(self) -> Batch:
        """The same in memory that a GPU copies from without waiting."""
        clean = None if self.clean is None else self.clean.pin_memory()
        return replace(self, images=self.images.pin_memory(), clean=clean)


def _from_arrays(
    images: Pixels,
    domains: tuple[str, ...],
    indices: tuple[int, ...],
    step: int,
    clean: Pixels | None,
) -> Batch:
    other = None if clean is None else torch.from_numpy(clean)
    return Batch(torch.from_numpy(images), domains, indices, step, other)


class Folder(Protocol):
    """What crops are drawn from."""

    crop: int
    pictures: Pictures


F = TypeVar("F", bound=Folder)


class Batches(ABC, Generic[F]):
    """Batches in which the domains take turns, so that all are drawn equally often.

    The crop of an item depends on the seed, the step and the item's index alone: not on the
    process that makes it, on their number, or on the steps before. So nothing is to be remembered
    of batches but the step.

    Args:
        domains: the crops of every domain, by name.
        batch_size: items in a step's batch, of all processes together.
        seed: of all draws.

    Raises:
        DataError: if there is no domain, or crops differ in size.
    """

    def __init__(self, domains: Mapping[str, F], batch_size: int, seed: int) -> None:
        if not domains or batch_size < 1:
            raise DataError(
                f"expected at least one domain and a batch_size of at least 1, got "
                f"{len(domains)} and {batch_size}"
            )
        crops = {name: folder.crop for name, folder in domains.items()}
        if len(set(crops.values())) > 1:
            raise DataError(f"the crops of all domains must be of one size, got {crops}")
        self.domains, self.batch_size, self.seed = dict(domains), batch_size, seed

    @property
    def sources(self) -> dict[str, Pictures]:
        """The pictures that the crops are cut from, by domain."""
        return {name: folder.pictures for name, folder in self.domains.items()}

    def items(self, step: int, part: tuple[int, int] = (0, 1)) -> list[tuple[int, str]]:
        """Index and domain of the items of a step that part ``part[0]`` of ``part[1]`` makes.

        Item i of step t is of domain number (t B + i) mod n. Parts are runs of consecutive items,
        whose lengths differ by one at most.

        Raises:
            DataError: if there are more parts than items.
        """
        number, of = part
        if not 0 <= number < of:
            raise ValueError(f"part must be (number, of) with 0 <= number < of, got {part}")
        size, names = self.batch_size, list(self.domains)
        if of > size:
            raise DataError(
                f"a batch of {size} cannot be shared by {of} processes: use a larger batch_size "
                "or fewer processes"
            )
        indices = range(size * number // of, size * (number + 1) // of)
        return [(index, names[(step * size + index) % len(names)]) for index in indices]

    @abstractmethod
    def batch(self, step: int, part: tuple[int, int] = (0, 1)) -> Batch:
        """Those items."""


def stack(crops: Sequence[Pixels]) -> Tensor:
    """Crops [H, W, 3] as a tensor [B, 3, H, W], contiguous."""
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
