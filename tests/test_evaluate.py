"""Evaluations of degraders whose noise is known: figures, floors, intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from deflow_aug.baselines import Nothing, WhiteNoise
from deflow_aug.evaluation import floors
from deflow_aug.evaluation.compare import OTHERS, SAME, Evaluation, evaluate
from deflow_aug.evaluation.divergences import akld, kld_noiseflow, kld_srgb, noiseflow_counts
from deflow_aug.evaluation.intervals import Interval, resample_weights
from deflow_aug.evaluation.measured import FIGURES
from deflow_aug.evaluation.noise import Pair, noise_of

SIZE = 128


def degraded(clean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Noise that grows with brightness, correlated in space, and between R and G."""
    n = rng.standard_normal((clean.shape[0] + 1, clean.shape[1] + 1, 3))
    n[..., 1] = (n[..., 0] + n[..., 1]) / math.sqrt(2)
    smooth = (n[1:, 1:] + n[:-1, 1:] + n[1:, :-1] + n[:-1, :-1]) / 2
    return np.clip(np.rint(clean + (3 + clean / 50) * smooth), 0, 255).astype(np.uint8)


@dataclass
class Same:
    """Another shot by the same camera: the best that a degrader can be."""

    keeps: bool = False
    change: Callable[[Any], Any] = lambda samples: samples

    def degrade(self, img: Any, temperature: float, n_samples: int, *, seed: int) -> Any:
        rng = np.random.default_rng(seed)
        samples = [degraded(img, rng) for _ in range(1 if self.keeps else n_samples)]
        result = np.stack(samples * n_samples if self.keeps else samples)
        return self.change(result if n_samples > 1 else result[0])


@dataclass
class Knowing(Same):
    """One with a density, of made-up bits."""

    def bits(self, img: np.ndarray, degraded: bool) -> float:
        return float(img.mean()) / 100 + (0 if degraded else 0.5)


def make_pairs(count: int = 6) -> list[Pair]:
    rng, pairs = np.random.default_rng(0), []
    for i in range(count):
        row = np.linspace(60 + 5 * i, 180, SIZE).round().astype(np.uint8)
        clean = np.broadcast_to(row[:, None, None], (SIZE, SIZE, 3)).copy()
        pairs.append(Pair(f"scene{i // 2}_{i}", clean, degraded(clean, rng)))
    return pairs


PAIRS = make_pairs()
DEGRADERS = {
    "same": Knowing(),
    "keeps": Same(keeps=True),
    "white": WhiteNoise(6.0),
    "nothing": Nothing(),
}


@pytest.fixture(scope="module", name="found")
def _found() -> Evaluation:
    return evaluate(PAIRS, DEGRADERS, draws=3, seed=1)


def value(found: Evaluation, method: str, figure: str) -> float:
    return {**found.methods, **found.floors}[method][figure].value


def test_another_shot_is_at_the_floors_and_before_all_others(found: Evaluation) -> None:
    assert value(found, "same", "variety") == pytest.approx(1, abs=0.05)
    assert value(found, "same", "missed") < 0.01
    for figure in ("kld_noiseflow", "kld_pooled", "kld_srgb", "akld", *FIGURES[8:12]):
        floor = max(value(found, SAME, figure), 0.05)
        assert value(found, "same", figure) < 1.3 * floor, figure
        lows = [found.differences["white"][figure].low]
        if not figure.startswith("kld_noiseflow") and figure != "kld_pooled":
            lows.append(found.differences["nothing"][figure].low)
        assert min(lows) > 0, figure


def test_what_is_not_random_has_no_variety(found: Evaluation) -> None:
    assert value(found, "keeps", "variety") == 0
    assert value(found, "nothing", "variety") == 0
    assert value(found, "keeps", "akld") == pytest.approx(value(found, "same", "akld"), abs=0.03)
    one = evaluate(PAIRS[:2], {"same": Same()}, draws=1)
    assert math.isnan(value(one, "same", "variety"))


def test_nothing_scores_one_where_errors_are_relative(found: Evaluation) -> None:
    for figure in ("level", "correlation", "covariance", "spectrum"):
        assert value(found, "nothing", figure) == 1
    # Hardly a value of the real noise lies in the one bin that it occupies.
    assert value(found, "nothing", "missed") > 0.8


