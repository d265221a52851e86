"""Every layer of the flow, and the whole flow: exact inverses, exact log-determinants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.testing import assert_close

from deflow_aug.config import EncoderConfig, ModelConfig
from deflow_aug.flow.base import Chain, Invertible
from deflow_aug.flow.coupling import SCALE_EPS, AffineCoupling, AffineInjector, AffineNet
from deflow_aug.flow.features import FeatureMap
from deflow_aug.flow.glow import ConditionalGlow, FlowStep, Prepared, TransitionStep
from deflow_aug.flow.layers import ActNorm, ChannelAffine, Conv1x1, Squeeze, initializing
from deflow_aug.flow.split import Split
from deflow_aug.model import DeFlow

FEATURES = 3
HIDDEN = 5

Encode = Callable[[Tensor], tuple[Sequence[Tensor], Tensor]]
Decode = Callable[[Sequence[Tensor]], Tensor]
M = TypeVar("M", bound=nn.Module)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def randomised(module: M, scale: float = 0.3) -> M:
    """In float64, every parameter away from its start: a term times a zero goes unnoticed.

    Not too far: triangular matrices of many random entries are close to singular.
    """
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn_like(parameter)
    return module


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def ready(layer: Invertible, features: Tensor) -> Any:
    """What the layer computes of a conditioning map before it encodes or decodes."""
    return layer.prepare(FeatureMap(features))


def ready_flow(flow: ConditionalGlow, features: Sequence[Tensor]) -> Prepared:
    return flow.prepare([FeatureMap(feature) for feature in features])


def assert_bijection(encode: Encode, decode: Decode, x: Tensor) -> None:
    """The one property of all that is invertible.

    Both round trips give back what went in, and the log-determinant of each image is that of
    autograd's Jacobian of its outputs in its pixels.
    """
    outputs, logdet = encode(x)
    assert_close(decode(outputs), x, rtol=1e-9, atol=1e-9)
    z = [torch.randn_like(output) for output in outputs]
    for again, original in zip(encode(decode(z))[0], z, strict=True):
        assert_close(again, original, rtol=1e-9, atol=1e-9)

    # Images do not see each other: all their Jacobians come from one pass, as that of a sum.
    assert_close(encode(x[:1])[0][0], outputs[0][:1], rtol=1e-12, atol=1e-12)

    def summed(x: Tensor) -> Tensor:
        return torch.cat([output.flatten(1) for output in encode(x)[0]], 1).sum(0)

    matrices = jacobian(summed, x, vectorize=True).flatten(2).transpose(0, 1)
    assert matrices.shape[1] == matrices.shape[2]
    assert logdet.shape == x.shape[:1]
    # One by one: of several at once PyTorch's is wrong after the number of threads was changed.
    expected = torch.stack([torch.linalg.slogdet(matrix).logabsdet for matrix in matrices])
    assert_close(logdet, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "channels"),
    [
        pytest.param(Squeeze, 3, id="squeeze"),
        pytest.param(lambda: ActNorm(3), 3, id="actnorm"),
        pytest.param(lambda: Conv1x1(5), 5, id="1x1 convolution"),
        pytest.param(lambda: AffineCoupling(4, FEATURES, HIDDEN), 4, id="coupling"),
        pytest.param(lambda: AffineCoupling(5, FEATURES, HIDDEN), 5, id="odd coupling"),
        pytest.param(lambda: AffineInjector(3, FEATURES, HIDDEN), 3, id="injector"),
        pytest.param(lambda: TransitionStep(3), 3, id="transition step"),
        pytest.param(lambda: FlowStep(4, FEATURES, HIDDEN), 4, id="flow step"),
        pytest.param(
            lambda: Chain([FlowStep(3, FEATURES, HIDDEN), TransitionStep(3), Squeeze()]),
            3,
            id="chain",
        ),
    ],
)
def test_layer_is_a_bijection_with_its_logdet(
    make: Callable[[], Invertible], channels: int
) -> None:
    layer = randomised(make())
    features = draw(2, FEATURES, 2, 4)

    def encode(x: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        z, logdet = layer.encode(x, ready(layer, features[: len(x)]))
        return [z], logdet

    def decode(z: Sequence[Tensor]) -> Tensor:
        return layer.decode(z[0], ready(layer, features))

    assert_bijection(encode, decode, draw(2, channels, 2, 4))


@pytest.mark.parametrize("channels", [4, 5])
def test_split_is_a_bijection_with_its_logdet(channels: int) -> None:
    split = randomised(Split(channels))

    def encode(x: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        kept, latent, logdet = split.encode(x)
        return [kept, latent], logdet

    assert_bijection(encode, lambda z: split.decode(*z), draw(2, channels, 2, 4))


def tiny(levels: int, splits: tuple[int, ...]) -> ModelConfig:
    encoder = EncoderConfig(channels=2, growth=2, blocks=1, stacked_blocks=(0,))
    return ModelConfig(
        scale=2,
        levels=levels,
        steps=1,
        transition_steps=1,
        split_levels=splits,
        hidden=4,
        encoder=encoder,
    )


@pytest.mark.parametrize(
    ("levels", "splits", "height", "width"),
    [(1, (), 4, 6), (2, (), 4, 8), (2, (1,), 8, 4), (3, (1, 2), 8, 16), (3, (2,), 8, 8)],
)
def test_whole_flow_is_a_bijection_with_its_logdet(
    levels: int, splits: tuple[int, ...], height: int, width: int
) -> None:
    flow = randomised(ConditionalGlow(tiny(levels, splits)), scale=0.03)
    features = [draw(2, 4, height >> level, width >> level) for level in range(1, levels + 1)]

    def encode(x: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        return flow.encode(x, ready_flow(flow, [feature[: len(x)] for feature in features]))

    x = draw(2, 3, height, width)
    assert_bijection(encode, lambda z: flow.decode(z, ready_flow(flow, features)), x)


def test_model_is_a_bijection_with_its_logdet_given_features() -> None:
    """The features of an image are side information: constants, though they are read off it."""
    model = randomised(DeFlow(tiny(2, (1,))), scale=0.03)
    x = 0.5 + 0.2 * draw(2, 3, 4, 8)
    with torch.no_grad():
        features = [model.features(x[:1]), model.features(x)]

    def encode(x: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        return model.encode(x, features[len(x) - 1])

    assert_bijection(encode, lambda z: model.decode(z, features[1]), x)


def test_splits_leave_first() -> None:
    flow = randomised(ConditionalGlow(tiny(3, (1, 2))), scale=0.03)
    features = [draw(1, 4, 8 >> level, 16 >> level) for level in (1, 2, 3)]
    latents, _ = flow.encode(draw(1, 3, 8, 16), ready_flow(flow, features))
    assert [tuple(z.shape[1:]) for z in latents] == [(6, 4, 8), (12, 2, 4), (48, 1, 2)]


def test_squeeze_orders_channels_as_pixel_unshuffle() -> None:
    x = draw(1, 3, 4, 6)
    z, _ = Squeeze().encode(x, x)
    for channel in range(3):
        for row in range(2):
            for column in range(2):
                expected = x[:, channel, row::2, column::2]
                assert_close(z[:, 4 * channel + 2 * row + column], expected, rtol=0, atol=0)


# --- 1x1 convolution


def test_conv1x1_inverse_weight_is_the_inverse() -> None:
    layer = randomised(Conv1x1(7))
    identity = torch.eye(7, dtype=torch.float64)
    assert_close(layer.inverse_weight() @ layer.weight(), identity, rtol=0, atol=1e-10)


def test_conv1x1_determinant_is_that_of_the_diagonal() -> None:
    layer = randomised(Conv1x1(7))
    expected = layer.log_s.sum().exp()
    assert_close(torch.linalg.det(layer.weight()).abs(), expected, rtol=1e-10, atol=0)


def test_conv1x1_starts_as_a_rotation() -> None:
    weight = Conv1x1(7).weight()
    assert_close(weight @ weight.mT, torch.eye(7), rtol=0, atol=1e-5)


def test_conv1x1_keeps_its_triangles() -> None:
    """What lies outside the triangles of L and U is never read, whatever a checkpoint holds."""
    layer = randomised(Conv1x1(4))
    before = layer.weight()
    with torch.no_grad():
        layer.lower += torch.triu(torch.full((4, 4), 9.0))
        layer.upper += torch.tril(torch.full((4, 4), 9.0))
    assert_close(layer.weight(), before, rtol=0, atol=0)


def test_conv1x1_inverse_is_solved_in_float64() -> None:
    """In a float32 model each entry is then right to its last bit, which float32 would not give."""
    layer = randomised(Conv1x1(24)).float()
    lower, upper = (factor.double() for factor in layer._factors())
    expected = torch.linalg.inv((lower @ upper)[layer.permutation])
    assert_close(layer.inverse_weight().double(), expected, rtol=1e-7, atol=1e-12)


# --- actnorm


def batch_statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each channel."""
    variance, mean = torch.var_mean(z, dim=(0, 2, 3), correction=0)
    return mean, variance


