"""Convolutions in tiles against PyTorch's own: results, transposes of transforms, gradients."""

from __future__ import annotations

import math
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from deflow_aug.flow import convolution, features, toom_cook, transposed, winograd
from deflow_aug.flow.convolution import Kernels, convolve, in_tiles
from deflow_aug.flow.direct import convolve_directly
from deflow_aug.flow.features import FeatureKernel, FeatureMap
from deflow_aug.flow.grid import Grid

pytestmark = pytest.mark.usefixtures("products")

SIZES = [(1, 1), (2, 2), (3, 2), (5, 8), (12, 21), (50, 48), (4, 2400)]
"""Odd ones too, less than a tile, and more tiles than one band has."""


def transformed(x: Tensor, repeats: int) -> Tensor:
    (tiles,) = winograd.transform_together([x], [repeats])
    return tiles


def upsampled(x: Tensor, repeats: int) -> Tensor:
    return F.interpolate(x, scale_factor=repeats, mode="nearest") if repeats > 1 else x


@pytest.mark.parametrize("repeats", [1, 2, 4])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_convolving_in_tiles_is_convolving(height: int, width: int, repeats: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, height, width).double()
    weight, bias = torch.randn(4, 3, 3, 3).double(), torch.randn(4).double()
    expected = F.conv2d(upsampled(x, repeats), weight, bias, padding=1)
    result = convolve(x, weight, bias, repeats)
    assert_close(result, expected, rtol=1e-12, atol=1e-11)
    assert result.stride(1) == 1  # channels last, of which a part may have been cropped


@pytest.mark.parametrize("repeats", [1, 2, 4])
@pytest.mark.parametrize(("height", "width"), SIZES[:-1])
def test_transposes_are_those_of_the_transforms(height: int, width: int, repeats: int) -> None:
    """<t(x), y> = <x, t'(y)> for whatever x and y."""
    torch.manual_seed(0)

    def check(image: Tensor, y: Tensor, x: Tensor, back: Tensor) -> None:
        assert_close((image * y).sum(), (x * back).sum(), rtol=1e-10, atol=1e-10)

    grid = Grid(2, height * repeats, width * repeats)
    x = torch.randn(2, height, width, 3).double()
    tiles = transformed(x, repeats)
    assert tiles.shape == (grid.tiles, toom_cook.products(repeats), 3)
    grad = torch.randn_like(tiles)
    back = torch.zeros_like(x)
    transposed.transform_together([grad], grid.whole, [repeats], [back])
    check(tiles, grad, x, back)
    weight = torch.randn(4, 3, 3, 3).double()
    kernel = winograd.transform_kernel(weight, repeats)
    grad = torch.randn_like(kernel)
    check(kernel, grad, weight, transposed.transform_kernel(grad))
    count = tiles.shape[1]
    sums = torch.randn(grid.tiles, count, 4).double()
    unit, no_bias = torch.eye(4).double().repeat(count, 1, 1), torch.zeros(4).double()
    (result,) = winograd.convolve([sums], [unit], no_bias, grid)
    grad = torch.randn_like(result)
    check(result, grad, sums, *transposed.results([grad], grid, [count]))


