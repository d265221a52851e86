"""3x3 convolutions of maps of which a part is only repeated pixels, by PyTorch's convolutions.

Where they are not computed in tiles (:mod:`deflow_aug.flow.winograd`): on GPUs, in low precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deflow_aug.devices import full_precision
from deflow_aug.flow.convolution import Kernels


@dataclass(frozen=True)
class DirectKernel:
    """A 3x3 convolution of a fine map and a coarse one, as two convolutions without upsampling.

    Args:
        fine: weight of the fine channels, [O, C, 3, 3].
        coarse: of the coarse ones, see :func:`phase_kernels`; None if there are none.
        bias: [O].
        repeats: how often the coarse pixels stand in both directions.
        dtype: of the results.
        count: of the kernels that it was before.
    """

    fine: Tensor
    coarse: Tensor | None
    bias: Tensor
    repeats: int
    dtype: torch.dtype
    count: int

    @classmethod
    def of(cls, kernels: Kernels, like: Tensor, repeats: int) -> DirectKernel:
        """All kernels as one, for fine maps like this one, in its precision.

        The results are in the precision of the weights.
        """
        channels, (weight, bias) = like.shape[1], kernels.folded()
        own, coarse = weight.to(like.dtype), None
        if repeats > 1:
            own, rest = own[:, :channels], own[:, channels:]
            # Kept without the rest, and such that no convolution has to copy it.
            own = own.contiguous(memory_format=torch.channels_last)
            coarse = phase_kernels(rest, repeats)
        count = len(kernels.weights)
        return cls(own, coarse, bias.to(like.dtype), repeats, weight.dtype, count)

    def convolve(self, fine: Tensor, coarse: Tensor | None) -> Tensor:
        """The padded convolution, [B, O, H, W], without gradients.

        Args:
            fine: [B, C, H, W].
            coarse: [B, D, H / repeats, W / repeats]; None if there is none.
        """
        result = F.conv2d(fine, self.fine, self.bias, padding=1).to(self.dtype)
        if self.coarse is not None:
            assert coarse is not None
            add_phases(result, coarse, self.coarse, self.repeats)
        return result


def convolve_directly(
    fine: Tensor, coarse: Tensor | None, repeats: int, kernels: Kernels
) -> tuple[Tensor, ...]:
    """The results of all kernels, with gradients.

    The backward pass keeps the maps and the parameters alone, not what these are folded to.
    Gradients of the gradients are refused.
    """
    tensors = fine, coarse, kernels.scale, kernels.bias, *kernels.weights
    result: Tensor = _Directly.apply(repeats, *tensors)  # type: ignore[no-untyped-call]
    return result.chunk(len(kernels.weights), 1)


class _Directly(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        repeats: int,
        fine: Tensor,
        coarse: Tensor | None,
        scale: Tensor,
        bias: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(fine, coarse, scale, bias, *weights)
        ctx.repeats = repeats
        return DirectKernel.of(Kernels(weights, scale, bias), fine, repeats).convolve(fine, coarse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        fine, coarse, *parameters = ctx.saved_tensors
        of_fine, of_coarse, *needed = ctx.needs_input_grad[1:]
        leaves = [
            one.detach().requires_grad_(need) for one, need in zip(parameters, needed, strict=True)
        ]
        with full_precision(grad):
            with torch.enable_grad():
                scale, bias, *weights = leaves
                kernel = DirectKernel.of(Kernels(tuple(weights), scale, bias), fine, ctx.repeats)
            grad = grad.to(fine.dtype)
            masks = of_fine, kernel.fine.requires_grad, kernel.bias.requires_grad
            fine_grad, *found = _conv_backward(grad, fine, kernel.fine, masks)
            folded: list[Tensor] = [kernel.fine, kernel.bias]
            coarse_grad = None
            if coarse is not None and kernel.coarse is not None:
                masks = of_coarse, kernel.coarse.requires_grad, False
                grad = _phases_backward(grad, ctx.repeats)
                coarse_grad, own, _ = _conv_backward(grad, coarse, kernel.coarse, masks)
                folded, found = [*folded, kernel.coarse], [*found, own]
            through = [(f, g) for f, g in zip(folded, found, strict=True) if f.requires_grad]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            outputs, gradients = zip(*through, strict=True) if wanted else ((), ())
            of_leaves = iter(torch.autograd.grad(outputs, wanted, gradients) if wanted else ())
        return (None, fine_grad, coarse_grad, *(next(of_leaves) if n else None for n in needed))


def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, masks: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias of a convolution with a padding of one pixel."""
    result: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        grad, x, weight, [len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, list(masks)
    )
    return result


