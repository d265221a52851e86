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
from deflow_aug.flow import products, toom_cook
from deflow_aug.flow.coupling import AffineNet
from deflow_aug.flow.prepacked import Prepacked
from deflow_aug.flow.products import add_multiplied, bias_of, multiply, prepacked


@pytest.fixture
def by_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CPUs where MKL is not as wide."""
    monkeypatch.setattr(products, "_mkl_is_as_wide", lambda: False)


def of_one_product(bias: Tensor) -> Tensor:
    """Added to the sums of nine products, [9, O]."""
    added = bias.double().new_zeros(9, len(bias))
    added[toom_cook.ALL_ONES] = bias
    return added


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("by_mkl", [True, False])
def test_products_are_computed_in_the_way_asked_for(
    threads: int, by_mkl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one thread too, as workers have; without oneDNN, and in float64, matrix products."""
    torch.manual_seed(0)
    monkeypatch.setattr(products, "_mkl_is_as_wide", lambda: by_mkl)
    tiles, kernels, bias = torch.randn(7, 9, 5), torch.randn(9, 4, 5), torch.randn(4)
    added = of_one_product(bias)
    before = torch.get_num_threads()

    def multiplied(tiles: Tensor, kernels: Tensor, bias: Tensor) -> set[str]:
        with profile(activities=[ProfilerActivity.CPU]) as what:
            result = multiply(tiles, kernels, bias_of(kernels, bias))
            again = result.clone()
            add_multiplied(again, tiles, kernels)
        assert_close(result, expected.to(result.dtype), rtol=1e-5, atol=1e-5)
        assert_close(again, (2 * expected - added).to(result.dtype), rtol=1e-5, atol=1e-5)
        return {event.key for event in what.key_averages()}

    try:
        torch.set_num_threads(threads)
        for some in (tiles, torch.cat([tiles, tiles], 2)[:, :, :5], tiles[:1].expand(7, -1, -1)):
            expected = torch.einsum("tpc,poc->tpo", some.double(), kernels.double()) + added
            ran = multiplied(some, kernels, bias)
            convolved = torch.backends.mkldnn.is_available() and not by_mkl
            assert ("aten::mkldnn_convolution" in ran) == convolved
            assert ("aten::bmm" in ran) != convolved
            assert not any("slow" in name or "thnn" in name for name in ran)
            assert "aten::bmm" in multiplied(some.double(), kernels.double(), bias.double())
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert "aten::bmm" in multiplied(some, kernels, bias)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("capability", "processor", "mkl", "expected"),
    [
        ("AVX512", "vendor_id : GenuineIntel", True, True),
        ("AVX512", "vendor_id : AuthenticAMD", True, False),
        ("AVX512", "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", True, False),
        ("AVX2", "vendor_id : AuthenticAMD", True, True),
        ("DEFAULT", "", True, True),
        ("AVX512", "", True, False),
        ("AVX512", "vendor_id : GenuineIntel", False, False),
    ],
)
def test_matrix_products_are_taken_where_they_are_as_wide(
    capability: str, processor: str, mkl: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(products, "_processor", lambda: processor)
    assert products._mkl_is_as_wide.__wrapped__() == expected


def test_this_cpu_says_who_made_it() -> None:
    """Wherever AVX-512 is, which is what it is asked for."""
    if "AVX512" in torch.backends.cpu.get_cpu_capability():
        assert any(maker in products._processor() for maker in ("GenuineIntel", "AuthenticAMD"))


@pytest.mark.parametrize("by_mkl", [True, False])
def test_memory_is_in_the_order_that_products_want(
    by_mkl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_mkl_is_as_wide", lambda: by_mkl)
    memory = torch.zeros(100)
    tiles = products.tiles_in(memory, 2, 9, 5)
    assert tiles.shape == (2, 9, 5)
    assert tiles.data_ptr() == memory.data_ptr()
    convolved = products.by_convolution(memory)
    assert convolved == (torch.backends.mkldnn.is_available() and not by_mkl)
    assert tiles.is_contiguous() == convolved
    assert tiles.transpose(0, 1).is_contiguous() != convolved
    kernels = torch.randn(9, 4, 5)
    packed = prepacked(kernels, 7)
    if isinstance(packed, Tensor):
        assert torch.equal(packed, kernels)
        assert packed.mT.is_contiguous() != convolved


@pytest.fixture
def can_prepack() -> Iterator[None]:
    """What this PyTorch can is found out anew, before and after."""
    own_order._works_as_expected.cache_clear()
    yield
    own_order._works_as_expected.cache_clear()


@pytest.mark.parametrize("outputs", [4, 16, 48, 64])
def test_prepacked_kernels_are_the_same_for_any_number_of_tiles(
    outputs: int, by_convolutions: None
) -> None:
    torch.manual_seed(0)
    kernels, bias = torch.randn(9, outputs, 20), torch.randn(outputs)
    packed = prepacked(kernels, 100)
    assert isinstance(packed, Prepacked) == own_order.can_prepack(kernels)
    for count in (1, 4, 25, 100, 600):
        wide = torch.randn(count, 9, 30)
        for tiles in (wide[:, :, :20].contiguous(), wide[:, :, 10:]):
            expected = multiply(tiles.double(), kernels.double())
            for own, added in ((bias_of(packed, bias), of_one_product(bias)), (None, 0)):
                result = multiply(tiles, packed, own)
                assert result.is_contiguous()
                assert_close(result, (expected + added).float(), rtol=1e-5, atol=2e-5)


def test_prepacked_kernels_do_without_what_they_were_made_of(by_convolutions: None) -> None:
    tiles, kernels = torch.randn(7, 9, 5), torch.randn(9, 4, 5)
    packed, expected = prepacked(kernels, 7), multiply(tiles, kernels)
    if isinstance(packed, Prepacked):
        kernels.zero_()
    with torch.inference_mode():
        assert_close(multiply(tiles, packed), expected)


def test_kernels_stay_what_they_are_where_prepacking_is_impossible(
    can_prepack: None, by_convolutions: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = torch.randn(9, 4, 5)
    exact = kernels.double()
    assert_close(prepacked(exact, 7), exact, rtol=0, atol=0)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert_close(prepacked(kernels, 7), kernels, rtol=0, atol=0)


def test_onednn_may_be_switched_off_and_on_in_between(
    by_convolutions: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles, kernels, bias = torch.randn(7, 9, 5), torch.randn(9, 4, 5), torch.randn(4)
    expected = multiply(tiles.double(), kernels.double()) + of_one_product(bias)
    for before, after in ((True, False), (False, True)):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", before)
        packed = prepacked(kernels, 7)
        given = [(packed, bias_of(packed, bias)), (kernels, bias_of(kernels, bias))]
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", after)
        given.append((packed, bias_of(packed, bias)))
        for own, added in given:
            assert_close(multiply(tiles, own, added), expected.float(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "found", ["missing", "other arguments", "another result", "another order", "two", "refused"]
)
def test_an_unknown_pytorch_does_without_prepacking(
    found: str, can_prepack: None, by_convolutions: None, monkeypatch: pytest.MonkeyPatch
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


@pytest.mark.parametrize("by_mkl", [True, False])
def test_degrading_convolves_by_prepacked_kernels(
    by_mkl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they prepare can be copied and saved all the same."""
    torch.manual_seed(0)
    monkeypatch.setattr(products, "_mkl_is_as_wide", lambda: by_mkl)
    model, x = small_model().eval(), torch.rand(1, 3, 64, 64)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as what:
        features = model.features(x)
        latents, _ = model.encode(x, features)
        expected = model.decode(latents, features)
    ran = {event.key: event.count for event in what.key_averages()}
    if own_order.can_prepack(x):
        # Of each step: at least one for the features, unless those are matrix products, three of
        # the coupling's network in each direction, two of the injector's.
        steps = model.config.levels * model.config.steps
        assert ran["mkldnn::_convolution_pointwise"] >= steps * ((not by_mkl) + 2 * 3 + 2)
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
