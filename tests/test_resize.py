"""Bicubic downscaling and its padding, against stored MATLAB-convention results and formulas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from deflow_aug.resize import bicubic_downscale, pad_symmetric, pad_to_multiple

REFERENCE = Path(__file__).parent / "data" / "bicubic.npz"


def as_batch(image: np.ndarray) -> Tensor:
    """[H, W, 3] as [1, 3, H, W] in float64; 8-bit images in [0, 1]."""
    values = image / 255 if image.dtype == np.uint8 else image
    return torch.from_numpy(values).permute(2, 0, 1)[None]


@pytest.mark.parametrize(
    ("source", "factor", "result"),
    [
        ("image", 2, "div2_float"),
        ("image", 4, "div4_float"),
        ("image", 8, "div8_float"),
        ("odd_image", 4, "odd_div4_float"),
    ],
)
def test_downscale_equals_the_reference(source: str, factor: int, result: str) -> None:
    with np.load(REFERENCE) as reference:
        small = bicubic_downscale(as_batch(reference[source]), factor)
        assert_close(small, as_batch(reference[result]), rtol=0, atol=1e-12)


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -1/2."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def downscaling_matrix(size: int, factor: int) -> np.ndarray:
    """What imresize computes along one axis, tap by tap."""
    matrix = np.zeros((-(-size // factor), size))
    for i, row in enumerate(matrix):
        centre = (i + 0.5) * factor - 0.5
        taps = np.arange(int(centre) - 2 * factor - 1, int(centre) + 2 * factor + 3)
        weights = cubic((taps - centre) / factor)
        mirrored = taps % (2 * size)
        np.add.at(row, np.minimum(mirrored, 2 * size - 1 - mirrored), weights / weights.sum())
    return matrix


@pytest.mark.parametrize(
    ("height", "width", "factor"),
    [(12, 18, 2), (7, 10, 3), (1, 1, 4), (3, 37, 4), (5, 17, 8), (33, 48, 16)],
)
def test_downscale_of_any_size_equals_the_formula(height: int, width: int, factor: int) -> None:
    """Sizes that the factor does not divide, and images smaller than the kernel."""
    image = np.random.default_rng(0).random((height, width))
    rows, columns = downscaling_matrix(height, factor), downscaling_matrix(width, factor)
    result = bicubic_downscale(torch.from_numpy(image)[None, None], factor)[0, 0]
    assert_close(result, torch.from_numpy(rows @ image @ columns.T), rtol=0, atol=1e-12)


def test_downscale_treats_images_and_channels_alone() -> None:
    x = torch.rand(2, 3, 9, 14, dtype=torch.float64)
    result = bicubic_downscale(x, 4)
    alone = bicubic_downscale(x[1:, 2:], 4)
    assert_close(result[1:, 2:], alone, rtol=0, atol=1e-15)


def test_downscale_by_one_is_the_image() -> None:
    x = torch.rand(1, 3, 5, 7)
    assert bicubic_downscale(x, 1) is x


@pytest.mark.parametrize("size", [(4, 6), (1, 5), (3, 2)])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 2, 3, 4), (0, 7, 0, 9), (23, 5, 8, 31)])
def test_padding_is_numpys_symmetric(
    size: tuple[int, int], padding: tuple[int, int, int, int]
) -> None:
    """Also by more than the image's size, where it is mirrored again and again."""
    image = np.random.default_rng(0).random((2, *size))
    left, right, top, bottom = padding
    expected = np.pad(image, ((0, 0), (top, bottom), (left, right)), mode="symmetric")
    result = pad_symmetric(torch.from_numpy(image), left, right, top, bottom)
    np.testing.assert_array_equal(result.numpy(), expected)


def test_padding_to_a_multiple_is_at_the_right_and_the_bottom() -> None:
    image = np.random.default_rng(0).random((1, 3, 5, 10))
    expected = np.pad(image, ((0, 0), (0, 0), (0, 3), (0, 6)), mode="symmetric")
    result = pad_to_multiple(torch.from_numpy(image), 8)
    np.testing.assert_array_equal(result.numpy(), expected)


def test_padding_to_a_multiple_that_fits_does_nothing() -> None:
    x = torch.rand(1, 3, 8, 16)
    assert pad_to_multiple(x, 8) is x