def test_figures_are_means_over_draws_and_pictures() -> None:
    found = evaluate(PAIRS[:2], {"a": Same()}, draws=2, seed=3)
    each: dict[str, list[Any]] = {"kld_noiseflow": [], "kld_srgb": [], "akld": []}
    for pair, sample in zip(PAIRS, found.samples["a"], strict=False):
        # The first sample is kept; the second is drawn after it from the same generator.
        both = [
            s for rng in [_rng_of(pair, sample)] for s in (degraded(pair.clean, rng) for _ in "ab")
        ]
        real = noise_of(pair.degraded, pair.clean)
        fakes = [noise_of(s, pair.clean) for s in both]
        each["kld_noiseflow"].append(np.mean([kld_noiseflow(real, f).sum() for f in fakes]))
        each["kld_srgb"].append(np.mean([kld_srgb(real, f) for f in fakes]))
        each["akld"].append(akld(real, fakes))
    for figure, values in each.items():
        assert value(found, "a", figure) == pytest.approx(np.mean(values)), figure


def _rng_of(pair: Pair, sample: np.ndarray) -> np.random.Generator:
    """A generator at its start, the one that the sample was drawn with."""
    from deflow_aug.evaluation.compare import _seed

    for index in range(len(PAIRS)):
        if np.array_equal(degraded(pair.clean, np.random.default_rng(_seed(3, index))), sample):
            return np.random.default_rng(_seed(3, index))
    raise AssertionError("no seed draws this sample")


def test_bits_are_asked_of_those_who_know(found: Evaluation) -> None:
    assert list(found.bits) == ["same"]
    bits = found.bits["same"]
    mean = np.mean([p.degraded.mean() / 100 for p in PAIRS])
    assert bits.degraded.value == pytest.approx(mean)
    assert bits.degraded.low < mean < bits.degraded.high
    assert bits.saved.value == pytest.approx(0.5)
    assert (bits.saved.low, bits.saved.high) == pytest.approx((0.5, 0.5))


def test_differences_are_to_the_first(found: Evaluation) -> None:
    assert list(found.differences) == ["keeps", "white", "nothing"]
    gap = value(found, "white", "akld") - value(found, "same", "akld")
    assert found.differences["white"]["akld"].value == pytest.approx(gap)


def test_the_seed_alone_decides(found: Evaluation) -> None:
    state = np.random.get_state()[1].tolist()  # noqa: NPY002
    again = evaluate(PAIRS, {"same": Knowing(), "white": WhiteNoise(6.0)}, draws=3, seed=1)
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002
    assert again.methods["white"] == found.methods["white"]
    assert again.differences["white"] == found.differences["white"]
    assert str(again.floors) == str(found.floors)  # nan is not equal to itself
    other = evaluate(PAIRS[:2], {"same": Same()}, draws=1, seed=2)
    assert not np.array_equal(other.samples["same"][0], found.samples["same"][0])


def test_temperature_reaches_the_degraders() -> None:
    found = evaluate(PAIRS[:1], {"white": WhiteNoise(6.0)}, temperature=0.5, draws=1)
    noise = noise_of(found.samples["white"][0], PAIRS[0].clean)
    assert noise.std() == pytest.approx(3, rel=0.05)


def test_one_pair_has_no_interval_and_no_other_pictures() -> None:
    found = evaluate(PAIRS[:1], {"white": WhiteNoise(6.0)}, draws=1)
    assert OTHERS not in found.floors
    assert math.isnan(found.methods["white"]["akld"].low)
    assert found.methods["white"]["akld"].value > 0


