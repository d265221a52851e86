"""One more domain for a trained model, from a few photographs."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deflow_aug import hub
from deflow_aug.adaptation.cast import remove_cast
from deflow_aug.adaptation.closed_form import POSITIONS_PER_CHANNEL, ascend, closed_form
from deflow_aug.adaptation.photographs import (
    PHOTOGRAPHS,
    AdaptationError,
    Photograph,
    Reader,
    Source,
)
from deflow_aug.arguments import RANDOM
from deflow_aug.config import CLEAN
from deflow_aug.degrader import DeFlowDegrader
from deflow_aug.model import DeFlow

LIMIT = 2.0
"""How often the median noise level a photograph may have before it is scaled down to that."""

FAINT = 0.25
"""Added variance below which it matters that clean latents are N(0, I) only nearly."""


def adapt(
    degrader: DeFlowDegrader,
    images: Source,
    *,
    name: str,
    clean: Source | None = None,
    steps: int = 0,
    limit: float | None = LIMIT,
    photographs: int = PHOTOGRAPHS,
    seed: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> DeFlowDegrader:
    """A degrader with one more domain, fitted to a few photographs; flow and encoder stay.

    The closed form of this package, from moments of each photograph about its own mean, averaged
    over the photographs, with three provisions for having few of them:

    - A photograph much noisier than the others would decide the average alone. One whose added
      variance is above ``limit`` times the median is scaled down to that, as by a temperature.
    - Means differ by content more than by degradation. From each photograph's mean that of its
      downscaled version (by s) is taken off: it shows the same content, and what survives
      downscaling is, by eq. 6, no degradation. What is left of a cast :func:`remove_cast` takes
      off.
    - Without clean images C_x = I and m_x = 0, as the flow was trained to; with them, C_x is
      measured, and their mean likewise taken off.

    Args:
        degrader: it is not changed.
        images: degraded photographs of any size: a folder, or images as ``degrade`` takes them.
            At most four squares of 512 x 512 pixels of each are looked at.
        name: of the new domain.
        clean: clean images of like content (a folder or images), if there are.
        steps: steps of maximum likelihood (L-BFGS) on M after the closed form, under
            z_y ~ N(m_x + mu, C_x + M M^T) with these moments. Where C_x = I, the closed form is
            the maximum already; else it is not in directions where C_y - C_x is negative.
        limit: see above; None for none.
        photographs: of a folder with more than these, as many are drawn at random.
        seed: of the noise and the choice of photographs and tiles.
        progress: called after each image, with "degraded" or "clean" and the number so far.

    Returns:
        A degrader on the same device, whose ``training_info["adapted"][name]`` tells the facts.

    Raises:
        AdaptationError: if the name is taken or reserved, or no image can be used.
        ConfigError: if the name cannot be a domain's.
        OSError: if a folder does not exist.
    """
    config = degrader.model.config
    if name in (*config.domains, CLEAN, RANDOM):
        raise AdaptationError(
            f"the name {name!r} is taken: this model has {', '.join((CLEAN, *config.domains))}, "
            f"and {RANDOM!r} draws one of its degraded domains; choose another name"
        )
    if steps < 0 or seed < 0 or photographs < 1:
        raise AdaptationError(
            f"steps and seed must be at least 0 and photographs at least 1, got {steps}, {seed} "
            f"and {photographs}"
        )
    if limit is not None and not limit >= 1:
        raise AdaptationError(f"limit must be at least 1, or None, got {limit}")
    model = enlarged(degrader.model, name)
    reader = Reader(model, name, seed, photographs, progress)
    y, facts = reader.read(images, "degraded")
    x, clean_facts = (None, None) if clean is None else reader.read(clean, "clean")
    shifts = model.domain_shifts()
    references = [
        torch.eye(len(y[0].latents[i].mean)).double()
        if x is None
        else _average([photo.latents[i].covariance for photo in x])
        for i in range(len(shifts))
    ]
    levels = [_level(photo, references) for photo in y]
    shares = _shares(levels, limit)
    clipped = []
    for i, (shift, reference) in enumerate(zip(shifts, references, strict=True)):
        content = 0.0 if x is None else _average([photo.offset(i) for photo in x])
        mean = _average(
            [math.sqrt(w) * (photo.offset(i) - content) for w, photo in zip(shares, y, strict=True)]
        )
        excess = _average(
            [
                w * (photo.latents[i].covariance - reference)
                for w, photo in zip(shares, y, strict=True)
            ]
        )
        diagonal = shift.kind == "diagonal"
        mean, factor = closed_form(mean, excess, diagonal)
        values = excess.diagonal() if diagonal else torch.linalg.eigvalsh(excess)
        clipped.append(float(-values.clamp(max=0).sum() / values.abs().sum().clamp(min=1e-12)))
        if steps:
            factor = ascend(factor, reference, excess, steps, diagonal)
        shift.assign(len(model.config.domains), mean, factor)
    # Of clean photographs if there are; mean colours are no degradation of degraded ones either.
    remove_cast(model, [photo.corner for photo in x or y], [name], seed=seed)
    _warn_of_few(y)
    if x is None and statistics.median(levels) < FAINT:
        warnings.warn(
            f"the photographs add only {statistics.median(levels):.2f} to the variance 1 that "
            "clean latents are taken to have, so the fit may be far too weak: give clean images "
            "of like content as well, to measure that variance",
            stacklevel=2,
        )
    info = dict(degrader.training_info)
    record: dict[str, Any] = {
        "degraded": facts,
        "clean": clean_facts or "none: the clean latents count as N(0, I)",
        "noise_levels": {
            "what": "variance added to the clean latents, per dimension, of each photograph",
            "median": round(statistics.median(levels), 4),
            "lowest": round(min(levels), 4),
            "highest": round(max(levels), 4),
            "scaled_down": sum(share < 1 for share in shares),
        },
        "limit": limit,
        "clipped_share": [round(share, 4) for share in clipped],
        "steps": steps,
        "seed": seed,
    }
    info["adapted"] = {**info.get("adapted", {}), name: record}
    return DeFlowDegrader(
        model,
        training=info,
        device=degrader.device,
        conditioning_noise=degrader.conditioning_noise,
        dequantize=degrader.dequantize,
    )


def enlarged(model: DeFlow, name: str) -> DeFlow:
    """A copy of a model with one more degraded domain, whose mu and M are zero.

    A model whose M is fixed at zero becomes one of kind "full": the new domain is to have an M.
    """
    config = model.config
    kind = "full" if config.shift == "zero" else config.shift
    config = replace(config, domains=(*config.domains, name), shift=kind)
    state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    for i, shift in enumerate(model.domain_shifts()):
        factor = shift.factor if shift.kind == "diagonal" else shift.factors()[1:]
        for part, tensor in (("mean", shift.mean), ("factor", factor)):
            grown = torch.cat([tensor.detach(), torch.zeros_like(tensor[:1])])
            state[f"shifts.{i}.{part}"] = grown.contiguous()
    return hub.build(config, state, "the adapted model")


def _level(photo: Photograph, references: Sequence[Tensor]) -> float:
    """Variance added to the clean latents, per dimension."""
    pairs = list(zip(photo.latents, references, strict=True))
    added = sum(m.count * float((m.covariance - c).diagonal().sum()) for m, c in pairs)
    return added / sum(m.count * len(m.mean) for m, _ in pairs)


def _shares(levels: Sequence[float], limit: float | None) -> list[float]:
    """What scales each level down to at most ``limit`` times their median."""
    most = math.inf if limit is None else limit * statistics.median(levels)
    if most <= 0:  # most photographs are as clean as the reference: there is no level to keep to
        most = math.inf
    return [1.0 if level <= most else most / level for level in levels]


def _average(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).mean(0)


def _warn_of_few(photos: Sequence[Photograph]) -> None:
    for i, first in enumerate(photos[0].latents):
        positions, channels = sum(p.latents[i].count for p in photos), len(first.mean)
        if positions < POSITIONS_PER_CHANNEL * channels:
            warnings.warn(
                f"the photographs have {positions} positions of the latent of {channels} channels, "
                f"too few for a good estimate of their covariance; at least "
                f"{POSITIONS_PER_CHANNEL * channels} are better: give more or larger photographs",
                stacklevel=3,
            )
            return