def test_actnorm_normalises_its_first_batch() -> None:
    layer = ActNorm(3).double()
    x = 3 + torch.tensor([0.5, 1, 20])[:, None, None] * draw(2, 3, 4, 4)
    with initializing(layer):
        z, logdet = layer.encode(x, x)
    mean, variance = batch_statistics(z)
    assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)
    assert_close(variance, torch.ones_like(variance), rtol=0, atol=1e-5)
    # The pass that initialises must already count the scale it has set.
    expected = -8 * batch_statistics(x)[1].log().sum()
    assert_close(logdet, expected.expand(2), rtol=0, atol=1e-3)


def test_actnorm_is_initialised_only_once() -> None:
    layer = ActNorm(3).double()
    with initializing(layer):
        layer.encode(draw(2, 3, 4, 4), draw(1))
    x = 5 + 2 * draw(2, 3, 4, 4)
    expected, _ = layer.encode(x, x)
    with initializing(layer):
        assert_close(layer.encode(x, x)[0], expected, rtol=0, atol=0)


def test_actnorm_is_not_initialised_by_an_ordinary_pass() -> None:
    layer = ActNorm(3).double()
    x = 5 + 2 * draw(2, 3, 4, 4)
    assert_close(layer.encode(x, x)[0], x, rtol=0, atol=0)
    assert not layer.affine.initialized


