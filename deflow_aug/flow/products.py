"""Sums over channels of the products that tiles take (:mod:`deflow_aug.flow.winograd`).

Each of a tile's products, summed over channels, is a matrix product of its own. All of them are a
batch of matrix products, which PyTorch computes by MKL, or one grouped 1x1 convolution whose pixels
are the tiles, which it computes by oneDNN. MKL takes less time, but where it uses half the width of
a core: on AMD's with AVX-512. Matrix products want tiles one product after the other in memory,
the convolution one tile after the other.
"""

from __future__ import annotations

import math
import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from deflow_aug.flow import toom_cook
from deflow_aug.flow.prepacked import Prepacked, by_onednn, can_prepack


def by_convolution(tiles: Tensor) -> bool:
    """Whether the sums are computed as a convolution."""
    return not _mkl_is_as_wide() and by_onednn(tiles)


@cache
def _mkl_is_as_wide() -> bool:
    """Whether MKL's matrix products use all the width of this CPU.

    Not measured, but read off the CPU: what is computed must not depend on what else ran here when
    it was first asked.
    """
    if not torch.backends.mkl.is_available():
        return False
    avx512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return not avx512 or "GenuineIntel" in _processor()


def _processor() -> str:
    """What names the CPU's maker."""
    linux = Path("/proc/cpuinfo")
    return linux.read_text("utf-8", "replace") if linux.exists() else platform.processor()


def tiles_in(memory: Tensor, tiles: int, products: int, channels: int) -> Tensor:
    """[tiles, products, channels] at the start of some memory, in the order that sums want."""
    flat = memory[: math.prod((tiles, products, channels))]
    if by_convolution(memory):
        return flat.view(tiles, products, channels)
    return flat.view(products, tiles, channels).transpose(0, 1)


def new_tiles(like: Tensor, tiles: int, products: int, channels: int) -> Tensor:
    """:func:`tiles_in` memory of their own."""
    return tiles_in(like.new_empty(tiles * products * channels), tiles, products, channels)


def prepacked(kernels: Tensor | Prepacked, tiles: int) -> Tensor | Prepacked:
    """The kernels for :func:`multiply`, in the order of memory that it wants.

    Args:
        kernels: [products, O, C].
        tiles: of about how many at once.
    """
    if isinstance(kernels, Prepacked):
        return kernels
    if not by_convolution(kernels):
        return kernels.mT.contiguous().mT
    if not can_prepack(kernels):
        return kernels
    count, _, channels = kernels.shape
    weight = kernels.reshape(-1, channels, 1, 1)
    return Prepacked(weight, [1, count * channels, 1, tiles], groups=count)


def bias_of(kernels: Tensor | Prepacked, bias: Tensor) -> Tensor:
    """What :func:`multiply` takes to add a bias, [O], to the results.

    It is one product's; the convolution wants one for each product, nothing for all others.
    """
    if isinstance(kernels, Prepacked):
        return _of_all(bias, kernels.groups)
    return _of_all(bias, len(kernels)) if by_convolution(kernels) else bias


def _of_all(bias: Tensor, count: int) -> Tensor:
    own = _biased(len(bias))
    return F.pad(bias, [own.start, count * len(bias) - own.stop])


def _biased(outputs: int) -> slice:
    """Where the sums of the product stand that a bias is added to, of all sums of a tile."""
    return slice(toom_cook.ALL_ONES * outputs, (toom_cook.ALL_ONES + 1) * outputs)


def multiply(tiles: Tensor, kernels: Tensor | Prepacked, bias: Tensor | None = None) -> Tensor:
    """For each product a matrix product of its own: [tiles, products, O].

    Args:
        tiles: [tiles, products, C].
        kernels: [products, O, C], or these prepacked.
        bias: of :func:`bias_of`.
    """
    if isinstance(kernels, Prepacked):
        return _as_tiles(kernels.convolve(_as_pixels(tiles), bias), kernels.groups)
    count, outputs, channels = kernels.shape
    if not by_convolution(tiles):
        sums = torch.bmm(tiles.transpose(0, 1), kernels.mT)
        if bias is not None:
            own = bias if len(bias) == outputs else bias[_biased(outputs)]
            sums.select(0, toom_cook.ALL_ONES).add_(own)
        return sums.transpose(0, 1)
    if bias is not None and len(bias) == outputs:
        bias = _of_all(bias, count)
    weight, one = kernels.reshape(-1, channels, 1, 1), [1, 1]
    # Not conv2d, which with one thread, as workers have, computes one group after the other by MKL.
    result = torch.ops.aten.mkldnn_convolution(
        _as_pixels(tiles), weight, bias, [0, 0], one, one, count
    )
    return _as_tiles(result, count)


def add_multiplied(total: Tensor, tiles: Tensor, kernels: Tensor) -> None:
    """:func:`multiply`, added to what it returned before."""
    if by_convolution(tiles):
        total += multiply(tiles, kernels)
    else:
        total.transpose(0, 1).baddbmm_(tiles.transpose(0, 1), kernels.mT)


def _as_pixels(tiles: Tensor) -> Tensor:
    """One after the other, channels last: [1, products * C, 1, tiles]."""
    return tiles.reshape(1, 1, len(tiles), -1).permute(0, 3, 1, 2)


def _as_tiles(pixels: Tensor, count: int) -> Tensor:
    return pixels.permute(0, 2, 3, 1).reshape(pixels.shape[3], count, -1)
