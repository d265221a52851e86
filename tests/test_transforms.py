"""RandomDeFlow on samples of every kind, and what names its draws."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import small_model
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import deflow_aug
from deflow_aug import DeFlowDegrader
from deflow_aug.transforms import (
    GaussianNoise,
    RandomBlur,
    RandomDeFlow,
    RandomJPEG,
    RandomOrder,
    RandomRescale,
    Resize,
)
from deflow_aug.transforms.base import ImageTransform
from deflow_aug.transforms.random_deflow import refuse_forked_gpu

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def degrader() -> DeFlowDegrader:
    return DeFlowDegrader(small_model(), device="cpu")


@functools.cache
def two_domains() -> DeFlowDegrader:
    return DeFlowDegrader(small_model(domains=("night", "day")), device="cpu")


def make(**settings: Any) -> RandomDeFlow:
    return RandomDeFlow(degrader(), **{"seed": 1, **settings})


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.3, 0.7, shape).astype(np.float32)


def tensor(*shape: int) -> Tensor:
    return torch.from_numpy(pixels(*shape))


def eight_bit(*shape: int) -> np.ndarray:
    return (pixels(*shape) * 255).astype(np.uint8)


KINDS = {
    "PIL RGB": lambda: Image.fromarray(eight_bit(6, 9, 3)),
    "PIL RGBA": lambda: Image.fromarray(eight_bit(6, 9, 4)),
    "PIL L": lambda: Image.fromarray(eight_bit(6, 9)),
    "array (H, W)": lambda: eight_bit(6, 9),
    "array (H, W, 3)": lambda: eight_bit(6, 9, 3),
    "array (B, H, W, 3)": lambda: pixels(2, 6, 9, 3),
    "tensor (3, H, W)": lambda: torch.from_numpy(eight_bit(3, 6, 9)),
    "tensor (1, H, W)": lambda: tensor(1, 6, 9),
    "tensor (B, 3, H, W)": lambda: tensor(2, 3, 6, 9),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def numbers(image: Any) -> np.ndarray:
    return np.asarray(image).astype(np.float64)


def same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and np.array_equal(numbers(one), numbers(other))


# -- images ------------------------------------------------------------------------------------


@every_kind
def test_images_are_degraded_by_their_draw(kind: str) -> None:
    image = KINDS[kind]()
    before = numbers(image).copy()
    transform = make()
    params = transform.make_params(image)
    result = transform.transform(image, json.loads(json.dumps(params)))
    draws = params["images"]
    batch = before.ndim == 4
    assert len(draws) == (2 if batch else 1)
    expected = degrader().degrade(
        image,
        [draw["temperature"] for draw in draws],
        seed=[draw["seed"] for draw in draws],
    )
    assert same(result, expected)
    assert not same(result, image)
    assert np.array_equal(numbers(image), before), "the input was modified"
    assert same(make()(image), result), "the first draw of the sequence"
    if isinstance(image, (Tensor, np.ndarray)):
        assert result.dtype == image.dtype


def test_temperatures_are_drawn_for_each_image_of_a_batch() -> None:
    transform = make(temperature=(0.5, 1.2))
    draws = transform.make_params(tensor(200, 3, 1, 1))["images"]
    temperatures = np.array([draw["temperature"] for draw in draws])
    assert 0.5 <= temperatures.min() < 0.55
    assert 1.15 < temperatures.max() <= 1.2
    assert abs(temperatures.mean() - 0.85) < 0.05
    assert len({draw["seed"] for draw in draws}) == 200
    fixed = make(temperature=0.7).make_params(tensor(3, 3, 1, 1))["images"]
    assert [draw["temperature"] for draw in fixed] == [0.7] * 3


def test_a_draw_can_be_repeated_on_another_image_or_frame() -> None:
    transform = make()
    frame, following = tensor(3, 8, 8), tensor(3, 8, 8) * 0.5
    params = transform.make_params(frame)
    noise = transform.transform(frame, params) - frame
    again = transform.transform(frame.clone(), params) - frame
    other = transform.transform(following, params) - following
    assert noise.equal(again)
    assert np.corrcoef(noise.flatten(), other.flatten())[0, 1] > 0.9
    clip = torch.stack([frame, frame])
    assert torch.allclose(transform.transform(clip, params) - clip, noise, atol=1e-5)


@every_kind
def test_images_left_alone_pass_by_identity(kind: str) -> None:
    image = KINDS[kind]()
    sample = {"image": image, "label": 3}
    result = make(p=0.0)(sample)
    assert result["image"] is image


@pytest.mark.parametrize(
    "make_batch",
    [lambda: tensor(40, 3, 4, 4).double() + 1e-12, lambda: pixels(40, 4, 4, 3).astype(np.float64)],
)
def test_some_images_of_a_batch_may_be_left_alone(make_batch: Any) -> None:
    batch = make_batch()
    transform = make(p=0.5)
    params = transform.make_params(batch)
    applied = np.array([draw["apply"] for draw in params["images"]])
    assert 8 < applied.sum() < 32
    result = transform.transform(batch, params)
    untouched = numbers(result) == numbers(batch)
    assert untouched[~applied].all()
    assert not untouched[applied].all(axis=(1, 2, 3)).any()
    alone = int(np.flatnonzero(applied)[3])
    single = transform.transform(batch[alone], {"images": [params["images"][alone]]})
    assert np.allclose(numbers(single), numbers(result[alone]), rtol=0, atol=1e-5)


def test_no_gradient_flows_and_results_can_be_trained_on() -> None:
    image = tensor(3, 8, 8).requires_grad_()
    result = make()(image)
    assert not result.requires_grad
    weight = torch.ones(1, requires_grad=True)
    (result * weight).sum().backward()
    assert weight.grad is not None


# -- samples -----------------------------------------------------------------------------------

Sample = namedtuple("Sample", ["picture", "name"])


def test_what_is_no_image_passes_by_identity() -> None:
    label, boxes, mask, noted = torch.tensor(3), tensor(5, 4), torch.ones(8, 8).bool(), object()
    sample = {
        "label": label,
        "boxes": boxes,
        "mask": mask,
        "image": tensor(3, 8, 8),
        "extra": [noted, None, "text", 7, (tensor(3, 8, 8),)],
    }
    result = make()(sample)
    assert list(result) == list(sample)
    for name in ("label", "boxes", "mask"):
        assert result[name] is sample[name]
    for before, after in zip(sample["extra"][:4], result["extra"][:4], strict=True):
        assert after is before
    assert result["extra"][4][0] is sample["extra"][4][0], "only the first plain tensor"
    assert not same(result["image"], sample["image"])
    assert sample["image"].equal(tensor(3, 8, 8))


def test_explicit_images_are_all_transformed_and_plain_ones_then_not() -> None:
    first, second = Image.fromarray(eight_bit(8, 8, 3)), Image.fromarray(eight_bit(8, 8, 3))
    plain, mask = tensor(3, 8, 8), eight_bit(8, 8)
    result = make()((plain, [first, mask], {"b": second}))
    assert isinstance(result, tuple)
    assert result[0] is plain
    assert result[1][1] is mask
    assert not same(result[1][0], first)
    assert same(result[1][0], result[2]["b"]), "all images of a sample share its draw"


RGB = eight_bit(8, 9, 3)


@pytest.mark.parametrize(
    ("sample", "image"),
    [
        ({"mask": eight_bit(8, 9), "image": RGB}, "image"),
        ({"mask": eight_bit(8, 9), "scan": RGB}, "scan"),
        ({"mask": eight_bit(8, 9), "image": eight_bit(8, 9)}, "image"),
        ({"K": np.eye(3, dtype=np.float32), "image": RGB}, "image"),
        ({"boxes": pixels(5, 4), "image": RGB}, "image"),
        ({"points": pixels(2, 7, 3), "left_image": RGB}, "left_image"),
        ({"points": tensor(1, 7, 3), "img": tensor(3, 8, 9)}, "img"),
        ({"depth": tensor(1, 8, 9), "image": tensor(3, 8, 9)}, "image"),
        ({"depth": tensor(1, 8, 9), "gt": tensor(1, 8, 9)}, "gt"),
        ({"normals": tensor(3, 8, 9), "hq": tensor(3, 8, 9)}, "hq"),
        ({"image_mask": eight_bit(8, 9), "0.png": RGB}, "0.png"),
        ({"gt": RGB, "lq": RGB.copy()}, "lq"),
        ({"gt": tensor(3, 8, 9), "lr": tensor(3, 4, 5)}, "lr"),
        ({"gt_img": Image.fromarray(RGB), "lq_img": Image.fromarray(RGB)}, "lq_img"),
        ({"gt": Image.fromarray(RGB), "lq": Image.fromarray(RGB)}, "lq"),
        ({"target": Image.fromarray(RGB), "input": Image.fromarray(RGB)}, "input"),
        ({"hq": Image.fromarray(RGB), "lq": "a path"}, "hq"),
        ({"image": {"mask": tensor(1, 8, 9), "rgb": tensor(3, 8, 9)}, "id": 3}, "rgb"),
        ({"depth": tensor(1, 8, 9), "label": 3}, None),
        ({"mask": eight_bit(8, 9)}, None),
        ({"K": np.eye(3, dtype=np.float32), "boxes": tensor(1, 5, 4)}, None),
        ({"features": tensor(64, 7, 7)}, None),
    ],
)
def test_masks_depths_and_matrices_are_no_images(sample: dict[str, Any], image: str | None) -> None:
    transform = make()
    draws = transform.make_params(sample, key=0)["images"]
    result = transform(sample)

    def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
        names = []
        for name, value in before.items():
            if isinstance(value, dict):
                names += changed(value, after[name])
            elif after[name] is not value:
                assert not same(after[name], value)
                names.append(name)
        return names

    assert changed(sample, result) == ([] if image is None else [image])
    assert len(draws) == 1


def test_grey_images_without_a_name_are_images_if_nothing_else_could_be() -> None:
    for grey in (eight_bit(8, 9), tensor(1, 8, 9)):
        assert not same(make()(grey), grey)
        assert not same(make()((grey, 3))[0], grey)
        pair = (grey, grey.copy() if isinstance(grey, np.ndarray) else grey.clone())
        assert all(one is other for one, other in zip(make()(pair), pair, strict=True))


@pytest.mark.parametrize(
    "sample",
    [
        (tensor(3, 8, 8), 1),
        [eight_bit(8, 8, 3), "name"],
        {"a": {"b": [tensor(2, 3, 8, 8)]}},
        OrderedDict(image=eight_bit(8, 8), label=0),
        Sample(Image.fromarray(eight_bit(8, 8, 3)), "name"),
        (tensor(64, 7, 7), tensor(3, 8, 8)),  # features, which have too many channels
        (torch.zeros(3, 8, 8, dtype=torch.int64), tensor(3, 8, 8)),
    ],
)
def test_structures_come_back_as_they_are(sample: Any) -> None:
    result = make()(sample)
    assert type(result) is type(sample)
    leaves, before = (torch.utils._pytree.tree_leaves(one) for one in (result, sample))
    assert sum(one is not other for one, other in zip(leaves, before, strict=True)) == 1


def test_several_arguments_come_back_as_a_tuple() -> None:
    image, label = tensor(3, 8, 8), object()
    result = make()(image, label)
    assert isinstance(result, tuple)
    assert not same(result[0], image)
    assert result[1] is label


@pytest.mark.parametrize("sample", [None, "text", 3, {}, [], {"label": 3, "name": "x"}])
def test_samples_without_images_come_back_themselves(sample: Any) -> None:
    transform = make()
    assert transform(sample) is sample
    assert transform._calls == 0


def test_it_goes_into_plain_pipelines() -> None:
    def compose(sample: Any) -> Any:
        for step in (lambda x: x, make(), lambda x: x):
            sample = step(sample)
        return sample

    image = tensor(3, 8, 8)
    expected = make()(image)
    assert compose(image).equal(expected)
    assert torch.nn.Sequential(make())(image).equal(expected)


# -- what names a draw ---------------------------------------------------------------------------


def test_a_seed_gives_a_sequence() -> None:
    image = tensor(3, 8, 8)
    one, other = make(), make()
    sequence = [one(image) for _ in range(4)]
    assert all(other(image).equal(expected) for expected in sequence)
    assert len({expected.numpy().tobytes() for expected in sequence}) == 4
    assert not make(seed=2)(image).equal(sequence[0])


def test_without_a_seed_nothing_is_repeated() -> None:
    image = tensor(3, 8, 8)
    transform = make(seed=None)
    copies = [transform, make(seed=None), copy.deepcopy(transform), copy.copy(transform)]
    copies.append(pickle.loads(pickle.dumps(transform)))
    results = {one(image).numpy().tobytes() for one in copies for _ in range(2)}
    assert len(results) == 10


def test_keys_name_draws_whatever_was_drawn_before() -> None:
    transform = make()
    images = tensor(3, 3, 8, 8)
    alone = [make()(images[i], key=index) for i, index in enumerate((7, 0, 2**70))]
    transform(images)
    together = transform(images, key=[7, 0, 2**70])
    assert torch.allclose(together, torch.stack(alone), rtol=0, atol=1e-5)
    reordered = transform(images[[2, 0]], key=np.array([3, 7]))
    assert torch.allclose(reordered[1], alone[0], rtol=0, atol=1e-5)
    assert transform.make_params(images[0], key=7) == transform.make_params("any", key=7)
    shared = transform.make_params(images, key=7)["images"]
    assert shared[0] == transform.make_params(images[0], key=7)["images"][0]
    assert shared[1] != shared[0]


def test_keys_may_be_arrays_and_tensors() -> None:
    transform, image, batch = make(), tensor(3, 8, 8), tensor(2, 3, 8, 8)
    for three in (torch.tensor(3), np.int64(3), np.array(3)):
        assert same(transform(image, key=three), transform(image, key=3))
    for keys in (torch.tensor([3, 5]), np.array([3, 5])):
        assert same(transform(batch, key=keys), transform(batch, key=[3, 5]))


def test_epochs_differ_and_can_be_gone_back_to() -> None:
    image = tensor(3, 8, 8)
    transform = make()
    epochs = []
    for epoch in (0, 1, 0):
        transform.set_epoch(epoch)
        epochs.append([transform(image), transform(image), transform(image, key=5)])
    for first, second, again in zip(*epochs, strict=True):
        assert first.equal(again)
        assert not first.equal(second)


def test_copies_go_on_by_themselves() -> None:
    image = tensor(3, 8, 8)
    transform = make()
    transform(image)
    for duplicate in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        results = [duplicate(image), duplicate(image)]
        fresh = make()
        fresh(image)
        assert all(fresh(image).equal(result) for result in results)
    assert transform._calls == 1
    assert copy.deepcopy(transform).degrader is not transform.degrader


def global_states() -> list[Any]:
    legacy = np.random.get_state()  # noqa: NPY002
    return [random.getstate(), legacy[1].tolist(), legacy[2], torch.get_rng_state().tolist()]


@pytest.mark.parametrize("seed", [None, 1])
def test_no_global_generator_is_touched(seed: int | None) -> None:
    before = global_states()
    transform = make(seed=seed, p=0.5)
    for _ in range(3):
        transform(tensor(2, 3, 8, 8))
    copy.deepcopy(transform).set_epoch(3)
    assert global_states() == before


def test_no_global_generator_is_read() -> None:
    seeded, fresh = [], []
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        seeded.append(make().make_params(tensor(3, 8, 8)))
        fresh.append(make(seed=None).make_params(tensor(3, 8, 8)))
    assert seeded[0] == seeded[1]
    assert fresh[0] != fresh[1]


def test_p_changes_nothing_else_about_a_draw() -> None:
    often, seldom = (make(p=p).make_params(tensor(50, 3, 1, 1))["images"] for p in (1.0, 0.3))
    applied = [draw.pop("apply") for draw in seldom]
    assert 5 < sum(applied) < 25
    assert all(draw.pop("apply") for draw in often)
    assert often == seldom


# -- domains -------------------------------------------------------------------------------------


def test_domains_are_drawn_for_each_image() -> None:
    batch = tensor(60, 3, 4, 4)
    transform = RandomDeFlow(two_domains(), domain="random", seed=1)
    params = transform.make_params(batch)
    names = [draw["domain"] for draw in params["images"]]
    assert 15 < names.count("night") < 45
    assert names.count("night") + names.count("day") == 60
    result = transform.transform(batch, params)
    for i in (names.index("night"), names.index("day")):
        draw = params["images"][i]
        alone = two_domains().degrade(
            batch[i], draw["temperature"], seed=draw["seed"], domain=draw["domain"]
        )
        assert torch.allclose(result[i], alone, rtol=0, atol=1e-5)
    mix = {"night": 1.0, "day": 3.0}
    mixed = RandomDeFlow(two_domains(), domain=mix, seed=1)
    params = json.loads(json.dumps(mixed.make_params(batch)))
    draw = params["images"][5]
    alone = two_domains().degrade(batch[5], draw["temperature"], seed=draw["seed"], domain=mix)
    assert torch.allclose(mixed.transform(batch, params)[5], alone, rtol=0, atol=1e-5)
    named = RandomDeFlow(two_domains(), domain="day", seed=1)
    assert named.make_params(batch)["images"][0]["domain"] == "day"
    assert make().make_params(batch)["images"][0]["domain"] is None


@pytest.mark.parametrize("domain", [None, "dusk", "clean", {"night": 1, "dusk": 1}])
def test_unknown_domains(domain: Any) -> None:
    with pytest.raises(ValueError, match="night, day"):
        RandomDeFlow(two_domains(), domain=domain)


# -- workers -------------------------------------------------------------------------------------


class Draws(Dataset[str]):
    """What is drawn in the worker that gets the item."""

    def __init__(self, transform: ImageTransform, keyed: bool) -> None:
        self.transform, self.keyed = transform, keyed

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> str:
        key = index if self.keyed else None
        return json.dumps(self.transform.make_params("any", key=key))


def drawn(
    transform: ImageTransform, keyed: bool = False, epochs: int = 1, **loader: Any
) -> list[str]:
    batches = DataLoader(Draws(transform, keyed), batch_size=2, **loader)
    return [one for _ in range(epochs) for batch in batches for one in batch]


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("seed", [None, 1])
def test_workers_and_epochs_draw_different_numbers(seed: int | None, persistent: bool) -> None:
    draws = drawn(make(seed=seed), epochs=2, num_workers=2, persistent_workers=persistent)
    assert len(set(draws)) == 16


def test_a_seeded_loader_repeats_the_draws_of_a_seeded_transform() -> None:
    runs = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            runs.append(drawn(make(), epochs=2, num_workers=2))
    assert runs[0] == runs[1]


def test_keyed_draws_are_the_same_in_any_worker() -> None:
    expected = drawn(make(), keyed=True)
    assert len(set(expected)) == 8
    assert drawn(make(), keyed=True, num_workers=2) == expected


def test_it_survives_spawn() -> None:
    transform = make()
    spawned = {"num_workers": 1, "multiprocessing_context": "spawn"}
    assert drawn(transform, keyed=True, **spawned) == drawn(transform, keyed=True)


def test_forked_processes_draw_different_numbers() -> None:
    transform = make(seed=None)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(transform.make_params, ["any"] * 4, chunksize=1)
    # The pool pickles the bound method, so that each call has a copy with draws of its own.
    assert len({json.dumps(one) for one in found}) == 4
    read, write = multiprocessing.get_context("fork").Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(
        target=lambda: write.send(transform.make_params("any"))
    )
    child.start()
    assert read.recv() != transform.make_params("any")
    child.join()


def test_a_gpu_is_refused_in_forked_processes() -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    home = make()._home
    refuse_forked_gpu(gpu, home)
    refuse_forked_gpu(cpu, home + 1)
    with pytest.raises(RuntimeError, match=r"on cuda:0.*fork.*spawn.*DegradingLoader"):
        refuse_forked_gpu(gpu, home + 1)


def test_the_guard_stands_before_the_degrader(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = make()
    monkeypatch.setattr(DeFlowDegrader, "device", torch.device("cuda", 0))
    transform._home += 1  # as in a forked process
    with pytest.raises(RuntimeError, match="where GPUs cannot be used"):
        transform(tensor(3, 8, 8))
    copied = pickle.loads(pickle.dumps(transform))  # as in a spawned process
    refuse_forked_gpu(torch.device("cuda", 0), copied._home)


@pytest.mark.parametrize(
    "transform",
    [
        make(),
        RandomBlur(1.0),
        RandomJPEG(50),
        RandomRescale(0.5),
        GaussianNoise(0.1),
        Resize(2),
        RandomOrder([degrader(), RandomBlur()]),
    ],
    ids=lambda one: type(one).__name__,
)
def test_torchs_default_device_plays_no_part(transform: ImageTransform) -> None:
    image, rgba = tensor(3, 8, 10), pixels(8, 10, 4)
    params = transform.make_params(image)
    expected = [transform.transform(one, params) for one in (image, rgba)]
    with torch.device("meta"):  # holds no data
        results = [transform.transform(one, params) for one in (image, rgba)]
    assert all(same(one, other) for one, other in zip(results, expected, strict=True))


# -- torchvision, and without it -------------------------------------------------------------------


def run_apart(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_with_torchvision_it_is_one_of_its_transforms() -> None:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed; the extra [test] brings it")
    # In a process of its own, where torchvision comes before deflow_aug.
    out = run_apart("-m", "pytest", "-n0", "-p", "no:cacheprovider", "tests/torchvision_v2.py")
    assert " passed" in out
    assert "skipped" not in out


def test_where_torchvision_cannot_be_imported_it_is_a_module(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    failure = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (tmp_path / "torchvision" / "__init__.py").write_text(failure)
    script = (
        "import torch, deflow_aug\n"
        "from deflow_aug.transforms.base import ImageTransform\n"
        "assert ImageTransform.__mro__[1] is torch.nn.Module, ImageTransform.__mro__\n"
        "print(deflow_aug.RandomDeFlow.__name__)"
    )
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    assert run_apart("-c", script, PYTHONPATH=path).strip() == "RandomDeFlow"


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"p": -0.1}, "p is a probability"),
        ({"p": 1.1}, "p is a probability"),
        ({"p": "often"}, "p is a probability"),
        ({"p": float("nan")}, "p is a probability"),
        ({"seed": -1}, "seed must be None or an integer"),
        ({"seed": 1.5}, "seed must be None or an integer"),
        ({"seed": True}, "seed must be None or an integer"),
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"temperature": (1.2, 0.5)}, "least value no more than its greatest"),
        ({"temperature": (0, float("inf"))}, r"temperature must be a number or \(least"),
        ({"temperature": (1, 2, 3)}, r"temperature must be a number or \(least"),
        ({"temperature": torch.tensor([0.5, 1.0])}, r"temperature must be a number or \(least"),
        ({"temperature": np.array([0.5, 1.0])}, r"temperature must be a number or \(least"),
        ({"temperature": True}, r"temperature must be a number or \(least"),
        ({"temperature": "hot"}, r"temperature must be a number or \(least"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_a_degrader_is_needed() -> None:
    with pytest.raises(TypeError, match=r"must be a DeFlowDegrader, got str; load one with"):
        RandomDeFlow("camera-noise")  # type: ignore[arg-type]


@pytest.mark.parametrize("epoch", [-1, 0.5, None, True])
def test_bad_epochs(epoch: Any) -> None:
    with pytest.raises(ValueError, match="epoch must be an integer of at least 0"):
        make().set_epoch(epoch)


def test_bad_keys() -> None:
    batch = tensor(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"expected one key, or 2 \(one an image\), got 3"):
        make()(batch, key=[1, 2, 3])
    for key in (-1, 1.5, "a", True):
        with pytest.raises(ValueError, match="a key is an integer of at least 0"):
            make()(batch, key=key)
    with pytest.raises(ValueError, match="together with a seed: give seed= to RandomDeFlow"):
        make(seed=None)(batch, key=1)


def test_draws_and_batches_of_different_lengths() -> None:
    transform = make()
    params = transform.make_params(tensor(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"a batch of 3 images needs as many draws.*got 2"):
        transform.transform(tensor(3, 3, 8, 8), params)
    with pytest.raises(ValueError, match="3 images need as many draws, got 2"):
        transform.apply_to(tensor(3, 3, 8, 8), params["images"])


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        (tensor(8, 8), ValueError, "expected a tensor"),
        (torch.tensor(3), ValueError, "expected a tensor"),
        (tensor(8, 9, 3), ValueError, "channels look to be last"),
        ((tensor(8, 9, 3), 1), ValueError, "channels look to be last"),
        (tensor(3, 8, 8) * 255, ValueError, r"lie in \[0, 1\]"),
        (np.zeros((8, 8, 3), np.int32), TypeError, "dtype must be"),
    ],
)
def test_bad_images(sample: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()(sample)


def test_a_sample_is_needed() -> None:
    with pytest.raises(TypeError, match="RandomDeFlow needs a sample"):
        make()()


def test_it_says_what_it_is() -> None:
    text = repr(make(p=0.5))
    assert "RandomDeFlow" in text
    assert "temperature=(0.5, 1.2)" in text
    assert "p=0.5" in text
    assert {"RandomDeFlow", "MixedDegradation"} <= set(dir(deflow_aug))
