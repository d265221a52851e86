"""Samples of a window of an image: what is asked of each image, and how it is computed.

A whole image is its own largest window. Everything random belongs to positions of the whole
image, so that a window has the noise that it has there.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deflow_aug import randomness
from deflow_aug.config import CLEAN
from deflow_aug.latent import normalized_weights
from deflow_aug.model import DeFlow, Domain
from deflow_aug.randomness import Stream
from deflow_aug.resize import pad_to_multiple

Seed = int | Sequence[int] | None
Domains = Domain | Sequence[Domain] | None

RANDOM = "random"
"""In place of a domain's name: one of the model's degraded domains, drawn for each image."""


@dataclass(frozen=True)
class Request:
    """What is asked of each image of a batch.

    Args:
        seeds: one an image.
        temperature: tau of each, [B].
        domains: the degraded domain of each: a name, a mix, or ``RANDOM``.
        samples: their number.
        restoring: from the degraded domain to the clean one, not the other way.
        mean: of restorations: the mean of the posterior latents, and no noise anywhere.
        conditioning_noise, dequantize: as in ``DeFlowDegrader``.
    """

    seeds: Sequence[int]
    temperature: Tensor
    domains: Sequence[Domain]
    samples: int = 1
    restoring: bool = False
    mean: bool = False
    conditioning_noise: bool = True
    dequantize: bool = False

    def of(self, images: slice) -> Request:
        """What is asked of some of the images."""
        return dataclasses.replace(
            self,
            seeds=self.seeds[images],
            temperature=self.temperature[images],
            domains=self.domains[images],
        )


@dataclass(frozen=True)
class Place:
    """Where a window begins in the whole image, and the size of that, not padded."""

    top: int
    left: int
    height: int
    width: int


@torch.inference_mode()
def sample(model: DeFlow, pixels: Tensor, request: Request, place: Place | None = None) -> Tensor:
    """Samples [N, B, 3, h, w] of images, or of windows of images, not clamped.

    Args:
        pixels: [B, 3, h, w] in [0, 1], of any size, on any device. A window must end at a multiple
            of ``config.size_multiple`` or at the image's own border.
        place: of the window, which begins at multiples of ``config.size_multiple``; None if
            ``pixels`` are whole images.
    """
    height, width = pixels.shape[-2:]
    x = prepared(model, pixels)
    noise = _Noise(model, request, x, place or Place(0, 0, height, width))
    clean: list[Domain] = [CLEAN] * len(x)
    target: Sequence[Domain]
    x = model.match_colours(x, request.domains if request.restoring else clean)
    tau = request.temperature.to(x.device)
    noisy = not (request.restoring and request.mean)
    h_noise = noise.conditioning() if noisy and request.conditioning_noise else None
    features = model.features(x, h_noise)
    z: list[Tensor] = []
    samples = []
    for number in range(request.samples):
        if noisy and request.dequantize:
            width_of_bin = tau.clamp(max=1) / model.config.dequantization_steps
            shift = width_of_bin[:, None, None, None] * noise.dequantization(number)
            z, _ = model.encode(x + shift, features)
        elif not z:  # the same for all samples
            z, _ = model.encode(x, features)
        if request.restoring:
            draws = noise.latent(number) if noisy else None
            shifted, target = model.restore(z, draws, request.domains), clean
        else:
            target = _drawn(request, model.config.domains, number)
            shifted = model.degrade(z, noise.latent(number), target, tau)
        y = model.unmatch_colours(model.decode(shifted, features), target)
        samples.append(y[..., :height, :width])
    return torch.stack(samples)


def prepared(model: DeFlow, pixels: Tensor) -> Tensor:
    """Images as the model takes them: on its device, padded to multiples, channels last."""
    device = next(model.parameters()).device
    padded = pad_to_multiple(pixels.to(device), model.config.size_multiple)
    return padded.contiguous(memory_format=torch.channels_last)


class _Noise:
    """The draws for a window ``x`` of padded images."""

    def __init__(self, model: DeFlow, request: Request, x: Tensor, place: Place) -> None:
        self.model, self.seeds, self.device = model, request.seeds, x.device
        multiple = model.config.size_multiple
        height, width = (-(-side // multiple) for side in (place.height, place.width))
        self.whole = (height * multiple, width * multiple)
        self.rows = slice(place.top, place.top + x.shape[-2])
        self.columns = slice(place.left, place.left + x.shape[-1])

    def conditioning(self) -> Tensor:
        """Standard normal draws for h(x)."""
        scale = self.model.config.scale
        shape = (3, self.whole[0] // scale, self.whole[1] // scale)
        return self._draws(randomness.normal_part, shape, Stream.CONDITIONING)

    def dequantization(self, number: int) -> Tensor:
        """Uniform draws for the pixels of the sample with this number."""
        shape = (3, *self.whole)
        return self._draws(randomness.uniform_part, shape, Stream.DEQUANTIZATION, number)

    def latent(self, number: int) -> list[Tensor]:
        """Standard normal draws for each latent of the sample with this number."""
        shapes = self.model.latent_shapes(*self.whole)
        return [
            self._draws(randomness.normal_part, shape, Stream.LATENT, number, i)
            for i, shape in enumerate(shapes)
        ]

    def _draws(self, part: randomness.Part, shape: tuple[int, int, int], *key: int) -> Tensor:
        factor = self.whole[0] // shape[1]
        rows, columns = (
            slice(one.start // factor, one.stop // factor) for one in (self.rows, self.columns)
        )
        draws = [part(shape, rows, columns, seed, *key) for seed in self.seeds]
        return torch.stack(draws).to(self.device)


def _drawn(request: Request, known: Sequence[str], number: int) -> Sequence[Domain]:
    """The domains of the sample with this number: "random" drawn, from each image's seed."""
    if RANDOM in known:
        return request.domains
    return [
        known[int(randomness.generator(seed, Stream.CHOICE, number).integers(len(known)))]
        if one == RANDOM
        else one
        for one, seed in zip(request.domains, request.seeds, strict=True)
    ]


# -- what callers give, checked, for each image ----------------------------------------------------


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


def image_seed(seed: int, step: int, index: int) -> int:
    """The seed of image ``index`` in step or epoch ``step`` of what ``seed`` began."""
    # The key without its last integer names the crop of the same image.
    return int(randomness.generator(seed, Stream.CROP, step, index, 1).integers(2**63))


def is_integer(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def per_image_temperature(temperature: float | Sequence[float] | Tensor, images: int) -> Tensor:
    try:
        if isinstance(temperature, bool):
            raise TypeError("a truth value")
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
