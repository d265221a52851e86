"""Flat areas of degraded photographs: windows where all that varies is noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from deflow_aug import randomness
from deflow_aug.randomness import Stream

Image8 = NDArray[np.uint8]
Array = NDArray[np.float64]
T = TypeVar("T", bound=np.generic)

LUMA = np.array([0.299, 0.587, 0.114])  # BT.601

SIDE = 16
"""Of windows, in pixels. Taking a window's mean off takes the noise off that is coarser than the
window; larger ones are rarely flat."""

_BIN = 32  # levels of brightness that share what counts as flat: noise depends on it
_FEWEST = 16  # windows of a bin in a photograph, for there to be a lower decile
_MOST = 8192  # windows of a photograph that are looked at
_CLIPPED = 0.02  # share of values at 0 or 255 from which on noise is cut off
SPREAD = 2.0
"""Flat are windows of up to so many times the variance of the typical flat one."""

_TEXTURE = 4.0  # so many times the usual variance is no noise, but texture everywhere


NONE_GIVEN = "there are no degraded photographs to measure noise in; give some"


class NoFlatAreasError(ValueError):
    """The photographs have no areas that show their noise; the message says what to do."""


@dataclass(frozen=True)
class FlatWindows:
    """The flat windows of one photograph: moments of their channels.

    mean: [N, 3], levels (1/255).
    variance: [N, 3], unbiased, levels squared.
    neighbours: [N, 3], covariance of neighbouring pixels, likewise; see :func:`neighbours`.
    """

    mean: Array
    variance: Array
    neighbours: Array


def checked(degraded: Sequence[Image8]) -> list[Image8]:
    """Photographs as a list.

    Raises:
        TypeError, ValueError: unless they are uint8 [H, W, 3] and at least one.
    """
    photographs = list(degraded)
    if not photographs:
        raise ValueError(NONE_GIVEN)
    for number, one in enumerate(photographs):
        _check(one, number)
    return photographs


def _check(photograph: Image8, number: int) -> None:
    if not isinstance(photograph, np.ndarray) or photograph.dtype != np.uint8:
        is_array = isinstance(photograph, np.ndarray)
        given = photograph.dtype if is_array else type(photograph).__qualname__
        raise TypeError(
            f"degraded photographs must be uint8 arrays [H, W, 3], got {given} (number "
            f'{number}); of a PIL image, np.asarray(image.convert("RGB"))'
        )
    if photograph.ndim != 3 or photograph.shape[-1] != 3:
        raise ValueError(
            f"degraded photographs must be arrays [H, W, 3], a sequence of them, got shape "
            f"{photograph.shape} (number {number}); put a single one into a list"
        )


def windows(photograph: NDArray[T], side: int) -> NDArray[T]:
    """Windows [N, side, side, 3] side by side from the top left, row by row; a rest is cut off."""
    rows, columns = photograph.shape[0] // side, photograph.shape[1] // side
    cut = photograph[: rows * side, : columns * side]
    tiles = cut.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return tiles.reshape(-1, side, side, 3)


def flat_windows(degraded: Iterable[Image8], seed: int) -> list[FlatWindows]:
    """The flat windows of each photograph that has some.

    In a photograph, and for each range of brightness, the variances of windows without texture
    gather around one value, that of the noise, and texture only adds to it. The value is searched
    from the lower decile upwards: the median of all windows of up to twice the value, until it
    stays. Unlike a low quantile, it does not depend on the share of flat windows, nor pick those
    whose noise happens to be weak.

    A range of brightness may hold nothing but texture: it is left out where its value is more than
    four times the photograph's median window's, and so are photographs of more than four times the
    variance of the median photograph. Windows without any variance (borders, graphics) and those
    where values are clipped are left out too.

    Args:
        degraded: uint8 [H, W, 3] each; they are gone through once.
        seed: chooses among the windows of large photographs.

    Raises:
        TypeError, ValueError: for photographs of another kind, or none.
        NoFlatAreasError: if no photograph has any.
    """
    found = []
    for number, photograph in enumerate(degraded):
        _check(photograph, number)
        found.append(_flat(_some_windows(photograph, seed, number))[0])
    if not found:
        raise ValueError(NONE_GIVEN)
    some = [one for one in found if len(one.mean)]
    if not some:
        raise NoFlatAreasError(
            f"none of the {len(found)} degraded photographs has {_FEWEST} windows of {SIDE} "
            f"x {SIDE} pixels of like brightness that are neither clipped nor without any noise; "
            f"give larger photographs, or set the noise level by hand"
        )
    levels = [float(one.variance.mean()) for one in some]
    usual = float(np.median(levels))
    return [one for one, v in zip(some, levels, strict=True) if v <= _TEXTURE * usual]


def flat_areas(photograph: Image8) -> tuple[FlatWindows, NDArray[np.bool_]]:
    """The flat windows of a degraded photograph, and which of its windows they are.

    Args:
        photograph: uint8 [H, W, 3].

    Returns:
        The windows, and a mask [H // SIDE, W // SIDE].
    """
    found, flat = _flat(windows(photograph, SIDE))
    return found, flat.reshape(photograph.shape[0] // SIDE, photograph.shape[1] // SIDE)


def neighbours(cut: NDArray[np.uint8] | Array) -> Array:
    """Covariance of neighbouring pixels of windows [N, side, side, 3], [N, 3]: across and down."""
    pixels = cut - cut.mean(axis=(1, 2), keepdims=True)
    across = (pixels[:, :, 1:] * pixels[:, :, :-1]).mean(axis=(1, 2))
    down = (pixels[:, 1:] * pixels[:, :-1]).mean(axis=(1, 2))
    return np.asarray((across + down) / 2)


def measured(cut: NDArray[np.uint8]) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Means and variances of windows [N, SIDE, SIDE, 3], [N, 3], and which of the windows can be
    judged by these: not those without any variance, nor where values are clipped.
    """
    values = cut.reshape(len(cut), SIDE**2, 3)
    clipped = ((values == 0) | (values == 255)).mean(axis=(1, 2))
    pixels = values.astype(np.float64)
    mean, variance = pixels.mean(axis=1), pixels.var(axis=1, ddof=1)
    return mean, variance, (clipped < _CLIPPED) & (variance > 0).all(axis=1)


def _flat(cut: NDArray[np.uint8]) -> tuple[FlatWindows, NDArray[np.bool_]]:
    """The flat ones of a photograph's windows [N, SIDE, SIDE, 3], and which they are, [N]."""
    means, variances, usable = measured(cut)
    numbers = np.flatnonzero(usable)
    mean, total = means[usable], variances[usable].mean(axis=1)
    level = np.full(len(mean), np.nan)
    for chosen in _by_brightness(mean):
        level[chosen] = _typical(total[chosen])
    flat = np.zeros(len(usable), bool)
    known = ~np.isnan(level)
    if known.any():
        usual = np.median(level[known])
        flat[numbers] = known & (total <= SPREAD * level) & (level <= _TEXTURE * usual)
    return FlatWindows(means[flat], variances[flat], neighbours(cut[flat])), flat


def grey_levels(photographs: Sequence[Image8], seed: int) -> Array:
    """The variance [N] that flat windows' grey values gather around in each photograph, in levels
    squared; 0 where there is no telling: few windows, or texture everywhere.

    As in :func:`flat_windows`, but over all brightnesses together.
    """
    levels = np.zeros(len(photographs))
    for i, photograph in enumerate(photographs):
        variance = grey_variance(_some_windows(photograph, seed, i))
        variance = variance[variance > 0]
        if len(variance) >= _FEWEST:
            levels[i] = _typical(variance)
    known = levels > 0
    usual = float(np.median(levels[known])) if known.any() else 0.0
    return np.where(levels <= _TEXTURE * usual, levels, 0)


def grey_variance(cut: NDArray[np.uint8]) -> Array:
    """Variance [N] of the grey values of windows [N, side, side, 3], in levels squared."""
    grey = (cut @ LUMA).reshape(len(cut), cut.shape[1] ** 2)
    variance = grey.var(axis=1)
    return np.where(variance > 1e-9, variance, 0)  # equal pixels differ by rounding errors


def _some_windows(photograph: Image8, seed: int, number: int) -> NDArray[np.uint8]:
    """All windows, or as many as are looked at."""
    cut = windows(photograph, SIDE)
    if len(cut) <= _MOST:
        return cut
    draw = randomness.generator(seed, Stream.FIT, number)
    return cut[np.sort(draw.choice(len(cut), _MOST, replace=False))]


def _by_brightness(mean: Array) -> Iterator[NDArray[np.intp]]:
    """Numbers of the windows of each range of brightness that has enough of them."""
    of_window = (mean @ LUMA // _BIN).astype(int)
    for one in np.unique(of_window):
        chosen = np.flatnonzero(of_window == one)
        if len(chosen) >= _FEWEST:
            yield chosen


def _typical(variances: Array) -> float:
    """The variance that flat windows gather around; see :func:`flat_windows`."""
    level = float(np.quantile(variances, 0.1))
    # It only rises, from one of finitely many medians to another.
    while (median := float(np.median(variances[variances <= SPREAD * level]))) > level:
        level = median
    return level
