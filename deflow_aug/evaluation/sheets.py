"""Sheets of crops, enlarged and side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .noise import Image8

CROP = 64
"""Side of the crops, in pixels of the picture."""

ZOOM = 3
GAP, MARGIN, LABEL = 6, 12, 22
INK, PALE, PAPER = (20, 20, 20), (100, 100, 100), (255, 255, 255)

MOST_GAIN = 4.0
"""Dark crops are brightened up to so many times."""

WHITE_POINT = 99.5
"""The percentile of the real crop's values that is brought to white."""


def shown(deviations: Sequence[float], count: int = 4) -> list[int]:
    """Which pictures are shown, by rule and not by eye: from the least to the most noise."""
    order = np.argsort(deviations)
    places = np.linspace(0, len(order) - 1, min(count, len(order)))
    return [int(order[round(place)]) for place in places]


def middle(picture: Image8) -> Image8:
    """The crop at the middle of a picture, uint8 [64, 64, 3]."""
    top, left = ((side - CROP) // 2 for side in picture.shape[:2])
    return picture[top : top + CROP, left : left + CROP]


def gain(real: Image8) -> float:
    """How much a row is brightened, by its real crop: 1 to 4 times."""
    white = float(np.percentile(real, WHITE_POINT))
    return float(np.clip(255 / max(white, 1.0), 1, MOST_GAIN))


def sheet(columns: Mapping[str, Sequence[Image8]], rows: Sequence[str], real: str) -> Image.Image:
    """Crops at 300 %, without smoothing; each row brightened alike.

    Args:
        columns: crops uint8 [64, 64, 3] by the head of their column, one a row.
        rows: a label for each row.
        real: the column that sets how much each row is brightened.
    """
    side = ZOOM * CROP
    font, small = ImageFont.load_default(14), ImageFont.load_default(12)
    width = 2 * MARGIN + len(columns) * (side + GAP) - GAP
    height = 2 * MARGIN + LABEL + len(rows) * (side + LABEL)
    result = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(result)
    for number, (head, crops) in enumerate(columns.items()):
        x = MARGIN + number * (side + GAP)
        pen.text((x, MARGIN), head, INK, font)
        for row, crop in enumerate(crops):
            y = MARGIN + LABEL + row * (side + LABEL)
            bright = np.clip(crop * gain(columns[real][row]), 0, 255).astype(np.uint8)
            large = Image.fromarray(bright).resize((side, side), Image.Resampling.NEAREST)
            result.paste(large, (x, y))
    for row, name in enumerate(rows):
        times = gain(columns[real][row])
        label = name if times == 1 else f"{name}, brightened {times:.1f} times"
        pen.text((MARGIN, MARGIN + LABEL + row * (side + LABEL) + side + 2), label, PALE, small)
    return result
