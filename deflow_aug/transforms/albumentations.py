"""DeFlow for Albumentations: ``pip install deflow-aug[albumentations]``.

(Albumentations requires opencv-python-headless, this package opencv-python: both bring the module
``cv2``. They go together if their versions are the same; uninstalling one breaks the other.)
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from deflow_aug import hub, transforms
from deflow_aug.arguments import temperature_range
from deflow_aug.degrader import DeFlowDegrader
from deflow_aug.model import Domain
from deflow_aug.transforms.random_deflow import DEFAULT_TEMPERATURE

try:
    from albumentations.core.transforms_interface import ImageOnlyTransform
except ImportError as error:
    raise ImportError(
        f"deflow_aug.transforms.albumentations needs Albumentations ({error}): "
        f"pip install deflow-aug[albumentations]"
    ) from error


class DeFlow(ImageOnlyTransform):  # type: ignore[misc]
    """Degrade images by DeFlow, as an Albumentations ``ImageOnlyTransform``.

    Draws come from the generators that Albumentations seeds (``A.Compose([...], seed=...)``), one
    integer a call. In the workers of a DataLoader, where unseeded generators are copies of one
    another, the worker's own seed is mixed in. A draw is ``temperature``, ``seed`` (of the
    latents) and ``domain``; ``A.ReplayCompose`` repeats it.

    ``A.to_dict`` stores the name of the weights, and ``A.from_dict`` loads them (import this
    module first, so that Albumentations knows the class). That needs ``degrader`` to be a name.

    Targets:
        image, volume

    Image types:
        uint8, float32 in [0, 1]; grey, RGB or RGBA

    Args:
        degrader: weights, as in :meth:`DeFlowDegrader.from_pretrained`: a bundled name, a folder
            or a Hub id, loaded when first needed; or a DeFlowDegrader.
        temperature, domain: see :class:`deflow_aug.transforms.RandomDeFlow`.
        device: where to compute; only for weights by name. (GPUs do not work in forked workers.)
        p: probability with which an image is degraded.
    """

    def __init__(
        self,
        degrader: str | os.PathLike[str] | DeFlowDegrader = hub.DEFAULT_WEIGHTS,
        temperature: float | tuple[float, float] = DEFAULT_TEMPERATURE,
        domain: Domain | None = None,
        device: str = "cpu",
        p: float = 0.5,
    ) -> None:
        super().__init__(p=p)
        self.degrader: str | DeFlowDegrader
        self.temperature = temperature_range(temperature)
        self.domain = dict(domain) if isinstance(domain, Mapping) else domain
        self.device = device
        self._deflow: transforms.RandomDeFlow | None = None
        if isinstance(degrader, DeFlowDegrader):
            self.degrader = degrader
            self._deflow = self._made(degrader)
        else:
            self.degrader = os.fspath(degrader)

    def _made(self, degrader: DeFlowDegrader) -> transforms.RandomDeFlow:
        return transforms.RandomDeFlow(degrader, temperature=self.temperature, domain=self.domain)

    @property
    def deflow(self) -> transforms.RandomDeFlow:
        """The transform that this wraps; loads the weights."""
        if self._deflow is None:
            self._deflow = self._made(_loaded(str(self.degrader), self.device))
        return self._deflow

    def get_params(self) -> dict[str, Any]:
        """A draw: ``apply``, ``temperature``, ``seed`` and ``domain``."""
        name = [int(self.random_generator.integers(2**63))]
        worker = get_worker_info()
        if self.seed is None and worker is not None:
            name.append(worker.seed)
        return {"deflow": self.deflow.draw(*name)}

    def apply(self, img: NDArray[Any], deflow: dict[str, Any], **params: Any) -> NDArray[Any]:
        """The degraded image (H, W) or (H, W, C)."""
        degraded: NDArray[Any] = self.deflow.transform(img, {"images": [deflow]})
        return degraded

    def get_transform_init_args_names(self) -> tuple[str, ...]:
        """The settings, for ``repr`` and serialisation."""
        return ("degrader", "temperature", "domain", "device")

    def get_transform_init_args(self) -> dict[str, Any]:
        """The settings and their values."""
        return {name: getattr(self, name) for name in self.get_transform_init_args_names()}

    def to_dict_private(self) -> dict[str, Any]:
        """The settings as plain values, for ``A.to_dict`` and ``A.save``."""
        if not isinstance(self.degrader, str):
            raise NotImplementedError(
                "a DeFlow that was given a degrader cannot be serialised: give it the name of the "
                'weights instead, such as DeFlow("camera-noise") or DeFlow("path/of/the/weights")'
            )
        state: dict[str, Any] = super().to_dict_private()
        return {**state, "temperature": list(self.temperature)}

    def get_dict_with_id(self) -> dict[str, Any]:
        """What ``A.ReplayCompose`` keeps, in memory, so that a degrader may be in it."""
        own = {"__class_fullname__": self.get_class_fullname(), "id": id(self)}
        return {**own, **self.get_base_init_args(), **self.get_transform_init_args()}


@functools.lru_cache(maxsize=4)
def _loaded(weights: str, device: str) -> DeFlowDegrader:
    # Kept, since every A.ReplayCompose.replay builds its transforms anew.
    return DeFlowDegrader.from_pretrained(weights, device=device)
