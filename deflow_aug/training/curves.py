"""Curves of a run: its records as lines of JSON, and a picture of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG, HEALTH = "log.jsonl", "health.jsonl"
"""Files of a run's folder: what each step did; the latent shift and the noise of samples."""

PICTURE = "curves.png"

LEAST_EIGENVALUE = 1e-9
"""Of Sigma; what is less is zero, rounded."""
INSTALL = "matplotlib is not installed: no curves are drawn; pip install 'deflow-aug[plots]'"

POINTS = 100
"""Curves of single steps are drawn as medians of so many stretches of the run."""

Record = dict[str, Any]
Array = NDArray[np.float64]


def available() -> bool:
    """Whether the pictures can be drawn, that is, whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def read(path: Path) -> list[Record]:
    """The records of a file, one a line; a last line that is not whole is left out."""
    return list(_records(path)) if path.exists() else []


def _records(path: Path) -> Iterator[Record]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:  # a run that was killed while it wrote
                return


def trim(path: Path, step: int) -> None:
    """Keep the records up to a step, from which a run goes on."""
    kept = [json.dumps(record) + "\n" for record in read(path) if record["step"] <= step]
    if path.exists():
        temporary = path.with_suffix(".partial")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)


def draw(folder: Path) -> Path:
    """Draw ``curves.png`` from the records in a run's folder, whole or not at all.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(INSTALL) from error

    log, health = read(folder / LOG), read(folder / HEALTH)
    figure = Figure(figsize=(17, 7.2), dpi=90)
    axes = figure.subplots(2, 4)
    for axis, (title, panel) in zip(axes.flat, _PANELS.items(), strict=True):
        axis.set_title(title, fontsize=11)
        panel(axis, log, health)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, framealpha=0.6)
    for axis in axes[1]:
        axis.set_xlabel("step", fontsize=9)
    figure.subplots_adjust(0.035, 0.07, 0.99, 0.94, 0.2, 0.25)
    path, temporary = folder / PICTURE, folder / f".{PICTURE}.partial"
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _bits(axis: Axes, log: list[Record], health: list[Record]) -> None:
    seen: list[float] = []
    for name in dict.fromkeys(name for record in log for name in record["bits"]):
        points = [(r["step"], r["bits"][name]) for r in log if name in r["bits"]]
        seen += _smooth_line(axis, points, name.replace("|", " given "))
    _limits(axis, seen)


def _gradient(axis: Axes, log: list[Record], health: list[Record]) -> None:
    _smooth_line(axis, [(r["step"], r["gradient_norm"]) for r in log], "norm")
    _logarithmic(axis)
    for key, colour, label in (("skipped", "C1", "skipped"), ("rolled_back", "C3", "went back")):
        counts = [r.get(key, 0) for r in log]
        steps = [log[i]["step"] for i in range(len(log)) if counts[i] > (counts[i - 1] if i else 0)]
        for number, step in enumerate(steps):
            axis.axvline(step, color=colour, lw=0.8, label=f"{label} ({len(steps)})" * (not number))


def _rate(axis: Axes, log: list[Record], health: list[Record]) -> None:
    axis.plot([r["step"] for r in log], [r["lr"] for r in log])
    _from_zero(axis)


def _time(axis: Axes, log: list[Record], health: list[Record]) -> None:
    seen = []
    for key, label in (("seconds", "step"), ("waiting", "of it, waiting for data")):
        points = [(r["step"], r[key]) for r in log if key in r]
        seen += _smooth_line(axis, points, label)
    _limits(axis, [0.0, *seen])


def _means(axis: Axes, log: list[Record], health: list[Record]) -> None:
    for label, steps, shifts in _shifts(health):
        axis.plot(steps, [s["mean_norm"] for s in shifts], label=label)


def _spectrum(axis: Axes, log: list[Record], health: list[Record]) -> None:
    positive = False
    for label, steps, shifts in _shifts(health):
        low, mid, high = (
            [s[k] if s[k] > LEAST_EIGENVALUE else math.nan for s in shifts]
            for k in ("smallest", "median", "largest")
        )
        (line,) = axis.plot(steps, mid, label=label)
        # An eigenvalue of zero has no place on the scale; the lines show what has one.
        axis.plot(steps, high, color=line.get_color(), lw=0.8)
        axis.plot(steps, low, color=line.get_color(), lw=0.8, ls=":")
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.12, lw=0)
        positive |= any(not math.isnan(v) for v in high)
    if positive:
        _logarithmic(axis)
    elif health:
        axis.text(0.5, 0.5, "zero", transform=axis.transAxes, ha="center")