def phase_kernels(weight: Tensor, repeats: int) -> Tensor:
    """A 3x3 kernel as the 2x2 kernels that repeated pixels see, for :func:`add_phases`.

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


def add_phases(result: Tensor, x: Tensor, kernels: Tensor, repeats: int) -> None:
    """Adds a padded 3x3 convolution of ``x`` repeated ``repeats`` times in height and width.

    Args:
        result: [B, O, h * repeats, w * repeats].
        x: [B, D, h, w].
        kernels: the convolution's :func:`phase_kernels`.
    """
    kinds = _kinds(repeats)
    # With one row and column of padding, result i of a kernel starts at source pixel i - 1.
    y = F.conv2d(x, kernels, padding=1).movedim(1, -1).unflatten(-1, (kinds, kinds, -1))
    for place, window in zip(_phases(result, repeats), _windows(y, repeats), strict=True):
        place += window


def _phases_backward(grad: Tensor, repeats: int) -> Tensor:
    """The gradient of what :func:`add_phases` convolves to, from that of its result."""
    (batch, outputs, height, width), kinds = grad.shape, _kinds(repeats)
    y = grad.new_zeros(batch, height // repeats + 1, width // repeats + 1, kinds, kinds, outputs)
    for window, part in zip(_windows(y, repeats), _phases(grad, repeats), strict=True):
        window += part
    return y.flatten(3).movedim(-1, 1)


def _phases(result: Tensor, repeats: int) -> list[Tensor]:
    """The pixels of each phase, row by row, [B, h, w, O]."""
    pixels, starts = result.movedim(1, -1), range(repeats)
    return [pixels[:, row::repeats, column::repeats] for row in starts for column in starts]


def _windows(y: Tensor, repeats: int) -> list[Tensor]:
    """Of each phase, row by row, the results that are its pixels, [B, h, w, O].

    Args:
        y: [B, h + 1, w + 1, kinds, kinds, O].
    """
    height, width, kinds = y.shape[1] - 1, y.shape[2] - 1, y.shape[3]
    phases = [0] + [1] * (repeats - 2) + [kinds - 1]
    # The last phase looks at pixels i and i + 1, all others at i - 1 and i.
    starts = [0] * (repeats - 1) + [1]
    return [
        y[:, top : top + height, left : left + width, p, q]
        for p, top in zip(phases, starts, strict=True)
        for q, left in zip(phases, starts, strict=True)
    ]


def _kinds(repeats: int) -> int:
    """Of phases: the first, the last, and if there are any those between."""
    return min(repeats, 3)


def _taps_of_phases(repeats: int, like: Tensor) -> Tensor:
    """How the three taps of a kernel fall on two neighbouring pixels, for each kind of phase."""
    first = [[1, 0], [0, 1], [0, 1]]  # taps -1 | 0, 1
    middle = [[0, 1], [0, 1], [0, 1]]  # all on the second pixel
    last = [[1, 0], [1, 0], [0, 1]]  # taps -1, 0 | 1
    kinds = [first, last] if repeats == 2 else [first, middle, last]
    return torch.tensor(kinds, dtype=like.dtype, device=like.device)
