"""Degrading whole batches of anyone's DataLoader on the device, one batch ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from deflow_aug.arguments import run_seed, whole
from deflow_aug.degrader import DeFlowDegrader
from deflow_aug.pairs.dataset import CleanCrops
from deflow_aug.pairs.degradation import Degradation, Steps, Transform, check_keys, named
from deflow_aug.pairs.epoch import checked_epoch


class DegradingLoader:
    """A loader of clean batches with lq added: workers decode and crop, the device degrades.

    Downscaling, conditioning, flow and classical steps run on whole batches, on the device of the
    degrader. On a GPU they do so one batch ahead, in a thread and on a CUDA stream of their own,
    while the caller trains on the batch before; the loader's ``pin_memory=True`` lets the images
    travel at the same time.

    Args:
        loader: any iterable of batches of clean images of one size, best a DataLoader of
            :class:`deflow_aug.pairs.dataset.CleanCrops`. A batch is a tensor [B, 3, H, W], uint8 or
            float in [0, 1], or a tuple, list or dict that holds one (the entry "gt", or else the
            first that has this shape). It must not write into a batch that it has given: with
            ``ahead`` that is still read while the next one is made.
        degrader: a DeFlowDegrader, or one of ``deflow_aug.transforms``.
        scale: of the downscaling; divides H and W.
        keys: None: (lq, gt) for a tensor; (lq, gt, the other entries) for a tuple or list; the
            dict with "lq" added for a dict. "basicsr" and "kair": a dict with the names of that
            framework; a dict's other entries stay, a tuple's, having no names, do not.
        temperature, domain, before, after: as in :class:`deflow_aug.pairs.dataset.DegradedPairs`.
        seed: what becomes of an image depends on (seed, epoch, number) alone, and not on the size
            of the batches. Its number is the batch's "index" entry, if it is a dict with one
            (CleanCrops'), and else its position in the epoch, counted over all processes in the
            order of a DistributedSampler; so it is for a ConcatDataset, where indices repeat.
            None draws anew.
        ahead: whether to work one batch ahead, in a thread. None: on a GPU.

    The epoch is that of :meth:`set_epoch`, and one more with each further pass. The loader's data
    sets are told of it, also those in a Subset or ConcatDataset.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        degrader: DeFlowDegrader | Transform,
        scale: int = 4,
        keys: str | None = None,
        *,
        temperature: float | Sequence[float] | None = None,
        seed: int | None = 0,
        domain: Any = None,
        before: Steps = None,
        after: Steps = None,
        ahead: bool | None = None,
    ) -> None:
        self.loader, self.keys, self.seed = loader, check_keys(keys), run_seed(seed)
        self.degradation = Degradation(degrader, scale, temperature, domain, before, after)
        self.ahead = ahead
        self.epoch = 0  # of the next pass
        self._stream: torch.cuda.Stream | None = None
        crops = [one for one in _datasets(self.dataset) if isinstance(one, CleanCrops)]
        if crops:
            self.epoch = crops[0].epoch

    @property
    def dataset(self) -> Any:
        """That of the loader, None if it has none."""
        return getattr(self.loader, "dataset", None)

    @property
    def sampler(self) -> Any:
        """That of the loader, None if it has none."""
        return getattr(self.loader, "sampler", None)

    @property
    def batch_size(self) -> Any:
        """That of the loader, None if it has none."""
        return getattr(self.loader, "batch_size", None)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # as the loader: TypeError if it has none

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next pass; told to the loader, its samplers and its datasets as well."""
        self.epoch = checked_epoch(epoch)
        batches = getattr(self.loader, "batch_sampler", None)
        samplers = (self.sampler, batches, getattr(batches, "sampler", None))
        # One that stands in two places is told once.
        told = (self.loader, *_datasets(self.dataset), *samplers)
        for one in {id(one): one for one in told}.values():
            tell = getattr(one, "set_epoch", None)
            if tell is not None:
                tell(self.epoch)

    def __iter__(self) -> Iterator[Any]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        for one in _datasets(self.dataset):
            if isinstance(one, CleanCrops):
                one.set_epoch(epoch)
        device = self.degradation.device
        make = _Maker(self, epoch)
        ahead = device.type == "cuda" if self.ahead is None else self.ahead
        if not ahead:
            return map(make, self.loader)
        return _one_ahead(self.loader, make, self._stream_on(device))

    def _stream_on(self, device: torch.device) -> torch.cuda.Stream | None:
        """The CUDA stream that this loader works on; one for all passes, whose memory it keeps."""
        if device.type != "cuda":
            return None
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None}  # it belongs to this process


class _Maker:
    """Batch after batch of one pass."""

    def __init__(self, owner: DegradingLoader, epoch: int) -> None:
        self.degradation, self.seed, self.keys = owner.degradation, owner.seed, owner.keys
        self.epoch, self.seen = epoch, 0
        self.rank, self.processes = _place(owner.sampler)
        self.by_index = not any(_parts(one) for one in _datasets(owner.dataset))

    def __call__(self, batch: Any) -> Any:
        entry, gt = find_images(batch)
        indices = self._indices(batch, len(gt))
        self.seen += len(gt)
        lq, gt = self.degradation(gt, self.seed, self.epoch, indices)
        if isinstance(batch, Mapping):
            if self.keys is None:
                return {**batch, entry: gt, "lq": lq}
            rest = {key: value for key, value in batch.items() if key != entry}
            pair = named(self.keys, lq, gt, rest.pop("gt_path", None))
            return {**rest, **pair}
        pair = named(self.keys, lq, gt)
        if self.keys is None and not isinstance(batch, Tensor):
            return *pair, *(value for i, value in enumerate(batch) if i != entry)
        return pair

    def _indices(self, batch: Any, images: int) -> list[int]:
        given = batch.get("index") if isinstance(batch, Mapping) and self.by_index else None
        if given is None:
            positions = range(self.seen, self.seen + images)
            return [position * self.processes + self.rank for position in positions]
        indices = [whole('"index" of an image', one) for one in given]
        if len(indices) != images:
            raise ValueError(f'the batch has {images} images, but {len(indices)} in "index"')
        return indices


def _datasets(dataset: Any) -> list[Any]:
    """A dataset and those that it is made of (Subset, ConcatDataset, ...), each once."""
    found: dict[int, Any] = {}
    waiting = [dataset]
    while waiting:
        one = waiting.pop(0)
        if one is None or id(one) in found:
            continue
        found[id(one)] = one
        waiting += [getattr(one, "dataset", None), *_parts(one)]
    return [*found.values()]


def _parts(dataset: Any) -> Sequence[Any]:
    """The datasets, if several, that this one joins: their indices repeat."""
    parts = getattr(dataset, "datasets", None)
    return parts if isinstance(parts, (list, tuple)) and len(parts) > 1 else ()


def find_images(batch: Any) -> tuple[Any, Tensor]:
    """The key of the clean images in a batch (None if they are the batch), and they themselves.

    Raises:
        ValueError: if there are none.
    """
    if _are_images(batch):
        return None, batch
    entries: list[tuple[Any, Any]] = []
    if isinstance(batch, Mapping):
        entries = sorted(batch.items(), key=lambda entry: entry[0] != "gt")  # stable
    elif isinstance(batch, (tuple, list)):
        entries = list(enumerate(batch))
    for key, value in entries:
        if _are_images(value):
            return key, value
    hint = "let the loader crop all images to one size"
    if any(_are_swapped(value) for _, value in [(None, batch), *entries]):
        hint = "its channels look to be last: images.permute(0, 3, 1, 2)"
    told = {key: _told(value) for key, value in entries} or _told(batch)
    raise ValueError(
        f"expected a batch of clean images, a tensor [B, 3, H, W], alone or in a tuple, list or "
        f"dict, got {told}; {hint}"
    )


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return type(value).__qualname__


def _are_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] == 3


def _are_swapped(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.shape[-1] == 3


def _place(sampler: Any) -> tuple[int, int]:
    """This process's number, and how many of them share the data."""
    rank, processes = getattr(sampler, "rank", None), getattr(sampler, "num_replicas", None)
    if isinstance(rank, int) and isinstance(processes, int):
        return rank, processes
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _one_ahead(
    batches: Iterable[Any], make: Callable[[Any], Any], stream: torch.cuda.Stream | None
) -> Iterator[Any]:
    """``map(make, batches)``, working on the next batch while the caller has the last.

    A thread rather than a stream alone, since degrading draws on the CPU and waits for the GPU in
    places, which would hold up the caller's own kernels. Batches are fetched in the caller's
    thread: a loader without workers runs the user's code there. If fetching fails, the batch
    before is given first.
    """
    if stream is not None:
        # The weights may just have arrived.
        stream.wait_stream(torch.cuda.current_stream(stream.device))

    def work(batch: Any, arrived: torch.cuda.Event | None) -> tuple[Any, Any]:
        if stream is None:
            return make(batch), None
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            if arrived is not None:
                stream.wait_event(arrived)
                for tensor in _gpu_tensors(batch):
                    tensor.record_stream(stream)
            return make(batch), stream.record_event()

    def start(batch: Any) -> Future[tuple[Any, Any]]:
        arrived = None
        if stream is not None and _gpu_tensors(batch):
            # Made by the caller's stream. (Waiting without need would wait for its training.)
            arrived = torch.cuda.current_stream(stream.device).record_event()
        return thread.submit(work, batch, arrived)

    def finish(job: Future[tuple[Any, Any]]) -> Any:
        result, done = job.result()
        if stream is not None and done is not None:
            current = torch.cuda.current_stream(stream.device)
            current.wait_event(done)
            for tensor in _gpu_tensors(result):
                # Or the allocator would give its memory to the next batch as soon as the caller
                # lets go of it, while kernels that the caller has queued still read it.
                tensor.record_stream(current)
        return result

    thread = ThreadPoolExecutor(1, thread_name_prefix="degrading")
    job: Future[tuple[Any, Any]] | None = None
    fetched, failure = iter(batches), None
    try:
        while True:
            try:
                batch = next(fetched)
            except StopIteration:
                break
            except Exception as error:  # not Ctrl-C, which waits for nothing
                failure = error
                break
            following = start(batch)
            if job is not None:
                yield finish(job)
            job = following
        if job is not None:
            yield finish(job)
        if failure is not None:
            raise failure
    finally:
        thread.shutdown(cancel_futures=True)


def _gpu_tensors(batch: Any) -> list[Tensor]:
    values: Iterable[Any] = (batch,)
    if isinstance(batch, Mapping):
        values = batch.values()
    elif isinstance(batch, (tuple, list)):
        values = batch
    return [value for value in values if isinstance(value, Tensor) and value.is_cuda]
