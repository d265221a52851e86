"""Pictures of what a model in training does: clean crops, samples, real degraded crops."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from deflow_aug.degrader import DeFlowDegrader
from deflow_aug.evaluation.noise import channel_correlation, lag_correlation, noise_of
from deflow_aug.image_files import write_image
from deflow_aug.latent import ShiftHealth
from deflow_aug.model import DeFlow

Image8 = NDArray[np.uint8]
Figures = dict[str, float]

ROWS = 4
SAMPLES = {
    "temperature 0": (0.0, 0),
    "temperature 0.5": (0.5, 0),
    "temperature 1": (1.0, 0),
    "1, another draw": (1.0, 1),
    "temperature 1.2": (1.2, 0),
}
"""Columns of samples: the temperature, and which draw. Equal draws differ in strength alone."""

AS_LEARNED = "temperature 1"
"""The column whose noise is followed through a training."""

PAIR, ELSEWHERE = "real, its pair", "real, elsewhere"
"""Names of the last column."""

RECOLOURED = "clean, recoloured"
"""Name of the column that noise is measured against where a domain has colours of its own."""

GAIN = 4
TILE, GAP, MARGIN, LABEL = 168, 4, 12, 92
INK, PALE = (20, 20, 20), (110, 110, 110)


@dataclass(frozen=True)
class Crops:
    """What a domain's part of the sheet shows, uint8 [R, H, W, 3] each.

    Args:
        clean: clean crops.
        real: degraded crops of this domain.
        paired: whether they show the same places, so that their difference is noise.
    """

    clean: Image8
    real: Image8
    paired: bool = False


@dataclass(frozen=True)
class Sheet:
    """A drawn sheet, and the noise statistics of its columns by domain (see :func:`figures`)."""

    image: Image.Image
    figures: dict[str, dict[str, Figures]]

    def write(self, path: Path) -> None:
        """Write it as a PNG, whole or not at all; the folder is made if need be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(self.image, path)


def sheet_path(output: Path, step: int) -> Path:
    """Where the sheet of a step is in a run's folder, or would be."""
    return output / "samples" / f"step-{step:08d}.png"


class SampleSheet:
    """The same crops and draws at every step, so that sheets can be compared.

    Columns of each degraded domain: a clean crop, samples from it at several temperatures, and a
    real degraded crop: its partner if the data are pairs, else of another scene. Below them the
    noise of the first row, magnified, and the noise statistics of all rows.

    Noise is what a crop differs by from the clean one; where the domain has channel statistics of
    its own, from the clean one in the domain's colours, which is shown as well: what all samples
    share by the mapping of colours is no noise.

    A model whose Sigma is zero draws its randomness from dequantisation noise, which is switched
    on for it.

    Args:
        crops: what to show, by domain.
        seed: of the samples.
    """

    def __init__(self, crops: Mapping[str, Crops], seed: int) -> None:
        self.crops, self.seed = dict(crops), seed

    @torch.no_grad()
    def draw(self, model: DeFlow, title: str) -> Sheet:
        """Sample from the model and draw the sheet."""
        blocks, found = [], {}
        for name, crops in self.crops.items():
            collapsed = is_collapsed(model, name)
            columns = {"clean": crops.clean}
            reference = in_colours(model, crops.clean, name)
            if reference is not crops.clean:
                columns[RECOLOURED] = reference
            columns |= self._samples(model, name, collapsed)
            columns[PAIR if crops.paired else ELSEWHERE] = crops.real
            measured = {
                column: figures(images, reference)
                for column, images in columns.items()
                if column in (*SAMPLES, PAIR)
            }
            found[name] = measured
            note = "; Sigma is zero: dequantisation noise is switched on" * collapsed
            blocks.append(_block(f"{title}, domain {name}{note}", columns, measured, reference))
        return Sheet(_stack(blocks), found)

    def _samples(self, model: DeFlow, domain: str, dequantize: bool) -> dict[str, Image8]:
        device = next(model.parameters()).device
        degrader = DeFlowDegrader(model, device=device, dequantize=dequantize)
        clean = torch.from_numpy(self.crops[domain].clean).permute(0, 3, 1, 2).contiguous()
        rows, columns = len(clean), {}
        for column, (temperature, number) in SAMPLES.items():
            seeds = [self.seed * 2 * ROWS + number * ROWS + row for row in range(rows)]
            sample = degrader.degrade(clean, temperature, seed=seeds, domain=domain)
            columns[column] = sample.permute(0, 2, 3, 1).numpy()
        return columns


