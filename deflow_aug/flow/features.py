"""Feature maps of one level of the flow, and 3x3 convolutions of them without upsampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from deflow_aug.flow import toom_cook, winograd
from deflow_aug.flow.convolution import (
    Kernels,
    TransformedKernels,
    convolve_maps,
    in_tiles,
)
from deflow_aug.flow.direct import DirectKernel, convolve_directly
from deflow_aug.flow.grid import Grid


class FeatureKernel:
    """3x3 convolutions of feature maps, and what convolving with them computes of them alone.

    Args:
        fold: returns their kernels, for C + D channels. Called anew each time: what is kept is
            what is needed.
    """

    def __init__(self, fold: Callable[[], Kernels]) -> None:
        self.fold = fold
        self._transformed: dict[tuple[tuple[int, ...], ...], TransformedKernels] = {}
        self._direct: dict[tuple[int, int, torch.dtype], DirectKernel] = {}

    def direct(self, features: FeatureMap) -> DirectKernel:
        """All of them as one, for maps like these, without gradients."""
        fine, repeats = features.fine, features.repeats
        key = fine.shape[1], repeats, fine.dtype
        if key not in self._direct:
            self._direct[key] = DirectKernel.of(self.fold(), fine, repeats)
        return self._direct[key]

    def transformed(
        self, channels: tuple[int, ...], repeats: tuple[int, ...], tiles: int
    ) -> TransformedKernels:
        """For maps of so many channels, whose pixels stand so often, so many tiles at once."""
        key = channels, repeats
        if key not in self._transformed:
            self._transformed[key] = TransformedKernels.of(self.fold(), *key).prepacked(tiles)
        return self._transformed[key]


@dataclass(frozen=True)
class FeatureMap:
    """The conditioning map of one level, of which a part is only repeated pixels.

    Args:
        fine: [B, C, H, W], at the size that the level works at.
        coarse: [B, D, H / repeats, W / repeats], which stands for each of its pixels ``repeats``
            times in both directions (nearest-neighbour upsampling); None if there is none.
        repeats: a power of two, at least 2; 1 where ``coarse`` is None.
    """

    fine: Tensor
    coarse: Tensor | None = None
    repeats: int = 1

    @property
    def channels(self) -> int:
        return self.fine.shape[1] + (0 if self.coarse is None else self.coarse.shape[1])

    def dense(self) -> Tensor:
        """The whole map, [B, C + D, H, W]."""
        if self.coarse is None:
            return self.fine
        upsampled = F.interpolate(self.coarse, scale_factor=self.repeats, mode="nearest")
        return torch.cat([self.fine, upsampled], 1)

    @property
    def in_tiles(self) -> bool:
        return in_tiles(self.fine)

    def convolve(self, kernel: FeatureKernel) -> tuple[Tensor, ...]:
        """``conv2d(self.dense(), weight, bias, padding=1)`` for each of the kernel's weights.

        Computed in the precision of the map, returned in that of the weights.
        """
        if torch.is_grad_enabled():
            return self.convolve_all([kernel])[0]
        if not self.in_tiles:
            direct = kernel.direct(self)
            return direct.convolve(self.fine, self.coarse).chunk(direct.count, 1)
        maps, repeats = self._parts
        channels = tuple(part.shape[1] for part in maps)
        grid = Grid(len(self.fine), *self.fine.shape[2:])
        transformed = kernel.transformed(channels, repeats, grid.tiles_together)
        return transformed.convolve(self.tiles, grid)

    def convolve_all(self, kernels: Sequence[FeatureKernel]) -> list[tuple[Tensor, ...]]:
        """:meth:`convolve` with gradients, which in tiles all kernels then have at once."""
        folded = [kernel.fold() for kernel in kernels]
        if self.in_tiles:
            return convolve_maps(*self._parts, folded)
        return [convolve_directly(self.fine, self.coarse, self.repeats, one) for one in folded]

    @cached_property
    def tiles(self) -> list[Tensor]:
        """What all convolutions of the map in tiles share, without gradients."""
        maps, repeats = self._parts
        return winograd.transform_together([part.movedim(1, -1) for part in maps], repeats)

    @property
    def _parts(self) -> tuple[list[Tensor], tuple[int, ...]]:
        """The maps and how often their pixels stand, as far as tiles make use of it."""
        if self.coarse is None:
            return [self.fine], (1,)
        coarse, repeats = self.coarse, self.repeats
        if repeats > toom_cook.MOST_REPEATS:
            factor, repeats = repeats / toom_cook.MOST_REPEATS, toom_cook.MOST_REPEATS
            coarse = F.interpolate(coarse, scale_factor=factor, mode="nearest")
        return [self.fine, coarse], (1, repeats)
