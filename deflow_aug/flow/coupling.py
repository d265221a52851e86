"""Conditional layers: affine coupling and affine injector (SRFlow, section 3.3), both inverted.

The first convolution of their networks sees up to a hundred times more feature channels than
channels of the image. Its response to the features is computed once for encoding, decoding and any
number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deflow_aug.flow.base import Invertible, sum_per_image
from deflow_aug.flow.convolution import Kernels
from deflow_aug.flow.features import FeatureKernel, FeatureMap
from deflow_aug.flow.layers import ChannelAffine
from deflow_aug.flow.prepacked import Prepacked, can_prepack
from deflow_aug.flow.scaled import Scaled

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

    def scaled(self) -> Scaled:
        """Both, to be folded into one convolution."""
        return Scaled(self.conv.weight, self.norm.logs, self.norm.bias)

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

    def scaled(self) -> Scaled:
        """Both, to be folded into one convolution."""
        return Scaled(self.conv.weight, self.logs, self.conv.bias, times=3, evens_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The even and the odd output channels."""
        even, odd = F.conv2d(x, *self.scaled().folded(), padding=1).chunk(2, 1)
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

    def first_weights(self) -> tuple[Tensor, Tensor]:
        """The first layer's weights of the kept channels, and of the features.

        Both from one operation: the gradient of a part alone is as large as the whole, and waits
        for that of the other.
        """
        weight = self.first.conv.weight
        if not self.kept:
            return weight[:, :0], weight
        kept, features = weight.split([self.kept, weight.shape[1] - self.kept], 1)
        return kept, features

    def feature_kernel(self, weight: Tensor | None = None) -> Kernels:
        """The convolution of the features in the first layer.

        Args:
            weight: of :meth:`first_weights` the features', if that is known.
        """
        norm = self.first.norm
        scale = norm.logs.exp()
        weight = self.first_weights()[1] if weight is None else weight
        return Kernels((weight,), scale, norm.bias * scale)

    def respond(self, features: FeatureMap) -> Tensor:
        """The features' part of the first layer, before its ReLU: [B, hidden, H, W]."""
        (response,) = features.convolve(FeatureKernel(self.feature_kernel))
        return response

    def fold(self) -> FoldedNet:
        """Its layers as convolutions."""
        return self.scaled().folded((self.first.settle, self.second.settle))

    def scaled(self, kept: Tensor | None = None) -> ScaledNet:
        """Its layers, to be folded.

        Args:
            kept: of :meth:`first_weights` the kept channels', if that is known.
        """
        layers = [self.second.scaled(), self.last.scaled()]
        if self.kept:
            kept = self.first_weights()[0] if kept is None else kept
            layers.insert(0, Scaled(kept, self.first.norm.logs))
        return ScaledNet(layers)


Settle = Callable[[Tensor], Tensor]


def _as_it_is(x: Tensor) -> Tensor:
    return x


NOT_SETTLED: tuple[Settle, Settle] = (_as_it_is, _as_it_is)
NOT_PACKED = (None, None, None)


