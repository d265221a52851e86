"""Convolutions and the scale of their results, as one convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from deflow_aug.flow.scaled import Scaled

OUTPUTS = 6


def a_layer(times: int, evens_first: bool, with_bias: bool = True) -> Scaled:
    torch.manual_seed(0)
    weight, logs, bias = torch.randn(OUTPUTS, 4, 3, 3), torch.randn(OUTPUTS), torch.randn(OUTPUTS)
    given = [one.double().requires_grad_() for one in (weight, logs / times, bias)]
    return Scaled(given[0], given[1], given[2] if with_bias else None, times, evens_first)


@pytest.mark.parametrize(("times", "evens_first"), [(1, False), (3, True), (3, False), (1, True)])
def test_it_is_the_convolution_and_the_scale_after_it(times: int, evens_first: bool) -> None:
    layer, x = a_layer(times, evens_first), torch.randn(2, 4, 5, 7).double()
    scaled = F.conv2d(x, layer.weight, layer.bias, padding=1)
    scaled = scaled * torch.exp(times * layer.logs)[:, None, None]
    if evens_first:
        scaled = scaled[:, [0, 2, 4, 1, 3, 5]]
    assert_close(F.conv2d(x, *layer.folded(), padding=1), scaled)
    assert_close(layer.folded()[0], layer.folded_weight(), rtol=0, atol=0)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("times", "evens_first"), [(1, False), (3, True)])
def test_gradients_are_those_of_autograd(times: int, evens_first: bool, with_bias: bool) -> None:
    layer = a_layer(times, evens_first, with_bias)
    folded = layer.folded() if with_bias else [layer.folded_weight()]
    draws = [torch.randn_like(one) for one in folded]
    expected = torch.autograd.grad(folded, layer.tensors(), draws)
    with torch.no_grad():
        assert_close(layer.gradients(*draws), list(expected))


def test_the_same_of_other_tensors() -> None:
    layer = a_layer(3, True)
    others = [torch.randn_like(one) for one in layer.tensors()]
    rest = iter([*others, torch.zeros(1)])
    same = layer.of(rest)
    assert [id(one) for one in same.tensors()] == [id(one) for one in others]
    assert (same.times, same.evens_first) == (3, True)
    assert len(list(rest)) == 1
    alone = a_layer(1, False, with_bias=False)
    assert alone.of(iter(others)).bias is None
