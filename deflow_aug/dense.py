"""Residual-in-residual dense blocks in tiles (:mod:`deflow_aug.flow.winograd`), with gradients.

The inputs of a dense block's five convolutions are the block's input and the maps before, one
after the other: each map is transformed once, into its place in one buffer, of which a convolution
takes the first channels. Going back it is the same with the transformed gradients of the results,
the last convolution's first: the gradient of a map is a product of all that came after it.

Maps are in the order [B, H, W, C] here. Weights come as those of the five convolutions, followed
by their biases, of one block after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deflow_aug.flow import winograd
from deflow_aug.flow.winograd import Grid

NEGATIVE_SLOPE = 0.2
RESIDUAL_SCALE = 0.2
CONVOLUTIONS = 5


@dataclass(frozen=True)
class BlockKernels:
    """What the five convolutions of a dense block are in tiles: [36, O, C] each, and biases."""

    kernels: Sequence[Tensor]
    biases: Sequence[Tensor]

    @classmethod
    def of(cls, parameters: Sequence[Tensor]) -> BlockKernels:
        """Of weights and biases; each kernel has memory of its own."""
        weights, biases = parameters[:CONVOLUTIONS], parameters[CONVOLUTIONS:]
        return cls([winograd.transform_kernel(weight) for weight in weights], biases)


class _Joined:
    """The five kernels in one matrix: its rows are all results, those of the last one first."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        weights, biases = parameters[:CONVOLUTIONS], parameters[CONVOLUTIONS:]
        channels, growth = len(weights[-1]), len(weights[0])
        self.channels = weights[-1].shape[1]
        starts = [channels + growth * (CONVOLUTIONS - 2 - i) for i in range(CONVOLUTIONS - 1)]
        ends = [start + growth for start in starts]
        self.rows = [*map(slice, starts, ends), slice(0, channels)]
        self.inputs = [weight.shape[1] for weight in weights]
        whole = weights[0].new_zeros(3, 3, self.channels, self.channels).permute(2, 3, 0, 1)
        for weight, place in zip(weights, self.places(whole), strict=True):
            place.copy_(weight)
        self.whole = winograd.transform_kernel(whole)
        self.block = BlockKernels(self.places(self.whole, 1), biases)

    def places(self, whole: Tensor, axis: int = 0) -> list[Tensor]:
        """Where the kernel of each convolution stands."""
        return [
            whole.narrow(axis, rows.start, rows.stop - rows.start).narrow(axis + 1, 0, inputs)
            for rows, inputs in zip(self.rows, self.inputs, strict=True)
        ]


def rrdb(pixels: Tensor, blocks: Sequence[BlockKernels]) -> Tensor:
    """x + 0.2 * (the dense blocks, one after the other)."""
    y, tiles = pixels, None
    for block in blocks:
        # The same memory again: that of large maps comes page by page, which takes time.
        y, trace = _dense(y, block, tiles)
        tiles = trace.tiles
    return torch.add(pixels, y, alpha=RESIDUAL_SCALE)


