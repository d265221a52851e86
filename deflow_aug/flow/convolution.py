"""3x3 convolutions in tiles with gradients, which are computed in tiles as well.

A map is transformed once, whatever number of kernels it meets; the gradient of what was
transformed is a sum of matrix products again, and is transformed back once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deflow_aug.flow import winograd
from deflow_aug.flow.grid import Grid


def in_tiles(x: Tensor) -> bool:
    """Whether convolutions of ``x`` are computed in tiles.

    Not on GPUs, whose convolutions are faster than their float32 matrix products, not in low
    precision, which the transforms would lose, and not of maps smaller than a tile, which would
    cost more, and where rounding would move weights whose gradient is zero.
    """
    exact = x.dtype in (torch.float32, torch.float64)
    large = min(x.shape[-2:]) >= 4
    return large and x.is_cpu and exact and not torch.is_autocast_enabled("cpu")


@dataclass(frozen=True)
class Kernels:
    """Several kernels of the same maps, each of whose results is scaled and gets a bias.

    Args:
        weights: of the same shape, [O, C, 3, 3] each.
        scale, bias: of all of them one after the other, [sum of O].
    """

    weights: tuple[Tensor, ...]
    scale: Tensor
    bias: Tensor

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution that they are."""
        return torch.cat(self.weights) * self.scale[:, None, None, None], self.bias


def convolve(x: Tensor, weight: Tensor, bias: Tensor, repeats: int = 1) -> Tensor:
    """``conv2d(x, weight, bias, padding=1)``, of each pixel ``repeats`` times in each direction.

    Args:
        x: [B, C, H, W].
        repeats: 1, 2 or 4.
    """
    kernels = Kernels((weight,), torch.ones_like(bias), bias)
    ((result,),) = convolve_maps([x], (repeats,), [kernels])
    return result


def convolve_maps(
    maps: Sequence[Tensor], repeats: tuple[int, ...], kernels: Sequence[Kernels]
) -> list[tuple[Tensor, ...]]:
    """The results of all kernels, [B, O, H, W], with gradients.

    The backward pass keeps the maps and the parameters alone. It begins when the gradients of all
    results are there: what depends on the maps is then computed once for all of them.

    Args:
        maps: [B, C, H / repeats, W / repeats], whose channels follow each other in the kernels.
        repeats: how often the pixels of each map stand (1, 2, 4), in ascending order.
        kernels: all with as many weights.
    """
    groups = [(one.scale, one.bias, *one.weights) for one in kernels]
    flat = [tensor for group in groups for tensor in group]
    results = _Convolve.apply(repeats, len(groups[0]), *maps, *flat)  # type: ignore[no-untyped-call]
    each = len(kernels[0].weights)
    return [results[start : start + each] for start in range(0, len(results), each)]


