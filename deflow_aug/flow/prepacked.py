"""Kernels that convolve many maps, in the order of memory that oneDNN wants.

By oneDNN PyTorch convolves on CPUs. It brings kernels into an order of its own first, whenever it
convolves; of small maps that takes as long as half of the convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


class Prepacked:
    """A kernel in that order.

    Args:
        weight: [O, C / groups, k, k], k odd, float32 on a CPU.
        shape: of about what maps, [B, C, H, W]. Any others are convolved as well.
    """

    def __init__(self, weight: Tensor, shape: Sequence[int], groups: int = 1) -> None:
        self.outputs, self.groups = len(weight), groups
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
    """Whether oneDNN is there, and computes in this precision."""
    return x.dtype == torch.float32 and x.is_cpu and torch.backends.mkldnn.is_available()


def can_prepack(weight: Tensor) -> bool:
    """Whether this PyTorch does it: the operations are none of its public interface."""
    return by_onednn(weight) and _works_as_expected()


@cache
def _works_as_expected() -> bool:
    with torch.inference_mode(False), torch.no_grad():
        # Whole numbers: no sum is rounded.
        weight = torch.arange(4 * 3 * 9, dtype=torch.float32).view(4, 3, 3, 3)
        x = torch.arange(6 * 5 * 5, dtype=torch.float32).view(1, 6, 5, 5)
        bias = torch.arange(4, dtype=torch.float32)
        try:
            found = Prepacked(weight, x.shape, groups=2).convolve(x, bias)
        except (AttributeError, RuntimeError, TypeError):
            return False
        last = found.is_contiguous(memory_format=torch.channels_last)
        return last and torch.equal(found, F.conv2d(x, weight, bias, padding=1, groups=2))
