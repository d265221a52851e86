"""Taking a colour cast off a trained shift: what survives downscaling is no degradation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deflow_aug.adaptation.probing import Encoded, encoded
from deflow_aug.model import DeFlow
from deflow_aug.randomness import Stream

ROUNDS = 4
"""Corrections, each with new draws; the flow is not linear."""

STEP = 2 / 255
"""What is added to a channel to see where its mean lies in the latents."""


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
    batches = encoded(model, images, seed)
    pixels = sum(batch.x.numel() for batch in batches)
    shares = [batch.x.numel() / pixels for batch in batches]
    by_batch = [_directions(model, batch) for batch in batches]
    directions = [
        sum((share * one for share, one in zip(shares, of_latent, strict=True)), torch.zeros(()))
        for of_latent in zip(*by_batch, strict=True)
    ]
    found = {}
    for name in model.config.domains if domains is None else domains:
        number = 1 + model.config.domains.index(name)
        for turn in range(ROUNDS):
            key = seed, Stream.CAST, number, turn
            casts = [
                batch.added(model, name, *key, i).mean((0, 2, 3)) for i, batch in enumerate(batches)
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


def _directions(model: DeFlow, batch: Encoded) -> list[Tensor]:
    """Of each latent the means of its channels that a step of each colour moves, [3, C]."""
    moved: list[list[Tensor]] = []
    for channel in range(3):
        step = batch.x.new_zeros(3)
        step[channel] = STEP
        other, _ = model.encode(batch.x + step[:, None, None], batch.features)
        moved.append(
            [(b - a).mean((0, 2, 3)) / STEP for a, b in zip(batch.latents, other, strict=True)]
        )
    return [torch.stack(rows) for rows in zip(*moved, strict=True)]
