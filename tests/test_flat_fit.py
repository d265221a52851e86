"""M fitted in flat areas: noise of known correlation, in pictures of other content, is found."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small import SMALL, small_model
from torch import Tensor

from deflow_aug.adaptation import fit_in_flat_areas
from deflow_aug.flat import SIDE, NoFlatAreasError, flat_areas, flat_windows
from deflow_aug.model import DeFlow
from deflow_aug.noise_curve import KNOTS, noise_curve, variance_at

Image8 = NDArray[np.uint8]


def content(rng: np.random.Generator, side: int = 192) -> NDArray[np.float64]:
    """One colour, of which squares differ by little; a third of the picture has texture."""
    squares = rng.uniform(80, 180, 3) + rng.uniform(-3, 3, (side // 32, side // 32, 3))
    picture = squares.repeat(32, 0).repeat(32, 1)
    picture[:, : side // 3] += rng.normal(0, 25, (side, side // 3, 3))
    return picture


def noise(
    rng: np.random.Generator, shape: tuple[int, ...], axis: int, level: float
) -> NDArray[np.float64]:
    """White noise, averaged over two pixels of this axis: their correlation is 1/2."""
    white = rng.standard_normal(shape)
    return level / np.sqrt(2) * (white + np.roll(white, 1, axis))


def pictures(seed: int, level: float, axis: int = 1, count: int = 4) -> list[Image8]:
    rng = np.random.default_rng(seed)
    whole = [content(rng) for _ in range(count)]
    noisy = [one + noise(rng, one.shape, axis, level) for one in whole]
    return [np.clip(np.rint(one), 0, 255).astype(np.uint8) for one in noisy]


def started(level: float = 40.0, **changes: object) -> DeFlow:
    """A flow at its start, which turns pixels into latents by an orthogonal matrix, and an M that
    adds white noise of this level.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DeFlow(dataclasses.replace(SMALL, shift_init=level / 255, **changes))


def crops(seed: int = 9) -> Tensor:
    """Flat ones, [12, 3, 32, 32]."""
    colours = np.random.default_rng(seed).uniform(0.3, 0.7, (12, 3, 1, 1)).astype(np.float32)
    return torch.from_numpy(colours).repeat(1, 1, 32, 32)


def added(model: DeFlow, domain: str = "degraded") -> Tensor:
    """Noise in levels, [12, 3, 32, 32]."""
    x = crops(3)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        features = model.features(x)
        z, _ = model.encode(x, features)
        draws = [torch.randn_like(one) for one in z]
        y = model.decode(model.degrade(z, draws, [domain] * len(x), torch.ones(len(x))), features)
    return 255 * (y - x)


def correlation(n: Tensor, axis: int) -> float:
    n = n - n.mean((2, 3), keepdim=True)
    return float((n * n.roll(1, axis)).mean() / n.square().mean())


def deviation(n: Tensor) -> float:
    return float(n.var((2, 3), correction=0).mean().sqrt())


@pytest.mark.parametrize("split", [(), (1,)])
@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_correlation_is_found_and_the_level_kept(kind: str, split: tuple[int, ...]) -> None:
    model = started(shift=kind, split_levels=split)
    white, mean = added(model), [s.means().clone() for s in model.domain_shifts()]
    assert abs(correlation(white, 3)) < 0.1
    scales = fit_in_flat_areas(model, {"degraded": pictures(0, 5.0)}, pictures(1, 0.3), [crops()])
    found = added(model)
    assert deviation(found) == pytest.approx(deviation(white), rel=0.05)
    assert scales["degraded"] != 1
    assert all(torch.equal(s.means(), m) for s, m in zip(model.domain_shifts(), mean, strict=True))
    if kind == "full":
        # 3/8, of blocks of 4 that are drawn independently, half of it of channels apart in a split.
        assert correlation(found, 3) > (0.15 if split else 0.3)
        assert abs(correlation(found, 2)) < 0.1


