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
        if not self.in_tiles:
            kernels = kernel.fold()
            return self.convolve_directly(*kernels.folded()).chunk(len(kernels.weights), 1)
        if torch.is_grad_enabled():
            return self.convolve_all([kernel])[0]
        maps, repeats = self._parts
        channels = tuple(part.shape[1] for part in maps)
        grid = Grid(len(self.fine), *self.fine.shape[2:])
        transformed = kernel.transformed(channels, repeats, grid.tiles_together)
        return transformed.convolve(self.tiles, grid)

    def convolve_all(self, kernels: Sequence[FeatureKernel]) -> list[tuple[Tensor, ...]]:
        """:meth:`convolve` in tiles, with gradients, which all kernels then have at once."""
        return convolve_maps(*self._parts, [kernel.fold() for kernel in kernels])

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

    def convolve_directly(self, weight: Tensor, bias: Tensor) -> Tensor:
        """:meth:`convolve` by PyTorch's convolutions."""
        dtype, channels = weight.dtype, self.fine.shape[1]
        weight, bias = weight.to(self.fine.dtype), bias.to(self.fine.dtype)
        result = F.conv2d(self.fine, weight[:, :channels], bias, padding=1).to(dtype)
        if self.coarse is None:
            return result
        coarse = convolve_repeated(self.coarse, weight[:, channels:], self.repeats)
        return result + coarse.to(dtype)


def convolve_repeated(x: Tensor, weight: Tensor, repeats: int) -> Tensor:
    """A padded 3x3 convolution of ``x`` repeated ``repeats`` times in height and width.

    Of the nine taps of a kernel several fall on the same source pixel: on a repeated row of phase
    0 the taps of rows 0 and 1, on the last phase those of rows -1 and 0, on phases between all
    three. Their weights are added up, and what is left is a 2x2 kernel for each pair of phase
    kinds: for repeats = 2, 16 instead of 36 multiplications per source pixel and channel pair.

    Args:
        x: [B, D, h, w].
        weight: [O, D, 3, 3].

    Returns:
        [B, O, h * repeats, w * repeats].
    """
    height, width = x.shape[-2:]
    kinds = _phase_kernels(repeats, weight)
    # Kernels of all kinds, [kinds, 3, 2], applied to the rows and to the columns.
    # The order of memory is channels last, which the convolution wants.
    merged = torch.einsum("pik,qjl,odij->pqokld", kinds, kinds, weight).flatten(0, 2).movedim(-1, 1)
    # With one row and column of padding, result i of a kernel starts at source pixel i - 1.
    y = F.conv2d(x, merged, padding=1).movedim(1, -1).unflatten(-1, (len(kinds), len(kinds), -1))
    phases = [0] + [1] * (repeats - 2) + [len(kinds) - 1]
    # The last phase looks at pixels i and i + 1, all others at i - 1 and i.
    starts = [0] * (repeats - 1) + [1]
    windows = [
        y[:, top : top + height, left : left + width, p, q]
        for p, top in zip(phases, starts, strict=True)
        for q, left in zip(phases, starts, strict=True)
    ]
    # [B, h, w, O] of each phase -> [B, h, rows, w, columns, O], in the order of memory.
    grid = torch.stack(windows, 3).unflatten(3, (repeats, repeats)).transpose(2, 3)
    return grid.reshape(len(x), height * repeats, width * repeats, -1).movedim(-1, 1)


def _phase_kernels(repeats: int, like: Tensor) -> Tensor:
    """How the three taps of a kernel fall on two neighbouring pixels, for each kind of phase."""
    first = [[1, 0], [0, 1], [0, 1]]  # taps -1 | 0, 1
    middle = [[0, 1], [0, 1], [0, 1]]  # all on the second pixel
    last = [[1, 0], [1, 0], [0, 1]]  # taps -1, 0 | 1
    kinds = [first, last] if repeats == 2 else [first, middle, last]
    return torch.tensor(kinds, dtype=like.dtype, device=like.device)
