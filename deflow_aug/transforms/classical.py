"""The classical steps that a learned degradation is mixed with, and no more.

torchvision, Albumentations and Kornia have these and many others, for pipelines of their own. Here
they are those that a photograph meets on its way (blur, resizing, noise, JPEG), with draws that
are named as :class:`~deflow_aug.transforms.RandomDeFlow`'s are.
"""

from __future__ import annotations

import io
import math
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from deflow_aug import randomness
from deflow_aug.randomness import Stream
from deflow_aug.resize import bicubic_downscale, pad_symmetric
from deflow_aug.transforms.base import ImageTransform
from deflow_aug.transforms.checks import span
from deflow_aug.transforms.groups import Params


class _OneByOne(ImageTransform):
    """A step of one strength, ``name``, uniform in a range, that is applied image by image."""

    name: str

    def __init__(self, strength: tuple[float, float], p: float, seed: int | None) -> None:
        super().__init__(p, seed=seed)
        self.strength = strength

    def _draw(self, *key: int) -> Params:
        draw = randomness.generator(*key, Stream.CHOICE, 1)
        return {self.name: float(draw.uniform(*self.strength))}

    def _change(self, pixels: Tensor, params: Sequence[Params]) -> Tensor:
        pairs = zip(pixels, params, strict=True)
        return torch.stack([self._one(image, one) for image, one in pairs]).clamp(0, 1)

    @abstractmethod
    def _one(self, image: Tensor, params: Params) -> Tensor:
        """The image [3, H, W], changed."""

    def extra_repr(self) -> str:
        return f"{self.name}={self.strength}, {super().extra_repr()}"


class RandomJPEG(_OneByOne):
    """JPEG compression, by Pillow on the CPU, with halved chroma resolution.

    Args:
        quality: 1 to 100, an integer or (least, greatest), uniform over the integers.
        p, seed: see :class:`~deflow_aug.transforms.ImageTransform`.
    """

    name = "quality"

    def __init__(
        self,
        quality: float | tuple[float, float] = (60, 95),
        p: float = 1.0,
        *,
        seed: int | None = None,
    ) -> None:
        low, high = span("quality", quality, 1, 100)
        if not (low.is_integer() and high.is_integer()):
            raise ValueError(f"quality must be an integer or two of them, got {quality!r}")
        super().__init__((low, high), p, seed)

    def _draw(self, *key: int) -> Params:
        low, high = map(int, self.strength)
        draw = randomness.generator(*key, Stream.CHOICE, 1)
        return {self.name: int(draw.integers(low, high, endpoint=True))}

    def _one(self, image: Tensor, params: Params) -> Tensor:
        eight_bits = (image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        buffer = io.BytesIO()
        Image.fromarray(eight_bits).save(buffer, "JPEG", quality=params[self.name], subsampling=2)
        decoded = np.array(Image.open(buffer))
        return torch.from_numpy(decoded).to(image.device).permute(2, 0, 1).float() / 255


class RandomBlur(_OneByOne):
    """Blur by a Gaussian, cut off at three standard deviations; borders are mirrored.

    Args:
        sigma: its standard deviation in pixels, a number or (least, greatest), uniform.
        p, seed: see :class:`~deflow_aug.transforms.ImageTransform`.
    """

    name = "sigma"

    def __init__(
        self,
        sigma: float | tuple[float, float] = (0.2, 2.0),
        p: float = 1.0,
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__(span("sigma", sigma, 0, 1000), p, seed)

    def _one(self, image: Tensor, params: Params) -> Tensor:
        sigma = params[self.name]
        reach = math.ceil(3 * sigma)
        if reach == 0:
            return image
        offsets = torch.arange(-reach, reach + 1, dtype=torch.float64, device="cpu")
        kernel = torch.softmax(-0.5 * (offsets / sigma) ** 2, 0).to(image)
        padded = pad_symmetric(image[:, None], reach, reach, reach, reach)
        blurred = F.conv2d(F.conv2d(padded, kernel[None, None, None]), kernel[None, None, :, None])
        return blurred[:, 0]


class RandomRescale(_OneByOne):
    """Downscale and enlarge again to the size that came in: bicubic, antialiased.

    Args:
        scale: the size in between, over (0, 1], a number or (least, greatest), uniform.
        p, seed: see :class:`~deflow_aug.transforms.ImageTransform`.
    """

    name = "scale"

    def __init__(
        self,
        scale: float | tuple[float, float] = (0.5, 1.0),
        p: float = 1.0,
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__(span("scale", scale, 1e-3, 1), p, seed)

    def _one(self, image: Tensor, params: Params) -> Tensor:
        size = (image.shape[-2], image.shape[-1])
        small = [max(1, round(side * params[self.name])) for side in size]
        for target in (small, list(size)):
            image = F.interpolate(
                image[None], size=target, mode="bicubic", antialias=True, align_corners=False
            )[0]
        return image


class GaussianNoise(_OneByOne):
    """White Gaussian noise, independent for each pixel and channel.

    Args:
        sigma: its standard deviation where white is 1, a number or (least, greatest), uniform.
        p, seed: see :class:`~deflow_aug.transforms.ImageTransform`.
    """

    name = "sigma"

    def __init__(
        self,
        sigma: float | tuple[float, float] = (0.0, 10 / 255),
        p: float = 1.0,
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__(span("sigma", sigma, 0), p, seed)

    def _draw(self, *key: int) -> Params:
        seed = int(randomness.generator(*key, Stream.CHOICE, 2).integers(2**63))
        return {**super()._draw(*key), "seed": seed}

    def _one(self, image: Tensor, params: Params) -> Tensor:
        noise = randomness.normal(tuple(image.shape), params["seed"], Stream.LATENT)
        return image + params[self.name] * noise.to(image.device)


class Resize(ImageTransform):
    """Downscale by an integer factor, as MATLAB's ``imresize`` does: bicubic, antialiased.

    The result has ceil(H / factor) x ceil(W / factor) pixels. Alpha takes the nearest pixels.

    Args:
        factor: an integer of at least 1.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        if not isinstance(factor, int) or isinstance(factor, bool) or factor < 1:
            raise ValueError(f"factor must be an integer of at least 1, got {factor!r}")
        self.factor = factor

    def _draw(self, *key: int) -> Params:
        return {}

    def _change(self, pixels: Tensor, params: Sequence[Params]) -> Tensor:
        return bicubic_downscale(pixels, self.factor).clamp(0, 1)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"
