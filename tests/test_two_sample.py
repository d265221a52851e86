"""The two-sample test: what differs is told apart, what does not is not, and by how much."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from deflow_aug.evaluation import two_sample
from deflow_aug.evaluation.tables import Table

SIDE = 80


def noise(rng: np.random.Generator, size: float, correlated: bool = False) -> np.ndarray:
    """Gaussian noise [SIDE, SIDE, 3] of this standard deviation in levels, white or lag-1 0.5."""
    white = rng.standard_normal((SIDE + 1, SIDE + 1, 3))
    if correlated:
        white = (white[1:, 1:] + white[:-1, 1:] + white[1:, :-1] + white[:-1, :-1]) / 2
    return size * white[:SIDE, :SIDE]


def pictures(seed: int, count: int, size: float, correlated: bool = False) -> list[np.ndarray]:
    """Smooth ramps, another for each picture, with noise on them."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        y, x = np.mgrid[:SIDE, :SIDE] / SIDE
        ramp = 90 + 60 * rng.random() + (x * rng.uniform(-40, 40) + y * rng.uniform(-40, 40))
        noisy = ramp[..., None] + noise(rng, size, correlated)
        found.append(noisy.round().clip(0, 255).astype(np.uint8))
    return found


def row(table: Table, name: str) -> tuple[float, float, float, float, float, float]:
    """AUC and its interval, distance and its interval."""
    (found,) = [cells for cells in table.rows if cells[0] == name]
    return tuple(float(n) for n in re.findall(r"-?\d+\.\d+", " ".join(found[1:])))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def table() -> Table:
    real = pictures(0, 16, 5, correlated=True)
    fakes = {
        "the same": pictures(1, 12, 5, correlated=True),
        "a little more": pictures(2, 12, 6, correlated=True),
        "white": pictures(3, 12, 5),
        "nothing": pictures(4, 12, 0),
    }
    return two_sample.compare(real, fakes, steps=60)


def test_white_noise_is_told_from_correlated_noise_of_its_strength(table: Table) -> None:
    auc, low, _, distance, least, _ = row(table, "white")
    assert auc > 0.97
    assert low > 0.7
    assert distance > 0.1
    assert least > 0


@pytest.mark.parametrize("name", ["the same", "real against real"])
def test_the_same_noise_is_not_told_apart(table: Table, name: str) -> None:
    _, low, high, distance, least, most = row(table, name)
    assert low < 0.5 < high
    assert least < 0 < most
    assert abs(distance) < 0.02


def test_the_distance_ranks_where_the_classifier_is_always_right(table: Table) -> None:
    distances = [row(table, name)[3] for name in ("the same", "a little more", "white", "nothing")]
    assert distances == sorted(distances)
    assert distances[1] > 0.02
    assert row(table, "nothing")[0] > 0.97


def test_the_table_has_the_floor_first_and_tells_what_it_is_of(table: Table) -> None:
    assert [cells[0] for cells in table.rows] == [
        "real against real",
        "the same",
        "a little more",
        "white",
        "nothing",
    ]
    assert "64 x 64" in table.notes[0]
    assert "16 real" in table.notes[0]


def test_it_repeats_itself_and_touches_no_global_generator() -> None:
    real, fake = pictures(0, 8, 3), pictures(1, 4, 4)
    before = torch.get_rng_state()
    one = two_sample.compare(real, {"fake": fake}, steps=3)
    torch.rand(3)
    after_drawing = torch.get_rng_state()
    assert two_sample.compare(real, {"fake": fake}, steps=3) == one
    assert torch.equal(torch.get_rng_state(), after_drawing)
    assert not torch.equal(before, after_drawing)
    assert two_sample.compare(real, {"fake": fake}, steps=3, seed=1) != one


def test_the_high_pass_takes_slow_change_away_and_keeps_fine_structure() -> None:
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    ramp = ((x + 2 * y) / 255).expand(1, 3, 32, 32)
    inner = two_sample.high_pass(ramp)[..., 2:-2, 2:-2]
    torch.testing.assert_close(inner, torch.zeros_like(inner), atol=1e-4, rtol=0)
    board = ((x + y) % 2 * 2 - 1) * 0.5 / 255  # the blur leaves nothing of it
    seen = two_sample.high_pass(ramp + board)[..., 2:-2, 2:-2]
    expected = torch.asinh(board[2:-2, 2:-2] / two_sample.SCALE).expand_as(seen)
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=0)


def test_the_energy_distance_is_unbiased_and_its_error_is_right() -> None:
    rng = np.random.default_rng(0)
    units = np.repeat(np.arange(8), 3)
    equal, errors, apart = [], [], []
    for _ in range(200):
        # Crops of a picture are alike: without units the error would be far too small.
        a, b = (
            rng.standard_normal((8, 1, 2)) + 0.3 * rng.standard_normal((8, 3, 2)) for _ in range(2)
        )
        a, b = a.reshape(24, 2), b.reshape(24, 2)
        distance, error = two_sample.energy_distance(a, units, b, units)
        equal.append(distance)
        errors.append(error)
        apart.append(two_sample.energy_distance(a, units, b + 3, units)[0])
    assert abs(np.mean(equal)) < 3 * np.std(equal) / np.sqrt(200)
    # Where the distributions are equal the U-statistic is degenerate, and the jackknife's error
    # too large rather than too small.
    assert np.std(equal) < 1.2 * np.mean(errors)
    assert min(apart) > 1


def test_the_energy_distance_of_two_points_is_known() -> None:
    a, b = np.zeros((4, 1)), np.full((4, 1), 3.0)
    units = np.arange(4)
    assert two_sample.energy_distance(a, units, b, units) == pytest.approx((6.0, 0.0))


def test_small_pictures_are_judged_by_small_crops() -> None:
    real = [p[:20] for p in pictures(0, 8, 5)]
    table = two_sample.compare(real, {"fake": [p[:, :33] for p in pictures(1, 4, 5)]}, steps=3)
    assert "20 x 20" in table.notes[0]


def test_what_cannot_be_compared_is_refused() -> None:
    real = pictures(0, 8, 5)
    with pytest.raises(ValueError, match="at least 8 real pictures"):
        two_sample.compare(real[:7], {})
    with pytest.raises(ValueError, match="got 3 of 'fake'"):
        two_sample.compare(real, {"fake": real[:3]})
    with pytest.raises(TypeError, match="got float64 among fake"):
        two_sample.compare(real, {"fake": [p / 255 for p in real]})
    with pytest.raises(ValueError, match=r"at least 16 pixels, got \(80, 12, 3\) among real"):
        two_sample.compare([real[0][:, :12], *real[1:]], {})
