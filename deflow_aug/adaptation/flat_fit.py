"""M of a trained model, from the areas of photographs where nothing but noise differs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from deflow_aug.adaptation.closed_form import (
    POSITIONS_PER_CHANNEL,
    Moments,
    closed_form,
    latents_as_in_training,
)
from deflow_aug.adaptation.photographs import tiles_of
from deflow_aug.adaptation.probing import Encoded, encoded
from deflow_aug.config import CLEAN
from deflow_aug.flat import (
    SIDE,
    Image8,
    NoFlatAreasError,
    flat_areas,
    flat_windows,
    measured,
    windows,
)
from deflow_aug.latent import ShiftHealth
from deflow_aug.model import DeFlow
from deflow_aug.noise_curve import noise_curve, variance_at
from deflow_aug.randomness import Stream

Mask = NDArray[np.bool_]


@torch.no_grad()
def fit_in_flat_areas(
    model: DeFlow,
    degraded: Mapping[str, Iterable[Image8]],
    clean: Iterable[Image8],
    crops: Sequence[Tensor],
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Set M of degraded domains by their latents in flat areas, as strong as M was.

    Where latents meet noise that the dequantisation noise of the training hides, of high
    frequencies above all, the likelihood hardly depends on M, and some thousand steps leave it near
    its start: as white noise. In closed form nothing has to be waited for; but over whole
    photographs C_y - C_x holds what the two sides show as well. In flat areas it does not:

        Sigma ~ the positive part of C_y - C_x over flat positions, each of 512 x 512 pixels about
        their own mean.

    Those of degraded photographs are found by :func:`deflow_aug.flat.flat_areas`; flat in clean
    ones are windows that vary less than noise does at their brightness. How strong the noise is
    stays as it was learned from all of the photographs: M is scaled such that degrading ``crops``
    adds as much variance as before. An M that had collapsed is not scaled.

    Args:
        model: it is changed. A model with M = 0 by its settings is not.
        degraded: photographs uint8 [H, W, 3] of each domain to fit; they are gone through twice. Of
            each, at most four squares of 512 x 512 pixels are encoded.
        clean: clean photographs, likewise, gone through once.
        crops: of clean images, batches [N, 3, H, W] in [0, 1], in the flow's colours, H and W
            multiples of ``config.size_multiple``.
        seed: of the noise, and of the choice of squares and windows.

    Returns:
        By what M of each domain was scaled.

    Raises:
        TypeError, ValueError: for photographs of another kind, or none.
        NoFlatAreasError: if a domain or the clean photographs have too few flat areas; nothing is
            changed then.
    """
    if model.config.shift == "zero":
        return {}
    curves, noisy = {}, {}
    for name, photographs in degraded.items():
        usual = flat_windows(photographs, seed)
        curves[name] = noise_curve(usual)
        most = max(float(one.variance.mean()) for one in usual)
        noisy[name] = _degraded_moments(model, name, photographs, most, seed)
    quiet = _clean_moments(model, clean, curves, seed)
    for name in degraded:
        _check_counts(f"the degraded photographs of {name}", noisy[name])
        _check_counts("the clean photographs", quiet[name])
        _check_noise(name, noisy[name], quiet[name])
    probes, scales = encoded(model, crops, seed), {}
    for name in degraded:
        number = 1 + model.config.domains.index(name)
        shifts = model.domain_shifts()
        alive = not all(ShiftHealth.of(shift, number).collapsed for shift in shifts)
        before = _variance(model, probes, name, seed)
        for shift, y, x in zip(shifts, noisy[name], quiet[name], strict=True):
            excess = y.covariance - x.covariance
            mean = shift.means()[number]
            shift.assign(number, *closed_form(mean, excess, shift.kind == "diagonal"))
        after = _variance(model, probes, name, seed)
        scales[name] = math.sqrt(before / after) if alive else 1.0
        for shift in shifts:
            factor = shift.factors()[number] * scales[name]
            shift.assign(number, shift.means()[number], factor)
    return scales