@dataclass(frozen=True)
class ScaledNet:
    """An :class:`AffineNet` before its layers are folded.

    Args:
        layers: the first, of the kept channels, if there are any, the second and the last.
    """

    layers: Sequence[Scaled]

    def tensors(self) -> list[Tensor]:
        """All that gradients are computed of."""
        return [tensor for layer in self.layers for tensor in layer.tensors()]

    def of(self, tensors: Iterator[Tensor]) -> ScaledNet:
        """The same of other :meth:`tensors`, as many of which are taken."""
        return ScaledNet([layer.of(tensors) for layer in self.layers])

    def folded(self, settle: tuple[Settle, Settle] | None = None) -> FoldedNet:
        """Its layers as convolutions.

        Args:
            settle: see :class:`FoldedNet`.
        """
        *first, second, last = self.layers
        shift, raw = last.folded_bias().chunk(2)
        return FoldedNet(
            first[0].folded_weight() if first else None,
            second.folded(),
            (last.folded_weight(), torch.cat([shift, raw + 2])),
            settle,
        )

    def gradients(self, of_layers: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Of :meth:`tensors`, where these are those of the convolutions, weight and bias."""
        pairs = zip(self.layers, of_layers, strict=True)
        return [gradient for layer, own in pairs for gradient in layer.gradients(*own)]


@dataclass(frozen=True)
class FoldedNet:
    """An :class:`AffineNet` as three convolutions.

    Args:
        first: of the kept channels, a weight; None if there are none.
        second, last: weight and bias.
        settle: what the two hidden maps pass before their ReLU, see :meth:`ConvActNorm.settle`.
        packed: the three weights, prepacked, by which it is computed without gradients.
    """

    first: Tensor | None
    second: tuple[Tensor, Tensor]
    last: tuple[Tensor, Tensor]
    settle: tuple[Settle, Settle] | None = None
    packed: Sequence[Prepacked | None] = NOT_PACKED

    def prepacked(self, like: Tensor) -> FoldedNet:
        """The same for many maps of about this size, where that is possible.

        Gradients, and low precision, are computed by the weights as they are.
        """
        weights = self.first, self.second[0], self.last[0]
        if torch.is_grad_enabled() or not can_prepack(weights[1]):
            return self
        batch, _, *size = like.shape
        packed = [
            None if weight is None else Prepacked(weight, [batch, weight.shape[1], *size])
            for weight in weights
        ]
        return replace(self, packed=packed)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": NOT_PACKED}  # which can be copied and saved

    def __call__(self, response: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Shift and scale."""
        _, hidden = self.hidden(response, kept)
        return self.predict(hidden)

    def hidden(self, response: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The two hidden maps, after their ReLU."""
        first = response
        if self.first is not None and kept is not None:
            first = _convolve(kept, self.first, None, self.packed[0]).add_(first)
        settle, _ = self.settle or NOT_SETTLED
        first = F.relu(settle(first), inplace=kept is not None)
        return first, self.second_hidden(first)

    def second_hidden(self, first: Tensor) -> Tensor:
        """The second hidden map, of the first one."""
        _, settle = self.settle or NOT_SETTLED
        return F.relu_(settle(_convolve(first, *self.second, self.packed[1])))

    def predict(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale, of the second hidden map."""
        shift, raw = _convolve(hidden, *self.last, self.packed[2]).chunk(2, 1)
        if torch.is_grad_enabled():
            return shift, torch.sigmoid(raw) + SCALE_EPS
        # Each in memory of its own: of some channels of a map everything is computed much slower.
        shift, raw = (half.contiguous(memory_format=torch.channels_last) for half in (shift, raw))
        return shift, raw.sigmoid_().add_(SCALE_EPS)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Prepacked | None) -> Tensor:
    if packed is None or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)
    return packed.convolve(x, bias)


def affine(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x / scale - shift, and its log|det| [B]."""
    return x / scale - shift, -sum_per_image(scale.log())


class AffineInjector(Invertible):
    """z = x / scale(features) - shift(features)."""

    def __init__(self, channels: int, feature_channels: int, hidden: int) -> None:
        super().__init__()
        self.net = AffineNet(feature_channels, hidden, channels)

    def prepare(self, features: FeatureMap) -> tuple[Tensor, Tensor]:
        return self.prepare_response(self.net.respond(features), self.net.fold())

    def prepare_response(self, response: Tensor, net: FoldedNet) -> tuple[Tensor, Tensor]:
        """Shift and scale, where the response of the network is known."""
        return net(response)

    def encode(self, x: Tensor, prepared: Any = None) -> tuple[Tensor, Tensor]:
        return affine(x, *prepared)

    def decode(self, z: Tensor, prepared: Any = None) -> Tensor:
        shift, scale = prepared
        shifted = z + shift
        return shifted * scale if torch.is_grad_enabled() else shifted.mul_(scale)


class AffineCoupling(Invertible):
    """The second half of the channels, b, becomes b / scale(a, features) - shift(a, features)."""

    def __init__(self, channels: int, feature_channels: int, hidden: int) -> None:
        super().__init__()
        self.kept = channels // 2
        self.net = AffineNet(
            self.kept + feature_channels, hidden, channels - self.kept, kept=self.kept
        )

    def prepare(self, features: FeatureMap) -> tuple[FoldedNet, Tensor]:
        return self.prepare_response(self.net.respond(features), self.net.fold())

    def prepare_response(self, response: Tensor, net: FoldedNet) -> tuple[FoldedNet, Tensor]:
        """The network and its response, where that is known."""
        # A part of a wider response should not keep all of it.
        return net, response.contiguous(memory_format=torch.channels_last)

    def encode(self, x: Tensor, prepared: Any = None) -> tuple[Tensor, Tensor]:
        a, b = x[:, : self.kept], x[:, self.kept :]
        net, response = prepared
        changed, logdet = affine(b, *net(response, a))
        return torch.cat([a, changed], 1), logdet

    def decode(self, z: Tensor, prepared: Any = None) -> Tensor:
        a, b = z[:, : self.kept], z[:, self.kept :]
        net, response = prepared
        shift, scale = net(response, a)
        if torch.is_grad_enabled():
            return torch.cat([a, (b + shift) * scale], 1)
        # The same numbers in place, which takes half of the time.
        x = z.clone()
        x[:, self.kept :].add_(shift).mul_(scale)
        return x
