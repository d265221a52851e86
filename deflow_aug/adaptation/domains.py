"""The shifts of whole domains, fitted after training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from deflow_aug.adaptation.closed_form import Moments, closed_form, latent_moments
from deflow_aug.config import CLEAN
from deflow_aug.model import DeFlow
from deflow_aug.randomness import Stream


def fit_shifts(
    model: DeFlow, images: Mapping[str, Iterable[Tensor]], *, seed: int = 0
) -> dict[str, int]:
    """Set mu and M of degraded domains from the latents of images, all positions pooled.

    C_x and m_x are measured where images of the clean domain are given, for a flow meets N(0, I)
    only as far as it was trained; otherwise they are I and 0, what training aims at.

    Args:
        images: of the clean and the degraded domains by name, as they come (colours not matched):
            tensors [3, H, W] or [B, 3, H, W], uint8 or float in [0, 1], of any sizes of at least
            ``config.size_multiple``. They are gone through once.
        seed: of the dequantisation noise and the noise on h.

    Returns:
        The number of images of each domain.

    Raises:
        ValueError: for unknown domains, one without images, and images that are too small, of
            another shape or type, or not finite.
    """
    known = (CLEAN, *model.config.domains)
    if unknown := sorted(set(images) - set(known)):
        raise ValueError(f"unknown domain {', '.join(unknown)}; known are {', '.join(known)}")
    counts, moments = dict.fromkeys(images, 0), {}
    for name, batches in images.items():
        total: list[Moments] = []
        for number, batch in enumerate(batches):
            x = _checked(batch, model.config.size_multiple, f"batch {number} of the domain {name}")
            key = (seed, Stream.FIT, known.index(name), number)
            new = latent_moments(model, x, name, *key)
            total = [a + b for a, b in zip(total, new, strict=True)] if total else new
            counts[name] += len(x)
        if not total:
            raise ValueError(f"no images of the domain {name} to fit its shift to")
        moments[name] = total
    for i, shift in enumerate(model.domain_shifts()):
        for name in moments.keys() - {CLEAN}:
            y = moments[name][i]
            x_mean, x_covariance = torch.zeros_like(y.mean), torch.eye(len(y.mean)).double()
            if CLEAN in moments:
                x_mean, x_covariance = moments[CLEAN][i].mean, moments[CLEAN][i].covariance
            fitted = closed_form(
                y.mean - x_mean, y.covariance - x_covariance, shift.kind == "diagonal"
            )
            shift.assign(known.index(name), *fitted)
    return counts


def _checked(batch: Tensor, least: int, name: str) -> Tensor:
    """Images as floats in [0, 1], [B, 3, H, W], that are no smaller than ``least``."""
    x = batch[None] if batch.ndim == 3 else batch
    if x.ndim != 4 or x.shape[1] != 3 or not len(x) or min(x.shape[2:]) < least:
        raise ValueError(
            f"{name}: expected images of shape [3, H, W] or [B, 3, H, W], H and W at least "
            f"{least}, got {list(batch.shape)}"
        )
    if x.dtype == torch.uint8:
        return x.float() / 255
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected uint8, or floats in [0, 1], got {x.dtype}")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name}: some values are NaN or infinite; leave these images out")
    return x.float()
