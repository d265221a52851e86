"""Bicubic downscaling as MATLAB's ``imresize`` does it, and the padding it needs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_symmetric(x: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """Pad [..., H, W] by mirroring with the edge pixel repeated, by any number of pixels.

    (``torch.nn.functional.pad`` mirrors without the edge pixel, and never by more than the
    image's size.)
    """
    rows = _mirror(x.shape[-2], top, bottom, x.device)
    columns = _mirror(x.shape[-1], left, right, x.device)
    return x.index_select(-2, rows).index_select(-1, columns)


def _mirror(size: int, before: int, after: int, device: torch.device) -> Tensor:
    position = torch.arange(-before, size + after, device=device) % (2 * size)
    return torch.minimum(position, 2 * size - 1 - position)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad [..., H, W] symmetrically at the right and the bottom up to multiples of ``multiple``."""
    bottom, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    return pad_symmetric(x, 0, right, 0, bottom) if bottom or right else x


def bicubic_downscale(x: Tensor, factor: int) -> Tensor:
    """Downscale [B, C, H, W] by an integer factor: bicubic, antialiased, symmetric borders.

    Equals MATLAB's ``imresize(x, 1/factor)`` before any rounding or clamping, for every size: the
    result has ceil(H / factor) x ceil(W / factor) pixels.
    """
    if factor == 1:
        return x
    # The kernel reaches 2 * factor pixels to either side of an output pixel's centre; with that
    # much mirrored border, what interpolate does at its own borders is cropped away.
    margin = 2 * factor
    height, width = (-(-side // factor) for side in x.shape[-2:])
    right = margin + width * factor - x.shape[-1]
    bottom = margin + height * factor - x.shape[-2]
    padded = pad_symmetric(x, margin, right, margin, bottom)
    size = (padded.shape[-2] // factor, padded.shape[-1] // factor)
    small = F.interpolate(padded, size=size, mode="bicubic", antialias=True, align_corners=False)
    return small[..., 2 : 2 + height, 2 : 2 + width]
