"""What is folded of parameters is kept as long as these stay the same, and no longer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from small import small_model
from torch import Tensor, nn
from torch.testing import assert_close

from deflow_aug import rrdb
from deflow_aug.flow import convolution, features
from deflow_aug.flow.convolution import Kernels
from deflow_aug.flow.folding import Folding
from deflow_aug.flow.glow import FlowStep
from deflow_aug.model import DeFlow


class Doubled(Folding):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.times = 0

    def forward(self) -> Tensor:
        return self.folded_once("double", self._double)

    def _double(self) -> Tensor:
        self.times += 1
        return 2 * self.weight


def write(module: Doubled) -> None:
    with torch.no_grad():
        module.weight.fill_(3)


def load(module: Doubled) -> None:
    module.load_state_dict({"weight": torch.full((2,), 3.0)})


def assign(module: Doubled) -> None:
    module.load_state_dict({"weight": torch.full((2,), 3.0)}, assign=True)


def replace(module: Doubled) -> None:
    module.weight = nn.Parameter(torch.full((2,), 3.0))


def step(module: Doubled) -> None:
    module.weight.grad = torch.full((2,), -2.0)
    torch.optim.SGD(module.parameters(), lr=1.0).step()


@pytest.mark.parametrize("change", [write, load, assign, replace, step])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_folded_once_until_parameters_change(
    change: Callable[[Doubled], None], mode: Callable[[], torch.no_grad]
) -> None:
    module = Doubled().eval()
    with mode():
        assert_close(module(), torch.tensor([2.0, 2.0]))
        assert_close(module(), torch.tensor([2.0, 2.0]))
    assert module.times == 1
    change(module)
    with mode():
        assert_close(module(), torch.tensor([6.0, 6.0]))
    assert module.times == 2


def test_nothing_is_kept_in_training_or_for_gradients() -> None:
    module = Doubled().eval()
    with torch.no_grad():
        module()
    assert module().requires_grad
    with torch.no_grad():
        module.train()()
    assert module.times == 3
    with torch.inference_mode():  # parameters that do not count what is written to them
        other = Doubled().eval()
        other()
        other.weight.fill_(3)
        assert_close(other(), torch.tensor([6.0, 6.0]))


def test_copies_and_other_types_fold_anew() -> None:
    module = Doubled().eval()
    with torch.no_grad():
        module()
        assert list(module.state_dict()) == ["weight"]
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            other.weight.fill_(5)
            assert_close(other(), torch.tensor([10.0, 10.0]))
            assert other.times == 2
        assert module.double()().dtype == torch.float64
    assert module.times == 2


def sample(model: DeFlow, x: Tensor) -> Tensor:
    with torch.inference_mode():
        prepared = model.features(x)
        latents, _ = model.encode(x, prepared)
        return model.decode([z + 0.1 for z in latents], prepared)


@pytest.mark.parametrize("tiled", [True, False])
def test_a_model_follows_its_parameters(tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them: folded of the old ones, a result would differ."""
    if not tiled:  # all steps of a level at once
        for module in (convolution, features, rrdb):
            monkeypatch.setattr(module, "in_tiles", lambda x: False)
    folded = []
    kernel = FlowStep.kernels

    def noted(step: FlowStep) -> Kernels:
        folded.append(step)
        return kernel(step)

    monkeypatch.setattr(FlowStep, "kernels", noted)
    torch.manual_seed(0)
    model, x = small_model().eval(), torch.rand(1, 3, 16, 16)
    sample(model, x)
    steps = len(folded)
    assert steps == len(set(folded)) > 0
    sample(model, x)
    assert len(folded) == steps
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    assert_close(sample(model, x), sample(copy.deepcopy(model), x), rtol=0, atol=1e-6)


def test_what_was_folded_in_inference_mode_serves_gradients() -> None:
    torch.manual_seed(0)
    model, x = small_model().eval().requires_grad_(False), torch.rand(1, 3, 16, 16)
    sample(model, x)
    with torch.no_grad():
        prepared = model.features(x)
    x.requires_grad_()
    latents, logdet = model.encode(x, prepared)
    back = model.decode(latents, prepared)
    ones = torch.ones_like(x)
    (gradient,) = torch.autograd.grad(back.sum() + 0 * logdet.sum(), x, retain_graph=True)
    assert_close(gradient, ones, rtol=0, atol=1e-3)
    # Of one direction: as where all that is prepared was prepared for gradients.
    expected, _ = model.encode(x, model.features(x.detach()))
    gradients = [
        torch.autograd.grad([one.square().sum() for one in some], x)[0]
        for some in (latents, expected)
    ]
    assert_close(*gradients, rtol=1e-4, atol=1e-3)
