"""Decoded pictures of a list of files, kept in memory or on disk; broken files are found once."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import uuid
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deflow_aug.data.regions import Picture, Pixels
from deflow_aug.image_files import LEFT_OUT, read_image
from deflow_aug.images import unpack

CACHE_BYTES = 2 * 2**30
OPEN_MAPS = 128  # each holds a file descriptor
SPARE_BYTES = 2**30  # that the cache on disk leaves free, for checkpoints
_STALE_SECONDS = 3600


class DataError(ValueError):
    """A folder cannot be trained on; the message says why and what to do."""


@dataclass(frozen=True)
class ImageFile:
    """A file whose header could be read.

    Args:
        path: where it is.
        height, width: by its header, before any downscaling; an EXIF orientation may swap them.
        size: in bytes.
        modified: in nanoseconds.
        inode: device and number, the same for links to the same file.
        factor: that the picture is downscaled by.
    """

    path: Path
    height: int
    width: int
    size: int
    modified: int
    inode: tuple[int, int]
    factor: int = 1

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width after downscaling."""
        return -(-self.height // self.factor), -(-self.width // self.factor)

    @property
    def decoded_bytes(self) -> int:
        """Memory that the picture takes, decoded and downscaled."""
        return 3 * self.sides[0] * self.sides[1]


def decode(path: Path) -> Pixels:
    """The file's picture, upright, as 8-bit RGB [H, W, 3]; alpha is dropped.

    Raises as :func:`deflow_aug.image_files.read_image`, and ValueError for pictures that
    :func:`deflow_aug.images.unpack` refuses.
    """
    image = read_image(path)
    if isinstance(image, Image.Image) and image.mode in ("RGB", "L"):
        # What unpack comes to for these modes, without the way by float32.
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    values = unpack(image).pixels[0].permute(1, 2, 0)
    return (values * 255).round().byte().numpy()


class Pictures:
    """The pictures of ``files``, by number.

    Without ``cache_dir`` decoded pictures are kept in memory, the least recently used making
    room. With it they are written there, decoded and downscaled, once for all workers,
    processes and runs, and mapped into memory: a crop then costs the reading of its own rows,
    and the operating system keeps in memory what fits. The folder may be deleted at any time.

    Args:
        files: what there is.
        folder: for messages.
        cache_bytes: bound of the memory cache.
        cache_dir: created if missing.
    """

    def __init__(
        self, files: Sequence[ImageFile], folder: Path, cache_bytes: int, cache_dir: Path | None
    ) -> None:
        self.files, self.folder = list(files), folder
        self.cache_bytes, self.cache_dir = cache_bytes, cache_dir
        self.broken: dict[int, str] = {}  # numbers of files that cannot be decoded, and why
        self.cache_full = False
        self.silent = False  # whether broken files are only noted, not warned of
        self.kept: OrderedDict[int, Picture] = OrderedDict()
        self.kept_bytes = 0
        self.decoded_bytes = sum(file.decoded_bytes for file in self.files)
        if cache_dir is not None:
            cache_dir.mkdir(parents=True, exist_ok=True)
            _remove_stale(cache_dir)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"kept": OrderedDict(), "kept_bytes": 0}

    def get(self, number: int) -> Picture | None:
        """The picture of file ``number``, or None if the file is broken.

        Raises:
            DataError: if every file is.
        """
        if number in self.broken:
            self._check_any_left()
            return None
        if number in self.kept:
            self.kept.move_to_end(number)
            return self.kept[number]
        try:
            picture = self.load(number)
        except LEFT_OUT as error:
            self.leave_out(number, str(error))
            return None
        self._keep(number, picture)
        return picture

    def leave_out(self, number: int, reason: str) -> None:
        """Note that file ``number`` is broken; said once, if there is a reason to give.

        Raises:
            DataError: if every file is broken now.
        """
        if number in self.broken:
            return
        self.broken[number] = reason
        self._check_any_left()
        if reason and not self.silent:
            warnings.warn(
                f"left out of {self.folder}, {len(self.broken)} of {len(self.files)} so far: "
                f"{reason}",
                stacklevel=4,
            )

    def _check_any_left(self) -> None:
        if len(self.broken) == len(self.files):
            raise DataError(
                f"none of the {len(self.files)} images in {self.folder} can be used; the first "
                f"one: {next(iter(self.broken.values()))}"
            )

    def load(self, number: int) -> Picture:
        """The picture from the cache on disk, if there is one, or from its file."""
        file = self.files[number]
        if self.cache_dir is None:
            picture = Picture(decode(file.path), file.factor)
            return picture.downscaled() if self._keeps_small else picture
        stored = self.cache_dir / f"{_cache_key(file)}.npy"
        try:
            return Picture(_mapped(stored))
        except (OSError, ValueError, EOFError):  # not there, or damaged
            pass
        picture = Picture(decode(file.path), file.factor).downscaled()
        if self.cache_full:
            return picture
        try:
            _store(picture.pixels, stored)
        except OSError as error:
            self.cache_full = True
            warnings.warn(
                f"the cache {self.cache_dir} takes no more decoded images, so that training may "
                f"wait for them: {error}",
                stacklevel=5,
            )
            return picture
        return Picture(_mapped(stored))

    @property
    def _keeps_small(self) -> bool:
        # Downscaling a whole picture takes about as long as decoding it, a block of it nearly
        # nothing: worth it where the picture is likely to be found in the cache later.
        return self.cache_bytes >= self.decoded_bytes / 2

    def _keep(self, number: int, picture: Picture) -> None:
        mapped = isinstance(picture.pixels, np.memmap)
        size = 0 if mapped else picture.pixels.nbytes
        if size > self.cache_bytes:
            return
        self.kept[number] = picture
        self.kept_bytes += size
        while self.kept_bytes > self.cache_bytes or (mapped and len(self.kept) > OPEN_MAPS):
            _, evicted = self.kept.popitem(last=False)
            if not isinstance(evicted.pixels, np.memmap):
                self.kept_bytes -= evicted.pixels.nbytes


def _cache_key(file: ImageFile) -> str:
    name = f"{os.path.realpath(file.path)}|{file.size}|{file.modified}|{file.factor}|1"
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _mapped(path: Path) -> Pixels:
    pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"{path} is no decoded picture")
    return pixels


def _store(pixels: Pixels, path: Path) -> None:
    """Write a decoded picture whole or not at all; OSError if the disk would be full."""
    if shutil.disk_usage(path.parent).free < pixels.nbytes + SPARE_BYTES:
        raise OSError(f"less than {SPARE_BYTES >> 20} MiB of the disk would be left")
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.save(file, pixels, allow_pickle=False)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _remove_stale(cache_dir: Path) -> None:
    """Remove what killed runs were writing."""
    for path in cache_dir.glob(".*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
        except FileNotFoundError:
            pass  # another run was quicker
