"""Unpaired and paired data as one: what a step of a run, in each of its processes, is fed with."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deflow_aug.config import CLEAN, ConfigError
from deflow_aug.data.batches import Batch
from deflow_aug.data.folders import CropFolder
from deflow_aug.data.loading import loader
from deflow_aug.data.paired import PairedBatches
from deflow_aug.data.unpaired import UnpairedBatches
from deflow_aug.model import DeFlow
from deflow_aug.training.objective import Inputs, Pairs, inputs, pairs
from deflow_aug.training.recipe import Recipe


class Portion(NamedTuple):
    """What one process computes in one step, and the seconds that it waited for it."""

    unpaired: Batch | None
    paired: Batch | None
    waiting: float = 0.0


def facts(
    unpaired: UnpairedBatches | None, paired: PairedBatches | None
) -> dict[str, dict[str, Any]]:
    """What a model card tells of each folder, by its name there."""
    result = {} if unpaired is None else {k: v.facts() for k, v in unpaired.domains.items()}
    for name, pairs_ in ({} if paired is None else paired.domains).items():
        result[f"{name}, paired"] = pairs_.facts()
    return result


class Feed:
    """The data of a run.

    Args:
        recipe: the settings.
        unpaired, paired: one may be None.
        part: this process and the number of processes.

    Raises:
        ConfigError: if batches are of other sizes than :meth:`Recipe.batch_sizes` asks for, domains
            have data and are not in ``model.domains``, or there are pairs and the shift has no
            Sigma to train.
    """

    def __init__(
        self,
        recipe: Recipe,
        unpaired: UnpairedBatches | None,
        paired: PairedBatches | None,
        part: tuple[int, int],
    ) -> None:
        self.recipe, self.unpaired, self.paired, self.part = recipe, unpaired, paired, part
        if paired is not None and recipe.model.shift in ("zero", "fitted"):
            raise ConfigError(
                "pairs are learned by their likelihood under Sigma (eq. 5), which model.shift "
                f"{recipe.model.shift!r} does not train; use 'full' or 'diagonal'"
            )
        sizes = recipe.batch_sizes(
            unpaired=unpaired is not None, paired=paired is not None, processes=part[1]
        )
        for kind, given, size in zip(
            ("unpaired", "paired"), (unpaired, paired), sizes, strict=True
        ):
            if given is None:
                continue
            if given.batch_size != size:
                raise ConfigError(
                    f"the recipe asks for {size} {kind} items a step, but their batches were made "
                    f"with batch_size={given.batch_size}"
                )
            unknown = sorted(set(given.domains) - {CLEAN, *recipe.model.domains})
            if unknown:
                raise ConfigError(
                    f"there are {kind} data of {', '.join(map(repr, unknown))}, but model.domains "
                    f"has {', '.join(recipe.model.domains)}"
                )

    @property
    def folders(self) -> Mapping[str, CropFolder]:
        """The unpaired data's folder by domain."""
        return {} if self.unpaired is None else self.unpaired.domains

    def fingerprints(self) -> dict[str, str]:
        """A hash of the images of every domain, of pairs under ``"<domain>|clean"``."""
        result = {name: crops.fingerprint() for name, crops in self.folders.items()}
        for name, crops in ({} if self.paired is None else self.paired.domains).items():
            result[f"{name}|{CLEAN}"] = crops.fingerprint()
        return result

    def facts(self) -> dict[str, dict[str, Any]]:
        """What a model card tells of each folder."""
        return facts(self.unpaired, self.paired)

    def portions(self, step: int) -> Iterator[Portion]:
        """Those of this process, from a step to the recipe's last."""
        remaining = self.recipe.steps - step

        def load(batches: UnpairedBatches | PairedBatches | None) -> Iterator[Batch | None]:
            if batches is None:
                yield from itertools.repeat(None, remaining)
            else:
                # Closed, it ends its workers.
                with closing(  # type: ignore[type-var]
                    loader(batches, step, remaining, self.part, self.recipe.workers)
                ) as made:
                    yield from made

        with closing(load(self.unpaired)) as first, closing(load(self.paired)) as second:  # type: ignore[type-var]
            for _ in range(remaining):
                started = time.perf_counter()
                unpaired, paired = next(first), next(second)
                yield Portion(unpaired, paired, time.perf_counter() - started)

    def whole(self, step: int) -> Portion:
        """All items of a step, of all processes."""
        return Portion(
            None if self.unpaired is None else self.unpaired.batch(step),
            None if self.paired is None else self.paired.batch(step),
        )

    def names(self, step: int) -> list[str]:
        """What the items of a step are logged as: process after process, unpaired ones first."""
        names = []
        for part in ((number, self.part[1]) for number in range(self.part[1])):
            if self.unpaired is not None:
                names += [name for _, name in self.unpaired.items(step, part)]
            if self.paired is not None:
                names += [f"{name}|{CLEAN}" for _, name in self.paired.items(step, part)]
        return names

    def images(self, batches: int, model: DeFlow, device: torch.device) -> Iterator[Inputs]:
        """The first batches, whole, the same in every process; of pairs, both halves."""
        for step in range(batches):
            unpaired, paired = self.inputs(self.whole(step), model, device)
            if unpaired is not None:
                yield unpaired
            if paired is not None:
                yield from paired

    def crops(self, step: int, count: int) -> dict[str, Tensor]:
        """So many unpaired crops of every domain, uint8 [count, 3, crop, crop], from a step on."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.folders}
        while min(map(len, found.values())) < count:
            batch = self.whole(step).unpaired
            assert batch is not None
            for image, name in zip(batch.images, batch.domains, strict=True):
                found[name].append(image)
            step += 1
        return {name: torch.stack(images[:count]) for name, images in found.items()}

    def inputs(
        self, portion: Portion, model: DeFlow, device: torch.device
    ) -> tuple[Inputs | None, Pairs | None]:
        """A portion as the objective takes it."""
        unpaired, paired, _ = portion
        seed = self.recipe.seed
        return (
            None if unpaired is None else inputs(unpaired, model, seed, device),
            None if paired is None else pairs(paired, model, seed, device),
        )
