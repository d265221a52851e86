"""DegradingLoader: batches of anyone's loader with lq added, one ahead."""

from __future__ import annotations

import concurrent.futures
import copy
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from clean_images import SIDES, degrader, global_states, pixels, same, write
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler, Subset, TensorDataset

from deflow_aug import CleanCrops, DeFlowDegrader, DegradedPairs, DegradingLoader
from deflow_aug.pairs.loader import _Maker, _one_ahead
from deflow_aug.resize import bicubic_downscale
from deflow_aug.transforms import Chain, MixedDegradation, RandomJPEG

IMAGES = 7


@pytest.fixture(scope="module")
def model() -> DeFlowDegrader:
    return degrader()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clean")
    write(path)
    return path


@pytest.fixture(scope="module")
def images() -> Tensor:
    """uint8 [7, 3, 12, 12]."""
    return torch.stack(
        [torch.from_numpy(pixels(n, 12, 12)).permute(2, 0, 1) for n in range(IMAGES)]
    )


def close(first: Tensor, second: Tensor) -> bool:
    """Whether they are equal up to rounding, which may tip a value over to the next of 255.

    (Sums of batches of different sizes are rounded differently.)
    """
    difference = (first - second).abs()
    return bool(difference.max() < 1.01 / 255 and (difference > 0).float().mean() < 0.01)


def joined(batches: Any) -> tuple[Tensor, Tensor]:
    """lq and gt of all batches."""
    lq, gt = zip(*((batch[0], batch[1]) for batch in batches), strict=True)
    return torch.cat(lq), torch.cat(gt)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("transform", [False, True], ids=["degrader", "transform"])
def test_the_same_pairs_as_made_one_by_one(
    folder: Path, model: DeFlowDegrader, ahead: bool, workers: int, transform: bool
) -> None:
    what: Any = model
    if transform:
        what = MixedDegradation([(model, 0.5), (Chain([model, RandomJPEG()]), 0.5)])
    pairs = DegradedPairs(folder, what, 2, 12, "basicsr", seed=5)
    crops = CleanCrops(folder, 12, scale=2, seed=5)
    shuffle = torch.Generator().manual_seed(1)
    loader = DegradingLoader(
        DataLoader(
            crops,
            2,
            shuffle=True,
            generator=shuffle,
            num_workers=workers,
            persistent_workers=workers > 0,
        ),
        what,
        2,
        "basicsr",
        seed=5,
        ahead=ahead,
    )
    assert len(loader) == 3
    for epoch in (4, 5, 2):
        if epoch != 5:  # which follows by itself
            loader.set_epoch(epoch)
        pairs.set_epoch(epoch)
        numbers = []
        for batch in loader:
            assert set(batch) == {"lq", "gt", "lq_path", "gt_path", "index"}
            for i, number in enumerate(batch["index"].tolist()):
                numbers.append(number)
                one = pairs[number]
                assert close(batch["lq"][i], one["lq"])
                assert torch.equal(batch["gt"][i], one["gt"])
                assert batch["lq_path"][i] == batch["gt_path"][i] == one["gt_path"]
        assert sorted(numbers) == list(range(len(SIDES)))


@pytest.mark.parametrize("ahead", [False, True])
def test_batch_size_does_not_matter_without_numbers_either(
    images: Tensor, model: DeFlowDegrader, ahead: bool
) -> None:
    def loaded(size: int) -> tuple[Tensor, Tensor]:
        batches = DataLoader(TensorDataset(images), size)
        return joined(DegradingLoader(batches, model, 2, seed=3, ahead=ahead))

    lq, gt = loaded(1)
    assert torch.equal(gt, images / 255)
    for size in (2, 3, IMAGES):
        again, gt_again = loaded(size)
        assert close(again, lq)
        assert torch.equal(gt_again, gt)
    same_image = [images[:1].repeat(2, 1, 1, 1)] * 2
    twins, _ = joined(DegradingLoader(same_image, model, 2, ahead=ahead))
    assert len({twin.numpy().tobytes() for twin in twins}) == 4


def test_two_processes_with_a_distributed_sampler(images: Tensor, model: DeFlowDegrader) -> None:
    def loaded(processes: int, rank: int) -> tuple[Tensor, Tensor]:
        data = TensorDataset(images[:6])
        sampler = DistributedSampler(data, processes, rank, shuffle=True, seed=1)
        loader = DegradingLoader(DataLoader(data, 2, sampler=sampler), model, 2)
        loader.set_epoch(3)
        assert sampler.epoch == 3
        return joined(loader)

    lq, gt = loaded(1, 0)
    for rank in range(2):
        own_lq, own_gt = loaded(2, rank)
        assert torch.equal(own_gt, gt[rank::2])
        assert close(own_lq, lq[rank::2])


