"""The latent shift against the formulas of the paper, and its closed form in one dimension.

Latents in these tests: three channels; domain 0 is clean, 1 and 2 are degraded ones with shifts of
their own.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from deflow_aug.flow.layers import ActNorm
from deflow_aug.latent import PAIRED_JITTER, DomainShift, normalized_weights, psd_root

CHANNELS = 3
IDENTITY = torch.eye(CHANNELS, dtype=torch.float64)
FACTORS = {
    "zero": torch.zeros(CHANNELS, CHANNELS, dtype=torch.float64),
    "rank one": torch.tensor([[1.0, 2.0, 0.0]] * CHANNELS, dtype=torch.float64).mT,
    "tiny": 1e-4 * IDENTITY,
    "random": torch.tensor([[0.9, -0.3, 0.2], [0.5, 1.4, 0.0], [-1.0, 0.6, 0.7]]).double(),
}
every_factor = pytest.mark.parametrize("factor", FACTORS.values(), ids=list(FACTORS))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def make_shift(factor: Tensor | None = None) -> DomainShift:
    """Random shifts in float64; ``factor`` takes the place of the first degraded domain's M."""
    shift = DomainShift(CHANNELS, 2, init=0.1).double()
    with torch.no_grad():
        for parameter in shift.parameters():
            parameter.copy_(draw(*parameter.shape))
        if factor is not None:
            shift.factor[0].copy_(factor)
    return shift


def make_kind(kind: str) -> DomainShift:
    """Random values wherever the kind has any."""
    shift = DomainShift(CHANNELS, 2, init=0.1, kind=kind).double()
    with torch.no_grad():
        for tensor in (*shift.parameters(), *shift.buffers()):
            tensor.copy_(draw(*tensor.shape))
    return shift


def moments_of(shift: DomainShift, number: int) -> tuple[Tensor, Tensor]:
    """mu and Sigma of a domain, from the parameters and the paper's definitions."""
    if number == 0:
        return torch.zeros(CHANNELS, dtype=torch.float64), torch.zeros_like(IDENTITY)
    if shift.kind == "zero":
        return shift.mean[number - 1].detach(), torch.zeros_like(IDENTITY)
    factor = shift.factor[number - 1].detach()
    if shift.kind == "diagonal":
        return shift.mean[number - 1].detach(), factor.square().diag()
    return shift.mean[number - 1].detach(), factor @ factor.mT


