"""What makes the low-quality half of a training pair: downscaling, degrader, classical steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from deflow_aug import randomness
from deflow_aug.arguments import temperature_range
from deflow_aug.degrader import EIGHT_BIT_STEPS, DeFlowDegrader
from deflow_aug.images import unpack
from deflow_aug.randomness import Stream
from deflow_aug.resize import bicubic_downscale
from deflow_aug.sampling import image_seed
from deflow_aug.transforms.random_deflow import DEFAULT_TEMPERATURE, refuse_forked_gpu

# The names of lq, gt and their paths, by the convention of a framework.
KEYS = {
    "basicsr": ("lq", "gt", "lq_path", "gt_path"),
    "kair": ("L", "H", "L_path", "H_path"),
}


@runtime_checkable
class Transform(Protocol):
    """A random step whose draw is apart from its application: ``deflow_aug.transforms`` are."""

    def draw(self, *key: int) -> Any:
        """What is random about one image; depends on the key alone."""
        ...

    def transform(self, inpt: Any, params: Any) -> Any:
        """The batch [B, 3, h, w] changed, by ``params["images"][i]`` its image i."""
        ...


# A plain callable takes and returns one image, float [3, h, w] in [0, 1].
Step: TypeAlias = Transform | Callable[[Tensor], Tensor]
Steps: TypeAlias = Step | Sequence[Step] | None


def check_keys(keys: str | None) -> str | None:
    """
    Raises:
        ValueError: for a convention that is not known.
    """
    if keys is not None and keys not in KEYS:
        raise ValueError(f"keys must be None, 'basicsr' or 'kair', got {keys!r}")
    return keys


class Degradation:
    """lq of gt: steps before, bicubic downscaling, degradation, steps after, rounding to 8 bits.

    Args:
        degrader: a DeFlowDegrader, or a transform with draws of its own.
        scale: of the downscaling.
        temperature: of a DeFlowDegrader: a number, or a range that each image draws from.
        domain: of a DeFlowDegrader, as in its ``degrade``.
        before: steps on the high-resolution image before it is downscaled; gt stays as it is.
        after: steps on the degraded image. They must keep its size.

    Everything random is named by (seed, epoch, index), except what plain callables draw.
    """

    def __init__(
        self,
        degrader: DeFlowDegrader | Transform,
        scale: int,
        temperature: float | Sequence[float] | None = None,
        domain: Any = None,
        before: Steps = None,
        after: Steps = None,
    ) -> None:
        if isinstance(scale, bool) or not isinstance(scale, int) or scale < 1:
            raise ValueError(f"scale must be an integer of at least 1, got {scale!r}")
        if not isinstance(degrader, DeFlowDegrader):
            if not isinstance(degrader, Transform):
                raise TypeError(
                    f"degrader must be a DeFlowDegrader or one of deflow_aug.transforms, got "
                    f"{type(degrader).__qualname__}"
                )
            if temperature is not None or domain is not None:
                raise ValueError(
                    f"temperature and domain are those of a DeFlowDegrader; give them to the "
                    f"{type(degrader).__qualname__} when it is made"
                )
        self.degrader, self.scale, self.domain = degrader, scale, domain
        if temperature is None:
            temperature = DEFAULT_TEMPERATURE
        self.temperature = temperature_range(temperature)
        if isinstance(degrader, DeFlowDegrader):
            degrader.check_domain(domain)
        self.before, self.after = _steps(before, "before"), _steps(after, "after")
        self._process = os.getpid()

    @property
    def device(self) -> torch.device:
        """Where lq is made."""
        devices = [one.device for one in degraders_of(self.degrader)]
        return next((one for one in devices if one.type != "cpu"), torch.device("cpu"))

    @torch.no_grad()
    def __call__(
        self, gt: Tensor, seed: int | None, epoch: int, indices: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """lq [B, 3, H / scale, W / scale] and gt, float32 in [0, 1] on the device.

        Args:
            gt: clean images [B, 3, H, W], uint8 or float in [0, 1].
            seed, epoch, indices: name the draws of each image; None draws anew.
        """
        refuse_forked_gpu(self.device, self._process)
        run = randomness.fresh_seed() if seed is None else seed
        seeds = [image_seed(run, epoch, index) for index in indices]
        gt = unpack(gt.to(self.device, non_blocking=True)).pixels
        image = gt
        for number, step in enumerate(self.before):
            image = _apply(step, image, _seeds_of_step(seeds, number))
        if isinstance(self.degrader, DeFlowDegrader):
            lq, _ = self.degrader.feed(
                image,
                self.scale,
                self.temperature,
                seed=run,
                step=epoch,
                indices=indices,
                domain=self.domain,
            )
        else:
            small = bicubic_downscale(image, self.scale).clamp(0, 1)
            lq = _apply(self.degrader, small, seeds)
        for number, step in enumerate(self.after, len(self.before)):
            lq = _apply(step, lq, _seeds_of_step(seeds, number))
        expected = (len(gt), 3, gt.shape[-2] // self.scale, gt.shape[-1] // self.scale)
        if tuple(lq.shape) != expected:
            raise ValueError(
                f"the steps before and after must leave lq with shape {expected}, got "
                f"{tuple(lq.shape)}: resize it back in a last step"
            )
        return (lq.clamp(0, 1) * EIGHT_BIT_STEPS).round() / EIGHT_BIT_STEPS, gt

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A spawned worker unpickles its copy, a forked one does not.
        self.__dict__.update(state, _process=os.getpid())


def degraders_of(transform: Any) -> Iterator[DeFlowDegrader]:
    """The degraders that a transform holds, or the one that it is."""
    if isinstance(transform, DeFlowDegrader):
        yield transform
    elif isinstance(transform, (list, tuple)):
        for one in transform:
            yield from degraders_of(one)
    elif isinstance(transform, torch.nn.Module):
        for module in transform.modules():
            for value in vars(module).values():
                if isinstance(value, (DeFlowDegrader, list, tuple)):
                    yield from degraders_of(value)


def named(keys: str | None, lq: Tensor, gt: Tensor, path: Any = None) -> Any:
    """The pair as a tuple, or as a dict by the convention ``keys``, with paths if there are."""
    if keys is None:
        return lq, gt
    names = KEYS[keys]
    pair: dict[str, Any] = {names[0]: lq, names[1]: gt}
    if path is not None:
        pair |= {names[2]: path, names[3]: path}
    return pair


def _steps(steps: Steps, name: str) -> tuple[Step, ...]:
    if steps is None:
        return ()
    given = tuple(steps) if isinstance(steps, (list, tuple)) else (steps,)
    for step in given:
        if not callable(step) and not isinstance(step, Transform):
            raise TypeError(f"{name} takes callables and transforms, got {step!r}")
    return given


def _seeds_of_step(seeds: Sequence[int], number: int) -> list[int]:
    return [int(randomness.generator(one, Stream.CHOICE, number).integers(2**63)) for one in seeds]


def _apply(step: Step, images: Tensor, seeds: Sequence[int]) -> Tensor:
    if isinstance(step, Transform):
        draws = {"images": [step.draw(one) for one in seeds]}
        changed: Tensor = step.transform(images, draws)
        return changed.to(images.device)
    # Copies, since a callable may work in place, and the images may be gt.
    results = torch.stack([step(image.clone()) for image in images])
    if not results.is_floating_point():
        raise TypeError(
            f"steps before and after take and return float images in [0, 1], got {results.dtype} "
            f"from {step!r}"
        )
    return results.to(images)