def test_processes_of_a_group_without_such_a_sampler(
    images: Tensor, model: DeFlowDegrader, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, _ = joined(DegradingLoader([images], model, 2))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    second, _ = joined(DegradingLoader([images[1::2]], model, 2))
    assert close(second, alone[1::2])


def test_each_pass_is_an_epoch(images: Tensor, model: DeFlowDegrader) -> None:
    loader = DegradingLoader([images], model, 2)
    passes = [joined(loader)[0] for _ in range(3)]
    assert loader.epoch == 3
    assert not any(torch.equal(passes[i], passes[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    loader.set_epoch(1)
    assert torch.equal(joined(loader)[0], passes[1])
    assert torch.equal(joined(loader)[0], passes[2])
    fresh = DegradingLoader([images], model, 2, seed=None)
    fresh.set_epoch(0)
    first = joined(fresh)[0]
    fresh.set_epoch(0)
    assert not torch.equal(joined(fresh)[0], first)


def test_crops_follow_the_epoch(folder: Path, model: DeFlowDegrader) -> None:
    crops = CleanCrops(folder, 12, scale=2)
    crops.set_epoch(6)
    loader = DegradingLoader(DataLoader(crops, 5), model, 2)
    first, second = ([batch["gt"] for batch in loader] for _ in range(2))
    assert not same(first, second)
    loader.set_epoch(6)
    assert same([batch["gt"] for batch in loader], first)


def test_everyone_who_counts_epochs_is_told(images: Tensor, model: DeFlowDegrader) -> None:
    class Counting(list[Any]):
        """Such as the loaders of accelerate, which count by themselves and can be told."""

        told: int | None = None

        def set_epoch(self, epoch: int) -> None:
            self.told = epoch

    inner = Counting([images])
    inner.dataset = inner.sampler = Counting()  # type: ignore[attr-defined]
    inner.batch_sampler = Counting()  # type: ignore[attr-defined]
    DegradingLoader(inner, model, 2).set_epoch(3)
    assert [inner.told, inner.dataset.told, inner.batch_sampler.told] == [3, 3, 3]  # type: ignore[attr-defined]


def wrapped_in_a_subset(folder: Path, seed: int) -> tuple[Any, list[CleanCrops]]:
    crops = CleanCrops(folder, 12, scale=2, seed=seed)
    return Subset(Subset(crops, [3, 0, 1]), [2, 0]), [crops]


def joined_crops(folder: Path, seed: int) -> tuple[Any, list[CleanCrops]]:
    crops = [CleanCrops(folder, 12, scale=2, seed=seed + number) for number in range(2)]
    return ConcatDataset([crops[0], Subset(crops[1], [0, 1])]), crops


@pytest.mark.parametrize("wrap", [wrapped_in_a_subset, joined_crops])
def test_epochs_reach_wrapped_datasets(folder: Path, model: DeFlowDegrader, wrap: Any) -> None:
    data, crops = wrap(folder, 0)
    loader = DegradingLoader(DataLoader(data, 2), model, 2)
    passes = [[batch["gt"] for batch in loader] for _ in range(2)]
    assert [one.epoch for one in crops] == [1] * len(crops)
    assert not same(passes[0], passes[1])
    loader.set_epoch(0)
    assert [one.epoch for one in crops] == [0] * len(crops)
    assert same([batch["gt"] for batch in loader], passes[0])
    crops[0].set_epoch(6)
    assert DegradingLoader(DataLoader(data, 2), model, 2).epoch == 6


def test_joined_datasets_share_no_noise(model: DeFlowDegrader) -> None:
    """Though the first image of each has number 0."""
    grey = torch.full((3, 12, 12), 120, dtype=torch.uint8)
    data = ConcatDataset([CleanCrops([grey], 12, scale=2) for _ in range(3)])
    for size in (1, 3):
        batches = [*DegradingLoader(DataLoader(data, size), model, 2)]
        lq = torch.cat([batch["lq"] for batch in batches])
        assert len({one.numpy().tobytes() for one in lq}) == 3


# -- kinds of batches ------------------------------------------------------------------------------


def test_kinds_of_batches(images: Tensor, model: DeFlowDegrader) -> None:
    labels, float_images = torch.arange(IMAGES), images / 255
    lq = joined(DegradingLoader([images], model, 2))[0]
    small = bicubic_downscale(float_images, 2)
    assert (lq - small).abs().mean() > 1 / 255

    def first(batch: Any, keys: str | None = None) -> Any:
        return next(iter(DegradingLoader([batch], model, 2, keys)))

    assert same(first(float_images), (lq, float_images))
    assert same(first([images, labels]), (lq, float_images, labels))
    assert same(first((labels, images)), (lq, float_images, labels))
    assert same(
        first({"picture": images, "label": labels}),
        {"picture": float_images, "label": labels, "lq": lq},
    )
    assert same(first(images, "basicsr"), {"lq": lq, "gt": float_images})
    assert same(first((images, labels), "kair"), {"L": lq, "H": float_images})
    named = {"mask": images, "gt": images, "gt_path": ["a"] * IMAGES}
    assert same(
        first(named, "kair"),
        {
            "mask": images,
            "L": lq,
            "H": float_images,
            "L_path": ["a"] * IMAGES,
            "H_path": ["a"] * IMAGES,
        },
    )


def test_index_of_a_batch_names_its_draws(images: Tensor, model: DeFlowDegrader) -> None:
    plain = joined(DegradingLoader([images], model, 2))[0]
    turned = {"image": images.flip(0), "index": list(range(IMAGES))[::-1]}
    (batch,) = DegradingLoader([turned], model, 2)
    assert close(batch["lq"].flip(0), plain)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.rand(3, 8, 8), r"\[B, 3, H, W\].*got a tensor \(3, 8, 8\)"),
        ({"image": [torch.rand(3, 8, 8)], "label": 3}, "{'image': 'list', 'label': 'int'}"),
        ("photo.png", "got str"),
        (torch.rand(2, 8, 8, 3), r"channels look to be last: images\.permute\(0, 3, 1, 2\)"),
        (torch.rand(2, 3, 8, 9), "scale 2 does not divide the 8 x 9 pixels"),
        (torch.randn(2, 3, 8, 8) * 5, "undo the normalisation"),
        ({"gt": torch.rand(2, 3, 8, 8), "index": [1]}, 'has 2 images, but 1 in "index"'),
    ],
)
@pytest.mark.parametrize("ahead", [False, True])
def test_batches_that_do_not_fit(
    model: DeFlowDegrader, batch: Any, message: str, ahead: bool
) -> None:
    with pytest.raises(ValueError, match=message):
        next(iter(DegradingLoader([batch], model, 2, ahead=ahead)))


def test_settings_that_do_not_fit(images: Tensor, model: DeFlowDegrader) -> None:
    with pytest.raises(ValueError, match="keys must be None"):
        DegradingLoader([images], model, 2, "KAIR")
    with pytest.raises(TypeError, match="degrader must be"):
        DegradingLoader([images], lambda image: image, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="an epoch is an integer"):
        DegradingLoader([images], model, 2).set_epoch(-1)
    for seed in (-1, 1.5, [1, 2]):
        with pytest.raises(ValueError, match="seed must be an integer of at least 0"):
            DegradingLoader([images], model, 2, seed=seed)  # type: ignore[arg-type]
    for temperature in (torch.tensor([0.5, 1.0]), True, (0.1, 0.5, 1.0)):
        with pytest.raises(ValueError, match=r"temperature must be a number or \(least, greatest"):
            DegradingLoader([images], model, 2, temperature=temperature)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="has no len"):
        len(DegradingLoader(iter([images]), model, 2))


