"""Products of tiles: by oneDNN, with kernels in its own order, and without it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from deflow_aug.flow import products
from deflow_aug.flow.products import Prepacked, multiply, prepacked


@pytest.mark.parametrize("threads", [1, 2])
def test_products_are_convolutions_by_onednn(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one thread too, as workers have; without oneDNN, and in float64, matrix products."""
    torch.manual_seed(0)
    tiles, kernels, bias = torch.randn(7, 9, 5), torch.randn(9, 4, 5), torch.randn(9 * 4)
    before = torch.get_num_threads()

    def multiplied(tiles: Tensor, kernels: Tensor, bias: Tensor) -> set[str]:
        with profile(activities=[ProfilerActivity.CPU]) as what:
            result = multiply(tiles, kernels, bias)
        assert_close(result, expected.to(result.dtype), rtol=1e-5, atol=1e-5)
        return {event.key for event in what.key_averages()}

    try:
        torch.set_num_threads(threads)
        for some in (tiles, torch.cat([tiles, tiles], 2)[:, :, :5], tiles[:1].expand(7, -1, -1)):
            expected = torch.einsum("tpc,poc->tpo", some.double(), kernels.double())
            expected += bias.double().view(9, 4)
            ran = multiplied(some, kernels, bias)
            assert ("aten::mkldnn_convolution" in ran) == torch.backends.mkldnn.is_available()
            assert not any("slow" in name or "thnn" in name for name in ran)
            assert "aten::bmm" in multiplied(some.double(), kernels.double(), bias.double())
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert "aten::bmm" in multiplied(some, kernels, bias)
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def can_prepack() -> Iterator[None]:
    """What this PyTorch can is found out anew, before and after."""
    products._can_prepack.cache_clear()
    yield
    products._can_prepack.cache_clear()


@pytest.mark.parametrize("outputs", [4, 16, 48, 64])
def test_prepacked_kernels_are_the_same_for_any_number_of_tiles(outputs: int) -> None:
    torch.manual_seed(0)
    kernels, bias = torch.randn(9, outputs, 20), torch.randn(9 * outputs)
    packed = prepacked(kernels, 100)
    assert isinstance(packed, Prepacked) == torch.backends.mkldnn.is_available()
    for count in (1, 4, 25, 100, 600):
        wide = torch.randn(count, 9, 30)
        for tiles in (wide[:, :, :20].contiguous(), wide[:, :, 10:]):
            for own in (bias, None):
                expected = multiply(
                    tiles.double(), kernels.double(), None if own is None else own.double()
                )
                result = multiply(tiles, packed, own)
                assert result.is_contiguous()
                assert_close(result, expected.float(), rtol=1e-5, atol=2e-5)


def test_prepacked_kernels_do_without_what_they_were_made_of() -> None:
    tiles, kernels = torch.randn(7, 9, 5), torch.randn(9, 4, 5)
    packed, expected = prepacked(kernels, 7), multiply(tiles, kernels)
    if isinstance(packed, Prepacked):
        kernels.zero_()
    with torch.inference_mode():
        assert_close(multiply(tiles, packed), expected)


def test_kernels_stay_as_they_are_where_prepacking_is_impossible(
    can_prepack: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = torch.randn(9, 4, 5)
    exact = kernels.double()
    assert prepacked(exact, 7) is exact
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert prepacked(kernels, 7) is kernels


@pytest.mark.parametrize("found", ["missing", "other arguments", "another result"])
def test_an_unknown_pytorch_does_without_prepacking(
    found: str, can_prepack: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operations are PyTorch's own: any release may change them."""

    def by_prepacked(tiles: Tensor, kernels: Prepacked, bias: Tensor | None) -> Tensor:
        if found == "missing":
            return torch.ops.mkldnn._no_such_operation(tiles)
        if found == "other arguments":
            return torch.ops.mkldnn._convolution_pointwise(tiles, kernels.weight)
        return tiles.new_zeros(len(tiles), kernels.products, kernels.outputs)

    monkeypatch.setattr(products, "_by_prepacked", by_prepacked)
    kernels = torch.randn(9, 4, 5)
    assert prepacked(kernels, 7) is kernels
