"""3x3 convolutions in tiles with gradients, which are computed in tiles as well.

A map is transformed once, whatever number of kernels it meets; the gradient of what was
transformed is a sum of matrix products again, and is transformed back once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deflow_aug.devices import full_precision
from deflow_aug.flow import transposed, winograd
from deflow_aug.flow.grid import Grid
from deflow_aug.flow.prepacked import Prepacked
from deflow_aug.flow.products import add_multiplied, multiply, prepacked

TOGETHER = 512
"""Tiles of which maps and gradients are transformed at the same time; the more, the more memory,
the fewer, the more often kernels are transformed."""


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

    @classmethod
    def together(cls, several: Sequence[Kernels]) -> Kernels:
        """Those of several, one after the other."""
        weights = tuple(weight for one in several for weight in one.weights)
        scale, bias = (torch.cat([getattr(o, name) for o in several]) for name in ("scale", "bias"))
        return cls(weights, scale, bias)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution that they are."""
        return torch.cat(self.weights) * self.scale[:, None, None, None], self.bias

    def taps(self) -> Tensor:
        """The nine taps of that weight, [9, O, C], without gradients."""
        outputs, inputs = self.weights[0].shape[:2]
        count = len(self.weights)
        taps = self.scale.new_empty(3, 3, count * outputs, inputs)
        of_each = zip(self.weights, self.scale.chunk(count), taps.chunk(count, 2), strict=True)
        for weight, scale, place in of_each:
            torch.mul(weight.permute(2, 3, 0, 1), scale[:, None], out=place)
        return taps.flatten(0, 1)


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
    """Of each part (:func:`winograd.transform_together`) the kernels, [some products, O, C],
    or these prepacked; the bias, [O]; how many they were before."""

    parts: Sequence[Tensor | Prepacked]
    bias: Tensor
    count: int

    @classmethod
    def of(
        cls,
        kernels: Kernels,
        channels: Sequence[int],
        repeats: Sequence[int],
        memory: list[Tensor] | None = None,
    ) -> TransformedKernels:
        """For maps of so many channels, whose pixels stand so often.

        Args:
            memory: see :func:`_transformed`.
        """
        parts = _transformed(kernels.taps(), channels, repeats, memory=memory)
        return cls(parts, kernels.bias, len(kernels.weights))

    def prepacked(self, tiles: int) -> TransformedKernels:
        """The same for many maps, about so many of whose tiles are multiplied at once."""
        return replace(self, parts=[prepacked(part, tiles) for part in self.parts])

    def convolve(self, parts: Sequence[Tensor], grid: Grid) -> tuple[Tensor, ...]:
        """Of transformed maps the result of each of the kernels, [B, O, H, W]."""
        result = winograd.convolve(parts, self.parts, self.bias, grid, self.count)
        return tuple(one.movedim(-1, 1) for one in result)


def _transformed(
    taps: Tensor,
    channels: Sequence[int],
    repeats: Sequence[int],
    back: bool = False,
    memory: list[Tensor] | None = None,
) -> list[Tensor]:
    """Of each part the kernels, [some products, O, C].

    Args:
        taps: [9, O, C].
        back: those that gradients go through instead, [some products, C, O].
        memory: what several kernels, one after the other, lie in; empty at first.
    """
    parts = []
    for number, (some, count) in enumerate(winograd.parts_of(repeats)):
        own = taps[:, :, : sum(channels[:count])]
        out = memory[number] if memory and number < len(memory) else None
        transform = winograd.transform_taps_back if back else winograd.transform_taps
        products = transform(own, repeats[count - 1], out)
        if memory is None and some.start:
            # A part should not keep all of them.
            parts.append(products[some].clone())
        else:
            parts.append(products[some])
        if memory is not None and out is None:
            memory.append(products)
    return parts


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, repeats: tuple[int, ...], each: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.repeats, ctx.each = repeats, each
        maps, groups = _grouped(tensors, len(repeats), each)
        pixels = [x.movedim(1, -1) for x in maps]
        grid, parts = Grid.over(pixels[0], repeats[0]), winograd.transform_together(pixels, repeats)
        results: list[Tensor] = []
        memory: list[Tensor] = []
        for kernels in groups:
            transformed = TransformedKernels.of(kernels, _channels(maps), repeats, memory)
            results += transformed.convolve(parts, grid)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        maps, groups = _grouped(ctx.saved_tensors, len(ctx.repeats), ctx.each)
        of_maps, rest = ctx.needs_input_grad[2:][: len(maps)], ctx.needs_input_grad[2:][len(maps) :]
        needed = [any(rest[start : start + ctx.each]) for start in range(0, len(rest), ctx.each)]
        folded = [
            _no_gradient(kernels) if any_needed else None
            for kernels, any_needed in zip(groups, needed, strict=True)
        ]
        count = len(groups[0].weights)
        by_group = [grads[first : first + count] for first in range(0, len(grads), count)]
        with full_precision(maps[0]):
            images = _gradients(maps, ctx.repeats, groups, by_group, folded, any(of_maps))
        others: list[Tensor | None] = []
        for kernels, gradients in zip(groups, folded, strict=True):
            if gradients is None:
                others += [None] * ctx.each
            else:
                each = gradients[0].chunk(count)
                scaled = [g * w for g, w in zip(each, kernels.weights, strict=True)]
                others.append(torch.cat([one.sum((1, 2, 3)) for one in scaled]))
                others.append(gradients[1])
                scales = kernels.scale[:, None, None, None].chunk(count)
                # Each in memory of its own: parameters keep their gradient as it is given.
                others += [
                    torch.mul(g, s, out=o) for g, s, o in zip(each, scales, scaled, strict=True)
                ]
        return (None, None, *images, *others)


