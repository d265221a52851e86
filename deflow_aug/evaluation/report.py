"""Compare synthetic with real noise, picture by picture and pooled, and write the comparison down.

``Reference.of(pairs)`` holds what does not depend on the model (the real noise, the best white
noise), so that a training script can compute it once; ``reference.compare(samples)`` adds the
model's samples of the same clean pictures; ``report`` does both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .noise import (
    Array,
    Image8,
    NoiseStatistics,
    Pair,
    WhiteNoise,
    best_white_noise,
    correlation,
    mass_left_out,
    mean_kl,
    pooled,
    rank_correlation,
    resolution_kl,
    summed_kl,
    white_noise,
)
from .tables import Table, number, without_nan

# What a model is held to (see Comparison.criteria).
LAG_TOLERANCE = 0.10
STD_TOLERANCE = 0.25
POOLED_KL_SHARE = 0.5
SINGLE_KL_SHARE = 0.8

_SPLITS = 50  # random halvings of the pictures for the pooled floor
_COLUMNS = {
    "std": "std",
    "lag_horizontal": "lag-1 h",
    "lag_vertical": "lag-1 v",
    "rg": "R-G",
    "gb": "G-B",
    "rb": "R-B",
}


@dataclass(frozen=True)
class Reference:
    """Everything about pairs that does not depend on a model."""

    pairs: list[Pair]
    real: list[NoiseStatistics]
    white: WhiteNoise
    white_pooled: list[NoiseStatistics]  # of the white noise of white.sigma_pooled
    white_single: list[NoiseStatistics]  # of the white noise of white.sigma_mean
    seed: int

    @classmethod
    def of(cls, pairs: Sequence[Pair], seed: int = 0, white: WhiteNoise | None = None) -> Reference:
        """Measure ``pairs``; ``white`` skips the search for the best sigmas (seconds)."""
        if not pairs:
            raise ValueError("no pairs to measure")
        white = white or best_white_noise(pairs, seed)
        real = [NoiseStatistics.between(p.degraded, p.clean) for p in pairs]
        at_pooled, at_mean = (
            [
                NoiseStatistics.between(noisy, p.clean)
                for noisy, p in zip(white_noise(pairs, sigma, seed), pairs, strict=True)
            ]
            for sigma in (white.sigma_pooled, white.sigma_mean)
        )
        return cls(list(pairs), real, white, at_pooled, at_mean, seed)

    @cached_property
    def others(self) -> list[float]:
        """Summed KL of each picture's real noise against that of all other pictures together.

        A floor for single pictures: nothing that does not know a picture's ISO does much better.
        """
        total = pooled(self.real)
        each = [summed_kl(r.counts, total - r.counts) for r in self.real]
        return each if len(each) > 1 else [math.nan]

    @cached_property
    def halves(self) -> list[float]:
        """KL [3] of the pooled real noise of half of the pictures against that of the others.

        The mean over random halvings: what the real noise itself scores, pooled.
        """
        count = len(self.real)
        if count < 2:
            return [math.nan] * 3
        rng = np.random.default_rng(self.seed)
        total, each = pooled(self.real), []
        for _ in range(_SPLITS):
            half = pooled([self.real[i] for i in rng.permutation(count)[: count // 2]])
            each.append(resolution_kl(half, total - half))
        return [float(v) for v in np.mean(each, axis=0)]

    def compare(self, samples: Sequence[Image8]) -> Comparison:
        """Compare with degraded versions uint8 [H, W, 3] of the pairs' clean pictures, in order."""
        both = zip(samples, self.pairs, strict=True)
        return Comparison(self, [NoiseStatistics.between(s, p.clean) for s, p in both])


@dataclass(frozen=True)
class Criterion:
    """One target: its figures in words, and whether it is met."""

    name: str
    figures: str
    passed: bool


