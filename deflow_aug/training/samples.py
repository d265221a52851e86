"""Pictures of what a model in training does: clean crops, samples, real degraded crops."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deflow_aug import randomness
from deflow_aug.config import CLEAN
from deflow_aug.data.unpaired import CropFolder
from deflow_aug.image_files import write_image
from deflow_aug.model import DeFlow
from deflow_aug.randomness import Stream

ROWS = 4
ZOOM = 3
GAP = 6


class SampleSheet:
    """The same crops at every step, so that sheets can be compared.

    Columns: a clean crop, two samples of each degraded domain from it, and a real crop of each
    degraded domain (of another scene: the data are unpaired).
    """

    def __init__(self, domains: Mapping[str, CropFolder], seed: int) -> None:
        self.crops = {
            name: np.stack([crops.draw(seed, Stream.BATCH, 2**31 + row) for row in range(ROWS)])
            for name, crops in domains.items()
        }
        self.seed = seed

    @torch.no_grad()
    def write(self, model: DeFlow, path: Path) -> None:
        """Draw samples and write the sheet as a PNG, magnified."""
        device = next(model.parameters()).device
        clean = torch.from_numpy(self.crops[CLEAN]).permute(0, 3, 1, 2).float().to(device) / 255
        small = (3, *(side // model.config.scale for side in clean.shape[-2:]))
        noise = self._normal(small, Stream.CONDITIONING).to(device)
        features = model.features(clean, noise)
        latents, _ = model.encode(clean, features)
        columns = [self.crops[CLEAN]]
        for domain in model.config.domains:
            for number in range(2):
                draws = [
                    self._normal(tuple(z.shape[1:]), Stream.LATENT, number, i).to(device)
                    for i, z in enumerate(latents)
                ]
                shifted = model.degrade(
                    latents, draws, [domain] * ROWS, torch.ones(ROWS, device=device)
                )
                decoded = model.decode(shifted, features)
                sample = model.unmatch_colours(decoded, [domain] * ROWS).clamp(0, 1).cpu()
                columns.append((sample * 255).round().byte().permute(0, 2, 3, 1).numpy())
            columns.append(self.crops[domain])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(_grid(columns), path)

    def _normal(self, shape: tuple[int, ...], *key: int) -> Tensor:
        return torch.stack([randomness.normal(shape, self.seed, *key, row) for row in range(ROWS)])


def _grid(columns: list[np.ndarray]) -> Image.Image:
    side = columns[0].shape[1] * ZOOM
    width, height = (n * (side + GAP) - GAP for n in (len(columns), ROWS))
    sheet = Image.new("RGB", (width, height), "white")
    for x, column in enumerate(columns):
        for y, crop in enumerate(column):
            tile = Image.fromarray(crop).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (x * (side + GAP), y * (side + GAP)))
    return sheet
