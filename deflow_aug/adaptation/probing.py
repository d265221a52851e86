"""What degrading adds to images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deflow_aug import randomness
from deflow_aug.model import DeFlow
from deflow_aug.randomness import Stream

BATCH = 16


class Encoded:
    """Images, their features and latents.

    Args:
        x: images [B, 3, H, W] in [0, 1], in the flow's colours, H and W multiples of
            ``config.size_multiple``.
        key: of the noise on h(x).
    """

    def __init__(self, model: DeFlow, x: Tensor, *key: int) -> None:
        device, scale = next(model.parameters()).device, model.config.scale
        self.x = x.to(device)
        height, width = (side // scale for side in x.shape[-2:])
        noise = randomness.normal((len(x), 3, height, width), *key)
        self.features = model.features(self.x, noise.to(device))
        self.latents, _ = model.encode(self.x, self.features)

    def added(self, model: DeFlow, domain: str, *key: int) -> Tensor:
        """Degraded images less clean ones, [B, 3, H, W], drawn by ``key``."""
        noise = [
            randomness.normal(tuple(z.shape), *key, i).to(z.device)
            for i, z in enumerate(self.latents)
        ]
        tau = torch.ones(len(self.x), device=self.x.device)
        shifted = model.degrade(self.latents, noise, [domain] * len(self.x), tau)
        return model.decode(shifted, self.features) - self.x


def encoded(model: DeFlow, images: Sequence[Tensor], seed: int) -> list[Encoded]:
    """Batches of images of any size, in parts of at most ``BATCH``."""
    parts = [part for batch in images for part in batch.split(BATCH)]
    return [Encoded(model, x, seed, Stream.CAST, 0, i) for i, x in enumerate(parts)]
