"""The multi-scale conditional flow f(. ; features) (paper, section 4.1; Glow; SRFlow)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from deflow_aug.config import ModelConfig
from deflow_aug.flow.base import Chain, Invertible
from deflow_aug.flow.coupling import AffineCoupling, AffineInjector
from deflow_aug.flow.layers import ActNorm, Conv1x1, Squeeze
from deflow_aug.flow.split import Split


class TransitionStep(Chain):
    """Actnorm and 1x1 convolution, without conditioning."""

    def __init__(self, channels: int) -> None:
        super().__init__([ActNorm(channels), Conv1x1(channels)])


class FlowStep(Chain):
    """Actnorm, 1x1 convolution, conditional affine coupling, affine injector."""

    def __init__(self, channels: int, feature_channels: int, hidden: int) -> None:
        super().__init__(
            [
                ActNorm(channels),
                Conv1x1(channels),
                AffineCoupling(channels, feature_channels, hidden),
                AffineInjector(channels, feature_channels, hidden),
            ]
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

    def encode(self, x: Tensor, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Latents (splits first, the last level's last) and log|det| [B] in nats.

        Args:
            x: images, [B, 3, H, W].
            features: the conditioning map of each level, at 1/2, 1/4, ... of the image's size.
        """
        latents = []
        total = x.new_zeros(x.shape[0])
        for level, (chain, feature) in enumerate(zip(self.levels, features, strict=True), start=1):
            x, logdet = cast(Chain, chain).encode(x, feature)
            total = total + logdet
            if str(level) in self.splits:
                x, latent, logdet = cast(Split, self.splits[str(level)]).encode(x)
                latents.append(latent)
                total = total + logdet
        return [*latents, x], total

    def decode(self, latents: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
        """The images whose latents these are, [B, 3, H, W]; the exact inverse of encode."""
        *split_latents, x = latents
        for level in range(len(self.levels), 0, -1):
            if str(level) in self.splits:
                x = cast(Split, self.splits[str(level)]).decode(x, split_latents.pop())
            x = cast(Chain, self.levels[level - 1]).decode(x, features[level - 1])
        return x
