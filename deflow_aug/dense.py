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
from torch import Tensor

from deflow_aug.flow import toom_cook, winograd
from deflow_aug.flow.grid import Grid
from deflow_aug.flow.prepacked import Prepacked
from deflow_aug.flow.products import bias_of, multiply, prepacked, tiles_in
from deflow_aug.flow.winograd import Multiply, Scratch, TransformPadded

NEGATIVE_SLOPE = 0.2
RESIDUAL_SCALE = 0.2
CONVOLUTIONS = 5


@dataclass(frozen=True)
class DenseKernels:
    """What the five convolutions of a dense block are in tiles: [36, O, C] each, or these
    prepacked, and biases, as :func:`products.bias_of` has them."""

    kernels: Sequence[Tensor | Prepacked]
    biases: Sequence[Tensor]

    @classmethod
    def prepacked(cls, parameters: Sequence[Tensor], tiles: int) -> DenseKernels:
        """Of weights and biases, for many maps, about so many of whose tiles are multiplied at
        once."""
        weights, biases = parameters[:CONVOLUTIONS], parameters[CONVOLUTIONS:]
        kernels = [prepacked(winograd.transform_kernel(weight), tiles) for weight in weights]
        return cls(kernels, [*map(bias_of, kernels, biases)])


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
        self.most = most = max(region.tiles for region in self.regions)
        """Tiles that are multiplied at once."""
        self._tiles = [
            pixels.new_empty(36 * most * sum(widths))
            for _ in self.regions[:CONVOLUTIONS]  # one more is begun when the first is done
        ]
        size = 36 * most * max(widths)
        self.scratch = Scratch(pixels, size, size)
        self._steps = [_Step(self, number, index) for number, index in _order(len(self.regions))]

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
        for step in self._steps:
            step(kernels if step.number in wanted else None)

    def tiles(self, index: int = 0) -> Tensor:
        """What is transformed of a region's maps, [tiles, 36, C + 4 G]."""
        channels = self.channels + self.growth * (CONVOLUTIONS - 1)
        memory, count = self._tiles[index % CONVOLUTIONS], self.regions[index].tiles
        return tiles_in(memory, count, 36, channels)


class _Step:
    """The transform of a map in one region, and the first convolution that sees it.

    Small maps take less time than it takes to say which part of which memory they are: that is
    said once.
    """

    def __init__(self, maps: DenseMaps, number: int, index: int) -> None:
        self.number, region = number, maps.regions[index]
        last = number == CONVOLUTIONS - 1
        inputs = maps.channels + maps.growth * number
        self._tiles = maps.tiles(index)[:, :, :inputs]
        self._own = self._tiles[:, :, inputs - maps.growth if number else 0 :]
        self._transform = TransformPadded(region.windows(maps.maps[number]), maps.scratch)
        self._last, target = last, maps.maps[0 if last else number + 1]
        self._place = region.pixels(target)
        matrix = toom_cook.matrix("result", target.dtype)
        self._results = Multiply(matrix, region.tiles, target.shape[3], maps.scratch)
        # What tiles compute beyond the map is none of its border, which is nothing.
        beyond = target[:, 1 + maps.grid.height : -1], target[:, :, 1 + maps.grid.width : -1]
        self._beyond = [part for part in beyond if part.numel()]

    def __call__(self, block: DenseKernels | None) -> None:
        """To the map that is its result, or the last one to the block's input.

        Args:
            block: without it the map is transformed, and no more.
        """
        alone = self._transform()
        self._own.copy_(alone)
        if block is None:
            return
        number = self.number
        seen = self._tiles if number else alone
        sums = multiply(seen, block.kernels[number], block.biases[number])
        pixels = self._results(sums).view(self._place.shape)
        if self._last:
            self._place.add_(pixels, alpha=RESIDUAL_SCALE)
        else:
            torch.ops.aten.leaky_relu.out(pixels, NEGATIVE_SLOPE, out=self._place)
        for part in self._beyond:
            part.zero_()


def _order(regions: int) -> Iterator[tuple[int, int]]:
    """Convolution and region one after the other, such that all that one needs is there.

    A region's windows reach into the next region of the map: each convolution is one behind. The
    last convolution's result takes the place of the input when no window needs that any longer.
    """
    for step in range(regions + CONVOLUTIONS - 1):
        for number in range(CONVOLUTIONS):
            if 0 <= step - number < regions:
                yield number, step - number
