"""Residual-in-residual dense blocks in tiles (:mod:`deflow_aug.dense`), with gradients.

Going back it is as going forward with the transformed gradients of the results, the last
convolution's first: the gradient of a map is a product of all that came after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deflow_aug.dense import (
    CONVOLUTIONS,
    NEGATIVE_SLOPE,
    RESIDUAL_SCALE,
    DenseKernels,
    DenseMaps,
)
from deflow_aug.devices import full_precision
from deflow_aug.flow import transposed, winograd
from deflow_aug.flow.grid import Grid
from deflow_aug.flow.products import bias_of, by_convolution, multiply


class Workspace:
    """Memory that the RRDBs of a trunk share: its pages would else come anew for each of them."""

    def __init__(self) -> None:
        self.ahead: tuple[DenseMaps, _Joined] | None = None
        self.back: _Backward | None = None


def rrdb_with_gradients(
    x: Tensor, parameters: Sequence[Tensor], workspace: Workspace, keep: bool = False
) -> Tensor:
    """x + 0.2 * (the dense blocks, one after the other), of [B, C, H, W].

    The backward pass keeps the input alone and computes what is inside again, unless it is asked
    to keep that as well: the inputs of the other blocks, and four maps of each.

    Args:
        parameters: weights and biases of one block after the other.
        workspace: of this and the other RRDBs that an image passes.
    """
    result: Tensor = _RRDB.apply(workspace, keep, x, *parameters)  # type: ignore[no-untyped-call]
    return result


class _RRDB(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, workspace: Workspace, keep: bool, x: Tensor, *parameters: Tensor
    ) -> Tensor:
        before, growth = x.movedim(1, -1), len(parameters[0])
        if workspace.ahead is None:
            workspace.ahead = DenseMaps(before, growth), _Joined(before.shape[3], growth, x)
        maps, joined = workspace.ahead
        maps.pixels.copy_(before)
        kept = [before]
        for number, block in enumerate(_by_block(parameters)):
            if keep and number:
                kept.append(maps.pixels.clone())
            maps.dense(joined.transformed(block))
            if keep:
                kept += [maps.inner(inside).clone() for inside in range(1, CONVOLUTIONS)]
        ctx.save_for_backward(*parameters, *kept)
        ctx.count, ctx.workspace = len(parameters), workspace
        return torch.add(before, maps.pixels, alpha=RESIDUAL_SCALE).movedim(-1, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        parameters, kept = saved[: ctx.count], saved[ctx.count :]
        workspace: Workspace = ctx.workspace
        if workspace.back is None:
            workspace.back = _Backward(grad.movedim(1, -1), _by_block(parameters))
        with full_precision(grad):
            of_input, gradients = workspace.back(grad.movedim(1, -1), _by_block(parameters), kept)
        return (None, None, of_input.movedim(-1, 1), *gradients)


class _Joined:
    """The kernels of a dense block, transformed in the same memory for one block after the other.

    Args:
        back: those that gradients go through as well.
    """

    def __init__(self, channels: int, growth: int, like: Tensor, back: bool = False) -> None:
        self.channels = channels + growth * (CONVOLUTIONS - 1)
        starts = [channels + growth * (CONVOLUTIONS - 2 - i) for i in range(CONVOLUTIONS - 1)]
        ends = [start + growth for start in starts]
        self.rows = [*map(slice, starts, ends), slice(0, channels)]
        """Of each convolution its results, of all of them side by side, the last one's first."""
        self.inputs = [channels + growth * i for i in range(CONVOLUTIONS)]
        # Nothing where a result does not see an input.
        taps = like.new_zeros(9, self.channels, self.channels)
        self._taps = taps.mT if by_convolution(like) else taps
        """[9, inputs, results], in the order of memory of the kernels."""
        sees = [*zip(self.rows, self.inputs, strict=True)]
        # Of each map the results that see it, and its channels.
        seen = [*zip(self.rows, [channels] + [growth] * (CONVOLUTIONS - 1), strict=True)]
        self._whole: Tensor | None = None
        self.back: list[Tensor]
        """Of each map the kernels of the results that see it, [36, its channels, results]."""
        if by_convolution(like):
            # Which wants each kernel in memory of its own.
            self._ahead = [like.new_empty(36, r.stop - r.start, inputs) for r, inputs in sees]
            self.back = [like.new_empty(36, width, rows.stop) for rows, width in seen if back]
        else:
            self._whole = whole = like.new_empty(36, self.channels, self.channels)
            # Inputs before results: MKL takes longer by transposed kernels of few results.
            self._ahead = [whole[:, :inputs, rows].mT for rows, inputs in sees]
            self.back = [
                whole[:, end - width : end, : rows.stop]
                for (rows, width), end in zip(seen, self.inputs, strict=True)
            ]

    def transformed(self, parameters: Sequence[Tensor]) -> DenseKernels:
        """The kernels of these weights and biases, until others are transformed."""
        weights, biases = parameters[:CONVOLUTIONS], parameters[CONVOLUTIONS:]
        for weight, rows, inputs in zip(weights, self.rows, self.inputs, strict=True):
            self._taps.unflatten(0, (3, 3))[:, :, :inputs, rows] = weight.permute(2, 3, 1, 0)
        if self._whole is not None:
            winograd.transform_taps(self._taps, out=self._whole)
        else:
            for own, rows in zip(self._ahead, self.rows, strict=True):
                winograd.transform_taps(self._taps[:, : own.shape[2], rows].mT, out=own)
            for own, end in zip(self.back, self.inputs, strict=False):
                of_map = self._taps[:, end - own.shape[1] : end, : own.shape[2]]
                winograd.transform_taps(of_map, out=own)
        return DenseKernels(self._ahead, [*map(bias_of, self._ahead, biases)])


