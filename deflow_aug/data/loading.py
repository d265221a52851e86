"""Batches made beside the training: by worker processes, in the order of the steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from deflow_aug.data.batches import Batch, Batches
from deflow_aug.data.pictures import DataError

AHEAD = 4  # batches that each worker makes in advance

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What workers ignore: Ctrl-C reaches every process of the terminal, and schedulers send SIGTERM to
all of a job; the one that trains ends its workers itself."""

_Broken: TypeAlias = list[tuple[str, int, str]]  # domain, number of the file, reason


def loader(
    batches: Batches[Any],
    start_step: int,
    steps: int,
    part: tuple[int, int] = (0, 1),
    workers: int = 0,
) -> Iterator[Batch]:
    """The batches of ``steps`` steps from ``start_step`` on, in order.

    What they hold depends on ``batches`` and ``part`` alone, not on the workers. Each worker
    makes whole batches, in advance; the memory cache of ``batches`` is shared out among them. A
    file that a worker finds broken is reported here, once. Close the iterator to end the workers.

    Args:
        batches: unpaired or paired ones.
        start_step: the first step.
        steps: how many.
        part: this process and the number of processes.
        workers: processes that decode; with 0 batches are made here, when they are asked for.

    Raises:
        DataError: if no file of a domain can be decoded, or a batch cannot be shared by so many
            processes.
    """
    if start_step < 0 or steps < 0 or workers < 0:
        raise ValueError(
            f"start_step, steps and workers must be >= 0, got {start_step}, {steps} and {workers}"
        )
    cuda = torch.cuda.is_available()
    if workers == 0:
        for step in range(start_step, start_step + steps):
            batch = batches.batch(step, part)
            yield batch.pin_memory() if cuda else batch
        return
    data = DataLoader(
        _Steps(batches, part),
        batch_size=None,
        sampler=range(start_step, start_step + steps),
        num_workers=workers,
        prefetch_factor=AHEAD,
        worker_init_fn=_start_worker,
        pin_memory=cuda,
    )
    with _signals_wait():
        all_made = iter(data)  # starts the workers
    for made in all_made:
        for name, number, reason in made.broken:
            batches.sources[name].leave_out(number, reason)
        if made.batch is None:
            raise DataError(made.error)
        yield made.batch


@dataclass(frozen=True)
class _Made:
    """What comes from a worker: a batch, or the error; and files newly found to be broken."""

    batch: Batch | None
    broken: _Broken
    error: str = ""

    def pin_memory(self) -> _Made:
        return _Made(self.batch and self.batch.pin_memory(), self.broken, self.error)


class _Steps(Dataset[_Made]):
    """The batch of each step, as a worker makes it."""

    def __init__(self, batches: Batches[Any], part: tuple[int, int]) -> None:
        self.batches, self.part = batches, part

    def __getitem__(self, step: int) -> _Made:
        known = {name: len(pictures.broken) for name, pictures in self.batches.sources.items()}
        batch, error = None, ""
        try:
            batch = self.batches.batch(step, self.part)
        except DataError as failure:
            error = str(failure)
        broken = [
            (name, number, reason)
            for name, pictures in self.batches.sources.items()
            for number, reason in list(pictures.broken.items())[known[name] :]
        ]
        return _Made(batch, broken, error)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals come after it. Workers started in it inherit that, until they ignore them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, _Steps)
    for pictures in info.dataset.batches.sources.values():
        pictures.silent = True
        pictures.cache_bytes //= info.num_workers
