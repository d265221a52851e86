"""Plots of an evaluation, as PNG; they need Matplotlib (the extra ``plots``)."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from .compare import SAME, Evaluation, curves
from .curves import BLOCK, INTENSITIES, LAGS, Curves
from .figures import MOST_MISSED
from .noise import BINS, LIMIT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INSTALL = "matplotlib is not installed, and the report needs it: pip install 'deflow-aug[plots]'"

REAL = "real"
CHANNELS = ("R", "G", "B")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")
DASHES = ("-", "--", "-.", ":")
"""Colours that the colour-blind can tell apart, after Okabe and Ito; lines differ in dashes too."""

DPI = 110


def plots(evaluation: Evaluation) -> dict[str, tuple[bytes, str]]:
    """Each plot as PNG with its caption, by a name for its file.

    Raises:
        ImportError: Matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(INSTALL) from error
    found = curves(evaluation)
    return {
        "figures": (
            _png(lambda figure: _intervals(figure, evaluation), (10, 6.4)),
            "Figures with their 95 % intervals; 0 is best. The line is real noise against that of "
            "other places of the same picture. kld_noiseflow is not shown where it leaves out too "
            "much to mean anything.",
        ),
        "histograms": (
            _png(lambda figure: _histograms(figure, evaluation), (11, 4)),
            "Histograms of the noise of all pictures together, in the bins of kld_noiseflow.",
        ),
        "level": (
            _png(lambda figure: _levels(figure, found), (11, 4)),
            "Noise level against intensity of the clean picture. Pale bars: how many pixels have "
            "that intensity.",
        ),
        "autocorrelation": (
            _png(lambda figure: _maps(figure, found), _grid_size(found)),
            "Autocorrelation of the noise for shifts of up to 8 pixels, mean over channels and "
            "pictures.",
        ),
        "channels": (
            _png(lambda figure: _covariances(figure, found), _grid_size(found)),
            "Covariance between the channels, in levels squared, and correlation by colour.",
        ),
        "spectrum": (
            _png(lambda figure: _spectra(figure, found), (11, 4)),
            "Radially averaged power spectrum of the noise.",
        ),
    }


def _png(draw: Callable[[Figure], None], size: tuple[float, float]) -> bytes:
    # Not pyplot, which would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    return buffer.getvalue()


def _styles(names: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """A style for each name; the real one is black."""
    styles = zip(cycle(COLOURS), cycle(DASHES), strict=False)
    for name in names:
        if name == REAL:
            yield name, {"color": "black", "linewidth": 2.2}
        else:
            colour, dash = next(styles)
            yield name, {"color": colour, "linestyle": dash, "linewidth": 1.4}


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 5), fontsize=9
    )


def _intervals(figure: Figure, evaluation: Evaluation) -> None:
    shown = ("kld_noiseflow", "kld_srgb", "akld", "level", "correlation", "spectrum")
    titles = ("kld_noiseflow", "kld_srgb", "akld", "level", "autocorrelation", "spectrum")
    names = list(evaluation.methods)
    axes = figure.subplots(2, 3, sharey=True)
    for axis, key, title in zip(axes.ravel(), shown, titles, strict=True):
        for row, name in enumerate(names):
            found = evaluation.methods[name]
            if key == "kld_noiseflow" and found["missed"].value > MOST_MISSED:
                continue
            i = found[key]
            axis.plot([i.low, i.high], [row, row], color=COLOURS[0], linewidth=2)
            axis.plot(i.value, row, "o", color=COLOURS[0])
        floor = evaluation.floors[SAME][key].value
        axis.axvline(floor, color="0.45", linewidth=1, linestyle="--")
        axis.set_xlim(left=0)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_title(title, fontsize=11)
        axis.grid(axis="x", alpha=0.3)


def _histograms(figure: Figure, evaluation: Evaluation) -> None:
    axes = figure.subplots(1, 3, sharey=True)
    # The open ends stand a bin beyond the others.
    centres = (np.arange(-1, BINS + 1) + 0.5) * (2 * LIMIT / BINS) - LIMIT
    for row, axis in enumerate(axes):
        for name, style in _styles(evaluation.sums):
            counts = evaluation.sums[name].counts[row]
            seen = counts > 0  # at full resolution 8-bit noise cannot reach every bin
            axis.plot(centres[seen], counts[seen] / counts.sum(), label=name, **style)
        axis.set(yscale="log", ylim=(1e-6, 1), xlabel="noise (levels of 255)")
        axis.set_title(("full", "half", "quarter")[row] + " resolution", fontsize=11)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of values")
    _legend(figure, axes[0])