def rrdb_with_gradients(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """:func:`rrdb` of [B, C, H, W], of which the backward pass keeps the input alone."""
    result: Tensor = _RRDB.apply(x, *parameters)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class _Trace:
    """What a dense block leaves behind for its gradients.

    Args:
        tiles: the transformed input and maps, [36, tiles, C + 4 G].
        maps: the four maps after their leaky ReLU, [B, H, W, G].
    """

    tiles: Tensor
    maps: list[Tensor]


def _dense(
    pixels: Tensor, block: BlockKernels, tiles: Tensor | None = None
) -> tuple[Tensor, _Trace]:
    """One dense block: its result, and what it leaves behind, in tiles that are given or new."""
    grid, channels = Grid(*pixels.shape[:3]), pixels.shape[3]
    if tiles is None:
        tiles = pixels.new_empty(36, grid.tiles, block.kernels[-1].shape[2])
    tiles[:, :, :channels] = winograd.transform(pixels)
    maps: list[Tensor] = []
    for kernel, bias in zip(block.kernels, block.biases, strict=True):
        inputs = kernel.shape[2]
        (y,) = winograd.convolve([tiles[:, :, :inputs]], [kernel], bias, grid)
        if inputs < tiles.shape[2]:
            maps.append(F.leaky_relu_(y, NEGATIVE_SLOPE))
            tiles[:, :, inputs : inputs + len(bias)] = winograd.transform(y)
    return torch.add(pixels, y, alpha=RESIDUAL_SCALE), _Trace(tiles, maps)


def _dense_backward(grad: Tensor, joined: _Joined, trace: _Trace) -> tuple[Tensor, list[Tensor]]:
    """Gradients of a dense block's input, and of its weights and biases."""
    grid = Grid(*grad.shape[:3])
    sums = grad.new_empty(36, grid.tiles, joined.channels)
    biases, own = [], grad * RESIDUAL_SCALE
    end = joined.channels
    for number in reversed(range(CONVOLUTIONS)):
        rows = joined.rows[number]
        sums[:, :, rows] = winograd.results_transposed(own, grid)
        biases.append(own.sum((0, 1, 2)))
        # Of the map that this convolution was the first to see.
        start = joined.inputs[number - 1] if number else 0
        later = torch.bmm(sums[:, :, : rows.stop], joined.whole[:, : rows.stop, start:end])
        own = winograd.transform_transposed(later, grid)
        if number:
            own = _leaky_relu_backward(own, trace.maps[number - 1])
        end = start
    return grad + own, [*_weight_gradients(sums, joined, trace.tiles), *reversed(biases)]


def _weight_gradients(sums: Tensor, joined: _Joined, tiles: Tensor) -> list[Tensor]:
    """Of each convolution, two at once where the inputs of one are nearly those of the other."""
    gradients: dict[int, Tensor] = {}
    for together in ((4,), (3, 2), (1, 0)):
        start, stop = joined.rows[together[0]].start, joined.rows[together[-1]].stop
        inputs = tiles[:, :, : joined.inputs[together[0]]]
        products = torch.bmm(sums[:, :, start:stop].mT, inputs)
        whole = winograd.transform_kernel_transposed(products)
        for number in together:
            rows = joined.rows[number]
            own = whole[rows.start - start : rows.stop - start]
            gradients[number] = own[:, : joined.inputs[number]]
    return [gradients[number] for number in range(CONVOLUTIONS)]


def _leaky_relu_backward(grad: Tensor, result: Tensor) -> Tensor:
    """The gradient before a leaky ReLU, by the sign of its result."""
    gradient: Tensor = torch.ops.aten.leaky_relu_backward(grad, result, NEGATIVE_SLOPE, True)
    return gradient


class _RRDB(torch.autograd.Function):
    """Computed once more in the backward pass, where the blocks' traces are kept for one RRDB."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        blocks = [_Joined(own).block for own in _by_block(parameters)]
        return rrdb(x.movedim(1, -1), blocks).movedim(-1, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, *parameters = ctx.saved_tensors
        blocks = [_Joined(own) for own in _by_block(parameters)]
        traces, y = [], x.movedim(1, -1)
        for joined in blocks:
            y, trace = _dense(y, joined.block)
            traces.append(trace)
        outer = grad.movedim(1, -1)
        inner, gradients = outer * RESIDUAL_SCALE, []
        for joined in reversed(blocks):
            inner, own = _dense_backward(inner, joined, traces.pop())
            gradients.append(own)
        of_parameters = [gradient for own in reversed(gradients) for gradient in own]
        return ((outer + inner).movedim(-1, 1), *of_parameters)


def _by_block(parameters: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    count = 2 * CONVOLUTIONS
    return [parameters[start : start + count] for start in range(0, len(parameters), count)]
