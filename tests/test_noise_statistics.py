"""The noise statistics on noise of known properties, and the report on known models."""

from __future__ import annotations

import importlib.util
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import deflow_aug
from deflow_aug.evaluation import report as module_report
from deflow_aug.evaluation import summary
from deflow_aug.evaluation.noise import (
    BINS,
    NoiseStatistics,
    Pair,
    add_white_noise,
    best_white_noise,
    box_average,
    channel_correlation,
    correlation,
    histogram,
    histograms,
    kl_divergence,
    lag_correlation,
    load_pairs,
    mass_left_out,
    noise_of,
    pooled,
    rank_correlation,
    standard_deviation,
    summed_kl,
)
from deflow_aug.evaluation.report import Reference


def smooth_noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """White noise summed over boxes 2 x 2, of standard deviation 1, [H, W, 3]."""
    n = rng.standard_normal((height + 1, width + 1, 3))
    return (n[1:, 1:] + n[:-1, 1:] + n[1:, :-1] + n[:-1, :-1]) / 2


def make_pairs(count: int = 6, size: int = 96) -> list[Pair]:
    """Grey ramps with box-filtered noise whose level and correlation grow with brightness."""
    rng = np.random.default_rng(5)
    pairs = []
    for i in range(count):
        ramp = np.linspace(60 + 10 * i, 90 + 10 * i, size)
        clean = np.broadcast_to(ramp[:, None, None], (size, size, 3)).round().astype(np.uint8)
        noise = smooth_noise(rng, size, size) + (0.9 - 0.15 * i) * rng.standard_normal(clean.shape)
        degraded = np.clip(np.rint(clean + (3 + 0.4 * i) * noise), 0, 255).astype(np.uint8)
        pairs.append(Pair(f"p{i}", clean, degraded))
    return pairs


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.of(make_pairs(), seed=3)


def test_white_noise_has_its_sigma_and_no_correlation() -> None:
    clean = np.full((256, 256, 3), 128, np.uint8)
    s = NoiseStatistics.between(add_white_noise(clean, 5.0, np.random.default_rng(0)), clean)
    assert s.std == pytest.approx(math.sqrt(25 + 1 / 12), rel=0.01)  # rounding adds 1/12
    figures = [s.lag_horizontal, s.lag_vertical, s.lag, s.rg, s.gb, s.rb]
    assert figures == pytest.approx([0] * 6, abs=0.02)


def test_white_noise_is_clipped_and_rounded_to_8_bit() -> None:
    dark = add_white_noise(np.zeros((64, 64, 3), np.uint8), 5.0, np.random.default_rng(0))
    assert dark.dtype == np.uint8
    assert (dark == 0).mean() == pytest.approx(0.54, abs=0.03)  # N(0, 5) below 0.5


def test_lag_correlation_of_filtered_noise() -> None:
    rng = np.random.default_rng(1)
    assert lag_correlation(smooth_noise(rng, 256, 256)) == pytest.approx((0.5, 0.5), abs=0.02)
    white = rng.standard_normal((256, 259, 3))
    along_rows = white[:, 3:] + white[:, 2:-1] + white[:, 1:-2] + white[:, :-3]
    assert lag_correlation(along_rows) == pytest.approx((0.75, 0.0), abs=0.02)


def test_channel_correlation_of_mixed_noise_in_order() -> None:
    r, other, b = np.random.default_rng(2).standard_normal((3, 256, 256))
    noise = np.stack([r, 0.6 * r + 0.8 * other, b + other], axis=-1)
    expected = 0.6, 0.8 / math.sqrt(2), 0.0
    assert channel_correlation(noise) == pytest.approx(expected, abs=0.02)


def test_box_average_cuts_off_the_rest() -> None:
    noise = np.arange(5 * 7 * 3, dtype=np.float64).reshape(5, 7, 3)
    out = box_average(noise, 2)
    assert out.shape == (2, 3, 3)
    assert out[1, 2].tolist() == noise[2:4, 4:6].mean(axis=(0, 1)).tolist()
    assert box_average(noise, 1) is noise
    with pytest.raises(ValueError, match="smaller than a box"):
        box_average(noise, 8)


def test_averaging_white_noise_divides_its_sigma_by_the_factor() -> None:
    white = np.random.default_rng(3).standard_normal((256, 256, 3))
    assert standard_deviation(box_average(white, 4)) == pytest.approx(0.25, rel=0.05)


def test_histogram_has_open_ends_and_bins_of_known_place() -> None:
    counts = histogram(np.array([-300.0, -25.5, -1.0, 0.0, 0.5, 1.0, 25.5, 300.0]))
    assert counts.sum() == 8
    # a bin is 25.5 / 32 = 0.797 levels wide, and bin 32 begins at zero
    assert {int(i): int(counts[i]) for i in np.flatnonzero(counts)} == {
        0: 2,
        30: 1,
        32: 2,
        33: 1,
        63: 2,
    }


def test_kl_of_a_histogram_with_itself_is_zero() -> None:
    counts = histogram(np.random.default_rng(0).normal(0, 5, 10_000))
    assert kl_divergence(counts, counts) == 0
    assert kl_divergence(counts, 3 * counts) == pytest.approx(0, abs=1e-12)


