"""Draws named by keys: the same everywhere, independent of each other and of global state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deflow_aug.randomness import (
    BLOCK,
    Stream,
    fresh_seed,
    generator,
    normal,
    normal_part,
    uniform,
    uniform_part,
)

KEYS = [(7, Stream.LATENT, 3), (8, Stream.LATENT, 3), (7, Stream.LATENT, 4)]
KEYS += [(7, Stream.DEQUANTIZATION, 3), (4, Stream.LATENT, 7), (3, 7, Stream.LATENT)]
LONG = [(2**63, 1, 3), (2**32 + 7, 1, 3), (7,), (7, 0), (7, 0, 0)]
draws = pytest.mark.parametrize("draw", [normal, uniform])


@draws
def test_same_key_gives_the_same_draw(draw) -> None:
    assert draw((2, 5), 7, Stream.LATENT, 3).equal(draw((2, 5), 7, Stream.LATENT, 3))


@draws
def test_other_keys_give_other_draws(draw) -> None:
    """The order within a key counts too."""
    values = {tuple(draw((5,), *key).tolist()) for key in [*KEYS, *LONG]}
    assert len(values) == len(KEYS) + len(LONG)


@draws
def test_draws_leave_global_generators_alone(draw) -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = draw((5,), 1, 2)
    assert torch.get_rng_state().equal(before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    torch.manual_seed(1)
    assert draw((5,), 1, 2).equal(first)


def test_normal_has_standard_moments() -> None:
    n = 40_000
    x = normal((n,), 1, 2)
    assert x.dtype == torch.float32
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.square().mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs(x.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)


def test_uniform_fills_the_unit_interval_around_zero() -> None:
    n = 40_000
    x = uniform((n,), 1, 2)
    assert x.dtype == torch.float32
    assert -0.5 <= x.min() < -0.499
    assert 0.499 < x.max() < 0.5
    assert abs(x.mean()) < 5 / math.sqrt(12 * n)
    assert abs(x.square().mean() - 1 / 12) < 5 * math.sqrt(1 / (180 * n))


def test_streams_are_not_correlated() -> None:
    """Nor are the draws of neighbouring keys."""
    n = 10_000
    samples = torch.stack([normal((n,), *key) for key in KEYS])
    correlation = torch.corrcoef(samples) - torch.eye(len(KEYS))
    assert correlation.abs().max() < 5 / math.sqrt(n)


def test_what_a_seed_means_never_changes() -> None:
    """Results are named by their seeds: streams keep their numbers, keys their generators."""
    assert {stream.name: stream.value for stream in Stream} == {
        "CONDITIONING": 1,
        "DEQUANTIZATION": 2,
        "LATENT": 3,
        "BATCH": 4,
        "PAIRED": 5,
        "TEMPERATURE": 6,
        "CHOICE": 7,
        "CROP": 8,
        "SUGGEST": 9,
        "FIT": 10,
        "TWO_SAMPLE": 11,
        "EVALUATE": 12,
        "CAST": 13,
    }
    assert generator(1, 2, 3).integers(2**63) == 7338073586685795035
    assert BLOCK == 64
    block = normal((2, 6, 36), 9, 1, 1)  # of row 1 and column 1: what is left of 70 x 100
    assert normal_part((2, 70, 100), slice(64, 70), slice(64, 100), 9).equal(block)


@pytest.mark.parametrize("draw", [normal_part, uniform_part])
def test_a_window_is_a_part_of_the_whole(draw) -> None:
    shape = (3, 150, 200)
    whole = draw(shape, slice(0, 150), slice(0, 200), 7, Stream.LATENT)
    assert len(whole.unique()) > 0.99 * whole.numel()
    for rows, columns in (
        (slice(0, 1), slice(0, 1)),
        (slice(64, 128), slice(0, 64)),
        (slice(60, 70), slice(120, 200)),
        (slice(10, 150), slice(63, 65)),
        (slice(149, 150), slice(199, 200)),
    ):
        part = draw(shape, rows, columns, 7, Stream.LATENT)
        assert part.equal(whole[:, rows, columns])
    assert not draw(shape, slice(0, 9), slice(0, 9), 8, Stream.LATENT).equal(whole[:, :9, :9])


def test_blocks_are_not_correlated() -> None:
    side = 4 * BLOCK
    whole = normal_part((3, side, side), slice(0, side), slice(0, side), 5)
    blocks = whole.unfold(1, BLOCK, BLOCK).unfold(2, BLOCK, BLOCK).movedim(0, 2).flatten(2)
    correlation = torch.corrcoef(blocks.flatten(0, 1)) - torch.eye(16)
    assert correlation.abs().max() < 5 / math.sqrt(3 * BLOCK**2)
    assert abs(whole.mean()) < 5 / math.sqrt(whole.numel())
    assert abs(whole.square().mean() - 1) < 5 * math.sqrt(2 / whole.numel())


def test_fresh_seeds_differ_and_can_be_keys() -> None:
    first, second = fresh_seed(), fresh_seed()
    assert first != second
    assert 0 <= first < 2**63
    assert not normal((5,), first).equal(normal((5,), second))


def test_negative_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="non-negative"):
        generator(-1)
