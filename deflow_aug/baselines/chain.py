"""The classical chain: blur, resizing, noise and JPEG, of strengths drawn for each image."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deflow_aug.baselines.base import Baseline
from deflow_aug.transforms.classical import GaussianNoise, RandomBlur, RandomJPEG, RandomRescale
from deflow_aug.transforms.groups import Params

BLUR = (0.2, 1.5)  # standard deviation, pixels
SCALE = (0.5, 1.0)
NOISE = (1.0, 15.0)  # standard deviation, levels
QUALITY = (50, 95)


class ClassicalChain(Baseline):
    """One round of blur, downscaling and enlarging, white noise and JPEG, at constant size.

    The degradation that BSRGAN (Zhang et al. 2021) and Real-ESRGAN (Wang et al. 2021) train
    super-resolution with, in the order of the latter, once instead of twice. Each strength is
    uniform in a range, drawn for each image. Real-ESRGAN draws, in its first round, blur of 0.2 to
    3 pixels, scales of 0.15 to 1.5, noise of 1 to 30 levels and JPEG of quality 30 to 95; in its
    second blur up to 1.5. Those are for pictures that lose a factor of four; here, where size is
    kept, they are moderate: blur 0.2 to 1.5, scales 0.5 to 1, noise 1 to 15, quality 50 to 95. Of
    kernels only isotropic Gaussians, of noise only white Gaussian. Nothing is fitted: the chain
    is meant to hold for every photograph, and has no way to look at those of a domain.

    The temperature multiplies how far each strength is from doing nothing (blur 0, scale 1, noise
    0, quality 100), up to the strongest that the steps take.
    """

    name = "classical chain"

    def __init__(self) -> None:
        noise = (NOISE[0] / 255, NOISE[1] / 255)
        # Each with the strength at which it does nothing (JPEG: least), and its strongest.
        self._steps = (
            (RandomBlur(BLUR), 0.0, 1000.0),
            (RandomRescale(SCALE), 1.0, 1e-3),
            (GaussianNoise(noise), 0.0, 1000.0),
            (RandomJPEG(QUALITY), 100, 1),
        )

    def draw(self, temperature: float, seed: int, number: int) -> list[Params]:
        """The draws of the four steps for sample ``number``, as JSON values."""
        draws = []
        for i, (step, nothing, most) in enumerate(self._steps):
            params = step.draw(seed, number, i)
            strength = nothing + temperature * (params[step.name] - nothing)
            strength = max(strength, most) if most < nothing else min(strength, most)
            params[step.name] = round(strength) if isinstance(nothing, int) else strength
            draws.append(params)
        return draws

    def _sample(self, image: Tensor, temperature: float, seed: int, number: int) -> Tensor:
        batch = image[None]
        draws = self.draw(temperature, seed, number)
        for (step, _, _), params in zip(self._steps, draws, strict=True):
            batch = step.apply_to(batch, [params])
        return batch[0]

    def describe(self) -> dict[str, Any]:
        """The ranges, which are set and not fitted; blur in pixels, noise in levels."""
        ranges = {"blur": BLUR, "scale": SCALE, "noise": NOISE, "quality": QUALITY}
        return {name: list(one) for name, one in ranges.items()}
