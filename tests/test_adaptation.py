"""Shifts fitted to latents: the closed form where the truth is known, and new domains from files.

Where latents must be known, the flow is one that is given no h(x), so that images decoded from
latents have just these latents, and dequantisation noise is far below them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import SMALL, small_model
from torch import Tensor
from torch.testing import assert_close

from deflow_aug import DeFlowDegrader
from deflow_aug.adaptation import AdaptationError, adapt, fit_shifts, photographs
from deflow_aug.adaptation.closed_form import Moments, ascend, closed_form, latent_moments
from deflow_aug.adaptation.new_domain import enlarged
from deflow_aug.adaptation.photographs import TILE, TILES
from deflow_aug.cli import main
from deflow_aug.config import SHIFTS, ChannelStatistics, ConfigError
from deflow_aug.model import DeFlow

PLAIN: dict[str, Any] = {"conditioned": False, "dequantization_steps": 10**6}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def picture(noise: float, side: int = 64, seed: int = 0) -> np.ndarray:
    """A grey with white noise of this standard deviation in levels."""
    rng = np.random.default_rng(seed)
    pixels = 125 + noise * rng.standard_normal((side, side, 3))
    return pixels.round().clip(0, 255).astype(np.uint8)


def white(**changes: Any) -> DeFlow:
    """A flow to which pictures with noise of 5 levels are about N(0, I), and that is stable."""
    config = dataclasses.replace(SMALL, **changes)
    clean = np.stack([picture(5, seed=100 + i) for i in range(4)])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = DeFlow(config)
        model.initialize(torch.from_numpy(clean).permute(0, 3, 1, 2) / 255)
        for name, parameter in model.named_parameters():
            if not name.startswith("shifts."):
                parameter += 0.01 * torch.randn_like(parameter)
    return model


def sigma_of(model: DeFlow, level: int, domain: int = -1) -> Tensor:
    factor = model.domain_shifts()[level].factors()[domain].double()
    return factor @ factor.mT


# --- the closed form


def test_moments_of_parts_are_those_of_the_whole() -> None:
    z = draw(5, 3, 4, 6) * 2 + 1
    rows = z.movedim(1, 0).flatten(1).numpy()
    whole = Moments.of(z[:1]) + Moments.of(z[1:3]) + Moments.of(z[3:])
    assert whole.count == 5 * 24
    assert_close(whole.mean, torch.from_numpy(rows.mean(1)))
    assert_close(whole.covariance, torch.from_numpy(np.cov(rows, bias=True)))


def test_moments_do_not_cancel_far_from_zero() -> None:
    z = draw(2, 3, 50, 50)
    far = Moments.of(z[:1] + 1e6) + Moments.of(z[1:] + 1e6)
    assert_close(far.covariance, Moments.of(z).covariance, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spread", [3.0, 0.4], ids=["degraded wider", "degraded narrower"])
def test_one_dimension(spread: float) -> None:
    x, y = 2 + 1.5 * draw(1, 1, 1, 400), -1 + 1.5 * spread * draw(1, 1, 1, 700, seed=1)
    m_x, m_y = Moments.of(x), Moments.of(y)
    mean, factor = closed_form(m_y.mean - m_x.mean, m_y.covariance - m_x.covariance, False)
    assert mean.item() == pytest.approx(float(y.mean() - x.mean()))
    expected = max(0.0, float(y.var(correction=0) - x.var(correction=0)))
    assert factor.item() ** 2 == pytest.approx(expected)


def test_directions_in_which_latents_get_narrower_are_clipped() -> None:
    vectors = torch.linalg.qr(draw(3, 3)).Q
    excess = vectors * torch.tensor([2.0, 0.5, -0.3]).double() @ vectors.mT
    _, factor = closed_form(draw(3), excess, diagonal=False)
    expected = vectors * torch.tensor([2.0, 0.5, 0.0]).double() @ vectors.mT
    assert_close(factor @ factor.mT, expected, rtol=1e-10, atol=1e-10)
    _, factor = closed_form(draw(3), excess, diagonal=True)
    assert_close(factor @ factor, excess.diagonal().clamp(min=0).diag())


@pytest.mark.parametrize("diagonal", [False, True])
def test_without_clean_images_the_closed_form_is_the_maximum(diagonal: bool) -> None:
    root = draw(4, 4)
    excess = root @ root.mT - 1.5 * torch.eye(4).double()
    assert torch.linalg.eigvalsh(excess)[0] < 0 < excess.diagonal().max()
    _, factor = closed_form(draw(4), excess, diagonal)
    better = ascend(factor, torch.eye(4).double(), excess, 300, diagonal)
    assert_close(better @ better.mT, factor @ factor.mT, rtol=0, atol=2e-4)


def test_with_clean_images_gradient_steps_reach_the_maximum() -> None:
    root = draw(4, 4, seed=3)
    reference = root @ root.mT / 4 + torch.eye(4).double()
    excess = draw(4, 4, seed=4)
    excess = (excess + excess.mT) / 6
    target = reference + excess
    assert torch.linalg.eigvalsh(excess)[0] < 0 < torch.linalg.eigvalsh(target)[0]
    # Where clean latents are white, eigenvalues are clipped: the exact maximum.
    lower = torch.linalg.cholesky(reference)
    white = torch.linalg.solve(lower, torch.linalg.solve(lower, target).mT)
    values, vectors = torch.linalg.eigh(white)
    added = vectors * (values - 1).clamp(min=0) @ vectors.mT
    expected = lower @ added @ lower.mT
    _, start = closed_form(draw(4), excess, diagonal=False)
    assert (start @ start.mT - expected).abs().max() > 0.01
    better = ascend(start, reference, excess, 500, diagonal=False)
    assert_close(better @ better.mT, expected, rtol=0, atol=2e-3)


# --- whole domains


def known_images(model: DeFlow, seed: int, shifted: bool) -> tuple[list[Tensor], list[Any]]:
    """Images decoded from latents N(0, I), plus known shifts if asked; and these shifts."""
    shapes = model.latent_shapes(64, 64)
    z = [draw(6, *shape, seed=seed + i).float() for i, shape in enumerate(shapes)]
    truth = []
    for i, (channels, *_) in enumerate(shapes):
        mean, factor = draw(channels, seed=90 + i) / 2, draw(channels, channels, seed=95 + i) / 3
        truth.append((mean, factor @ factor.mT))
        if shifted:
            noise = draw(6, *shapes[i], seed=seed + 40 + i)
            u = mean[:, None, None] + torch.einsum("ij,bjhw->bihw", factor, noise)
            z[i] = z[i] + u.float()
    features = model.features(torch.zeros(6, 3, 64, 64))
    return list(model.decode(z, features).detach().split(4)), truth


@pytest.mark.parametrize("kind", ["full", "diagonal", "fitted", "zero"])
@pytest.mark.parametrize("with_clean", [True, False])
def test_known_shifts_are_found(kind: str, with_clean: bool) -> None:
    model = white(shift=kind, **PLAIN)
    y, truth = known_images(model, 1, shifted=True)
    images = {"degraded": y}
    if with_clean:
        images["clean"] = known_images(model, 2, shifted=False)[0]
    assert fit_shifts(model, images) == dict.fromkeys(images, 6)
    for level, (mean, sigma) in enumerate(truth):
        shift = model.domain_shifts()[level]
        expected = {"zero": torch.zeros_like(sigma), "diagonal": sigma.diagonal().diag()}
        allowed = 8 * float(1 + sigma.diagonal().max()) * math.sqrt(2 / (6 * 16 * 16))
        assert_close(shift.mean[0].double(), mean, rtol=0, atol=allowed)
        found = sigma_of(model, level)
        assert_close(found, expected.get(kind, sigma), rtol=0, atol=allowed)


def test_measured_clean_latents_take_the_place_of_the_identity() -> None:
    """Images of both domains of latents that are far from N(0, I): the same, so there is no u."""
    model = white(**PLAIN)
    x, _ = known_images(model, 1, shifted=True)
    fit_shifts(model, {"degraded": x, "clean": x})
    for level, shift in enumerate(model.domain_shifts()):
        assert shift.mean.abs().max() < 1e-3
        assert sigma_of(model, level).abs().max() < 1e-3
    fit_shifts(model, {"degraded": x})
    assert all(shift.mean.abs().max() > 0.3 for shift in model.domain_shifts())


def test_a_fit_makes_a_domain_more_likely_and_says_whom_it_fits() -> None:
    model = white(shift="fitted", domains=("night", "day"))
    y = torch.from_numpy(np.stack([picture(12, seed=s) for s in range(3)])).permute(0, 3, 1, 2)
    before = model.nll(y / 255, ["day"] * 3).mean()
    assert fit_shifts(model, {"day": [y[:2], y[2]]}) == {"day": 3}
    assert model.nll(y / 255, ["day"] * 3).mean() < before - 0.01
    for shift in model.domain_shifts():
        assert not shift.mean[0].any()
        assert shift.mean[1].any()


def test_colours_are_matched_before_the_fit() -> None:
    statistics = ChannelStatistics((0.5,) * 3, (0.2,) * 3, (0.3,) * 3, (0.1,) * 3)
    coloured = small_model(statistics={"degraded": statistics})
    plain = small_model()
    y = torch.from_numpy(picture(8)).permute(2, 0, 1)[None] / 255 * 0.4 + 0.1
    matched = coloured.match_colours(y, ["degraded"])
    one = latent_moments(coloured, y, "degraded", 1)
    other = latent_moments(plain, matched, "degraded", 1)
    for a, b in zip(one, other, strict=True):
        assert_close(a.mean, b.mean)


@pytest.mark.parametrize(
    ("images", "message"),
    [({"dawn": []}, "unknown domain dawn"), ({"degraded": []}, "no images of the domain")],
)
def test_domains_that_cannot_be_fitted(images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_shifts(small_model(), images)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2, 3, 3, 64), r"at least 4, got \[2, 3, 3, 64\]"),
        (torch.zeros(64, 64), r"expected images of shape .* got \[64, 64\]"),
        (torch.zeros(1, 1, 64, 64), r"got \[1, 1, 64, 64\]"),
        (torch.zeros(0, 3, 64, 64), r"got \[0, 3, 64, 64\]"),
        (torch.zeros(3, 64, 64, dtype=torch.int32), "uint8, or floats .* got torch.int32"),
        (torch.full((3, 64, 64), math.nan), "NaN or infinite"),
    ],
)
def test_images_that_cannot_be_fitted_to_are_named(batch: Tensor, message: str) -> None:
    model = small_model()
    assert model.config.size_multiple == 4
    images = {"degraded": [torch.rand(3, 64, 64), batch]}
    with pytest.raises(ValueError, match=f"^batch 1 of the domain degraded: .*{message}"):
        fit_shifts(model, images)


# --- a new domain


@pytest.fixture(scope="module")
def degrader() -> DeFlowDegrader:
    return DeFlowDegrader(white(domains=("night", "day")), device="cpu")


PHOTOS = [picture(12, seed=seed) for seed in range(3)]


def test_a_new_domain_joins_the_others(degrader: DeFlowDegrader, tmp_path: Path) -> None:
    photo = picture(0)
    before = degrader.degrade(photo, seed=1, domain="day")
    tensors = {name: tensor.clone() for name, tensor in degrader.model.state_dict().items()}
    adapted = adapt(degrader, PHOTOS, name="mine")
    assert degrader.model.config.domains == ("night", "day")
    assert all(tensor.equal(tensors[n]) for n, tensor in degrader.model.state_dict().items())
    adapted.save_pretrained(tmp_path)
    loaded = DeFlowDegrader.from_pretrained(tmp_path, device="cpu")
    assert loaded.model.config.domains == ("night", "day", "mine")
    assert np.array_equal(loaded.degrade(photo, seed=1, domain="day"), before)
    mine = loaded.degrade(photo, seed=1, domain="mine")
    assert np.array_equal(mine, adapted.degrade(photo, seed=1, domain="mine"))
    assert not np.array_equal(mine, before)
    facts = json.loads((tmp_path / "config.json").read_text())["training"]["adapted"]["mine"]
    assert facts["degraded"] == {"images": 3, "left_out": 0, "pixels": 3 * 64 * 64}
    card = (tmp_path / "README.md").read_text()
    assert "- adapted:\n  - mine:" in card
    assert "none: the clean latents count as N(0, I)" in card
    again = adapt(loaded, PHOTOS[:1], name="other")
    assert again.model.config.domains == ("night", "day", "mine", "other")
    assert set(again.training_info["adapted"]) == {"mine", "other"}


def test_photographs_are_taken_about_their_means_less_their_content(
    degrader: DeFlowDegrader,
) -> None:
    """The formulas of adapt, from moments of whole photographs."""
    adapted = adapt(degrader, PHOTOS, name="mine", limit=None)
    model = degrader.model
    for level, shift in enumerate(adapted.model.domain_shifts()):
        means, covariances = [], []
        for number, photo in enumerate(PHOTOS):
            x = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
            moments = latent_moments(model, x, "clean", 0, 10, 0, number, 0)[level]
            small = torch.nn.functional.avg_pool2d(x, 4)  # roughly; the noise is not the same
            content = latent_moments(model, small, "clean", 7)[level]
            means.append(moments.mean - content.mean)
            covariances.append(moments.covariance)
        excess = torch.stack(covariances).mean(0) - torch.eye(len(means[0])).double()
        _, factor = closed_form(means[0], excess, diagonal=False)
        assert_close(sigma_of(adapted.model, level), factor @ factor.mT, rtol=1e-4, atol=1e-4)
        away = (shift.mean[2].double() - torch.stack(means).mean(0)).norm()
        assert away < 0.5 * shift.mean[2].norm()


def test_more_noise_gives_a_larger_sigma(degrader: DeFlowDegrader) -> None:
    sizes = []
    for noise in (8, 16, 32):
        adapted = adapt(degrader, [picture(noise, seed=s) for s in range(2)], name="mine")
        sizes.append(sum(float(sigma_of(adapted.model, level).trace()) for level in (0, 1)))
    assert sizes[0] < sizes[1] < sizes[2]


def test_one_noisy_photograph_does_not_decide_alone(degrader: DeFlowDegrader) -> None:
    def size(photos: list[np.ndarray], **settings: Any) -> tuple[float, Any]:
        adapted = adapt(degrader, photos, name="mine", **settings)
        trace = sum(float(sigma_of(adapted.model, level).trace()) for level in (0, 1))
        return trace, adapted.training_info["adapted"]["mine"]["noise_levels"]["scaled_down"]

    outlier = [*PHOTOS, picture(50, seed=9)]
    usual, scaled = size(PHOTOS)
    assert scaled == 0
    limited, scaled = size(outlier)
    assert scaled == 1
    unlimited, scaled = size(outlier, limit=None)
    assert scaled == 0
    assert limited < 2 * usual < 0.5 * unlimited


def test_clean_images_are_the_reference(degrader: DeFlowDegrader) -> None:
    """Their own latents: nothing is left to learn."""
    adapted = adapt(degrader, PHOTOS, name="mine", clean=PHOTOS)
    other = adapt(degrader, PHOTOS, name="mine")
    for level in (0, 1):
        # The noise draws of the two sides differ.
        assert sigma_of(adapted.model, level).trace() < 0.3 * sigma_of(other.model, level).trace()
    facts = adapted.training_info["adapted"]["mine"]
    assert facts["clean"]["images"] == 3
    stepped = adapt(degrader, PHOTOS, name="mine", clean=[picture(0)], steps=20)
    assert stepped.training_info["adapted"]["mine"]["steps"] == 20
    assert all(bool(s.factor.isfinite().all()) for s in stepped.model.domain_shifts())


def test_a_seed_fixes_the_fit(degrader: DeFlowDegrader) -> None:
    one, same, other = (
        adapt(degrader, PHOTOS[:1], name="mine", seed=seed).model.domain_shifts()[0].factor
        for seed in (1, 1, 2)
    )
    assert one.equal(same)
    assert not one.equal(other)


def test_images_of_every_kind_are_the_same_photographs(degrader: DeFlowDegrader) -> None:
    tensors = torch.from_numpy(np.stack(PHOTOS)).permute(0, 3, 1, 2)
    kinds: list[Any] = [
        PHOTOS,
        [Image.fromarray(photo) for photo in PHOTOS],
        [np.stack(PHOTOS)],  # a batch
        [tensors],
        list(tensors.float() / 255),
        [*PHOTOS[:2], np.full((3, 60, 3), 9, np.uint8), PHOTOS[2]],
    ]
    factors = []
    for images in kinds[:-1]:
        factors.append(adapt(degrader, images, name="mine").model.domain_shifts()[0].factor)
    for factor in factors[1:]:
        assert_close(factor, factors[0])
    with pytest.warns(
        UserWarning, match="1 files or images of the images given are left out: image 3"
    ):
        adapted = adapt(degrader, kinds[-1], name="mine")
    assert adapted.training_info["adapted"]["mine"]["degraded"]["left_out"] == 1


def test_large_photographs_are_looked_at_in_parts(
    degrader: DeFlowDegrader, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def record(model: DeFlow, x: Tensor, domain: str, *key: int) -> list[Moments]:
        seen.append(x)
        return latent_moments(model, x, domain, *key)

    monkeypatch.setattr(photographs, "latent_moments", record)
    large = np.tile(picture(12, side=150), (14, 9, 1))
    large[:1050, :675] //= 2  # as dark as nothing else in it
    adapted = adapt(degrader, [large], name="mine")
    whole = [x for x in seen if max(x.shape[-2:]) > TILE // 4]
    assert len(whole) == TILES
    assert all(max(x.shape[-2:]) <= TILE for x in seen)
    assert not any(a.equal(b) for i, a in enumerate(whole) for b in whole[:i])
    pixels = adapted.training_info["adapted"]["mine"]["degraded"]["pixels"]
    assert pixels == sum(x.shape[-2] * x.shape[-1] for x in whole) > 0.7 * TILES * TILE**2


@pytest.mark.parametrize("kind", SHIFTS)
def test_models_of_every_kind_are_enlarged(kind: str) -> None:
    model = white(shift=kind)
    larger = enlarged(model, "mine")
    assert larger.config.domains == ("degraded", "mine")
    assert larger.config.shift == ("full" if kind == "zero" else kind)
    for one, other in zip(model.domain_shifts(), larger.domain_shifts(), strict=True):
        assert other.means()[:2].equal(one.means())
        assert other.factors()[:2].equal(one.factors())
        assert not other.means()[2].any()
    adapted = adapt(DeFlowDegrader(model, device="cpu"), PHOTOS[:1], name="mine")
    found = adapted.model.domain_shifts()[0].factors()[2]
    assert found.any()
    assert (found - found.diagonal().diag()).any() == (kind != "diagonal")


@pytest.mark.parametrize("name", ["day", "clean", "random"])
def test_names_that_are_taken(degrader: DeFlowDegrader, name: str) -> None:
    with pytest.raises(AdaptationError, match=f"'{name}' is taken: this model has clean, night"):
        adapt(degrader, PHOTOS, name=name)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "my camera"}, ConfigError, "cannot name a degraded domain"),
        ({"steps": -1}, AdaptationError, "steps and seed must be at least 0"),
        ({"limit": 0.5}, AdaptationError, "limit must be at least 1"),
        ({"images": []}, AdaptationError, "no degraded photograph in the images given .* none"),
        ({"clean": []}, AdaptationError, "no clean photograph"),
        ({"images": "nowhere"}, FileNotFoundError, "nowhere"),
        ({"images": ["a.png"]}, TypeError, "expected a PIL image"),
    ],
)
def test_what_cannot_be_adapted(
    degrader: DeFlowDegrader, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        adapt(degrader, **{"images": PHOTOS, "name": "mine", **arguments})


def test_few_positions_are_warned_of(degrader: DeFlowDegrader) -> None:
    with pytest.warns(UserWarning, match="too few for a good estimate"):
        adapt(degrader, [picture(10, side=16)], name="mine")


def test_faint_noise_asks_for_clean_images(
    degrader: DeFlowDegrader, recwarn: pytest.WarningsRecorder
) -> None:
    faint = [picture(4, seed=seed) for seed in range(3)]
    adapt(degrader, faint, name="mine", clean=[picture(3, seed=7)])
    adapt(degrader, PHOTOS, name="mine")
    assert not recwarn
    with pytest.warns(UserWarning, match="far too weak: give clean images"):
        adapt(degrader, faint, name="mine")


# --- files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    for number, photo in enumerate(PHOTOS):
        Image.fromarray(photo).save(photos / "sub" / f"{number}.png")
    return photos


def test_the_command(
    degrader: DeFlowDegrader, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, output = tmp_path / "w", tmp_path / "out"
    degrader.save_pretrained(weights)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    Image.new("RGB", (50, 3)).save(folder / "small.png")
    Image.fromarray(np.full((64, 64), 1e6, np.int32)).save(folder / "deep.tif")
    command = ["adapt", str(weights), f"--degraded={folder}", "--name=mine", "--device=cpu"]
    assert main([*command, f"--output={output}"]) == 0
    told = capsys.readouterr()
    assert "mine: fitted to 3 photographs" in told.out
    assert "4 left out" in told.out
    assert "4 files or images of" in told.err
    for words in (
        "broken.png",
        "dangling.png",
        "small.png is smaller than 4 x 4",
        "deep.tif: PIL images of mode",
    ):
        assert words in told.err
    adapted = DeFlowDegrader.from_pretrained(output, device="cpu")
    facts = adapted.training_info["adapted"]["mine"]
    assert facts["degraded"]["folder"] == "photos"
    assert facts["from"] == "w"
    python = adapt(degrader, [Image.fromarray(p) for p in PHOTOS], name="mine")
    for one, other in zip(adapted.model.domain_shifts(), python.model.domain_shifts(), strict=True):
        # The broken file comes first, so the noise has other numbers.
        assert one.factor[2].norm() == pytest.approx(float(other.factor[2].norm()), rel=0.1)
    assert main(["info", str(output)]) == 0
    assert "mine, latent 0: 6 channels" in capsys.readouterr().out

    assert main([*command, f"--output={output}"]) == 2
    assert "holds weights already" in capsys.readouterr().err
    for more, message in (
        (["--name=day"], "'day' is taken"),
        ([f"--clean={folder}"], "are the same folder"),
        ([f"--degraded={tmp_path / 'w'}"], "can be used: there are none"),
    ):
        assert main([*command, f"--output={tmp_path / 'no'}", *more]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_of_large_folders_some_are_drawn(degrader: DeFlowDegrader, folder: Path) -> None:
    seen: list[tuple[str, int]] = []
    adapted = adapt(
        degrader,
        folder,
        name="mine",
        photographs=2,
        progress=lambda side, count: seen.append((side, count)),
    )
    assert adapted.training_info["adapted"]["mine"]["degraded"]["images"] == 2
    assert seen == [("degraded", 1), ("degraded", 2)]
