"""The public API: degraded and restored images of every kind, and what a seed fixes."""

from __future__ import annotations

import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small import small_model
from torch import Tensor
from torch.testing import assert_close

from deflow_aug import DeFlowDegrader
from deflow_aug.config import ChannelStatistics
from deflow_aug.images import unpack

CALM: dict[str, Any] = {"seed": 5, "shift_init": 0.01}
"""A small model that changes mid-grey images so little that nothing is clamped."""


def colours(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.3, 0.7, shape)


def stored(dtype: str, *shape: int) -> np.ndarray:
    """Colours, and alpha, as an array of this dtype."""
    full = {"uint8": 255, "uint16": 65535}.get(dtype, 1)
    values = colours(*shape) * full
    return (values.round() if full > 1 else values).astype(dtype)


def tensor(*shape: int) -> Tensor:
    return torch.from_numpy(colours(*shape)).float()


def picture(mode: str, *shape: int) -> Image.Image:
    return Image.fromarray(stored("uint8", *shape)).convert(mode)


def make(**settings: Any) -> DeFlowDegrader:
    return DeFlowDegrader(small_model(**CALM), device="cpu", **settings)


@pytest.fixture(scope="module")
def degrader() -> DeFlowDegrader:
    """With every kind of noise."""
    return make(dequantize=True)


@pytest.fixture(scope="module")
def two_domains() -> DeFlowDegrader:
    model = small_model(domains=("night", "day"), **CALM)
    return DeFlowDegrader(model, device="cpu")


KINDS: dict[str, Callable[[], Any]] = {
    "PIL RGB": lambda: picture("RGB", 6, 9, 3),
    "PIL RGBA": lambda: picture("RGBA", 6, 9, 4),
    "PIL L": lambda: picture("L", 6, 9),
    "PIL LA": lambda: picture("LA", 6, 9, 4),
    "PIL I;16": lambda: Image.fromarray(stored("uint16", 6, 9)),
    "array (H, W) uint8": lambda: stored("uint8", 6, 9),
    "array (H, W) uint16": lambda: stored("uint16", 6, 9),
    "array (H, W) float32": lambda: stored("float32", 6, 9),
    "array (H, W, 1) uint8": lambda: stored("uint8", 6, 9, 1),
    "array (H, W, 2) uint8": lambda: stored("uint8", 6, 9, 2),
    "array (H, W, 3) uint8": lambda: stored("uint8", 6, 9, 3),
    "array (H, W, 3) uint16": lambda: stored("uint16", 6, 9, 3),
    "array (H, W, 3) float16": lambda: stored("float16", 6, 9, 3),
    "array (H, W, 3) float64": lambda: stored("float64", 6, 9, 3),
    "array (H, W, 4) float32": lambda: stored("float32", 6, 9, 4),
    "array (B, H, W, 3) uint8": lambda: stored("uint8", 2, 6, 9, 3),
    "array (B, H, W, 4) uint16": lambda: stored("uint16", 2, 6, 9, 4),
    "tensor (1, H, W) float32": lambda: tensor(1, 6, 9),
    "tensor (3, H, W) uint8": lambda: torch.from_numpy(stored("uint8", 3, 6, 9)),
    "tensor (3, H, W) float32": lambda: tensor(3, 6, 9),
    "tensor (3, H, W) bfloat16": lambda: tensor(3, 6, 9).bfloat16(),
    "tensor (3, H, W) float64": lambda: tensor(3, 6, 9).double(),
    "tensor (B, 2, H, W) uint16": lambda: torch.from_numpy(stored("uint16", 2, 2, 6, 9)),
    "tensor (B, 3, H, W) float32": lambda: tensor(2, 3, 6, 9),
    "tensor (B, 4, H, W) uint8": lambda: torch.from_numpy(stored("uint8", 2, 4, 6, 9)),
    "tensor (B, 3, H, W) channels last": lambda: tensor(2, 3, 6, 9).to(
        memory_format=torch.channels_last
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def numbers(image: Any) -> np.ndarray:
    """What an image stores, as float64."""
    if isinstance(image, Tensor):
        image = image.to(torch.float64).numpy()
    return np.asarray(image).astype(np.float64)


def bands(image: Any) -> tuple[np.ndarray, np.ndarray]:
    """Colours (..., C) and alpha (..., 0 or 1), channels last."""
    values = numbers(image)
    if isinstance(image, Tensor):
        values = np.moveaxis(values, -3, -1)
    elif values.ndim == 2:
        values = values[..., None]
    alpha = values.shape[-1] in (2, 4)
    return values[..., : values.shape[-1] - alpha], values[..., values.shape[-1] - alpha :]


def look(image: Any) -> tuple[Any, ...]:
    """Everything about an image but its colours."""
    if isinstance(image, Image.Image):
        return type(image), image.mode, image.size
    if isinstance(image, Tensor):
        return type(image), image.dtype, image.shape, image.stride(), image.device
    return type(image), image.dtype, image.shape


def difference(one: Any, other: Any) -> float:
    return float(np.abs(numbers(one) - numbers(other)).max())


# -- what comes back ---------------------------------------------------------------------------


@every_kind
def test_degraded_image_is_of_the_kind_that_came_in(degrader: DeFlowDegrader, kind: str) -> None:
    image = KINDS[kind]()
    before = pickle.dumps(image)
    result = degrader.degrade(image, seed=1)
    assert look(result) == look(image)
    assert pickle.dumps(image) == before, "the input was modified"
    (colour, alpha), (degraded, alpha_after) = bands(image), bands(result)
    assert np.array_equal(alpha, alpha_after)
    change = np.abs(degraded - colour).mean() / colour.max()
    assert 0.005 < change < 0.2


@every_kind
def test_several_samples_are_a_list_or_a_first_axis(degrader: DeFlowDegrader, kind: str) -> None:
    image = KINDS[kind]()
    samples = degrader.degrade(image, n_samples=3, seed=1)
    if isinstance(image, Image.Image):
        assert isinstance(samples, list)
    else:
        assert type(samples) is type(image)
        assert samples.shape == (3, *image.shape)
    assert len(samples) == 3
    for sample in samples:
        assert look(sample) == look(image)
        assert np.array_equal(bands(sample)[1], bands(image)[1])
    assert difference(samples[0], samples[1]) > 0
    assert difference(samples[1], samples[2]) > 0


@every_kind
@pytest.mark.parametrize("noise", [False, True], ids=["without noise", "with noise"])
def test_temperature_zero_gives_the_image_back(kind: str, noise: bool) -> None:
    image = KINDS[kind]()
    degrader = make(conditioning_noise=noise, dequantize=noise)
    samples = degrader.degrade(image, 0, n_samples=2, seed=1)
    values = numbers(image)
    steps_allowed = 0 if values.max() < 256 else 1  # of 65535
    allowed = 2e-3 if values.max() <= 1 and "16" in kind else 1e-5
    for sample in samples:
        assert difference(sample, image) <= (steps_allowed if values.max() > 1 else allowed)


def test_temperature_zero_gives_every_byte_back(degrader: DeFlowDegrader) -> None:
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for pixels in (image, np.stack([image, image[::-1], image.T], -1)):
        assert np.array_equal(degrader.degrade(pixels, 0.0, seed=1), pixels)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (1, 13), (7, 11), (23, 2)])
