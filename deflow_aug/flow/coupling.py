"""Conditional layers: affine coupling and affine injector (SRFlow, section 3.3), both inverted.

The first convolution of their networks sees up to a hundred times more feature channels than
channels of the image. Its response to the features is computed in ``prepare``, once for encoding,
decoding and any number of samples.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deflow_aug.flow.base import Invertible, sum_per_image
from deflow_aug.flow.features import FeatureMap
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

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution that both are."""
        scale = self.norm.logs.exp()
        return self.conv.weight * scale[:, None, None, None], self.norm.bias * scale

    def settle(self, x: Tensor) -> Tensor:
        """Initialise the actnorm where that is due, from what it is about to be added to.

        Not initialised yet, it is the identity: what was folded is the plain convolution.
        """
        return self.norm(x) if self.norm.initializing else x


class ConvZeros(nn.Module):
    """3x3 convolution times exp(3 logs), all zero at first (Glow, section 3.3)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        nn.init.zeros_(self.conv.weight)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)
        self.logs = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The even and the odd output channels."""
        scale = torch.exp(3 * self.logs)
        assert self.conv.bias is not None
        weight, bias = self.conv.weight * scale[:, None, None, None], self.conv.bias * scale
        # Sorted before the convolution, each half is one block of the result.
        weight, bias = (torch.cat([one[0::2], one[1::2]]) for one in (weight, bias))
        even, odd = F.conv2d(x, weight, bias, padding=1).chunk(2, 1)
        return even, odd


class AffineNet(nn.Module):
    """Predicts shift and scale, each [B, outputs, H, W]; the scale lies in (0.001, 1.001).

    Args:
        inputs: channels of what it sees: ``kept`` channels of the image, then the features.
        kept: how many of them are the image's.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, kept: int = 0) -> None:
        super().__init__()
        self.kept = kept
        self.first = ConvActNorm(inputs, hidden, 3)
        self.second = ConvActNorm(hidden, hidden, 1)
        self.last = ConvZeros(hidden, 2 * outputs)

    def respond(self, features: FeatureMap) -> Tensor:
        """The features' part of the first layer, before its ReLU: [B, hidden, H, W]."""
        weight, bias = self.first.folded()
        return features.convolve(weight[:, self.kept :], bias)

    def forward(self, response: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden = response
        if kept is not None:
            weight = self.first.folded()[0][:, : self.kept]
            hidden = hidden + F.conv2d(kept, weight, padding=1)
        hidden = F.relu(self.first.settle(hidden))
        hidden = F.relu(self.second.settle(F.conv2d(hidden, *self.second.folded())))
        shift, raw = self.last(hidden)
        return shift, torch.sigmoid(raw + 2) + SCALE_EPS


class AffineInjector(Invertible):
    """z = x / scale(features) - shift(features)."""

    def __init__(self, channels: int, feature_channels: int, hidden: int) -> None:
        super().__init__()
        self.net = AffineNet(feature_channels, hidden, channels)

    def prepare(self, features: FeatureMap) -> tuple[Tensor, Tensor]:
        """Shift and scale."""
        shift, scale = self.net(self.net.respond(features))
        return shift, scale

    def encode(self, x: Tensor, prepared: Any = None) -> tuple[Tensor, Tensor]:
        shift, scale = prepared
        return x / scale - shift, -sum_per_image(scale.log())

    def decode(self, z: Tensor, prepared: Any = None) -> Tensor:
        shift, scale = prepared
        return (z + shift) * scale


class AffineCoupling(Invertible):
    """The second half of the channels, b, becomes b / scale(a, features) - shift(a, features)."""

    def __init__(self, channels: int, feature_channels: int, hidden: int) -> None:
        super().__init__()
        self.kept = channels // 2
        self.net = AffineNet(
            self.kept + feature_channels, hidden, channels - self.kept, kept=self.kept
        )

    def prepare(self, features: FeatureMap) -> Tensor:
        """The network's response to the features."""
        return self.net.respond(features)

    def encode(self, x: Tensor, prepared: Any = None) -> tuple[Tensor, Tensor]:
        a, b = x[:, : self.kept], x[:, self.kept :]
        shift, scale = self.net(prepared, a)
        return torch.cat([a, b / scale - shift], 1), -sum_per_image(scale.log())

    def decode(self, z: Tensor, prepared: Any = None) -> Tensor:
        a, b = z[:, : self.kept], z[:, self.kept :]
        shift, scale = self.net(prepared, a)
        return torch.cat([a, (b + shift) * scale], 1)
