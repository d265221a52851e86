"""Training pairs of clean images that can only be iterated: WebDataset shards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import IterableDataset

from deflow_aug.data.pictures import DataError
from deflow_aug.degrader import DeFlowDegrader
from deflow_aug.pairs.dataset import Cutter
from deflow_aug.pairs.degradation import Degradation, Steps, Transform, check_keys, named
from deflow_aug.pairs.epoch import SharedEpoch
from deflow_aug.pairs.sources import extra, first_image


class StreamedPairs(IterableDataset[Any]):
    """:class:`deflow_aug.pairs.dataset.DegradedPairs` of samples that have keys, not numbers.

    Args:
        clean: shards of a WebDataset ("photos-{000..019}.tar", or a list of such; the extra
            ``webdataset``), which processes and workers share out among themselves; or any
            iterable of dicts with a string ``__key__`` and an image, such as a WebDataset with a
            shuffle of its own. Bytes are decoded.
        degrader, scale, patch, keys, temperature, domain, before, after, flips: as there. The
            paths are the samples' keys.
        seed: a pair depends on (seed, epoch, key of the sample) alone, whichever shard or worker
            it comes from. None draws anew each time.

    Call :meth:`set_epoch` before every epoch, or all epochs see the same pairs.
    """

    def __init__(
        self,
        clean: str | os.PathLike[str] | Sequence[str] | Iterable[Mapping[str, Any]],
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
        self.keys, self.seed = check_keys(keys), seed
        self.cutter = Cutter(patch, scale, seed, flips)
        self.degradation = Degradation(degrader, scale, temperature, domain, before, after)
        self.samples = _samples(clean)
        self._epoch = SharedEpoch()

    @property
    def epoch(self) -> int:
        """The epoch of the next pass."""
        return self._epoch.get()

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops and degradations; reaches workers that already run."""
        self._epoch.set(epoch)

    def __iter__(self) -> Iterator[Any]:
        epoch = self.epoch  # that of the whole pass
        for sample in self.samples:
            key = sample.get("__key__") if isinstance(sample, Mapping) else None
            if not isinstance(key, str):
                raise DataError(
                    "a streamed sample must be a dict with its key as the string '__key__', which "
                    f"names its random draws; got {type(sample).__qualname__}"
                )
            number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
            gt = self.cutter(first_image(sample), epoch, number, key)
            lq, pixels = self.degradation(gt[None], self.seed, epoch, [number])
            yield named(self.keys, lq[0].cpu(), pixels[0].cpu(), key)


def _samples(clean: Any) -> Iterable[Any]:
    if isinstance(clean, os.PathLike):
        clean = os.fspath(clean)
    shards = [clean] if isinstance(clean, str) else clean
    if not (isinstance(shards, list) and all(isinstance(one, str) for one in shards)):
        return shards
    if not shards:
        raise DataError("the list of shards is empty")
    wds = extra("webdataset", "webdataset")
    urls = [url for one in shards for url in wds.shardlists.expand_urls(one)]
    # Workers without a shard have nothing to do, which is no error here.
    dataset: Iterable[Any] = wds.WebDataset(
        urls, shardshuffle=False, nodesplitter=wds.split_by_node, empty_check=False
    )
    return dataset