def _degraded_moments(
    model: DeFlow, name: str, photographs: Iterable[Image8], most: float, seed: int
) -> list[Moments]:
    """Of flat positions in pieces whose noise has at most the variance ``most``."""
    total: list[Moments] = []
    for number, photograph in enumerate(photographs):
        key = seed, Stream.FIT, model.config.domains.index(name) + 1, number
        for part, piece in enumerate(_pieces(model, photograph, key)):
            found, flat = flat_areas(piece)
            if flat.any() and found.variance.mean() <= most:
                latents = _latents(model, piece, name, *key, part)
                total = _with(total, latents, piece, flat)
    return total


def _clean_moments(
    model: DeFlow,
    photographs: Iterable[Image8],
    curves: Mapping[str, NDArray[np.float64]],
    seed: int,
) -> dict[str, list[Moments]]:
    """Of positions that vary less than the noise of each domain does."""
    total: dict[str, list[Moments]] = {name: [] for name in curves}
    for number, photograph in enumerate(photographs):
        key = seed, Stream.FIT, 0, number
        for part, piece in enumerate(_pieces(model, photograph, key)):
            mean, variance, usable = measured(windows(piece, SIDE))
            latents: list[Tensor] = []
            for name, curve in curves.items():
                noise = variance_at(curve, mean).mean(1)
                flat = usable & (variance.mean(1) <= noise)
                if flat.any():
                    latents = latents or _latents(model, piece, CLEAN, *key, part)
                    sides = piece.shape[0] // SIDE, piece.shape[1] // SIDE
                    total[name] = _with(total[name], latents, piece, flat.reshape(sides))
    return total


def _pieces(model: DeFlow, photograph: Image8, key: Sequence[int]) -> Iterable[Image8]:
    multiple = math.lcm(SIDE, model.config.size_multiple)
    for top, left, height, width in tiles_of(photograph, multiple, key):
        yield photograph[top : top + height, left : left + width]


def _latents(model: DeFlow, piece: Image8, domain: str, *key: int) -> list[Tensor]:
    x = torch.from_numpy(np.array(piece)).permute(2, 0, 1)[None] / 255
    return latents_as_in_training(model, x, domain, *key)


def _with(total: list[Moments], latents: list[Tensor], piece: Image8, flat: Mask) -> list[Moments]:
    """Moments so far, and those of a piece whose windows in the mask are flat."""
    pixels = torch.from_numpy(np.kron(flat, np.ones((SIDE, SIDE), np.float32)))[None]
    # A position may be larger than a window: all of its pixels must be flat.
    sides = (len(piece) // z.shape[2] for z in latents)
    wheres = [-F.max_pool2d(-pixels, side)[0] > 0 for side in sides]
    if not all(where.any() for where in wheres):
        return total
    own = [Moments.of(z, where[None]) for z, where in zip(latents, wheres, strict=True)]
    # About the piece's own mean: that of another differs by colour and brightness.
    own = [replace(one, mean=torch.zeros_like(one.mean)) for one in own]
    return [a + b for a, b in zip(total, own, strict=True)] if total else own


def _check_counts(what: str, moments: Sequence[Moments]) -> None:
    if not moments or any(m.count < POSITIONS_PER_CHANNEL * len(m.mean) for m in moments):
        have = " and ".join(str(m.count) for m in moments) or "no"
        need = " and ".join(str(POSITIONS_PER_CHANNEL * len(m.mean)) for m in moments)
        raise NoFlatAreasError(
            f"{what} have {have} flat positions of the latents"
            + (f", {need} are needed" if need else "")
            + "; give more or larger ones"
        )


def _check_noise(name: str, y: Sequence[Moments], x: Sequence[Moments]) -> None:
    if all((a.covariance - b.covariance).trace() <= 0 for a, b in zip(y, x, strict=True)):
        raise NoFlatAreasError(
            f"in flat areas the latents of {name} vary no more than those of clean photographs"
        )


def _variance(model: DeFlow, probes: Sequence[Encoded], domain: str, seed: int) -> float:
    """Of what degrading adds to an image's channel about its mean; of all pixels the mean."""
    total = sum(
        float(probe.added(model, domain, seed, Stream.CAST, 1, i).var((2, 3), correction=0).sum())
        * probe.x[0, 0].numel()
        for i, probe in enumerate(probes)
    )
    return total / sum(probe.x.numel() for probe in probes)
