"""The library's computation against the plain one: the same numbers, and the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import plain
import pytest
import torch
import torch.nn.functional as F
from small import small_model
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from deflow_aug import recompute, rrdb
from deflow_aug.config import EncoderConfig
from deflow_aug.degrader import DeFlowDegrader
from deflow_aug.flow import convolution, features, glow
from deflow_aug.flow.direct import add_phases, phase_kernels
from deflow_aug.model import DeFlow

pytestmark = pytest.mark.usefixtures("products")

DOMAINS = ["clean", "degraded"]


@pytest.mark.parametrize("repeats", [2, 4, 8])
def test_convolving_repeated_pixels_is_convolving_the_upsampled_map(repeats: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 3, 4).double(), torch.randn(7, 5, 3, 3).double()
    upsampled = F.interpolate(x, scale_factor=repeats, mode="nearest")
    expected = F.conv2d(upsampled, weight, padding=1)
    result = torch.ones_like(expected)
    add_phases(result, x, phase_kernels(weight, repeats), repeats)
    assert_close(result, 1 + expected, rtol=1e-12, atol=1e-12)


def settled(dtype: torch.dtype, **changes: object) -> tuple[DeFlow, Tensor, Tensor, Tensor]:
    """A small model with initialised actnorms, images, dequantisation and conditioning noise."""
    model = small_model(**changes).to(dtype)
    torch.manual_seed(1)
    x = torch.rand(2, 3, 32, 48, dtype=dtype)
    draws = torch.rand_like(x) - 0.5
    scale = model.config.scale
    noise = torch.randn(2, 3, 32 // scale, 48 // scale, dtype=dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("initialized"):
            buffer.fill_(False)
    model.initialize(x, dequantization=draws, noise=noise)
    return model, x, draws, noise


def kept_from(
    least_saved: int | None, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], AbstractContextManager[None]]:
    """Contexts within which so many bytes of activations are computed again; never, if None."""
    monkeypatch.setattr(recompute, "LEAST_SAVED", least_saved or 0)
    return recompute.keeping_activations if least_saved is None else nullcontext


DIRECTLY = ["directly", "directly, step by step"]


@pytest.fixture(params=["in tiles", *DIRECTLY])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How maps are convolved: as on CPUs, or as on GPUs and in low precision."""
    if request.param != "in tiles":
        for module in (convolution, features, rrdb):
            monkeypatch.setattr(module, "in_tiles", lambda x: False)
    if request.param == "directly, step by step":
        monkeypatch.setattr(glow, "AT_ONCE", 0)
    name: str = request.param
    return name


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("splits", [(), (1,)])
@pytest.mark.parametrize("least_saved", [0, 2**20, None])
@pytest.mark.parametrize("way", ["in tiles", "directly"], indirect=True)
def test_likelihood_and_gradients_are_the_plain_ones(
    scale: int,
    splits: tuple[int, ...],
    least_saved: int | None,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float64, to its rounding: recomputed, folded and shared, but the same function."""
    keeping = kept_from(least_saved, monkeypatch)
    model, x, draws, noise = settled(
        torch.float64, scale=scale, levels=3, steps=2, split_levels=splits
    )
    results = []
    for nll in (
        lambda *a: plain.nll(model, *a),
        lambda x, d, u, n: model.nll(x, d, dequantization=u, noise=n),
    ):
        with keeping():
            bits = nll(x, DOMAINS, draws, noise)
        results.append((bits, torch.autograd.grad(bits.mean(), list(model.parameters()))))
    (plain_bits, plain_gradients), (bits, gradients) = results
    assert_close(bits, plain_bits, rtol=1e-10, atol=1e-10)
    for gradient, expected, name in zip(
        gradients, plain_gradients, dict(model.named_parameters()), strict=True
    ):
        assert_close(gradient, expected, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients)


def test_gradients_in_float32_differ_from_the_plain_ones_by_rounding() -> None:
    model, x, draws, noise = settled(torch.float32, levels=3, steps=2)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(plain.nll(model, x, DOMAINS, draws, noise).mean(), parameters)
    bits = model.nll(x, DOMAINS, dequantization=draws, noise=noise)
    gradients = torch.autograd.grad(bits.mean(), parameters)
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert_close(gradient, wanted, rtol=1e-3, atol=1e-5 * largest)


def test_samples_of_the_default_weights_are_the_plain_ones(way: str) -> None:
    model = DeFlowDegrader.from_pretrained(device="cpu").model
    torch.manual_seed(1)
    x = torch.rand(1, 3, 8, 12).repeat_interleave(4, 2).repeat_interleave(4, 3)
    scale = model.config.scale
    noise, draws = (
        torch.randn(1, 3, 32 // scale, 48 // scale),
        [torch.randn(1, *s) for s in model.latent_shapes(32, 48)],
    )
    with torch.no_grad():
        expected = plain.degrade(model, x, draws, "degraded", noise)
        prepared = model.features(x, noise)
        latents, _ = model.encode(x, prepared)
        shifted = model.degrade(latents, draws, ["degraded"], torch.ones(1))
        result = model.decode(shifted, prepared)
    assert (expected - x).std() > 0.01
    assert_close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("way", DIRECTLY, indirect=True)
def test_computing_directly_waits_for_nothing(way: str) -> None:
    """A CUDA graph can record what neither brings numbers from the CPU nor waits for any.

    By the names of operations that would: copies from one device to another cannot be seen here.
    """
    seen: list[str] = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(
            self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            chosen = args[1] if operation.overloadpacket == torch.ops.aten.index else ()
            by_truth = any(one is not None and one.dtype == torch.bool for one in chosen)
            seen.append("nonzero" if by_truth else str(operation.overloadpacket))
            return operation(*args, **(kwargs or {}))

    model = small_model(levels=3, steps=2).eval()
    draws = [torch.randn(2, *shape) for shape in model.latent_shapes(32, 48)]
    x, noise, domain = torch.rand(2, 3, 32, 48), torch.randn(2, 3, 8, 12), torch.tensor([1, 1])

    @torch.inference_mode()
    def sample() -> None:
        prepared = model.features(x, noise)
        latents, _ = model.encode(x, prepared)
        shifts = zip(model.domain_shifts(), latents, draws, strict=True)
        shifted = [one.degrade(z, u, domain, torch.ones(2)) for one, z, u in shifts]
        model.decode(shifted, prepared)

    sample()  # which folds the parameters
    with Noted():
        sample()
    words = "lift_fresh local_scalar item nonzero masked_select unique repeat_interleave equal"
    words += " linalg cholesky solve inv"
    assert len(seen) > 100
    assert [name for name in seen if any(word in name for word in words.split())] == []


@pytest.mark.parametrize("way", DIRECTLY, indirect=True)
def test_each_precision_has_kernels_of_its_own(way: str) -> None:
    model, x = small_model(levels=2, steps=2).eval(), torch.rand(1, 3, 32, 32)

    def latents(enabled: bool) -> list[Tensor]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return model.encode(x, model.features(x))[0]

    exact, rounded, again = (latents(enabled) for enabled in (False, True, False))
    assert all(torch.equal(a, b) for a, b in zip(exact, again, strict=True))
    assert not torch.equal(exact[-1], rounded[-1])
    assert_close(rounded[-1], exact[-1], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("least_saved", [0, recompute.LEAST_SAVED, None])
@pytest.mark.parametrize("way", ["in tiles", "directly"], indirect=True)
def test_backward_keeps_little_more_than_one_step(
    least_saved: int | None, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight times the flow steps and blocks must not need eight times the memory.

    Kept of a step are its input, the scales and the first hidden maps, of a block its input; if
    they are so small that nobody misses the memory, or if that is asked for, more.
    """
    keeping = kept_from(least_saved, monkeypatch)

    def kept(nll: Callable[..., Tensor], steps: int, blocks: int) -> int:
        encoder = EncoderConfig(channels=16, growth=16, blocks=blocks, stacked_blocks=())
        model = small_model(levels=1, steps=steps, split_levels=(), encoder=encoder, hidden=16)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        stored: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                stored[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with keeping(), hooks:
            graph = nll(model, torch.rand(1, 3, 64, 64), ["clean"])
            assert graph.requires_grad  # and what it keeps is alive until here
        return sum(stored.values())

    growth, plain_growth = (
        kept(nll, steps=8, blocks=8) - kept(nll, steps=1, blocks=1)
        for nll in (DeFlow.nll, plain.nll)
    )
    # At 32 x 32 the input's 12 channels, those that the coupling changes, both scales and the first
    # hidden maps, or both of each network; at the size of h(x) the input's 16.
    maps = 2 if least_saved == 0 else 4
    step, block = 32**2 * (12 + 6 + 18 + maps * 16), (64 // small_model().config.scale) ** 2 * 16
    least = 7 * 4 * (step + block)
    assert least < 0.3 * plain_growth
    assert growth >= least
    if least_saved == 0:
        assert growth < 1.1 * least  # and matrices of the 1x1 convolutions


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_autocast_changes_the_conditioning_alone() -> None:
    model, x, _, noise = settled(torch.float32, levels=2)
    exact = model.nll(x, DOMAINS, noise=noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bits = model.nll(x, DOMAINS, noise=noise)
        bits.mean().backward()
        with torch.no_grad():
            prepared = model.features(x, noise)
            latents, logdet = model.encode(x, prepared)
            back = model.decode(latents, prepared)
    assert bits.dtype == logdet.dtype == latents[0].dtype == torch.float32
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    # The inverse does not suffer: both directions use the very same shifts and scales.
    assert_close(back, x, rtol=0, atol=1e-4)
    assert not torch.equal(bits, exact)  # so something did run in bfloat16
    assert_close(bits, exact, rtol=0.05, atol=0.05)
    with torch.no_grad():
        outside = model.encode(x, prepared)[0]
    assert_close(outside, latents, rtol=0, atol=0)


def test_without_conditioning_the_image_does_not_reach_the_features() -> None:
    model, x, _, noise = settled(torch.float32, conditioned=False)
    z, _ = model.encode(x, model.features(x, noise))
    again, _ = model.encode(x, model.features(x.flip(0), 3 * noise))
    assert_close(again, z, rtol=0, atol=0)
    conditioned, x, _, noise = settled(torch.float32)
    z, _ = conditioned.encode(x, conditioned.features(x, noise))
    other, _ = conditioned.encode(x, conditioned.features(x.flip(0), noise))
    assert not torch.allclose(other[0], z[0], atol=1e-3)