def test_actnorm_initialisation_is_part_of_its_state() -> None:
    """A resumed training must not fit the actnorms to its next batch."""
    first, second = ActNorm(3).double(), ActNorm(3).double()
    with initializing(first):
        first.encode(draw(2, 3, 4, 4), draw(1))
    second.load_state_dict(first.state_dict())
    x = 5 + 2 * draw(2, 3, 4, 4)
    with initializing(second):
        z, _ = second.encode(x, x)
    assert_close(z, first.encode(x, x)[0], rtol=0, atol=0)


def test_actnorm_survives_a_constant_channel() -> None:
    layer = ActNorm(2).double()
    x = draw(2, 2, 4, 4)
    x[:, 1] = 0.7
    with initializing(layer):
        z, logdet = layer.encode(x, x)
    assert_close(z[:, 1], torch.zeros_like(z[:, 1]), rtol=0, atol=1e-9)
    assert logdet.isfinite().all()
    assert layer.affine.logs[1].exp() <= 1000.001


def test_initializing_ends_when_the_pass_fails() -> None:
    layer = ActNorm(3).double()

    def fail() -> None:
        with initializing(layer):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    x = 5 + 2 * draw(2, 3, 4, 4)
    assert_close(layer.encode(x, x)[0], x, rtol=0, atol=0)


