"""The density model: gradients, bits per dimension, batches of mixed domains, errors."""

from __future__ import annotations

import dataclasses
import math
import weakref

import numpy as np
import pytest
import torch
from test_flow import randomised
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.distributions import MultivariateNormal, Normal
from torch.testing import assert_close

from deflow_aug.config import EncoderConfig, ModelConfig
from deflow_aug.flow.coupling import SCALE_EPS, AffineNet
from deflow_aug.flow.glow import Prepared
from deflow_aug.flow.layers import ActNorm, ChannelAffine
from deflow_aug.latent import PAIRED_JITTER
from deflow_aug.model import DeFlow

# Small, with one of everything: a split, two upconvs, a stacked block, two degraded domains.
TINY = ModelConfig(
    scale=8,
    levels=2,
    steps=1,
    transition_steps=1,
    split_levels=(1,),
    hidden=6,
    encoder=EncoderConfig(channels=4, growth=2, blocks=2, stacked_blocks=(0,)),
    domains=("night", "day"),
)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def make_model(**changes: object) -> DeFlow:
    return randomised(DeFlow(dataclasses.replace(TINY, **changes)), scale=0.05)


def draw_images(batch: int, height: int = 8, width: int = 16) -> Tensor:
    return torch.rand(batch, 3, height, width, dtype=torch.float64)


def draw_noise(x: Tensor, scale: int = TINY.scale) -> Tensor:
    height, width = x.shape[2] // scale, x.shape[3] // scale
    return torch.randn(len(x), 3, height, width, dtype=x.dtype)


# --- gradients


def test_every_parameter_gets_a_gradient() -> None:
    model = make_model()
    x = draw_images(6)
    domains = ["night", "clean", "day"] * 2
    bits = model.nll(x, domains, dequantization=draw_images(6) - 0.5, noise=draw_noise(x))
    bits.mean().backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.any(), name
        # Matrices that are used whole must train whole; those of LU form, in their triangle.
        if name.endswith(".factor"):
            assert gradient.all(), name
        elif name.endswith(".lower"):
            assert gradient.bool().equal(torch.ones_like(gradient).tril(-1).bool()), name
        elif name.endswith(".upper"):
            assert gradient.bool().equal(torch.ones_like(gradient).triu(1).bool()), name


def shift_gradients(shift_init: float) -> list[Tensor]:
    """The gradients of M of both domains in all latents, at a model's start."""
    model = DeFlow(dataclasses.replace(TINY, shift_init=shift_init)).double()
    model.nll(draw_images(4), ["night", "day"] * 2).mean().backward()
    gradients = [shift.factor.grad for shift in model.domain_shifts()]
    assert all(gradient is not None for gradient in gradients)
    return gradients


def test_a_single_pass_lets_go_of_what_the_features_gave_it() -> None:
    """Step by step: its backward pass needs other maps, which are as large."""
    model = make_model()
    x = draw_images(2).requires_grad_()
    prepared = model.features(x)
    given = [given for level in prepared.steps for given in level if isinstance(given, tuple)]
    responses = [weakref.ref(response) for *both, _ in given for response in both]
    assert len(responses) == 4
    del given
    expected = model.encode(x, prepared)
    assert all(response() is not None for response in responses)
    latents, logdet = model.encode(x, prepared.for_one_pass())
    assert all(response() is None for response in responses)
    assert_close((latents, logdet), expected, rtol=0, atol=0)
    loss, other = (
        sum(z.square().sum() for z in zs) + ld.sum() for zs, ld in (expected, (latents, logdet))
    )
    wanted = torch.autograd.grad(loss, x, retain_graph=True)
    assert_close(torch.autograd.grad(other, x), wanted, rtol=0, atol=0)


def test_features_for_one_pass_serve_one() -> None:
    model, x = make_model(), draw_images(2)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            prepared = model.features(x)
            latents, _ = model.encode(x, prepared.for_one_pass())
            with pytest.raises(RuntimeError, match="were for one pass"):
                model.encode(x, prepared)
            with pytest.raises(RuntimeError, match="were for one pass"):
                model.decode(latents, prepared)


