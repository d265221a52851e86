"""Clean images of every kind: folders, file lists, LMDB, WebDataset shards, anyone's dataset."""

from __future__ import annotations

import importlib
import io
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from deflow_aug.data.pictures import DataError
from deflow_aug.image_files import (
    IMAGE_SUFFIXES,
    UnreadableImageError,
    find_images,
    image_size,
    read_image,
)
from deflow_aug.images import unpack

Picture: TypeAlias = Image.Image | NDArray[Any] | Tensor

# A line of BasicSR's meta_info.txt: "name.png (height,width,channels) compression level".
_META_LINE = re.compile(r"(?P<name>.+) \((?P<height>\d+),(?P<width>\d+),\d+\) \d+")


class Source(Protocol):
    """Numbered clean images. It pickles, and may be read in several processes."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Picture:
        """Image ``index``, decoded."""
        ...

    def name(self, index: int) -> str:
        """What messages and ``gt_path`` call it: its path or key."""
        ...


def open_source(clean: Any, patch: int = 1) -> Source:
    """The images of ``clean``: see :class:`deflow_aug.pairs.dataset.CleanCrops`.

    Images of a folder or an LMDB that are smaller than ``patch`` in a direction, and files that
    are no images, are left out with one warning.

    Raises:
        DataError: if nothing is left, or ``clean`` is none of these kinds.
    """
    if isinstance(clean, (str, os.PathLike)):
        path = Path(clean)
        if path.suffix == ".lmdb":
            return LmdbImages(path, patch)
        if path.suffix == ".tar":
            raise DataError(
                f"{path} is a WebDataset shard, which can only be read in its own order: use "
                f"deflow_aug.pairs.streams.StreamedPairs"
            )
        if path.suffix == ".txt" and path.is_file():
            lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
            return ImageFiles([path.parent / line for line in lines if line], str(path))
        files = find_images(path)
        if not files:
            raise DataError(f"no image files in {path} ({', '.join(sorted(IMAGE_SUFFIXES))})")
        return ImageFiles(_large_enough(files, patch, path), str(path))
    if isinstance(clean, Sequence) and all(isinstance(one, (str, os.PathLike)) for one in clean):
        return ImageFiles([Path(one) for one in clean], "the list")
    if hasattr(clean, "__len__") and hasattr(clean, "__getitem__"):
        return DatasetImages(clean)
    if isinstance(clean, Iterable):
        raise DataError(
            f"{type(clean).__qualname__} has no numbered images (no __len__ and __getitem__): use "
            f"deflow_aug.pairs.streams.StreamedPairs for data that can only be iterated"
        )
    raise DataError(
        f"expected a folder, a list of files, an .lmdb folder or a dataset of clean images, got "
        f"{type(clean).__qualname__}"
    )


class ImageFiles:
    """Image files, in the order given."""

    def __init__(self, paths: Sequence[Path], origin: str) -> None:
        if not paths:
            raise DataError(f"no images in {origin}")
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Picture:
        return read_image(self.paths[index])

    def name(self, index: int) -> str:
        return str(self.paths[index])


class LmdbImages:
    """Encoded images in an LMDB folder as BasicSR lays it out, with its ``meta_info.txt``."""

    def __init__(self, folder: Path, patch: int = 1) -> None:
        extra("lmdb", "lmdb")  # say so now if it is missing
        index = folder / "meta_info.txt"
        if not index.is_file():
            raise DataError(
                f"no LMDB with images at {folder}: expected data.mdb, and meta_info.txt with lines "
                f"like 'name.png (480,480,3) 1' (as BasicSR's create_lmdb writes them)"
            )
        self.folder, self.keys = folder, list[str]()
        small = []
        for line in index.read_text("utf-8").splitlines():
            match = _META_LINE.fullmatch(line.strip())
            if match is None:
                raise DataError(f"{index}: expected 'name.png (480,480,3) 1', got {line!r}")
            key = os.path.splitext(match["name"])[0]
            if min(int(match["height"]), int(match["width"])) < patch:
                small.append(key)
            else:
                self.keys.append(key)
        _report([], small, patch, len(self.keys), folder)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> Picture:
        key = self.keys[index]
        with _environment(self.folder).begin(write=False) as transaction:
            data = transaction.get(key.encode())
        if data is None:
            raise DataError(f"{self.folder} has no key {key!r}, though meta_info.txt names it")
        return decode(bytes(data), self.name(index))

    def name(self, index: int) -> str:
        return self.keys[index]


class DatasetImages:
    """A map-style dataset whose items are images, or tuples or dicts that hold one."""

    def __init__(self, dataset: Any) -> None:
        if len(dataset) == 0:
            raise DataError(f"the {type(dataset).__qualname__} of clean images is empty")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> Picture:
        return first_image(self.dataset[index])

    def name(self, index: int) -> str:
        return str(index)


@cache
def _environment(folder: Path) -> Any:
    """The open LMDB; a process may open it only once."""
    lmdb = extra("lmdb", "lmdb")
    return lmdb.open(str(folder), readonly=True, lock=False, readahead=False, meminit=False)


# A fork must not use its parent's LMDB, nor may it open one that its parent had open.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_environment.cache_clear)


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
    """Height and width."""
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    height, width = picture.shape[-2:] if isinstance(picture, Tensor) else picture.shape[:2]
    return int(height), int(width)


def cut(picture: Picture, top: int, left: int, height: int, width: int) -> Tensor:
    """The colours of a block of the picture, uint8 [3, height, width]."""
    if isinstance(picture, Image.Image):
        picture = picture.crop((left, top, left + width, top + height))
    elif isinstance(picture, Tensor):
        picture = picture[:, top : top + height, left : left + width]
    else:
        picture = picture[top : top + height, left : left + width]
    return (unpack(picture).pixels[0] * 255).round().to(torch.uint8)


def _large_enough(files: Sequence[Path], patch: int, folder: Path) -> list[Path]:
    good, broken, small = [], [], []
    for path in files:
        try:
            size = image_size(path)
        except UnreadableImageError as error:
            broken.append(str(error))
            continue
        if min(size) < patch:
            small.append(path.name)
        else:
            good.append(path)
    _report(broken, small, patch, len(good), folder)
    return good


def _report(
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
