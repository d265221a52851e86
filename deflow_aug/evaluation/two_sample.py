"""Can real degraded pictures be told from ours? Without pairs: a classifier, and a distance.

Both look at crops of the *high-pass* of a picture, its difference from a small blur, where noise
and compression are nearly all there is in most places and the motif counts little. Not nothing:
edges and fine texture remain, so that pictures of other motifs can be told apart to a degree
even where the degradations are the same. Where there are pairs, degrade the clean halves of the
pictures that are compared with; where there are none, read the figures beside their floor (real
pictures against other real pictures) and against each other, for all see the same clean pictures.

- **AUC of a classifier** (Lopez-Paz and Oquab, "Revisiting classifier two-sample tests", ICLR 2017)
  that never saw the pictures it judges. 1/2: this network, trained on so many pictures, finds no
  difference. That is no proof of there being none: a better network or more pictures may find
  one. Near 1: they can be told, by whatever small but constant difference; it does not say how
  large that is. Many degradations that are useful are at 1.
- **Energy distance** of fixed features (Szekely and Rizzo, 2013; it is the squared maximum mean
  discrepancy of the kernel -|x - y|, Sejdinovic et al., 2013), which does say how large a
  difference is: 2 E|x - y| - E|x - x'| - E|y - y'|, without bias, for a real picture's crop x, a
  fake one's y. The features, :func:`descriptors`, are logarithms of the energy and of the
  heavy-tailedness in random bands at three resolutions, in standard deviations of the real ones.
  They are not those of a network trained on photographs, as in the FID: they see strength,
  correlation, colour and sparsity of fine structure, and nothing of where it stands, such as a
  grid of JPEG blocks or its dependence on brightness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from deflow_aug import randomness
from deflow_aug.evaluation import classifying
from deflow_aug.evaluation.auc import Array, Integers, Separation, Z, deal, held_out
from deflow_aug.evaluation.tables import Table, number
from deflow_aug.randomness import Stream

Image8 = NDArray[np.uint8]

CROP = 64
"""Side of the crops that are judged, in pixels."""

CROPS = 16
"""Crops of a picture."""

LEAST_SIDE = 16
LEAST_PICTURES = 4

BLUR = (1.0, 4.0, 6.0, 4.0, 1.0)
"""The binomial blur, along each axis, whose difference from the picture is the high-pass."""

SCALE = 4 / 255
"""The high-pass is seen through asinh(x / SCALE): linear up to some levels, then logarithmic."""

BANDS = 24
"""Random filters at each resolution."""


def compare(
    real: Sequence[Image8],
    fakes: Mapping[str, Sequence[Image8]],
    *,
    steps: int = 200,
    seed: int = 0,
) -> Table:
    """How well each kind of fakes can be told from real degraded pictures.

    The first row is the floor, half of the real pictures against the other half. Give the clean
    pictures as they are among the fakes, to see what no degradation at all looks like.

    Args:
        real: degraded pictures, uint8 [H, W, 3], of any sizes.
        fakes: by the name of their row, pictures that were degraded artificially.
        steps: training steps of each classifier.
        seed: names the crops, the folds and the classifiers' draws.

    Returns:
        A row for each kind: AUC and energy distance, each with its 95 % interval over pictures.

    Raises:
        TypeError, ValueError: of pictures that are no uint8 [H, W, 3], are smaller than 16
            pixels, or too few: 8 real ones are needed, and 4 of every kind of fakes.
    """
    if len(real) < 2 * LEAST_PICTURES:
        raise ValueError(f"at least {2 * LEAST_PICTURES} real pictures are needed, got {len(real)}")
    for name, pictures in fakes.items():
        if len(pictures) < LEAST_PICTURES:
            raise ValueError(
                f"at least {LEAST_PICTURES} pictures of each kind are needed, got {len(pictures)} "
                f"of {name!r}"
            )
    everything = {"real pictures": real, **fakes}
    side = min(CROP, *(_side(p, name) for name, some in everything.items() for p in some))
    kinds = {name: _crops(some, side, seed, k) for k, (name, some) in enumerate(fakes.items(), 1)}
    crops, units = _crops(real, side, seed, 0)
    half = randomness.generator(seed, Stream.TWO_SAMPLE, 1).permutation(len(real))
    first = np.isin(units, half[: len(real) // 2])
    pairs = {"real against real": ((crops[first], units[first]), (crops[~first], units[~first]))}
    pairs |= {name: ((crops, units), kind) for name, kind in kinds.items()}

    whole = descriptors(crops)
    centre, spread = whole.mean(0), whole.std(0) + 1e-6
    rows = []
    for name, (a, b) in pairs.items():
        told = separation(*a, *b, steps=steps, seed=seed)
        features = [(descriptors(of) - centre) / spread for of in (a[0], b[0])]
        distance, error = energy_distance(features[0], a[1], features[1], b[1])
        between = f"{number(distance - Z * error)} to {number(distance + Z * error)}"
        of_auc = f"{number(told.low)} to {number(told.high)}"
        rows.append((name, number(told.auc), of_auc, number(distance), between))
    return Table(
        "Can they be told from real degraded pictures?",
        ("", "AUC", "95 %", "energy distance", "95 %"),
        tuple(rows),
        (
            f"High-pass crops of {side} x {side} pixels, {CROPS} of each of {len(real)} real "
            f"pictures and of each fake one. AUC: of a small network, on pictures it was not "
            f"trained on; 0.5 cannot be told, 1 always. Energy distance: of fixed features, in "
            f"standard deviations of the real ones; 0 is equal. Intervals are over pictures.",
        ),
    )


def _side(picture: Image8, name: str) -> int:
    """The shorter side, of a picture that can be used."""
    if picture.dtype != np.uint8:
        raise TypeError(f"expected uint8 pictures, got {picture.dtype} among {name}")
    if picture.ndim != 3 or picture.shape[2] != 3 or min(picture.shape[:2]) < LEAST_SIDE:
        raise ValueError(
            f"expected pictures [H, W, 3] of at least {LEAST_SIDE} pixels, got {picture.shape} "
            f"among {name}"
        )
    return min(picture.shape[:2])


def _crops(pictures: Sequence[Image8], side: int, seed: int, kind: int) -> tuple[Tensor, Integers]:
    """High-pass crops [N, 3, side, side] of every picture, and which it is, [N].

    The same places in pictures of the same sizes for every kind but the real ones: fakes of the
    same clean pictures are judged in the same places.
    """
    crops = []
    for index, picture in enumerate(pictures):
        rng = randomness.generator(seed, Stream.TWO_SAMPLE, 0, min(kind, 1), index)
        for _ in range(CROPS):
            top, left = (int(rng.integers(n - side + 1)) for n in picture.shape[:2])
            crops.append(picture[top : top + side, left : left + side])
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    units = np.repeat(np.arange(len(pictures)), CROPS)
    return torch.cat([high_pass(part.float() / 255) for part in pixels.split(64)]), units


def high_pass(pixels: Tensor) -> Tensor:
    """asinh of the difference from a binomial blur of 5 x 5, as large as [B, 3, H, W] in [0, 1]."""
    kernel = torch.tensor(BLUR, dtype=pixels.dtype) / sum(BLUR)
    channels = pixels.shape[1]
    rows, columns = (
        kernel.reshape(shape).expand(channels, *shape) for shape in ((1, 5, 1), (1, 1, 5))
    )
    blurred = F.conv2d(F.pad(pixels, (2, 2, 2, 2), "reflect"), rows, groups=channels)
    return torch.asinh((pixels - F.conv2d(blurred, columns, groups=channels)) / SCALE)


class Network(nn.Module):
    """Logit of "fake" [B] from high-pass crops [B, 3, H, W], H and W at least 16.

    The mean over the crop makes it judge what is everywhere rather than what is where.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.maps = nn.Sequential(
            nn.Conv2d(3, width, 5, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, width, 3, stride=2, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, 2 * width, 3, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        )
        self.head = nn.Linear(2 * width, 1)

    def forward(self, crops: Tensor) -> Tensor:
        return self.head(self.maps(crops).mean((2, 3)))[:, 0]


def separation(
    real: Tensor,
    real_units: Integers,
    fake: Tensor,
    fake_units: Integers,
    *,
    steps: int = 200,
    seed: int = 0,
) -> Separation:
    """AUC by which classifiers tell fake crops from real ones of pictures they never saw.

    Args:
        real, fake: high-pass crops [N, 3, side, side].
        real_units, fake_units: number of the picture that each crop is of.
    """
    crops = torch.cat([real, fake])
    is_fake = np.repeat([False, True], [len(real), len(fake)])
    # Dense numbers, others for fakes than for real pictures.
    units = np.unique(
        np.concatenate([real_units, real_units.max() + 1 + fake_units]), return_inverse=True
    )[1]
    sides = [len(np.unique(units[is_fake == kind])) for kind in (False, True)]
    rng = randomness.generator(seed, Stream.TWO_SAMPLE, 2)
    fold = deal(units, is_fake, min(classifying.FOLDS, *sides), rng)
    weights = classifying.equal_weights(units, is_fake)
    scores = np.zeros(len(fold))
    for part in np.unique(fold):
        test = fold == part
        key = (seed, Stream.TWO_SAMPLE, 3, int(part))
        net = classifying.train(
            classifying.seeded(Network, 0), crops, is_fake, weights * ~test, steps, key
        )
        scores[test] = classifying.scores(net, crops[torch.from_numpy(test)])
    return held_out(scores, weights, is_fake, units, fold)


def descriptors(crops: Tensor) -> Array:
    """Features [N, F] of high-pass crops [N, 3, side, side], side at least 16.

    In each of ``BANDS`` random bands (5 x 5 filters of norm 1 over the three channels) at full,
    half and quarter resolution: the logarithm of the root mean square r, and that of the mean
    magnitude divided by r, which is sqrt(2 / pi) for Gaussian noise and less where structure is
    sparse.
    """
    filters = randomness.normal((BANDS, 3, 5, 5), 0, Stream.TWO_SAMPLE, 4)
    filters = filters - filters.mean((2, 3), keepdim=True)
    filters = filters / filters.square().sum((1, 2, 3), keepdim=True).sqrt()
    parts = []
    for level in range(3):
        small = F.avg_pool2d(crops, 2**level) if level else crops
        if min(small.shape[2:]) < 5:
            break
        response = torch.cat([_moments(F.conv2d(some, filters)) for some in small.split(64)])
        parts.append(response)
    return np.asarray(torch.cat(parts, 1).double().numpy())


def _moments(response: Tensor) -> Tensor:
    # A small constant: flat crops have no energy at all, and are not infinitely unlike others.
    level = (response.square().mean((2, 3)) + 1e-3).sqrt()
    return torch.cat([level.log(), ((response.abs().mean((2, 3)) + 1e-3) / level).log()], 1)


def energy_distance(
    a: Array, a_units: Integers, b: Array, b_units: Integers
) -> tuple[float, float]:
    """Energy distance of the crops of two sets of pictures, unbiased, and its standard error.

    With d the Euclidean distance over sqrt(F), and crops of the same picture never compared with
    each other: 2 E d(x, y) - E d(x, x') - E d(y, y'). The error is the jackknife's over pictures.

    Args:
        a, b: features [N, F].
        a_units, b_units: the picture of each crop, [N]; every picture has as many crops.
    """
    across = _mean_distances(a, a_units, b, b_units)
    within_a, within_b = (
        _mean_distances(x, units, x, units) for x, units in ((a, a_units), (b, b_units))
    )

    def distance(rows: slice | NDArray[np.int64], columns: slice | NDArray[np.int64]) -> float:
        inner = within_a[rows][:, rows], within_b[columns][:, columns]
        return float(2 * across[rows][:, columns].mean()) - sum(map(_off_diagonal, inner))

    everything = slice(None)
    variance = 0.0
    for axis, count in enumerate(across.shape):
        others = [np.delete(np.arange(count), i) for i in range(count)]
        left = np.array(
            [distance(i, everything) if axis == 0 else distance(everything, i) for i in others]
        )
        variance += (count - 1) / count * float(np.square(left - np.mean(left)).sum())
    return distance(everything, everything), math.sqrt(variance)


def _mean_distances(a: Array, a_units: Integers, b: Array, b_units: Integers) -> Array:
    """Mean distance between the crops of every two pictures, [pictures of a, pictures of b]."""
    exact = "donot_use_mm_for_euclid_dist"
    both = torch.cdist(torch.from_numpy(a), torch.from_numpy(b), compute_mode=exact)
    distances = both.numpy() / math.sqrt(a.shape[1])
    rows, columns = (np.unique(units, return_inverse=True)[1] for units in (a_units, b_units))
    ones = [
        np.eye(part.max() + 1)[:, part] / np.bincount(part)[:, None] for part in (rows, columns)
    ]
    return np.asarray(ones[0] @ distances @ ones[1].T)


def _off_diagonal(square: Array) -> float:
    count = len(square)
    return float((square.sum() - np.trace(square)) / (count * (count - 1)))
