"""One clean picture, of any kind that a data set may hold."""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from deflow_aug.data.pictures import DataError
from deflow_aug.image_files import IMAGE_SUFFIXES, UnreadableImageError
from deflow_aug.images import unpack

Picture: TypeAlias = Image.Image | NDArray[Any] | Tensor


class TooSmallError(DataError):
    """An image is smaller than the patch."""


def extra(module: str, name: str) -> Any:
    """An optional package.

    Raises:
        ImportError: if it is missing; it tells which extra brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed to read this data and cannot be imported ({error}): "
            f'pip install "deflow-aug[{name}]"'
        ) from error


def decode(data: bytes, name: str) -> Image.Image:
    """The picture in the bytes of an image file, upright.

    Raises:
        UnreadableImageError: naming ``name``, if they are damaged or no image.
    """
    try:
        with Image.open(io.BytesIO(data)) as img:
            img.load()
            return ImageOps.exif_transpose(img)
    except MemoryError:
        raise
    except Exception as error:  # decoders meet damaged data with exceptions of many kinds
        raise UnreadableImageError(f"cannot decode image {name}: {error}") from error


def first_image(item: Any) -> Picture:
    """The first image of an item: itself, or an entry of a tuple or dict.

    Of a dict, bytes count as an image if their key is an image suffix ("png", "0.jpg").

    Raises:
        DataError: if there is none.
    """
    if _is_picture(item):
        return item
    if isinstance(item, Mapping):
        for key, value in item.items():
            if _is_picture(value):
                return value
            suffix = "." + str(key).rpartition(".")[2].lower()
            if isinstance(value, bytes) and suffix in IMAGE_SUFFIXES:
                return decode(value, str(item.get("__key__", key)))
        kinds = {key: type(value).__qualname__ for key, value in item.items()}
    elif isinstance(item, (tuple, list)):
        for value in item:
            if _is_picture(value):
                return value
        kinds = dict(enumerate(type(value).__qualname__ for value in item))
    else:
        raise DataError(
            f"an item of the clean images must be a PIL image, an array (H, W[, C]), a tensor "
            f"(C, H, W), or a tuple or dict with one, got {type(item).__qualname__}"
        )
    raise DataError(f"an item of the clean images holds no image: {kinds}")


def _is_picture(value: Any) -> bool:
    if isinstance(value, Image.Image):
        return True
    if isinstance(value, Tensor):
        return value.ndim == 3
    return isinstance(value, np.ndarray) and value.ndim in (2, 3)


def size_of(picture: Picture) -> tuple[int, int]:
    """Height and width.

    Raises:
        DataError: if the channels are where they are in an image of the other kind.
    """
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    first, *_, last = picture.shape
    if isinstance(picture, Tensor):
        if first > 4 and last in (3, 4):
            raise DataError(
                f"a clean image that is a tensor must be (C, H, W), got {tuple(picture.shape)}, "
                f"whose channels look to be last: image.permute(2, 0, 1)"
            )
        return int(picture.shape[-2]), int(last)
    if picture.ndim == 3 and last > 4 and first in (3, 4):
        raise DataError(
            f"a clean image that is an array must be (H, W, C), got {picture.shape}, whose "
            f"channels look to be first: image.transpose(1, 2, 0)"
        )
    return int(first), int(picture.shape[1])


def cut(picture: Picture, top: int, left: int, height: int, width: int) -> Tensor:
    """The colours of a block of the picture, uint8 [3, height, width]."""
    if isinstance(picture, Image.Image):
        picture = picture.crop((left, top, left + width, top + height))
    elif isinstance(picture, Tensor):
        picture = picture[:, top : top + height, left : left + width]
    else:
        picture = picture[top : top + height, left : left + width]
    return (unpack(picture).pixels[0] * 255).round().to(torch.uint8)


def report(
    broken: Sequence[str], small: Sequence[str], patch: int, good: int, folder: Path
) -> None:
    parts = []
    if broken:
        parts.append(f"{len(broken)} cannot be read ({'; '.join(broken[:10])})")
    if small:
        names = ", ".join(small[:10])
        parts.append(f"{len(small)} are smaller than the patch of {patch} x {patch} ({names})")
    told = f"of {good + len(broken) + len(small)} images in {folder}, {' and '.join(parts)}"
    if not good:
        raise DataError(f"{told}: use a smaller patch or larger images" if parts else told)
    if parts:
        warnings.warn(f"{told}; they are left out", stacklevel=5)
