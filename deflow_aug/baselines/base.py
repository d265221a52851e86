"""What every baseline is: samples of a degradation, one image at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from deflow_aug.arguments import Seed, is_integer, per_image_seeds, per_image_temperature
from deflow_aug.images import Picture, unpack


class Baseline(ABC):
    """A degradation with the ``degrade`` of :class:`~deflow_aug.DeFlowDegrader`.

    Images may be of all kinds that it takes: PIL images, arrays and tensors, one or a batch.
    """

    name: ClassVar[str]
    """Short, for tables."""

    def degrade(
        self,
        img: Picture,
        temperature: float | Sequence[float] | Tensor = 1.0,
        n_samples: int = 1,
        *,
        seed: Seed = None,
    ) -> Any:
        """Degraded versions of clean images.

        Args:
            img: an image or a batch of images.
            temperature: one for all or one for each image of the batch. It scales the noise, or
                how far each step is from doing nothing; 0 gives the input back.
            n_samples: number of samples of each image.
            seed: fixes the result of each image, whatever it is batched with. Images that share a
                seed share the draws: give a batch one seed for each image. None draws fresh seeds.
                No global random state is read or changed.

        Returns:
            The kind of image that came in. For n_samples > 1 a list of PIL images, or an array or
            tensor with the samples as a new first axis.

        Raises:
            TypeError, ValueError: for images of other kinds, values out of range, or arguments
                that do not fit the batch.
        """
        if not is_integer(n_samples) or n_samples < 1:
            raise ValueError(f"n_samples must be an integer of at least 1, got {n_samples!r}")
        unpacked = unpack(img)
        images = unpacked.pixels
        seeds = per_image_seeds(seed, len(images))
        tau = per_image_temperature(temperature, len(images)).tolist()
        samples = torch.empty(int(n_samples), *images.shape, device=images.device)
        for number in range(int(n_samples)):
            for i, image in enumerate(images):
                samples[number, i] = (
                    self._sample(image, tau[i], seeds[i], number) if tau[i] > 0 else image
                )
        return unpacked.pack(samples, n_samples > 1)

    @abstractmethod
    def _sample(self, image: Tensor, temperature: float, seed: int, number: int) -> Tensor:
        """Sample ``number`` of an image [3, H, W] in [0, 1], not clamped; temperature > 0."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What was fitted or set, as JSON values."""


class Nothing(Baseline):
    """No degradation: what a training on clean images alone has."""

    name = "nothing"

    def _sample(self, image: Tensor, temperature: float, seed: int, number: int) -> Tensor:
        return image

    def describe(self) -> dict[str, Any]:
        """Empty: there is nothing to fit."""
        return {}