def is_collapsed(model: DeFlow, domain: str) -> bool:
    """Whether Sigma is zero: such a model draws its randomness from dequantisation noise."""
    number = model.config.domains.index(domain) + 1
    return all(ShiftHealth.of(shift, number).collapsed for shift in model.domain_shifts())


def in_colours(model: DeFlow, clean: Image8, domain: str) -> Image8:
    """Clean crops, uint8 [R, H, W, 3], with the channel statistics of a domain, if it has any."""
    if domain not in (model.config.statistics or {}):
        return clean
    pixels = torch.from_numpy(clean).permute(0, 3, 1, 2).double() / 255
    mapped = model.unmatch_colours(pixels, (domain,) * len(clean)).clamp(0, 1)
    return (mapped * 255).round().byte().permute(0, 2, 3, 1).numpy()


def figures(degraded: Image8, clean: Image8) -> Figures:
    """Statistics of the noise of crops, uint8 [R, H, W, 3] each: mean over the crops.

    Returns:
        ``std`` and ``std_r``, ``std_g``, ``std_b`` in levels (1/255), the correlation of
        neighbours ``lag_h`` and ``lag_v``, that of channels ``rg``, ``gb`` and ``rb``. nan where
        the noise is constant, in all crops.
    """
    noises = [noise_of(d, c) for d, c in zip(degraded, clean, strict=True)]
    correlations = np.array([[*lag_correlation(n), *channel_correlation(n)] for n in noises])
    channels = np.mean([n.std(axis=(0, 1)) for n in noises], axis=0)
    with warnings.catch_warnings():
        # Columns of nan alone: noise that is constant everywhere, as at temperature 0.
        warnings.simplefilter("ignore", RuntimeWarning)
        means = np.nanmean(correlations, axis=0)
    names = ("std_r", "std_g", "std_b", "lag_h", "lag_v", "rg", "gb", "rb")
    values = dict(zip(names, map(float, (*channels, *means)), strict=True))
    return {"std": float(np.mean([n.std() for n in noises])), **values}


_TABLE = {
    "std R G B": (("std_r", "std_g", "std_b"), "{:.1f}"),
    "lag-1 h v": (("lag_h", "lag_v"), "{:.2f}"),
    "RG GB RB": (("rg", "gb", "rb"), "{:.2f}"),
}


def _block(
    title: str, columns: dict[str, Image8], measured: dict[str, Figures], reference: Image8
) -> Image.Image:
    """The sheet of one domain; noise is what columns differ by from ``reference``."""
    first = next(iter(columns.values()))
    rows, crop = first.shape[:2]
    side = crop * max(1, round(TILE / crop))
    large, small = ImageFont.load_default(16), ImageFont.load_default(13)
    top = MARGIN + 50
    height = top + (rows + 1) * (side + GAP) + 18 * len(_TABLE) + MARGIN
    width = LABEL + len(columns) * (side + GAP) + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, INK, large)
    below = top + rows * (side + GAP)
    pen.text((MARGIN, below + side / 2 - 16), f"noise x {GAIN}\nof row 1", PALE, small)
    for line, label in enumerate(_TABLE):
        pen.text((MARGIN, below + side + GAP + 4 + 18 * line), label, PALE, small)
    for number, (name, images) in enumerate(columns.items()):
        x = LABEL + number * (side + GAP)
        pen.text((x + side / 2, top - 20), name, INK, small, anchor="ma")
        tiles = list(images)
        if name in measured:
            tiles.append(_magnified(images[0], reference[0]))
            for line, (keys, form) in enumerate(_TABLE.values()):
                values = [measured[name][key] for key in keys]
                text = "  ".join("-" if np.isnan(v) else form.format(v) for v in values)
                y = below + side + GAP + 4 + 18 * line
                pen.text((x + side / 2, y), text, INK, small, anchor="ma")
        for row, tile in enumerate(tiles):
            picture = Image.fromarray(tile).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (x, top + row * (side + GAP)))
    return sheet


def _magnified(degraded: Image8, clean: Image8) -> Image8:
    """The noise of a crop about middle grey, uint8 [H, W, 3]."""
    return np.clip(128 + GAIN * noise_of(degraded, clean), 0, 255).astype(np.uint8)


def _stack(blocks: list[Image.Image]) -> Image.Image:
    width = max(block.width for block in blocks)  # a domain may have one column more
    sheet = Image.new("RGB", (width, sum(b.height for b in blocks)), "white")
    for number, block in enumerate(blocks):
        sheet.paste(block, (0, sum(b.height for b in blocks[:number])))
    return sheet
