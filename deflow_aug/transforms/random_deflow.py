"""RandomDeFlow: a learned degradation as a transform."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deflow_aug import randomness
from deflow_aug.arguments import RANDOM, temperature_range
from deflow_aug.degrader import DeFlowDegrader
from deflow_aug.model import Domain
from deflow_aug.randomness import Stream
from deflow_aug.transforms.base import ImageTransform
from deflow_aug.transforms.groups import Params

DEFAULT_TEMPERATURE = (0.5, 1.2)


class RandomDeFlow(ImageTransform):
    """Degrade images by DeFlow, each at a random temperature.

    How it is called, what samples it takes, and how its draws are named: see
    :class:`~deflow_aug.transforms.ImageTransform`. A draw holds ``apply``, ``temperature``,
    ``seed`` (of the latents, as in :meth:`DeFlowDegrader.degrade`) and ``domain``.

    Args:
        degrader: what degrades; it computes on its own device, wherever the images are.
        p: probability with which an image is degraded.
        temperature: a number, or (least, greatest): uniform, drawn for each image.
        domain: which of the model's degraded domains, as in :meth:`DeFlowDegrader.degrade`: a
            name, {name: weight} for a shift between domains, or "random", drawn for each image.
            May be left out if there is only one. (Other odds:
            ``MixedDegradation([(RandomDeFlow(d, domain="low"), 0.9), ...])``.)
        seed: see :class:`~deflow_aug.transforms.ImageTransform`.

    Raises:
        TypeError, ValueError: for settings out of range or domains that the model does not know.
        RuntimeError: when called, if the degrader is on a GPU and the process is a fork of the one
            that put it there.
    """

    def __init__(
        self,
        degrader: DeFlowDegrader,
        p: float = 1.0,
        temperature: float | tuple[float, float] = DEFAULT_TEMPERATURE,
        *,
        domain: Domain | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(p, seed=seed)
        if not isinstance(degrader, DeFlowDegrader):
            raise TypeError(
                f"degrader must be a DeFlowDegrader, got {type(degrader).__qualname__}; load one "
                f"with DeFlowDegrader.from_pretrained(...)"
            )
        self.degrader = degrader
        self.temperature = temperature_range(temperature)
        degrader.check_domain(domain)
        self.domain = dict(domain) if isinstance(domain, Mapping) else domain

    def _draw(self, *key: int) -> Params:
        draw = randomness.generator(*key, Stream.TEMPERATURE)
        temperature = float(draw.uniform(*self.temperature))
        return {
            "temperature": temperature,
            "seed": int(draw.integers(2**63)),
            "domain": self._drawn_domain(*key),
        }

    def _drawn_domain(self, *key: int) -> Domain | None:
        known = self.degrader.domains
        if self.domain != RANDOM or RANDOM in known:
            return self.domain
        return known[pick([1.0] * len(known), *key)]

    def _change(self, pixels: Tensor, params: Sequence[Params]) -> Tensor:
        refuse_forked_gpu(self.degrader.device, self._home)
        degraded: Tensor = self.degrader.degrade(
            pixels,
            [one["temperature"] for one in params],
            seed=[one["seed"] for one in params],
            domain=[one["domain"] for one in params],
        )
        return degraded

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, domain={self.domain!r}, {super().extra_repr()}"


def refuse_forked_gpu(device: torch.device, home: int) -> None:
    """Raise RuntimeError if ``device`` is a GPU, and ``home``, the process that set the model up,
    is not this one: a forked process cannot use its parent's GPU."""
    if device.type == "cuda" and os.getpid() != home:
        raise RuntimeError(
            f"the degrader is on {device}, and this process (a worker of a DataLoader?) is a fork "
            f"of the one that put it there, where GPUs cannot be used. Choose one: put the "
            f'degrader on the CPU (degrader.to("cpu")); start the workers with '
            f'DataLoader(..., multiprocessing_context="spawn"), or have none (num_workers=0); or '
            f"leave the workers to load images and degrade whole batches on the GPU, with "
            f"deflow_aug.DegradingLoader(DataLoader(CleanCrops(...), ...), degrader)"
        )


def pick(weights: Sequence[float], *key: int) -> int:
    """The number of one of these, drawn with these weights (positive, of any sum)."""
    draw = float(randomness.generator(*key, Stream.CHOICE, 1).random()) * sum(weights)
    for number, weight in enumerate(weights):
        draw -= weight
        if draw < 0:
            return number
    return len(weights) - 1
