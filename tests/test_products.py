"""Products of tiles: by oneDNN, with kernels in its own order, and without it; convolutions so."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import small_model
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from deflow_aug.flow import prepacked as own_order
from deflow_aug.flow.coupling import AffineNet
from deflow_aug.flow.prepacked import Prepacked
from deflow_aug.flow.products import multiply, prepacked


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
    own_order._works_as_expected.cache_clear()
    yield
    own_order._works_as_expected.cache_clear()


@pytest.mark.parametrize("outputs", [4, 16, 48, 64])
def test_prepacked_kernels_are_the_same_for_any_number_of_tiles(outputs: int) -> None:
    torch.manual_seed(0)
    kernels, bias = torch.randn(9, outputs, 20), torch.randn(9 * outputs)
    packed = prepacked(kernels, 100)
    assert isinstance(packed, Prepacked) == own_order.can_prepack(kernels)
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


@pytest.mark.parametrize(
    "found", ["missing", "other arguments", "another result", "another order", "two", "refused"]
)
def test_an_unknown_pytorch_does_without_prepacking(
    found: str, can_prepack: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operations are PyTorch's own: any release may change them."""

    def convolve(self: Prepacked, x: Tensor, bias: Tensor | None = None) -> Any:
        if found == "missing":
            return torch.ops.mkldnn._no_such_operation(x)
        if found == "other arguments":
            return torch.ops.mkldnn._convolution_pointwise(x, self._weight)
        if found == "refused":
            raise ValueError
        result = original(self, x, bias)
        if found == "two":
            return result, result
        return result + 1 if found == "another result" else result.contiguous()

    original = Prepacked.convolve
    monkeypatch.setattr(Prepacked, "convolve", convolve)
    kernels = torch.randn(9, 4, 5)
    assert prepacked(kernels, 7) is kernels


@pytest.mark.parametrize("around", [lambda: torch.device("meta"), lambda: torch.autocast("cpu")])
def test_what_surrounds_the_first_trial_decides_nothing(
    around: Callable[[], AbstractContextManager[Any]],
    can_prepack: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = own_order.can_prepack(torch.ones(1))
    own_order._works_as_expected.cache_clear()
    with around():
        assert own_order._works_as_expected() == expected
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not own_order.can_prepack(torch.ones(1))


def test_degrading_convolves_by_prepacked_kernels() -> None:
    """What they prepare can be copied and saved all the same."""
    torch.manual_seed(0)
    model, x = small_model().eval(), torch.rand(1, 3, 64, 64)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as what:
        features = model.features(x)
        latents, _ = model.encode(x, features)
        expected = model.decode(latents, features)
    ran = {event.key: event.count for event in what.key_averages()}
    if own_order.can_prepack(x):
        # Of each step: at least one for the features, three of the coupling's network in each
        # direction, two of the injector's.
        steps = model.config.levels * model.config.steps
        assert ran["mkldnn::_convolution_pointwise"] >= steps * (1 + 2 * 3 + 2)
    for copied in (copy.deepcopy(features), pickle.loads(pickle.dumps(features))):
        with torch.inference_mode():
            assert_close(model.decode(latents, copied), expected)


@pytest.mark.parametrize("size", [1, 3])
def test_prepacked_convolutions_are_convolutions_of_any_size(size: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(12, 6, size, size), torch.randn(12)
    if not own_order.can_prepack(weight):
        pytest.skip("this PyTorch has no oneDNN")
    packed = Prepacked(weight, [1, 6, 40, 40])
    for shape in ((1, 6, 40, 40), (3, 6, 1, 2), (2, 6, 81, 5)):
        x = torch.randn(shape)
        for own in (x, x.contiguous(memory_format=torch.channels_last), x.flip(3).mT.mT):
            expected = F.conv2d(own.double(), weight.double(), bias.double(), padding=size // 2)
            result = packed.convolve(own, bias)
            assert result.is_contiguous(memory_format=torch.channels_last)
            assert_close(result, expected.float(), rtol=1e-5, atol=2e-5)


def test_networks_are_prepacked_where_neither_gradients_nor_autocast_want_them_otherwise() -> None:
    torch.manual_seed(0)
    net = AffineNet(3 + 5, 8, 4, kept=3)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    response, kept = torch.randn(2, 8, 9, 7), torch.randn(2, 3, 9, 7)
    assert net.fold().prepacked(response).packed == (None, None, None)  # gradients are recorded
    with torch.no_grad():
        plain = net.fold()
        packed = plain.prepacked(response)
        assert all(packed.packed) == own_order.can_prepack(plain.second[0])
        assert_close(packed(response, kept), plain(response, kept))
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(packed(response, kept), plain(response, kept), rtol=0, atol=0)
        assert net.double().fold().prepacked(response.double()).packed == (None, None, None)