# -- one batch ahead -------------------------------------------------------------------------------


class Watched(DeFlowDegrader):
    """Tells when it has made a batch, and in which thread."""

    def feed(self, *args: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        made = super().feed(*args, **settings)
        self.threads.append(threading.current_thread())
        self.made.release()
        return made


@pytest.fixture
def watched(model: DeFlowDegrader) -> Watched:
    one = Watched(model.model, device="cpu")
    one.threads, one.made = [], threading.Semaphore(0)
    return one


def test_the_next_batch_is_made_while_the_caller_has_the_last(
    images: Tensor, watched: Watched
) -> None:
    fetched: list[threading.Thread] = []

    def batches() -> Iterator[Tensor]:
        for start in range(0, 6, 2):
            fetched.append(threading.current_thread())
            yield images[start : start + 2]

    taken = []
    for number, pair in enumerate(DegradingLoader(batches(), watched, 2, ahead=True), 1):
        taken.append(pair)
        for _ in range(2 if number == 1 else int(number < 3)):
            # The batch after this one gets done although nobody has asked for it.
            assert watched.made.acquire(timeout=60)
    assert not watched.made.acquire(blocking=False)
    assert same(taken, [*DegradingLoader(images[:6].split(2), watched, 2, ahead=False)])
    main = threading.current_thread()
    assert [thread is main for thread in watched.threads] == [False] * 3 + [True] * 3
    assert all(thread is main for thread in fetched)


def test_on_a_cpu_nothing_is_made_ahead(images: Tensor, watched: Watched) -> None:
    loader = iter(DegradingLoader(images.split(2), watched, 2))
    next(loader)
    assert watched.threads == [threading.current_thread()]


def test_leaving_early_ends_the_thread(images: Tensor, watched: Watched) -> None:
    loader = iter(DegradingLoader(images.split(2), watched, 2, ahead=True))
    next(loader)
    (thread,) = {*watched.threads}
    assert thread.is_alive()
    loader.close()  # type: ignore[attr-defined]
    assert not thread.is_alive()


def test_errors_of_the_loader_come_through(images: Tensor, model: DeFlowDegrader) -> None:
    def batches() -> Iterator[Tensor]:
        yield images
        raise OSError("disk is gone")

    loader = iter(DegradingLoader(batches(), model, 2, ahead=True))
    first = next(loader)  # made before, and not lost
    assert same(first, next(iter(DegradingLoader([images], model, 2))))
    with pytest.raises(OSError, match="disk is gone"):
        next(loader)


def test_leaving_does_not_wait_for_what_is_queued(images: Tensor, watched: Watched) -> None:
    started, go_on = threading.Event(), threading.Event()
    feed = watched.feed

    def held_up(*args: Any, **settings: Any) -> Any:
        started.set()
        assert go_on.wait(60)
        return feed(*args, **settings)

    def batches() -> Iterator[Tensor]:
        yield images[:2]
        assert started.wait(60)
        yield images[2:4]
        yield images[4:6]

    watched.feed = held_up  # type: ignore[method-assign]
    interrupted = _one_ahead(batches(), _Maker(DegradingLoader([], watched, 2), 0), None)
    future = concurrent.futures.Future.result

    def ctrl_c(job: Any, timeout: Any = None) -> Any:
        threading.Timer(0.2, go_on.set).start()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concurrent.futures.Future, "result", ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            next(interrupted)
    assert concurrent.futures.Future.result is future
    assert len(watched.threads) == 1  # the second, which was queued, is not made


@pytest.mark.parametrize("ahead", [False, True])
def test_no_global_random_state_is_touched(
    images: Tensor, model: DeFlowDegrader, ahead: bool
) -> None:
    before = global_states()
    list(DegradingLoader([images, images], model, 2, after=RandomJPEG(), ahead=ahead))
    assert same(global_states(), before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(images: Tensor, model: DeFlowDegrader, duplicate: Any) -> None:
    loader = DegradingLoader(DataLoader(TensorDataset(images), 3), model, 2)
    loader.set_epoch(2)
    assert same([*duplicate(loader)], [*loader])


def test_one_stream_for_all_passes(
    images: Tensor, model: DeFlowDegrader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for CUDA's streams."""

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __reduce__(self) -> Any:
            raise TypeError("a stream belongs to its process")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    loader = DegradingLoader([images], model, 2)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert loader._stream_on(torch.device("cpu")) is None
    stream = loader._stream_on(first)
    assert loader._stream_on(first) is stream
    assert pickle.loads(pickle.dumps(loader))._stream is None
    assert copy.deepcopy(loader)._stream is None
    moved = loader._stream_on(second)
    assert moved is not None
    assert moved.device == second


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("pinned", [False, True])
def test_on_a_gpu(folder: Path, pinned: bool) -> None:
    """On a stream of its own, the same as on the stream of the caller, whose memory is at work."""
    model = degrader().to("cuda")
    crops = CleanCrops([*sorted(folder.iterdir())] * 6, 16, scale=2)
    results = []
    for ahead in (False, True):
        batches = DataLoader(crops, 3, num_workers=1, pin_memory=pinned)
        loader = DegradingLoader(batches, model, 2, "basicsr", ahead=ahead)
        taken = []
        for batch in loader:
            assert batch["lq"].is_cuda
            assert batch["gt"].is_cuda
            work = torch.rand(512, 512, device="cuda")
            for _ in range(20):  # keeps the caller's stream busy
                work = (work @ work).clamp(0, 1)
            taken.append((batch["lq"] + 0, batch["gt"] + 0))  # read late, then let go of
        results.append(joined(taken))
    assert torch.equal(results[0][1], results[1][1])
    assert close(results[0][0], results[1][0])
    on_gpu = [(batch["gt"].cuda()) for batch in DataLoader(crops, 3)]
    assert torch.equal(joined(DegradingLoader(on_gpu, model, 2))[1], results[0][1])
