"""What an invertible layer is, and how layers compose."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn


class Invertible(nn.Module):
    """A map x -> z, invertible for any fixed conditioning features.

    ``encode`` goes from images towards latents, ``decode`` back; both take [B, C, H, W].
    """

    def encode(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """z and log|det dz/dx| in nats, of shape [B]."""
        raise NotImplementedError

    def decode(self, z: Tensor, features: Tensor) -> Tensor:
        """The x with encode(x) = z."""
        raise NotImplementedError


class Chain(Invertible):
    """Layers one after another, in encoding order."""

    def __init__(self, layers: Iterable[Invertible]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def encode(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for layer in self.layers:
            x, logdet = cast(Invertible, layer).encode(x, features)
            total = total + logdet
        return x, total

    def decode(self, z: Tensor, features: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            z = cast(Invertible, layer).decode(z, features)
        return z


def pixels(x: Tensor) -> int:
    """Number of positions H * W of [B, C, H, W]."""
    return x.shape[-2] * x.shape[-1]


def per_image(logdet: Tensor, x: Tensor) -> Tensor:
    """The log-determinant of a map that is the same for every image, as [B]."""
    return logdet.expand(x.shape[0])


def sum_per_image(x: Tensor) -> Tensor:
    """Sum of [B, ...] over all but the first axis."""
    return torch.flatten(x, 1).sum(1)
