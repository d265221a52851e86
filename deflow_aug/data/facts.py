"""What can be told about data: channel statistics and a hash."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deflow_aug.data.pictures import ImageFile, Pictures
from deflow_aug.data.scan import THREADS
from deflow_aug.image_files import LEFT_OUT

Statistics: TypeAlias = tuple[tuple[float, float, float], tuple[float, float, float]]

DECODERS = min(4, os.cpu_count() or 1)  # each holds a whole image, its float32 sums too
PART = 2**14  # bytes of a file's start, middle and end that its hash is of


def statistics(
    pictures: Pictures, progress: Callable[[int, int], None] | None = None
) -> Statistics:
    """Mean and standard deviation of each channel in [0, 1], in one pass over the files.

    The mean over the images of E[v] and of E[v^2]; broken files are left out.

    Raises:
        DataError: if no file can be decoded.
    """
    moments = np.zeros((2, 3))
    count = 0
    for done, one in enumerate(_moments(pictures), 1):
        if one is not None:
            moments += one
            count += 1
        if progress is not None:
            progress(done, len(pictures.files))
    mean, square = moments / max(count, 1)
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    return _triple(mean / 255), _triple(deviation / 255)


def _triple(values: NDArray[np.float64]) -> tuple[float, float, float]:
    red, green, blue = values.tolist()
    return red, green, blue


def _moments(pictures: Pictures) -> Iterator[NDArray[np.float64] | None]:
    """[2, 3] of each file in order: E[v] and E[v^2] of each channel in levels; None if broken."""

    def measure(number: int) -> NDArray[np.float64]:
        pixels = pictures.load(number).downscaled().pixels
        counts = np.array(Image.fromarray(pixels).histogram(), np.float64).reshape(3, 256)
        levels = np.arange(256.0)
        return np.stack([counts @ levels, counts @ levels**2]) / counts[0].sum()

    with ThreadPoolExecutor(DECODERS) as pool:
        waiting: deque[tuple[int, Future[NDArray[np.float64]]]] = deque()
        for number in range(len(pictures.files)):
            waiting.append((number, pool.submit(measure, number)))
            if len(waiting) > DECODERS:
                yield _result(pictures, *waiting.popleft())
        while waiting:
            yield _result(pictures, *waiting.popleft())


def _result(
    pictures: Pictures, number: int, future: Future[NDArray[np.float64]]
) -> NDArray[np.float64] | None:
    try:
        return future.result()
    except LEFT_OUT as error:
        pictures.leave_out(number, str(error))
        return None


def digest(files: Iterable[tuple[str, ImageFile]], further: Iterable[bytes] = ()) -> str:
    """SHA-256, as hex digits, of files and the names that they go by.

    Of the names, the sizes, and the start, middle and end of the contents, which is quick for
    thousands of large files.

    Args:
        further: what else is done to the images; without any the hash is that of the files alone.
    """
    named = list(files)
    whole = hashlib.sha256()
    with ThreadPoolExecutor(THREADS) as pool:
        parts = pool.map(_parts, (file for _, file in named))
        for (name, _), part in zip(named, parts, strict=True):
            whole.update(name.encode("utf-8", "surrogateescape") + b"\0" + part)
    for part in further:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()


def _parts(file: ImageFile) -> bytes:
    return hashlib.sha256(_excerpt(file.path, file.size)).digest()


def _excerpt(path: Path, size: int) -> bytes:
    with open(path, "rb") as file:
        if size <= 3 * PART:
            return size.to_bytes(8, "big") + file.read()
        pieces = [size.to_bytes(8, "big")]
        for start in (0, (size - PART) // 2, size - PART):
            file.seek(start)
            pieces.append(file.read(PART))
        return b"".join(pieces)
