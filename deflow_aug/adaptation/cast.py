"""Taking a colour cast off a trained shift: what survives downscaling is no degradation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deflow_aug import randomness
from deflow_aug.model import DeFlow
from deflow_aug.randomness import Stream

ROUNDS = 4
"""Corrections, each with new draws; the flow is not linear."""

STEP = 2 / 255
"""What is added to a channel to see where its mean lies in the latents."""

BATCH = 16


@torch.no_grad()
def remove_cast(
    model: DeFlow,
    images: Sequence[Tensor],
    domains: Sequence[str] | None = None,
    *,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Shift mu of degraded domains such that degrading leaves mean colours as they are.

    The means of the two domains' latents differ by what the photographs show as well, and with some
    dozens of them a fair part of mu is that: degraded images then have a cast of a level or so. By
    eq. (6) h(x) = h(y), so a degradation has no business with what survives downscaling, mean
    colours first of all. How far they move is measured on images; a colour's direction in
    the latents is the mean of

        d_c = (f(x + e 1_c; h(x)) - f(x; h(x))) / e

    over images and positions, and mu loses sum_c cast_c d_c, a few times over.

    Args:
        model: it is changed.
        images: what the model degrades, clean images of the training at best: batches
            [N, 3, H, W] in [0, 1], in the flow's colours, H and W multiples of
            ``config.size_multiple``. All count by their pixels.
        domains: names; None: all degraded domains.
        seed: of the noise.

    Returns:
        The cast of each domain's red, green and blue before, in levels (1/255).

    Raises:
        ValueError: if the model's numbers are not finite, before anything is changed.
    """
    parts = [part for batch in images for part in batch.split(BATCH)]
    batches = [_Encoded(model, x, seed, i) for i, x in enumerate(parts)]
    pixels = sum(part.numel() for part in parts)
    shares = [part.numel() / pixels for part in parts]
    directions = [
        sum(
            (share * batch.directions[i] for share, batch in zip(shares, batches, strict=True)),
            start=torch.zeros(()),
        )
        for i in range(len(model.domain_shifts()))
    ]
    found = {}
    for name in model.config.domains if domains is None else domains:
        number = 1 + model.config.domains.index(name)
        for turn in range(ROUNDS):
            casts = [
                batch.cast(model, name, (seed, Stream.CAST, number, turn)) for batch in batches
            ]
            cast = sum((s * c for s, c in zip(shares, casts, strict=True)), start=torch.zeros(()))
            if not bool(cast.isfinite().all()):
                raise ValueError(f"the colours of degraded images in {name} are not finite")
            if turn == 0:
                found[name] = [round(255 * one, 3) for one in cast.tolist()]
            for shift, direction in zip(model.domain_shifts(), directions, strict=True):
                mean = shift.means()[number]
                shift.assign(number, mean - cast.to(mean) @ direction, shift.factors()[number])
    return found


class _Encoded:
    """Images, their features and latents."""

    def __init__(self, model: DeFlow, x: Tensor, seed: int, number: int) -> None:
        device, scale = next(model.parameters()).device, model.config.scale
        self.x = x.to(device)
        self.number = number
        height, width = (side // scale for side in x.shape[-2:])
        noise = randomness.normal((len(x), 3, height, width), seed, Stream.CAST, 0, number)
        self.features = model.features(self.x, noise.to(device))
        self.latents, _ = model.encode(self.x, self.features)
        moved: list[list[Tensor]] = []
        for channel in range(3):
            step = self.x.new_zeros(3)
            step[channel] = STEP
            other, _ = model.encode(self.x + step[:, None, None], self.features)
            moved.append(
                [(b - a).mean((0, 2, 3)) / STEP for a, b in zip(self.latents, other, strict=True)]
            )
        self.directions = [torch.stack(rows) for rows in zip(*moved, strict=True)]
        """Of each latent, [3, C]."""

    def cast(self, model: DeFlow, domain: str, key: tuple[int, ...]) -> Tensor:
        """Mean of what degrading adds to each channel, [3]."""
        noise = [
            randomness.normal(tuple(z.shape), *key, self.number, i).to(z.device)
            for i, z in enumerate(self.latents)
        ]
        tau = torch.ones(len(self.x), device=self.x.device)
        shifted = model.degrade(self.latents, noise, [domain] * len(self.x), tau)
        return (model.decode(shifted, self.features) - self.x).mean((0, 2, 3))
