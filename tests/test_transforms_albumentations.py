"""DeFlow as a transform of Albumentations: the contract that its own tests have for every one."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import small_model
from torch.utils.data import DataLoader, Dataset

A = pytest.importorskip("albumentations", reason="the extra [test] brings albumentations")

from deflow_aug import DeFlowDegrader  # noqa: E402
from deflow_aug.transforms.albumentations import DeFlow  # noqa: E402

IMAGE = np.random.default_rng(0).integers(80, 180, (12, 8, 3), dtype=np.uint8)
IMAGES = {
    "uint8": IMAGE,
    "float32": IMAGE.astype(np.float32) / 255,
    "grey": IMAGE[..., 0].copy(),
    "grey with an axis": IMAGE[..., :1].copy(),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    DeFlowDegrader(small_model(domains=("night", "day")), device="cpu").save_pretrained(folder)
    return folder


@pytest.fixture
def transform(weights: Path) -> Any:
    return DeFlow(weights, temperature=(0.5, 1.2), domain="random", p=1)


@pytest.mark.parametrize("kind", IMAGES)
def test_images_are_degraded_and_the_rest_is_not(transform: Any, kind: str) -> None:
    image, mask = IMAGES[kind], IMAGE[..., 0].copy()
    before = image.copy()
    boxes = np.array([[1, 1, 6, 6, 0]], dtype=np.float32)
    steps = [A.HorizontalFlip(p=0), transform]
    pipeline = A.Compose(steps, bbox_params=A.BboxParams("pascal_voc"), seed=1)
    result = pipeline(image=image, mask=mask, bboxes=boxes)
    assert result["image"].dtype == image.dtype
    assert result["image"].shape == image.shape
    assert not np.array_equal(result["image"], image)
    assert np.array_equal(image, before), "the input was modified"
    assert np.array_equal(result["mask"], mask)
    assert np.allclose(result["bboxes"], boxes)


def test_a_draw_is_that_of_the_degrader(transform: Any, weights: Path) -> None:
    result = transform(image=IMAGE)["image"]
    draw = transform.get_applied_params()["deflow"]
    expected = DeFlowDegrader.from_pretrained(weights, device="cpu").degrade(
        IMAGE, draw["temperature"], seed=draw["seed"], domain=draw["domain"]
    )
    assert np.array_equal(result, expected)
    assert draw["domain"] in ("night", "day")
    assert 0.5 <= draw["temperature"] <= 1.2


def test_seeds_fix_the_results(transform: Any) -> None:
    runs = []
    for seed in (137, 137, 138):
        pipeline = A.Compose([A.HorizontalFlip(p=0.5), transform], seed=seed)
        runs.append([pipeline(image=IMAGE)["image"] for _ in range(3)])
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])
    assert not np.array_equal(runs[0][0], runs[0][1])
    transform.set_random_seed(5)
    first = transform(image=IMAGE)["image"]
    transform.set_random_seed(5)
    assert np.array_equal(transform(image=IMAGE)["image"], first)


def test_probabilities() -> None:
    with pytest.raises(ValueError, match="less than or equal to 1"):
        DeFlow(p=1.5)
    image = DeFlow("nowhere", p=0)(image=IMAGE)["image"]  # and nothing is loaded
    assert np.array_equal(image, IMAGE)


def test_images_and_volumes_share_one_draw(transform: Any) -> None:
    frames = np.stack([IMAGE, IMAGE])
    for name in ("images", "volume"):
        result = transform(**{name: frames})[name]
        assert result.shape == frames.shape
        assert np.array_equal(result[0], result[1])
        assert not np.array_equal(result, frames)


def test_additional_targets_share_the_draw(transform: Any) -> None:
    pipeline = A.Compose([transform], additional_targets={"second": "image"})
    result = pipeline(image=IMAGE, second=IMAGE.copy())
    assert np.array_equal(result["image"], result["second"])


# -- serialisation -------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.5, 1])
@pytest.mark.parametrize("kind", IMAGES)
def test_serialised_to_a_dict_and_back(weights: Path, kind: str, p: float) -> None:
    image, mask = IMAGES[kind], IMAGE[..., 0].copy()
    settings: dict[str, Any] = {"temperature": (0.3, 0.9), "domain": {"night": 1, "day": 2}}
    transform = DeFlow(weights, **settings, p=p)
    copied = A.from_dict(A.to_dict(transform))
    assert isinstance(copied, DeFlow)
    assert A.to_dict(copied) == A.to_dict(transform)
    for one in (transform, copied):
        one.set_random_seed(137)
    for _ in range(4):
        results = [one(image=image, mask=mask) for one in (transform, copied)]
        assert np.array_equal(results[0]["image"], results[1]["image"])
        assert np.array_equal(results[0]["mask"], results[1]["mask"])


@pytest.mark.parametrize("data_format", ["json", "yaml"])
def test_serialised_to_a_file_and_back(transform: Any, data_format: str) -> None:
    pipeline = A.Compose([A.HorizontalFlip(p=0.5), A.OneOf([transform, A.NoOp()], p=1)])
    buffer = io.StringIO()
    A.save(pipeline, buffer, data_format=data_format)
    buffer.seek(0)
    loaded = A.load(buffer, data_format=data_format)
    for one in (pipeline, loaded):
        one.set_random_seed(137)
    assert np.array_equal(loaded(image=IMAGE)["image"], pipeline(image=IMAGE)["image"])


def test_a_degrader_without_a_name_cannot_be_serialised() -> None:
    degrader = DeFlowDegrader(small_model(), device="cpu")
    transform = DeFlow(degrader, p=1)
    with pytest.raises(NotImplementedError, match="give it the name of the weights"):
        A.to_dict(transform)
    assert "DeFlow(" in repr(transform)
    result = A.ReplayCompose([transform])(image=IMAGE)
    again = A.ReplayCompose.replay(result["replay"], image=IMAGE)
    assert np.array_equal(again["image"], result["image"])


def test_it_says_what_it_is(transform: Any, weights: Path) -> None:
    for part in ("DeFlow(", str(weights), "temperature=(0.5, 1.2)", "domain='random'"):
        assert part in repr(transform)


def test_it_survives_pickling(transform: Any) -> None:
    transform.set_random_seed(1)
    copied = pickle.loads(pickle.dumps(transform))
    assert np.array_equal(copied(image=IMAGE)["image"], transform(image=IMAGE)["image"])


# -- replay --------------------------------------------------------------------------------------


def test_replayed_on_the_same_and_on_other_images(transform: Any) -> None:
    pipeline = A.ReplayCompose([A.HorizontalFlip(p=0.5), transform])
    darker = IMAGE // 2
    for _ in range(4):
        result = pipeline(image=IMAGE)
        assert np.array_equal(
            A.ReplayCompose.replay(result["replay"], image=IMAGE)["image"], result["image"]
        )
        other = A.ReplayCompose.replay(result["replay"], image=darker)["image"]
        assert not np.array_equal(other, darker)


def test_what_was_not_applied_is_not_replayed(weights: Path) -> None:
    pipeline = A.ReplayCompose([DeFlow(weights, domain="day", p=0.5)], p=1)
    applied = set()
    for _ in range(20):
        result = pipeline(image=IMAGE)
        applied.add(result["replay"]["transforms"][0]["applied"])
        again = A.ReplayCompose.replay(result["replay"], image=IMAGE)
        assert np.array_equal(again["image"], result["image"])
    assert applied == {False, True}


# -- randomness ----------------------------------------------------------------------------------


class Seeds(Dataset[int]):
    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        return self.transform.get_params()["deflow"]["seed"]


def test_workers_and_epochs_draw_different_numbers(transform: Any) -> None:
    loader = DataLoader(Seeds(transform), num_workers=2, collate_fn=lambda one: one[0])
    seeds = [seed for _ in range(2) for seed in loader]
    assert len(set(seeds)) == 12


def test_no_global_generator_is_touched(transform: Any) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    transform(image=IMAGE)
    assert torch.get_rng_state().equal(before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        DeFlow(temperature=(-1, 1))
    with pytest.raises(ValueError, match="domain must be one of"):
        DeFlow(DeFlowDegrader(small_model(), device="cpu"), domain="dusk")
    with pytest.raises(OSError, match="nowhere"):
        DeFlow("./nowhere", p=1)(image=IMAGE)