@dataclass(frozen=True)
class TransformedKernels:
    """Of each part the kernels, [products, O, C]; the bias, [O]; how many they were before."""

    parts: list[Tensor]
    bias: Tensor
    count: int

    @classmethod
    def of(
        cls, kernels: Kernels, channels: Sequence[int], repeats: Sequence[int]
    ) -> TransformedKernels:
        """For parts of so many channels, whose pixels stand so often."""
        weight, bias = kernels.folded()
        split = zip(weight.split(list(channels), 1), repeats, strict=True)
        parts = [winograd.transform_kernel(part, often) for part, often in split]
        return cls(parts, bias, len(kernels.weights))

    def convolve(self, parts: Sequence[Tensor], grid: Grid) -> tuple[Tensor, ...]:
        """Of transformed maps the result of each of the kernels, [B, O, H, W]."""
        result = winograd.convolve(parts, self.parts, self.bias, grid, self.count)
        return tuple(one.movedim(-1, 1) for one in result)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, repeats: tuple[int, ...], each: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.repeats, ctx.each = repeats, each
        maps, groups = _grouped(tensors, len(repeats), each)
        grids, parts = zip(*map(_transformed, maps, repeats), strict=True)
        channels = [part.shape[2] for part in parts]
        results: list[Tensor] = []
        for kernels in groups:
            results += TransformedKernels.of(kernels, channels, repeats).convolve(parts, grids[0])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        maps, groups = _grouped(ctx.saved_tensors, len(ctx.repeats), ctx.each)
        of_maps, rest = ctx.needs_input_grad[2:][: len(maps)], ctx.needs_input_grad[2:][len(maps) :]
        needed = [any(rest[start : start + ctx.each]) for start in range(0, len(rest), ctx.each)]
        weights = [
            torch.zeros_like(torch.cat(kernels.weights)) if any_needed else None
            for kernels, any_needed in zip(groups, needed, strict=True)
        ]
        count, start = len(groups[0].weights), 0
        by_group = [grads[first : first + count] for first in range(0, len(grads), count)]
        images = []
        for x, repeats, of_map in zip(maps, ctx.repeats, of_maps, strict=True):
            some = slice(start, start + x.shape[1])
            parts = [None if one is None else one[:, some] for one in weights]
            images.append(_gradients(x, repeats, some, groups, by_group, parts, of_map))
            start = some.stop
        others: list[Tensor | None] = []
        for kernels, own, gradient in zip(groups, by_group, weights, strict=True):
            if gradient is None:
                others += [None] * ctx.each
            else:
                others.append((gradient * torch.cat(kernels.weights)).sum((1, 2, 3)))
                others.append(torch.cat([one.sum((0, 2, 3)) for one in own]))
                scales = kernels.scale[:, None, None, None].chunk(count)
                # Each in memory of its own: parameters keep their gradient as it is given.
                others += [g * s for g, s in zip(gradient.chunk(count), scales, strict=True)]
        return (None, None, *images, *others)


def _gradients(
    x: Tensor,
    repeats: int,
    channels: slice,
    groups: Sequence[Kernels],
    grads: Sequence[Sequence[Tensor]],
    of_weights: Sequence[Tensor | None],
    of_map: bool,
) -> Tensor | None:
    """Of one map, if that is needed; what the folded weights get from it is added to theirs.

    Args:
        channels: of the kernels which are this map's.
        grads: of the results of each group.
        of_weights: of each group [O, C, 3, 3], or None.
    """
    batch, _, height, width = x.shape
    results = []
    # Images after images, so that what is transformed stays small.
    for some in Grid(batch, height * repeats, width * repeats).images_together():
        grid, part = _transformed(x[some], repeats)
        total: Tensor | None = None
        for kernels, group, weight in zip(groups, grads, of_weights, strict=True):
            own = torch.cat([grad[some] for grad in group], 1).movedim(1, -1)
            sums = winograd.results_transposed(own, grid, len(part))
            del own
            if weight is not None:
                products = torch.bmm(sums.mT, part)
                weight += winograd.transform_kernel_transposed(products)
                del products  # before there is as large a kernel
            if of_map:
                kernel = winograd.transform_kernel(kernels.folded()[0][:, channels], repeats)
                if total is None:
                    total = torch.bmm(sums, kernel)
                else:
                    torch.baddbmm(total, sums, kernel, out=total)
                del kernel
            del sums
        del part
        if total is not None:
            results.append(winograd.transform_transposed(total, grid, repeats).movedim(-1, 1))
    return torch.cat(results) if results else None


def _grouped(
    tensors: Sequence[Tensor], maps: int, each: int
) -> tuple[Sequence[Tensor], list[Kernels]]:
    """The maps, and the kernels whose scale, bias and weights follow them."""
    groups = [tensors[start : start + each] for start in range(maps, len(tensors), each)]
    return tensors[:maps], [Kernels(tuple(g[2:]), g[0], g[1]) for g in groups]


def _transformed(x: Tensor, repeats: int) -> tuple[Grid, Tensor]:
    batch, _, height, width = x.shape
    grid = Grid(batch, height * repeats, width * repeats)
    return grid, winograd.transform(x.movedim(1, -1), repeats)