@pytest.mark.parametrize("side", [4, 16])
def test_initializing_reaches_every_actnorm_of_a_flow(side: int) -> None:
    """Those that stand for the biases of the networks too; on maps of less than a tile, or more."""
    flow = ConditionalGlow(tiny(2, (1,))).double()
    with initializing(flow):
        maps = [draw(2, 4, side // 2, side), draw(2, 4, side // 4, side // 2)]
        flow.encode(draw(2, 3, side, 2 * side), ready_flow(flow, maps))
    norms = [module for module in flow.modules() if isinstance(module, ChannelAffine)]
    # Each level: one in the transition step; one, and two in each of two networks, in the step.
    assert len(norms) == 2 * (1 + 1 + 2 * 2)
    assert all(norm.initialized and not norm.initializing for norm in norms)


# --- coupling, injector, split


def with_constant_output(net: AffineNet, raw: Tensor) -> None:
    """Make the last convolution, which starts at zero, answer ``raw`` at every position."""
    with torch.no_grad():
        net.last.conv.bias.copy_(raw)


def test_coupling_keeps_the_first_half_and_transforms_the_second() -> None:
    layer = AffineCoupling(4, FEATURES, HIDDEN).double()
    x, features = draw(2, 4, 2, 4), draw(2, FEATURES, 2, 4)
    with_constant_output(layer.net, torch.tensor([10.0, 0.5, 20.0, -3.0]))
    z, _ = layer.encode(x, ready(layer, features))
    # Even outputs are shifts, odd ones raw scales, as in the published weights.
    first, second = 1 / (1 + math.exp(-2.5)) + 1e-3, 1 / (1 + math.exp(1)) + 1e-3
    assert_close(z[:, :2], x[:, :2], rtol=0, atol=0)
    assert_close(z[:, 2], x[:, 2] / first - 10, rtol=1e-12, atol=0)
    assert_close(z[:, 3], x[:, 3] / second - 20, rtol=1e-12, atol=0)


def test_coupling_reads_the_first_half_before_the_features() -> None:
    """The order of the network's inputs is part of the published weights."""
    layer = randomised(AffineCoupling(4, FEATURES, HIDDEN))
    x, features = draw(1, 4, 2, 4), draw(1, FEATURES, 2, 4)
    # As a network without a shared part: all of it is features.
    net = AffineNet(2 + FEATURES, HIDDEN, 2).double()
    net.load_state_dict(layer.net.state_dict())
    shift, scale = net.fold()(net.respond(FeatureMap(torch.cat([x[:, :2], features], 1))))
    z, _ = layer.encode(x, ready(layer, features))
    assert_close(z[:, 2:], x[:, 2:] / scale - shift, rtol=1e-12, atol=1e-12)


def test_injector_transforms_all_channels_alike() -> None:
    layer = AffineInjector(2, FEATURES, HIDDEN).double()
    x, features = draw(2, 2, 2, 4), draw(2, FEATURES, 2, 4)
    with_constant_output(layer.net, torch.tensor([10.0, 0.5, 20.0, 0.5]))
    z, _ = layer.encode(x, ready(layer, features))
    scale = 1 / (1 + math.exp(-2.5)) + 1e-3
    shift = torch.tensor([10.0, 20.0], dtype=torch.float64)[:, None, None]
    assert_close(z, x / scale - shift, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("raw", [-1e4, 1e4])
def test_scales_stay_within_bounds(raw: float) -> None:
    """However far the raw scale runs in training, the layer can be inverted."""
    layer = AffineInjector(2, FEATURES, HIDDEN).double()
    with_constant_output(layer.net, torch.tensor([0.0, raw, 0.0, raw]))
    x, features = draw(1, 2, 2, 4), draw(1, FEATURES, 2, 4)
    z, logdet = layer.encode(x, ready(layer, features))
    assert logdet.isfinite().all()
    assert (x / z).max() <= 1 + 2 * SCALE_EPS
    assert (x / z).min() >= 0.999 * SCALE_EPS
    assert_close(layer.decode(z, ready(layer, features)), x, rtol=1e-12, atol=1e-12)


def test_last_layer_multiplies_by_exp_of_three_logs() -> None:
    net = AffineNet(FEATURES, HIDDEN, 1).double()
    with_constant_output(net, torch.tensor([1.0, 0.0]))
    with torch.no_grad():
        net.last.logs.fill_(0.2)
    shift, _ = net.fold()(net.respond(FeatureMap(draw(1, FEATURES, 2, 4))))
    assert_close(shift, torch.full_like(shift, math.exp(0.6)), rtol=1e-12, atol=0)


def test_split_whitens_what_leaves() -> None:
    split = Split(4).double()
    with torch.no_grad():
        split.prior.conv.bias.copy_(torch.tensor([10.0, 0.5, 20.0, -3.0]))
    x = draw(2, 4, 2, 4)
    kept, latent, logdet = split.encode(x)
    assert_close(kept, x[:, :2], rtol=0, atol=0)
    assert_close(latent[:, 0], (x[:, 2] - 10) / math.exp(0.5), rtol=1e-12, atol=1e-12)
    assert_close(latent[:, 1], (x[:, 3] - 20) / math.exp(-3), rtol=1e-12, atol=1e-12)
    assert_close(logdet, torch.full_like(logdet, 8 * 2.5), rtol=1e-12, atol=0)
