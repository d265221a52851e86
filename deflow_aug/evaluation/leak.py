"""Does h(x) give the domain away? Small classifiers on h(clean) against h(degraded).

If the conditioning reveals the domain, the flow needs no latent shift: it moves the domains on top
of each other by what h tells it, and learns no degradation (sections 3.3 and 4.2). So h must keep
as much of the image as possible (a small s, little noise) without giving the domain away, eq. (6).

For each s and noise level, a classifier is trained on h of crops of some images and scores h of
crops of others, in turn for all (cross-validation). All scales see the same crops, of the same
area of the image, so that they differ in what h keeps and in nothing else. Domains also differ
in content: beside the classifier stand two regressions that see the mean colour, or the contrast,
of h(crop) and nothing else; and the mean colours can be matched by weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from deflow_aug import randomness
from deflow_aug.conditioning import domain_invariant
from deflow_aug.evaluation import classifying
from deflow_aug.evaluation.auc import (
    Array,
    Bools,
    Separation,
    deal,
    held_out,
    logistic,
    probability,
    worth,
)
from deflow_aug.evaluation.crops import LEAST_UNITS, SMALLEST_SIDE, Crops, LeakError
from deflow_aug.randomness import Stream

WINDOW = 8
"""Side of the windows of local energies, in pixels of h."""

FLOOR = 1 / 255
"""A standard deviation below which no structure matters: a level of 8 bits."""


@dataclass(frozen=True)
class Reading:
    """What tells h(clean) from h(degraded) at one scale and noise level.

    Args:
        network: the small convolutional classifier.
        colour: a regression on the mean colour of h(crop) alone.
        contrast: a regression on the standard deviations of h(crop)'s channels alone.
    """

    scale: int
    noise: float
    network: Separation
    colour: Separation
    contrast: Separation


@dataclass(frozen=True)
class Sweep:
    """All readings, by scale and then noise.

    Args:
        readings: one for each scale and noise level that could be measured.
        units: images (scenes) of the clean and of the degraded domain; with matched brightness,
            how many equally weighted ones the weighted ones are worth.
        notes: what was left out, in sentences.
    """

    readings: tuple[Reading, ...]
    units: tuple[float, float]
    notes: tuple[str, ...]


def sweep(
    crops: Crops,
    scales: Sequence[int],
    noises: Sequence[float],
    *,
    match_brightness: bool = False,
    steps: int = 100,
    seed: int = 0,
) -> Sweep:
    """Measure every scale at every noise level. The same arguments give the same readings.

    Args:
        scales: downsampling factors s.
        noises: standard deviations of the noise on h.
        match_brightness: weight the crops such that mean colour and spread of brightness are the
            same in both domains; see :func:`_matching`.
        steps: training steps of each classifier.
    """
    notes = list(crops.notes)
    measured = sorted({s for s in scales if crops.side // s >= SMALLEST_SIDE})
    if missing := sorted(set(scales) - set(measured)):
        notes.append(
            f"s = {', '.join(map(str, missing))} left out: of crops of {crops.side} pixels fewer "
            f"than {SMALLEST_SIDE} x {SMALLEST_SIDE} are left"
        )
    if not measured:
        raise LeakError(
            f"crops of {crops.side} pixels are too small for every scale asked about: of s = "
            f"{min(scales)} at least {min(scales) * SMALLEST_SIDE} are needed; choose larger "
            "images, or crops"
        )
    rng = randomness.generator(seed, Stream.SUGGEST, 2)
    sides = [len(np.unique(crops.units[crops.degraded == d])) for d in (False, True)]
    fold = deal(crops.units, crops.degraded, min(classifying.FOLDS, *sides), rng)
    numbers = np.unique(fold)
    # For every fold: weights of all crops, of those in it and of those outside.
    equal = classifying.equal_weights(crops.units, crops.degraded)
    weights = np.stack([equal] * len(numbers))
    units = (float(sides[0]), float(sides[1]))
    if match_brightness:
        colour = _brightness(crops.pixels)
        held = [_matching(colour, crops, equal, fold == n) for n in numbers]
        rest = [_matching(colour, crops, equal, fold != n) for n in numbers]
        weights = np.stack(
            [np.where(fold == n, h, r) for n, h, r in zip(numbers, held, rest, strict=True)]
        )
        scored = weights[fold, np.arange(len(fold))]
        units = tuple(  # type: ignore[assignment]
            worth(scored[crops.degraded == d], crops.units[crops.degraded == d])
            for d in (False, True)
        )
        if min(units) < LEAST_UNITS:
            notes.append(
                "the mean colours of the two domains hardly overlap: matched, they are worth "
                f"{units[0]:.1f} clean and {units[1]:.1f} degraded images, too few to tell"
            )
    readings = []
    progress = tqdm(total=len(measured) * len(noises) * len(numbers), desc="training classifiers")
    with progress:
        for scale in measured:
            small = _downscaled(crops.pixels, scale)
            for index, noise in enumerate(sorted(set(noises))):
                progress.set_postfix_str(f"s = {scale}, noise {noise:g}")
                h = small + noise * randomness.normal(
                    tuple(small.shape), seed, Stream.SUGGEST, 3, scale, index
                )
                scores = np.zeros((3, len(fold)))
                simple = _colour_features(h), _contrast_features(h)
                for number in numbers:
                    train, test = fold != number, fold == number
                    key = (seed, Stream.SUGGEST, 4, scale, index, int(number))
                    w = weights[number]
                    net = classifying.train(
                        classifying.seeded(partial(Classifier, noise), 0),
                        small,
                        crops.degraded,
                        w * train,
                        steps,
                        key,
                        noise=noise,
                    )
                    scores[0, test] = classifying.scores(net, h[torch.from_numpy(test)])
                    for row, features in enumerate(simple, start=1):
                        scores[row, test] = _regressed(features, crops, w, train, test)
                    progress.update()
                scored = weights[fold, np.arange(len(fold))]
                found = [held_out(row, scored, crops.degraded, crops.units, fold) for row in scores]
                readings.append(Reading(scale, float(noise), *found))
    return Sweep(tuple(readings), units, tuple(notes))


def _polynomial(values: Array) -> Array:
    """Columns, their squares and products, [N, F] to [N, F (F + 3) / 2]; standardised."""
    centred = (values - values.mean(0)) / (values.std(0) + 1e-6)
    pairs = [
        centred[:, i] * centred[:, j]
        for i in range(values.shape[1])
        for j in range(i, values.shape[1])
    ]
    columns = np.column_stack([centred, *pairs])
    return np.asarray((columns - columns.mean(0)) / (columns.std(0) + 1e-6))


def _matching(features: Array, crops: Crops, equal: Array, part: Bools) -> Array:
    """Overlap weights (Li, Morgan and Zaslavsky, 2018), [N], within a part of the crops.

    With e = P(degraded given the features) by logistic regression, clean crops get the weight e and
    degraded ones 1 - e: weighted so, the features have the same mean in both domains (exactly, but
    for the prior that keeps the regression finite where the domains do not overlap).

    What is trained on and what is held out are matched each for itself. In simulations, weights of
    the held-out crops by the regression of the training crops pushed the AUC of equal domains
    down to 0.27: where the regression overfits, it leaves the held-out crops with the opposite
    difference. Labels of held-out images decide what they weigh in the comparison; no classifier
    sees them.
    """
    beta = logistic(features[part], crops.degraded[part], equal[part], spread=1.0)
    e = probability(features, beta)
    return np.asarray(equal * np.where(crops.degraded, 1 - e, e))


def _brightness(pixels: Tensor) -> Array:
    """What is matched, [N, 4], standardised: mean red, green, blue, and the square of their mean.

    More (all squares and products) overfits some dozens of images.
    """
    colour = pixels.double().mean((2, 3)).numpy() / 255
    grey = colour.mean(1)
    columns = np.column_stack([colour, np.square(grey - grey.mean())])
    return np.asarray((columns - columns.mean(0)) / (columns.std(0) + 1e-6))


def _downscaled(pixels: Tensor, scale: int) -> Tensor:
    """h without its noise, float32 [N, 3, crop / scale, crop / scale]."""
    return torch.cat([domain_invariant(part.float() / 255, scale) for part in pixels.split(16)])


def _colour_features(h: Tensor) -> Array:
    return _polynomial(h.double().mean((2, 3)).numpy())


def _contrast_features(h: Tensor) -> Array:
    return _polynomial(torch.log(h.double().std((2, 3)) + 1e-3).numpy())


def _regressed(features: Array, crops: Crops, weights: Array, train: Bools, test: Bools) -> Array:
    beta = logistic(features[train], crops.degraded[train], weights[train], spread=1.0)
    return probability(features[test], beta)


class Classifier(nn.Module):
    """Logit of "degraded" [B] from h [B, 3, H, W], H and W at least 8.

    Traces of noise are in how much the fine structure varies, most visibly where the image is
    flat, and there they may be a few per cent of the noise n on h, whose energy is known. So the
    first convolution (zero-mean filters of norm 1) is squared and averaged over windows, and what
    it has in excess of n^2 is seen through asinh((energy - n^2) / (n^2 + FLOOR^2) / 0.2): linear
    near zero, logarithmic in texture. With the mean of h in the window beside it (noise depends on
    brightness), further convolutions turn each window into votes, which are averaged.
    """

    def __init__(self, noise: float, filters: int = 12, width: int = 24) -> None:
        super().__init__()
        self.noise = noise
        self.filters = nn.Parameter(torch.randn(filters, 3, 5, 5))
        self.votes = nn.Sequential(
            nn.BatchNorm2d(filters + 3),
            nn.Conv2d(filters + 3, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, 1)

    def forward(self, h: Tensor) -> Tensor:
        window = min(WINDOW, h.shape[-1] - 4)
        filters = self.filters - self.filters.mean((2, 3), keepdim=True)
        filters = filters / filters.square().sum((1, 2, 3), keepdim=True).sqrt()
        energy = F.avg_pool2d(F.conv2d(h, filters).square(), window, stride=WINDOW // 2)
        excess = (energy - self.noise**2) / (self.noise**2 + FLOOR**2)
        mean = F.avg_pool2d(h[..., 2:-2, 2:-2], window, stride=WINDOW // 2)
        votes = self.votes(torch.cat([torch.asinh(excess / 0.2), mean], 1))
        return self.head(votes.mean((2, 3)))[:, 0]