def test_kl_of_gaussians_is_close_to_its_closed_form_in_the_right_direction() -> None:
    rng = np.random.default_rng(0)
    narrow, wide = (histogram(rng.normal(0, s, 1_000_000)) for s in (3.0, 4.0))
    closed = [math.log(b / a) + a * a / (2 * b * b) - 0.5 for a, b in ((3, 4), (4, 3))]
    assert closed[0] < closed[1] - 0.03
    assert kl_divergence(narrow, wide) == pytest.approx(closed[0], rel=0.03)
    assert kl_divergence(wide, narrow) == pytest.approx(closed[1], rel=0.05)


def test_kl_leaves_out_bins_empty_in_either() -> None:
    p, q = np.zeros((2, BINS), np.int64)
    p[:3], q[1:4] = (2, 1, 1), (1, 3, 4)
    expected = 0.25 * math.log(0.25 / 0.125) + 0.25 * math.log(0.25 / 0.375)
    assert kl_divergence(p, q) == pytest.approx(expected)
    assert mass_left_out(p, q) == 0.5
    assert math.isnan(kl_divergence(p, np.zeros(BINS, np.int64)))


def test_pooling_sums_counts() -> None:
    noises = [np.random.default_rng(i).normal(0, 2 + i, (32, 40, 3)) for i in range(3)]
    together = pooled([NoiseStatistics.of(n) for n in noises])
    assert together.tolist() == histograms(np.concatenate(noises)).tolist()
    assert together.sum(axis=1).tolist() == [3 * 32 * 40 * 3 // f**2 for f in (1, 2, 4)]
    with pytest.raises(ValueError, match="nothing to pool"):
        pooled([])


def test_constant_noise_has_nan_correlations_without_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s = NoiseStatistics.of(np.full((16, 16, 3), 0.1))
    assert s.std == pytest.approx(0)
    assert all(math.isnan(v) for v in (s.lag, s.rg, s.gb, s.rb))


def test_rank_correlation() -> None:
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(a, np.exp(a)) == pytest.approx(1)
    assert correlation(a, np.exp(a)) < 0.95
    # ties share their mean rank: ranks 1.5, 1.5, 3, 4
    assert rank_correlation(a, np.array([5.0, 5.0, 6.0, 7.0])) == pytest.approx(3 / math.sqrt(10))
    assert math.isnan(rank_correlation(a, np.ones(4)))


def test_noise_of_refuses_what_it_would_misread() -> None:
    clean = np.zeros((4, 4, 3), np.uint8)
    assert noise_of(clean, clean + np.uint8(9)).min() == -9  # no wrap-around
    with pytest.raises(TypeError, match="uint8"):
        noise_of(clean.astype(np.float32), clean)
    with pytest.raises(ValueError, match="arrays"):
        noise_of(clean, clean[:2])


def test_best_white_noise_finds_a_white_noise_and_is_reproducible() -> None:
    rng = np.random.default_rng(8)
    cleans = [np.full((96, 96, 3), level, np.uint8) for level in (90, 120, 150)]
    pairs = [Pair(str(i), c, add_white_noise(c, 4.0, rng)) for i, c in enumerate(cleans)]
    found = best_white_noise(pairs, seed=1)
    assert found.sigma_pooled == pytest.approx(4.0, rel=0.05)
    assert found.sigma_mean == pytest.approx(4.0, rel=0.05)
    assert abs(found.kl_pooled) < 0.01
    assert found == best_white_noise(pairs, seed=1)
    assert found != best_white_noise(pairs, seed=2)
    with pytest.raises(ValueError, match="hold no noise"):
        best_white_noise([Pair("a", cleans[0], cleans[0])])


def save(folder: Path, name: str, size: tuple[int, int] = (6, 5), value: int = 7) -> None:
    Image.new("RGB", size, (value, 0, 0)).save(folder / name)


def test_load_pairs(tmp_path: Path) -> None:
    save(tmp_path, "b_clean.png")
    save(tmp_path, "b_degraded.png", value=9)
    save(tmp_path, "a_x_clean.PNG")
    save(tmp_path, "a_x_degraded.bmp")
    (tmp_path / "notes_clean.txt").write_text("no picture")
    pairs = load_pairs(tmp_path)
    assert [p.name for p in pairs] == ["a_x", "b"]
    assert pairs[1].clean.shape == (5, 6, 3)
    assert (pairs[1].clean[0, 0, 0], pairs[1].degraded[0, 0, 0]) == (7, 9)


def test_load_pairs_errors(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError):
        load_pairs(tmp_path / "absent")
    save(tmp_path, "a.png")
    with pytest.raises(ValueError, match="no pairs"):
        load_pairs(tmp_path)
    save(tmp_path, "a_clean.png")
    with pytest.raises(ValueError, match="not a_degraded"):
        load_pairs(tmp_path)
    save(tmp_path, "a_degraded.png", size=(6, 6))
    with pytest.raises(ValueError, match="a is 6 x 5 clean, 6 x 6 degraded"):
        load_pairs(tmp_path)
    save(tmp_path, "a_clean.bmp")
    with pytest.raises(ValueError, match="two files for a_clean"):
        load_pairs(tmp_path)


def test_the_real_noise_itself_passes_every_criterion(reference: Reference) -> None:
    comparison = reference.compare([p.degraded for p in reference.pairs])
    assert all(c.passed for c in comparison.criteria()), comparison.to_markdown()
    s = comparison.summary()
    assert (s["kl_pooled"], s["kl_mean"]) == (0, 0)
    assert s["corr_std"] == pytest.approx(1)


def test_white_noise_fails_the_criteria_of_correlation_and_divergence(reference: Reference) -> None:
    rng = np.random.default_rng(11)
    sigma = float(np.mean([s.std for s in reference.real]))
    for level in (sigma, reference.white.sigma_pooled):
        samples = [add_white_noise(p.clean, level, rng) for p in reference.pairs]
        criteria = reference.compare(samples).criteria()
        missed = [c.name for c in criteria if not c.passed]
        assert any(n.startswith("mean lag-1") for n in missed)
        assert sum(n.startswith("summed KL") for n in missed) == 2


def test_no_noise_at_all_misses_and_raises_no_warning(reference: Reference) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        comparison = reference.compare([p.clean for p in reference.pairs])
        passed = {c.name for c in comparison.criteria() if c.passed}
        text = comparison.to_markdown()
    # One occupied bin: the divergence is silent on almost all of the real noise (see the note).
    assert all("summed KL" in name for name in passed)
    assert "nan" not in text.split("criterion")[0]


def test_tables_and_json(reference: Reference) -> None:
    pairs = reference.pairs
    comparison = reference.compare([p.degraded for p in pairs])
    text = comparison.to_markdown()
    assert all(f"| {p.name} |" in text for p in pairs)
    widths = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert widths == [11] * 8 + [13] * 6 + [4] * 8
    data = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert [p["name"] for p in data["pairs"]] == [p.name for p in pairs]
    assert data["summary"]["white_pooled"] == pytest.approx(reference.white.kl_pooled)


def test_white_noise_of_the_tables_is_that_of_the_search(reference: Reference) -> None:
    real = reference.real
    assert summed_kl(pooled(real), pooled(reference.white_pooled)) == reference.white.kl_pooled
    each = [
        summed_kl(r.counts, w.counts) for r, w in zip(real, reference.white_single, strict=True)
    ]
    assert float(np.mean(each)) == pytest.approx(reference.white.kl_mean)


def test_report_and_summary_agree(reference: Reference) -> None:
    pairs, white = reference.pairs, reference.white
    real = {p.clean.tobytes(): p.degraded for p in pairs}
    ours = module_report(pairs, lambda clean: real[clean.tobytes()], seed=3, white=white)
    triples = [(p.clean, p.degraded, p.degraded) for p in pairs]
    assert ours.summary() == summary(triples, white=white, seed=3)
    with pytest.raises(ValueError, match="argument 2"):
        reference.compare([pairs[0].clean])
    one = Reference.of(pairs[:1], white=white)
    assert math.isnan(one.others[0])
    assert json.dumps(one.compare([pairs[0].degraded]).to_dict(), allow_nan=False)


class FakeDegrader:
    """Stands in for the model: white noise, of the temperature's sigma."""

    @classmethod
    def from_pretrained(
        cls, weights: str = "default", *, conditioning_noise: bool, dequantize: bool
    ) -> FakeDegrader:
        assert weights in ("default", "mine")
        assert conditioning_noise
        assert not dequantize
        return cls()

    def degrade(
        self, image: np.ndarray, *, temperature: float, seed: int, domain: str | None
    ) -> np.ndarray:
        assert domain is None
        return add_white_noise(image, 4 * temperature, np.random.default_rng(seed))


def run_benchmark(*arguments: object) -> None:
    file = Path(__file__).parents[1] / "benchmarks" / "noise_statistics.py"
    spec = importlib.util.spec_from_file_location("noise_statistics", file)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(a) for a in arguments])


def test_the_command_prints_tables_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Not setattr, which would look the real one up and import torch for it.
    monkeypatch.setitem(vars(deflow_aug), "DeFlowDegrader", FakeDegrader)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        for pair in make_pairs(count=2, size=48):
            Image.fromarray(pair.clean).save(folder / f"{pair.name}_clean.png")
            Image.fromarray(pair.degraded).save(folder / f"{pair.name}_degraded.png")
    out = tmp_path / "figures.json"
    pairs = [a for folder in folders for a in ("--pairs", folder)]
    run_benchmark(*pairs, "--weights", "mine", "--temperature", 0.5, "--seed", 4, "--json", out)
    text = capsys.readouterr().out
    assert text.count("| criterion |") == 2
    assert "/one\n" in text
    data = json.loads(out.read_text())
    one, two = (data["folders"][str(folder)] for folder in folders)
    assert one == two  # a folder's figures do not depend on those before it
    assert one["summary"]["std"] == pytest.approx(2.0, rel=0.05)
