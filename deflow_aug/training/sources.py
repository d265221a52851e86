"""The folders of a plan, as batches to train on and as crops to look at."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deflow_aug.config import CLEAN
from deflow_aug.data.folders import CropFolder
from deflow_aug.data.paired import PairedBatches, PairFolder
from deflow_aug.data.unpaired import UnpairedBatches
from deflow_aug.randomness import Stream
from deflow_aug.training import feed
from deflow_aug.training.plan import Plan
from deflow_aug.training.samples import ROWS, Crops

SHEET = 2**31
"""Crops of sheets are drawn from this number on, far from any step's."""


@dataclass(frozen=True)
class Sources:
    """Training data of both kinds; either may be missing."""

    unpaired: UnpairedBatches | None
    paired: PairedBatches | None

    def facts(self) -> dict[str, dict[str, Any]]:
        """What the model card tells of each folder."""
        return feed.facts(self.unpaired, self.paired)

    def __str__(self) -> str:
        facts = self.facts()
        return "; ".join(
            f"{name}: {fact['pairs']} pairs"
            if "pairs" in fact
            else f"{name}: {fact['images']} images"
            for name, fact in facts.items()
        )

    def crops(self, domains: tuple[str, ...], seed: int) -> dict[str, Crops]:
        """What sheets of samples show of each degraded domain: pairs where there are some."""
        result = {}
        for name in domains:
            if self.paired and name in self.paired.domains:
                pairs = self.paired.domains[name]
                drawn = [pairs.draw(seed, Stream.PAIRED, SHEET + row) for row in range(ROWS)]
                real, clean = map(np.stack, zip(*drawn, strict=True))
                result[name] = Crops(clean, real, paired=True)
            elif self.unpaired:
                clean, real = (
                    np.stack(
                        [
                            self.unpaired.domains[domain].draw(seed, Stream.BATCH, SHEET + row)
                            for row in range(ROWS)
                        ]
                    )
                    for domain in (CLEAN, name)
                )
                result[name] = Crops(clean, real)
        return result


def open_sources(plan: Plan, processes: int, cache_dir: Path | None = None) -> Sources:
    """Look through the folders of a plan.

    Args:
        processes: how many share the batches.
        cache_dir: folder for decoded images.

    Raises:
        deflow_aug.config.ConfigError: if the batches are too small for the domains or processes.
        deflow_aug.data.unpaired.DataError: if a folder cannot be trained on.
        OSError: if one cannot be read.
    """
    recipe = plan.recipe
    singles, pairs = recipe.batch_sizes(
        unpaired=bool(plan.degraded), paired=bool(plan.paired), processes=processes
    )
    common: dict[str, Any] = {
        "rotations": recipe.rotations,
        # Of the processes that a launcher started on this machine, each has a cache of its own.
        "cache_bytes": recipe.cache_megabytes * 2**20 // int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        "cache_dir": cache_dir,
    }
    crop, align = recipe.crop, recipe.model.scale
    unpaired = paired = None
    if plan.degraded:
        degraded = {
            name: CropFolder(Path(folder), crop, align, **common)
            for name, folder in plan.degraded.items()
        }
        clean = _clean(plan, plan.degraded, common)
        unpaired = UnpairedBatches({CLEAN: clean, **degraded}, singles, recipe.seed)
    if plan.paired:
        folders = {
            name: PairFolder(Path(folder), crop, align, **common)
            for name, folder in plan.paired.items()
        }
        paired = PairedBatches(folders, pairs, recipe.seed)
    return Sources(unpaired, paired)


def _clean(plan: Plan, degraded: Mapping[str, str], common: dict[str, Any]) -> CropFolder:
    """The clean domain, with downscaled degraded images in it if the recipe says so."""
    recipe = plan.recipe
    sources = [(Path(folder), recipe.clean_downscale) for folder in plan.clean]
    if recipe.degraded_as_clean:
        sources += [(Path(folder), recipe.degraded_as_clean) for folder in degraded.values()]
    (folder, downscale), *also = sources
    return CropFolder(
        folder,
        recipe.crop,
        recipe.model.scale,
        downscale=downscale,
        kernels=None if recipe.blur_kernels is None else Path(recipe.blur_kernels),
        also=also,
        **common,
    )
