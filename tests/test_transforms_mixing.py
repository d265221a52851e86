"""Several degradations together, and the classical steps among them."""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from small import small_model
from torch import Tensor

from deflow_aug import DeFlowDegrader
from deflow_aug.resize import bicubic_downscale
from deflow_aug.transforms import (
    Chain,
    GaussianNoise,
    ImageTransform,
    MixedDegradation,
    RandomBlur,
    RandomDeFlow,
    RandomJPEG,
    RandomOrder,
    RandomRescale,
    Resize,
)


@functools.cache
def degrader(seed: int = 0) -> DeFlowDegrader:
    return DeFlowDegrader(small_model(seed), device="cpu")


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.3, 0.7, shape).astype(np.float32)


def tensor(*shape: int) -> Tensor:
    return torch.from_numpy(pixels(*shape))


def eight_bit(*shape: int) -> np.ndarray:
    return (pixels(*shape) * 255).astype(np.uint8)


def first(transform: ImageTransform, image: Any = "any") -> dict[str, Any]:
    (draw,) = transform.make_params(image)["images"]
    return draw


# -- classical steps ---------------------------------------------------------------------------


def test_jpeg_is_that_of_pillow() -> None:
    image = eight_bit(16, 24, 3)
    transform = RandomJPEG((20, 90), seed=1)
    params = transform.make_params(image)
    buffer = io.BytesIO()
    quality = params["images"][0]["quality"]
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    assert np.array_equal(transform.transform(image, params), np.array(Image.open(buffer)))
    qualities = {first(transform)["quality"] for _ in range(300)}
    assert qualities <= set(range(20, 91))
    assert {20, 90} < qualities or len(qualities) > 50
    assert first(RandomJPEG(75))["quality"] == 75


def test_blur_is_that_of_opencv() -> None:
    image = pixels(20, 30, 3)
    for sigma, reach in ((0.7, 3), (2.0, 6)):
        size = (2 * reach + 1, 2 * reach + 1)
        expected = cv2.GaussianBlur(image, size, sigma, borderType=cv2.BORDER_REFLECT)
        assert np.allclose(RandomBlur(sigma)(image), expected, rtol=0, atol=1e-5)
    assert np.array_equal(RandomBlur(0)(image), image)
    sigmas = [first(RandomBlur((0.5, 1.5), seed=i))["sigma"] for i in range(50)]
    assert 0.5 <= min(sigmas) < 0.7 < 1.3 < max(sigmas) <= 1.5


def test_rescaling_keeps_the_size_and_loses_detail() -> None:
    image = tensor(3, 31, 45)
    result = RandomRescale(0.5)(image)
    assert result.shape == image.shape
    assert 0.1 < result.std() / image.std() < 0.6
    flat = torch.full((3, 9, 7), 0.4)
    assert torch.allclose(RandomRescale((0.1, 0.9))(flat), flat, atol=1e-6)
    assert torch.allclose(RandomRescale(1.0)(image), image, atol=1e-6)


def test_noise_has_its_deviation_and_its_seed() -> None:
    image = torch.full((3, 64, 64), 0.5)
    transform = GaussianNoise(0.05, seed=1)
    params = transform.make_params(image)
    noise = transform.transform(image, params) - image
    assert float(noise.std()) == pytest.approx(0.05, rel=0.02)
    assert abs(float(noise.mean())) < 0.002
    assert transform.transform(image, params).equal(image + noise)
    assert not transform(image).equal(image + noise)