def test_images_may_have_any_size(degrader: DeFlowDegrader, size: tuple[int, int]) -> None:
    image = stored("uint8", *size, 3)
    assert np.array_equal(degrader.degrade(image, 0, seed=1), image)
    samples = degrader.degrade(image, n_samples=2, seed=1)
    assert samples.shape == (2, *size, 3)
    assert np.abs(samples.astype(float) - image).mean() > 1
    assert degrader.restore(image, seed=1).shape == (*size, 3)
    assert np.isfinite(degrader.log_prob(image))


def test_results_are_clamped_not_wrapped() -> None:
    for value in (0, 255):
        image = np.full((8, 8, 3), value, np.uint8)
        result = make().degrade(image, seed=1)
        assert (result == value).any()
        assert (result != value).any()
        assert np.abs(result.astype(int) - value).max() < 128


def test_results_can_be_trained_on(degrader: DeFlowDegrader) -> None:
    batch = tensor(2, 3, 8, 8)
    weight = torch.ones(1, 3, 3, 3, requires_grad=True)
    samples = degrader.degrade(batch, n_samples=2, seed=1)
    for image in (degrader.degrade(batch, seed=1), samples[1], degrader.restore(batch, seed=1)):
        weight.grad = None
        F.conv2d(image, weight).sum().backward()
        assert weight.grad is not None
        assert weight.grad.abs().min() > 0
    scale = torch.ones(2, requires_grad=True)
    bits = degrader.log_prob(batch)
    (bits * scale).sum().backward()
    assert scale.grad is not None
    assert scale.grad.equal(bits)


def test_images_that_need_gradients_come_back_without(degrader: DeFlowDegrader) -> None:
    image = tensor(3, 8, 8)
    expected = degrader.degrade(image, seed=1)
    result = degrader.degrade(image.requires_grad_(), seed=1)
    assert not result.requires_grad
    assert result.equal(expected)


