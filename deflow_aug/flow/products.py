"""Sums over channels of the products that tiles take (:mod:`deflow_aug.flow.winograd`).

Each of a tile's products, summed over channels, is a matrix product of its own. In float32 all of
them are computed as one grouped 1x1 convolution whose pixels are the tiles: oneDNN, by which
PyTorch convolves, uses all the width of a core, MKL, by which it multiplies batches of matrices,
half of AMD's with AVX-512.

oneDNN brings kernels into an order of its own first. Of few tiles that takes as long as half of
the products: kernels that are there for long are put into that order once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prepacked:
    """Kernels in the order of memory that oneDNN wants.

    Args:
        weight: opaque, of the layout that PyTorch names mkldnn.
        products, outputs: how many.
    """

    weight: Tensor
    products: int
    outputs: int


def prepacked(kernels: Tensor, tiles: int) -> Tensor | Prepacked:
    """The kernels for :func:`multiply`, prepacked where that is possible.

    Args:
        kernels: [products, O, C].
        tiles: of about how many at once. Any other number of them is multiplied as well.
    """
    if not (by_convolution(kernels) and _can_prepack()):
        return kernels
    return _prepack(kernels, tiles)


def multiply(tiles: Tensor, kernels: Tensor | Prepacked, bias: Tensor | None = None) -> Tensor:
    """For each product a matrix product of its own: [tiles, products, O].

    Args:
        tiles: [tiles, products, C].
        kernels: [products, O, C].
        bias: [products * O], see :func:`deflow_aug.flow.winograd.biases`.
    """
    if isinstance(kernels, Prepacked):
        return _by_prepacked(tiles, kernels, bias)
    count, outputs, channels = kernels.shape
    if not by_convolution(tiles):
        sums = torch.bmm(tiles.transpose(0, 1), kernels.mT)
        if bias is not None:
            sums += bias.view(count, 1, outputs)
        return sums.transpose(0, 1)
    weight, one = kernels.reshape(-1, channels, 1, 1), [1, 1]
    # Not conv2d, which with one thread, as workers have, computes one group after the other by MKL.
    result = torch.ops.aten.mkldnn_convolution(
        _as_pixels(tiles), weight, bias, [0, 0], one, one, count
    )
    return _as_tiles(result, count, outputs)


def by_convolution(x: Tensor) -> bool:
    """Whether oneDNN is there, and computes in this precision."""
    return x.dtype == torch.float32 and x.is_cpu and torch.backends.mkldnn.is_available()


def _as_pixels(tiles: Tensor) -> Tensor:
    """One after the other, channels last: [1, products * C, 1, tiles]."""
    return tiles.reshape(1, 1, len(tiles), -1).permute(0, 3, 1, 2)


def _as_tiles(pixels: Tensor, count: int, outputs: int) -> Tensor:
    return pixels.permute(0, 2, 3, 1).reshape(-1, count, outputs)


def _prepack(kernels: Tensor, tiles: int) -> Prepacked:
    count, outputs, channels = kernels.shape
    weight, one = kernels.reshape(-1, channels, 1, 1), [1, 1]
    shape = [1, count * channels, 1, tiles]
    # The operations that PyTorch's own compiler makes convolutions into.
    reorder = torch.ops.mkldnn._reorder_convolution_weight
    return Prepacked(reorder(weight, [0, 0], one, one, count, shape), count, outputs)


def _by_prepacked(tiles: Tensor, kernels: Prepacked, bias: Tensor | None) -> Tensor:
    count, one = kernels.products, [1, 1]
    result = torch.ops.mkldnn._convolution_pointwise(
        _as_pixels(tiles), kernels.weight, bias, [0, 0], one, one, count, "none", [], ""
    )
    return _as_tiles(result, count, kernels.outputs)


@cache
def _can_prepack() -> bool:
    """Whether this PyTorch does it, and as expected: the operations are none of its interface."""
    with torch.inference_mode(False), torch.no_grad():
        tiles, kernels = (torch.arange(n, dtype=torch.float32) for n in (5 * 2 * 3, 2 * 4 * 3))
        tiles, kernels = tiles.view(5, 2, 3), kernels.view(2, 4, 3)
        bias = torch.arange(8, dtype=torch.float32)
        try:
            found = _by_prepacked(tiles, _prepack(kernels, len(tiles)), bias)
        except (AttributeError, RuntimeError, TypeError):
            return False
        # Whole numbers: no sum is rounded.
        return torch.equal(found, multiply(tiles, kernels, bias))
