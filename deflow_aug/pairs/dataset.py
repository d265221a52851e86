"""Training pairs for super-resolution: clean crops, and low-quality partners made of them."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from deflow_aug import randomness
from deflow_aug.arguments import run_seed
from deflow_aug.data.pictures import DataError
from deflow_aug.degrader import DeFlowDegrader
from deflow_aug.pairs.degradation import Degradation, Steps, Transform, check_keys, named
from deflow_aug.pairs.epoch import HasEpoch
from deflow_aug.pairs.pictures import Picture, TooSmallError, cut, size_of
from deflow_aug.pairs.sources import faults, open_source
from deflow_aug.randomness import Stream


class CleanCrops(HasEpoch, Dataset[dict[str, Any]]):
    """Random crops of clean images, as {"gt": uint8 [3, patch, patch], "gt_path", "index"}.

    What the workers of a :class:`deflow_aug.pairs.loader.DegradingLoader` make.

    Args:
        clean: a folder (searched recursively), a list of files (also as a .txt file with one path
            a line, relative to it), an LMDB folder (*.lmdb, with BasicSR's meta_info.txt; the
            extra ``lmdb``), or a map-style dataset whose items are PIL images, arrays or tensors,
            or tuples or dicts that hold one (the first counts).
        patch: side of the square crops. None: whole images, cut at the right and bottom to
            multiples of ``scale``.
        scale: divides the patch.
        seed: crop and flips depend on (seed, epoch, index) alone. None draws anew each time: for
            frameworks that never call :meth:`set_epoch`. Several of these in a ConcatDataset need
            a seed each, or those of the same index and size are cropped alike.
        flips: whether to mirror and transpose crops at random. The degradation comes later, and
            keeps its orientation.

    Call :meth:`set_epoch` before every epoch: within an epoch, an index stands for one crop.

    In place of a file that turns out damaged when it is read, another one is, which (seed, epoch,
    index) and the files that can be read decide; the first, the tenth, the hundredth and so on are
    told in a warning, and :attr:`skipped` counts all. (The errors of a data set of your own come
    through.)

    Raises:
        DataError: if there are no images, or none is as large as the patch, or none can be read.
            Smaller ones in folders and LMDBs are left out with a warning; in lists and datasets,
            which keep their numbers, they raise this error when they are read.
    """

    def __init__(
        self,
        clean: Any,
        patch: int | None = 128,
        *,
        scale: int = 4,
        seed: int | None = 0,
        flips: bool = True,
    ) -> None:
        super().__init__()
        self.cutter = Cutter(patch, scale, seed, flips)
        self.source = open_source(clean, patch or scale)
        self._broken: dict[int, str] = {}  # those that this process has met, and why

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(index, self.epoch)

    def item(self, index: int, epoch: int) -> dict[str, Any]:
        """The item of this index in this epoch."""
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"index {number} of {len(self)} images")
        number %= len(self)
        if self.cutter.seed is not None:
            self._epoch.serve(len(self))
        for other in self._candidates(epoch, number):
            if other in self._broken:
                continue
            name = self.source.name(other)
            try:
                gt = self.cutter(self.source.read(other), epoch, number, name)
            except DataError:
                raise
            except faults(self.source) as error:
                self._report(other, name, error)
                continue
            return {"gt": gt, "gt_path": name, "index": number}
        raise DataError(
            f"none of the {len(self)} clean images can be read: {next(iter(self._broken.values()))}"
        )

    def _candidates(self, epoch: int, number: int) -> Iterator[int]:
        """The image of this number, and then all others in the order that they stand in for it."""
        yield number
        run = self.cutter.run
        for attempt in range(1, 11):  # enough unless most are broken
            rng = randomness.generator(run, Stream.CROP, epoch, number, 2, attempt)
            yield int(rng.integers(len(self)))
        rng = randomness.generator(run, Stream.CROP, epoch, number, 2)
        yield from rng.permutation(len(self)).tolist()

    def _report(self, number: int, name: str, error: Exception) -> None:
        self._broken[number] = str(error)
        if so_far := self._epoch.skip():
            warnings.warn(
                f"the clean image {name} is skipped ({error}), and another stands in for it: "
                f"{so_far} so far, each worker counting those that it meets. The next that is told "
                f"is number {10 * so_far}; `skipped` counts all",
                stacklevel=4,
            )


class Cutter:
    """The crop of an image that is named by (seed, epoch, index); see :class:`CleanCrops`."""

    def __init__(self, patch: int | None, scale: int, seed: int | None, flips: bool) -> None:
        for name, value in (("patch", patch), ("scale", scale)):
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if patch is not None and patch % scale:
            raise ValueError(
                f"scale {scale} does not divide the patch of {patch} pixels; the nearest that fit "
                f"are {patch // scale * scale} and {(patch // scale + 1) * scale}"
            )
        self.patch, self.scale, self.seed, self.flips = patch, scale, run_seed(seed), flips

    @property
    def run(self) -> int:
        """The seed, a new one each time if there is none."""
        return randomness.fresh_seed() if self.seed is None else self.seed

    def __call__(self, picture: Picture, epoch: int, index: int, name: str) -> Tensor:
        """uint8 [3, height, width].

        Raises:
            TooSmallError: if the image is smaller than the patch.
        """
        rng = randomness.generator(self.run, Stream.CROP, epoch, index)
        height, width = size_of(picture)
        least = self.patch or self.scale
        if min(height, width) < least:
            raise TooSmallError(
                f"the patch is larger than the image: {name} has {height} x {width} pixels, the "
                f"patch needs {least} x {least}; use a smaller patch, or leave the image out"
            )
        if self.patch is None:
            sides = (height - height % self.scale, width - width % self.scale)
            gt = cut(picture, 0, 0, *sides)
        else:
            top, left = (int(rng.integers(side - self.patch + 1)) for side in (height, width))
            gt = cut(picture, top, left, self.patch, self.patch)
        return _flipped(gt, rng) if self.flips else gt


def _flipped(image: Tensor, rng: np.random.Generator) -> Tensor:
    across, down, turn = rng.random(3) < 0.5
    axes = [axis for axis, flip in ((-1, across), (-2, down)) if flip]
    image = image.flip(axes) if axes else image
    return (image.transpose(-1, -2) if turn else image).contiguous()


class DegradedPairs(Dataset[Any]):
    """Pairs (lq, gt) of clean images: crop, bicubic downscaling, degradation. Map-style.

    Args:
        clean, patch, flips: see :class:`CleanCrops`.
        degrader: a DeFlowDegrader, or one of ``deflow_aug.transforms`` (several degraders with
            weights, chains with classical steps).
        scale: of the downscaling (MATLAB's ``imresize``); divides the patch. 1: for denoising.
        keys: None gives tuples (lq, gt), "basicsr" dicts lq, gt, lq_path, gt_path, "kair" dicts
            L, H, L_path, H_path. lq has no file of its own: both paths are that of gt. **Neither
            framework calls a data set's set_epoch**: give it ``seed=None`` there, or every pass
            over the data has the same crops and the same noise.
        temperature: of a DeFlowDegrader: a number, or a range (low, high) that each image draws
            its own from; (0.5, 1.2) unless given.
        seed: a pair depends on (seed, epoch, index) alone: not on batches, workers, processes or
            global random states, which are neither read nor changed. None draws anew each time.
            Several of these in a ConcatDataset need a seed each.
        domain: of a DeFlowDegrader, as in ``DeFlowDegrader.degrade``.
        before: steps on the clean image before it is downscaled (blur; gt stays as it is).
        after: steps on the degraded image (JPEG). Steps are ``deflow_aug.transforms`` or plain
            callables of an image, float [3, h, w] in [0, 1], of their own, which they may change;
            what plain callables draw at random is their own affair.

    lq and gt are float32 [3, h, w] in [0, 1], on the CPU, in the values of 8-bit images.
    **Call** :meth:`set_epoch` **before every epoch**, or all epochs see the same pairs. Damaged
    files are skipped as :class:`CleanCrops` says; ``pairs.crops.skipped`` counts them.

    Raises:
        DataError: see :class:`CleanCrops`.
        ValueError, TypeError: for arguments that do not fit, such as a scale that does not divide
            the patch.
    """

    def __init__(
        self,
        clean: Any,
        degrader: DeFlowDegrader | Transform,
        scale: int = 4,
        patch: int | None = 128,
        keys: str | None = None,
        *,
        temperature: float | Sequence[float] | None = None,
        seed: int | None = 0,
        domain: Any = None,
        before: Steps = None,
        after: Steps = None,
        flips: bool = True,
    ) -> None:
        self.keys = check_keys(keys)
        self.degradation = Degradation(degrader, scale, temperature, domain, before, after)
        self.crops = CleanCrops(clean, patch, scale=scale, seed=seed, flips=flips)
        self.seed = self.crops.cutter.seed

    @property
    def epoch(self) -> int:
        """The epoch of the next pairs."""
        return self.crops.epoch

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops and degradations; reaches workers that already run.

        Call it between epochs, as a DistributedSampler's.
        """
        self.crops.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, index: int) -> Any:
        epoch = self.epoch  # read once: it may be set at any time
        item = self.crops.item(index, epoch)
        lq, gt = self.degradation(item["gt"][None], self.seed, epoch, [item["index"]])
        return named(self.keys, lq[0].cpu(), gt[0].cpu(), item["gt_path"])
