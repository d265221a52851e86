"""Evaluations as a page: tables, plots, and sheets of samples beside real crops."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from deflow_aug.image_files import replacing

from . import sheets
from .compare import Evaluation
from .degraders import Degrader, draw
from .figures import tables
from .noise import Image8, noise_of, standard_deviation
from .page import Picture, Section, page
from .plots import plots
from .tables import Table

FILE = "report.html"
TITLE = "How real are the degradations?"

INTRODUCTION = (
    "Degraded versions of clean photographs, by a learned model and by what is used in its place, "
    "beside real degraded photographs. Every figure has a floor, what real noise scores against "
    "other real noise, and a 95 % interval over the photographs."
)

TEMPERATURES = (0.5, 0.8, 1.0, 1.2)
ROWS = 4
ON_A_SHEET = 4
"""Degraders whose samples stand side by side on a sheet, as wide as the page."""

CLEAN, REAL, ELSEWHERE = "clean", "real", "real, elsewhere"


def paired_section(title: str, evaluation: Evaluation, models: Mapping[str, Degrader]) -> Section:
    """Tables, plots and sheets of an evaluation on pairs.

    Args:
        title: of the pairs.
        evaluation: on them.
        models: those that sheets at several temperatures are drawn of, by name.

    Raises:
        ImportError: Matplotlib is missing.
    """
    prefix = _file(title)
    found = plots(evaluation).items()
    pictures = [Picture(f"{prefix}-{name}", png, caption) for name, (png, caption) in found]
    pictures += _methods(prefix, evaluation)
    pictures += [_temperatures(prefix, evaluation, *model) for model in models.items()]
    return Section(title, [*tables(evaluation), *pictures])


def unpaired_section(
    title: str,
    found: Sequence[Table],
    real: Sequence[Image8],
    clean: Sequence[Image8],
    fakes: Mapping[str, Sequence[Image8]],
) -> Section:
    """Tables, and a sheet of degraded crops beside real ones of other scenes."""
    count = min(ROWS, len(real), len(clean))
    caption = "Clean crops, degraded ones, and real degraded crops of other scenes, at 300 %."
    columns = {CLEAN: clean[:count], ELSEWHERE: real[:count]}
    methods = {name: some[:count] for name, some in fakes.items()}
    names = [f"picture {i + 1}" for i in range(count)]
    return Section(title, [*found, *_sheets(_file(title), columns, methods, names, caption)])


def write(folder: Path, sections: Sequence[Section]) -> None:
    """Write the page and, beside it, its pictures; each file is whole or not there.

    Raises:
        OSError: if the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for part in section.parts:
            if isinstance(part, Picture):
                _write(folder / f"{part.file}.png", part.png)
    _write(folder / FILE, page(TITLE, INTRODUCTION, sections).encode())


def _file(title: str) -> str:
    """A title as a part of a file's name."""
    return re.sub(r"\W+", "-", title).strip("-").lower()


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def _shown(evaluation: Evaluation) -> tuple[list[int], list[str], dict[str, list[Image8]]]:
    """Which pictures sheets show, their names, and their clean and real columns."""
    pairs = evaluation.pairs
    deviations = [standard_deviation(noise_of(p.degraded, p.clean)) for p in pairs]
    rows = sheets.shown(deviations, ROWS)
    columns = {CLEAN: [pairs[i].clean for i in rows], REAL: [pairs[i].degraded for i in rows]}
    return rows, [pairs[i].name for i in rows], columns


def _methods(prefix: str, evaluation: Evaluation) -> list[Picture]:
    rows, names, columns = _shown(evaluation)
    caption = (
        f"Samples at temperature {evaluation.temperature:g} beside the real photograph, at 300 %: "
        "the middle of pictures from the least to the most noise."
    )
    methods = {name: [some[i] for i in rows] for name, some in evaluation.samples.items()}
    return _sheets(prefix, columns, methods, names, caption)


def _temperatures(prefix: str, evaluation: Evaluation, name: str, model: Degrader) -> Picture:
    rows, names, columns = _shown(evaluation)
    for temperature in TEMPERATURES:
        columns[f"temperature {temperature:g}"] = [
            draw(name, model, evaluation.pairs[i].clean, temperature, 1, evaluation.seed)[0]
            for i in rows
        ]
    caption = (
        f"{name} at several temperatures beside the real photograph, at 300 %. The draws are the "
        "same: only the strength differs."
    )
    return _picture(f"{prefix}-temperatures-{_file(name)}", columns, names, caption)


def _sheets(
    prefix: str,
    columns: Mapping[str, Sequence[Image8]],
    methods: Mapping[str, Sequence[Image8]],
    rows: Sequence[str],
    caption: str,
) -> list[Picture]:
    """The methods on as many sheets as they need, each beside the same columns."""
    found, names = [], list(methods)
    for start in range(0, len(names), ON_A_SHEET):
        some = {name: methods[name] for name in names[start : start + ON_A_SHEET]}
        file = f"{prefix}-samples-{start // ON_A_SHEET + 1}"
        found.append(_picture(file, {**columns, **some}, rows, caption))
    return found


def _picture(
    file: str, columns: Mapping[str, Sequence[Image8]], rows: Sequence[str], caption: str
) -> Picture:
    """A sheet of the middles of pictures."""
    crops = {head: [sheets.middle(picture) for picture in some] for head, some in columns.items()}
    buffer = io.BytesIO()
    sheets.sheet(crops, rows).save(buffer, "PNG")
    return Picture(file, buffer.getvalue(), caption, full_size=True)
