"""NIQE, BRISQUE and PIQE, which judge a picture by itself, through ``pyiqa``.

They were made to say how good a picture looks, and lower is better. Here nothing is to look
good: what counts is how near the degraded pictures come to the real degraded ones. They see the
motif as well, so that other scenes have other scores even with the same degradation.

NIQE: Mittal, Soundararajan and Bovik, "Making a completely blind image quality analyzer" (2013).
BRISQUE: Mittal, Moorthy and Bovik, "No-reference image quality assessment in the spatial domain"
(2012). PIQE: Venkatanath et al., "Blind image quality evaluation using perception based
features" (2015), the only one without parameters; pyiqa downloads those of the others when they
are first used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deflow_aug.evaluation.auc import Z
from deflow_aug.evaluation.tables import Table, number
from deflow_aug.images import unpack

Image8 = NDArray[np.uint8]

METRICS = ("niqe", "brisque", "piqe")

LEAST_SIDE = 192
"""NIQE compares blocks of 96 x 96 pixels, and needs several."""


def compare(real: Sequence[Image8], fakes: Mapping[str, Sequence[Image8]]) -> Table | None:
    """Mean scores of the real degraded pictures and of each kind of artificially degraded ones.

    Args:
        real: degraded pictures, uint8 [H, W, 3], of any sizes from 192 pixels.
        fakes: by the name of their row.

    Returns:
        A row for the real pictures and for each kind: the mean of every score and its 95 %
        interval, mean +- 1.96 standard errors over pictures. A score that cannot be computed has
        no column, and a note tells why. None where pyiqa is not installed.

    Raises:
        ValueError: of pictures that are too small.
    """
    if find_spec("pyiqa") is None:
        return None
    everything = {"real": real, **fakes}
    for name, pictures in everything.items():
        for picture in pictures:
            if min(picture.shape[:2]) < LEAST_SIDE:
                raise ValueError(
                    f"expected pictures of at least {LEAST_SIDE} x {LEAST_SIDE} pixels, got "
                    f"{picture.shape} among {name}"
                )
    columns: dict[str, dict[str, tuple[str, str]]] = {}
    notes = [
        "Means over pictures and their 95 % intervals. Lower is a picture without fault; what is "
        "asked for here is a score like that of the real pictures."
    ]
    for metric in METRICS:
        try:
            score = import_module("pyiqa").create_metric(metric, device=torch.device("cpu"))
        except Exception as error:  # of downloads, or of a torchvision that does not fit torch
            notes.append(
                f"{metric.upper()} is left out: pyiqa cannot make it "
                f"({type(error).__name__}: {error})."
            )
            continue
        columns[metric] = {name: _mean(score, some) for name, some in everything.items()}
    heads = [head for metric in columns for head in (metric.upper(), "95 %")]
    rows = [
        (name, *(cell for metric in columns for cell in columns[metric][name]))
        for name in everything
    ]
    return Table("Without a reference", ("", *heads), tuple(rows) if columns else (), tuple(notes))


def _mean(score: Any, pictures: Sequence[Image8]) -> tuple[str, str]:
    """The mean score and its interval as they are to be read."""
    with torch.no_grad():
        scores = [float(score(unpack(picture).pixels)) for picture in pictures]
    mean = float(np.mean(scores))
    if len(scores) < 2:
        return number(mean, 2), "-"
    half = Z * float(np.std(scores, ddof=1)) / math.sqrt(len(scores))
    return number(mean, 2), f"{number(mean - half, 2)} to {number(mean + half, 2)}"
