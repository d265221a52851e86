"""RandomDeFlow as a transform of torchvision; ``test_transforms.py`` runs this file by itself.

torchvision must be imported before ``deflow_aug.transforms``, and PyPI's build of it cannot be
imported beside a CPU build of PyTorch: its compiled operators are missing. Only detection models
need them, so two are declared here in their place.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

try:
    import torchvision
except Exception:  # RuntimeError: operator torchvision::nms does not exist
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
    import torchvision

import pytest
from PIL import Image
from small import small_model
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from deflow_aug import DeFlowDegrader
from deflow_aug.transforms import Chain, RandomDeFlow, Resize

SIZE = 8


@pytest.fixture(scope="module")
def degrader() -> DeFlowDegrader:
    return DeFlowDegrader(small_model(), device="cpu")


def tensor(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3


def test_it_is_a_v2_transform(degrader: DeFlowDegrader) -> None:
    assert issubclass(RandomDeFlow, v2.Transform), torchvision.__version__
    transform = RandomDeFlow(degrader)
    assert isinstance(transform, v2.Transform)
    assert "temperature" in repr(v2.Compose([v2.RandomCrop(SIZE), transform]))


def test_a_pipeline_of_torchvision(degrader: DeFlowDegrader) -> None:
    pipeline = v2.Compose(
        [
            v2.RandomCrop(SIZE),
            RandomDeFlow(degrader, seed=1),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    picture = v2.functional.to_pil_image(tensor(3, 16, 16))
    label = object()
    image, untouched = pipeline(picture, label)
    assert untouched is label
    assert isinstance(image, tv_tensors.Image)
    assert image.shape == (3, SIZE, SIZE)


def test_other_augmentations_draw_the_same_with_and_without(degrader: DeFlowDegrader) -> None:
    positions = []
    for middle in (v2.Identity(), RandomDeFlow(degrader), RandomDeFlow(degrader, p=0.5, seed=1)):
        torch.manual_seed(0)
        where = torch.arange(256.0).reshape(1, 16, 16) / 255
        crops = []
        for _ in range(3):
            crop = v2.RandomCrop(SIZE)
            crops.append(crop(v2.RandomHorizontalFlip()(where)).flatten()[0].item())
            middle(tensor(3, SIZE, SIZE))
        positions.append(crops)
    assert positions[0] == positions[1] == positions[2]


def test_only_images_of_a_sample_are_transformed(degrader: DeFlowDegrader) -> None:
    size = (SIZE, SIZE)
    sample: dict[str, Any] = {
        "plain": tensor(3, *size),
        "image": tv_tensors.Image(tensor(3, *size)),
        "picture": Image.new("RGB", size, (100, 120, 140)),
        "video": tv_tensors.Video(tensor(2, 3, *size)),
        "mask": tv_tensors.Mask(torch.ones(size, dtype=torch.uint8)),
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor([[0, 0, 4, 4]]), format="XYXY", canvas_size=size
        ),
        "name": "x",
    }
    result = RandomDeFlow(degrader, seed=1)(sample)
    changed = [name for name in sample if result[name] is not sample[name]]
    assert changed == ["image", "picture", "video"]
    for name in changed:
        assert type(result[name]) is type(sample[name])
    # One draw for all, and for all frames of a video.
    noise = result["image"] - sample["image"]
    frames = result["video"] - sample["video"]
    alone = RandomDeFlow(degrader, seed=1)(sample["video"][0].as_subclass(Tensor))
    assert torch.allclose(frames[0], alone - sample["video"][0], atol=1e-5)
    assert noise.abs().mean() > 1e-3


def test_a_batch_of_explicit_images_has_a_draw_each(degrader: DeFlowDegrader) -> None:
    batch = tv_tensors.Image(tensor(1, 3, SIZE, SIZE).expand(2, -1, -1, -1).clone())
    transform = RandomDeFlow(degrader, seed=1)
    result = transform(batch)
    assert isinstance(result, tv_tensors.Image)
    assert not result[0].equal(result[1])
    params = RandomDeFlow(degrader, seed=1).make_params([batch])  # torchvision's flat inputs
    assert len(params["images"]) == 2
    assert transform.transform(batch, params).equal(result)
    some = RandomDeFlow(degrader, p=0.5, seed=0)
    many = tv_tensors.Image(tensor(20, 3, 4, 4))
    assert isinstance(some(many), tv_tensors.Image)


def test_our_rule_is_torchvisions_for_tensors(degrader: DeFlowDegrader) -> None:
    """Which entries change, beside a transform of torchvision that changes every image."""
    theirs, ours = v2.RandomInvert(p=1.0), RandomDeFlow(degrader)
    image, picture = tensor(3, SIZE, SIZE), Image.new("RGB", (SIZE, SIZE), (90, 120, 150))
    explicit = tv_tensors.Image(image)
    mask = tv_tensors.Mask(torch.ones(SIZE, SIZE, dtype=torch.uint8))
    samples: list[Any] = [
        image,
        (image, image.clone()),
        {"a": [image.clone()], "b": picture},
        [picture, {"c": explicit}, image],
        (mask, image, 1, "x"),
        {"mask": mask, "name": None},
        (explicit, picture, tv_tensors.Video(image[None])),
    ]
    for sample in samples:
        flat = torch.utils._pytree.tree_leaves(sample)
        changed = [
            [new is not old for new, old in zip(leaves, flat, strict=True)]
            for leaves in (torch.utils._pytree.tree_leaves(t(sample)) for t in (theirs, ours))
        ]
        assert changed[0] == changed[1], sample


def test_explicit_images_keep_their_type_when_their_size_changes(degrader: DeFlowDegrader) -> None:
    image = tv_tensors.Image(tensor(3, 16, 12))
    result = Chain([RandomDeFlow(degrader), Resize(4)], seed=1)(image)
    assert isinstance(result, tv_tensors.Image)
    assert result.shape == (3, 4, 3)
