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
"""The percentile of a crop's values that counts as its white."""


def shown(deviations: Sequence[float], count: int) -> list[int]:
    """Which pictures are shown, by rule and not by eye: from the least to the most noise."""
    order = np.argsort(deviations)
    places = np.linspace(0, len(order) - 1, min(count, len(order)))
    return [int(order[round(place)]) for place in places]


def middle(picture: Image8) -> Image8:
    """The crop at the middle of a picture, uint8 [64, 64, 3]."""
    top, left = ((side - CROP) // 2 for side in picture.shape[:2])
    return picture[top : top + CROP, left : left + CROP]


def gain(crops: Sequence[Image8]) -> float:
    """How much a row of crops is brightened: 1 to 4 times, as the brightest of them allows."""
    white = max(float(np.percentile(crop, WHITE_POINT)) for crop in crops)
    return float(np.clip(255 / max(white, 1.0), 1, MOST_GAIN))


def sheet(columns: Mapping[str, Sequence[Image8]], rows: Sequence[str]) -> Image.Image:
    """Crops at 300 %, without smoothing; each row brightened alike.

    Args:
        columns: crops uint8 [64, 64, 3] by the head of their column, one a row.
        rows: a label for each row.
    """
    side = ZOOM * CROP
    font, small = ImageFont.load_default(14), ImageFont.load_default(12)
    width = 2 * MARGIN + len(columns) * (side + GAP) - GAP
    height = 2 * MARGIN + LABEL + len(rows) * (side + LABEL)
    result = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(result)
    for number, head in enumerate(columns):
        pen.text((MARGIN + number * (side + GAP), MARGIN), head, INK, font)
    for row, (name, *crops) in enumerate(zip(rows, *columns.values(), strict=True)):
        times, y = gain(crops), MARGIN + LABEL + row * (side + LABEL)
        for number, crop in enumerate(crops):
            bright = np.clip(np.rint(crop * times), 0, 255).astype(np.uint8)
            large = Image.fromarray(bright).resize((side, side), Image.Resampling.NEAREST)
            result.paste(large, (MARGIN + number * (side + GAP), y))
        label = f"{name}, brightened {times:.1f} times" if times >= 1.05 else name
        pen.text((MARGIN, y + side + 2), label, PALE, small)
    return result
