"""The readings of a sweep as a verdict, a table and a plot."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deflow_aug.evaluation.auc import Separation
from deflow_aug.evaluation.crops import LEAST_UNITS
from deflow_aug.evaluation.leak import Reading, Sweep
from deflow_aug.evaluation.tables import Table

THRESHOLD = 0.6
"""An AUC up to here is called nothing, however sure it is."""

BLIND = 0.75
"""Where the interval reaches higher than this, the images are too few to rule a leak out."""

PAPER_NOISE = 0.03


def leaks(separation: Separation) -> bool:
    """Whether the domain is given away: AUC above THRESHOLD, with an interval above 1/2."""
    return separation.auc > THRESHOLD and separation.low > 0.5


@dataclass(frozen=True)
class Verdict:
    """What to take.

    Args:
        choice: the smallest s at which nothing is seen to give the domain away, at the smallest
            noise; None if there is none.
        at_paper_noise: the same for the paper's noise level alone, None if there is none or the
            level was not measured.
        sure: whether the images are enough to say so of the choice.
        sentences: the advice in words.
    """

    choice: Reading | None
    at_paper_noise: Reading | None
    sure: bool
    sentences: tuple[str, ...]


def qualifies(reading: Reading, readings: Sequence[Reading]) -> bool:
    """Whether a setting gives nothing away: its AUC is at most THRESHOLD, and it does not leak.

    Above THRESHOLD but with an interval down to 1/2, the images are too few to tell.

    More noise or a larger s only take information away. So where a setting leaks, all those with a
    smaller or equal s and noise leak too, though their own classifiers may have missed it.
    """
    return reading.network.auc <= THRESHOLD and not gives_away(reading, readings)


def is_sure(reading: Reading, units: Sequence[float]) -> bool:
    """Whether so many images of both domains rule out that a setting is far from what is seen."""
    return reading.network.high <= BLIND and min(units) >= LEAST_UNITS


def gives_away(reading: Reading, readings: Sequence[Reading]) -> bool:
    """Whether a setting leaks, by itself or because a milder one does."""
    return any(
        leaks(r.network) and r.scale >= reading.scale and r.noise >= reading.noise for r in readings
    )


def verdict(sweep: Sweep, matched: bool) -> Verdict:
    """The recommendation; ``matched``: the sweep was made with matched brightness."""
    fit = [r for r in sweep.readings if qualifies(r, sweep.readings)]
    choice = min(fit, key=lambda r: (r.scale, r.noise), default=None)
    paper = [r for r in fit if math.isclose(r.noise, PAPER_NOISE)]
    at_paper = min(paper, key=lambda r: r.scale, default=None)
    sure = choice is not None and is_sure(choice, sweep.units)
    unsure = [r for r in sweep.readings if not gives_away(r, sweep.readings)]
    sentences = []
    if choice is None and unsure:
        least = min(unsure, key=lambda r: r.network.auc)
        sentences.append(
            f"No s is seen to give nothing away. The least is s = {least.scale} with noise "
            f"{least.noise:g} on h (AUC {_figure(least.network)}), which so few images cannot tell "
            "from nothing: add images, or content that is more alike."
        )
        sentences.append(_remedy(sweep, matched))
    elif choice is None:
        sentences.append(
            "No s gives nothing away: at every scale and noise level the domain can be told."
        )
        sentences.append(_remedy(sweep, matched))
    else:
        place = f"s = {choice.scale} with noise {choice.noise:g} on h"
        if sure:
            sentences.append(
                f"Take {place}, the smallest s at which nothing is seen to give the domain away "
                f"(AUC {_figure(choice.network)})."
            )
        else:
            sentences.append(
                f"So few images cannot tell which s gives nothing away. The smallest at which "
                f"nothing is seen is {place} (AUC {_figure(choice.network)}), but an AUC of up to "
                f"{choice.network.high:.2f} cannot be ruled out there: a guess to start from. Some "
                "dozens of images a side of like content make an answer."
            )
        if at_paper is not None and at_paper.scale != choice.scale:
            sentences.append(
                f"With the paper's noise of {PAPER_NOISE:g} it is s = {at_paper.scale} "
                f"(AUC {_figure(at_paper.network)})."
            )
    colour = max((r.colour for r in sweep.readings), key=lambda s: s.low, default=None)
    if colour is not None and leaks(colour) and not matched:
        sentences.append(
            f"{'But the' if choice else 'The'} mean colour alone tells the domains apart (AUC "
            f"{_figure(colour)}), which no s hides; --match_brightness shows what is left without "
            "it."
        )
    if any(r.network.high < 0.5 for r in sweep.readings):
        sentences.append(
            "AUCs well below 0.5 give nothing away: they come of few images whose content differs, "
            "of which some happen to teach the opposite of the others."
        )
    return Verdict(choice, at_paper, sure, tuple(sentences))


def _remedy(sweep: Sweep, matched: bool) -> str:
    strongest = max(sweep.readings, key=lambda r: (r.scale, r.noise))
    causes = [
        name
        for name, separation in (
            ("mean colour", strongest.colour),
            ("contrast", strongest.contrast),
        )
        if leaks(separation)
    ]
    advice = "Choose clean images whose content is more like that of the degraded ones"
    advice += ", or try larger --noises or --scales."
    if "mean colour" in causes and not matched:
        advice += " Try --match_brightness first."
    if causes:
        where = f"At s = {strongest.scale} and noise {strongest.noise:g}"
        advice = f"{where} {' and '.join(causes)} alone tell the domains apart. {advice}"
    return (
        f"{advice} (Images of one scene that stand in one folder count as different: if there are "
        "such, name them with --scenes.)"
    )


def to_markdown(sweep: Sweep, matched: bool) -> str:
    """Table and advice."""
    clean, degraded = (f"{n:.0f}" if n == round(n) else f"{n:.1f}" for n in sweep.units)
    what = " (worth, with matched brightness)" if matched else ""
    intro = (
        f"Held-out AUC of telling h(degraded) from h(clean), 95 % interval; {clean} clean and "
        f"{degraded} degraded images or scenes{what}. 0.5: nothing is given away."
    )
    rows = []
    chosen = verdict(sweep, matched)
    for reading in sweep.readings:
        if leaks(reading.network):
            word = "leaks"
        elif gives_away(reading, sweep.readings):
            word = "leaks (more s or noise does)"
        elif reading.network.auc > THRESHOLD:
            word = "too few images to tell"
        elif not is_sure(reading, sweep.units):
            word = "nothing seen, too few images to be sure"
        else:
            word = "nothing seen"
        if reading is chosen.choice:
            word = f"**{word}**"
        cells = [str(reading.scale), f"{reading.noise:g}"]
        cells += [_figure(s) for s in (reading.network, reading.colour, reading.contrast)]
        rows.append((*cells, word))
    columns = ("s", "noise", "network", "mean colour alone", "contrast alone", "verdict")
    table = Table("", columns, tuple(rows), align="rrllll")
    lines = [intro, "", table.to_markdown(), *chosen.sentences]
    lines += ["", *(f"- {note}" for note in sweep.notes)] if sweep.notes else []
    return "\n".join(lines) + "\n"


def to_dict(sweep: Sweep, matched: bool) -> dict[str, Any]:
    """All figures as plain numbers, for JSON."""
    found = verdict(sweep, matched)
    readings = [asdict(reading) for reading in sweep.readings]
    for reading in readings:
        for name in ("network", "colour", "contrast"):
            if math.isnan(reading[name]["auc"]):
                reading[name]["auc"] = None  # JSON knows no nan
    return {
        "readings": readings,
        "units": list(sweep.units),
        "matched_brightness": matched,
        "scale": None if found.choice is None else found.choice.scale,
        "noise": None if found.choice is None else found.choice.noise,
        "sure": found.sure,
        "advice": list(found.sentences),
        "notes": list(sweep.notes),
    }


def plot(sweep: Sweep, matched: bool, path: Path) -> None:
    """AUC against s with intervals, a colour for each noise level, as PNG.

    The grey lines of the simple regressions are medians over the noise levels.

    Raises:
        ImportError: Matplotlib is missing; the extra ``plots`` brings it.
    """
    # Not pyplot, which would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    scales = sorted({r.scale for r in sweep.readings})
    noises = sorted({r.noise for r in sweep.readings})
    for index, noise in enumerate(noises):
        mine = [r for r in sweep.readings if r.noise == noise]
        shift = 0.09 * (index - (len(noises) - 1) / 2)
        x = [scales.index(r.scale) + shift for r in mine]
        y = [r.network.auc for r in mine]
        down = [r.network.auc - r.network.low for r in mine]
        up = [r.network.high - r.network.auc for r in mine]
        axes.errorbar(x, y, [down, up], marker="o", capsize=3, label=f"network, noise {noise:g}")
    for name, style in (("colour", ":"), ("contrast", "--")):
        means = [
            _median(getattr(r, name).auc for r in sweep.readings if r.scale == s) for s in scales
        ]
        label = "mean colour alone" if name == "colour" else "contrast alone"
        axes.plot(range(len(scales)), means, style, color="0.4", label=label, zorder=1)
    axes.axhline(0.5, color="black", linewidth=0.8)
    band = f"up to {THRESHOLD:g}: nothing"
    axes.axhspan(0.0, THRESHOLD, color="tab:green", alpha=0.08, linewidth=0, label=band)
    found = verdict(sweep, matched)
    choice = found.choice
    if choice is not None:
        shift = 0.09 * (noises.index(choice.noise) - (len(noises) - 1) / 2)
        place = scales.index(choice.scale) + shift, choice.network.auc
        label = "recommended" if found.sure else "a guess: too few images"
        axes.plot(*place, "o", markersize=15, fillstyle="none", color="black", label=label)
    axes.set_xticks(range(len(scales)), [str(s) for s in scales])
    axes.set_xlim(-0.5, len(scales) - 0.5)
    lowest = min((r.network.low for r in sweep.readings), default=0.4)
    axes.set_ylim(max(0.0, min(0.4, lowest) - 0.02), 1.02)
    axes.set_xlabel("downsampling factor s of h")
    axes.set_ylabel("held-out AUC, 95 % interval")
    axes.set_title("What h gives away" + (", brightness matched" if matched else ""))
    axes.legend(fontsize=8, labelspacing=1.0, loc="center left", bbox_to_anchor=(1.01, 0.5))
    # A name of its own in the same folder, since only there os.replace is atomic.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        figure.savefig(temporary, dpi=130, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _median(values: Any) -> float:
    ordered = sorted(values)
    return float(ordered[len(ordered) // 2])


def _figure(s: Separation) -> str:
    return "-" if math.isnan(s.auc) else f"{s.auc:.2f} [{s.low:.2f}, {s.high:.2f}]"