def test_the_model_is_frozen(degrader: DeFlowDegrader) -> None:
    assert not degrader.model.training
    assert not any(parameter.requires_grad for parameter in degrader.model.parameters())


def test_a_degrader_can_be_sent_to_other_processes(degrader: DeFlowDegrader) -> None:
    image = tensor(3, 8, 8)
    copy = pickle.loads(pickle.dumps(degrader))
    assert copy.degrade(image, seed=1).equal(degrader.degrade(image, seed=1))


# -- what a seed fixes -------------------------------------------------------------------------


def test_seed_fixes_the_result(degrader: DeFlowDegrader) -> None:
    image = tensor(3, 8, 8)
    first = degrader.degrade(image, seed=1)
    assert degrader.degrade(image, seed=1).equal(first)
    assert degrader.degrade(image, seed=np.int64(1)).equal(first)
    assert degrader.degrade(image, seed=[1]).equal(first)
    assert difference(degrader.degrade(image, seed=2), first) > 0.01
    assert difference(degrader.degrade(image, seed=2**64 + 1), first) > 0.01


def test_without_a_seed_every_result_is_another(degrader: DeFlowDegrader) -> None:
    images = tensor(1, 3, 8, 8).expand(2, -1, -1, -1)
    results = [*degrader.degrade(images), *degrader.degrade(images)]
    for i in range(4):
        for j in range(i):
            assert difference(results[i], results[j]) > 0.01


@pytest.mark.parametrize("method", ["degrade", "restore"])
def test_seed_fixes_each_image_whatever_it_is_batched_with(
    degrader: DeFlowDegrader, method: str
) -> None:
    call = getattr(degrader, method)
    images = tensor(4, 3, 8, 12)
    seeds = [11, 0, 2**40, 7]
    together = call(images, n_samples=2, seed=seeds)
    for i, seed in enumerate(seeds):
        alone = call(images[i], n_samples=2, seed=seed)
        assert_close(together[:, i], alone, rtol=0, atol=1e-5)
    order = [2, 0, 3]
    some = call(images[order], n_samples=2, seed=[seeds[i] for i in order])
    assert_close(some, together[:, order], rtol=0, atol=1e-5)


def test_one_seed_for_a_batch_is_that_seed_for_each_image(degrader: DeFlowDegrader) -> None:
    images = tensor(1, 3, 8, 8).expand(3, -1, -1, -1)
    shared = degrader.degrade(images, seed=5)
    assert shared.equal(degrader.degrade(images, seed=np.array([5, 5, 5])))
    assert_close(shared[0], shared[2], rtol=0, atol=1e-5)
    different = degrader.degrade(images, seed=(5, 6, 7))
    assert_close(different[0], shared[0], rtol=0, atol=1e-5)
    assert difference(different[1], shared[1]) > 0.01


@pytest.mark.parametrize("method", ["degrade", "restore"])
def test_a_sample_does_not_depend_on_their_number(degrader: DeFlowDegrader, method: str) -> None:
    call = getattr(degrader, method)
    image = tensor(3, 8, 8)
    four = call(image, n_samples=4, seed=3)
    for number in (2, 3):
        assert call(image, n_samples=number, seed=3).equal(four[:number])
    assert call(image, seed=3).equal(four[0])
    assert call(image, n_samples=np.int64(2), seed=3).equal(four[:2])


def test_seed_means_the_same_for_every_kind_of_image(degrader: DeFlowDegrader) -> None:
    pixels = stored("uint8", 8, 8, 3)
    result = degrader.degrade(pixels, seed=3)
    assert np.array_equal(np.asarray(degrader.degrade(Image.fromarray(pixels), seed=3)), result)
    channels_first = degrader.degrade(torch.from_numpy(pixels).permute(2, 0, 1), seed=3)
    assert np.array_equal(channels_first.permute(1, 2, 0).numpy(), result)
    floats = degrader.degrade(pixels / np.float32(255), seed=3)
    assert np.abs(floats * 255 - result).max() <= 0.501


def test_each_noise_is_seeded_and_can_be_switched_off() -> None:
    image = tensor(3, 8, 8)
    results = [
        make(conditioning_noise=conditioning, dequantize=dequantize).degrade(image, seed=1)
        for conditioning in (False, True)
        for dequantize in (False, True)
    ]
    for i in range(4):
        for j in range(i):
            assert difference(results[i], results[j]) > 1e-5


