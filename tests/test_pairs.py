"""DegradedPairs: what a pair is, what may be given, and what is refused."""

from __future__ import annotations

import copy
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clean_images import SIDES, degrader, pictures, pixels, same, write
from PIL import Image
from torch import Tensor

from deflow_aug import CleanCrops, DeFlowDegrader, DegradedPairs
from deflow_aug.pairs.degradation import Degradation
from deflow_aug.randomness import Stream, generator
from deflow_aug.resize import bicubic_downscale
from deflow_aug.sampling import image_seed
from deflow_aug.transforms import Chain, MixedDegradation, RandomBlur, RandomDeFlow, RandomJPEG

# Tests that read pairs again and again are no training that forgets its epochs.
pytestmark = pytest.mark.filterwarnings("ignore:all 5 images were served once")


@pytest.fixture(scope="module")
def model() -> DeFlowDegrader:
    return degrader()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clean")
    write(path)
    return path


def rounded(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * 255).round() / 255


def test_pair_is_a_crop_and_its_degraded_downscaled_version(
    folder: Path, model: DeFlowDegrader
) -> None:
    pairs = DegradedPairs(folder, model, scale=2, patch=12, temperature=0.7, seed=3, flips=False)
    pairs.set_epoch(4)
    assert len(pairs) == len(SIDES)
    for index, picture in enumerate(pictures()):
        lq, gt = pairs[index]
        assert (lq.shape, gt.shape) == ((3, 6, 6), (3, 12, 12))
        assert lq.dtype == gt.dtype == torch.float32
        whole = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
        windows = whole.unfold(1, 12, 1).unfold(2, 12, 1)  # [3, tops, lefts, 12, 12]
        found = (windows == gt[:, None, None]).all(4).all(3).all(0).nonzero()
        assert len(found) == 1
        # The draws are documented: named by (seed, epoch, index).
        rng = generator(3, Stream.CROP, 4, index)
        assert found[0].tolist() == [int(rng.integers(side - 11)) for side in picture.shape[:2]]
        small = bicubic_downscale(gt[None], 2).clamp(0, 1)
        expected = model.degrade(small, 0.7, seed=image_seed(3, 4, index))
        assert torch.equal(lq, rounded(expected[0]))
        assert not torch.equal(lq, rounded(small[0]))


def test_temperature_is_drawn_from_the_range_for_each_image(
    folder: Path, model: DeFlowDegrader
) -> None:
    given: list[float] = []
    spy = copy.deepcopy(model)

    def degrade(image: Tensor, temperature: list[float], **rest: Any) -> Tensor:
        given.extend(temperature)
        return image

    spy.degrade = degrade  # type: ignore[method-assign]
    pairs = DegradedPairs(folder, spy, 2, 12, temperature=(0.4, 0.6))
    for epoch in range(8):
        pairs.set_epoch(epoch)
        for index in range(len(pairs)):
            pairs[index]
    assert len(set(given)) == len(given) == 40
    assert 0.4 <= min(given) < 0.42
    assert 0.58 < max(given) <= 0.6
    given.clear()
    DegradedPairs(folder, spy, 2, 12)[0]
    assert 0.5 <= given[0] <= 1.2


def test_a_domain_is_drawn_for_each_image(folder: Path) -> None:
    two = degrader(domains=("night", "day"))
    pairs = DegradedPairs(folder, two, 2, 12, domain="random", temperature=1.0)
    drawn = []
    for index in range(len(pairs)):
        lq, gt = pairs[index]
        small = bicubic_downscale(gt[None], 2).clamp(0, 1)
        drawn += [
            name
            for name in ("night", "day")
            if torch.equal(
                lq, rounded(two.degrade(small, 1.0, seed=image_seed(0, 0, index), domain=name)[0])
            )
        ]
    assert len(drawn) == len(pairs)
    assert {*drawn} == {"night", "day"}
    with pytest.raises(ValueError, match="night, day"):
        DegradedPairs(folder, two, 2, 12)


