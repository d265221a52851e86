"""Training pairs of clean images that can only be iterated: WebDataset shards."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from deflow_aug.data.pictures import DataError
from deflow_aug.degrader import DeFlowDegrader
from deflow_aug.image_files import UnreadableImageError
from deflow_aug.pairs.dataset import Cutter
from deflow_aug.pairs.degradation import Degradation, Steps, Transform, check_keys, named
from deflow_aug.pairs.epoch import HasEpoch
from deflow_aug.pairs.pictures import TooSmallError, extra, first_image


class StreamedPairs(HasEpoch, IterableDataset[Any]):
    """:class:`deflow_aug.pairs.dataset.DegradedPairs` of samples that have keys, not numbers.

    Args:
        clean: shards of a WebDataset ("photos-{000..019}.tar", or several such; the extra
            ``webdataset``), which processes and workers share out among themselves; or any
            iterable of dicts with a string ``__key__`` and an image. Bytes are decoded. An
            ``IterableDataset``, such as a WebDataset with a shuffle of its own, shares its samples
            out itself; of any other iterable each worker takes every n-th sample, and each
            process all.
        degrader, scale, patch, keys, temperature, domain, before, after, flips: as there. The
            paths are the samples' keys.
        seed: a pair depends on (seed, epoch, key of the sample) alone, whichever shard or worker
            it comes from. None draws anew each time.

    Call :meth:`set_epoch` before every epoch, or all epochs see the same pairs. (Frameworks that
    never do, such as BasicSR, need ``seed=None``.)

    Images that cannot be decoded or are smaller than the patch are skipped: the first, the tenth,
    the hundredth and so on are told in a warning, and :attr:`skipped` counts all.

    Raises:
        DataError: in a pass in which all are skipped; where several workers share it, by the last
            of them to end the first pass, in which none has given a pair.
    """

    def __init__(
        self,
        clean: str
        | os.PathLike[str]
        | Sequence[str | os.PathLike[str]]
        | Iterable[Mapping[str, Any]],
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
        super().__init__()
        self.keys = check_keys(keys)
        self.cutter = Cutter(patch, scale, seed, flips)
        self.seed = self.cutter.seed
        self.degradation = Degradation(degrader, scale, temperature, domain, before, after)
        self.samples = _samples(clean)

    def __iter__(self) -> Iterator[Any]:
        epoch, worker = self.epoch, get_worker_info()  # those of the whole pass
        if self.seed is not None and (worker is None or worker.id == 0):
            self._epoch.begin()
        served, skipped, error = False, 0, None
        for sample in self._own():
            key = sample.get("__key__") if isinstance(sample, Mapping) else None
            if not isinstance(key, str):
                raise DataError(
                    "a streamed sample must be a dict with its key as the string '__key__', which "
                    f"names its random draws; got {type(sample).__qualname__}"
                )
            number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
            try:
                gt = self.cutter(first_image(sample), epoch, number, key)
            except (UnreadableImageError, TooSmallError) as fault:
                skipped, error = skipped + 1, fault
                self._report(key, fault)
                continue
            if not served:
                served = True
                self._epoch.gave_one()
            lq, pixels = self.degradation(gt[None], self.seed, epoch, [number])
            yield named(self.keys, lq[0].cpu(), pixels[0].cpu(), key)
        total = 0 if served else skipped
        if worker is not None and worker.num_workers > 1:  # others' samples may be whole
            total = self._epoch.nothing_came(worker.id, worker.num_workers, skipped)
        if total:
            last = "" if error is None else f"; the last one: {error}"
            raise DataError(f"none of the stream's {total} samples can be used{last}") from error

    def _own(self) -> Iterable[Any]:
        """The samples of this worker."""
        worker = get_worker_info()
        if worker is None or isinstance(self.samples, IterableDataset):
            return self.samples
        return islice(self.samples, worker.id, None, worker.num_workers)

    def _report(self, key: str, error: Exception) -> None:
        if so_far := self._epoch.skip():
            warnings.warn(
                f"the sample {key} is skipped ({error}): {so_far} so far. The next that is told is "
                f"number {10 * so_far}; `skipped` counts all",
                stacklevel=3,
            )


def _samples(clean: Any) -> Iterable[Any]:
    paths = (str, os.PathLike)
    several = [clean] if isinstance(clean, paths) else clean
    if not (isinstance(several, (list, tuple)) and all(isinstance(one, paths) for one in several)):
        return several
    shards = [os.fspath(one) for one in several]
    if not shards:
        raise DataError("the list of shards is empty")
    wds = extra("webdataset", "webdataset")
    urls = [url for one in shards for url in wds.shardlists.expand_urls(one)]
    # Workers without a shard have nothing to do, which is no error here.
    dataset: Iterable[Any] = wds.WebDataset(
        urls, shardshuffle=False, nodesplitter=wds.split_by_node, empty_check=False
    )
    return dataset