def test_published_models_vary_by_dequantization_alone() -> None:
    """Their M is zero: without it, all samples at a temperature are the same image."""
    model = small_model()
    for shift in model.shifts:
        shift.factor.data.zero_()
    image = tensor(3, 8, 8)
    plain = DeFlowDegrader(model, device="cpu", conditioning_noise=False)
    one, other = (plain.degrade(image, seed=seed) for seed in (1, 2))
    assert one.equal(other)
    assert difference(one, image) > 1e-3
    varied = DeFlowDegrader(model, device="cpu", conditioning_noise=False, dequantize=True)
    one, other = (varied.degrade(image, seed=seed) for seed in (1, 2))
    assert 1e-4 < difference(one, other) < 2 / varied.model.config.dequantization_steps
    # At small temperatures it shrinks with them, and it never exceeds a bin.
    for temperature, bins in ((0.1, 0.1), (1.0, 1.0), (9.0, 1.0)):
        noisy = varied.degrade(image, temperature, seed=1)
        without = plain.degrade(image, temperature, seed=1)
        width = bins / varied.model.config.dequantization_steps
        assert 0.4 * width < difference(noisy, without) < 0.6 * width


def test_each_sample_has_its_own_dequantization_noise() -> None:
    """The only randomness of published models."""
    model = small_model()
    for shift in model.shifts:
        shift.factor.data.zero_()
    degrader = DeFlowDegrader(model, device="cpu", dequantize=True)
    image = tensor(3, 8, 8)
    samples = degrader.degrade(image, n_samples=3, seed=1)
    for i in range(3):
        assert difference(samples[i], samples[i - 1]) > 1e-4
    assert samples[0].equal(degrader.degrade(image, seed=1))


def global_states() -> list[Any]:
    legacy = np.random.get_state()  # noqa: NPY002
    return [random.getstate(), legacy[1].tolist(), legacy[2], torch.get_rng_state().tolist()]


def test_no_global_generator_is_changed(tmp_path: Path) -> None:
    model = small_model()
    before = global_states()
    DeFlowDegrader(model, device="cpu").save_pretrained(tmp_path / "saved")
    degrader = DeFlowDegrader.from_pretrained(tmp_path / "saved", device="cpu", dequantize=True)
    image = stored("uint8", 5, 6, 3)
    for seed in (None, 1):
        degrader.degrade(image, n_samples=2, seed=seed)
        degrader.restore(image, seed=seed)
    degrader.restore(image, mean=True)
    degrader.log_prob(image)
    assert global_states() == before


