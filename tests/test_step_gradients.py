"""A step's gradients by hand, against autograd's of the layers one after the other."""

from __future__ import annotations

import pytest
import torch
from small import small_model
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from deflow_aug.flow.glow import FlowStep
from deflow_aug.flow.step_gradients import encode_with_gradients

pytestmark = pytest.mark.usefixtures("products")

HIDDEN = 5


def a_step(channels: int) -> tuple[FlowStep, list[Tensor]]:
    """In float64, with nothing at zero; an image and the two responses, which need gradients."""
    torch.manual_seed(0)
    step = FlowStep(channels, 3, HIDDEN).double()
    with torch.no_grad():
        for parameter in step.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    shapes = (2, channels, 5, 6), (2, HIDDEN, 5, 6), (2, HIDDEN, 5, 6)
    return step, [torch.randn(shape).double().requires_grad_() for shape in shapes]


def encoded(step: FlowStep, inputs: list[Tensor], keep: bool) -> tuple[Tensor, Tensor]:
    x, *responses = inputs
    return encode_with_gradients(step.scaled(), x, responses, keep)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("channels", [4, 5])
def test_results_and_gradients_are_those_of_the_layers(channels: int, keep: bool) -> None:
    step, inputs = a_step(channels)
    x, *responses = inputs
    parameters = dict(step.named_parameters())
    wanted = [*inputs, *parameters.values()]
    weight = torch.randn_like(x)
    found = []
    layers = step.encode(x, step.prepare_responses(step.fold(), responses))
    for z, logdet in (layers, encoded(step, inputs, keep)):
        loss = (z * weight).sum() + (logdet * torch.tensor([2.0, -3.0])).sum()
        found.append((z, logdet, torch.autograd.grad(loss, wanted, allow_unused=True)))
    (z, logdet, expected), (own_z, own_logdet, gradients) = found
    assert_close(own_z, z, rtol=1e-12, atol=1e-12)
    assert_close(own_logdet, logdet, rtol=1e-12, atol=1e-12)
    names = ["x", "coupling's response", "injector's response", *parameters]
    for name, gradient, one in zip(names, gradients, expected, strict=True):
        assert (gradient is None) == (one is None), name
        if one is not None:
            assert_close(gradient, one, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    without = [name for name, one in zip(names, gradients, strict=True) if one is None]
    # Those of the features' convolution.
    assert without == [
        "layers.2.net.first.norm.bias",
        "layers.3.net.first.conv.weight",
        "layers.3.net.first.norm.bias",
        "layers.3.net.first.norm.logs",
    ]


def test_gradients_of_some_alone() -> None:
    step, inputs = a_step(4)
    inputs = [one.detach() for one in inputs]
    for name, parameter in step.named_parameters():
        parameter.requires_grad_("last" in name)
    z, logdet = encoded(step, inputs, False)
    wanted = [parameter for parameter in step.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(z.sum() + logdet.sum(), wanted)
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients)
    step.requires_grad_(False)
    assert not encoded(step, inputs, False)[0].requires_grad


def test_gradients_of_gradients_are_refused() -> None:
    step, inputs = a_step(4)
    z, _ = encoded(step, inputs, False)
    (gradient,) = torch.autograd.grad(z.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


def test_autocast_around_the_backward_pass_changes_nothing() -> None:
    step, inputs = a_step(4)
    step.float()
    inputs = [one.detach().float().requires_grad_() for one in inputs]
    z, logdet = encoded(step, inputs, False)
    loss = z.square().sum() + logdet.sum()
    expected = torch.autograd.grad(loss, inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(torch.autograd.grad(loss, inputs), expected, rtol=0, atol=0)


def test_parameters_that_stand_in_for_the_modules_own() -> None:
    """And a hook of a parameter's gradient is called once."""
    model = small_model(levels=1, split_levels=())
    x = torch.rand(2, 3, 32, 32)
    noise = torch.randn(2, 3, 32 // model.config.scale, 32 // model.config.scale)
    given = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    calls: list[Tensor] = []
    given["flow.levels.0.layers.1.layers.0.affine.bias"].register_hook(calls.append)

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return self.model.nll(x, ["clean", "degraded"], noise=noise).mean()

    named = {f"model.{name}": value for name, value in given.items()}
    loss = torch.func.functional_call(Loss(), named, ())
    own = model.nll(x, ["clean", "degraded"], noise=noise).mean()
    expected = torch.autograd.grad(own, list(model.parameters()), allow_unused=True)
    assert_close(torch.autograd.grad(loss, list(given.values()), allow_unused=True), expected)
    assert len(calls) == 1


def test_checkpointed_from_outside() -> None:
    step, inputs = a_step(4)
    plain = torch.autograd.grad(encoded(step, inputs, False)[0].square().sum(), inputs)
    z, _ = checkpoint(encoded, step, inputs, False, use_reentrant=False)
    assert_close(torch.autograd.grad(z.square().sum(), inputs), plain)
