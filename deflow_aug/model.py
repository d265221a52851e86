"""DeFlow: the flow, its conditioning and the latent shifts as one density model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from deflow_aug.conditioning import ConditioningNetwork, domain_invariant
from deflow_aug.config import CLEAN, ChannelStatistics, ModelConfig
from deflow_aug.dequantization import bin_widths, log_volume
from deflow_aug.devices import full_precision
from deflow_aug.flow.glow import ConditionalGlow, Prepared
from deflow_aug.flow.layers import initializing
from deflow_aug.latent import DomainShift, normalized_weights

Domain = str | Mapping[str, float]
"""A domain's name, or a mix of degraded domains: weights by name."""

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
            DomainShift(channels, len(config.domains), config.shift_init, config.shift)
            for channels in config.latent_channels
        )

    def match_colours(self, y: Tensor, domain: Sequence[Domain]) -> Tensor:
        """Images as the flow takes them: degraded ones with the channel statistics of clean ones.

        (y - degraded_mean) / degraded_std * clean_std + clean_mean, clamped to [0, 1]. Images of
        the clean domain, and of domains without statistics, come back as they are.

        Args:
            y: images in [0, 1], [B, 3, H, W].
            domain: of each, a name or a mix.
        """
        if self.config.statistics is None:
            return y
        clean_mean, clean_std, mean, std = self._statistics(domain, y)
        return ((y - mean) / std * clean_std + clean_mean).clamp(0, 1)

    def unmatch_colours(self, y: Tensor, domain: Sequence[Domain]) -> Tensor:
        """What the flow decoded, in the colours of its domain: :meth:`match_colours` undone.

        (y - clean_mean) / clean_std * degraded_std + degraded_mean, not clamped.

        Args:
            y: images, [B, 3, H, W].
            domain: of each, a name or a mix.
        """
        if self.config.statistics is None:
            return y
        clean_mean, clean_std, mean, std = self._statistics(domain, y)
        return (y - clean_mean) / clean_std * std + mean

    def _statistics(self, domain: Sequence[Domain], like: Tensor) -> list[Tensor]:
        """Clean mean and std, degraded mean and std of each image, [B, 3, 1, 1] each."""
        known = self.config.statistics or {}
        rows = [
            known.get(one, UNMATCHED)
            if isinstance(one, str)
            else _mixed_statistics(normalized_weights(one, self.config.domains), known)
            for one in domain
        ]
        columns = (
            [row.clean_mean for row in rows],
            [row.clean_std for row in rows],
            [row.degraded_mean for row in rows],
            [row.degraded_std for row in rows],
        )
        return [like.new_tensor(column)[:, :, None, None] for column in columns]

    def features(self, x: Tensor, noise: Tensor | None = None) -> Prepared:
        """All that depends on h(x) alone, computed once for encoding, decoding, any samples.

        Under ``torch.autocast`` this part alone runs in the lower precision; encoding and decoding
        use the very same numbers, so that they stay exact inverses of each other.

        Args:
            noise: standard normal draws for h(x), [B, 3, H/s, W/s]; None for none.
        """
        self._check(x)
        if noise is not None:
            noise = noise * self.config.conditioning_noise
        h = domain_invariant(x, self.config.scale, noise)
        maps = self.conditioning(h if self.config.conditioned else torch.zeros_like(h))
        with full_precision(x):
            return self.flow.prepare(maps)

    def encode(self, x: Tensor, features: Prepared) -> tuple[list[Tensor], Tensor]:
        """Latents and log|det| [B] in nats: z = f(x; h(x))."""
        with full_precision(x):
            return self.flow.encode(x, features)

    def decode(self, latents: Sequence[Tensor], features: Prepared) -> Tensor:
        """Images of these latents, not clamped."""
        with full_precision(latents[0]):
            return self.flow.decode(latents, features)

    def log_prob(
        self, x: Tensor, domain: Tensor | Sequence[str], features: Prepared | None = None
    ) -> Tensor:
        """Log-density of continuous images given h(x), in nats, [B] (eq. 4, 7).

        Args:
            x: images, [B, 3, H, W].
            domain: of each image, as names or as numbers (see :meth:`domain_numbers`).
            features: of ``x``, if they are at hand.
        """
        number = self.domain_numbers(domain, x)
        if features is None:
            features = self.features(x).for_one_pass()
        latents, logdet = self.encode(x, features)
        with full_precision(x):
            return logdet + sum(
                (s.log_prob(z, number) for s, z in zip(self.domain_shifts(), latents, strict=True)),
                start=torch.zeros_like(logdet),
            )

    def conditional_log_prob(
        self,
        degraded: Tensor,
        clean: Tensor,
        domain: Tensor | Sequence[str],
        features_degraded: Prepared | None = None,
        features_clean: Prepared | None = None,
    ) -> Tensor:
        """ln p(y given x) of paired images, in nats, [B] (eq. 5).

        Raises:
            ValueError: for a domain that is unknown or the clean one.
        """
        number = self.domain_numbers(domain, degraded)
        if not bool(number.all()):
            raise ValueError(f"expected degraded domains, got {CLEAN!r} among {domain}")
        z_clean, _ = self.encode(clean, features_clean or self.features(clean).for_one_pass())
        z_degraded, logdet = self.encode(
            degraded, features_degraded or self.features(degraded).for_one_pass()
        )
        with full_precision(clean):
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
        features, widths = self.features(x, noise).for_one_pass(), bin_widths(x, self.config)
        dequantized = _dequantized(x, widths, dequantization)
        return _bits(self.log_prob(dequantized, domain, features), x, widths)

    def paired_nll(
        self,
        degraded: Tensor,
        clean: Tensor,
        domain: Tensor | Sequence[str],
        *,
        dequantization: tuple[Tensor, Tensor] | None = None,
        noise: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Minus ln p(y given x) of quantised pairs (eq. 5) in bits per dimension of y, [B].

        Args:
            degraded, clean: the halves of each pair, [B, 3, H, W].
            domain: of each degraded half, as names or numbers.
            dequantization, noise: as in :meth:`nll`, of the degraded and of the clean halves.

        Raises:
            ValueError: for a domain that is unknown or the clean one.
        """
        draws, h_noise = dequantization or (None, None), noise or (None, None)
        widths = bin_widths(degraded, self.config)
        log_probability = self.conditional_log_prob(
            _dequantized(degraded, widths, draws[0]),
            _dequantized(clean, bin_widths(clean, self.config), draws[1]),
            domain,
            self.features(degraded, h_noise[0]).for_one_pass(),
            self.features(clean, h_noise[1]).for_one_pass(),
        )
        return _bits(log_probability, degraded, widths)

    def degrade(
        self,
        latents: Sequence[Tensor],
        noise: Sequence[Tensor],
        domain: Tensor | Sequence[Domain],
        temperature: Tensor,
    ) -> list[Tensor]:
        """Latents of degraded images: z + tau u (eq. 40); ``temperature`` is [B].

        A mix of domains has u ~ N(sum w mu, sum w Sigma) of the weights w, normalised.
        """
        chosen = self._chosen(domain, latents[0])
        return [
            s.degrade(z, n, chosen, temperature)
            for s, z, n in zip(self.domain_shifts(), latents, noise, strict=True)
        ]

    def restore(
        self,
        latents: Sequence[Tensor],
        noise: Sequence[Tensor] | None,
        domain: Tensor | Sequence[Domain],
    ) -> list[Tensor]:
        """Latents of clean images drawn from p(z_x given z_y), or their mean without noise."""
        chosen = self._chosen(domain, latents[0])
        draws = [None] * len(latents) if noise is None else noise
        return [
            s.restore(z, n, chosen)
            for s, z, n in zip(self.domain_shifts(), latents, draws, strict=True)
        ]

    @torch.no_grad()
    def initialize(
        self, x: Tensor, *, dequantization: Tensor | None = None, noise: Tensor | None = None
    ) -> None:
        """Set the actnorms that are not initialised yet from a batch of both domains."""
        with initializing(self):
            features = self.features(x, noise)
            self.encode(_dequantized(x, bin_widths(x, self.config), dequantization), features)

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

    def _chosen(self, domain: Tensor | Sequence[Domain], like: Tensor) -> Tensor:
        """Domain numbers [B], or where one is a mix, weights of all domains, float64 [B, 1 + D]."""
        if isinstance(domain, Tensor) or all(isinstance(one, str) for one in domain):
            return self.domain_numbers(cast("Tensor | Sequence[str]", domain), like)
        known = self.config.domains
        named = [{one: 1.0} if isinstance(one, str) else dict(one) for one in domain]
        shares = [normalized_weights(one, known) for one in named]
        weights = [[0.0, *(share.get(name, 0.0) for name in known)] for share in shares]
        if len(weights) != like.shape[0]:
            raise ValueError(
                f"expected one domain for each of the {like.shape[0]} images, got {len(weights)}"
            )
        return torch.tensor(weights, dtype=torch.float64, device=like.device)

    def domain_shifts(self) -> list[DomainShift]:
        return [cast(DomainShift, shift) for shift in self.shifts]

    def _check(self, x: Tensor) -> None:
        multiple = self.config.size_multiple
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % multiple or x.shape[3] % multiple:
            raise ValueError(
                f"expected images of shape [B, 3, H, W] with H and W multiples of {multiple}, "
                f"got {list(x.shape)}; pad them with deflow_aug.resize.pad_to_multiple"
            )


def _dequantized(x: Tensor, widths: Tensor, draws: Tensor | None) -> Tensor:
    """Images with dequantisation noise, from draws in [-1/2, 1/2)."""
    return x if draws is None else x + draws * widths


def _bits(log_density: Tensor, x: Tensor, widths: Tensor) -> Tensor:
    """Bits per dimension of the quantisation bins of these widths, from a density in nats."""
    return -(log_density + log_volume(widths, x)) / (x[0].numel() * math.log(2))


def _mixed_statistics(
    weights: Mapping[str, float], known: Mapping[str, ChannelStatistics]
) -> ChannelStatistics:
    """Weighted means of channel statistics; a domain without them keeps the clean colours."""
    shares = {name: weight for name, weight in weights.items() if name in known}
    if not shares:
        return UNMATCHED
    total = math.fsum(shares.values())

    def mean(terms: Sequence[tuple[float, tuple[float, float, float]]]) -> Any:
        return tuple(math.fsum(w * row[c] for w, row in terms) for c in range(3))

    parts = [(weight / total, known[name]) for name, weight in shares.items()]
    clean_mean = mean([(w, row.clean_mean) for w, row in parts])
    clean_std = mean([(w, row.clean_std) for w, row in parts])
    clean = ChannelStatistics(clean_mean, clean_std, clean_mean, clean_std)
    every = [(weight, known.get(name, clean)) for name, weight in weights.items()]
    return ChannelStatistics(
        clean_mean,
        clean_std,
        mean([(w, row.degraded_mean) for w, row in every]),
        mean([(w, row.degraded_std) for w, row in every]),
    )


def channels_last(model: DeFlow) -> DeFlow:
    """The model with its convolutions in the memory order that CPUs and GPUs are fastest in."""
    # Module.to takes memory_format, but its annotations do not say so.
    result: DeFlow = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return result