def test_gradients_of_several_passes_of_the_same_features() -> None:
    """Two encodings and a decoding, against those of features of their own."""
    model = make_model()
    x, other = draw_images(2).requires_grad_(), draw_images(2)
    wanted = [x, *(p for name, p in model.named_parameters() if not name.startswith("shifts."))]

    def loss(shared: bool) -> Tensor:
        prepared = model.features(x)
        own = (lambda: prepared) if shared else (lambda: model.features(x))
        (latents, logdet), (others, _) = model.encode(x, own()), model.encode(other, own())
        decoded = model.decode([a + 0.1 * b for a, b in zip(latents, others, strict=True)], own())
        return decoded.square().sum() + logdet.sum()

    expected = torch.autograd.grad(loss(shared=False), wanted)
    assert_close(torch.autograd.grad(loss(shared=True), wanted), expected, rtol=1e-9, atol=1e-9)


def test_m_trains_from_its_default_start() -> None:
    assert all(gradient.diagonal().all() for gradient in shift_gradients(TINY.shift_init))


def test_m_never_trains_from_zero() -> None:
    """Why the published models' M is zero: its gradient is 2 G M.

    Should this fail, the default of ``shift_init`` has lost its reason.
    """
    assert not any(gradient.any() for gradient in shift_gradients(0.0))


# --- log-density


def test_log_prob_is_the_change_of_variables() -> None:
    """From nothing but autograd's Jacobian and torch's multivariate normal."""
    model = make_model(scale=2, levels=2)
    x, domains = draw_images(3, 4, 8), ["day", "clean", "night"]
    for i, domain in enumerate(domains):
        with torch.no_grad():
            one = model.features(x[i : i + 1])

        def flat(image: Tensor, one: Prepared = one) -> Tensor:
            return torch.cat([z.flatten() for z in model.encode(image, one)[0]])

        matrix = jacobian(flat, x[i : i + 1], vectorize=True).flatten(1)
        expected = torch.linalg.slogdet(matrix).logabsdet
        latents, _ = model.encode(x[i : i + 1], one)
        for z, shift in zip(latents, model.domain_shifts(), strict=True):
            mean, covariance = torch.zeros(z.shape[1]).double(), torch.eye(z.shape[1]).double()
            if domain != "clean":
                index = TINY.domains.index(domain)
                mean = shift.mean[index]
                covariance = covariance + shift.factor[index] @ shift.factor[index].mT
            normal = MultivariateNormal(mean, covariance)
            expected = expected + normal.log_prob(z[0].permute(1, 2, 0)).sum()
        result = model.log_prob(x, domains)[i]
        assert_close(result, expected, rtol=1e-10, atol=1e-8)


def test_conditional_log_prob_is_the_change_of_variables() -> None:
    """ln p(y given x): the Gaussian at z_y around z_x + mu, and y's determinant alone."""
    model = make_model()
    y, x = draw_images(2), draw_images(2)
    domains = ["day", "night"]
    of_y, of_x = model.features(y, draw_noise(y)), model.features(x, draw_noise(x))
    latents_y, expected = model.encode(y, of_y)
    latents_x, _ = model.encode(x, of_x)
    for z_y, z_x, shift in zip(latents_y, latents_x, model.domain_shifts(), strict=True):
        terms = []
        for i, domain in enumerate(domains):
            factor = shift.factor[TINY.domains.index(domain)]
            covariance = factor @ factor.mT + PAIRED_JITTER * torch.eye(z_y.shape[1]).double()
            normal = MultivariateNormal(shift.mean[TINY.domains.index(domain)], covariance)
            terms.append(normal.log_prob((z_y - z_x)[i].permute(1, 2, 0)).sum())
        expected = expected + torch.stack(terms)
    result = model.conditional_log_prob(y, x, domains, of_y, of_x)
    assert_close(result, expected, rtol=1e-7, atol=1e-6)


def test_conditional_log_prob_reads_the_features_off_the_images() -> None:
    model = make_model()
    y, x = draw_images(2), draw_images(2)
    expected = model.conditional_log_prob(
        y, x, ["day", "night"], model.features(y), model.features(x)
    )
    result = model.conditional_log_prob(y, x, ["day", "night"])
    assert_close(result, expected, rtol=1e-12, atol=1e-12)


# --- bits per dimension


MEAN, SPREAD, SHIFT = 0.5, 0.05, 1.5


