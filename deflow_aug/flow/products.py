"""Sums over channels of the products that tiles take (:mod:`deflow_aug.flow.winograd`).

Each of a tile's products, summed over channels, is a matrix product of its own. In float32 all of
them are computed as one grouped 1x1 convolution whose pixels are the tiles: oneDNN, by which
PyTorch convolves, uses all the width of a core, MKL, by which it multiplies batches of matrices,
half of AMD's with AVX-512.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deflow_aug.flow.prepacked import Prepacked, by_onednn, can_prepack


def prepacked(kernels: Tensor | Prepacked, tiles: int) -> Tensor | Prepacked:
    """The kernels for :func:`multiply`, prepacked where that is possible.

    Args:
        kernels: [products, O, C].
        tiles: of about how many at once.
    """
    if isinstance(kernels, Prepacked) or not can_prepack(kernels):
        return kernels
    count, _, channels = kernels.shape
    weight = kernels.reshape(-1, channels, 1, 1)
    return Prepacked(weight, [1, count * channels, 1, tiles], groups=count)


def multiply(tiles: Tensor, kernels: Tensor | Prepacked, bias: Tensor | None = None) -> Tensor:
    """For each product a matrix product of its own: [tiles, products, O].

    Args:
        tiles: [tiles, products, C].
        kernels: [products, O, C], or these prepacked.
        bias: [products * O], see :func:`deflow_aug.flow.winograd.biases`.
    """
    if isinstance(kernels, Prepacked):
        return _as_tiles(kernels.convolve(_as_pixels(tiles), bias), kernels.groups)
    count, outputs, channels = kernels.shape
    if not by_onednn(tiles):
        sums = torch.bmm(tiles.transpose(0, 1), kernels.mT)
        if bias is not None:
            sums += bias.view(count, 1, outputs)
        return sums.transpose(0, 1)
    weight, one = kernels.reshape(-1, channels, 1, 1), [1, 1]
    # Not conv2d, which with one thread, as workers have, computes one group after the other by MKL.
    result = torch.ops.aten.mkldnn_convolution(
        _as_pixels(tiles), weight, bias, [0, 0], one, one, count
    )
    return _as_tiles(result, count)


def _as_pixels(tiles: Tensor) -> Tensor:
    """One after the other, channels last: [1, products * C, 1, tiles]."""
    return tiles.reshape(1, 1, len(tiles), -1).permute(0, 3, 1, 2)


def _as_tiles(pixels: Tensor, count: int) -> Tensor:
    return pixels.permute(0, 2, 3, 1).reshape(pixels.shape[3], count, -1)
