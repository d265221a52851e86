"""The loss of a batch: what is computed from a :class:`~deflow_aug.data.batches.Batch`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from deflow_aug import randomness
from deflow_aug.data.batches import Batch
from deflow_aug.model import DeFlow
from deflow_aug.randomness import Stream
from deflow_aug.recompute import keeping_activations

UNPAIRED, DEGRADED, CLEAN_PARTNER = 0, 1, 2
"""Last number of a noise key: of what kind of image in the batch the noise is."""


class Inputs(NamedTuple):
    """A batch as the model takes it; tensors on its device.

    Args:
        images: in [0, 1], colours matched, float32 [B, 3, H, W].
        domains: domain number of each, int64 [B].
        dequantization: draws uniform in [-1/2, 1/2), like the images.
        noise: standard normal draws for h(x), [B, 3, H/s, W/s].
    """

    images: Tensor
    domains: Tensor
    dequantization: Tensor
    noise: Tensor


class Pairs(NamedTuple):
    """Paired images as the model takes them.

    Args:
        degraded: the degraded images.
        clean: their clean partners; both have the same noise for h(x), as the method has it,
            where what is degraded is decoded with the features of the clean image.
    """

    degraded: Inputs
    clean: Inputs


class Objective(nn.Module):
    """Bits per dimension of each item: its forward pass is all that a step differentiates.

    Unpaired images count by their marginal likelihood (eq. 1, 4, 7), pairs by the likelihood of
    the degraded image given the clean one (eq. 5).

    Args:
        precision: "bf16" runs the conditioning network, and nothing else, in bfloat16.
        keep_activations: rather than computing them again in the backward pass.
    """

    def __init__(self, model: DeFlow, precision: str, keep_activations: bool = False) -> None:
        super().__init__()
        self.model, self.precision, self.keep_activations = model, precision, keep_activations

    def forward(self, unpaired: Inputs | None, paired: Pairs | None) -> Tensor:
        """Of the unpaired images, then of the pairs, float32 [B]."""
        bits = []
        device = next(self.model.parameters()).device.type
        keeping = keeping_activations(self.keep_activations)
        with keeping, torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            if unpaired is not None:
                images, domains, dequantization, noise = unpaired
                bits.append(
                    self.model.nll(images, domains, dequantization=dequantization, noise=noise)
                )
            if paired is not None:
                degraded, clean = paired
                bits.append(
                    self.model.paired_nll(
                        degraded.images,
                        clean.images,
                        degraded.domains,
                        dequantization=(degraded.dequantization, clean.dequantization),
                        noise=(degraded.noise, clean.noise),
                    )
                )
        return torch.cat(bits)


def inputs(batch: Batch, model: DeFlow, seed: int, device: torch.device) -> Inputs:
    """Unpaired images with their noise; an item's noise depends on (seed, step, index) alone."""
    return _inputs(batch.images, batch.domains, batch, model, seed, device, UNPAIRED)


def pairs(batch: Batch, model: DeFlow, seed: int, device: torch.device) -> Pairs:
    """Paired images with their noise.

    Raises:
        ValueError: if the batch is not one of pairs.
    """
    if batch.clean is None:
        raise ValueError("expected paired data, got a batch without clean partners")
    degraded = _inputs(batch.images, batch.domains, batch, model, seed, device, DEGRADED)
    names = ("clean",) * len(batch.domains)
    clean = _inputs(batch.clean, names, batch, model, seed, device, CLEAN_PARTNER)
    return Pairs(degraded, clean._replace(noise=degraded.noise))


def _inputs(
    images: Tensor,
    names: tuple[str, ...],
    batch: Batch,
    model: DeFlow,
    seed: int,
    device: torch.device,
    kind: int,
) -> Inputs:
    shape, scale = images.shape[1:], model.config.scale
    small = (shape[0], shape[1] // scale, shape[2] // scale)
    keys = [(batch.step, index, kind) for index in batch.indices]
    dequantization = torch.stack(
        [randomness.uniform(tuple(shape), seed, Stream.DEQUANTIZATION, *key) for key in keys]
    )
    noise = torch.stack([randomness.normal(small, seed, Stream.CONDITIONING, *key) for key in keys])
    # Bytes travel to the device; only there are they numbers of four bytes each.
    images = images.to(device, non_blocking=True).to(memory_format=torch.channels_last)
    dequantization, noise = (
        draws.to(device, memory_format=torch.channels_last) for draws in (dequantization, noise)
    )
    matched = model.match_colours(images.float() / 255, names)
    return Inputs(matched, model.domain_numbers(names, images), dequantization, noise)
