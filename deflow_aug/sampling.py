"""Samples of a window of an image: what is asked of each image, and how it is computed.

A whole image is its own largest window. Everything random belongs to positions of the whole
image, so that a window has the noise that it has there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deflow_aug import randomness
from deflow_aug.arguments import RANDOM
from deflow_aug.config import CLEAN
from deflow_aug.dequantization import bin_widths
from deflow_aug.model import DeFlow, Domain
from deflow_aug.randomness import Stream
from deflow_aug.resize import pad_to_multiple


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
            bins = tau.clamp(max=1)[:, None, None, None] * bin_widths(x, model.config)
            shift = bins * noise.dequantization(number)
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


def image_seed(seed: int, step: int, index: int) -> int:
    """The seed of image ``index`` in step or epoch ``step`` of what ``seed`` began."""
    # The key without its last integer names the crop of the same image.
    return int(randomness.generator(seed, Stream.CROP, step, index, 1).integers(2**63))
