"""What can be evaluated: anything that degrades; and what DeFlow can tell besides, densities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from .noise import Image8

if TYPE_CHECKING:
    from deflow_aug.degrader import DeFlowDegrader


class Degrader(Protocol):
    """Degrades pictures, uint8 [H, W, 3]; several samples have a first axis."""

    def degrade(
        self, img: Image8, temperature: float = 1.0, n_samples: int = 1, *, seed: int | None = None
    ) -> Any:
        """Samples of ``img``; the same seed gives the same."""


@runtime_checkable
class Density(Protocol):
    """A degrader that also knows how probable pictures are."""

    def bits(self, img: Image8, degraded: bool) -> float:
        """Negative log2-probability of a picture, uint8 [H, W, 3], per dimension (3 H W)."""


@dataclass(frozen=True)
class OfDomain:
    """A :class:`~deflow_aug.DeFlowDegrader` held to one of its domains; has a :class:`Density`.

    Args:
        degrader: the model.
        domain: name of a degraded domain; None where it has only one.

    Raises:
        ValueError: if there is no such domain, or several and none is named.
    """

    degrader: DeFlowDegrader
    domain: str | None = None

    def __post_init__(self) -> None:
        self.degrader.check_domain(self.domain)
        if self.domain is None:
            object.__setattr__(self, "domain", self.degrader.domains[0])

    def degrade(
        self, img: Image8, temperature: float = 1.0, n_samples: int = 1, *, seed: int | None = None
    ) -> Any:
        """:meth:`DeFlowDegrader.degrade`."""
        return self.degrader.degrade(img, temperature, n_samples, seed=seed, domain=self.domain)

    def bits(self, img: Image8, degraded: bool) -> float:
        """Bits per dimension of an 8-bit picture in the degraded, or the clean, domain."""
        return -float(
            self.degrader.log_prob(img, self.domain if degraded and self.domain else "clean")
        )


def draw(
    name: str, degrader: Degrader, clean: Image8, temperature: float, draws: int, seed: int
) -> list[Image8]:
    """So many samples of a clean picture, 8 bits, uint8 [H, W, 3] each.

    Raises:
        TypeError: if a degrader (called ``name``) returns anything else.
    """
    result = degrader.degrade(clean, temperature=temperature, n_samples=draws, seed=seed)
    samples = [result] if draws == 1 else list(result)
    for sample in samples:
        array = isinstance(sample, np.ndarray)
        if not array or sample.dtype != np.uint8 or sample.shape != clean.shape:
            found = f"{sample.dtype} {sample.shape}" if array else type(sample).__qualname__
            raise TypeError(f"{name}: expected samples uint8 {clean.shape}, got {found}")
    if len(samples) != draws:
        raise TypeError(f"{name}: expected {draws} samples, got {len(samples)}")
    return samples
