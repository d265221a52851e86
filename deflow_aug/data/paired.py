"""Paired training data: the same crop of a degraded picture and of its clean version."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deflow_aug import randomness
from deflow_aug.data.batches import Batch, Batches, stack
from deflow_aug.data.facts import digest
from deflow_aug.data.pictures import CACHE_BYTES, DataError, ImageFile, Pictures
from deflow_aug.data.regions import Pixels, drawn_place, turned
from deflow_aug.data.scan import NAMED, read_headers
from deflow_aug.image_folders import find_images
from deflow_aug.randomness import Stream

HALVES = ("clean", "degraded")


@dataclass(frozen=True)
class FoundPairs:
    """Pairs of files, and the files that have no partner.

    pairs: name, clean file, degraded file, sorted by name.
    unmatched: file names.
    """

    pairs: tuple[tuple[str, Path, Path], ...]
    unmatched: tuple[str, ...]


def find_pairs(folder: Path) -> FoundPairs:
    """The pairs of a folder: of ``clean/`` and ``degraded/``, or ``NAME_clean`` and so on.

    In two folders, files match by their path in the folder without the suffix. In one, searched
    recursively, ``NAME_clean.*`` matches ``NAME_degraded.*`` beside it.

    Raises:
        DataError: if there is no pair, or a half exists twice.
        OSError: if the folder does not exist or cannot be searched.
    """
    found: dict[str, dict[str, Path]] = {half: {} for half in HALVES}
    neither: list[str] = []
    two = all((folder / half).is_dir() for half in HALVES)
    for half in HALVES if two else ():
        for path in find_images(folder / half):
            _add(found[half], str(path.relative_to(folder / half).with_suffix("")), path)
    for path in () if two else find_images(folder):
        name, _, half = path.stem.rpartition("_")
        if half in found:
            _add(found[half], str(path.relative_to(folder).with_name(name or "_")), path)
        else:
            neither.append(str(path.relative_to(folder)))
    clean, degraded = found["clean"], found["degraded"]
    pairs = tuple((name, clean[name], degraded[name]) for name in sorted(clean.keys() & degraded))
    single = sorted(clean.keys() ^ degraded.keys())
    alone = [str((clean.get(name) or degraded[name]).relative_to(folder)) for name in single]
    unmatched = tuple(alone + neither)
    if not pairs:
        raise DataError(
            f"no pairs in {folder}: expected two folders {folder.name}/clean and "
            f"{folder.name}/degraded with files of the same names, or files NAME_clean.* and "
            f"NAME_degraded.* beside each other"
            + (f"; without a partner are {', '.join(unmatched[:NAMED])}" if unmatched else "")
        )
    return FoundPairs(pairs, unmatched)


def _add(half: dict[str, Path], name: str, path: Path) -> None:
    if name in half:
        raise DataError(
            f"{half[name]} and {path} differ in their suffix only: which one makes the pair? "
            "Remove the other"
        )
    half[name] = path


class PairFolder:
    """Random aligned crops at the same place of both pictures of a pair, as 8-bit RGB.

    Files without a partner, pairs with an unreadable half, of two sizes or smaller than the crop
    are left out with one warning each kind.

    Args:
        folder: see :func:`find_pairs`.
        crop: side of the crops.
        align: crops start at multiples of this, the downsampling factor s.
        rotations: whether crops are rotated by 0, 90, 180 or 270 degrees at random.
        cache_bytes, cache_dir: as of :class:`deflow_aug.data.folders.CropFolder`.

    Raises:
        DataError: if no pair is left.
        OSError: if the folder does not exist or cannot be searched.
    """

    def __init__(
        self,
        folder: Path,
        crop: int,
        align: int,
        *,
        rotations: bool = False,
        cache_bytes: int = CACHE_BYTES,
        cache_dir: Path | None = None,
    ) -> None:
        for name, value in (("crop", crop), ("align", align)):
            if value < 1:
                raise DataError(f"{name} must be at least 1, got {value}")
        self.folder, self.crop, self.align, self.rotations = Path(folder), crop, align, rotations
        found = find_pairs(self.folder)
        self.left_out = {"without a partner": list(found.unmatched)}
        self.names: list[str] = []
        files: list[ImageFile] = []  # clean, degraded, clean, ...
        headers = read_headers([path for _, *halves in found.pairs for path in halves])
        for (name, *_), clean, degraded in zip(
            found.pairs, headers[::2], headers[1::2], strict=True
        ):
            if isinstance(clean, str) or isinstance(degraded, str):
                reason = "; ".join(half for half in (clean, degraded) if isinstance(half, str))
                self._leave_out("unreadable", f"{name} ({reason})")
            # Sorted, for an EXIF orientation may swap the sides of one.
            elif sorted(clean.sides) != sorted(degraded.sides):
                sizes = " clean, ".join("{} x {}".format(*f.sides) for f in (clean, degraded))
                self._leave_out("of two sizes", f"{name} ({sizes} degraded)")
            elif min(clean.sides) < crop:
                self._leave_out("smaller than the crop", name)
            else:
                self.names.append(name)
                files += [clean, degraded]
        self._warn(len(found.pairs))
        if not self.names:
            raise DataError(
                f"none of the {len(found.pairs)} pairs in {folder} can be trained on; left out: "
                f"{self._summary()}. Both pictures of a pair must be readable, of the same size, "
                f"and at least {crop} x {crop}"
            )
        self.pictures = Pictures(files, self.folder, cache_bytes, cache_dir and Path(cache_dir))
        self._digest: str | None = None

    @property
    def pixels(self) -> int:
        """Pixels of all pairs, each counted once."""
        return sum(file.height * file.width for file in self.pictures.files[::2])

    def draw(self, *key: int) -> tuple[Pixels, Pixels]:
        """The degraded and the clean crop of this key, each [crop, crop, 3].

        Flipped horizontally half of the time.

        Raises:
            DataError: if no pair can be decoded.
        """
        attempt = 0
        while True:
            pair = self._draw(randomness.generator(*key, *((attempt,) if attempt else ())))
            if pair is not None:
                return pair
            attempt += 1

    def fingerprint(self) -> str:
        """A hash of the files' names, sizes and parts of their contents."""
        if self._digest is None:
            self._digest = digest(
                (file.path.relative_to(self.folder).as_posix(), file)
                for file in self.pictures.files
            )
        return self._digest

    def facts(self) -> dict[str, Any]:
        """What a model card tells about the data, ready for JSON."""
        broken = len(self.pictures.broken) // 2  # both halves are in it
        return {
            "folder": self.folder.resolve().name,
            "pairs": len(self.names) - broken,
            "pixels": self.pixels,
            "left_out": {kind: len(names) for kind, names in self.left_out.items()}
            | {"unreadable": broken + len(self.left_out.get("unreadable", ()))},
            "sha256": self.fingerprint(),
        }

    def _draw(self, rng: np.random.Generator) -> tuple[Pixels, Pixels] | None:
        """The crops, or None if the pair that they fall on is broken."""
        number = 2 * int(rng.integers(len(self.names)))
        clean, degraded = (self.pictures.get(number + half) for half in range(2))
        if clean is None or degraded is None:
            for half in range(2):
                self.pictures.leave_out(number + half, "")  # one reason has been given
            return None
        if clean.sides != degraded.sides:
            sizes = " clean, ".join("{} x {}".format(*p.sides) for p in (clean, degraded))
            name = self.names[number // 2]
            self.pictures.leave_out(number, f"the pair {name} is {sizes} degraded")
            self.pictures.leave_out(number + 1, "")
            return None
        top, left, flip, turns = drawn_place(
            rng, clean.sides, self.crop, self.align, self.rotations
        )
        blocks = (p.block(top, left, self.crop, self.crop) for p in (degraded, clean))
        first, second = (turned(block, flip, turns) for block in blocks)
        return first, second

    def _leave_out(self, kind: str, what: str) -> None:
        self.left_out.setdefault(kind, []).append(what)

    def _summary(self) -> str:
        kinds = (
            f"{len(names)} {kind}: {', '.join(names[:NAMED])}"
            + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
            for kind, names in self.left_out.items()
            if names
        )
        return "; ".join(kinds)

    def _warn(self, pairs: int) -> None:
        summary = self._summary()
        if summary:
            warnings.warn(
                f"left out of the {pairs} pairs in {self.folder}: {summary}", stacklevel=3
            )


class PairedBatches(Batches[PairFolder]):
    """Batches of paired crops; several degraded domains take turns."""

    def batch(self, step: int, part: tuple[int, int] = (0, 1)) -> Batch:
        """The items of a step: degraded crops as ``images``, their clean versions as ``clean``."""
        chosen = self.items(step, part)
        pairs = [
            self.domains[name].draw(self.seed, Stream.PAIRED, step, index) for index, name in chosen
        ]
        degraded, clean = zip(*pairs, strict=True)
        indices, names = zip(*chosen, strict=True)
        return Batch(stack(degraded), names, indices, step, stack(clean))
