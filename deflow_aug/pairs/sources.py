"""Clean images of every kind: folders, file lists, LMDB, WebDataset shards, anyone's dataset."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from deflow_aug.data.pictures import DataError
from deflow_aug.image_files import (
    IMAGE_SUFFIXES,
    LEFT_OUT,
    UnreadableImageError,
    image_size,
    read_image,
)
from deflow_aug.image_folders import find_images
from deflow_aug.pairs.lmdb_images import LmdbImages
from deflow_aug.pairs.pictures import Picture, first_image, report


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


def faults(source: Source) -> tuple[type[Exception], ...]:
    """What reading an image of this source raises where that image alone is at fault."""
    # A ValueError of anyone's dataset is of how its images are made, and hence of all.
    return (UnreadableImageError,) if isinstance(source, DatasetImages) else LEFT_OUT


def _large_enough(files: Sequence[Path], patch: int, folder: Path) -> list[Path]:
    good, broken, small = [], [], []
    for path in files:
        try:
            size = image_size(path)
        except LEFT_OUT as error:
            broken.append(str(error))
            continue
        if min(size) < patch:
            small.append(path.name)
        else:
            good.append(path)
    report(broken, small, patch, len(good), folder)
    return good