@dataclass(frozen=True)
class Comparison:
    """Real noise against a model's samples ("ours") of the same clean pictures."""

    reference: Reference
    ours: list[NoiseStatistics]

    def summary(self) -> dict[str, float]:
        """The figures to follow a training by: means over pairs, KLs summed over resolutions."""
        real, ours, white = self.reference.real, self.ours, self.reference.white
        return {
            "std_real": _mean(real, "std"),
            "std": _mean(ours, "std"),
            "lag_real": _mean(real, "lag"),
            "lag": _mean(ours, "lag"),
            "rg_real": _mean(real, "rg"),
            "rg": _mean(ours, "rg"),
            "kl_pooled": summed_kl(pooled(real), pooled(ours)),
            "kl_mean": mean_kl(real, ours),
            "white_pooled": white.kl_pooled,
            "white_mean": white.kl_mean,
            "corr_std": self.correlations()["std"][0],
        }

    def correlations(self) -> dict[str, tuple[float, float]]:
        """Pearson and Spearman correlation over the pairs, real against ours."""
        result = {}
        for key in ("std", "lag"):
            a, b = _values(self.reference.real, key), _values(self.ours, key)
            result[key] = correlation(a, b), rank_correlation(a, b)
        return result

    def criteria(self) -> list[Criterion]:
        """What is asked of a model; comparisons with nan count as missed."""
        s, found = self.summary(), self.correlations()
        ratio = s["std"] / s["std_real"]
        result = [
            Criterion(
                f"mean lag-1 correlation within {LAG_TOLERANCE:.2f} of real",
                f"{s['lag']:.3f} against {s['lag_real']:.3f}",
                abs(s["lag"] - s["lag_real"]) <= LAG_TOLERANCE,
            ),
            Criterion(
                f"mean standard deviation within {STD_TOLERANCE:.0%} of real",
                f"{s['std']:.2f} against {s['std_real']:.2f} ({ratio - 1:+.0%})",
                abs(ratio - 1) <= STD_TOLERANCE,
            ),
        ]
        for key, name in (("std", "standard deviation"), ("lag", "lag-1 correlation")):
            pearson, spearman = found[key]
            result.append(
                Criterion(
                    f"{name} correlated with real over the pairs (both > 0)",
                    f"Pearson {pearson:.2f}, Spearman {spearman:.2f}",
                    pearson > 0 and spearman > 0,
                )
            )
        for name, kl, white, share in (
            ("pooled noise", s["kl_pooled"], s["white_pooled"], POOLED_KL_SHARE),
            ("single pairs, mean", s["kl_mean"], s["white_mean"], SINGLE_KL_SHARE),
        ):
            result.append(
                Criterion(
                    f"summed KL, {name}, at most {share} of the best white noise's",
                    f"{kl:.3f} against {white:.3f} (share {kl / white:.2f})",
                    kl <= share * white,
                )
            )
        return result

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain numbers, for JSON; nan becomes None."""
        ref, pairs = self.reference, []
        for i, pair in enumerate(ref.pairs):
            pairs.append(
                {
                    "name": pair.name,
                    "real": _plain(ref.real[i]),
                    "ours": _plain(self.ours[i]),
                    "kl_ours": summed_kl(ref.real[i].counts, self.ours[i].counts),
                    "kl_white": summed_kl(ref.real[i].counts, ref.white_single[i].counts),
                    "kl_others": ref.others[i],
                }
            )
        result = {
            "summary": self.summary(),
            "white": vars(ref.white),
            "floor": {"kl_halves": ref.halves, "kl_others_mean": float(np.mean(ref.others))},
            "correlations": self.correlations(),
            "criteria": [vars(c) for c in self.criteria()],
            "pairs": pairs,
            "seed": ref.seed,
        }
        return dict(without_nan(result))

    def to_markdown(self) -> str:
        """Per-pair table, summary table, criteria."""
        return "\n".join(table.to_markdown() for table in self.tables())

    def tables(self) -> tuple[Table, Table, Table]:
        """Figures per pair, their summary, the criteria."""
        ref, rows = self.reference, []
        for i, pair in enumerate(ref.pairs):
            r, o, w = ref.real[i], self.ours[i], ref.white_single[i]
            kls = [summed_kl(r.counts, x.counts) for x in (o, w)]
            values = [r.lag, o.lag, r.rg, o.rg, *kls, ref.others[i]]
            rows.append((pair.name, number(r.std, 2), number(o.std, 2), *map(number, values)))
        head = ["pair", "std real", "ours", "lag-1 real", "ours", "R-G real", "ours"]
        head += ["KL ours", "white", "real of others"]
        criteria = tuple(
            (c.name, c.figures, "pass" if c.passed else "**miss**") for c in self.criteria()
        )
        return (
            Table("", tuple(head), tuple(rows)),
            self._summary_table(),
            Table("", ("criterion", "figures", ""), criteria, align="lll"),
        )

    def _summary_table(self) -> Table:
        ref, rows = self.reference, []
        real = pooled(ref.real)
        white = f"best white (sigma {ref.white.sigma_pooled:.2f}, pairs {ref.white.sigma_mean:.2f})"
        for name, statistics, single in (
            ("real", ref.real, None),
            ("ours", self.ours, mean_kl(ref.real, self.ours)),
            (white, ref.white_pooled, ref.white.kl_mean),
        ):
            means = [_mean(statistics, key) for key in _COLUMNS]
            kls = resolution_kl(real, pooled(statistics))
            text = [number(v) for v in (*kls, sum(kls))] if single is not None else ["-"] * 4
            text.append("-" if single is None else number(single))
            rows.append((name, number(means[0], 2), *map(number, means[1:]), *text))
        floor = [*ref.halves, sum(ref.halves), float(np.mean(ref.others))]
        rows.append(("real of other pictures", *["-"] * 6, *map(number, floor)))
        missing = [mass_left_out(p, q) for p, q in zip(real, pooled(self.ours), strict=True)]
        note = (
            "std in levels (1/255); KL(real || synthetic) in nats, 64 bins over [-0.1, 0.1] with "
            "open ends, bins empty in either left out. Real of other pictures: pooled, random "
            "halves of the pictures against each other; pairs, each against all others. Real "
            "noise in bins that our samples never reach: "
            + ", ".join(f"{100 * m:.3f} %" for m in missing)
            + " (1, 1/2, 1/4)."
        )
        columns = ("", *_COLUMNS.values(), "pooled KL 1", "1/2", "1/4", "sum", "KL of pairs")
        return Table("", columns, tuple(rows), (note,))


def report(
    pairs: Sequence[Pair],
    degrade: Callable[[Image8], Image8],
    seed: int = 0,
    white: WhiteNoise | None = None,
) -> Comparison:
    """Degrade each clean picture (uint8 [H, W, 3] to the same) once and compare with the real.

    ``seed`` draws the white noise; that of ``degrade`` is the caller's affair.
    """
    return Reference.of(pairs, seed, white).compare([degrade(pair.clean) for pair in pairs])


def summary(
    triples: Sequence[tuple[Image8, Image8, Image8]],
    white: WhiteNoise | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """:meth:`Comparison.summary` of (clean, real, synthetic) pictures, uint8 [H, W, 3].

    For repeated use keep ``best_white_noise(pairs)`` and pass it, or keep a :class:`Reference`.
    """
    pairs = [Pair(str(i), clean, real) for i, (clean, real, _) in enumerate(triples)]
    return Reference.of(pairs, seed, white).compare([t[2] for t in triples]).summary()


def _values(statistics: Sequence[NoiseStatistics], key: str) -> Array:
    return np.array([getattr(s, key) for s in statistics], dtype=np.float64)


def _mean(statistics: Sequence[NoiseStatistics], key: str) -> float:
    return float(np.mean(_values(statistics, key)))


def _plain(statistics: NoiseStatistics) -> dict[str, float]:
    return {key: getattr(statistics, key) for key in (*_COLUMNS, "lag")}
