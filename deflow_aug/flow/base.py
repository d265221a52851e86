"""What an invertible layer is, and how layers compose."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from deflow_aug.flow.features import FeatureMap
from deflow_aug.flow.folding import Folding


class Invertible(Folding):
    """A map x -> z, invertible for any fixed conditioning features.

    ``prepare`` computes what depends on the features and the parameters alone, once for any
    number of passes; ``encode`` goes from images towards latents, ``decode`` back. Both take
    [B, C, H, W] and what ``prepare`` returned, which is the layer's own affair.
    """

    def prepare(self, features: FeatureMap) -> Any:
        """What ``encode`` and ``decode`` take; nothing, for layers without conditioning."""
        return None

    def encode(self, x: Tensor, prepared: Any = None) -> tuple[Tensor, Tensor]:
        """z and log|det dz/dx| in nats, of shape [B]."""
        raise NotImplementedError

    def decode(self, z: Tensor, prepared: Any = None) -> Tensor:
        """The x with encode(x) = z."""
        raise NotImplementedError


class Chain(Invertible):
    """Layers one after another, in encoding order."""

    def __init__(self, layers: Iterable[Invertible]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def prepare(self, features: FeatureMap) -> list[Any]:
        return [cast(Invertible, layer).prepare(features) for layer in self.layers]

    def encode(self, x: Tensor, prepared: Any = None) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for layer, own in zip(self.layers, prepared, strict=True):
            x, logdet = cast(Invertible, layer).encode(x, own)
            total = total + logdet
        return x, total

    def decode(self, z: Tensor, prepared: Any = None) -> Tensor:
        for layer, own in zip(reversed(self.layers), reversed(prepared), strict=True):
            z = cast(Invertible, layer).decode(z, own)
        return z


def pixels(x: Tensor) -> int:
    """Number of positions H * W of [B, C, H, W]."""
    return x.shape[-2] * x.shape[-1]


def per_image(logdet: Tensor, x: Tensor) -> Tensor:
    """The log-determinant of a map that is the same for every image, as [B]."""
    return logdet.expand(x.shape[0])


def sum_per_image(x: Tensor) -> Tensor:
    """Sum of [B, ...] over all but the first axis."""
    return x.sum(tuple(range(1, x.dim())))
