"""Degraders against real degraded photographs of other scenes: no ground truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from deflow_aug import randomness
from deflow_aug.randomness import Stream

from . import no_reference, two_sample
from .degraders import Degrader, draw
from .noise import Image8
from .photographs import middle
from .tables import Table

SIDE = 512
"""Largest side of what is degraded and compared, in pixels."""

INSTALL = (
    "NIQE, BRISQUE and PIQE are left out: pyiqa is not installed; pip install 'deflow-aug[quality]'"
)


def degraded(
    clean: Sequence[Image8],
    degraders: Mapping[str, Degrader],
    *,
    temperature: float = 1.0,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, list[Image8]]:
    """A sample of every clean picture, uint8 [H, W, 3], by every degrader."""
    bar = tqdm(total=len(degraders) * len(clean), desc="sampling", disable=not progress)
    found: dict[str, list[Image8]] = {}
    for name, degrader in degraders.items():
        bar.set_postfix_str(name)
        found[name] = []
        for index, picture in enumerate(clean):
            named = int(randomness.generator(seed, Stream.EVALUATE, 4, index).integers(2**63))
            found[name] += draw(name, degrader, picture, temperature, 1, named)
            bar.update()
    bar.close()
    return found


def tables(
    real: Sequence[Image8], fakes: Mapping[str, Sequence[Image8]], *, seed: int = 0
) -> list[Table]:
    """What tells the fakes from real degraded pictures, a row for each kind.

    Raises:
        ValueError: of too few or too small pictures (:func:`~.two_sample.compare`).
    """
    told = two_sample.compare(real, fakes, seed=seed)
    scores = no_reference.compare(real, fakes)
    if scores is None:
        return [dataclasses.replace(told, notes=(*told.notes, INSTALL))]
    return [told, scores]


def pieces(photographs: Sequence[Image8]) -> list[Image8]:
    """The pieces of photographs that are compared."""
    return [middle(photograph, SIDE) for photograph in photographs]
