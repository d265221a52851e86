"""Unconditional layers: squeeze, actnorm, LU-parametrised 1x1 convolution."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deflow_aug.flow.base import Invertible, per_image, pixels


class Squeeze(Invertible):
    """2 x 2 pixels become four channels (order of ``pixel_unshuffle``); volume preserving."""

    def encode(self, x: Tensor, prepared: Any = None) -> tuple[Tensor, Tensor]:
        return F.pixel_unshuffle(x, 2), x.new_zeros(x.shape[0])

    def decode(self, z: Tensor, prepared: Any = None) -> Tensor:
        return F.pixel_shuffle(z, 2)


class ChannelAffine(nn.Module):
    """(x + bias) * exp(logs) for each channel, initialised from data (Glow, section 3.1).

    Inside :func:`initializing`, the next call sets ``bias`` and ``logs`` such that its output has
    zero mean and unit variance in every channel. That this has happened is part of the saved
    state (``initialized``).
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.logs = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))
        self.initializing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.initializing:
            self._initialize(x)
        return (x + _channels(self.bias)) * _channels(self.logs.exp())

    def invert(self, z: Tensor) -> Tensor:
        return z * _channels((-self.logs).exp()) - _channels(self.bias)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        variance, mean = torch.var_mean(x.detach(), dim=(0, 2, 3), correction=0)
        self.bias.copy_(-mean)
        # A channel that is constant in the first batch must not get a huge scale.
        self.logs.copy_(-0.5 * torch.log(variance + 1e-6))
        self.initialized.fill_(True)


@contextmanager
def initializing(module: nn.Module) -> Iterator[None]:
    """Within it, a pass through ``module`` initialises its actnorms, those not yet initialised."""
    waiting = [
        layer
        for layer in module.modules()
        if isinstance(layer, ChannelAffine) and not bool(layer.initialized)
    ]
    for layer in waiting:
        layer.initializing = True
    try:
        yield
    finally:
        for layer in waiting:
            layer.initializing = False


class ActNorm(Invertible):
    """Activation normalisation: z = (x + bias) * exp(logs) (Glow, section 3.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.affine = ChannelAffine(channels)

    def encode(self, x: Tensor, prepared: Any = None) -> tuple[Tensor, Tensor]:
        z = self.affine(x)  # first: initialisation sets logs
        return z, per_image(self.affine.logs.sum() * pixels(x), x)

    def decode(self, z: Tensor, prepared: Any = None) -> Tensor:
        return self.affine.invert(z)


class Conv1x1(Invertible):
    """Invertible 1x1 convolution, W = P L (U + diag(sign * exp(log_s))) (Glow, section 3.2).

    P is a fixed permutation, L unit lower and U strictly upper triangular. Starts as a random
    rotation.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("permutation", torch.zeros(channels, dtype=torch.int64))
        self.register_buffer("sign", torch.ones(channels))
        self.log_s = nn.Parameter(torch.zeros(channels))
        self.lower = nn.Parameter(torch.zeros(channels, channels))
        self.upper = nn.Parameter(torch.zeros(channels, channels))
        # On the meta device a module is only laid out, for weights to be loaded. All but the
        # plainest operations there make PyTorch import for a second.
        if not self.log_s.is_meta:
            self._start_as_rotation()

    @torch.no_grad()
    def _start_as_rotation(self) -> None:
        random = torch.empty_like(self.lower, dtype=torch.float64).uniform_(-1, 1)
        p, lower, upper = torch.linalg.lu(torch.linalg.qr(random).Q)
        diagonal = upper.diagonal()
        # W = P A has row i of A at row argmax(P[:, i]); as an index: W = A[permutation].
        self.permutation.copy_(p.argmax(1))
        self.sign.copy_(diagonal.sign())
        self.log_s.copy_(diagonal.abs().log())
        self.lower.copy_(lower.tril(-1))
        self.upper.copy_(upper.triu(1))

    def _factors(self) -> tuple[Tensor, Tensor]:
        identity = torch.eye(self.log_s.numel(), dtype=self.log_s.dtype, device=self.log_s.device)
        lower = self.lower.tril(-1) + identity
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_s.exp())
        return lower, upper

    def weight(self) -> Tensor:
        """W, [C, C]: z = W x at every position."""
        lower, upper = self._factors()
        return (lower @ upper)[self.permutation]

    def inverse_weight(self) -> Tensor:
        """The inverse of W, from the triangular factors, computed in float64."""
        lower, upper = (factor.double() for factor in self._factors())
        identity = torch.eye(lower.shape[0], dtype=lower.dtype, device=lower.device)
        permuted = identity[self.permutation].T  # the inverse of a permutation is its transpose
        half = torch.linalg.solve_triangular(lower, permuted, upper=False, unitriangular=True)
        inverse = torch.linalg.solve_triangular(upper, half, upper=True)
        return inverse.to(self.log_s.dtype)

    def encode(self, x: Tensor, prepared: Any = None) -> tuple[Tensor, Tensor]:
        z = mix(x, self.weight())
        return z, per_image(self.log_s.sum() * pixels(x), x)

    def decode(self, z: Tensor, prepared: Any = None) -> Tensor:
        return mix(z, self.inverse_weight())


class FoldedMix:
    """An actnorm and the 1x1 convolution after it as one matrix, z = W diag(s) (x + b)."""

    def __init__(self, actnorm: ActNorm, conv: Conv1x1) -> None:
        self.actnorm, self.conv = actnorm.affine, conv
        self.weight = conv.weight() * self.actnorm.logs.exp()
        self.bias = self.weight @ self.actnorm.bias
        self.logdet = self.actnorm.logs.sum() + conv.log_s.sum()  # at each position

    @cached_property
    def inverse(self) -> Tensor:
        """diag(1/s) W^-1, computed in float64, once for any number of samples."""
        return self.conv.inverse_weight() * (-self.actnorm.logs).exp()[:, None]

    def settled(self) -> FoldedMix:
        """Itself, with all that it has to compute computed if it may be kept."""
        if not torch.is_grad_enabled():
            _ = self.inverse
        return self

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return mix(x, self.weight, self.bias), per_image(self.logdet * pixels(x), x)

    def decode(self, z: Tensor) -> Tensor:
        return mix(z, self.inverse, -self.actnorm.bias)


def mix(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight @ x + bias at every position."""
    # Not conv2d: that computes in TF32 on GPUs, and with it this layer would not invert exactly.
    return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)


def _channels(x: Tensor) -> Tensor:
    return x[:, None, None]
