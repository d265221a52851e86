"""Random aligned crops of a folder of images, whatever their number, sizes and formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from deflow_aug import randomness
from deflow_aug.data import kernels as blurring
from deflow_aug.data.facts import Statistics, digest, statistics
from deflow_aug.data.pictures import CACHE_BYTES, DataError, Pictures
from deflow_aug.data.regions import Pixels, drawn_place, turned
from deflow_aug.data.scan import Scan, scan
from deflow_aug.image_files import LEFT_OUT
from deflow_aug.randomness import Stream

__all__ = ["CACHE_BYTES", "CropFolder", "DataError", "WholePictures", "check_separate"]


class WholePictures:
    """Pictures, decoded one after the other each time they are gone through: uint8 [H, W, 3],
    downscaled but neither cropped nor blurred. Those that turn out to be broken are left out.

    Args:
        pictures: of a folder.
        numbers: which of them.
    """

    def __init__(self, pictures: Pictures, numbers: Sequence[int]) -> None:
        self.pictures, self.numbers = pictures, numbers

    def __iter__(self) -> Iterator[Pixels]:
        for number in self.numbers:
            try:
                yield self.pictures.load(number).downscaled().pixels
            except LEFT_OUT as error:
                self.pictures.leave_out(number, str(error))


class CropFolder:
    """Random aligned crops of the images in a folder, as 8-bit RGB.

    At the start only the files' headers are read. What cannot be read, or is smaller than the
    crop, is left out with one warning that names it. A file that turns out to be broken when it
    is decoded is left out then: another one is drawn for its crops, the same one in every process.

    Args:
        folder: searched recursively.
        crop: side of the crops.
        align: crops start at multiples of this, the downsampling factor s.
        downscale: the images are downscaled by this factor first (bicubic, antialiased).
        kernels: folder of blur kernels; one of them, drawn at random, blurs each crop.
        rotations: whether crops are rotated by 0, 90, 180 or 270 degrees at random.
        cache_bytes: bound of the decoded images kept in memory, by all worker processes together.
        cache_dir: folder of decoded images, shared by all that are given the same one; takes the
            place of the memory cache.
        also: further folders of the same domain, each with a downscaling factor of its own.

    Raises:
        DataError: if no readable image is at least ``crop`` pixels in both directions after
            downscaling, the kernels cannot be used, or a folder is given twice.
        OSError: if a folder does not exist or cannot be searched.
    """

    def __init__(
        self,
        folder: Path,
        crop: int,
        align: int,
        *,
        downscale: int = 1,
        kernels: Path | None = None,
        rotations: bool = False,
        cache_bytes: int = CACHE_BYTES,
        cache_dir: Path | None = None,
        also: Sequence[tuple[Path, int]] = (),
    ) -> None:
        for name, value in (("crop", crop), ("align", align), ("downscale", downscale)):
            if value < 1:
                raise DataError(f"{name} must be at least 1, got {value}")
        self.folder, self.crop, self.align, self.downscale = Path(folder), crop, align, downscale
        self.kernels = [] if kernels is None else blurring.load_kernels(Path(kernels))
        self.rotations = rotations
        self.scans: list[Scan] = [
            scan(Path(source), crop, factor) for source, factor in ((folder, downscale), *also)
        ]
        for a, b in combinations(self.scans, 2):
            if a.factor == b.factor:  # they would be drawn twice as often
                _check_apart(str(a.folder), a, str(b.folder), b)
        files = [file for found in self.scans for file in found.files]
        self.pictures = Pictures(files, self.folder, cache_bytes, cache_dir and Path(cache_dir))
        self._digest: str | None = None

    @property
    def files(self) -> list[Path]:
        """The images that crops are drawn from, each with the same probability."""
        return [file.path for file in self.pictures.files]

    @property
    def pixels(self) -> int:
        """Pixels of all images together, after downscaling."""
        return sum(file.decoded_bytes // 3 for file in self.pictures.files)

    def draw(self, *key: int) -> Pixels:
        """The crop of this key, [crop, crop, 3]; flipped horizontally half of the time.

        Raises:
            DataError: if no file of the folder can be decoded.
        """
        attempt = 0
        while True:
            crop = self._draw(randomness.generator(*key, *((attempt,) if attempt else ())))
            if crop is not None:
                return crop
            attempt += 1

    def statistics(self, progress: Callable[[int, int], None] | None = None) -> Statistics:
        """Mean and standard deviation of each channel, in [0, 1]: the crops' before blurring.

        Decodes every image once, in a few threads. Images weigh the same whatever their size,
        as they do in drawing.

        Args:
            progress: called after each image with the number of those done and of all.
        """
        return statistics(self.pictures, progress)

    def whole_pictures(self, count: int, seed: int) -> WholePictures:
        """At most so many of the images, drawn at random."""
        order = randomness.generator(seed, Stream.FIT).permutation(len(self.pictures.files))
        return WholePictures(self.pictures, sorted(map(int, order[:count])))

    def fingerprint(self) -> str:
        """A hash of the images' names, sizes and parts of their contents, and of what is done to
        them: the factors and the blur kernels.
        """
        if self._digest is None:
            self._digest = digest(
                (
                    (f"{file.factor}/{file.path.relative_to(found.folder).as_posix()}", file)
                    for found in self.scans
                    for file in found.files
                ),
                (repr(kernel.shape).encode() + kernel.tobytes() for kernel in self.kernels),
            )
        return self._digest

    def facts(self) -> dict[str, Any]:
        """What a model card tells about the data, ready for JSON."""
        facts: dict[str, Any] = {
            "folder": self.folder.resolve().name,
            "images": len(self.pictures.files) - len(self.pictures.broken),
            "pixels": self.pixels,
            "left_out": {
                "unreadable": sum(len(s.unreadable) for s in self.scans)
                + len(self.pictures.broken),
                "smaller than the crop": sum(len(s.small) for s in self.scans),
            },
            "sha256": self.fingerprint(),
        }
        if self.downscale > 1:
            facts["downscale"] = self.downscale
        if self.kernels:
            facts["blur_kernels"] = len(self.kernels)
        if self.scans[1:]:
            facts["also"] = [
                {"folder": s.folder.resolve().name, "images": len(s.files), "downscale": s.factor}
                for s in self.scans[1:]
            ]
        return facts

    def _draw(self, rng: np.random.Generator) -> Pixels | None:
        """A crop, or None if the file that it falls on is broken."""
        number = int(rng.integers(len(self.pictures.files)))
        picture = self.pictures.get(number)
        if picture is None:
            return None
        if min(picture.sides) < self.crop:
            sides = "{} x {}".format(*picture.sides)
            self.pictures.leave_out(number, f"{self.files[number]} has {sides} pixels")
            return None
        top, left, flip, turns = drawn_place(
            rng, picture.sides, self.crop, self.align, self.rotations
        )
        a, b = blurring.margin(self.kernels)
        crop = picture.block(top - a, left - b, self.crop + 2 * a, self.crop + 2 * b)
        if self.kernels:
            kernel = self.kernels[rng.integers(len(self.kernels))]
            crop = blurring.blur(crop, kernel, (a, b))
        return turned(crop, flip, turns)


def check_separate(domains: Mapping[str, CropFolder]) -> None:
    """Raise DataError if domains are the same folder, nested, or share images by links.

    Images that are in a domain downscaled may be in another one as they are.
    """
    for (one, first), (other, second) in combinations(domains.items(), 2):
        for a in first.scans:
            for b in second.scans:
                if a.factor == b.factor:
                    _check_apart(f"{one} ({a.folder})", a, f"{other} ({b.folder})", b)


def _check_apart(one: str, a: Scan, other: str, b: Scan) -> None:
    inodes = {file.inode for file in a.files}
    shared = [file.path for file in b.files if file.inode in inodes]
    if a.folder.resolve() == b.folder.resolve():
        raise DataError(f"the same folder is given for {one} and {other}: give each its own images")
    if shared:
        raise DataError(
            f"{len(shared)} images are in both {one} and {other}, such as {shared[0]}: folders are "
            "searched with the folders in them; give each its own images"
        )