def test_pairs_of_one_scene_are_drawn_together() -> None:
    found = evaluate(PAIRS, {"white": WhiteNoise(6.0)}, draws=1, scenes=r"^(\w+)_\d")
    assert found.scenes == 3
    with pytest.raises(ValueError, match="does not match"):
        evaluate(PAIRS, {"white": WhiteNoise(6.0)}, scenes="^kitchen")
    with pytest.raises(ValueError, match="no regular expression"):
        evaluate(PAIRS, {"white": WhiteNoise(6.0)}, scenes="(")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": []}, "no pairs"),
        ({"degraders": {}}, "no degraders"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"pairs": [Pair("a", PAIRS[0].clean, PAIRS[0].clean)]}, "hold no noise"),
        (
            {"pairs": [Pair("a", PAIRS[0].clean[:63, :80], PAIRS[0].degraded[:63, :80])]},
            "a is 80 x 63 pixels; at least 64 x 64",
        ),
    ],
)
def test_senseless_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"pairs": PAIRS[:1], "degraders": {"white": WhiteNoise(1.0)}}
    with pytest.raises(ValueError, match=message):
        evaluate(**{**given, **arguments})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s / 255, "got float64"),
        (lambda s: s[:, :32], r"expected samples uint8 \(128, 128, 3\), got uint8"),
        (lambda s: s[:1], "expected 2 samples, got 1"),
        (lambda s: [None, None], "got NoneType"),
    ],
)
def test_degraders_must_return_pictures(change: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"odd: {message}|odd: .*{message}"):
        evaluate(PAIRS[:1], {"odd": Same(change=change)}, draws=2)


def test_floors_of_noise_that_is_the_same_everywhere() -> None:
    rng = np.random.default_rng(4)
    noises = [np.rint(rng.normal(0, 8, (256, 256, 3))) for _ in range(3)]
    assert floors.halves_kl(noises[0]).sum() == pytest.approx(0, abs=0.01)
    assert floors.shifted_akld(noises[0]) == pytest.approx(0.045, abs=0.004)
    second = np.rint(rng.normal(0, 8, (256, 256, 3)))
    assert floors.neighbours_kl(noises[0]) == pytest.approx(kld_srgb(noises[0], second), rel=0.1)
    counts = np.stack([noiseflow_counts(noise) for noise in noises])
    assert np.abs(floors.others_kl(counts)).max() < 0.01


def test_floors_see_what_differs_between_places_and_pictures() -> None:
    rng = np.random.default_rng(5)
    quiet, loud = (rng.normal(0, s, (128, 128, 3)) for s in (4, 8))
    halves = np.concatenate([quiet[:, :64], loud[:, :64]], axis=1)
    assert floors.halves_kl(halves)[0] > 0.1
    counts = np.stack([noiseflow_counts(noise) for noise in (quiet, loud)])
    assert floors.others_kl(counts)[0] == pytest.approx(kld_noiseflow(quiet, loud))
    # A patch that is loud beside one that is quiet.
    columns = np.concatenate([quiet[:, :32], loud[:, :32], quiet[:, :32], loud[:, :32]], axis=1)
    apart = (kld_srgb(quiet[:, :32], loud[:, :32]) + kld_srgb(loud[:, :32], quiet[:, :32])) / 2
    assert floors.neighbours_kl(columns) == pytest.approx(apart, rel=0.1)


def test_intervals_of_a_mean_are_those_of_theory() -> None:
    values = np.random.default_rng(6).normal(10, 2, 100)
    weights = resample_weights([str(i) for i in range(100)], seed=0, resamples=2000)
    assert weights.shape == (2001, 100)
    assert weights[0].tolist() == [1] * 100
    assert (weights.sum(axis=1) == 100).all()
    found = Interval.of(weights @ values / weights.sum(-1))
    half = 1.96 * values.std() / 10
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.1 * half
    )


def test_scenes_make_intervals_wider() -> None:
    values = np.repeat(np.random.default_rng(7).normal(0, 1, 25), 4)

    def width(scenes: list[str]) -> float:
        weights = resample_weights(scenes, seed=0)
        found = Interval.of(weights @ values / weights.sum(-1))
        return found.high - found.low

    apart, together = width([str(i) for i in range(100)]), width([str(i // 4) for i in range(100)])
    assert together == pytest.approx(2 * apart, rel=0.1)
    assert math.isnan(width(["one"] * 100))


def test_intervals_as_text() -> None:
    assert Interval(0.12345, 0.1, 0.2).text() == "0.123 [0.100, 0.200]"
    assert Interval(0.12345).text(2) == "0.12"
    assert Interval(math.nan).text() == "-"
    assert dataclasses.astuple(Interval.of(np.array([1.0])))[0] == 1
