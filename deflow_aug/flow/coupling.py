"""Conditional layers: affine coupling and affine injector (SRFlow, section 3.3), both inverted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deflow_aug.flow.base import Invertible, sum_per_image
from deflow_aug.flow.layers import ChannelAffine

SCALE_EPS = 1e-3
"""Added to every predicted scale, which thus lies in (0.001, 1.001)."""


WEIGHT_INIT = 0.05 * 3**0.5
"""Half the width of the weights' uniform start, whose standard deviation is 0.05."""


class ConvActNorm(nn.Module):
    """Convolution with an actnorm in place of its bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        nn.init.uniform_(self.conv.weight, -WEIGHT_INIT, WEIGHT_INIT)
        self.norm = ChannelAffine(outputs)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.conv(x))
        return result


class ConvZeros(nn.Module):
    """3x3 convolution times exp(3 logs), all zero at first (Glow, section 3.3)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        nn.init.zeros_(self.conv.weight)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)
        self.logs = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(x) * torch.exp(3 * self.logs)[:, None, None]
        return result


class AffineNet(nn.Module):
    """Predicts shift and scale, each [B, outputs, H, W]; the scale lies in (0.001, 1.001)."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first = ConvActNorm(inputs, hidden, 3)
        self.second = ConvActNorm(hidden, hidden, 1)
        self.last = ConvZeros(hidden, 2 * outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.second(F.relu(self.first(x))))
        out = self.last(hidden)
        return out[:, 0::2], torch.sigmoid(out[:, 1::2] + 2) + SCALE_EPS


class AffineInjector(Invertible):
    """z = x / scale(features) - shift(features)."""

    def __init__(self, channels: int, feature_channels: int, hidden: int) -> None:
        super().__init__()
        self.net = AffineNet(feature_channels, hidden, channels)

    def encode(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self.net(features)
        return x / scale - shift, -sum_per_image(scale.log())

    def decode(self, z: Tensor, features: Tensor) -> Tensor:
        shift, scale = self.net(features)
        return (z + shift) * scale


class AffineCoupling(Invertible):
    """The second half of the channels, b, becomes b / scale(a, features) - shift(a, features)."""

    def __init__(self, channels: int, feature_channels: int, hidden: int) -> None:
        super().__init__()
        self.kept = channels // 2
        self.net = AffineNet(self.kept + feature_channels, hidden, channels - self.kept)

    def encode(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x[:, : self.kept], x[:, self.kept :]
        shift, scale = self.net(torch.cat([a, features], 1))
        return torch.cat([a, b / scale - shift], 1), -sum_per_image(scale.log())

    def decode(self, z: Tensor, features: Tensor) -> Tensor:
        a, b = z[:, : self.kept], z[:, self.kept :]
        shift, scale = self.net(torch.cat([a, features], 1))
        return torch.cat([a, (b + shift) * scale], 1)
