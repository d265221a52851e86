"""h(x) and its features: sizes, and how each level's map is made."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from deflow_aug.conditioning import ConditioningNetwork, domain_invariant
from deflow_aug.config import EncoderConfig, ModelConfig
from deflow_aug.resize import bicubic_downscale
from deflow_aug.rrdb import RRDBTrunk

ENCODER = EncoderConfig(channels=4, growth=2, blocks=3, stacked_blocks=(0, 2))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def make_network(scale: int, levels: int) -> ConditioningNetwork:
    config = ModelConfig(scale=scale, levels=levels, encoder=ENCODER)
    return ConditioningNetwork(config).double()


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def twice(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling by two."""
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.mark.parametrize("scale", [2, 4, 8, 16])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_features_have_the_size_of_their_level(scale: int, levels: int) -> None:
    side = ModelConfig(scale=scale, levels=levels).size_multiple
    h = draw(2, 3, side // scale, 3 * side // scale)
    features = [map_.dense() for map_ in make_network(scale, levels)(h)]
    expected = [(2, 12, side >> level, 3 * side >> level) for level in range(1, levels + 1)]
    assert [tuple(feature.shape) for feature in features] == expected
    assert ENCODER.feature_channels == 12  # the map's four and two blocks' four each


def test_features_of_each_factor_are_made_as_published() -> None:
    """Factors 4, 2, 1 and 1/2 of the size of h(x), as with s = 8 and four levels."""
    network = make_network(scale=8, levels=4)
    h = draw(1, 3, 4, 6)
    last, _ = network.trunk(h, ())
    # What the next map is made from is what the flow is given: the map after its activation.
    double = F.leaky_relu(network.upconvs[0](twice(last)), 0.2)
    quadruple = F.leaky_relu(network.upconvs[1](twice(double)), 0.2)
    half = F.avg_pool2d(last, 2)  # bilinear x 1/2 without antialiasing
    for feature, expected in zip(network(h), [quadruple, double, last, half], strict=True):
        assert_close(feature.dense()[:, :4], expected, rtol=1e-12, atol=1e-12)


def test_block_outputs_follow_the_map() -> None:
    network = make_network(scale=4, levels=3)
    h = draw(1, 3, 4, 6)
    _, outputs = network.trunk(h, (0, 2))
    stacked = torch.cat([outputs[0], outputs[2]], 1)
    double, same, half = (feature.dense()[:, 4:] for feature in network(h))
    assert_close(double, twice(stacked), rtol=0, atol=0)
    assert_close(same, stacked, rtol=0, atol=0)
    assert_close(half, stacked[:, :, ::2, ::2], rtol=0, atol=0)


def test_trunk_skips_its_last_convolution() -> None:
    """The skip spans that convolution alone, as in SRFlow; in ESRGAN it spans the blocks too."""
    trunk = RRDBTrunk(channels=4, growth=2, blocks=2).double()
    h = draw(1, 3, 4, 6)
    after_one = trunk.body[0](trunk.conv_first(h))
    after_two = trunk.body[1](after_one)
    last, outputs = trunk(h, (0, 1))
    assert_close(last, after_two + trunk.conv_body(after_two), rtol=1e-12, atol=1e-12)
    assert_close(outputs[0], after_one, rtol=0, atol=0)
    assert_close(outputs[1], after_two, rtol=0, atol=0)


def test_residual_branches_are_scaled_twice() -> None:
    """Three dense blocks x + 0.2 * branch, and around them another x + 0.2 * (...)."""
    block = RRDBTrunk(channels=4, growth=2, blocks=1).double().body[0]
    for dense in block.blocks:
        torch.nn.init.zeros_(dense.convs[-1].weight)
        torch.nn.init.ones_(dense.convs[-1].bias)  # every branch is one everywhere
    x = draw(1, 4, 3, 3)
    assert_close(block(x), x + 0.2 * (x + 3 * 0.2), rtol=1e-12, atol=1e-12)


def test_dense_block_sees_all_maps_before() -> None:
    dense = RRDBTrunk(channels=4, growth=2, blocks=1).double().body[0].blocks[0]
    x = draw(1, 4, 3, 3)
    maps = x
    for conv in dense.convs[:4]:
        maps = torch.cat([maps, F.leaky_relu(conv(maps), 0.2)], 1)
    assert_close(dense(x), x + 0.2 * dense.convs[4](maps), rtol=1e-12, atol=1e-12)


def test_noise_is_added_to_h() -> None:
    x, noise = draw(2, 3, 8, 12), draw(2, 3, 2, 3)
    quiet = domain_invariant(x, 4)
    assert_close(quiet, bicubic_downscale(x, 4), rtol=0, atol=0)
    assert_close(domain_invariant(x, 4, noise) - quiet, noise, rtol=1e-12, atol=1e-12)


def test_published_size_of_the_features() -> None:
    assert ModelConfig().encoder.feature_channels == 320
    alone = dataclasses.replace(EncoderConfig(), stacked_blocks=())
    assert alone.feature_channels == 64
