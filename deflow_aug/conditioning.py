"""Domain-invariant conditioning: h(x), and its features for every level (section 4.2)."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deflow_aug.config import ModelConfig
from deflow_aug.dense import NEGATIVE_SLOPE
from deflow_aug.flow.features import FeatureMap
from deflow_aug.resize import bicubic_downscale
from deflow_aug.rrdb import RRDBTrunk, convolve_with


def domain_invariant(x: Tensor, scale: int, noise: Tensor | None = None) -> Tensor:
    """h(x) = bicubic downscaling by ``scale``, plus noise.

    Args:
        x: images in [0, 1], [B, 3, H, W]; H and W multiples of ``scale``.
        noise: what to add, already scaled; [B, 3, H / scale, W / scale]. None adds nothing.
    """
    h = bicubic_downscale(x, scale)
    return h if noise is None else h + noise


class ConditioningNetwork(nn.Module):
    """RRDB features of h(x) at the size that each level of the flow works at.

    Level l works at 1/2^l of the image, s/2^l times the size of h(x). For a factor of 1 its map is
    the trunk's output; for 2, 4, ... a convolution of the nearest-upsampled map before it, taken
    after its leaky ReLU (the released code's works in place); for 1/2, 1/4, ... a bilinear
    reduction of the trunk's output. Outputs of chosen blocks, resized by nearest neighbour, are
    appended.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        encoder = config.encoder
        self.stacked_blocks = encoder.stacked_blocks
        self.factors = [config.scale / 2**level for level in range(1, config.levels + 1)]
        self.trunk = RRDBTrunk(encoder.channels, encoder.growth, encoder.blocks)
        doublings = max(0, round(math.log2(self.factors[0])))
        self.upconvs = nn.ModuleList(
            nn.Conv2d(encoder.channels, encoder.channels, 3, padding=1) for _ in range(doublings)
        )

    def forward(self, h: Tensor) -> list[FeatureMap]:
        """The map of each level l = 1, 2, ..., [B, feature_channels, H/2^l, W/2^l]."""
        last, outputs = self.trunk(h, self.stacked_blocks)
        maps = {1.0: last}
        for doubling, conv in enumerate(self.upconvs):
            y = convolve_with(cast(nn.Conv2d, conv), maps[2.0**doubling], repeats=2)
            maps[2.0 ** (doubling + 1)] = F.leaky_relu(y, NEGATIVE_SLOPE)
        features = []
        for factor in self.factors:
            size = [round(side * factor) for side in h.shape[-2:]]
            if factor < 1:
                maps[factor] = F.interpolate(last, size=size, mode="bilinear", align_corners=False)
            stacked = [outputs[number] for number in self.stacked_blocks]
            if factor > 1 and stacked:
                features.append(FeatureMap(maps[factor], torch.cat(stacked, 1), round(factor)))
            else:
                reduced = [F.interpolate(map_, size=size, mode="nearest") for map_ in stacked]
                # Under autocast a bilinear reduction is float32; the map stays what the trunk is.
                parts = [part.to(last.dtype) for part in (maps[factor], *reduced)]
                features.append(FeatureMap(torch.cat(parts, 1)))
        return features