def test_transforms_side_by_side_region_by_region() -> None:
    """They are those of each map, the transposes too, and of all regions those of the whole."""
    torch.manual_seed(0)
    repeats, sizes = (1, 2, 4), ((20, 12, 3), (10, 6, 2), (5, 3, 4))
    maps = [torch.randn(3, *size).double() for size in sizes]
    grid = Grid(3, 20, 12)
    whole = winograd.transform_together(maps, repeats)
    for map_, often, start in zip(maps, repeats, (0, 3, 5), strict=True):
        some = slice(start, start + map_.shape[3])
        taking_part = [part[:, :, some] for part in whole if part.shape[2] >= some.stop]
        assert_close(torch.cat(taking_part, 1), transformed(map_, often), rtol=0, atol=1e-12)
    regions = grid.regions(7)
    assert len(regions) > 3
    assert sum(region.tiles for region in regions) == grid.tiles
    together = [winograd.transform_together(maps, repeats, region) for region in regions]
    for part, own in zip(whole, zip(*together, strict=True), strict=True):
        assert_close(torch.cat(own), part, rtol=0, atol=1e-12)

    grads = [[torch.randn_like(part) for part in parts] for parts in together]
    back = [torch.zeros_like(map_) for map_ in maps]
    for region, own in zip(regions, grads, strict=True):
        transposed.transform_together(own, region, repeats, back)
    # <t(x), y> = <x, t'(y)>
    pairs = [(list(chain(*together)), list(chain(*grads))), (maps, back)]
    products = [sum((a * b).sum() for a, b in zip(*pair, strict=True)) for pair in pairs]
    assert_close(products[0], products[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("together", [1, 7, 512])
@pytest.mark.parametrize("repeats", [2, 4])
def test_gradients_do_not_depend_on_regions(
    repeats: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "TOGETHER", together)
    torch.manual_seed(0)
    fine = torch.randn(3, 3, 16, 24).double().requires_grad_()
    coarse = torch.randn(3, 2, 16 // repeats, 24 // repeats).double().requires_grad_()
    weight, bias = (torch.randn(shape).double().requires_grad_() for shape in ((4, 5, 3, 3), (4,)))
    map_, grad = FeatureMap(fine, coarse, repeats), torch.randn(3, 4, 16, 24).double()
    kernels = Kernels((weight,), torch.ones(4).double(), bias)
    ours, theirs = (
        torch.autograd.grad(result, (fine, coarse, weight, bias), grad)
        for result in (
            *map_.convolve(FeatureKernel(lambda: kernels)),
            *convolve_directly(fine, coarse, repeats, kernels),
        )
    )
    assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("repeats", [1, 2, 4])
def test_gradients_of_convolving_in_tiles(repeats: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(shape).double().requires_grad_() for shape in ((2, 3, 3, 5), (4, 3, 3, 3), (4,))
    )
    assert torch.autograd.gradcheck(
        lambda *a: convolve(*a, repeats), (x, weight, bias), fast_mode=True
    )
    # And where only some of them need one.
    for some in (x, weight, bias):
        one = [value if value is some else value.detach() for value in (x, weight, bias)]
        assert torch.autograd.gradcheck(lambda *a: convolve(*a, repeats), one, fast_mode=True)


def test_gradients_of_gradients_are_refused() -> None:
    x, weight, bias = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3), torch.zeros(2)
    x.requires_grad_()
    result = convolve(x, weight, bias)
    (gradient,) = torch.autograd.grad(result.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("repeats", [1, 2, 4, 8])
def test_feature_map_convolves_its_dense_map(
    repeats: int, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "in_tiles", lambda x: tiled)
    torch.manual_seed(0)
    size, leaves = 16, []
    fine = torch.randn(2, 3, size, size).double().requires_grad_()
    leaves.append(fine)
    map_ = FeatureMap(fine)
    if repeats > 1:
        coarse = torch.randn(2, 2, size // repeats, size // repeats).double().requires_grad_()
        leaves.append(coarse)
        map_ = FeatureMap(fine, coarse, repeats)
    channels = map_.channels
    assert channels == map_.dense().shape[1]
    weights = tuple(torch.randn(4, channels, 3, 3).double().requires_grad_() for _ in range(2))
    scale, bias = (torch.rand(8).double().requires_grad_() for _ in range(2))
    leaves += [*weights, scale, bias]

    kernel = FeatureKernel(lambda: Kernels(weights, scale, bias))
    expected = F.conv2d(map_.dense(), *kernel.fold().folded(), padding=1).chunk(2, 1)
    results = map_.convolve(kernel)
    assert len(results) == 2
    assert_close(results, expected, rtol=1e-12, atol=1e-11)
    draws = [torch.randn_like(part) for part in expected]
    wanted = torch.autograd.grad(expected, leaves, draws)
    assert_close(torch.autograd.grad(results, leaves, draws), wanted, rtol=1e-10, atol=1e-10)
    for leaf, own in zip(leaves, wanted, strict=True):  # where it alone needs one
        for other in leaves:
            other.requires_grad_(other is leaf)
        (found,) = torch.autograd.grad(map_.convolve(kernel), leaf, draws)
        assert_close(found, own, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        for _ in range(2):  # the second time with what the kernel has kept
            assert_close(map_.convolve(kernel), expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("repeats", [1, 2, 4])
def test_float32_rounds_little(repeats: int) -> None:
    """As much as the module says, with a margin: of 320 channels, as the features have."""
    torch.manual_seed(0)
    x = torch.randn(1, 320, 32, 32).double().relu()
    weight = torch.randn(64, 320, 3, 3).double() / math.sqrt(320 * 9)
    exact = F.conv2d(upsampled(x, repeats), weight, padding=1)
    result = convolve(x.float(), weight.float(), torch.zeros(64), repeats)
    error = (result - exact) / exact.std()
    assert error.square().mean().sqrt() < 3e-6
    assert error.abs().max() < 5e-5


def test_low_precision_and_small_maps_are_not_computed_in_tiles() -> None:
    assert in_tiles(torch.ones(1, 1, 4, 5))
    assert in_tiles(torch.ones(1, 1, 4, 5).double())
    assert not in_tiles(torch.ones(1, 1, 4, 5).bfloat16())
    assert not in_tiles(torch.ones(1, device="meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not in_tiles(torch.ones(1, 1, 4, 5))
    assert not in_tiles(torch.ones(1, 1, 3, 8))


def test_autocast_around_the_backward_pass_changes_nothing() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(shape).requires_grad_() for shape in ((2, 8, 9, 9), (6, 8, 3, 3), (6,))]
    result = convolve(*leaves)
    draw = torch.randn_like(result)
    expected = torch.autograd.grad(result, leaves, draw, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(torch.autograd.grad(result, leaves, draw), expected, rtol=0, atol=0)
