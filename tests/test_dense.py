"""RRDBs in tiles against the same blocks of PyTorch's convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from deflow_aug import recompute
from deflow_aug import rrdb as rrdb_module
from deflow_aug.flow import grid
from deflow_aug.flow.products import by_convolution
from deflow_aug.rrdb import RRDB, RRDBTrunk, through

pytestmark = pytest.mark.usefixtures("products")


@pytest.fixture(autouse=True)
def in_tiles_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rrdb_module, "LEAST_TILES", 1)
    monkeypatch.setattr(rrdb_module, "LEAST_GROWTH", 1)


def block(dtype: torch.dtype = torch.float64, seed: int = 0) -> RRDB:
    """With weights large enough for every branch to matter."""
    torch.manual_seed(seed)
    result = RRDB(channels=6, growth=4).to(dtype)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return result


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 2), (4, 8), (9, 13), (40, 60)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_an_rrdb_is_its_convolutions(height: int, width: int, channels_last: bool) -> None:
    rrdb = block()
    x = torch.randn(2, 6, height, width).double()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    leaves = [x, *rrdb.parameters()]
    expected = rrdb.directly(x)
    result = rrdb(x)
    assert_close(result, expected, rtol=1e-11, atol=1e-11)
    draw = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, draw)
    for gradient, other in zip(torch.autograd.grad(result, leaves, draw), wanted, strict=True):
        assert gradient.shape == other.shape
        assert_close(gradient, other, rtol=1e-9, atol=1e-9)
    assert height * width == 1 or all(gradient.abs().max() > 0.01 for gradient in wanted)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(rrdb.eval()(x), expected, rtol=1e-11, atol=1e-11)
            assert_close(rrdb.train()(x), expected, rtol=1e-11, atol=1e-11)


def test_gradients_numerically_and_of_some_inputs_only() -> None:
    rrdb, x = block(), torch.randn(1, 6, 3, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(rrdb, x, fast_mode=True)
    rrdb.requires_grad_(False)
    assert torch.autograd.gradcheck(rrdb, x, fast_mode=True)
    some = rrdb.blocks[1].convs[2].weight.requires_grad_()
    draw = torch.randn_like(x)
    (expected,) = torch.autograd.grad(rrdb.directly(x.detach()), some, draw)
    (gradient,) = torch.autograd.grad(rrdb(x.detach()), some, draw)
    assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


def test_gradients_of_gradients_are_refused() -> None:
    rrdb, x = block(), torch.randn(1, 6, 4, 4).double().requires_grad_()
    (gradient,) = torch.autograd.grad(rrdb(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("least_saved", [0, 2**20])
def test_what_the_backward_pass_keeps(least_saved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The input of each RRDB, or if that is so little that nobody misses it, what is inside."""
    monkeypatch.setattr(recompute, "LEAST_SAVED", least_saved)
    trunk = RRDBTrunk(channels=8, growth=4, blocks=3)
    parameters = {parameter.data_ptr() for parameter in trunk.parameters()}
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y, _ = trunk(torch.randn(2, 3, 24, 24), stacked=())
    # Of each RRDB the input, or the inputs of three dense blocks and four maps of half the width.
    each = 3 + 3 * 4 / 2 if least_saved else 1
    # Of the first and the last convolution their inputs.
    expected = (len(trunk.body) * each + 3 / 8 + 1) * y.nbytes
    assert sum(kept) == pytest.approx(expected, rel=1e-3)