def test_flips_are_all_eight_and_leave_the_crop_alone(model: DeFlowDegrader) -> None:
    picture = pixels(7, 8, 8)
    crops = CleanCrops([Image.fromarray(picture)], 8, scale=2)
    seen = set()
    for epoch in range(64):
        crops.set_epoch(epoch)
        seen.add(crops[0]["gt"].permute(1, 2, 0).numpy().tobytes())
    turns = [np.rot90(side, k) for side in (picture, picture[:, ::-1]) for k in range(4)]
    assert seen == {np.ascontiguousarray(turn).tobytes() for turn in turns}


def test_without_a_patch_images_are_whole_up_to_a_multiple_of_the_scale(
    folder: Path, model: DeFlowDegrader
) -> None:
    pairs = DegradedPairs(folder, model, 4, None, flips=False)
    lq, gt = pairs[3]  # 21 x 23
    assert (lq.shape, gt.shape) == ((3, 5, 5), (3, 20, 20))
    assert torch.equal(gt, torch.from_numpy(pictures()[3][:20, :20]).permute(2, 0, 1) / 255)


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ("basicsr", ["lq", "gt", "lq_path", "gt_path"]),
        ("kair", ["L", "H", "L_path", "H_path"]),
    ],
)
def test_keys_of_the_frameworks(
    folder: Path, model: DeFlowDegrader, keys: str, names: list[str]
) -> None:
    plain = DegradedPairs(folder, model, 2, 12)[1]
    item = DegradedPairs(folder, model, 2, 12, keys)[1]
    assert list(item) == names
    assert same(tuple(item[name] for name in names[:2]), plain)
    assert [item[name] for name in names[2:]] == [str(folder / "photo1.png")] * 2


def test_without_a_seed_every_pair_is_new(folder: Path, model: DeFlowDegrader) -> None:
    pairs = DegradedPairs(folder, model, 2, 20, seed=None)
    assert not torch.equal(pairs[0][0], pairs[0][0])


def test_negative_index_and_end(folder: Path, model: DeFlowDegrader) -> None:
    pairs = DegradedPairs(folder, model, 2, 12)
    assert same(pairs[-1], pairs[len(SIDES) - 1])
    assert sum(1 for _ in pairs) == len(SIDES)  # ends by IndexError
    with pytest.raises(IndexError):
        pairs[-len(SIDES) - 1]


# -- transforms and steps ------------------------------------------------------------------------


def test_any_transform_degrades_with_the_draw_of_its_image(
    folder: Path, model: DeFlowDegrader
) -> None:
    other = degrader(seed=1)
    mixed = MixedDegradation([(model, 0.5), (Chain([RandomBlur(), other, RandomJPEG()]), 0.5)])
    pairs = DegradedPairs(folder, mixed, 2, 16, seed=2, flips=False)
    choices = set()
    for index in range(len(pairs)):
        lq, gt = pairs[index]
        draw = mixed.draw(image_seed(2, 0, index))
        choices.add(draw["choice"])
        small = bicubic_downscale(gt[None], 2).clamp(0, 1)
        assert torch.equal(lq, rounded(mixed.transform(small, {"images": [draw]})[0]))
    assert choices == {0, 1}
    # Nothing that the transform went through changes what it does for an index.
    first = pairs[0]
    mixed(pictures()[1])
    assert same(pairs[0], first)


def test_steps_before_and_after(folder: Path, model: DeFlowDegrader) -> None:
    plain = DegradedPairs(folder, model, 2, 12)
    darker = DegradedPairs(folder, model, 2, 12, before=lambda image: image * 0.5)
    cut_off = DegradedPairs(folder, model, 2, 12, after=[lambda image: image / 2, torch.round])
    for index in range(len(plain)):
        lq, gt = plain[index]
        assert torch.equal(darker[index][1], gt)
        assert torch.equal(cut_off[index][1], gt)
        seed, tau = image_seed(0, 0, index), generator(image_seed(0, 0, index), Stream.TEMPERATURE)
        small = bicubic_downscale(gt[None] * 0.5, 2)
        expected = model.degrade(small, [float(tau.uniform(0.5, 1.2))], seed=[seed])
        assert torch.equal(darker[index][0], rounded(expected[0]))
        assert torch.equal(cut_off[index][0], torch.round(lq / 2))


