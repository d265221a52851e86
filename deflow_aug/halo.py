"""The halo: how far beyond a cut through an image its results differ visibly.

The networks' receptive fields are in theory hundreds of pixels wide, but what is far away hardly
counts: the halo is the distance at which a cut changes nothing that could be seen, measured on the
model itself (:func:`measured_halo`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deflow_aug import randomness
from deflow_aug.model import DeFlow
from deflow_aug.sampling import Place, Request, sample
from deflow_aug.tiling import padded

INVISIBLE = 0.2 / 255
"""What a cut may change beyond the halo: a fifth of what tiles may differ by anywhere.

A window has at most four cuts.
"""

REACH = 32
"""How far the measurement looks, in units of the size multiple (8 pixels for three levels)."""


def measured_halo(model: DeFlow) -> int:
    """How far beyond its cut a window differs visibly from the whole image, in pixels.

    Random pictures with structure at every scale are degraded and restored at temperature 1, whole
    and from a cut on, in every domain. The result is the least multiple of
    ``config.size_multiple`` beyond which no pixel differs by more than INVISIBLE.
    """
    multiple = model.config.size_multiple
    errors = torch.stack([cut_errors(model, restoring) for restoring in (False, True)]).amax(0)
    return max(radius(errors, INVISIBLE, multiple), multiple, 2 * model.config.scale)


def radius(errors: Tensor, limit: float, multiple: int) -> int:
    """The distance from which on errors stay within a limit, rounded up to a multiple.

    Rounding, coarse on GPUs (TF32), does not vanish at any distance. Limits below twice what is
    found furthest away are raised to that, to at most 0.25 / 255.
    """
    furthest = 2 * float(errors[-(len(errors) // 4) :].max())
    visible = errors > max(limit, min(furthest, 0.25 / 255))
    return padded(int(visible.nonzero().max()) + 1, multiple) if bool(visible.any()) else 0


def cut_errors(
    model: DeFlow, restoring: bool, pictures: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """The largest difference that a cut makes, at each distance from it, [pixels beyond it].

    Args:
        model: the model.
        restoring: whether to restore or to degrade.
        pictures: [B, 3, H, W] in [0, 1]; the cut runs at a third of their width, rounded down to a
            multiple. None: random ones, one for each domain.
        temperature: of the degradation.
    """
    domains, multiple = model.config.domains, model.config.size_multiple
    if pictures is None:
        pictures = _random_pictures(len(domains), 8 * multiple, REACH * 3 * multiple // 2)
    count, _, height, width = pictures.shape
    cut = width // 3 // multiple * multiple
    request = Request(
        list(range(count)),
        torch.full((count,), temperature, dtype=torch.float32, device="cpu"),
        [domains[i % len(domains)] for i in range(count)],
        restoring=restoring,
    )
    whole = sample(model, pictures, request)
    part = sample(model, pictures[..., cut:], request, Place(0, cut, height, width))
    difference = whole[..., cut:].clamp(0, 1) - part.clamp(0, 1)
    return difference.abs().amax((0, 1, 2, 3)).cpu()


def _random_pictures(count: int, height: int, width: int) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1] of noise of all scales, the coarser the stronger."""
    pictures = []
    for number in range(count):
        picture = torch.full((3, height, width), 0.5, dtype=torch.float32, device="cpu")
        for octave in _octaves(height):
            size = (-(-height // octave), -(-width // octave))
            noise = randomness.normal((3, *size), 0, number, octave)
            noise = noise.repeat_interleave(octave, 1).repeat_interleave(octave, 2)
            picture += 0.05 * noise[:, :height, :width]
        pictures.append(picture.clamp(0, 1))
    return torch.stack(pictures)


def _octaves(side: int) -> Iterator[int]:
    octave = 1
    while octave <= side:
        yield octave
        octave *= 2