class _Backward:
    """Gradients of RRDBs of one size, one after the other.

    Args:
        pixels: [B, H, W, C], of that size.
        blocks: weights and biases of the dense blocks of one of them.
    """

    def __init__(self, pixels: Tensor, blocks: Sequence[Sequence[Tensor]]) -> None:
        growth = len(blocks[0][0])
        self._joined = [_Joined(pixels.shape[3], growth, pixels, back=True) for _ in blocks]
        # Images after images, so that what is transformed stays small.
        self._images = Grid(*pixels.shape[:3]).images_together()
        # Of every block; only the last images may be fewer.
        sizes = [pixels[some] for some in self._images[-2:]]
        self._maps = [[DenseMaps(one, growth, whole=True) for _ in blocks] for one in sizes]
        memory = _Memory(self._maps[0][0])
        self._blocks = [
            [_DenseBackward(*pair, memory) for pair in zip(maps, self._joined, strict=True)]
            for maps in self._maps
        ]

    def __call__(
        self, grad: Tensor, blocks: Sequence[Sequence[Tensor]], kept: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradients of the input, and of weights and biases of one block after the other.

        Args:
            grad: of the result, [B, H, W, C].
            blocks: weights and biases of each.
            kept: the input, or of all blocks the input and the four maps.
        """
        kernels = [
            joined.transformed(block) for joined, block in zip(self._joined, blocks, strict=True)
        ]
        inputs: list[Tensor] = []
        gradients: list[Tensor] = []
        for some in self._images:
            which = 0 if some != self._images[-1] else -1
            _again(self._maps[which], kernels, [values[some] for values in kept])
            inner, own = grad[some] * RESIDUAL_SCALE, []
            for block in reversed(self._blocks[which]):
                inner, biases = block(inner)
                own.append([*block.of_weights(), *biases])
            inputs.append(grad[some] + inner)
            flat = [gradient for block in reversed(own) for gradient in block]
            if not gradients:
                # In the order of memory that parameters keep their gradients in.
                gradients = [torch.empty_like(parameter) for block in blocks for parameter in block]
                for gradient, value in zip(gradients, flat, strict=True):
                    gradient.copy_(value)
            else:
                for gradient, value in zip(gradients, flat, strict=True):
                    gradient += value
        return torch.cat(inputs) if len(inputs) > 1 else inputs[0], gradients


class _Memory:
    """What all dense blocks use one after the other.

    Args:
        maps: those of the most images.
    """

    def __init__(self, maps: DenseMaps) -> None:
        grid, tiles = maps.grid, maps.tiles()
        self.sums = torch.empty_like(tiles)
        """For the gradients of all results, transformed."""
        rows, columns = 4 * grid.rows, 4 * grid.columns
        self.window = tiles.new_empty(grid.batch * (rows + 4) * (columns + 4) * maps.channels)
        """For the gradient of a map."""
        widths = [maps.growth] * (CONVOLUTIONS - 1) + [maps.channels]
        padded = {width: tiles.new_zeros(grid.batch, rows, columns, width) for width in set(widths)}
        self.results = [padded[width] for width in widths]
        """For gradients of the results, with room for whole tiles."""


class _DenseBackward:
    """Gradients of a dense block whose maps, transformed, are there."""

    def __init__(self, maps: DenseMaps, joined: _Joined, memory: _Memory) -> None:
        self._maps, self._joined, self._tiles = maps, joined, maps.tiles()
        self._sums = memory.sums[: len(self._tiles)]
        self._steps = [
            _StepBackward(
                maps, joined, self._sums, number, padded[: maps.grid.batch], memory.window
            )
            for number, padded in enumerate(memory.results)
        ]

    def __call__(self, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Of the input, and of the biases."""
        torch.mul(grad, RESIDUAL_SCALE, out=self._steps[-1].own)
        for number in reversed(range(1, CONVOLUTIONS)):
            # Of the map that this convolution was the first to see, before its leaky ReLU.
            step, before = self._steps[number], self._steps[number - 1]
            _leaky_relu_backward(step(), self._maps.inner(number), before.own)
        of_input = grad + self._steps[0]()
        biases = transposed.of_bias(self._sums)
        return of_input, [biases[rows] for rows in self._joined.rows]

    def of_weights(self) -> list[Tensor]:
        """Of convolutions, two at once where the inputs of one are nearly those of the other."""
        joined, gradients = self._joined, {}
        for together in ((4,), (3, 2), (1, 0)):
            start, stop = joined.rows[together[0]].start, joined.rows[together[-1]].stop
            inputs = self._tiles[:, :, : joined.inputs[together[0]]]
            products = transposed.multiply_kernel(self._sums[:, :, start:stop], inputs)
            whole = transposed.transform_kernel(products)
            for number in together:
                rows = joined.rows[number]
                own = whole[rows.start - start : rows.stop - start]
                gradients[number] = own[:, : joined.inputs[number]]
        return [gradients[number] for number in range(CONVOLUTIONS)]


class _StepBackward:
    """The gradient of a convolution's result, transformed, and that of the map it saw first.

    As in :class:`deflow_aug.dense.DenseMaps` it is said once which part of which memory all is.
    """

    def __init__(
        self,
        maps: DenseMaps,
        joined: _Joined,
        sums: Tensor,
        number: int,
        padded: Tensor,
        window: Tensor,
    ) -> None:
        grid, rows = maps.grid, joined.rows[number]
        self.own = padded[:, : grid.height, : grid.width]
        """The gradient of the result, [B, H, W, O], to be written there before."""
        self._results = transposed.Results(padded, maps.scratch)
        self._sums, self._kernel = sums[:, :, : rows.stop], joined.back[number]
        self._place = self._sums[:, :, rows]
        self._transform = transposed.Transform(
            grid, maps.inner(number), scratch=maps.scratch, window=window
        )
        self._window = self._transform.window[:, 1 : 1 + grid.height, 1 : 1 + grid.width]

    def __call__(self) -> Tensor:
        """The gradient of the map, [B, H, W, inputs]."""
        alone = self._results()
        self._place.copy_(alone)
        seen = self._sums if self._place.shape != self._sums.shape else alone
        self._transform(multiply(seen, self._kernel))
        return self._window


def _leaky_relu_backward(grad: Tensor, result: Tensor, out: Tensor) -> None:
    """The gradient before a leaky ReLU, by the sign of its result."""
    torch.ops.aten.leaky_relu_backward.grad_input(
        grad, result, NEGATIVE_SLOPE, True, grad_input=out
    )


def _again(
    maps: Sequence[DenseMaps], kernels: Sequence[DenseKernels], kept: Sequence[Tensor]
) -> None:
    """Fills the maps of all blocks of an RRDB, and transforms them, from what was kept of it."""
    known = len(kept) // len(maps) if len(kept) > 1 else 1
    for number, (own, block) in enumerate(zip(maps, kernels, strict=True)):
        if number * known < len(kept):
            for inside, values in enumerate(kept[number * known : (number + 1) * known]):
                own.inner(inside).copy_(values)
        else:
            own.pixels.copy_(maps[number - 1].pixels)
        goes_on = (number + 1) * known >= len(kept) and number + 1 < len(maps)
        own.dense(block, known, result=goes_on)


def _by_block(parameters: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    count = 2 * CONVOLUTIONS
    return [parameters[start : start + count] for start in range(0, len(parameters), count)]