def test_steps_may_work_in_place(folder: Path, model: DeFlowDegrader) -> None:
    def darken(image: Tensor) -> Tensor:
        return image.mul_(0.5)

    lq, gt = DegradedPairs(folder, model, 2, 12, before=darken)[0]
    expected = DegradedPairs(folder, model, 2, 12, before=lambda image: image * 0.5)[0]
    assert same((lq, gt), expected)
    assert same(gt, DegradedPairs(folder, model, 2, 12)[0][1])


def test_random_steps_repeat_and_differ_from_each_other(
    folder: Path, model: DeFlowDegrader
) -> None:
    class Watched(RandomJPEG):
        def draw(self, *key: int) -> Any:
            drawn = super().draw(*key)
            seen.append(key)
            return drawn

    seen: list[tuple[int, ...]] = []
    pairs = DegradedPairs(folder, model, 2, 16, before=Watched(), after=(Watched(), Watched()))
    plain = DegradedPairs(folder, model, 2, 16)
    first = pairs[0]
    assert len(set(seen)) == 3
    assert same(pairs[0], first)
    assert not torch.equal(first[0], plain[0][0])
    assert torch.equal(first[1], plain[0][1])
    pairs.set_epoch(1)
    pairs[0]
    assert len(set(seen)) == 6


# -- epochs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_passes_without_set_epoch_are_told_once(
    folder: Path, model: DeFlowDegrader, workers: int, recwarn: pytest.WarningsRecorder
) -> None:
    def told(passes: int, **settings: Any) -> int:
        """How often, by the flag that workers share: their warnings go to their own stderr."""
        pairs = DegradedPairs(folder, model, 2, 12, "basicsr", **settings)
        if "epoch" in before:
            pairs.set_epoch(0)
        for _ in range(passes):
            list(torch.utils.data.DataLoader(pairs, None, num_workers=workers))
        if workers:
            return int(pairs.crops._epoch._value[3])
        count = sum("set_epoch was never called" in str(one.message) for one in recwarn)
        recwarn.clear()
        return count

    before: set[str] = set()
    assert told(1) == 0
    assert told(3) == 1
    assert told(2, seed=None) == 0
    before.add("epoch")
    assert told(2) == 0


def test_workers_warn_of_passes_without_set_epoch(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loader = torch.utils.data.DataLoader(
        CleanCrops(folder, 12, scale=2),
        2,
        num_workers=1,
        multiprocessing_context="fork",
        worker_init_fn=_show_warnings,
    )
    for _ in range(3):
        list(loader)
    assert capfd.readouterr().err.count("set_epoch was never called") == 1


def _show_warnings(worker: int) -> None:
    """As without pytest, which keeps warnings."""
    warnings.simplefilter("always")
    warnings.showwarning = lambda message, *rest: print(message, file=sys.__stderr__, flush=True)


def test_the_epoch_of_a_pair_is_read_once(folder: Path, model: DeFlowDegrader) -> None:
    pairs = DegradedPairs(folder, model, 2, 12)
    expected = pairs[0]
    read = pairs.crops.source.read

    def late(index: int) -> Any:
        pairs.set_epoch(1)  # while the pair is being made
        return read(index)

    pairs.crops.source.read = late  # type: ignore[method-assign]
    assert same(pairs[0], expected)


# -- pickles and copies ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda pairs: pickle.loads(pickle.dumps(pairs))],
    ids=["deepcopy", "pickle"],
)
def test_copies_give_the_same_pairs_and_have_an_epoch_of_their_own(
    folder: Path, model: DeFlowDegrader, duplicate: Callable[[DegradedPairs], DegradedPairs]
) -> None:
    pairs = DegradedPairs(
        folder, MixedDegradation([(model, 1.0)]), 2, 12, "kair", after=RandomJPEG()
    )
    pairs.set_epoch(5)
    twin = duplicate(pairs)
    assert twin.epoch == 5
    assert same([*twin], [*pairs])
    twin.set_epoch(6)
    assert pairs.epoch == 5
    assert not same(twin[0], pairs[0])


# -- bad use ---------------------------------------------------------------------------------------


class OnAGpu(DeFlowDegrader):
    """Says that it is on a GPU; there need be none."""

    device = torch.device("cuda")