def _gradients(
    maps: Sequence[Tensor],
    repeats: tuple[int, ...],
    groups: Sequence[Kernels],
    grads: Sequence[Sequence[Tensor]],
    of_folded: Sequence[tuple[Tensor, Tensor] | None],
    of_maps: bool,
) -> list[Tensor | None]:
    """Of the maps, if that is needed; what the folded weights and biases get is added to theirs.

    Args:
        grads: of the results of each group.
        of_folded: of each group [O, C, 3, 3] and [O], or None.
    """
    pixels = [x.movedim(1, -1) for x in maps]
    grid, channels = Grid.over(pixels[0], repeats[0]), _channels(maps)
    results = [torch.zeros_like(one) for one in pixels] if of_maps else []
    for region in grid.regions(TOGETHER):
        parts = winograd.transform_together(pixels, repeats, region)
        sizes = [part.shape[1] for part in parts]
        totals: list[Tensor] = []
        memory: list[Tensor] = []
        for kernels, group, folded in zip(groups, grads, of_folded, strict=True):
            own = [region.own(grad.movedim(1, -1)) for grad in group]
            sums = transposed.results(own, grid.of(region), sizes)
            if folded is not None:
                weight, bias = folded
                _add_products(weight, sums, parts, winograd.parts_of(repeats))
                bias += transposed.of_bias(sums[0])
            if of_maps:
                back = _transformed(kernels.taps(), channels, repeats, back=True, memory=memory)
                _add_through(totals, sums, back)
            del sums
        del parts, memory
        if of_maps:
            transposed.transform_together(totals, region, repeats, results)
    return [one.movedim(-1, 1) for one in results] or [None] * len(maps)


def _no_gradient(kernels: Kernels) -> tuple[Tensor, Tensor]:
    """Zeros like the folded weight and bias."""
    outputs, *others = kernels.weights[0].shape
    shape = len(kernels.weights) * outputs, *others
    weight = torch.empty(
        shape,
        dtype=kernels.scale.dtype,
        device=kernels.scale.device,
        memory_format=torch.channels_last,
    )
    return weight.zero_(), torch.zeros_like(kernels.bias)


def _add_products(
    weight: Tensor,
    sums: Sequence[Tensor],
    parts: Sequence[Tensor],
    which: Sequence[tuple[slice, int]],
) -> None:
    """Adds to the gradient of folded weights what they get of the parts of transformed maps."""
    for one, part, (products, _) in zip(sums, parts, which, strict=True):
        of_kernel = transposed.multiply_kernel(one, part)
        own = transposed.transform_kernel(of_kernel, products.start)
        weight[:, : part.shape[2]] += own


def _add_through(totals: list[Tensor], sums: Sequence[Tensor], kernels: Sequence[Tensor]) -> None:
    """Adds to the gradients of transformed maps' parts what they get through some kernels.

    Args:
        kernels: [some products, C, O] of each part.
    """
    for number, (one, kernel) in enumerate(zip(sums, kernels, strict=True)):
        if number < len(totals):
            add_multiplied(totals[number], one, kernel)
        else:
            totals.append(multiply(one, kernel))


def _grouped(
    tensors: Sequence[Tensor], maps: int, each: int
) -> tuple[Sequence[Tensor], list[Kernels]]:
    """The maps, and the kernels whose scale, bias and weights follow them."""
    groups = [tensors[start : start + each] for start in range(maps, len(tensors), each)]
    return tensors[:maps], [Kernels(tuple(g[2:]), g[0], g[1]) for g in groups]


def _channels(maps: Sequence[Tensor]) -> list[int]:
    return [x.shape[1] for x in maps]