def reference_log_prob(z: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Log-density of one image's latents [C, H, W], every position drawn independently."""
    return MultivariateNormal(mean, covariance).log_prob(z.permute(1, 2, 0)).sum()


def assert_moments(samples: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Sample mean and covariance of [n, C] within five standard errors of the theory's."""
    n = len(samples)
    variance = covariance.diagonal()
    mean_error = 5 * (variance / n).sqrt() + 1e-12
    assert ((samples.mean(0) - mean).abs() <= mean_error).all()
    covariance_error = 5 * ((variance[:, None] * variance + covariance.square()) / n).sqrt()
    difference = samples.mT.cov(correction=0) - covariance
    assert (difference.abs() <= covariance_error + 1e-12).all()


def positions(z: Tensor) -> Tensor:
    """[B, C, H, W] as samples [B * H * W, C]."""
    return z.movedim(1, -1).flatten(0, 2)


# --- densities


def test_marginal_density_of_mixed_domains() -> None:
    shift = make_shift()
    z, domain = draw(4, CHANNELS, 2, 5), torch.tensor([2, 0, 1, 2])
    expected = []
    for latent, number in zip(z, domain.tolist(), strict=True):
        mean, covariance = moments_of(shift, number)
        expected.append(reference_log_prob(latent, mean, IDENTITY + covariance))
    assert_close(shift.log_prob(z, domain), torch.stack(expected), rtol=1e-12, atol=1e-10)


def test_clean_latents_are_standard_normal() -> None:
    z = draw(2, CHANNELS, 2, 5)
    expected = -0.5 * z.square().sum((1, 2, 3)) - 15 * math.log(2 * math.pi)
    result = make_shift().log_prob(z, torch.tensor([0, 0]))
    assert_close(result, expected, rtol=1e-12, atol=1e-10)


def test_shift_starts_small_and_centred() -> None:
    shift = DomainShift(CHANNELS, 2, init=0.1)
    assert_close(shift.means(), torch.zeros(3, CHANNELS))
    expected = torch.stack([0 * torch.eye(CHANNELS), *[0.1 * torch.eye(CHANNELS)] * 2])
    assert_close(shift.factors(), expected)


@every_factor
def test_conditional_density(factor: Tensor) -> None:
    """p(y given x) with Sigma's diagonal raised by the jitter, which gives every M a density."""
    shift = make_shift(factor)
    clean = draw(3, CHANNELS, 2, 2)
    domain = torch.tensor([2, 1, 1])
    degraded, expected = [], []
    for latent, number in zip(clean, domain.tolist(), strict=True):
        mean, covariance = moments_of(shift, number)
        covariance = covariance + PAIRED_JITTER * IDENTITY
        noise = torch.linalg.cholesky(covariance) @ draw(CHANNELS, 4)
        degraded.append(latent + mean[:, None, None] + noise.unflatten(1, (2, 2)))
        expected.append(
            reference_log_prob(degraded[-1] - latent, mean, covariance),
        )
    result = shift.conditional_log_prob(torch.stack(degraded), clean, domain)
    assert_close(result, torch.stack(expected), rtol=1e-8, atol=1e-8)


@every_factor
def test_everything_is_finite_in_float32_with_gradients(factor: Tensor) -> None:
    """Zero is where the published M stands, and nothing keeps a trained M away from rank loss."""
    shift = make_shift(factor).float()
    z = torch.randn(2, CHANNELS, 2, 2)
    domain = torch.tensor([1, 1])
    for result in (
        shift.log_prob(z, domain),
        shift.conditional_log_prob(z + 1e-2, z, domain),
        shift.degrade(z, torch.randn_like(z), domain, torch.ones(2)),
        shift.restore(z, torch.randn_like(z), domain),
    ):
        assert result.dtype == torch.float32
        assert result.isfinite().all()
        shift.zero_grad()
        result.sum().backward()
        for parameter in shift.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()


# --- degrade


def test_degrade_adds_the_shift_of_each_image_at_its_temperature() -> None:
    shift = make_shift()
    z, noise = draw(4, CHANNELS, 2, 5), draw(4, CHANNELS, 2, 5)
    domain, temperature = torch.tensor([2, 0, 1, 1]), torch.tensor([0.5, 2, 1, 0]).double()
    result = shift.degrade(z, noise, domain, temperature)
    for i, number in enumerate(domain.tolist()):
        for row in range(2):
            for column in range(5):
                u = shift.means()[number] + shift.factors()[number] @ noise[i, :, row, column]
                expected = z[i, :, row, column] + temperature[i] * u
                assert_close(result[i, :, row, column], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("number", [1, 2])
def test_degrade_has_the_moments_of_the_shift(number: int) -> None:
    shift = make_shift()
    mean, covariance = moments_of(shift, number)
    # Eight images of one constant latent; two temperatures side by side.
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    z = start[:, None, None].expand(8, -1, 50, 50)
    temperature = torch.tensor([1, 0.5] * 4, dtype=torch.float64)
    with torch.no_grad():
        result = shift.degrade(z, torch.randn_like(z), torch.full((8,), number), temperature)
    assert_moments(positions(result[0::2]), start + mean, covariance)
    assert_moments(positions(result[1::2]), start + 0.5 * mean, 0.25 * covariance)


def test_degraded_latents_have_the_marginal_that_is_fitted() -> None:
    """z + u with z ~ N(0, I) is N(mu, I + Sigma), the density that log_prob gives."""
    shift = make_shift()
    mean, covariance = moments_of(shift, 1)
    z, noise = draw(4, CHANNELS, 50, 50), draw(4, CHANNELS, 50, 50)
    domain = torch.ones(4, dtype=torch.int64)
    with torch.no_grad():
        result = shift.degrade(z, noise, domain, torch.ones(4).double())
    assert_moments(positions(result), mean, IDENTITY + covariance)


# --- restore


@every_factor
def test_restore_mean_is_that_of_the_posterior(factor: Tensor) -> None:
    shift = make_shift(factor)
    z, domain = draw(3, CHANNELS, 2, 2), torch.tensor([1, 2, 0])
    result = shift.restore(z, None, domain)
    for i, number in enumerate(domain.tolist()):
        mean, covariance = moments_of(shift, number)
        precision = torch.linalg.inv(IDENTITY + covariance)
        expected = torch.einsum("cd,dhw->chw", precision, z[i] - mean[:, None, None])
        assert_close(result[i], expected, rtol=1e-11, atol=1e-11)


@every_factor
def test_restore_noise_has_the_posterior_covariance(factor: Tensor) -> None:
    """Restoring is affine in the noise: unit vectors of noise show the covariance's root."""
    shift = make_shift(factor)
    z = draw(1, CHANNELS, 1, CHANNELS)
    domain = torch.tensor([1])
    noise = IDENTITY[None, :, None, :]  # position i has noise in channel i alone
    root = (shift.restore(z, noise, domain) - shift.restore(z, None, domain))[0, :, 0, :]
    _, covariance = moments_of(shift, 1)
    expected = covariance @ torch.linalg.inv(IDENTITY + covariance)
    assert_close(root @ root.mT, expected, rtol=1e-11, atol=1e-11)


def test_restore_has_the_moments_of_the_posterior() -> None:
    shift = make_shift()
    mean, covariance = moments_of(shift, 2)
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    z = start[:, None, None].expand(4, -1, 50, 50)
    with torch.no_grad():
        result = shift.restore(z, torch.randn_like(z), torch.full((4,), 2))
    precision = torch.linalg.inv(IDENTITY + covariance)
    assert_moments(positions(result), precision @ (start - mean), covariance @ precision)


def test_clean_latents_are_restored_to_themselves() -> None:
    z = draw(2, CHANNELS, 2, 2)
    result = make_shift().restore(z, torch.randn_like(z), torch.tensor([0, 0]))
    assert_close(result, z, rtol=1e-12, atol=1e-12)


@every_factor
def test_restore_after_degrade_has_the_moments_of_the_prior(factor: Tensor) -> None:
    """And stands to the degraded latents as the clean ones do: with covariance I."""
    shift = make_shift(factor)
    z, domain = draw(4, CHANNELS, 50, 50), torch.ones(4, dtype=torch.int64)
    with torch.no_grad():
        degraded = shift.degrade(z, torch.randn_like(z), domain, torch.ones(4).double())
        restored = shift.restore(degraded, torch.randn_like(z), domain)
    mean, sigma = moments_of(shift, 1)
    joint = torch.cat([positions(restored), positions(degraded)], 1)
    covariance = torch.cat(
        [torch.cat([IDENTITY, IDENTITY], 1), torch.cat([IDENTITY, IDENTITY + sigma], 1)]
    )
    assert_moments(joint, torch.cat([torch.zeros_like(mean), mean]), covariance)


# --- one dimension (appendices A and B of the paper)


def fit(clean: Tensor, degraded: Tensor, averaged: bool) -> dict[str, float]:
    """The maximum likelihood of a flow of one affine layer on scalars, in the data's units."""
    flow, shift = ActNorm(1).double(), DomainShift(1, 1, init=0.1).double()
    parameters = [*flow.parameters(), *shift.parameters()]
    images = torch.cat([clean, degraded])[:, None, None, None]
    domain = torch.tensor([0] * len(clean) + [1] * len(degraded))
    weights = [1 / len(clean)] * len(clean) + [1 / len(degraded)] * len(degraded)
    weight = torch.tensor(weights).double() if averaged else torch.ones(len(images)).double()
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        z, logdet = flow.encode(images, images)
        result = -(weight * (logdet + shift.log_prob(z, domain))).sum() / weight.sum()
        result.backward()
        return result

    optimizer.step(loss)
    sd_x = (-flow.affine.logs).exp().item()
    return {
        "mu_x": -flow.affine.bias.item(),
        "var_x": sd_x**2,
        "mu_u": shift.mean.item() * sd_x,
        "var_u": (shift.factor.item() * sd_x) ** 2,
    }


@pytest.mark.parametrize("averaged", [False, True], ids=["sum", "average"])
@pytest.mark.parametrize("spread", [3.0, 0.4], ids=["degraded wider", "degraded narrower"])
def test_one_dimension_reaches_the_closed_form(spread: float, averaged: bool) -> None:
    n, m = 40, 70
    x, y = 2 + 1.5 * draw(n), -1 + 1.5 * spread * draw(m)
    v_x, v_y = x.var(correction=0).item(), y.var(correction=0).item()
    if v_y >= v_x:
        var_x, var_u = v_x, v_y - v_x
    else:
        # No shift can narrow: it vanishes, and both domains share one variance.
        var_x, var_u = (v_x + v_y) / 2 if averaged else (n * v_x + m * v_y) / (n + m), 0.0
    expected = {
        "mu_x": x.mean().item(),
        "var_x": var_x,
        "mu_u": (y.mean() - x.mean()).item(),
        "var_u": var_u,
    }
    assert fit(x, y, averaged) == pytest.approx(expected, rel=1e-5, abs=1e-8)


# --- kinds of shift

KINDS = ("full", "diagonal", "zero", "fitted")
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_density_of_every_kind(kind: str) -> None:
    shift = make_kind(kind)
    z, domain = draw(3, CHANNELS, 2, 5), torch.tensor([2, 0, 1])
    expected = []
    for latent, number in zip(z, domain.tolist(), strict=True):
        mean, covariance = moments_of(shift, number)
        expected.append(reference_log_prob(latent, mean, IDENTITY + covariance))
    assert_close(shift.log_prob(z, domain), torch.stack(expected), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "trained"),
    [
        ("full", {"mean": (2, 3), "factor": (2, 3, 3)}),
        ("diagonal", {"mean": (2, 3), "factor": (2, 3)}),
        ("zero", {"mean": (2, 3)}),
        ("fitted", {}),
    ],
)
def test_gradients_reach_what_the_kind_trains(
    kind: str, trained: dict[str, tuple[int, ...]]
) -> None:
    shift = make_kind(kind)
    assert {name: tuple(p.shape) for name, p in shift.named_parameters()} == trained
    z = draw(2, CHANNELS, 4, 4).requires_grad_()
    shift.log_prob(z, torch.tensor([1, 2])).sum().backward()
    for parameter in shift.parameters():
        assert parameter.grad is not None
        assert (parameter.grad != 0).all()
    for buffer in shift.buffers():
        assert buffer.grad is None


@pytest.mark.parametrize("kind", ["zero", "fitted"])
def test_without_m_both_domains_start_standard_normal(kind: str) -> None:
    shift = DomainShift(CHANNELS, 1, init=0.5, kind=kind).double()
    z = draw(2, CHANNELS, 2, 2)
    clean, degraded = (shift.log_prob(z, torch.full((2,), number)) for number in (0, 1))
    assert_close(degraded, clean, rtol=1e-12, atol=1e-12)


@every_kind
def test_every_kind_degrades_and_restores_with_its_moments(kind: str) -> None:
    shift = make_kind(kind)
    mean, sigma = moments_of(shift, 1)
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    z, domain = start[:, None, None].expand(4, -1, 50, 50), torch.ones(4, dtype=torch.int64)
    with torch.no_grad():
        degraded = shift.degrade(z, torch.randn_like(z), domain, torch.ones(4).double())
        restored = shift.restore(z, torch.randn_like(z), domain)
    assert_moments(positions(degraded), start + mean, sigma)
    precision = torch.linalg.inv(IDENTITY + sigma)
    assert_moments(positions(restored), precision @ (start - mean), sigma @ precision)


@every_kind
def test_assigned_moments_are_taken_as_far_as_the_kind_holds_them(kind: str) -> None:
    shift, other = make_kind(kind), 1
    before = moments_of(shift, other)
    mean, factor = draw(CHANNELS), draw(CHANNELS, CHANNELS)
    shift.assign(2, mean, factor)
    sigma = factor @ factor.mT
    kept = {"diagonal": sigma.diagonal().diag(), "zero": torch.zeros_like(sigma)}
    assert_close(moments_of(shift, 2), (mean, kept.get(kind, sigma)))
    assert_close(moments_of(shift, other), before, rtol=0, atol=0)
    for number in (0, 3):
        with pytest.raises(ValueError, match="from 1 to 2"):
            shift.assign(number, mean, factor)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="'round'"):
        DomainShift(CHANNELS, 1, init=0.1, kind="round")


# --- between domains


def test_root_of_the_positive_part() -> None:
    vectors = torch.linalg.qr(draw(4, 4)).Q
    matrix = vectors * torch.tensor([2.0, 0.5, 0.0, -1.0]).double() @ vectors.mT
    root = psd_root(matrix)
    expected = vectors * torch.tensor([2.0, 0.5, 0.0, 0.0]).double() @ vectors.mT
    assert_close(root @ root, expected, rtol=1e-12, atol=1e-12)
    assert_close(root, root.mT, rtol=1e-12, atol=1e-12)


@every_kind
def test_between_domains_means_and_covariances_are_interpolated(kind: str) -> None:
    shift = make_kind(kind)
    weights = torch.tensor([[0.0, 0.3, 0.7], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]).double()
    means, roots = shift.mixed(weights)
    moments = [moments_of(shift, number) for number in range(3)]
    for i, row in enumerate(weights):
        pairs = list(zip(row, moments, strict=True))
        assert_close(means[i], sum(w * m for w, (m, _) in pairs), rtol=1e-10, atol=1e-10)
        expected = sum(w * c for w, (_, c) in pairs)
        assert_close(roots[i] @ roots[i].mT, expected, rtol=1e-10, atol=1e-10)
    assert roots[1].equal(shift.factors()[1])


def test_mixed_domains_degrade_and_restore_with_the_mixed_moments() -> None:
    shift = make_shift()
    weights = torch.tensor([[0, 0.25, 0.75], [0, 1, 0]] * 4).double()
    (m1, c1), (m2, c2) = moments_of(shift, 1), moments_of(shift, 2)
    mixed = 0.25 * m1 + 0.75 * m2, 0.25 * c1 + 0.75 * c2
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    z = start[:, None, None].expand(8, -1, 50, 50)
    with torch.no_grad():
        degraded = shift.degrade(z, torch.randn_like(z), weights, torch.ones(8).double())
        restored = shift.restore(z, torch.randn_like(z), weights)
    for first, (mean, sigma) in ((0, mixed), (1, (m1, c1))):
        assert_moments(positions(degraded[first::2]), start + mean, sigma)
        precision = torch.linalg.inv(IDENTITY + sigma)
        posterior = precision @ (start - mean), sigma @ precision
        assert_moments(positions(restored[first::2]), *posterior)


def test_weights_are_normalised() -> None:
    weights = normalized_weights({"a": 1, "b": 3.0, "c": 0}, ("a", "b", "c"))
    assert weights == {"a": 0.25, "b": 0.75}


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({"a": 1, "d": 1}, ValueError, r"degraded ones \(a, b\), got 'd'"),
        ({"a": 1, "clean": 1}, ValueError, "got 'clean'"),
        ({"a": -0.1, "b": 1}, ValueError, "at least 0, got -0.1 for 'a'"),
        ({"a": math.nan}, ValueError, "must be finite"),
        ({"a": math.inf}, ValueError, "must be finite"),
        ({"a": "much"}, TypeError, "is a number, got 'much' for 'a'"),
        ({"a": True}, TypeError, "is a number"),
        ({"a": 0, "b": 0.0}, ValueError, "a weight above 0"),
        ({}, ValueError, "a weight above 0"),
    ],
)
def test_weights_that_make_no_mix(weights: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        normalized_weights(weights, ("a", "b"))


def test_a_large_m_has_a_density_in_float32() -> None:
    """I + M M^T rounded to float32 is not positive definite; of less rank, M happens to grow so."""
    rng = torch.Generator().manual_seed(0)
    shift = DomainShift(96, 1, init=0.1)
    with torch.no_grad():
        columns = 1e3 * torch.randn(96, 8, generator=rng)
        shift.factor[0].copy_(torch.cat([columns, torch.zeros(96, 88)], dim=1))
    covariance = torch.eye(96) + shift.factor[0] @ shift.factor[0].mT
    assert torch.linalg.cholesky_ex(covariance.detach()).info != 0
    z, domain = torch.randn(2, 96, 2, 2, generator=rng), torch.tensor([0, 1])
    found = shift.log_prob(z, domain)
    exact = torch.eye(96).double() + shift.factor[0].double() @ shift.factor[0].double().mT
    expected = reference_log_prob(z[1].double(), torch.zeros(96).double(), exact)
    assert found.dtype == torch.float32
    assert_close(found[1].double(), expected, rtol=1e-4, atol=1e-2)
    found.sum().backward()
    assert shift.factor.grad is not None
    assert shift.factor.grad.isfinite().all()


def test_an_m_that_is_no_matrix_any_more_has_the_density_nan() -> None:
    """An exception would end a run, and have its other processes wait for ever."""
    shift = DomainShift(CHANNELS, 2, init=0.1)
    with torch.no_grad():
        shift.factor[0].fill_(1e30)  # whose square float32 cannot hold, nor float64 with I
        shift.factor[1].fill_(math.nan)
    z = torch.zeros(3, CHANNELS, 1, 1)
    for result in (
        shift.log_prob(z, torch.tensor([0, 1, 2])),
        shift.conditional_log_prob(z, z, torch.tensor([1, 1, 2])),
    ):
        assert result[1:].isnan().all()
        result.sum().backward()
