"""What callers give, checked: one value for each image of a batch, ranges, counts and seeds."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deflow_aug import randomness
from deflow_aug.latent import normalized_weights
from deflow_aug.model import Domain

Seed = int | Sequence[int] | None
Domains = Domain | Sequence[Domain] | None

RANDOM = "random"
"""In place of a domain's name: one of the model's degraded domains, drawn for each image."""


def per_image_domains(
    domain: Domains, images: int, known: Sequence[str], restoring: bool
) -> list[Domain]:
    """The degraded domain of each image: a name, a mix, or "random"."""
    if domain is None or isinstance(domain, (str, Mapping)):
        return [degraded_domain(domain, known, restoring)] * images
    if not isinstance(domain, (Sequence, np.ndarray)):
        raise TypeError(
            f"domain must be a name, {{name: weight}}, or one of these for each image, "
            f"got {domain!r}"
        )
    if len(domain) != images:
        raise ValueError(f"expected one domain, or {images} (one an image), got {len(domain)}")
    return [degraded_domain(one, known, restoring) for one in domain]


def degraded_domain(domain: Domain | None, known: Sequence[str], restoring: bool) -> Domain:
    """One of the degraded domains that are ``known``, a mix of them, or "random"."""
    if domain is None and len(known) == 1:
        return known[0]
    if isinstance(domain, Mapping):
        weights = normalized_weights(domain, known)
        return weights if len(weights) > 1 else next(iter(weights))
    if domain is not None and domain in known:
        return domain
    if domain == RANDOM and not restoring:
        return RANDOM
    if domain == RANDOM:
        raise ValueError(
            f'domain="random" is for degrade: name the domain that the images come from '
            f"({', '.join(known)}), or give a mix {{name: weight}}"
        )
    raise ValueError(
        f"domain must be one of this model's degraded domains ({', '.join(known)}), got {domain!r}"
    )


def per_image_seeds(seed: Seed, images: int) -> list[int]:
    if seed is None:
        return [randomness.fresh_seed() for _ in range(images)]
    seeds = list(seed) if isinstance(seed, (Sequence, np.ndarray)) else [seed] * images
    if len(seeds) != images:
        raise ValueError(f"expected one seed, or {images} (one an image), got {len(seeds)}")
    for one in seeds:
        if not is_integer(one) or one < 0:
            raise ValueError(f"a seed is an integer of at least 0, got {one!r}")
    return [int(one) for one in seeds]


def is_integer(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def per_image_temperature(
    temperature: float | Sequence[float] | Tensor | np.ndarray[Any, Any], images: int
) -> Tensor:
    try:
        if isinstance(temperature, bool):
            raise TypeError("a truth value")
        if isinstance(temperature, np.ndarray):  # of any byte order, and strides
            temperature = np.array(temperature, np.float32)
        # torch.set_default_device is for tensors of the caller.
        device = None if isinstance(temperature, Tensor) else "cpu"
        tau = torch.as_tensor(temperature, dtype=torch.float32, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"temperature must be a number, or one for each image, got {temperature!r}"
        ) from error
    if tau.ndim == 0:
        tau = tau.expand(images)
    if tau.shape != (images,):
        raise ValueError(
            f"temperature must be a number, or {images} numbers (one an image), "
            f"got shape {tuple(tau.shape)}"
        )
    if not bool((torch.isfinite(tau) & (tau >= 0)).all()):
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    return tau


def temperature_range(temperature: object) -> tuple[float, float]:
    """The two ends of a range of temperatures, (least, greatest) or a number, checked."""
    return span("temperature", temperature, 0.0)


def span(name: str, value: Any, low: float, high: float = math.inf) -> tuple[float, float]:
    """A range of settings: a number, or (least, greatest), all within [low, high].

    Raises:
        ValueError: for anything else, tensors and arrays too.
    """
    pair = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(pair) != 2 or not all(map(is_number, pair)):
        raise ValueError(f"{name} must be a number or (least, greatest), got {value!r}")
    if not low <= pair[0] <= pair[1] <= high:
        bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(
            f"{name} must be {bounds}, and its least value no more than its greatest, got {value!r}"
        )
    return float(pair[0]), float(pair[1])


def is_number(value: Any) -> bool:
    """Whether it is finite and real; truth values and tensors are no numbers."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def whole(name: str, value: Any) -> int:
    """An integer of at least 0, of Python, NumPy or (without axes) PyTorch.

    Raises:
        ValueError: for anything else.
    """
    truth = isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) == torch.bool
    try:
        number = -1 if truth or getattr(value, "ndim", 0) else operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
    return number


def run_seed(seed: Any) -> int | None:
    """The one seed of a run, checked: None, or an integer of at least 0."""
    return None if seed is None else whole("seed", seed)
