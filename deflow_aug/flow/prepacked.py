"""Kernels that convolve many maps, in the order of memory that oneDNN wants.

By oneDNN PyTorch convolves on CPUs. It brings kernels into an order of its own first, whenever it
convolves; of small maps that takes as long as half of the convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


class Prepacked:
    """A kernel in that order.

    Args:
        weight: [O, C / groups, k, k], k odd, float32 on a CPU.
        shape: of about what maps, [B, C, H, W]. Of others oneDNN may want another order, and then
            brings it into that whenever it convolves: no slower than if nothing was prepacked.
    """

    def __init__(self, weight: Tensor, shape: Sequence[int], groups: int = 1) -> None:
        self.groups = groups
        self._padding, self._one = [weight.shape[2] // 2] * 2, [1, 1]
        # The operations that PyTorch's own compiler makes convolutions into.
        self._weight = torch.ops.mkldnn._reorder_convolution_weight(
            weight, self._padding, self._one, self._one, groups, list(shape)
        )

    def convolve(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The padded convolution of [B, C, H, W], channels last, without gradients."""
        last = x.contiguous(memory_format=torch.channels_last)
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(
            last,
            self._weight,
            bias,
            self._padding,
            self._one,
            self._one,
            self.groups,
            "none",
            [],
            "",
        )
        return result


def by_onednn(x: Tensor) -> bool:
    """Whether oneDNN is there, not switched off, and computes in this precision."""
    there = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return there and x.dtype == torch.float32 and x.is_cpu


def can_prepack(weight: Tensor) -> bool:
    """Whether this PyTorch does it: the operations are none of its public interface."""
    return by_onednn(weight) and _works_as_expected()


@cache
def _works_as_expected() -> bool:
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            return _convolves(3, (1, 6, 5, 5)) and _convolves(1, (1, 6, 1, 9))
        except Exception:  # whatever another release makes of these arguments, or returns
            return False


def _convolves(size: int, shape: tuple[int, ...]) -> bool:
    """A kernel of this size, in two groups, as PyTorch's own convolution does."""
    # Whole numbers: no sum is rounded.
    weight = _numbers(4, 3, size, size)
    x, bias = _numbers(*shape).contiguous(memory_format=torch.channels_last), _numbers(4)
    found = Prepacked(weight, shape, groups=2).convolve(x, bias)
    last = found.is_contiguous(memory_format=torch.channels_last)
    return last and torch.equal(found, F.conv2d(x, weight, bias, padding=size // 2, groups=2))


def _numbers(*shape: int) -> Tensor:
    # Whatever device is the default one.
    return torch.arange(math.prod(shape), dtype=torch.float32, device="cpu").view(shape)
