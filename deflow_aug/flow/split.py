"""Split: half of the channels leave the flow as a latent (RealNVP, section 3.6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deflow_aug.flow.base import sum_per_image
from deflow_aug.flow.coupling import ConvZeros


class Split(nn.Module):
    """The second half of the channels, whitened by a mean and log-scale read off the first.

    latent = (second - mean(first)) / exp(logs(first)). One expression for both directions, so
    that the inverse is exact.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.kept = channels - channels // 2
        self.prior = ConvZeros(self.kept, 2 * (channels // 2))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Kept channels, latent, and log|det| [B]."""
        kept, leaving = x[:, : self.kept], x[:, self.kept :]
        mean, logs = self._prior(kept)
        return kept, (leaving - mean) * torch.exp(-logs), -sum_per_image(logs)

    def decode(self, kept: Tensor, latent: Tensor) -> Tensor:
        mean, logs = self._prior(kept)
        return torch.cat([kept, mean + torch.exp(logs) * latent], 1)

    def _prior(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        mean, logs = self.prior(kept)
        return mean, logs
