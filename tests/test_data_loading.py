"""Decoding beside the training: worker processes and caches, which change no result."""

import multiprocessing
import os
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deflow_aug.data import loading, pictures
from deflow_aug.data.batches import Batch
from deflow_aug.data.folders import CropFolder, DataError
from deflow_aug.data.loading import loader
from deflow_aug.data.unpaired import UnpairedBatches


def write_noise(path: Path, seed: int, side: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_broken(path: Path) -> None:
    write_noise(path, 9)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name in ("clean", "degraded"):
        for number in range(4):
            write_noise(tmp_path / name / f"{number}.png", number + 10 * len(name))
    return tmp_path


def make(root: Path, **settings: object) -> UnpairedBatches:
    domains = {
        name: CropFolder(root / name, crop=16, align=4, downscale=2, **settings)  # type: ignore[arg-type]
        for name in ("clean", "degraded")
    }
    return UnpairedBatches(domains, batch_size=4, seed=5)


def same(one: list[Batch], other: list[Batch]) -> bool:
    assert [b.step for b in one] == [b.step for b in other]
    assert [b.domains for b in one] == [b.domains for b in other]
    return all(torch.equal(a.images, b.images) for a, b in zip(one, other, strict=True))


def test_workers_change_nothing(folders: Path) -> None:
    write_broken(folders / "clean" / "broken.jpg")
    write_broken(folders / "degraded" / "broken.jpg")
    alone, helped = make(folders), make(folders)
    with pytest.warns(UserWarning, match=r"broken\.jpg"):
        expected = list(loader(alone, 3, 12))
    with pytest.warns(UserWarning, match=r"broken\.jpg") as warned:
        made = list(loader(helped, 3, 12, workers=2))
    assert [batch.step for batch in made] == list(range(3, 15))
    assert same(made, expected)
    assert len(warned) == 2  # each file once, though both workers found it
    assert helped.domains["clean"].facts() == alone.domains["clean"].facts()
    # Taken up in the middle, as one of two processes.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = [list(loader(make(folders), 9, 6, (n, 2), workers=n)) for n in range(2)]
    for whole, first, second in zip(expected[6:], *parts, strict=True):
        assert torch.equal(torch.cat([first.images, second.images]), whole.images)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_worker_is_ours(folders: Path, workers: int) -> None:
    for name in ("clean", "degraded"):
        for path in (folders / name).iterdir():
            write_broken(path)
    batches = make(folders)
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(DataError, match=r"^none of the 4 images"),
    ):
        list(loader(batches, 0, 2, workers=workers))
    with pytest.raises(DataError, match=r"^none of the 4 images"):
        batches.batch(0)  # all known by now
    with pytest.raises(DataError, match=r"^a batch of 4 cannot be shared by 5"):
        list(loader(make(folders), 0, 2, (0, 5), workers=workers))
    with pytest.raises(ValueError, match="workers must be >= 0"):
        list(loader(make(folders), 0, 2, workers=-1))


def test_the_memory_is_shared_out_among_workers(folders: Path) -> None:
    class Spy(UnpairedBatches):
        def batch(self, step: int, part: tuple[int, int] = (0, 1)) -> Batch:
            made = super().batch(step, part)
            return Batch(made.images, (str(self.domains["clean"].pictures.cache_bytes),), (0,), 0)

    batches = Spy(make(folders, cache_bytes=1000).domains, 2, seed=0)
    assert next(loader(batches, 0, 1)).domains == ("1000",)
    assert next(loader(batches, 0, 1, workers=2)).domains == ("500",)


def test_a_memory_bound_is_kept_and_changes_nothing(folders: Path) -> None:
    one = 3 * 24 * 24  # bytes of an image, downscaled
    whole, bound, none = (make(folders, cache_bytes=n * one) for n in (4, 2, 0))
    expected = list(loader(whole, 0, 8))
    assert same(list(loader(bound, 0, 8)), expected)
    assert same(list(loader(none, 0, 8)), expected)
    for batches, most in ((whole, 4), (bound, 2), (none, 0)):
        kept = batches.domains["clean"].pictures
        assert len(kept.kept) == most
        assert kept.kept_bytes == sum(p.pixels.nbytes for p in kept.kept.values()) == most * one


