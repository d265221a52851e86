"""How wide dequantisation noise is: everywhere the same, or following the noise of photographs."""

from __future__ import annotations

from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor

from deflow_aug.config import ModelConfig

LOCAL = 4
"""Side of the squares of pixels whose mean is the intensity that a width belongs to."""


def bin_widths(x: Tensor, config: ModelConfig) -> Tensor:
    """Width of the dequantisation noise of each value, in [0, 1] units; broadcasts with ``x``.

    1 / ``dequantization_steps``, or where there is a ``dequantization_curve``, its value at the
    local intensity of the channel: the mean of 4 x 4 pixels, bilinear in between, so that noise in
    the image hardly moves it.

    Args:
        x: images in [0, 1], [B, 3, H, W], H and W multiples of ``config.size_multiple``.
    """
    curve = config.dequantization_curve
    if curve is None:
        return x.new_full((1, 1, 1, 1), 1 / config.dequantization_steps)
    side = min(LOCAL, config.size_multiple)
    means = F.avg_pool2d(x, side)
    local = F.interpolate(means, scale_factor=side, mode="bilinear", align_corners=False)
    knots = x.new_tensor([curve.red, curve.green, curve.blue])
    position = local.clamp(0, 1) * (knots.shape[1] - 1)
    # Linear interpolation as a sum of hats, one for each knot.
    terms = (
        knots[:, k, None, None] * (1 - (position - k).abs()).clamp(min=0)
        for k in range(knots.shape[1])
    )
    return reduce(add, terms)


def log_volume(widths: Tensor, x: Tensor) -> Tensor:
    """Logarithm of the volume of each image's bin in nats, [B]."""
    return torch.flatten(widths.log().expand_as(x), 1).sum(1)
