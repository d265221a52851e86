"""RandomDeFlow for Kornia: ``pip install deflow-aug[kornia]``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deflow_aug import transforms
from deflow_aug.degrader import DeFlowDegrader
from deflow_aug.model import Domain
from deflow_aug.transforms.groups import Params
from deflow_aug.transforms.random_deflow import DEFAULT_TEMPERATURE

try:
    from kornia.augmentation import IntensityAugmentationBase2D
    from kornia.augmentation.random_generator import RandomGeneratorBase
except ImportError as error:
    raise ImportError(
        f"deflow_aug.transforms.kornia needs Kornia ({error}): pip install deflow-aug[kornia]"
    ) from error


FIXED = -1  # in place of a domain's number: the setting, whatever it is


class RandomDeFlow(IntensityAugmentationBase2D):  # type: ignore[misc]
    """Degrade images [B, C, H, W], floats in [0, 1], grey or RGB, by DeFlow, as in Kornia.

    It goes alone or into ``AugmentationSequential``, ``ImageSequential`` and ``VideoSequential``:
    masks, boxes and keypoints pass through, and ``augment(x, params=augment._params)`` repeats a
    draw. No gradient flows through. The parameters of an image are ``seed`` (of its latents),
    ``temperature`` and ``domain`` (its number; -1 if it is no name).

    Seeds are drawn as Kornia draws everything, from torch's global generator, unless ``seed`` is
    given: then this augmentation has draws of its own, as
    :class:`deflow_aug.transforms.RandomDeFlow`. (Whether an image is changed at all, for p < 1, is
    drawn by Kornia.)

    Args:
        degrader: what degrades; it computes on its own device, wherever the images are.
        temperature, domain, seed: see :class:`deflow_aug.transforms.RandomDeFlow`.
        same_on_batch: one temperature, domain and seed, hence one noise, for the whole batch.
        p: probability with which an image is degraded.
        keepdim: whether to keep the shape of images (C, H, W) and (H, W).
    """

    def __init__(
        self,
        degrader: DeFlowDegrader,
        temperature: float | tuple[float, float] = DEFAULT_TEMPERATURE,
        *,
        domain: Domain | None = None,
        same_on_batch: bool = False,
        p: float = 1.0,
        keepdim: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(p=p, same_on_batch=same_on_batch, p_batch=1.0, keepdim=keepdim)
        deflow = transforms.RandomDeFlow(
            degrader, temperature=temperature, domain=domain, seed=seed
        )
        self._param_generator = _Draws(deflow)

    def apply_transform(
        self,
        input: Tensor,
        params: dict[str, Tensor],
        flags: dict[str, Any],
        transform: Tensor | None = None,
    ) -> Tensor:
        if len(input) == 0:
            return input
        generator: _Draws = self._param_generator
        draws = generator.from_tensors(params)
        if self.p < 1:  # with p = 1 Kornia applies to all, whatever batch_prob says
            gates = torch.atleast_1d(params["batch_prob"] > 0.5).tolist()
            draws = draws * (len(gates) if len(draws) == 1 else 1)
            draws = [{**one, "apply": gate} for one, gate in zip(draws, gates, strict=True)]
        degraded: Tensor = generator.deflow.transform(input, {"images": draws})
        return degraded


class _Draws(RandomGeneratorBase):  # type: ignore[misc]
    """The draws of a batch, as tensors."""

    def __init__(self, deflow: transforms.RandomDeFlow) -> None:
        super().__init__()
        self.deflow = deflow
        self.domains = deflow.degrader.domains

    def __repr__(self) -> str:
        return self.deflow.extra_repr()

    def make_samplers(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing: draws are made on the CPU, whatever the device."""

    def forward(
        self, batch_shape: tuple[int, ...], same_on_batch: bool = False
    ) -> dict[str, Tensor]:
        images = batch_shape[0]
        count = min(1, images) if same_on_batch else images
        if self.deflow.seed is None:
            names = torch.randint(2**63 - 1, (count,), device="cpu").tolist()
            draws = [self.deflow.draw(name) for name in names]
        else:
            draws = (
                self.deflow.make_params(torch.zeros(count, 3, 1, 1, device="cpu"))["images"]
                if count
                else []
            )
        draws = draws * images if same_on_batch else draws
        numbers = [self._number(one["domain"]) for one in draws]
        columns: dict[str, tuple[list[Any], torch.dtype]] = {
            "seed": ([one["seed"] for one in draws], torch.int64),
            "temperature": ([one["temperature"] for one in draws], torch.float64),
            "domain": (numbers, torch.int64),
        }
        return {
            name: torch.tensor(values, dtype=dtype, device="cpu")
            for name, (values, dtype) in columns.items()
        }

    def _number(self, domain: Domain | None) -> int:
        return self.domains.index(domain) if domain in self.domains else FIXED

    def from_tensors(self, params: dict[str, Tensor]) -> list[Params]:
        columns = (params[name].tolist() for name in ("seed", "temperature", "domain"))
        return [
            {"apply": True, "seed": seed, "temperature": tau, "domain": self._domain(number)}
            for seed, tau, number in zip(*columns, strict=True)
        ]

    def _domain(self, number: int) -> Domain | None:
        return self.deflow.domain if number == FIXED else self.domains[number]