def test_images_after_images_or_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large maps are computed in regions, and gradients of several images one after the other."""
    rrdb, x = block(), torch.randn(5, 6, 18, 22).double().requires_grad_()  # of 30 tiles each
    leaves, draw = [x, *rrdb.parameters()], torch.randn_like(x)
    expected = rrdb.directly(x)
    wanted = torch.autograd.grad(expected, leaves, draw)
    for band in (1, 13, 60, 100, 1000):
        monkeypatch.setattr(grid, "BAND", band)
        result = rrdb(x)
        assert_close(result, expected, rtol=1e-11, atol=1e-11)
        assert_close(torch.autograd.grad(result, leaves, draw), wanted, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            assert_close(rrdb(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("least_saved", [0, 2**20])
def test_blocks_one_after_the_other(least_saved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the outputs between them: kept inside or not, with gradients or without."""
    monkeypatch.setattr(recompute, "LEAST_SAVED", least_saved)
    torch.manual_seed(0)
    blocks = [block(seed=number) for number in range(3)]
    x = torch.randn(2, 6, 9, 13).double().requires_grad_()
    leaves = [x, *(parameter for one in blocks for parameter in one.parameters())]
    between = blocks[0].directly(x)
    expected = blocks[2].directly(blocks[1].directly(between))
    draws = [torch.randn_like(x) for _ in range(2)]
    wanted = torch.autograd.grad([expected, between], leaves, draws)
    result, outputs = through(blocks, x, (0,))
    assert list(outputs) == [0]
    assert_close((result, outputs[0]), (expected, between), rtol=1e-11, atol=1e-11)
    found = torch.autograd.grad([result, outputs[0]], leaves, draws)
    assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        result, outputs = through(blocks, x, (0,))
    assert_close((result, outputs[0]), (expected, between), rtol=1e-11, atol=1e-11)


def test_small_blocks_take_the_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed or not: the same numbers and gradients."""
    monkeypatch.setattr(rrdb_module, "LEAST_TILES", 7)
    rrdb, x = block(), torch.randn(1, 6, 9, 8).double().requires_grad_()  # six tiles
    leaves, draw = [x, *rrdb.parameters()], torch.randn_like(x)
    expected = torch.autograd.grad(rrdb.directly(x), leaves, draw)
    monkeypatch.setattr(rrdb_module, "rrdb_with_gradients", None)
    for least_saved in (0, 2**20):
        monkeypatch.setattr(recompute, "LEAST_SAVED", least_saved)
        result = rrdb(x)
        assert_close(result, rrdb.directly(x), rtol=0, atol=0)
        assert_close(torch.autograd.grad(result, leaves, draw), expected, rtol=0, atol=0)


def test_narrow_blocks_take_tiles_where_matrix_products_are_at_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of which float64 always makes use; without gradients alone, which cost more there."""
    monkeypatch.setattr(rrdb_module, "LEAST_GROWTH", 5)  # these have 4
    monkeypatch.setattr(rrdb_module, "LEAST_GROWTH_BY_PRODUCTS", 4)
    rrdb = block(torch.float32)
    for dtype in (torch.float32, torch.float64):
        x, own = torch.randn(1, 6, 9, 8, dtype=dtype), rrdb.to(dtype)
        assert not rrdb_module._worth_tiles(x, 4)  # gradients are recorded
        with torch.no_grad():
            assert rrdb_module._worth_tiles(x, 4) != by_convolution(x)
            assert not rrdb_module._worth_tiles(x, 3)
            assert_close(own(x), own.directly(x), rtol=1e-4, atol=1e-4)


def test_low_precision_takes_the_convolutions() -> None:
    rrdb, x = block(torch.float32), torch.randn(1, 6, 8, 8)
    exact = rrdb(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = rrdb(x)
        result.float().sum().backward()
    assert_close(result.float(), exact, rtol=0.05, atol=0.05)
    assert not torch.equal(result.float(), exact)


def test_autocast_around_the_backward_pass_changes_nothing() -> None:
    rrdb, x = block(torch.float32), torch.randn(2, 6, 9, 13).requires_grad_()
    leaves, draw = [x, *rrdb.parameters()], torch.randn_like(x)
    expected = torch.autograd.grad(rrdb(x), leaves, draw)
    result = rrdb(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(torch.autograd.grad(result, leaves, draw), expected, rtol=0, atol=0)