def make_white_model(**changes: object) -> DeFlow:
    """A model whose density is known: every value of an image is drawn independently.

    Clean: from N(MEAN, SPREAD^2). Degraded: M is SHIFT times the identity and the flow a rotation
    (1x1 convolutions) of (x - MEAN) / SPREAD, so with the variance SPREAD^2 (1 + SHIFT^2).
    """
    model = DeFlow(dataclasses.replace(TINY, shift_init=SHIFT, **changes)).double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, AffineNet):
                # sigmoid(raw + 2) + SCALE_EPS = 1: couplings and injectors do nothing.
                raw = math.log((1 - SCALE_EPS) / SCALE_EPS) - 2
                module.last.conv.bias[1::2] = raw
        first = next(module for module in model.modules() if isinstance(module, ActNorm))
        first.affine.bias.fill_(-MEAN)
        first.affine.logs.fill_(-math.log(SPREAD))
    return model


DENSITIES = {"clean": SPREAD, "day": SPREAD * math.sqrt(1 + SHIFT**2)}


@pytest.mark.parametrize("domain", list(DENSITIES))
@pytest.mark.parametrize("steps", [255, 32])
def test_nll_is_that_of_probabilities(domain: str, steps: int) -> None:
    """2^-nll, averaged over the dequantisation, is the probability of a pixel's value.

    An image of equal pixels, all drawn independently, costs per dimension what one value costs.
    """
    model = make_white_model(dequantization_steps=steps)
    values = torch.arange(steps + 1, dtype=torch.float64) / steps
    images = values[:, None, None, None].expand(-1, 3, 8, 8)
    average = torch.zeros_like(values)
    # A Gauss-Legendre rule on [-1, 1] in place of random draws in [-1/2, 1/2].
    for node, weight in zip(
        *map(torch.from_numpy, np.polynomial.legendre.leggauss(4)), strict=True
    ):
        draws = (node / 2).expand_as(images)
        with torch.no_grad():
            bits = model.nll(images, [domain] * len(values), dequantization=draws)
        average += weight / 2 * torch.exp2(-bits)
    normal = Normal(torch.tensor(MEAN).double(), DENSITIES[domain])
    expected = normal.cdf(values + 0.5 / steps) - normal.cdf(values - 0.5 / steps)
    # The flow's 1x1 convolutions are rotations to within float32.
    assert_close(average, expected, rtol=0, atol=1e-7)