def test_a_collapsed_shift_gets_the_level_of_the_photographs() -> None:
    model = started(0.0, split_levels=())
    given = {"degraded": pictures(0, 5.0)}
    assert fit_in_flat_areas(model, given, pictures(1, 0.3), [crops()]) == {"degraded": 1.0}
    # Windows of up to twice the typical variance pass, with a little texture or none.
    assert 4.0 < deviation(added(model)) < 6.5


def test_domains_have_noise_of_their_own() -> None:
    model = started(domains=("rows", "columns"), split_levels=())
    given = {"rows": pictures(0, 5.0, axis=1), "columns": pictures(2, 3.0, axis=0)}
    fit_in_flat_areas(model, given, pictures(1, 0.3), [crops()])
    for name, along, across in (("rows", 3, 2), ("columns", 2, 3)):
        n = added(model, name)
        assert correlation(n, along) > 0.2
        assert abs(correlation(n, across)) < 0.1


def test_it_depends_on_the_seed_alone() -> None:
    roots = []
    for seed in (0, 0, 1):
        model = started()
        torch.manual_seed(seed + 3)
        given = {"degraded": pictures(0, 5.0)}
        fit_in_flat_areas(model, given, pictures(1, 0.3), [crops()], seed=seed)
        roots.append(model.domain_shifts()[0].factors().clone())
    assert torch.equal(roots[0], roots[1])
    assert not torch.equal(roots[0], roots[2])


@pytest.mark.parametrize("side", ["degraded", "clean"])
def test_without_flat_areas_nothing_changes(side: str) -> None:
    model = small_model()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    texture = [
        np.random.default_rng(i).integers(0, 256, (64, 64, 3)).astype(np.uint8) for i in range(2)
    ]
    tiny = [one[:16, :16] for one in pictures(0, 5.0)]
    degraded = tiny if side == "degraded" else pictures(0, 5.0)
    clean = texture if side == "clean" else pictures(1, 0.3)
    with pytest.raises(NoFlatAreasError, match=r"windows|flat positions"):
        fit_in_flat_areas(model, {"degraded": degraded}, clean, [crops()])
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_photographs_that_vary_less_than_clean_ones_are_refused() -> None:
    rng = np.random.default_rng(0)
    white = rng.standard_normal((192, 192, 3))
    # Dark ones with little noise, and a bright one with more, which the clean one has less of.
    dark, bright, clean = (
        np.rint(one).astype(np.uint8) for one in (60 + white, 200 + 1.9 * white, 200 + 1.5 * white)
    )
    given = {"degraded": [dark, dark, dark, bright]}
    with pytest.raises(NoFlatAreasError, match="vary no more"):
        fit_in_flat_areas(started(), given, [clean], [crops()])


def test_a_model_without_m_stays_so() -> None:
    model = small_model(shift="zero")
    assert fit_in_flat_areas(model, {"degraded": []}, [], [crops()]) == {}


def test_the_mask_shows_where_the_flat_windows_are() -> None:
    (picture,) = pictures(0, 4.0, count=1)
    found, mask = flat_areas(picture)
    assert mask.shape == (192 // SIDE, 192 // SIDE)
    assert mask.sum() == len(found.mean)
    (same,) = flat_windows([picture], 0)
    np.testing.assert_array_equal(found.variance, same.variance)
    assert not mask[:, :4].any()  # texture
    assert mask[:, 4:].mean() > 0.8


def test_the_variance_of_a_curve_is_linear_between_knots() -> None:
    curve = np.tile(np.arange(1.0, KNOTS + 1), (3, 1)) * [[1], [2], [3]]
    mean = np.array([[0.0, 255.0, 255 / 16]])
    np.testing.assert_allclose(variance_at(curve, mean), [[1, 4 * 81, 9 * (1 + 4) / 2]])
    noisy = flat_windows(pictures(0, 5.0), 0)
    middle = np.full((1, 3), 128.0)
    np.testing.assert_allclose(variance_at(noise_curve(noisy), middle), 25, rtol=0.25)
