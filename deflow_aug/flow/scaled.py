"""Convolutions whose results are scaled by channel, as the one convolution that both are.

With gradients by autograd, or by hand for those who compute all others by hand: of the weight
w' = w exp(k l) and the bias b' = b exp(k l),

    d/dw = exp(k l) g,   d/db = exp(k l) h,   d/dl = k exp(k l) (sum of g w + h b)

where g is the gradient of w', h that of b', and the sum goes over all but the output channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scaled:
    """A convolution times exp(times * logs).

    Args:
        weight: [O, C, k, k].
        logs: [O].
        bias: [O], added before the scale; None for none.
        times: what the logarithms are multiplied by.
        evens_first: whether the results with even numbers come before those with odd ones: sorted
            before the convolution, each half is one block of the result.
    """

    weight: Tensor
    logs: Tensor
    bias: Tensor | None = None
    times: int = 1
    evens_first: bool = False

    def tensors(self) -> list[Tensor]:
        """All that gradients are computed of."""
        return [self.weight, self.logs] + ([] if self.bias is None else [self.bias])

    def of(self, tensors: Iterator[Tensor]) -> Scaled:
        """The same of other :meth:`tensors`, as many of which are taken."""
        weight, logs = next(tensors), next(tensors)
        bias = None if self.bias is None else next(tensors)
        return replace(self, weight=weight, logs=logs, bias=bias)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution, if there is a bias."""
        return self.folded_weight(), self.folded_bias()

    def folded_weight(self) -> Tensor:
        """The weight alone."""
        return self._in_order(self.weight * self._scale[:, None, None, None])

    def folded_bias(self) -> Tensor:
        """The bias alone."""
        assert self.bias is not None
        return self._in_order(self.bias * self._scale)

    def gradients(self, of_weight: Tensor, of_bias: Tensor | None = None) -> list[Tensor]:
        """Of :meth:`tensors`, where those of the folded weight, and bias if there is one, are
        these."""
        scale = self._scale
        if self.evens_first:
            of_weight = _interleaved(of_weight)
        of_scale = (of_weight * self.weight).sum((1, 2, 3))
        of_weight = of_weight * scale[:, None, None, None]
        if self.bias is None:
            return [of_weight, of_scale * scale * self.times]
        assert of_bias is not None
        if self.evens_first:
            of_bias = _interleaved(of_bias)
        of_scale = torch.addcmul(of_scale, of_bias, self.bias)
        return [of_weight, of_scale * scale * self.times, of_bias * scale]

    @cached_property
    def _scale(self) -> Tensor:
        return torch.exp(self.times * self.logs if self.times != 1 else self.logs)

    def _in_order(self, x: Tensor) -> Tensor:
        return torch.cat([x[0::2], x[1::2]]) if self.evens_first else x


def _interleaved(x: Tensor) -> Tensor:
    """As it was before its even ones came first."""
    return torch.stack(x.chunk(2), 1).reshape(x.shape)
