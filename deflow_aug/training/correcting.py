"""What is corrected of a trained model's shifts by what is known besides the likelihood."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from deflow_aug import randomness
from deflow_aug.adaptation import fit_in_flat_areas, remove_cast
from deflow_aug.config import CLEAN
from deflow_aug.data.folders import CropFolder, WholePictures
from deflow_aug.model import DeFlow
from deflow_aug.randomness import Stream
from deflow_aug.training.recipe import Recipe
from deflow_aug.training.starting import MEASURED_IMAGES

SIDE = 128
"""Of the squares that degrading is tried on. Borders, where networks see zeros, count little."""

SQUARES = 72
"""Of all clean pictures together."""


def correct_shifts(
    model: DeFlow,
    recipe: Recipe,
    domains: Mapping[str, CropFolder],
    with_pairs: bool,
    quiet: bool = True,
) -> None:
    """Correct M and mu as the recipe asks for; with a warning where that cannot be done.

    Args:
        model: it is changed.
        domains: the folder of every domain.
        with_pairs: whether M learned from pairs; it stays then.
        quiet: otherwise stderr hears of it: it can take longer than a short training.
    """
    fit, seed = recipe.fit_in_flat_areas and not with_pairs, recipe.seed
    if not (fit or recipe.remove_cast):
        return
    if not quiet:
        # Not into the line of a progress bar.
        tqdm.write(
            "all steps are taken and saved; correcting the shifts by the training pictures, which "
            "can take minutes (Ctrl-C stops at once, and --resume begins here)",
            file=sys.stderr,
        )
    squares = list(_squares(domains[CLEAN].whole_pictures(SQUARES, seed), model, seed))
    if fit:
        pictures = {
            name: folder.whole_pictures(MEASURED_IMAGES, seed) for name, folder in domains.items()
        }
        clean = pictures.pop(CLEAN)
        try:
            fit_in_flat_areas(model, pictures, clean, squares, seed=seed)
        except ValueError as error:
            warnings.warn(f"M stays as it was learned: {error}", stacklevel=2)
    if recipe.remove_cast:
        try:
            remove_cast(model, squares, seed=seed)
        except ValueError as error:
            warnings.warn(f"the shift's colours are not corrected: {error}", stacklevel=2)


def _squares(pictures: WholePictures, model: DeFlow, seed: int) -> Iterator[Tensor]:
    """Some of each picture, [N, 3, SIDE, SIDE] in [0, 1], or smaller if the picture is."""
    multiple = model.config.size_multiple
    for number, picture in enumerate(pictures):
        draw = randomness.generator(seed, Stream.CAST, 2, number)
        height, width = (min(SIDE, side) // multiple * multiple for side in picture.shape[:2])
        cut = []
        for _ in range(max(1, SQUARES // len(pictures.numbers))):
            top = int(draw.integers(picture.shape[0] - height + 1))
            left = int(draw.integers(picture.shape[1] - width + 1))
            part = torch.tensor(picture[top : top + height, left : left + width])
            cut.append(part.permute(2, 0, 1) / 255)
        yield torch.stack(cut)
