"""A cast of the shift is taken off, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from small import small_model
from torch import Tensor

from deflow_aug.adaptation import remove_cast
from deflow_aug.model import DeFlow


def pictures(seed: int) -> Tensor:
    """Smooth ones, [24, 3, 16, 16] in [0, 1]."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randint(60, 200, (24, 3, 4, 4), generator=rng)
    return coarse.repeat_interleave(4, 2).repeat_interleave(4, 3) / 255


def cast(model: DeFlow, domain: str) -> Tensor:
    """Of other pictures with other noise, in levels [3]."""
    torch.manual_seed(0)
    x = pictures(1)
    with torch.no_grad():
        features = model.features(x)
        z, _ = model.encode(x, features)
        noise = [torch.randn_like(one) for one in z]
        shifted = model.degrade(z, noise, [domain] * len(x), torch.ones(len(x)))
        return 255 * (model.decode(shifted, features) - x).mean((0, 2, 3))


def test_what_is_left_of_a_cast_is_small() -> None:
    model = small_model(domains=("day", "night"), shift_init=0.1, split_levels=())
    with torch.no_grad():
        for number, level in ((0, 0.05), (1, -0.08)):
            model.domain_shifts()[0].mean[number] += level
    before = [cast(model, name) for name in ("day", "night")]
    roots = [shift.factors().clone() for shift in model.domain_shifts()]
    state = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("mean")}
    found = remove_cast(model, [pictures(0)])
    for name, was in zip(("day", "night"), before, strict=True):
        assert float(was.abs().max()) > 1
        assert torch.tensor(found[name]).sub(was).abs().max() < 0.1 * was.abs().max()
        assert cast(model, name).abs().max() < 0.15 * was.abs().max()
    for shift, root in zip(model.domain_shifts(), roots, strict=True):
        assert torch.equal(shift.factors(), root)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_it_depends_on_the_seed_alone() -> None:
    means = []
    for seed in (0, 0, 1):
        model = small_model()
        torch.manual_seed(7 + seed)
        torch.rand(3)
        remove_cast(model, [pictures(0)], seed=seed)
        means.append(model.domain_shifts()[0].mean.clone())
    assert torch.equal(means[0], means[1])
    assert not torch.equal(means[0], means[2])


def test_images_of_several_sizes_and_one_domain() -> None:
    model = small_model(domains=("day", "night"), split_levels=())
    other = model.domain_shifts()[0].mean[0].clone()
    found = remove_cast(model, [pictures(0)[:, :, :8], pictures(1)], ["night"])
    assert list(found) == ["night"]
    assert torch.equal(model.domain_shifts()[0].mean[0], other)


def test_numbers_that_are_not_finite_change_nothing() -> None:
    model = small_model()
    with torch.no_grad():
        model.domain_shifts()[0].factor.fill_(float("nan"))
    mean = model.domain_shifts()[0].mean.clone()
    with pytest.raises(ValueError, match="not finite"):
        remove_cast(model, [pictures(0)])
    assert torch.equal(model.domain_shifts()[0].mean, mean)