def _deviation(axis: Axes, log: list[Record], health: list[Record]) -> None:
    for label, steps, noises in _noises(health):
        (line,) = axis.plot(steps, [_number(n["std"]) for n in noises], marker=".", label=label)
        colour = line.get_color()
        for real in _real(health, label):
            axis.axhline(_number(real["std"]), color=colour, ls=":", label=f"{label}, real pairs")
        flat = [(r["step"], r["flat"][label]) for r in health if label in r.get("flat", {})]
        if flat:
            own = [_number(both["samples"]["std"]) for _, both in flat]
            name = f"{label}, in flat areas"
            axis.plot([step for step, _ in flat], own, color=colour, ls="--", label=name)
            real_std = _number(flat[-1][1]["photographs"]["std"])
            axis.axhline(real_std, color=colour, ls=":", label=f"{name} of photographs")
    _from_zero(axis)


def _correlation(axis: Axes, log: list[Record], health: list[Record]) -> None:
    for label, steps, noises in _noises(health):
        colour = None
        for keys, style, name in (
            (("lag_h", "lag_v"), "-", "neighbours"),
            (("rg", "gb", "rb"), "--", "channels"),
        ):
            values = [_mean(noise, keys) for noise in noises]
            (line,) = axis.plot(
                steps, values, color=colour, ls=style, marker=".", label=f"{label}, {name}"
            )
            colour = line.get_color()
            for real in _real(health, label):
                axis.axhline(_mean(real, keys), color=colour, ls=":", lw=1)
    drawn = [np.asarray(line.get_ydata(), np.float64) for line in axis.get_lines()]
    low = float(np.nanmin(np.concatenate([*drawn, [0.0]])))
    axis.set_ylim(min(-0.15, low - 0.05), 1)


_PANELS: dict[str, Callable[[Axes, list[Record], list[Record]], None]] = {
    "bits per dimension": _bits,
    "gradient norm": _gradient,
    "learning rate": _rate,
    "seconds a step": _time,
    "norm of mu": _means,
    "spectrum of Sigma: median and range": _spectrum,
    "noise of samples: std, in 1/255": _deviation,
    "noise of samples: correlation": _correlation,
}


def _smooth_line(axis: Axes, points: list[tuple[int, float | None]], label: str) -> list[float]:
    """Single steps pale, medians of stretches strong; returns the range worth seeing."""
    found = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
    if not found:
        return []
    steps, values = (np.array(column, dtype=np.float64) for column in zip(*found, strict=True))
    stretch = math.ceil(len(steps) / POINTS)
    starts = range(0, len(steps), stretch)
    middles = [float(np.mean(steps[i : i + stretch])) for i in starts]
    medians = [float(np.median(values[i : i + stretch])) for i in starts]
    (line,) = axis.plot(middles, medians, label=label)
    if stretch > 1:
        every = max(1, len(steps) // 2000)
        axis.plot(steps[::every], values[::every], color=line.get_color(), lw=0.5, alpha=0.25)
    return [*np.percentile(values, (2, 98)), *medians[POINTS // 50 :]]


def _logarithmic(axis: Axes) -> None:
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """Labels the same ticks, without powers of ten."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(Plain())
    axis.yaxis.set_minor_formatter(Plain(minor_thresholds=(1.5, 0.5)))
    axis.tick_params(which="minor", labelsize=8)


def _limits(axis: Axes, values: list[float]) -> None:
    """A range that single wild steps do not stretch."""
    if values:
        low, high = min(values), max(values)
        room = 0.05 * (high - low) or 0.1
        axis.set_ylim(low - room, high + room)


def _from_zero(axis: Axes) -> None:
    """A range from zero on, with room above whatever is drawn, lines across the panel too."""
    values = [np.asarray(line.get_ydata(), np.float64) for line in axis.get_lines()]
    finite = [v[np.isfinite(v)].max() for v in values if np.isfinite(v).any()]
    axis.set_ylim(0, 1.1 * max(finite, default=0.0) or 1.0)


def _shifts(health: list[Record]) -> Iterator[tuple[str, list[int], list[Record]]]:
    records = [record for record in health if "shift" in record]
    for domain, latents in records[-1]["shift"].items() if records else ():
        for number in range(len(latents)):
            having = [r for r in records if domain in r["shift"]]
            label = f"{domain}, latent {number}" if len(latents) > 1 else domain
            yield label, [r["step"] for r in having], [r["shift"][domain][number] for r in having]


def _noises(health: list[Record]) -> Iterator[tuple[str, list[int], list[Record]]]:
    records = [record for record in health if "noise" in record]
    for domain in records[-1]["noise"] if records else ():
        having = [r for r in records if domain in r["noise"]]
        yield domain, [r["step"] for r in having], [r["noise"][domain] for r in having]


def _real(health: list[Record], domain: str) -> list[Record]:
    """The noise of the domain's real pairs: one record, or none."""
    found = [r["real"][domain] for r in health if domain in r.get("real", {})]
    return found[-1:]


def _mean(noise: Record, keys: Sequence[str]) -> float:
    return sum(_number(noise[key]) for key in keys) / len(keys)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