def test_gpu_degrader_in_a_forked_process(folder: Path, model: DeFlowDegrader) -> None:
    degradation = Degradation(model, 2)
    gt = torch.rand(1, 3, 8, 8)
    degradation.degrader = OnAGpu.__new__(OnAGpu)
    degradation._process = os.getpid() + 1  # as after a fork
    with pytest.raises(RuntimeError, match=r"is a fork.*spawn.*num_workers=0.*DegradingLoader"):
        degradation(gt, 0, 0, [0])
    spawned = Degradation.__new__(Degradation)
    spawned.__setstate__(degradation.__dict__)  # what unpickling in a spawned worker does
    assert spawned._process == os.getpid()


def test_gpu_degrader_in_forked_workers_of_a_loader(folder: Path, model: DeFlowDegrader) -> None:
    pairs = DegradedPairs(folder, model, 2, 12)
    pairs.degradation.degrader = OnAGpu.__new__(OnAGpu)
    loader = torch.utils.data.DataLoader(pairs, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(RuntimeError, match="DegradingLoader"):
        next(iter(loader))


def test_patch_larger_than_the_image(folder: Path, model: DeFlowDegrader) -> None:
    with pytest.warns(UserWarning, match=r"4 are smaller than the patch of 24 x 24 \(photo0"):
        pairs = DegradedPairs(folder, model, 2, patch=24)
    assert [Path(pairs.crops.source.name(i)).name for i in range(len(pairs))] == ["photo2.png"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 4, "patch": 18}, "scale 4 does not divide the patch of 18.*16 and 20"),
        ({"scale": 0}, "scale must be an integer of at least 1"),
        ({"scale": 2.0}, "scale must be an integer"),
        ({"patch": -4}, "patch must be an integer"),
        ({"keys": "basicSR"}, "keys must be None, 'basicsr' or 'kair', got 'basicSR'"),
        ({"temperature": (1.2, 0.5)}, "least value no more than its greatest"),
        ({"temperature": (0.1, 0.5, 1.0)}, r"a number or \(least, greatest\)"),
        ({"temperature": torch.tensor([0.5, 1.0])}, r"a number or \(least, greatest\), got tensor"),
        ({"temperature": np.array([0.5, 1.0])}, r"a number or \(least, greatest\), got array"),
        ({"temperature": True}, r"a number or \(least, greatest\), got True"),
        ({"temperature": "hot"}, r"a number or \(least, greatest\)"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": 1.5}, "seed must be an integer of at least 0, got 1.5"),
        ({"seed": [1, 2]}, r"seed must be an integer of at least 0, got \[1, 2\]"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"domain": "fog"}, "fog"),
        ({"before": 3}, "before takes callables"),
        ({"degrader": "weights"}, "degrader must be a DeFlowDegrader or one of"),
    ],
)
def test_settings_that_do_not_fit(
    folder: Path, model: DeFlowDegrader, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        DegradedPairs(**{"clean": folder, "degrader": model, "scale": 2, "patch": 12} | settings)


def test_temperature_belongs_to_the_transform(folder: Path, model: DeFlowDegrader) -> None:
    with pytest.raises(ValueError, match="give them to the RandomDeFlow"):
        DegradedPairs(folder, RandomDeFlow(model), 2, 12, temperature=0.5)


def test_steps_that_change_the_size(folder: Path, model: DeFlowDegrader) -> None:
    pairs = DegradedPairs(folder, model, 2, 12, after=lambda image: image[:, ::2])
    with pytest.raises(ValueError, match=r"must leave lq with shape \(1, 3, 6, 6\), got"):
        pairs[0]


def test_steps_that_return_integers(folder: Path, model: DeFlowDegrader) -> None:
    pairs = DegradedPairs(folder, model, 2, 12, after=lambda image: (255 * image).byte())
    with pytest.raises(TypeError, match=r"float images in \[0, 1\], got torch.uint8"):
        pairs[0]


@pytest.mark.parametrize("epoch", [-1, 1.5, True])
def test_epochs_that_are_none(folder: Path, model: DeFlowDegrader, epoch: Any) -> None:
    with pytest.raises(ValueError, match="an epoch is an integer"):
        DegradedPairs(folder, model, 2, 12).set_epoch(epoch)


# -- feed ---------------------------------------------------------------------------------------


def test_feed_makes_the_same_pairs_in_batches(folder: Path, model: DeFlowDegrader) -> None:
    pairs = DegradedPairs(folder, model, 2, 12, temperature=(0.3, 0.9), seed=8)
    pairs.set_epoch(2)
    expected_lq, expected_gt = (torch.stack(half) for half in zip(*pairs, strict=True))
    lq, gt = model.feed(expected_gt, 2, (0.3, 0.9), seed=8, step=2)
    assert torch.equal(gt, expected_gt)
    # Batched sums round differently, which now and then tips a value over to the next of 255.
    assert (lq - expected_lq).abs().max() < 1.01 / 255
    assert (lq != expected_lq).float().mean() < 0.01
    turned, _ = model.feed(gt.flip(0), 2, (0.3, 0.9), seed=8, step=2, indices=[4, 3, 2, 1, 0])
    assert (turned.flip(0) - lq).abs().max() < 1.01 / 255
    from_bytes, gt_of_bytes = model.feed((gt * 255).byte(), 2, (0.3, 0.9), seed=8, step=2)
    assert torch.equal(gt_of_bytes, gt)
    assert torch.equal(from_bytes, lq)
    for numbers in (torch.arange(5), np.arange(5), list(torch.arange(5))):
        named, _ = model.feed(gt, 2, (0.3, 0.9), seed=8, step=2, indices=numbers)
        assert torch.equal(named, lq)


def test_feed_draws_anew_by_step_and_without_a_seed(model: DeFlowDegrader) -> None:
    gt = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    first = model.feed(gt, 2, seed=1)[0]
    assert torch.equal(model.feed(gt, 2, seed=1)[0], first)
    assert not torch.equal(model.feed(gt, 2, seed=1, step=1)[0], first)
    assert not torch.equal(model.feed(gt, 2)[0], model.feed(gt, 2)[0])
    assert not first.requires_grad
    assert not first.is_inference()


def test_feed_takes_a_temperature_of_each_image(model: DeFlowDegrader) -> None:
    gt = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    lq, _ = model.feed(gt, 2, torch.tensor([0.0, 1.0]), seed=1)
    assert torch.equal(model.feed(gt, 2, np.array([0.0, 1.0]), seed=1)[0], lq)
    small = rounded(bicubic_downscale(gt, 2))
    assert (lq[0] - small[0]).abs().max() < 1.01 / 255
    assert (lq[1] - small[1]).abs().max() > 2 / 255


@pytest.mark.parametrize(
    ("gt", "settings", "message"),
    [
        (torch.rand(3, 8, 8), {}, r"\[B, 3, H, W\], got \(3, 8, 8\)"),
        (torch.rand(2, 1, 8, 8), {}, r"\[B, 3, H, W\]"),
        (np.zeros((2, 8, 8, 3)), {}, r"\[B, 3, H, W\]"),
        (torch.rand(2, 3, 8, 9), {}, "scale 4 does not divide the 8 x 9 pixels"),
        (torch.rand(2, 3, 8, 8) * 2 - 1, {}, "undo the normalisation"),
        (torch.rand(2, 3, 8, 8), {"temperature": torch.ones(3)}, "2 numbers"),
        (torch.rand(2, 3, 8, 8), {"temperature": [1.0, 1.0, 1.0]}, "a number or"),
        (torch.rand(2, 3, 8, 8), {"temperature": True}, "a number or"),
        (torch.rand(2, 3, 8, 8), {"temperature": None}, "a number or"),
        (torch.rand(2, 3, 8, 8), {"seed": [1, 2]}, r"seed must be an integer.*got \[1, 2\]"),
        (torch.rand(2, 3, 8, 8), {"seed": -1}, "seed must be an integer of at least 0, got -1"),
        (torch.rand(2, 3, 8, 8), {"seed": True}, "seed must be an integer"),
        (torch.rand(2, 3, 8, 8), {"step": -1}, "step must be an integer"),
        (torch.rand(2, 3, 8, 8), {"indices": [0, -1]}, "an index must be an integer"),
        (torch.rand(2, 3, 8, 8), {"indices": [1]}, "expected 2 indices"),
        (torch.rand(2, 3, 8, 8), {"scale": "4"}, "scale must be an integer"),
    ],
)
def test_feed_refuses(
    model: DeFlowDegrader, gt: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.feed(gt, **settings)