def test_no_global_generator_is_read(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "saved")
    image = tensor(3, 8, 8)
    seeded, fresh = [], []
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            degrader = DeFlowDegrader.from_pretrained(tmp_path / "saved", device="cpu")
            fresh.append(degrader.degrade(image))
            torch.manual_seed(len(fresh))
            seeded.append(degrader.degrade(image, seed=1))
    assert seeded[0].equal(seeded[1])
    assert difference(*fresh) > 0.01


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_results_do_not_depend_on_the_number_of_threads(degrader: DeFlowDegrader) -> None:
    image = tensor(2, 3, 40, 24)
    results = []
    for number in (1, 3):
        with threads(number):
            results.append(degrader.degrade(image, n_samples=2, seed=[1, 2]))
    assert_close(*results, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_and_cpu_agree() -> None:
    on_cpu = make(dequantize=True)
    on_gpu = DeFlowDegrader(small_model(), device="cuda", dequantize=True)
    assert DeFlowDegrader(small_model()).device.type == "cuda"
    image = tensor(2, 3, 13, 16)
    expected = on_cpu.degrade(image, n_samples=2, seed=[1, 2])
    for given in (image, image.cuda()):
        result = on_gpu.degrade(given, n_samples=2, seed=[1, 2])
        assert result.device == given.device
        assert_close(result.cpu(), expected, rtol=0, atol=2e-3)
        bits = on_gpu.log_prob(given)
        assert bits.device == given.device
        assert_close(bits.cpu(), on_cpu.log_prob(image), rtol=0, atol=2e-3)


# -- temperature -------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [list, tuple, np.array, torch.tensor])
def test_temperature_of_each_image(degrader: DeFlowDegrader, wrap: Callable[..., Any]) -> None:
    images, seeds = tensor(3, 3, 8, 8), [1, 2, 3]
    temperatures = [0.0, 0.5, 1.5]
    together = degrader.degrade(images, wrap(temperatures), seed=seeds)
    for i, temperature in enumerate(temperatures):
        alone = degrader.degrade(images[i], temperature, seed=seeds[i])
        assert_close(together[i], alone, rtol=0, atol=1e-5)
    assert difference(together[0], images[0]) < 1e-5


def test_higher_temperature_changes_more(degrader: DeFlowDegrader) -> None:
    image = tensor(3, 8, 8)
    changes = [
        (degrader.degrade(image, temperature, n_samples=4, seed=1) - image).abs().mean().item()
        for temperature in (0, 0.25, 0.5, 1, 2)
    ]
    assert changes == sorted(changes)
    assert changes[0] < 1e-5
    assert changes[-1] > 1.5 * changes[-2] > 2 * changes[-3]


# -- the distribution --------------------------------------------------------------------------


# Little contrast: nothing is clamped, which would change the moments.
FLAT = 0.4 + tensor(1, 3, 16, 16) / 5


def sampled_latents(degrader: DeFlowDegrader, x: Tensor, samples: Tensor) -> list[Any]:
    """z of ``x`` and of samples of it [N, 1, 3, H, W], at the conditioning of ``x``: (z, zs)."""
    assert samples.min() > 0
    assert samples.max() < 1
    model = degrader.model
    z, _ = model.encode(x, model.features(x))
    zs, _ = model.encode(samples[:, 0], model.features(x.expand(len(samples), -1, -1, -1)))
    return list(zip(z, zs, strict=True))


def assert_moments(u: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Of [N, C, H, W], independent over samples and positions: within 5 standard errors."""
    rows = u.movedim(1, -1).flatten(0, -2).double()
    variance = covariance.diagonal()
    assert ((rows.mean(0) - mean).abs() < 5 * (variance / len(rows)).sqrt()).all()
    deviations = rows - mean
    error = ((variance[:, None] * variance + covariance.square()) / len(rows)).sqrt()
    assert ((deviations.mT @ deviations / len(rows) - covariance).abs() < 5 * error).all()
    # Neither neighbours nor consecutive samples are alike.
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), deviations.mT, upper=False
    )
    white = white.mT.reshape(u.movedim(1, -1).shape)
    for pair in (white[1:] * white[:-1], white[:, :, 1:] * white[:, :, :-1]):
        assert pair.mean().abs() < 5 / pair.numel() ** 0.5


def shift_of(degrader: DeFlowDegrader, level: int) -> tuple[Tensor, Tensor]:
    """mu and Sigma."""
    shift = degrader.model.shifts[level]
    factor = shift.factor[0].double()
    return shift.mean[0].double(), factor @ factor.T


def test_degraded_latents_have_the_moments_of_the_shift() -> None:
    degrader = make(conditioning_noise=False)
    x = FLAT
    samples = degrader.degrade(x, 0.5, n_samples=60, seed=1)
    draws = []
    for level, (z, zs) in enumerate(sampled_latents(degrader, x, samples)):
        mean, covariance = shift_of(degrader, level)
        assert_moments(zs - z, 0.5 * mean, 0.25 * covariance)
        factor = degrader.model.shifts[level].factors()[1].double()
        u = (zs - z).double() / 0.5 - mean[:, None, None]
        draws.append(torch.einsum("ij,bjhw->bihw", torch.linalg.inv(factor), u).flatten())
    # Nor are the draws for the two latents, of which the second has as many as the first.
    product = draws[0] * draws[1]
    assert product.mean().abs() < 5 / len(product) ** 0.5


def test_restored_latents_have_the_moments_of_the_posterior() -> None:
    model = small_model(**CALM)
    degrader = DeFlowDegrader(model, device="cpu", conditioning_noise=False)
    x = FLAT
    samples = degrader.restore(x, n_samples=60, seed=1)
    for level, (z, zs) in enumerate(sampled_latents(degrader, x, samples)):
        mean, covariance = shift_of(degrader, level)
        precision = torch.linalg.inv(torch.eye(len(mean)) + covariance)
        centre = torch.einsum("ij,bjhw->bihw", precision, z - mean[:, None, None])
        assert_moments(zs - centre, torch.zeros(len(mean)), covariance @ precision)


def test_mean_of_restorations() -> None:
    degrader = make(conditioning_noise=False)
    x = FLAT
    restored = degrader.restore(x, n_samples=1, mean=True)[None]
    for level, (z, zs) in enumerate(sampled_latents(degrader, x, restored)):
        mean, covariance = shift_of(degrader, level)
        precision = torch.linalg.inv(torch.eye(len(mean)) + covariance)
        centre = torch.einsum("ij,bjhw->bihw", precision, z - mean[:, None, None])
        assert_close(zs.double(), centre, rtol=0, atol=1e-4)


@pytest.mark.parametrize("noise", [False, True], ids=["without noise", "with noise"])
def test_nothing_is_random_in_a_mean(noise: bool) -> None:
    degrader = make(conditioning_noise=noise, dequantize=noise)
    image = tensor(3, 8, 8)
    mean = degrader.restore(image, mean=True)
    assert mean.equal(degrader.restore(image, mean=True))
    assert mean.equal(degrader.restore(image, mean=True, seed=4))
    assert mean.equal(make(conditioning_noise=False).restore(image, mean=True))
    samples = degrader.restore(image, n_samples=2, mean=True)
    assert samples.equal(torch.stack([mean, mean]))
    assert difference(degrader.restore(image, seed=4), mean) > 0.01


@every_kind
def test_restored_image_is_of_the_kind_that_came_in(degrader: DeFlowDegrader, kind: str) -> None:
    image = KINDS[kind]()
    for settings in ({"seed": 1}, {"mean": True}):
        result = degrader.restore(image, **settings)
        assert look(result) == look(image)
        assert np.array_equal(bands(result)[1], bands(image)[1])
        assert difference(result, image) > 0


def test_it_says_what_it_is(two_domains: DeFlowDegrader) -> None:
    assert two_domains.domains == ("night", "day")
    assert str(two_domains).startswith("DeFlowDegrader(domains=('night', 'day'), 0.0")
    assert str(two_domains).endswith(" million parameters, cpu)")


# -- log_prob ----------------------------------------------------------------------------------


def test_log_prob_is_minus_bits_per_dimension(two_domains: DeFlowDegrader) -> None:
    image = stored("uint8", 8, 12, 3)
    pixels = unpack(image).pixels
    values = {}
    for domain in ("clean", "night", "day"):
        result = two_domains.log_prob(image, domain)
        assert type(result) is float
        assert result == pytest.approx(-two_domains.model.nll(pixels, [domain]).item(), abs=1e-5)
        values[domain] = result
    assert two_domains.log_prob(image) == values["clean"]
    assert len({round(value, 4) for value in values.values()}) == 3


def test_log_prob_takes_no_mix(two_domains: DeFlowDegrader) -> None:
    with pytest.raises(TypeError, match=r"the name of one domain, got \{'low': 1.0\}"):
        two_domains.log_prob(tensor(3, 8, 8), {"low": 1.0})  # type: ignore[arg-type]


def test_log_prob_of_every_kind_and_batch(degrader: DeFlowDegrader) -> None:
    batch = stored("uint8", 3, 8, 12, 3)
    bits = degrader.log_prob(batch)
    assert isinstance(bits, np.ndarray)
    assert bits.shape == (3,)
    assert bits.dtype == np.float32
    tensors = torch.from_numpy(batch).permute(0, 3, 1, 2)
    of_tensors = degrader.log_prob(tensors)
    assert isinstance(of_tensors, Tensor)
    assert of_tensors.shape == (3,)
    assert np.allclose(of_tensors.numpy(), bits, rtol=0, atol=1e-5)
    assert len(set(np.round(bits, 4))) == 3
    for i in range(3):
        for one in (batch[i], tensors[i], Image.fromarray(batch[i])):
            alone = degrader.log_prob(one)
            assert type(alone) is float
            assert alone == pytest.approx(bits[i], abs=1e-5)
    assert degrader.log_prob(batch[:1]).shape == (1,)
    assert degrader.log_prob(tensors[:1]).shape == (1,)


def test_log_prob_counts_the_padding(degrader: DeFlowDegrader) -> None:
    image = stored("uint8", 5, 3, 3)
    padded = np.pad(image, [(0, 3), (0, 1), (0, 0)], "symmetric")
    assert padded.shape == (8, 4, 3)
    assert degrader.log_prob(image) == pytest.approx(degrader.log_prob(padded), abs=1e-5)


def test_log_prob_has_no_noise(degrader: DeFlowDegrader) -> None:
    image = stored("uint8", 8, 8, 3)
    assert degrader.log_prob(image) == degrader.log_prob(image)
    assert degrader.log_prob(image) == make(conditioning_noise=False).log_prob(image)


# -- domains -----------------------------------------------------------------------------------


def test_each_domain_has_its_degradation(two_domains: DeFlowDegrader) -> None:
    image = tensor(3, 8, 8)
    for call in (two_domains.degrade, two_domains.restore):
        night, day = (call(image, seed=1, domain=domain) for domain in ("night", "day"))
        assert difference(night, day) > 0.01


def test_the_only_domain_may_be_named(degrader: DeFlowDegrader) -> None:
    image = tensor(3, 8, 8)
    named = degrader.degrade(image, seed=1, domain="degraded")
    assert named.equal(degrader.degrade(image, seed=1))


@pytest.mark.parametrize("method", ["degrade", "restore"])
@pytest.mark.parametrize("domain", [None, "dusk", "clean"])
def test_a_domain_must_be_named_if_there_are_several(
    two_domains: DeFlowDegrader, method: str, domain: str | None
) -> None:
    with pytest.raises(ValueError, match=f"domain must be one of .*night, day.*got {domain!r}"):
        getattr(two_domains, method)(tensor(3, 8, 8), domain=domain)


def test_log_prob_of_an_unknown_domain(two_domains: DeFlowDegrader) -> None:
    with pytest.raises(ValueError, match=r"unknown domain 'dusk'.*clean, night, day"):
        two_domains.log_prob(tensor(3, 8, 8), domain="dusk")


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, -1, 1.0, 2.5, True, None, "2"])
@pytest.mark.parametrize("method", ["degrade", "restore"])
def test_bad_numbers_of_samples(degrader: DeFlowDegrader, method: str, number: Any) -> None:
    with pytest.raises(ValueError, match="n_samples must be an integer of at least 1, got"):
        getattr(degrader, method)(tensor(3, 8, 8), n_samples=number)


@pytest.mark.parametrize("seed", [-1, 1.5, True, "1", [0, -1], [0, 1.5], [0, None], (0, True)])
@pytest.mark.parametrize("method", ["degrade", "restore"])
def test_bad_seeds(degrader: DeFlowDegrader, method: str, seed: Any) -> None:
    images = tensor(2, 3, 8, 8) if isinstance(seed, (list, tuple)) else tensor(3, 8, 8)
    with pytest.raises(ValueError, match="a seed is an integer of at least 0, got"):
        getattr(degrader, method)(images, seed=seed)


@pytest.mark.parametrize("seeds", [[], [1], [1, 2, 3]])
def test_as_many_seeds_as_images(degrader: DeFlowDegrader, seeds: list[int]) -> None:
    expected = rf"expected one seed, or 2 \(one an image\), got {len(seeds)}"
    with pytest.raises(ValueError, match=expected):
        degrader.degrade(tensor(2, 3, 8, 8), seed=seeds)


@pytest.mark.parametrize("temperature", [-0.1, float("nan"), float("inf"), [1.0, -1.0]])
def test_temperatures_out_of_range(degrader: DeFlowDegrader, temperature: Any) -> None:
    with pytest.raises(ValueError, match="temperature must be finite and at least 0"):
        degrader.degrade(tensor(2, 3, 8, 8), temperature)


@pytest.mark.parametrize("temperature", [[], [1.0], [1.0] * 3, [[1.0, 1.0]]])
def test_as_many_temperatures_as_images(degrader: DeFlowDegrader, temperature: Any) -> None:
    with pytest.raises(ValueError, match=r"temperature must be a number, or 2 numbers \(one an im"):
        degrader.degrade(tensor(2, 3, 8, 8), temperature)


@pytest.mark.parametrize(
    "array", [np.array([1.2, 0.5])[::-1], np.array([0.5, 1.2], ">f8"), np.array([0.5, 1.2], "f4")]
)
def test_temperatures_as_arrays_of_any_kind(degrader: DeFlowDegrader, array: Any) -> None:
    images = tensor(2, 3, 8, 8)
    array.flags.writeable = False
    expected = degrader.degrade(images, [0.5, 1.2], seed=[1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(degrader.degrade(images, array, seed=[1, 2]), expected)


@pytest.mark.parametrize("temperature", [None, "hot", True, [1.0, None], [1.0, [2.0]]])
def test_temperatures_that_are_no_numbers(degrader: DeFlowDegrader, temperature: Any) -> None:
    with pytest.raises(TypeError, match="temperature must be a number"):
        degrader.degrade(tensor(2, 3, 8, 8), temperature)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        pytest.param("photo.png", TypeError, "expected a PIL image", id="path"),
        pytest.param([[0.5]], TypeError, "expected a PIL image", id="list"),
        pytest.param(np.zeros((8, 8, 3), np.int32), TypeError, "dtype must be", id="int32"),
        pytest.param(np.zeros((8, 8), bool), TypeError, "dtype must be", id="bool"),
        pytest.param(np.zeros((8, 8, 5), np.uint8), ValueError, "expected an array", id="5 bands"),
        pytest.param(torch.zeros(8, 8), ValueError, "expected a tensor", id="(H, W) tensor"),
        pytest.param(torch.zeros(0, 3, 8, 8), ValueError, "empty", id="empty batch"),
        pytest.param(torch.full((3, 8, 8), 2.0), ValueError, r"lie in \[0, 1\]", id="range"),
        pytest.param(torch.full((3, 8, 8), torch.nan), ValueError, "must be finite", id="nan"),
        pytest.param(torch.randn(3, 8, 8), ValueError, "undo the normalisation", id="normalised"),
    ],
)
@pytest.mark.parametrize("method", ["degrade", "restore", "log_prob"])
def test_bad_images(
    degrader: DeFlowDegrader, method: str, image: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(degrader, method)(image)


# -- channel statistics ------------------------------------------------------------------------

STATISTICS = ChannelStatistics((0.5, 0.5, 0.4), (0.2, 0.3, 0.25), (0.4, 0.45, 0.5), (0.1, 0.2, 0.3))


def coloured(**settings: Any) -> DeFlowDegrader:
    """Its domain "night" has statistics, "day" has none."""
    model = small_model(domains=("night", "day"), statistics={"night": STATISTICS}, **CALM)
    return DeFlowDegrader(model, device="cpu", **settings)


def mapped(x: Tensor, back: bool = False) -> Tensor:
    """Images [..., 3, H, W] from clean to degraded colours, or back; not clamped."""
    mean, std, to_mean, to_std = (
        torch.tensor(values)[:, None, None]
        for values in (
            STATISTICS.clean_mean,
            STATISTICS.clean_std,
            STATISTICS.degraded_mean,
            STATISTICS.degraded_std,
        )
    )
    if back:
        mean, std, to_mean, to_std = to_mean, to_std, mean, std
    return (x - mean) / std * to_std + to_mean


def test_degraded_images_get_the_statistics_of_their_domain(two_domains: DeFlowDegrader) -> None:
    degrader = coloured()
    batch = tensor(2, 3, 7, 9)
    arguments: dict[str, Any] = {"temperature": [1.0, 0.3], "n_samples": 2, "seed": [1, 2]}
    plain = two_domains.degrade(batch, **arguments, domain="night")
    assert 0 < plain.min() < plain.max() < 1  # no colour is lost
    result = degrader.degrade(batch, **arguments, domain="night")
    assert result.equal(mapped(plain).clamp(0, 1))
    day = degrader.degrade(batch, **arguments, domain="day")
    assert day.equal(two_domains.degrade(batch, **arguments, domain="day"))


def test_temperature_zero_still_maps_the_colours() -> None:
    degrader = coloured(dequantize=True)
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = mapped(image).clamp(0, 1)
    assert_close(degrader.degrade(image, 0, domain="night"), expected, rtol=0, atol=1e-5)
    assert_close(degrader.degrade(image, 0, domain="day"), image, rtol=0, atol=1e-5)


def test_alpha_has_no_statistics() -> None:
    image = stored("uint8", 6, 9, 4)
    result = coloured().degrade(image, 0, domain="night")
    assert np.array_equal(result[..., 3], image[..., 3])
    expected = mapped(torch.from_numpy(image[..., :3]).permute(2, 0, 1) / 255).permute(1, 2, 0)
    assert np.abs(result[..., :3] - expected.numpy() * 255).max() < 0.51


@pytest.mark.parametrize("mean", [False, True])
def test_degraded_images_are_matched_before_they_are_restored(
    two_domains: DeFlowDegrader, mean: bool
) -> None:
    degrader = coloured()
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    matched = mapped(image, back=True)
    assert matched.min() < 0
    matched = matched.clamp(0, 1)
    result = degrader.restore(image, seed=1, mean=mean, domain="night")
    assert result.equal(two_domains.restore(matched, seed=1, mean=mean, domain="night"))
    result = degrader.restore(image, seed=1, mean=mean, domain="day")
    assert result.equal(two_domains.restore(image, seed=1, mean=mean, domain="day"))
    bits = degrader.log_prob(image, "night")
    assert bits == two_domains.log_prob(matched, "night")
    for domain in ("day", "clean"):
        assert degrader.log_prob(image, domain) == two_domains.log_prob(image, domain)


def test_statistics_are_saved(tmp_path: Path) -> None:
    coloured().save_pretrained(tmp_path / "w")
    config = DeFlowDegrader.from_pretrained(tmp_path / "w", device="cpu").model.config
    assert config.statistics == {"night": STATISTICS}
    assert "domain night get its channel statistics" in (tmp_path / "w" / "README.md").read_text()
