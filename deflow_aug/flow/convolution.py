"""3x3 convolutions in tiles as functions with gradients, which stay in the tiles as well.

A map is transformed once (:class:`Transform`), whatever number of kernels it meets; the gradient
of what was transformed is a matrix product again, and is transformed back once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deflow_aug.flow import winograd
from deflow_aug.flow.winograd import Grid


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
    batch, _, height, width = x.shape
    grid = Grid(batch, height * repeats, width * repeats)
    kernels = Kernels((weight,), torch.ones_like(bias), bias)
    (result,) = convolve_tiles([transform(x, repeats)], (repeats,), kernels, grid)
    return result


def transform(x: Tensor, repeats: int = 1) -> Tensor:
    """:func:`winograd.transform` of a map [B, C, H, W], with gradients."""
    result: Tensor = _Transform.apply(x, repeats)  # type: ignore[no-untyped-call]
    return result


def convolve_tiles(
    parts: Sequence[Tensor], repeats: tuple[int, ...], kernels: Kernels, grid: Grid
) -> tuple[Tensor, ...]:
    """The result of each of the kernels, [B, O, H, W], with gradients.

    Args:
        parts: transformed maps, whose channels follow each other in the kernels.
        repeats: how often the pixels of each part stand, in ascending order.
    """
    result: tuple[Tensor, ...] = _Convolve.apply(  # type: ignore[no-untyped-call]
        grid, repeats, kernels.scale, kernels.bias, len(kernels.weights), *kernels.weights, *parts
    )
    return result


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
        """:func:`convolve_tiles`, without gradients."""
        result = winograd.convolve(parts, self.parts, self.bias, grid, self.count)
        return tuple(one.movedim(-1, 1) for one in result)


class _Transform(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, repeats: int) -> Tensor:
        batch, _, height, width = x.shape
        ctx.grid, ctx.repeats = Grid(batch, height * repeats, width * repeats), repeats
        return winograd.transform(x.movedim(1, -1), repeats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return winograd.transform_transposed(grad, ctx.grid, ctx.repeats).movedim(-1, 1), None


class _Convolve(torch.autograd.Function):
    """Keeps for the backward pass what was transformed and the parameters, nothing of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        grid: Grid,
        repeats: tuple[int, ...],
        scale: Tensor,
        bias: Tensor,
        count: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        kernels, parts = Kernels(tensors[:count], scale, bias), tensors[count:]
        ctx.save_for_backward(scale, bias, *tensors)
        ctx.grid, ctx.repeats, ctx.count = grid, repeats, count
        return _transformed(kernels, parts, repeats).convolve(parts, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale, bias, *tensors = ctx.saved_tensors
        kernels, parts = Kernels(tuple(tensors[: ctx.count]), scale, bias), tensors[ctx.count :]
        transformed = _transformed(kernels, parts, ctx.repeats)
        grad = torch.cat(grads, 1).movedim(1, -1)
        sums = winograd.results_transposed(grad, ctx.grid, len(parts[0]))
        of_parts: list[Tensor | None] = [None] * len(parts)
        of_weights: list[Tensor | None] = [None] * ctx.count
        of_scale, first_weight = None, 5
        for number, (part, kernel) in enumerate(zip(parts, transformed.parts, strict=True)):
            if ctx.needs_input_grad[first_weight + ctx.count + number]:
                of_parts[number] = torch.bmm(sums[: len(part)], kernel)
        if any(ctx.needs_input_grad[2 : first_weight + ctx.count]):
            products = [torch.bmm(sums[: len(part)].mT, part) for part in parts]
            whole = torch.cat([winograd.transform_kernel_transposed(p) for p in products], 1)
            of_scale = (whole * torch.cat(kernels.weights)).sum((1, 2, 3))
            of_weights = list((whole * scale[:, None, None, None]).chunk(ctx.count))
        return (None, None, of_scale, grad.sum((0, 1, 2)), None, *of_weights, *of_parts)


def _transformed(
    kernels: Kernels, parts: Sequence[Tensor], repeats: Sequence[int]
) -> TransformedKernels:
    return TransformedKernels.of(kernels, [part.shape[2] for part in parts], repeats)
