"""DeFlow: the flow, its conditioning and the latent shifts as one density model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from deflow_aug.conditioning import ConditioningNetwork, domain_invariant
from deflow_aug.config import CLEAN, ChannelStatistics, ModelConfig
from deflow_aug.flow.glow import ConditionalGlow
from deflow_aug.flow.layers import initializing
from deflow_aug.latent import DomainShift

UNMATCHED = ChannelStatistics((0.0,) * 3, (1.0,) * 3, (0.0,) * 3, (1.0,) * 3)
"""Maps every colour to exactly itself."""


class DeFlow(nn.Module):
    """p_x and p_y of clean and degraded images, sharing one conditional flow (paper, section 3).

    Images are [B, 3, H, W], in [0, 1], with sides that are multiples of
    ``config.size_multiple``. Nothing here draws random numbers: noise is given.

    Where ``config.statistics`` has channel statistics of a degraded domain, its images are meant
    in matched colours everywhere but in :meth:`match_colours` and :meth:`unmatch_colours`, which
    lead there and back.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.conditioning = ConditioningNetwork(config)
        self.flow = ConditionalGlow(config)
        self.shifts = nn.ModuleList(
            DomainShift(channels, len(config.domains), config.shift_init)
            for channels in config.latent_channels
        )

    def match_colours(self, y: Tensor, domain: Sequence[str]) -> Tensor:
        """Images as the flow takes them: degraded ones with the channel statistics of clean ones.

        (y - degraded_mean) / degraded_std * clean_std + clean_mean, clamped to [0, 1]. Images of
        the clean domain, and of domains without statistics, come back as they are.

        Args:
            y: images in [0, 1], [B, 3, H, W].
            domain: name of the domain of each.
        """
        if self.config.statistics is None:
            return y
        clean_mean, clean_std, mean, std = self._statistics(domain, y)
        return ((y - mean) / std * clean_std + clean_mean).clamp(0, 1)

    def unmatch_colours(self, y: Tensor, domain: Sequence[str]) -> Tensor:
        """What the flow decoded, in the colours of its domain: :meth:`match_colours` undone.

        (y - clean_mean) / clean_std * degraded_std + degraded_mean, not clamped.

        Args:
            y: images, [B, 3, H, W].
            domain: name of the domain of each.
        """
        if self.config.statistics is None:
            return y
        clean_mean, clean_std, mean, std = self._statistics(domain, y)
        return (y - clean_mean) / clean_std * std + mean

    def _statistics(self, domain: Sequence[str], like: Tensor) -> list[Tensor]:
        """Clean mean and std, degraded mean and std of each image, [B, 3, 1, 1] each."""
        rows = [(self.config.statistics or {}).get(name, UNMATCHED) for name in domain]
        columns = (
            [row.clean_mean for row in rows],
            [row.clean_std for row in rows],
            [row.degraded_mean for row in rows],
            [row.degraded_std for row in rows],
        )
        return [like.new_tensor(column)[:, :, None, None] for column in columns]

    def features(self, x: Tensor, noise: Tensor | None = None) -> list[Tensor]:
        """Conditioning maps of the images, computed once for encoding and decoding.

        Args:
            noise: standard normal draws for h(x), [B, 3, H/s, W/s]; None for none.
        """
        self._check(x)
        if noise is not None:
            noise = noise * self.config.conditioning_noise
        result: list[Tensor] = self.conditioning(domain_invariant(x, self.config.scale, noise))
        return result

    def encode(self, x: Tensor, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Latents and log|det| [B] in nats: z = f(x; h(x))."""
        return self.flow.encode(x, features)

    def decode(self, latents: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
        """Images of these latents, not clamped."""
        return self.flow.decode(latents, features)

    def log_prob(
        self, x: Tensor, domain: Tensor | Sequence[str], features: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Log-density of continuous images given h(x), in nats, [B] (eq. 4, 7).

        Args:
            x: images, [B, 3, H, W].
            domain: of each image, as names or as numbers (see :meth:`domain_numbers`).
            features: of ``x``, if they are at hand.
        """
        number = self.domain_numbers(domain, x)
        latents, logdet = self.encode(x, self.features(x) if features is None else features)
        return logdet + sum(
            (s.log_prob(z, number) for s, z in zip(self.domain_shifts(), latents, strict=True)),
            start=torch.zeros_like(logdet),
        )

    def conditional_log_prob(
        self,
        degraded: Tensor,
        clean: Tensor,
        domain: Tensor | Sequence[str],
        features_degraded: Sequence[Tensor] | None = None,
        features_clean: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """ln p(y given x) of paired images, in nats, [B] (eq. 5).

        Raises:
            ValueError: for a domain that is unknown or the clean one.
        """
        number = self.domain_numbers(domain, degraded)
        if not bool(number.all()):
            raise ValueError(f"expected degraded domains, got {CLEAN!r} among {domain}")
        z_clean, _ = self.encode(clean, features_clean or self.features(clean))
        z_degraded, logdet = self.encode(degraded, features_degraded or self.features(degraded))
        return logdet + sum(
            (
                s.conditional_log_prob(y, x, number)
                for s, y, x in zip(self.domain_shifts(), z_degraded, z_clean, strict=True)
            ),
            start=torch.zeros_like(logdet),
        )

    def nll(
        self,
        x: Tensor,
        domain: Tensor | Sequence[str],
        *,
        dequantization: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Negative log-likelihood of quantised images in bits per dimension, [B].

        -log2 of the probability of each image's quantisation bin, divided by 3 H W. The domains of
        a batch may be mixed in any way.

        Args:
            x: images, [B, 3, H, W].
            domain: of each image, as names or numbers.
            dequantization: draws uniform in [-1/2, 1/2), like ``x``; without them the density at
                the bin's centre stands for its mean over the bin.
            noise: standard normal draws for h(x).
        """
        features = self.features(x, noise)
        x = self._dequantized(x, dequantization)
        dimensions = x[0].numel()
        log_width = -math.log(self.config.dequantization_steps)
        log_probability = self.log_prob(x, domain, features) + dimensions * log_width
        return -log_probability / (dimensions * math.log(2))

    def degrade(
        self,
        latents: Sequence[Tensor],
        noise: Sequence[Tensor],
        domain: Tensor | Sequence[str],
        temperature: Tensor,
    ) -> list[Tensor]:
        """Latents of degraded images: z + tau u (eq. 40); ``temperature`` is [B]."""
        number = self.domain_numbers(domain, latents[0])
        return [
            s.degrade(z, n, number, temperature)
            for s, z, n in zip(self.domain_shifts(), latents, noise, strict=True)
        ]

    def restore(
        self,
        latents: Sequence[Tensor],
        noise: Sequence[Tensor] | None,
        domain: Tensor | Sequence[str],
    ) -> list[Tensor]:
        """Latents of clean images drawn from p(z_x given z_y), or their mean without noise."""
        number = self.domain_numbers(domain, latents[0])
        draws = [None] * len(latents) if noise is None else noise
        return [
            s.restore(z, n, number)
            for s, z, n in zip(self.domain_shifts(), latents, draws, strict=True)
        ]

    @torch.no_grad()
    def initialize(
        self, x: Tensor, *, dequantization: Tensor | None = None, noise: Tensor | None = None
    ) -> None:
        """Set the actnorms that are not initialised yet from a batch of both domains."""
        with initializing(self):
            features = self.features(x, noise)
            self.encode(self._dequantized(x, dequantization), features)

    def latent_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """Shapes (C, H, W) of the latents of an image of this size."""
        levels = [*sorted(self.config.split_levels or ()), self.config.levels]
        return [
            (channels, height >> level, width >> level)
            for channels, level in zip(self.config.latent_channels, levels, strict=True)
        ]

    def domain_numbers(self, domain: Tensor | Sequence[str], like: Tensor) -> Tensor:
        """Domain numbers, int64 [B]: 0 for clean, i + 1 for the i-th of ``config.domains``.

        Raises:
            ValueError: for an unknown name, or as many domains as images are not given.
        """
        if not isinstance(domain, Tensor):
            known = (CLEAN, *self.config.domains)
            unknown = sorted(set(domain) - set(known))
            if unknown:
                raise ValueError(
                    f"unknown domain {', '.join(map(repr, unknown))}; "
                    f"this model has: {', '.join(known)}"
                )
            domain = torch.tensor([known.index(name) for name in domain], device=like.device)
        elif bool(((domain < 0) | (domain > len(self.config.domains))).any()):
            raise ValueError(
                f"domain numbers go from 0 (clean) to {len(self.config.domains)}, "
                f"got {domain.tolist()}"
            )
        if domain.shape != like.shape[:1]:
            raise ValueError(
                f"expected one domain for each of the {like.shape[0]} images, "
                f"got {tuple(domain.shape)}"
            )
        return domain

    def domain_shifts(self) -> list[DomainShift]:
        return [cast(DomainShift, shift) for shift in self.shifts]

    def _dequantized(self, x: Tensor, draws: Tensor | None) -> Tensor:
        """Images with dequantisation noise of the model's width, from draws in [-1/2, 1/2)."""
        return x if draws is None else x + draws / self.config.dequantization_steps

    def _check(self, x: Tensor) -> None:
        multiple = self.config.size_multiple
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % multiple or x.shape[3] % multiple:
            raise ValueError(
                f"expected images of shape [B, 3, H, W] with H and W multiples of {multiple}, "
                f"got {list(x.shape)}; pad them with deflow_aug.resize.pad_to_multiple"
            )


def channels_last(model: DeFlow) -> DeFlow:
    """The model with its convolutions in the memory order that CPUs and GPUs are fastest in."""
    # Module.to takes memory_format, but its annotations do not say so.
    result: DeFlow = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return result
