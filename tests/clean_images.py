"""Clean images for tests of training pairs, degraders that are quick, and their comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from small import small_model
from torch import Tensor
from torch.utils.data import Dataset

from deflow_aug import DeFlowDegrader, DegradedPairs, randomness

SIDES = ((20, 24), (24, 20), (32, 28), (21, 23), (40, 20))


def pixels(number: int, height: int, width: int) -> NDArray[np.uint8]:
    """A picture of its own for each number, within reach of the noise of small models."""
    return randomness.generator(number).integers(90, 160, (height, width, 3), np.uint8)


def pictures() -> list[NDArray[np.uint8]]:
    return [pixels(number, *sides) for number, sides in enumerate(SIDES)]


def write(folder: Path) -> list[Path]:
    """These pictures as files, in the order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"photo{number}.png" for number in range(len(SIDES))]
    for path, picture in zip(paths, pictures(), strict=True):
        Image.fromarray(picture).save(path)
    return paths


def degrader(**changes: Any) -> DeFlowDegrader:
    torch.set_num_threads(1)  # as in worker processes, so that results are equal bit by bit
    return DeFlowDegrader(small_model(**changes), device="cpu")


def same(first: Any, second: Any) -> bool:
    """Whether two pairs, or lists of pairs, are equal bit by bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


class GlobalStates(Dataset[Any]):
    """Pairs, and whether making one left every global random state of the process alone."""

    def __init__(self, pairs: DegradedPairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Any, bool]:
        before = global_states()
        return self.pairs[index], same(before, global_states())


def global_states() -> list[Any]:
    import random

    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return [list(random.getstate()), name, keys.tolist(), rest, torch.get_rng_state()]
