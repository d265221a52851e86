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


@dataclass(frozen=True)
class DirectKernel:
    """A 3x3 convolution of feature maps as PyTorch's own convolutions.

    Args:
        fine: weight of the fine channels, [O, C, 3, 3].
        coarse: of the coarse ones, see :func:`phase_kernels`; None if there are none.
        bias: [O].
        repeats: how often the coarse channels' pixels stand in both directions.
        dtype: of the results.
    """

    fine: Tensor
    coarse: Tensor | None
    bias: Tensor
    repeats: int
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, features: FeatureMap) -> DirectKernel:
        """For maps like these, in their precision; the results are in that of the weight.

        Args:
            weight: [O, C + D, 3, 3].
        """
        channels, dtype = features.fine.shape[1], features.fine.dtype
        own, repeats = weight.to(dtype), features.repeats
        coarse = None if repeats == 1 else phase_kernels(own[:, channels:], repeats)
        return cls(own[:, :channels], coarse, bias.to(dtype), repeats, weight.dtype)

    def convolve(self, features: FeatureMap) -> Tensor:
        """``conv2d(features.dense(), weight, bias, padding=1)``, [B, O, H, W]."""
        result = F.conv2d(features.fine, self.fine, self.bias, padding=1).to(self.dtype)
        if self.coarse is None or features.coarse is None:
            return result
        coarse = convolve_phases(features.coarse, self.coarse, self.repeats)
        return result + coarse.to(self.dtype)


class FeatureKernel:
    """3x3 convolutions of feature maps, and what convolving with them computes of them alone.

    Args:
        fold: returns their kernels, for C + D channels. Called anew each time: what is kept is
            what is needed.
    """

    def __init__(self, fold: Callable[[], Kernels]) -> None:
        self.fold = fold
        self._transformed: dict[tuple[tuple[int, ...], ...], TransformedKernels] = {}
        self._direct: dict[tuple[int, int, torch.dtype], tuple[DirectKernel, int]] = {}

    def direct(self, features: FeatureMap) -> tuple[DirectKernel, int]:
        """All of them as one, for maps like these; and how many they are."""
        key = features.fine.shape[1], features.repeats, features.fine.dtype
        if torch.is_grad_enabled() or key not in self._direct:
            kernels = self.fold()
            direct = DirectKernel.of(*kernels.folded(), features), len(kernels.weights)
            if torch.is_grad_enabled():  # a second backward pass would need another graph
                return direct
            self._direct[key] = direct
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
        if not self.in_tiles:
            direct, count = kernel.direct(self)
            return direct.convolve(self).chunk(count, 1)
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


def phase_kernels(weight: Tensor, repeats: int) -> Tensor:
    """A 3x3 kernel as the 2x2 kernels that repeated pixels see, for :func:`convolve_phases`.

    Of the nine taps of a kernel several fall on the same source pixel: on a repeated row of phase
    0 the taps of rows 0 and 1, on the last phase those of rows -1 and 0, on phases between all
    three. Their weights are added up, and what is left is a 2x2 kernel for each pair of phase
    kinds: for repeats = 2, 16 instead of 36 multiplications per source pixel and channel pair.

    Args:
        weight: [O, D, 3, 3].

    Returns:
        [kinds * kinds * O, D, 2, 2].
    """
    kinds = _taps_of_phases(repeats, weight)
    # Kernels of all kinds, [kinds, 3, 2], applied to the rows and to the columns.
    # The order of memory is channels last, which the convolution wants.
    merged = torch.einsum("pik,qjl,odij->pqokld", kinds, kinds, weight)
    return merged.flatten(0, 2).movedim(-1, 1)


def convolve_phases(x: Tensor, kernels: Tensor, repeats: int) -> Tensor:
    """A padded 3x3 convolution of ``x`` repeated ``repeats`` times in height and width.

    Args:
        x: [B, D, h, w].
        kernels: the convolution's :func:`phase_kernels`.

    Returns:
        [B, O, h * repeats, w * repeats].
    """
    height, width = x.shape[-2:]
    kinds = min(repeats, 3)
    # With one row and column of padding, result i of a kernel starts at source pixel i - 1.
    y = F.conv2d(x, kernels, padding=1).movedim(1, -1).unflatten(-1, (kinds, kinds, -1))
    phases = [0] + [1] * (repeats - 2) + [kinds - 1]
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


def _taps_of_phases(repeats: int, like: Tensor) -> Tensor:
    """How the three taps of a kernel fall on two neighbouring pixels, for each kind of phase."""
    first = [[1, 0], [0, 1], [0, 1]]  # taps -1 | 0, 1
    middle = [[0, 1], [0, 1], [0, 1]]  # all on the second pixel
    last = [[1, 0], [1, 0], [0, 1]]  # taps -1, 0 | 1
    kinds = [first, last] if repeats == 2 else [first, middle, last]
    return torch.tensor(kinds, dtype=like.dtype, device=like.device)