def test_nll_of_white_noise_does_not_depend_on_its_size() -> None:
    model = make_white_model()
    patch = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    for height, width in [(8, 16), (24, 16)]:
        tiled = patch.repeat(1, 1, height // 8, width // 8)
        for domain in DENSITIES:
            expected = model.nll(patch, [domain])
            assert_close(model.nll(tiled, [domain]), expected, rtol=1e-10, atol=0)


def test_nll_places_dequantization_within_the_bin() -> None:
    """Only the flow's input is dequantised; its conditioning is that of the image."""
    model = make_model(dequantization_steps=32)
    x, draws = draw_images(2), draw_images(2) - 0.5
    density = model.log_prob(x + draws / 32, ["clean", "day"], model.features(x))
    expected = (3 * 8 * 16 * math.log2(32) - density / math.log(2)) / (3 * 8 * 16)
    result = model.nll(x, ["clean", "day"], dequantization=draws)
    assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_nll_does_not_depend_on_the_other_images() -> None:
    model = make_model()
    x = draw_images(5)
    domains = ["night", "clean", "day", "clean", "night"]
    draws, noise = draw_images(5) - 0.5, draw_noise(x)
    together = model.nll(x, domains, dequantization=draws, noise=noise)
    for order in ([0], [1], [2], [3], [4], [4, 2, 0, 3, 1]):
        result = model.nll(
            x[order], [domains[i] for i in order], dequantization=draws[order], noise=noise[order]
        )
        assert_close(result, together[order], rtol=1e-12, atol=1e-12)


def test_noise_on_the_conditioning_has_its_standard_deviation() -> None:
    model = make_model(conditioning_noise=0.2)
    x = torch.full((2, 3, 8, 16), 0.4, dtype=torch.float64)  # its h is constant too
    noise = draw_noise(x)
    expected = model.flow.prepare(model.conditioning(0.4 + 0.2 * noise))
    assert_close(
        model.encode(x, model.features(x, noise)), model.encode(x, expected), rtol=1e-10, atol=1e-10
    )


# --- initialisation


def test_initialize_sets_every_actnorm_once() -> None:
    model = DeFlow(TINY).double()
    model.initialize(draw_images(4))
    assert all(m.initialized for m in model.modules() if isinstance(m, ChannelAffine))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.initialize(3 * draw_images(4))
    for name, tensor in model.state_dict().items():
        assert_close(tensor, before[name], rtol=0, atol=0)


def test_initialize_uses_the_noise_it_is_given() -> None:
    """The first actnorm sees the images as training will: dequantised."""
    model = DeFlow(dataclasses.replace(TINY, dequantization_steps=1)).double()
    x = torch.full((2, 3, 8, 16), 0.4, dtype=torch.float64)
    draws = draw_images(2) - 0.5
    model.initialize(x, dequantization=draws, noise=draw_noise(x))
    first = next(module for module in model.modules() if isinstance(module, ActNorm))
    values = (x + draws).reshape(2, 3, 4, 2, 8, 2).permute(1, 3, 5, 0, 2, 4).reshape(12, -1)
    assert_close(first.affine.bias.detach(), -values.mean(1), rtol=1e-10, atol=0)


# --- latents


def test_latent_shapes_are_those_of_encode() -> None:
    for levels, splits in [(1, ()), (2, ()), (2, (1,)), (3, (1, 2)), (3, (2,))]:
        model = make_model(levels=levels, split_levels=splits)
        x = draw_images(1)
        latents, _ = model.encode(x, model.features(x))
        assert [tuple(z.shape[1:]) for z in latents] == model.latent_shapes(8, 16)


def test_degraded_at_temperature_zero_is_the_image() -> None:
    model = make_model()
    x = draw_images(2)
    features = model.features(x)
    latents, _ = model.encode(x, features)
    noise = [torch.randn_like(z) for z in latents]
    shifted = model.degrade(latents, noise, ["day", "night"], torch.zeros(2).double())
    assert_close(model.decode(shifted, features), x, rtol=0, atol=1e-9)


def test_each_latent_has_its_own_shift() -> None:
    model = make_model()
    latents = [torch.randn(2, *shape).double() for shape in model.latent_shapes(8, 16)]
    silence = [torch.zeros_like(z) for z in latents]
    result = model.degrade(latents, silence, ["day", "night"], torch.ones(2).double())
    for after, before, shift in zip(result, latents, model.domain_shifts(), strict=True):
        mean = shift.means()[model.domain_numbers(["day", "night"], before)][:, :, None, None]
        assert_close(after, before + mean, rtol=1e-12, atol=1e-12)


def test_restoring_undoes_a_shift_without_covariance() -> None:
    """With M = 0 nothing is random, and the posterior is a point: the clean latents."""
    model = make_model()
    with torch.no_grad():
        for shift in model.domain_shifts():
            shift.factor.zero_()
    latents = [torch.randn(2, *shape).double() for shape in model.latent_shapes(8, 16)]
    noise = [torch.randn_like(z) for z in latents]
    degraded = model.degrade(latents, noise, ["day", "night"], torch.ones(2).double())
    for draws in (noise, None):
        restored = model.restore(degraded, draws, ["day", "night"])
        for after, before in zip(restored, latents, strict=True):
            assert_close(after, before, rtol=1e-12, atol=1e-12)


# --- what callers may give


def test_domains_are_numbered_in_the_order_of_the_settings() -> None:
    model = make_model()
    x = draw_images(3)
    by_name = model.nll(x, ["clean", "night", "day"])
    assert_close(model.nll(x, torch.tensor([0, 1, 2])), by_name, rtol=0, atol=0)


def test_unknown_domain_is_named_beside_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown domain 'dusk'.*clean, night, day"):
        make_model().nll(draw_images(2), ["clean", "dusk"])


@pytest.mark.parametrize("domains", [["clean"], ["clean"] * 3, torch.tensor(0)])
def test_every_image_needs_its_domain(domains: list[str] | Tensor) -> None:
    with pytest.raises(ValueError, match="one domain for each of the 2 images"):
        make_model().nll(draw_images(2), domains)


@pytest.mark.parametrize("shape", [(1, 3, 8, 12), (1, 3, 12, 8), (1, 1, 8, 8), (8, 3, 8)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"multiples of 8.*pad_to_multiple"):
        make_model().nll(torch.zeros(shape).double(), ["clean"])


def test_float32_stays_float32_and_agrees_with_float64() -> None:
    model = make_model()
    x, domains = draw_images(2), ["clean", "night"]
    expected = model.nll(x, domains)
    result = model.float().nll(x.float(), domains)
    assert result.dtype == torch.float32
    assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)
