"""Evaluate degraders on pairs: every figure of every one of them, with floors and intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from deflow_aug import randomness
from deflow_aug.randomness import Stream

from . import floors
from .curves import Curves, Sums
from .degraders import Degrader, Density, draw
from .intervals import Interval, resample_weights
from .measured import FIGURES, Measured, Real, figures, measure, of_sums
from .noise import Array, Image8, Pair
from .scenes import scene_of

LEAST_SIDE = 64
"""Pictures need sides of so many pixels."""

SAME, OTHERS = "floor: same picture", "floor: other pictures"
"""Names of the floors."""

Figures = dict[str, Interval]


@dataclass(frozen=True)
class Bits:
    """Bits per dimension of the real degraded pictures under a model.

    Args:
        degraded: as pictures of the degraded domain.
        clean: as if they were clean ones.
        saved: the difference, clean - degraded: what knowing the degradation is worth.
    """

    degraded: Interval
    clean: Interval
    saved: Interval


@dataclass(frozen=True)
class Evaluation:
    """All figures of degraders on a set of pairs.

    Args:
        pairs: the pictures.
        scenes: how many scenes they show.
        methods: figures of each degrader (see FIGURES), in the order given.
        floors: figures of real noise against real noise (:mod:`~.floors`).
        differences: of all but the first degrader, its figures less the first one's, resample by
            resample: where an interval lies above 0, the first one is nearer to the real noise.
        bits: of degraders that know densities.
        sums: means over the pictures of what curves are made of, by name; the first is "real".
        samples: the first sample of every picture, by degrader.
        temperature, draws, seed: as they were asked for.
    """

    pairs: tuple[Pair, ...]
    scenes: int
    methods: dict[str, Figures]
    floors: dict[str, Figures]
    differences: dict[str, Figures]
    bits: dict[str, Bits]
    sums: dict[str, Sums]
    samples: dict[str, list[Image8]]
    temperature: float
    draws: int
    seed: int


def evaluate(
    pairs: Sequence[Pair],
    degraders: Mapping[str, Degrader],
    *,
    temperature: float = 1.0,
    draws: int = 4,
    seed: int = 0,
    scenes: str | None = None,
    progress: bool = False,
) -> Evaluation:
    """Draw samples of the clean halves of pairs and compare their noise with the real one.

    Args:
        pairs: pictures of at least 64 x 64 pixels.
        degraders: by name. Those with a :class:`~.degraders.Density` also tell bits per dimension.
        temperature: of all samples.
        draws: samples of each picture; variety needs two.
        seed: of everything random.
        scenes: regular expression that tells which pairs show one scene
            (:func:`~.scenes.scene_of`); scenes are what intervals resample.
        progress: show a bar.

    Raises:
        TypeError: if a degrader does not return pictures uint8 [H, W, 3].
        ValueError: without pairs or degraders, if pictures are too small or hold no noise, or for
            settings out of range.
    """
    _check(pairs, degraders, draws)
    weights = resample_weights([scene_of(pair.name, scenes) for pair in pairs], seed)
    real = Real.of(pairs)
    if not real.variances.any():
        raise ValueError("the pairs hold no noise: clean and degraded pictures are the same")
    measured: dict[str, Measured] = {}
    first: dict[str, list[Image8]] = {}
    bits: dict[str, Bits] = {}
    bar = tqdm(total=len(degraders) * len(pairs), desc="sampling", disable=not progress)
    for name, degrader in degraders.items():
        parts, first[name], found = [], [], []
        for index, pair in enumerate(pairs):
            bar.set_postfix_str(name)
            samples = draw(name, degrader, pair.clean, temperature, draws, _seed(seed, index))
            parts.append(measure(real, index, pair.clean, samples))
            first[name].append(samples[0])
            if isinstance(degrader, Density):
                found.append([degrader.bits(pair.degraded, domain) for domain in (True, False)])
            bar.update()
        measured[name] = Measured.stack(parts)
        if found:
            bits[name] = _bits(np.array(found), weights)
    bar.close()
    values = {name: figures(real, m, weights) for name, m in measured.items()}
    ours = next(iter(values.values()))
    return Evaluation(
        pairs=tuple(pairs),
        scenes=len({scene_of(pair.name, scenes) for pair in pairs}),
        methods={name: _figures(v) for name, v in values.items()},
        floors=_floors(real, pairs, weights, seed),
        differences={name: _figures(v - ours) for name, v in list(values.items())[1:]},
        bits=bits,
        sums={
            "real": real.sums.weighted(weights[0]),
            **{name: m.sums.weighted(weights[0]) for name, m in measured.items()},
        },
        samples=first,
        temperature=temperature,
        draws=draws,
        seed=seed,
    )


def curves(evaluation: Evaluation) -> dict[str, Curves]:
    """The curves of the real noise and of every degrader, by name."""
    return {name: Curves.of(sums) for name, sums in evaluation.sums.items()}


def _floors(real: Real, pairs: Sequence[Pair], weights: Array, seed: int) -> dict[str, Figures]:
    both = [floors.halves(n, p.clean) for n, p in zip(real.noises, pairs, strict=True)]
    left, right = (Sums.stack(side) for side in zip(*both, strict=True))
    nothing = np.full(len(pairs), np.nan)
    same = Measured(
        np.stack([floors.halves_kl(n) for n in real.noises]),
        nothing,
        np.array([floors.neighbours_kl(n) for n in real.noises]),
        np.array([floors.shifted_akld(n) for n in real.noises]),
        nothing,
        right,
    )
    against_left = dataclasses.replace(real, sums=left)
    result = {SAME: _figures(figures(against_left, same, weights))}
    if len(pairs) > 1:
        others = Measured(
            floors.others_kl(real.sums.counts),
            nothing,
            floors.others_srgb(real.patches),
            nothing,
            nothing,
            real.sums,
        )
        found = _figures(figures(real, others, weights))
        mean = floors.halvings(real.sums, len(pairs), of_sums, seed)
        names = ("kld_pooled", "level", "correlation", "covariance", "spectrum")
        found |= {name: Interval(float(v)) for name, v in zip(names, mean, strict=True)}
        result[OTHERS] = found
    return result


def _figures(values: Array) -> Figures:
    """Intervals by name of values [1 + R, F]."""
    return {name: Interval.of(v) for name, v in zip(FIGURES, values.T, strict=True)}


def _bits(found: Array, weights: Array) -> Bits:
    """Of bits [N, 2] in the degraded and the clean domain."""
    degraded, clean = (weights @ found / weights.sum(-1, keepdims=True)).T
    return Bits(Interval.of(degraded), Interval.of(clean), Interval.of(clean - degraded))


def _seed(seed: int, index: int) -> int:
    """The seed of the samples of a picture: the same for all degraders."""
    return int(randomness.generator(seed, Stream.EVALUATE, 2, index).integers(2**63))


def _check(pairs: Sequence[Pair], degraders: Mapping[str, Degrader], draws: int) -> None:
    if not pairs:
        raise ValueError("no pairs to measure")
    if not degraders:
        raise ValueError("no degraders to evaluate")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    for pair in pairs:
        if min(pair.clean.shape[:2]) < LEAST_SIDE:
            height, width = pair.clean.shape[:2]
            raise ValueError(
                f"{pair.name} is {width} x {height} pixels; at least {LEAST_SIDE} x {LEAST_SIDE} "
                "are needed"
            )
