"""What a folder holds, by the headers of its files alone: thousands of large ones in seconds."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from deflow_aug.data.pictures import DataError, ImageFile
from deflow_aug.image_files import IMAGE_SUFFIXES, LEFT_OUT, image_size
from deflow_aug.image_folders import find_images

THREADS = min(16, 4 * (os.cpu_count() or 1))  # headers wait for the disk, or the network
NAMED = 10  # of the files that are left out


@dataclass(frozen=True)
class Scan:
    """The images of a folder that can be trained on, and what is left out.

    Args:
        folder: as given.
        factor: that the images are downscaled by.
        files: those that can be trained on, sorted by path.
        seen: number of files with the suffix of an image.
        unreadable: why each of the files without a readable header has none.
        small: names of the images smaller than the crop.
    """

    folder: Path
    factor: int
    files: tuple[ImageFile, ...]
    seen: int
    unreadable: tuple[str, ...]
    small: tuple[str, ...]


def scan(folder: Path, crop: int, factor: int = 1) -> Scan:
    """Find the images of a folder that hold a crop after downscaling by ``factor``.

    What is left out is said in one warning each for the unreadable and the small.

    Raises:
        DataError: if none is left.
        OSError: if the folder does not exist or cannot be searched.
    """
    if factor < 1:
        raise DataError(f"{folder} cannot be downscaled by {factor}, which is less than 1")
    paths = find_images(folder)
    if not paths:
        raise DataError(
            f"no image files in {folder} or the folders in it; files with these suffixes count: "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    headers = read_headers(paths, factor)
    readable = [header for header in headers if isinstance(header, ImageFile)]
    files = tuple(file for file in readable if min(file.sides) >= crop)
    small = tuple(str(file.path.relative_to(folder)) for file in readable if min(file.sides) < crop)
    unreadable = tuple(header for header in headers if isinstance(header, str))
    found = Scan(folder, factor, files, len(paths), unreadable, small)
    _warn(found, crop)
    if not files:
        scaled = f" after downscaling by {factor}" if factor > 1 else ""
        largest = max((file.sides for file in readable), key=min, default=None)
        hint = f"; the largest is {largest[0]} x {largest[1]}" if largest else ""
        raise DataError(
            f"none of the {len(paths)} files in {folder} is a readable image of at least "
            f"{crop} x {crop} pixels{scaled}{hint}: use a smaller crop or larger images"
        )
    return found


def read_headers(paths: list[Path], factor: int = 1) -> list[ImageFile | str]:
    """What each file's header tells, or why it cannot be read."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda path: _header(path, factor), paths))


def _header(path: Path, factor: int) -> ImageFile | str:
    try:
        height, width = image_size(path)
        about = path.stat()
    except LEFT_OUT as error:
        return str(error)
    inode = (about.st_dev, about.st_ino)
    return ImageFile(path, height, width, about.st_size, about.st_mtime_ns, inode, factor)


def _warn(found: Scan, crop: int) -> None:
    def more(names: tuple[str, ...]) -> str:
        return f" and {len(names) - NAMED} more" if len(names) > NAMED else ""

    if found.unreadable:
        warnings.warn(
            f"{len(found.unreadable)} of {found.seen} files in {found.folder} cannot be read and "
            f"are left out: {'; '.join(found.unreadable[:NAMED])}{more(found.unreadable)}",
            stacklevel=4,
        )
    if found.small:
        scaled = f" after downscaling by {found.factor}" if found.factor > 1 else ""
        warnings.warn(
            f"{len(found.small)} of {found.seen} images in {found.folder} are smaller than the "
            f"crop ({crop} x {crop}){scaled} and are left out: "
            f"{', '.join(found.small[:NAMED])}{more(found.small)}",
            stacklevel=4,
        )