@pytest.mark.parametrize("make_image", [lambda: tensor(2, 3, 17, 24), lambda: tensor(3, 16, 24)])
def test_resizing_is_matlabs(make_image: Any) -> None:
    image = make_image()
    batch = image if image.ndim == 4 else image[None]
    expected = bicubic_downscale(batch, 4).clamp(0, 1)
    result = Resize(4)(image)
    assert result.shape == (*image.shape[:-2], -(-image.shape[-2] // 4), 6)
    assert torch.allclose(result, expected if image.ndim == 4 else expected[0], atol=1e-6)


def test_resizing_keeps_the_kind_of_image() -> None:
    picture = Image.fromarray(eight_bit(16, 24, 4))
    small = Resize(2)(picture)
    assert (small.mode, small.size) == ("RGBA", (12, 8))
    assert np.isin(np.asarray(small)[..., 3], np.asarray(picture)[..., 3]).all()
    grey = Resize(2)(eight_bit(16, 24))
    assert (grey.dtype, grey.shape) == (np.uint8, (8, 12))
    several = Resize(2)(pixels(3, 15, 24, 3))
    assert (several.dtype, several.shape) == (np.float32, (3, 8, 12, 3))
    assert Resize(1)(picture).size == (24, 16)


STEPS = {
    "jpeg": lambda **s: RandomJPEG(**s),
    "blur": lambda **s: RandomBlur(**s),
    "rescale": lambda **s: RandomRescale(**s),
    "noise": lambda **s: GaussianNoise(**s),
    "chain": lambda **s: Chain([RandomBlur(), degrader(), RandomJPEG(p=0.5)], **s),
    "order": lambda **s: RandomOrder(
        [RandomBlur(), degrader(), RandomJPEG(), GaussianNoise()], **s
    ),
    "mixed": lambda **s: MixedDegradation(
        [(degrader(), 0.5), (degrader(1), 0.3), (Chain([RandomJPEG(), GaussianNoise()]), 0.2)], **s
    ),
}
every_step = pytest.mark.parametrize("step", STEPS)


@every_step
def test_a_result_depends_on_its_draw_alone(step: str) -> None:
    batch = tensor(6, 3, 8, 12)
    transform = STEPS[step](seed=1)
    params = transform.make_params(batch)
    result = transform.transform(batch, json.loads(json.dumps(params)))
    assert result.shape == batch.shape
    assert 0 <= result.min() < result.max() <= 1
    assert STEPS[step](seed=1)(batch).equal(result)
    for i in (1, 4):
        alone = transform.transform(batch[i], {"images": [params["images"][i]]})
        assert torch.allclose(alone, result[i], rtol=0, atol=1e-5)
        assert not alone.equal(batch[i])
    keyed = transform(batch[:2], key=[5, 9])
    assert torch.allclose(keyed[1], transform(batch[1], key=9), rtol=0, atol=1e-5)
    for duplicate in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        assert duplicate(batch, key=list(range(6))).equal(transform(batch, key=list(range(6))))


@every_step
def test_a_probability_of_zero_changes_nothing(step: str) -> None:
    image = Image.fromarray(eight_bit(8, 12, 3))
    assert STEPS[step](p=0.0)(image) is image


@every_step
@pytest.mark.parametrize("kind", [lambda x: x, Image.fromarray, lambda x: x[..., 0]])
def test_the_kind_of_image_is_kept(step: str, kind: Any) -> None:
    image = kind(eight_bit(8, 12, 3))
    sample = {"image": image, "label": (3, "x")}
    result = STEPS[step](seed=1)(sample)
    assert result["label"] == (3, "x")
    assert type(result["image"]) is type(image)
    assert np.asarray(result["image"]).shape == np.asarray(image).shape


@every_step
def test_no_global_generator_is_touched(step: str) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    STEPS[step]()(tensor(2, 3, 8, 12))
    assert torch.get_rng_state().equal(before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


def test_steps_say_what_they_are() -> None:
    text = repr(STEPS["mixed"](p=0.5))
    for part in (
        "MixedDegradation",
        "0.3 RandomDeFlow",
        "RandomJPEG",
        "quality=(60.0, 95.0)",
        "p=0.5",
    ):
        assert part in text
    assert "sigma=" in repr(STEPS["order"]())
    assert "factor=4" in repr(Resize(4))


# -- together ------------------------------------------------------------------------------------


def test_a_chain_is_its_steps_one_after_another() -> None:
    image = tensor(3, 16, 24)
    steps = [RandomBlur(), RandomDeFlow(degrader()), Resize(2), RandomJPEG()]
    chain = Chain(steps, seed=1)
    params = chain.make_params(image)
    expected = image
    for step, own in zip(steps, params["images"][0]["steps"], strict=True):
        expected = step.transform(expected, {"images": [own]})
    result = chain.transform(image, params)
    assert result.shape == (3, 8, 12)
    assert torch.allclose(result, expected, rtol=0, atol=1e-5)
    one, other = (draw["steps"] for draw in (first(chain), first(chain)))
    assert one[0]["sigma"] != other[0]["sigma"]
    assert one[1]["seed"] != other[1]["seed"]


def test_equal_steps_of_a_chain_draw_different_numbers() -> None:
    draw = first(Chain([GaussianNoise(), GaussianNoise(), degrader(), degrader()], seed=1))
    assert len({step["seed"] for step in draw["steps"]}) == 4


def test_a_chain_rounds_only_at_its_end() -> None:
    image = eight_bit(8, 8, 3)
    softened = Chain([RandomBlur(2.0), GaussianNoise(0.004)], seed=1)
    params = softened.make_params(image)
    floats = softened.transform(image / np.float32(255), params)
    assert np.array_equal(softened.transform(image, params), np.rint(floats * 255))


def test_random_orders_are_all_drawn_and_followed() -> None:
    image = tensor(3, 16, 16)
    steps = [RandomBlur(2.0), GaussianNoise(0.1), RandomJPEG(30)]
    transform = RandomOrder(steps, seed=1)
    draws = [first(transform) for _ in range(60)]
    assert len({tuple(draw["order"]) for draw in draws}) == 6
    draw = draws[0]
    expected = image
    for number in draw["order"]:
        expected = steps[number].transform(expected, {"images": [draw["steps"][number]]})
    result = transform.transform(image, {"images": [draw]})
    assert torch.allclose(result, expected, rtol=0, atol=1e-5)
    reversed_order = {**draw, "order": draw["order"][::-1]}
    assert not transform.transform(image, {"images": [reversed_order]}).equal(result)


def test_degradations_are_mixed_by_their_weights() -> None:
    one, other = degrader(), degrader(1)
    mixed = MixedDegradation([(one, 7), (RandomDeFlow(other, temperature=0.3), 3)], seed=1)
    batch = tensor(400, 3, 4, 4)
    params = mixed.make_params(batch)
    choices = np.array([draw["choice"] for draw in params["images"]])
    assert 95 < choices.sum() < 145
    result = mixed.transform(batch, params)
    for choice, expected in ((0, one), (1, other)):
        i = int(np.flatnonzero(choices == choice)[2])
        draw = params["images"][i]["chosen"]
        alone = expected.degrade(batch[i], draw["temperature"], seed=draw["seed"])
        assert torch.allclose(alone, result[i], rtol=0, atol=1e-5)
        assert (draw["temperature"] == 0.3) == (choice == 1)


def test_nested_probabilities_leave_images_alone_by_identity() -> None:
    image = Image.fromarray(eight_bit(8, 8, 3))
    never = MixedDegradation([(Chain([RandomJPEG(p=0), RandomOrder([GaussianNoise(p=0)])]), 1)])
    assert never({"image": image})["image"] is image


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomJPEG((0, 50)), "quality must be from 1 to 100"),
        (lambda: RandomJPEG((50, 101)), "quality must be from 1 to 100"),
        (lambda: RandomJPEG(50.5), "quality must be an integer"),
        (lambda: RandomBlur(-1), "sigma must be from 0 to 1000"),
        (lambda: RandomRescale((0, 1)), "scale must be from 0.001 to 1"),
        (lambda: GaussianNoise((0.2, 0.1)), "sigma must be at least 0, and its least"),
        (lambda: Resize(0), "factor must be an integer of at least 1, got 0"),
        (lambda: Resize(1.5), "factor must be an integer"),  # type: ignore[arg-type]
        (lambda: Chain([]), "Chain needs at least one step"),
        (lambda: RandomOrder([]), "RandomOrder needs at least one step"),
        (lambda: MixedDegradation([]), r"needs pairs \(degradation, weight\)"),
        (lambda: MixedDegradation([degrader()]), "needs pairs"),  # type: ignore[list-item]
        (lambda: MixedDegradation([(degrader(), 0)]), "a weight must be at least"),
        (lambda: MixedDegradation([(degrader(), float("nan"))]), "a weight must be a number"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_steps_of_other_kinds() -> None:
    for make in (lambda: Chain([torch.nn.Identity()]), lambda: MixedDegradation([("x", 1)])):
        with pytest.raises(
            TypeError, match=r"a step must be a transform of deflow_aug\.transforms or"
        ):
            make()


def test_images_of_a_batch_must_keep_one_size() -> None:
    batch = tensor(20, 3, 8, 8)
    mixed = MixedDegradation([(Resize(2), 1), (GaussianNoise(), 1)], seed=1)
    with pytest.raises(ValueError, match=r"come out in different sizes, \[\(4, 4\), \(8, 8\)\]"):
        mixed(batch)
    equal = MixedDegradation([(Resize(2), 1), (Chain([Resize(2), GaussianNoise()]), 1)], seed=1)
    params = equal.make_params(batch)
    result = equal.transform(batch, params)
    assert result.shape == (20, 3, 4, 4)
    for i in (0, 7):
        alone = equal.transform(batch[i], {"images": [params["images"][i]]})
        assert torch.allclose(alone, result[i], rtol=0, atol=1e-5)
