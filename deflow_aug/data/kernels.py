"""Blur kernels: estimated elsewhere, drawn at random, applied to clean crops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from deflow_aug.data.pictures import DataError
from deflow_aug.data.regions import Pixels
from deflow_aug.image_files import UnreadableImageError, read_image
from deflow_aug.images import unpack

Kernel: TypeAlias = NDArray[np.float64]  # [h, w], h and w odd, of sum 1

SUFFIXES = (".npy", ".png")


def load_kernels(folder: Path) -> list[Kernel]:
    """The blur kernels of a folder, sorted by name: ``.npy`` arrays and grey ``.png`` images.

    Each is scaled to a sum of 1.

    Raises:
        DataError: if there are none, or one is unreadable, of even size, not finite, or of a sum
            that is not positive.
    """
    if not folder.is_dir():
        is_not = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"the folder of blur kernels {folder} {is_not}")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(
            f"no blur kernels in {folder}: expected {' or '.join(SUFFIXES)} files, one kernel each"
        )
    return [_load(path) for path in files]


def _load(path: Path) -> Kernel:
    try:
        if path.suffix.lower() == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            values = unpack(read_image(path)).pixels[0].mean(0).numpy()
        kernel = np.asarray(values, np.float64)
    except (UnreadableImageError, ValueError, TypeError, EOFError) as error:
        raise DataError(f"cannot read the blur kernel {path}: {error}") from error
    if kernel.ndim != 2 or any(side % 2 == 0 for side in kernel.shape):
        raise DataError(
            f"the blur kernel {path} must have two odd sides, so that it has a centre, got shape "
            f"{kernel.shape}"
        )
    if not np.isfinite(kernel).all() or not kernel.sum() > 0:
        raise DataError(f"the blur kernel {path} must be finite and of positive sum")
    return kernel / kernel.sum()


def margin(kernels: Sequence[Kernel]) -> tuple[int, int]:
    """Rows and columns that a crop needs around it to be blurred by any of the kernels."""
    if not kernels:
        return 0, 0
    return max(k.shape[0] for k in kernels) // 2, max(k.shape[1] for k in kernels) // 2


def blur(pixels: Pixels, kernel: Kernel, around: tuple[int, int]) -> Pixels:
    """A crop blurred, from the crop with a margin: [H + 2 a, W + 2 b, 3] to [H, W, 3].

    out[y, x] = sum_ij kernel[i, j] in[y + i - h // 2, x + j - w // 2], which is how kernel
    estimators apply theirs (the kernel is not mirrored).

    Args:
        around: the margins a and b, at least half the kernel's height and width.
    """
    # By Fourier transform, in float64: as fast for large kernels as for small ones, and the same
    # on any number of threads.
    size = pixels.shape[:2]
    spectrum = np.fft.rfft2(pixels, axes=(0, 1))
    response = np.fft.rfft2(kernel, s=size)
    blurred = np.fft.irfft2(spectrum * response.conj()[..., None], s=size, axes=(0, 1))
    # Entry (i, j) is the sum whose kernel starts at (i, j); those that wrap around are cut off.
    top, left = around[0] - kernel.shape[0] // 2, around[1] - kernel.shape[1] // 2
    height, width = size[0] - 2 * around[0], size[1] - 2 * around[1]
    crop = blurred[top : top + height, left : left + width]
    return np.rint(crop.clip(0, 255)).astype(np.uint8)