def test_the_cache_on_disk_saves_decoding_and_changes_nothing(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(loader(make(folders), 0, 8))
    cache = tmp_path / "new" / "cache"
    assert same(list(loader(make(folders, cache_dir=cache), 0, 8, workers=2)), expected)
    stored = sorted(cache.iterdir())
    assert len(stored) == 8  # each image once
    assert {path.suffix for path in stored} == {".npy"}

    def fail(path: Path) -> np.ndarray:
        raise AssertionError(f"{path} is decoded again")

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "decode", fail)
        assert same(list(loader(make(folders, cache_dir=cache), 0, 8)), expected)
        with pytest.raises(AssertionError, match="decoded again"):
            CropFolder(folders / "clean", 16, 4, downscale=3, cache_dir=cache).draw(0)
    # A damaged entry is made anew, and an image that has changed is another one.
    stored[0].write_bytes(stored[0].read_bytes()[:100])
    stored[1].write_bytes(b"")
    assert same(list(loader(make(folders, cache_dir=cache), 0, 8)), expected)
    assert stored[0].stat().st_size == stored[2].stat().st_size
    write_noise(folders / "clean" / "0.png", 77)
    changed = list(loader(make(folders), 0, 8))
    assert not same(changed, expected)
    assert same(list(loader(make(folders, cache_dir=cache), 0, 8)), changed)


def test_few_maps_are_held_open(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "OPEN_MAPS", 2)
    crops = CropFolder(folders / "clean", 16, 4, cache_dir=tmp_path / "cache")
    for key in range(20):
        crops.draw(key)
    assert len(crops.pictures.kept) == 2


def test_a_full_disk_ends_the_cache_and_not_the_training(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(loader(make(folders), 0, 8))
    monkeypatch.setattr(pictures, "SPARE_BYTES", 2**62)
    batches = make(folders, cache_dir=tmp_path / "cache")
    with pytest.warns(UserWarning, match="takes no more decoded images") as warned:
        assert same(list(loader(batches, 0, 8)), expected)
    assert len(warned) == 2  # once for each folder
    assert not list((tmp_path / "cache").iterdir())
    assert len(batches.domains["clean"].pictures.kept) == 4  # in memory then


def test_a_write_that_fails_leaves_nothing_behind(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: object, *_: object, **__: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures.np, "save", full)
    crops = CropFolder(folders / "clean", 16, 4, cache_dir=tmp_path / "cache")
    with pytest.warns(UserWarning, match="No space left"):
        crops.draw(0)
    assert not list((tmp_path / "cache").iterdir())


def test_what_killed_runs_were_writing_is_removed(folders: Path, tmp_path: Path) -> None:
    import os

    cache = tmp_path / "cache"
    cache.mkdir()
    old, new = cache / ".old.tmp", cache / ".new.tmp"
    old.write_bytes(b"half")
    new.write_bytes(b"half")  # another run may be writing it right now
    os.utime(old, (0, 0))
    CropFolder(folders / "clean", 16, 4, cache_dir=cache)
    assert [path.name for path in cache.iterdir()] == [".new.tmp"]


def test_signals_to_workers_that_are_just_starting_end_none(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From when PyTorch has them die of SIGTERM until they ignore it."""
    honest = loading._start_worker

    def start(number: int) -> None:
        for one in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), one)
        honest(number)

    monkeypatch.setattr(loading, "_start_worker", start)
    started = list(loader(make(folders), 0, 4, workers=2))
    assert same(started, list(loader(make(folders), 0, 4)))


def test_signals_to_all_processes_end_no_worker(folders: Path) -> None:
    """As a terminal sends Ctrl-C, and schedulers SIGTERM."""
    batches = loader(make(folders), 0, 40, workers=2)
    first = [next(batches), next(batches)]  # of one worker each, which has started by then
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM):
            assert worker.pid is not None
            os.kill(worker.pid, number)
    assert same([*first, *batches], list(loader(make(folders), 0, 40)))
    assert not multiprocessing.active_children()