def _levels(figure: Figure, found: dict[str, Curves]) -> None:
    axes = figure.subplots(1, 3, sharey=True)
    width = 256 / INTENSITIES
    centres = (np.arange(INTENSITIES) + 0.5) * width
    real = found[REAL]
    seen = real.share > 1e-3 / 3  # of a channel's pixels: fewer tell nothing
    top = 1.15 * max(float(one.level[seen].max()) for one in found.values())
    for channel, axis in enumerate(axes):
        share = real.share[channel]
        axis.bar(centres, share / share.max() * top / 3, width, color="0.9", zorder=0)
        for name, style in _styles(found):
            level = found[name].level[channel]
            axis.plot(centres[seen[channel]], level[seen[channel]], label=name, **style)
        axis.set(xlabel="intensity of the clean picture", xlim=(0, 256), ylim=(0, top))
        axis.set_title(CHANNELS[channel], fontsize=11)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("standard deviation (levels)")
    _legend(figure, axes[0])


def _spectra(figure: Figure, found: dict[str, Curves]) -> None:
    axes = figure.subplots(1, 3, sharey=True)
    frequency = np.arange(BLOCK // 2 + 1) / BLOCK
    for channel, axis in enumerate(axes):
        for name, style in _styles(found):
            power = found[name].amplitude[channel] ** 2
            if power.any():
                axis.plot(frequency, power, label=name, **style)
        axis.set(yscale="log", xlabel="spatial frequency (cycles a pixel)", xlim=(0, 0.5))
        axis.set_title(CHANNELS[channel], fontsize=11)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("power (levels squared)")
    _legend(figure, axes[0])


def _grid(count: int) -> tuple[int, int]:
    columns = min(count, 5)
    return -(-count // columns), columns


def _grid_size(found: dict[str, Curves]) -> tuple[float, float]:
    rows, columns = _grid(len(found))
    return 2.2 * columns, 2.35 * rows


@contextmanager
def _panels(figure: Figure, found: dict[str, Curves]) -> Iterator[list[tuple[Axes, str]]]:
    """A panel for each name; panels that are left over are not drawn."""
    axes = figure.subplots(*_grid(len(found)), squeeze=False).ravel()
    for axis, name in zip(axes, found, strict=False):
        axis.set_title(name, fontsize=10)
    yield list(zip(axes, found, strict=False))
    for axis in axes[len(found) :]:
        axis.set_axis_off()


def _maps(figure: Figure, found: dict[str, Curves]) -> None:
    with _panels(figure, found) as panels:
        for axis, name in panels:
            extent = (-LAGS - 0.5, LAGS + 0.5, LAGS + 0.5, -LAGS - 0.5)
            drawn = axis.imshow(
                found[name].correlation, vmin=-1, vmax=1, cmap="RdBu_r", extent=extent
            )
            axis.set_xticks([-LAGS, 0, LAGS])
            axis.set_yticks([-LAGS, 0, LAGS])
    figure.colorbar(drawn, ax=figure.axes, shrink=0.8, aspect=30)


def _covariances(figure: Figure, found: dict[str, Curves]) -> None:
    with _panels(figure, found) as panels:
        for axis, name in panels:
            covariance = found[name].covariance
            scale = np.sqrt(np.maximum(np.diag(covariance), 1e-12))
            correlation = covariance / np.outer(scale, scale)
            drawn = axis.imshow(correlation, vmin=-1, vmax=1, cmap="RdBu_r")
            for (row, column), value in np.ndenumerate(covariance):
                ink = "white" if abs(correlation[row, column]) > 0.6 else "black"
                axis.text(column, row, f"{value:.1f}", ha="center", va="center", color=ink)
            axis.set_xticks(range(3), CHANNELS)
            axis.set_yticks(range(3), CHANNELS)
    figure.colorbar(drawn, ax=figure.axes, shrink=0.8, aspect=30)
