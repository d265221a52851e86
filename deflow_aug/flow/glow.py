"""The multi-scale conditional flow f(. ; features) (paper, section 4.1; Glow; SRFlow)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from deflow_aug.config import ModelConfig
from deflow_aug.flow.base import Chain, Invertible
from deflow_aug.flow.coupling import AffineCoupling, AffineInjector
from deflow_aug.flow.features import FeatureMap
from deflow_aug.flow.layers import ActNorm, Conv1x1, FoldedMix, Squeeze
from deflow_aug.flow.split import Split
from deflow_aug.recompute import recomputed

Prepared = list[list[Any]]
"""For each step of each level what it prepared, or the features that it will prepare."""


class MixingStep(Chain):
    """Actnorm and 1x1 convolution, computed as one matrix, then further layers."""

    def __init__(self, channels: int, *further: Invertible) -> None:
        super().__init__([ActNorm(channels), Conv1x1(channels), *further])

    def prepare(self, features: FeatureMap) -> list[Any]:
        actnorm, conv, *further = self.layers
        mix = FoldedMix(cast(ActNorm, actnorm), cast(Conv1x1, conv))
        return [mix, *(cast(Invertible, layer).prepare(features) for layer in further)]

    def encode(self, x: Tensor, prepared: Any = None) -> tuple[Tensor, Tensor]:
        mix, *others = prepared
        actnorm, conv, *further = (cast(Invertible, layer) for layer in self.layers)
        if cast(ActNorm, actnorm).affine.initializing:
            # What was folded is the actnorm as it was.
            x, _ = actnorm.encode(x)
            x, _ = conv.encode(x)
            total = x.new_zeros(x.shape[0])
        else:
            x, total = mix.encode(x)
        for layer, own in zip(further, others, strict=True):
            x, logdet = layer.encode(x, own)
            total = total + logdet
        return x, total

    def decode(self, z: Tensor, prepared: Any = None) -> Tensor:
        mix, *others = prepared
        for layer, own in zip(reversed(self.layers[2:]), reversed(others), strict=True):
            z = cast(Invertible, layer).decode(z, own)
        return mix.decode(z)


class TransitionStep(MixingStep):
    """Actnorm and 1x1 convolution, without conditioning."""


class FlowStep(MixingStep):
    """Actnorm, 1x1 convolution, conditional affine coupling, affine injector."""

    def __init__(self, channels: int, feature_channels: int, hidden: int) -> None:
        super().__init__(
            channels,
            AffineCoupling(channels, feature_channels, hidden),
            AffineInjector(channels, feature_channels, hidden),
        )


class ConditionalGlow(nn.Module):
    """L levels of squeeze, transition steps, flow steps, and on some levels a split."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        feature_channels = config.encoder.feature_channels
        self.levels = nn.ModuleList()
        self.splits = nn.ModuleDict()
        for level, channels in enumerate(config.level_channels, start=1):
            steps: list[Invertible] = [Squeeze()]
            steps += [TransitionStep(channels) for _ in range(config.transition_steps)]
            steps += [
                FlowStep(channels, feature_channels, config.hidden) for _ in range(config.steps)
            ]
            self.levels.append(Chain(steps))
            if level in (config.split_levels or ()):
                self.splits[str(level)] = Split(channels)

    def prepare(self, features: Sequence[FeatureMap]) -> Prepared:
        """What ``encode`` and ``decode`` take, computed once for any number of passes.

        Where gradients are recorded nothing is computed yet: each step will do it itself, and
        again in the backward pass, so that what it computes is not kept in between.

        Args:
            features: the conditioning map of each level, at 1/2, 1/4, ... of the image's size.
        """
        if torch.is_grad_enabled():
            return [
                [feature] * len(cast(Chain, chain).layers)
                for chain, feature in zip(self.levels, features, strict=True)
            ]
        return [
            cast(Chain, chain).prepare(feature)
            for chain, feature in zip(self.levels, features, strict=True)
        ]

    def encode(self, x: Tensor, prepared: Prepared) -> tuple[list[Tensor], Tensor]:
        """Latents (splits first, the last level's last) and log|det| [B] in nats.

        Args:
            x: images, [B, 3, H, W].
        """
        latents = []
        total = x.new_zeros(x.shape[0])
        for level, (chain, own) in enumerate(zip(self.levels, prepared, strict=True), start=1):
            for step, ready in zip(cast(Chain, chain).layers, own, strict=True):
                x, logdet = recomputed(_encode, cast(Invertible, step), x, ready)
                total = total + logdet
            if str(level) in self.splits:
                x, latent, logdet = cast(Split, self.splits[str(level)]).encode(x)
                latents.append(latent)
                total = total + logdet
        return [*latents, x], total

    def decode(self, latents: Sequence[Tensor], prepared: Prepared) -> Tensor:
        """The images whose latents these are, [B, 3, H, W]; the exact inverse of encode."""
        *split_latents, x = latents
        for level in range(len(self.levels), 0, -1):
            if str(level) in self.splits:
                x = cast(Split, self.splits[str(level)]).decode(x, split_latents.pop())
            steps = cast(Chain, self.levels[level - 1]).layers
            for step, ready in zip(reversed(steps), reversed(prepared[level - 1]), strict=True):
                x = recomputed(_decode, cast(Invertible, step), x, ready)
        return x


def _encode(step: Invertible, x: Tensor, ready: Any) -> tuple[Tensor, Tensor]:
    return step.encode(x, step.prepare(ready) if isinstance(ready, FeatureMap) else ready)


def _decode(step: Invertible, z: Tensor, ready: Any) -> Tensor:
    return step.decode(z, step.prepare(ready) if isinstance(ready, FeatureMap) else ready)
