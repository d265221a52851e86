"""Residual-in-residual dense blocks in tiles (:mod:`deflow_aug.flow.winograd`).

The inputs of a dense block's five convolutions are the block's input and the maps before, one
after the other: each map is transformed once, into its place in one buffer, of which a convolution
takes the first channels.

Maps are in the order [B, H, W, C] here. Weights come as those of the five convolutions, followed
by their biases.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deflow_aug.flow import winograd
from deflow_aug.flow.winograd import Grid, Scratch

NEGATIVE_SLOPE = 0.2
RESIDUAL_SCALE = 0.2
CONVOLUTIONS = 5


@dataclass(frozen=True)
class DenseKernels:
    """What the five convolutions of a dense block are in tiles: [36, C, O] each, and biases."""

    kernels: Sequence[Tensor]
    biases: Sequence[Tensor]

    @classmethod
    def of(cls, parameters: Sequence[Tensor]) -> DenseKernels:
        """Of weights and biases; each kernel has memory of its own, as products read it fastest."""
        weights, biases = parameters[:CONVOLUTIONS], parameters[CONVOLUTIONS:]
        return cls(
            [winograd.transform_kernel(weight).mT.contiguous() for weight in weights], biases
        )


class DenseMaps:
    """The maps of dense blocks of one size, which are computed in place one after the other.

    The same memory serves all of them: that of large maps comes page by page, which takes time.
    Large maps are computed in regions, from top to bottom, each convolution one region behind the
    one before, so that what is in use stays small.

    Args:
        pixels: [B, H, W, C], the first block's input.
        whole: computed in one region, whose transformed maps are all there in the end.
    """

    def __init__(self, pixels: Tensor, growth: int, whole: bool = False) -> None:
        self.grid, self.channels, self.growth = Grid(*pixels.shape[:3]), pixels.shape[3], growth
        self.regions = [self.grid.whole] if whole else self.grid.regions()
        widths = [self.channels] + [growth] * (CONVOLUTIONS - 1)
        self.maps = [self.grid.padded(pixels, width) for width in widths]
        self.pixels.copy_(pixels)
        most = max(region.tiles for region in self.regions)
        self._tiles = [
            pixels.new_empty(36 * most * sum(widths))
            for _ in self.regions[:CONVOLUTIONS]  # one more is begun when the first is done
        ]
        self.scratch = Scratch(pixels, 36 * most * max(widths))

    @property
    def pixels(self) -> Tensor:
        """The input of the next block, [B, H, W, C]."""
        return self.inner(0)

    def inner(self, number: int) -> Tensor:
        """A map without its border: 0 is the block's input, the others are after leaky ReLU."""
        return self.maps[number][:, 1 : 1 + self.grid.height, 1 : 1 + self.grid.width]

    def rrdb(self, blocks: Sequence[DenseKernels]) -> None:
        """The input becomes x + 0.2 * (the dense blocks, one after the other)."""
        before = self.maps[0].clone()
        for block in blocks:
            self.dense(block)
        torch.add(before, self.maps[0], alpha=RESIDUAL_SCALE, out=self.maps[0])

    def dense(self, kernels: DenseKernels, known: int = 1, result: bool = True) -> None:
        """The input becomes the result of a dense block, if that is asked for.

        Args:
            known: how many maps are there already; the first is the input.
            result: whether to compute it, or the transformed maps alone.
        """
        wanted = range(known - 1, CONVOLUTIONS if result else CONVOLUTIONS - 1)
        for number, index in _order(len(self.regions)):
            self.transform(number, index)
            if number in wanted:
                self._convolve(kernels, number, index)

    def transform(self, number: int, index: int) -> None:
        """A map, in one region."""
        start = self.channels + self.growth * (number - 1) if number else 0
        width = self.growth if number else self.channels
        windows = self.regions[index].windows(self.maps[number])
        new = self.tiles(index)[:, :, start : start + width]
        winograd.transform_padded(windows, out=new, scratch=self.scratch)

    def _convolve(self, block: DenseKernels, number: int, index: int) -> None:
        """A convolution of what is transformed, in one region."""
        region, kernel = self.regions[index], block.kernels[number]
        inputs, outputs = kernel.shape[1:]
        sums = self.scratch.first((36, region.tiles, outputs))
        torch.bmm(self.tiles(index)[:, :, :inputs], kernel, out=sums)
        winograd.add_bias(sums, block.biases[number])
        pixels = winograd.results(sums, self.scratch)
        if number < CONVOLUTIONS - 1:
            place = region.pixels(self.maps[number + 1])
            place.copy_(F.leaky_relu_(pixels, NEGATIVE_SLOPE).view(place.shape))
        else:
            place = region.pixels(self.maps[0])
            place.add_(pixels.view(place.shape), alpha=RESIDUAL_SCALE)
        self._clear((number + 1) % CONVOLUTIONS)

    def tiles(self, index: int = 0) -> Tensor:
        """What is transformed of a region's maps, [36, tiles, C + 4 G]."""
        shape = 36, self.regions[index].tiles, self.channels + self.growth * (CONVOLUTIONS - 1)
        return self._tiles[index % CONVOLUTIONS][: shape[0] * shape[1] * shape[2]].view(shape)

    def _clear(self, number: int) -> None:
        """What tiles compute beyond the map is none of its border, which is nothing."""
        if self.grid.height < 4 * self.grid.rows:
            self.maps[number][:, 1 + self.grid.height :] = 0
        if self.grid.width < 4 * self.grid.columns:
            self.maps[number][:, :, 1 + self.grid.width :] = 0


def _order(regions: int) -> Iterator[tuple[int, int]]:
    """Convolution and region one after the other, such that all that one needs is there.

    A region's windows reach into the next region of the map: each convolution is one behind. The
    last convolution's result takes the place of the input when no window needs that any longer.
    """
    for step in range(regions + CONVOLUTIONS - 1):
        for number in range(CONVOLUTIONS):
            if 0 <= step - number < regions:
                yield number, step - number
