"""Many domains, one flow: names, draws and mixes of them; every kind of shift on disk."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import small_model
from test_degrader import CALM, FLAT, assert_moments, sampled_latents, tensor
from torch import Tensor
from torch.testing import assert_close

from deflow_aug import DeFlowDegrader
from deflow_aug.cli import main
from deflow_aug.cli.degrade import _domain
from deflow_aug.config import SHIFTS, ChannelStatistics

NAMES = ("night", "day")
MIX = {"night": 0.25, "day": 0.75}


def make(names: tuple[str, ...] = NAMES, **settings: Any) -> DeFlowDegrader:
    model = small_model(domains=names, **{**CALM, **settings})
    return DeFlowDegrader(model, device="cpu", conditioning_noise=False)


@pytest.fixture(scope="module")
def degrader() -> DeFlowDegrader:
    return make()


def moments_of(degrader: DeFlowDegrader, level: int, weights: dict[str, float]) -> list[Tensor]:
    shift, known = degrader.model.domain_shifts()[level], degrader.model.config.domains
    mean, covariance = torch.zeros(()).double(), torch.zeros(()).double()
    for name, weight in weights.items():
        factor = shift.factor[known.index(name)].double()
        mean = mean + weight * shift.mean[known.index(name)].double()
        covariance = covariance + weight * factor @ factor.mT
    return [mean, covariance]


# --- mixes


def test_a_mix_degrades_with_the_interpolated_moments(degrader: DeFlowDegrader) -> None:
    samples = degrader.degrade(FLAT, n_samples=60, seed=1, domain=MIX)
    for level, (z, zs) in enumerate(sampled_latents(degrader, FLAT, samples)):
        assert_moments(zs - z, *moments_of(degrader, level, MIX))


def test_a_mix_is_restored_with_the_posterior_of_its_moments(degrader: DeFlowDegrader) -> None:
    samples = degrader.restore(FLAT, n_samples=60, seed=1, domain=MIX)
    for level, (z, zs) in enumerate(sampled_latents(degrader, FLAT, samples)):
        mean, covariance = moments_of(degrader, level, MIX)
        precision = torch.linalg.inv(torch.eye(len(mean)) + covariance)
        centre = torch.einsum("ij,bjhw->bihw", precision, z - mean[:, None, None])
        assert_moments(zs - centre, torch.zeros(len(mean)), covariance @ precision)


def test_weights_are_relative_and_one_domain_is_no_mix(degrader: DeFlowDegrader) -> None:
    image = tensor(3, 8, 8)
    mixed = degrader.degrade(image, seed=1, domain=MIX)
    assert mixed.equal(degrader.degrade(image, seed=1, domain={"day": 3, "night": 1}))
    night = degrader.degrade(image, seed=1, domain="night")
    assert night.equal(degrader.degrade(image, seed=1, domain={"night": 7.0, "day": 0}))
    assert (mixed - night).abs().max() > 1e-3


def test_colours_of_a_mix_are_between_those_of_its_domains() -> None:
    clean, std = (0.5, 0.5, 0.4), (0.2, 0.3, 0.25)
    dark = ChannelStatistics(clean, std, (0.3, 0.35, 0.2), (0.1, 0.2, 0.15))
    warm = ChannelStatistics(clean, std, (0.6, 0.45, 0.3), (0.2, 0.25, 0.2))
    degrader = make(("dark", "warm", "plain"), statistics={"dark": dark, "warm": warm})
    image = tensor(3, 8, 8)

    def expected(mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
        rows = [torch.tensor(row)[:, None, None] for row in (clean, std, mean, deviation)]
        return (image - rows[0]) / rows[1] * rows[3] + rows[2]

    between = degrader.degrade(image, 0, domain={"dark": 0.5, "warm": 0.5})
    target = expected((0.45, 0.4, 0.25), (0.15, 0.225, 0.175))
    assert_close(between, target, rtol=0, atol=1e-5)
    # A domain without statistics has the colours of the clean one.
    between = degrader.degrade(image, 0, domain={"dark": 0.5, "plain": 0.5})
    target = expected((0.4, 0.425, 0.3), (0.15, 0.25, 0.2))
    assert_close(between, target, rtol=0, atol=1e-5)
    assert_close(degrader.degrade(image, 0, domain={"plain": 1}), image, rtol=0, atol=1e-5)
    # To restore, the colours go the other way.
    matched = degrader.model.match_colours(FLAT, [{"dark": 1, "warm": 1}])
    assert (matched - FLAT).abs().max() > 0.1
    back = degrader.model.unmatch_colours(matched, [{"dark": 1, "warm": 1}])
    assert_close(back, FLAT, rtol=0, atol=1e-5)


# --- "random"


def test_a_random_domain_is_one_of_them_for_each_sample(degrader: DeFlowDegrader) -> None:
    image = tensor(3, 8, 8)
    drawn = degrader.degrade(image, n_samples=24, seed=5, domain="random")
    named = [degrader.degrade(image, n_samples=24, seed=5, domain=name) for name in NAMES]
    chosen = []
    for number in range(24):
        same = [drawn[number].equal(samples[number]) for samples in named]
        assert sum(same) == 1
        chosen.append(same.index(True))
    assert 5 < sum(chosen) < 19  # three standard deviations around a half
    assert len(set(pairwise(chosen))) == 4  # every sequence of two


def test_a_random_domain_depends_on_the_seed_of_the_image_alone(degrader: DeFlowDegrader) -> None:
    batch, seeds = tensor(6, 3, 8, 8), [4, 8, 15, 16, 23, 42]
    together = degrader.degrade(batch, seed=seeds, domain="random")
    differs = 0
    for i, seed in enumerate(seeds):
        alone = degrader.degrade(batch[i], seed=seed, domain="random")
        assert_close(together[i], alone, rtol=0, atol=1e-5)
        night = degrader.degrade(batch[i], seed=seed, domain="night")
        differs += not torch.allclose(alone, night, atol=1e-4)
    assert 0 < differs < len(seeds)


def test_a_domain_may_be_called_random() -> None:
    degrader = make(("random", "day"))
    image = tensor(3, 8, 8)
    samples = degrader.degrade(image, n_samples=8, seed=1, domain="random")
    mix = degrader.degrade(image, n_samples=8, seed=1, domain={"random": 1})
    assert samples.equal(mix)


# --- one for each image


def test_each_image_may_have_its_own_domain(degrader: DeFlowDegrader) -> None:
    domains: list[Any] = ["day", MIX, "random", "night"]
    batch, seeds = tensor(4, 3, 8, 8), [1, 2, 3, 4]
    together = degrader.degrade(batch, seed=seeds, domain=domains)
    for i, domain in enumerate(domains):
        alone = degrader.degrade(batch[i], seed=seeds[i], domain=domain)
        assert_close(together[i], alone, rtol=0, atol=1e-5)
    restored = degrader.restore(batch, seed=seeds, domain=["day", MIX, "day", "night"])
    for i, domain in ((0, "day"), (1, MIX), (3, "night")):
        alone = degrader.restore(batch[i], seed=seeds[i], domain=domain)
        assert_close(restored[i], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("domain", "error", "message"),
    [
        ("dawn", ValueError, r"domains \(night, day\), got 'dawn'"),
        ("clean", ValueError, "got 'clean'"),
        (None, ValueError, "got None"),
        ({"dawn": 1}, ValueError, r"degraded ones \(night, day\), got 'dawn'"),
        ({"night": 0}, ValueError, "a weight above 0"),
        ({"night": "1"}, TypeError, "is a number"),
        (["night"], ValueError, r"or 2 \(one an image\), got 1"),
        (["night", "dawn"], ValueError, "got 'dawn'"),
        (7, TypeError, "domain must be a name"),
    ],
)
@pytest.mark.parametrize("method", ["degrade", "restore"])
def test_domains_that_are_none(
    degrader: DeFlowDegrader, method: str, domain: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(degrader, method)(tensor(2, 3, 8, 8), domain=domain)


@pytest.mark.parametrize("domain", ["random", ["day", "random"]])
def test_what_is_restored_has_a_domain(degrader: DeFlowDegrader, domain: Any) -> None:
    with pytest.raises(ValueError, match='"random" is for degrade: name the domain'):
        degrader.restore(tensor(2, 3, 8, 8), domain=domain)


# --- on disk and on the command line


@pytest.mark.parametrize("kind", SHIFTS)
def test_every_kind_of_shift_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    degrader = make(shift=kind)
    for number, shift in enumerate(degrader.model.domain_shifts()):
        channels = shift.mean.shape[1]
        for domain in (1, 2):
            shift.assign(
                domain,
                torch.full((channels,), 0.01 * domain),
                torch.eye(channels) * 0.02 * (1 + number),
            )
    degrader.save_pretrained(tmp_path)
    loaded = DeFlowDegrader.from_pretrained(tmp_path, device="cpu", conditioning_noise=False)
    assert loaded.model.config.shift == kind
    image = tensor(3, 8, 8)
    one, other = (d.degrade(image, seed=1, domain="day") for d in (degrader, loaded))
    assert one.equal(other)
    assert (one - image).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("text", "domain"),
    [
        (None, None),
        ("night", "night"),
        ("random", "random"),
        ("night=0.5,day=2", {"night": 0.5, "day": 2.0}),
        ("night=1, day=3", {"night": 1.0, "day": 3.0}),
    ],
)
def test_domains_on_the_command_line(text: str | None, domain: Any) -> None:
    assert _domain(text) == domain


@pytest.mark.parametrize("text", ["night=a", "night=0.5,day", "night=1,night=2", "=1,"])
def test_domains_on_the_command_line_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="--domain"):
        _domain(text)


def test_photographs_are_degraded_into_the_domain_asked_for(
    degrader: DeFlowDegrader, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, photo = tmp_path / "w", tmp_path / "photo.png"
    degrader.save_pretrained(weights)
    pixels = np.random.default_rng(0).integers(80, 170, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(photo)
    results = {}
    for domain in ("night", "day", "random", "night=0.5,day=0.5"):
        out = tmp_path / domain
        command = ["degrade", str(photo), f"--output={out}", f"--weights={weights}"]
        assert main([*command, f"--domain={domain}", "--device=cpu"]) == 0
        with Image.open(out / "photo.png") as image:
            results[domain] = np.asarray(image).copy()
    assert not np.array_equal(results["night"], results["day"])
    assert any(np.array_equal(results["random"], results[name]) for name in NAMES)
    assert not any(np.array_equal(results["night=0.5,day=0.5"], results[name]) for name in NAMES)
    for domain, message in (("dawn", "got 'dawn'"), ("dawn=1", "got 'dawn'"), ("day=x", "'day=x'")):
        command = ["degrade", str(photo), f"--output={tmp_path / 'no'}", f"--weights={weights}"]
        assert main([*command, f"--domain={domain}", "--device=cpu"]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
