"""Where clean images come from: files, LMDB, WebDataset shards, anyone's dataset."""

from __future__ import annotations

import copy
import io
import pickle
import re
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
import webdataset
from clean_images import SIDES, degrader, pictures, pixels, same, write
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    TensorDataset,
    get_worker_info,
)

from deflow_aug import CleanCrops, DeFlowDegrader, DegradedPairs, StreamedPairs
from deflow_aug.data.pictures import DataError
from deflow_aug.image_files import UnreadableImageError
from deflow_aug.pairs import lmdb_images
from deflow_aug.pairs.epoch import MOST_WORKERS, SharedEpoch

# Four workers on fewer cores are slow, not wrong.
# Nor do tests that read images again forget their epochs.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create", "ignore:all . images were served once"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clean")
    write(path / "photos")
    return path / "photos"


@pytest.fixture(scope="module")
def model() -> DeFlowDegrader:
    return degrader()


def crops(clean: Any, **settings: Any) -> list[Tensor]:
    return [item["gt"] for item in CleanCrops(clean, 12, scale=2, **settings)]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[Tensor]:
    return crops(folder)


def encoded(picture: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


# -- files -------------------------------------------------------------------------------------


def test_folders_lists_and_lists_in_files(folder: Path, expected: list[Tensor]) -> None:
    files = sorted(folder.iterdir())
    listing = folder.parent / "list.txt"
    listing.write_text("".join(f"photos/{file.name}\n" for file in files) + "\n", "utf-8")
    assert same(crops(str(folder)), expected)
    assert same(crops(files), expected)
    assert same(crops([str(file) for file in files]), expected)
    assert same(crops(listing), expected)
    assert not same(crops(files[::-1])[::-1], expected)  # a number names a draw, not a file


def test_subfolders_are_searched_and_what_cannot_be_used_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b")
    (tmp_path / "a" / "broken.png").write_bytes(b"no image")
    (tmp_path / "a" / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    Image.fromarray(pixels(9, 8, 40)).save(tmp_path / "flat.png")
    with pytest.warns(UserWarning, match=r"of 8 images.*2 cannot be read.*broken\.png.*1 are sm"):
        data = CleanCrops(tmp_path, 12, scale=2)
    assert len(data) == len(SIDES)


@pytest.mark.parametrize("kind", ["folder", "list", "nothing that fits"])
def test_no_images(tmp_path: Path, kind: str) -> None:
    clean: Any = tmp_path
    if kind == "list":
        clean = []
    elif kind == "nothing that fits":
        Image.fromarray(pixels(1, 10, 40)).save(tmp_path / "flat.png")
    message = {"folder": "no image files in", "list": "no images in the list"}
    with pytest.raises(DataError, match=message.get(kind, "use a smaller patch or larger images")):
        CleanCrops(clean, 12, scale=2)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        CleanCrops(tmp_path / "nowhere", 12, scale=2)


def test_patch_larger_than_an_image_of_a_list(folder: Path) -> None:
    data = CleanCrops(sorted(folder.iterdir()), 24, scale=2)
    assert data[2]["gt"].shape == (3, 24, 24)
    with pytest.raises(DataError, match=r"larger than the image: .*photo0\.png has 20 x 24 pixels"):
        data[0]


def test_a_file_that_breaks_off_is_named(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "photo0.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    data = CleanCrops(tmp_path, 12, scale=2)
    with (
        pytest.warns(UserWarning, match=r"half\.png is skipped"),
        pytest.raises(DataError, match=r"none of the 1 clean images can be read.*half\.png"),
    ):
        data[0]


@pytest.mark.parametrize("seed", [0, None])
def test_damaged_files_are_skipped(folder: Path, tmp_path: Path, seed: int | None) -> None:
    paths = write(tmp_path)
    for broken in paths[:2]:
        whole = broken.read_bytes()
        broken.write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flat.tif").write_bytes(b"")
    files = [*paths, tmp_path / "gone.png"]
    data = CleanCrops(files, 12, scale=2, seed=seed)
    with pytest.warns(UserWarning, match=r"photo0\.png is skipped .*: 1 so far") as told:
        items = [data[index] for index in range(6)]
    assert sum("skipped" in str(one.message) for one in told) == 1
    assert data.skipped == 3
    assert [item["index"] for item in items] == list(range(6))
    assert {Path(item["gt_path"]).name for item in items} == {f"photo{n}.png" for n in (2, 3, 4)}
    if seed is None:
        return
    # Which one stands in depends on (seed, epoch, index) alone, whoever makes it.
    backwards = CleanCrops(files, 12, scale=2)
    with pytest.warns(UserWarning, match="is skipped"):
        turned = [backwards[index] for index in range(5, -1, -1)]
    assert same(turned[::-1], items)
    shared = CleanCrops(files, 12, scale=2)
    made = [*DataLoader(shared, None, num_workers=2, multiprocessing_context="fork")]
    assert same(made, items)
    assert shared.skipped >= 3
    assert len({data.item(0, epoch)["gt_path"] for epoch in range(20)}) == 3


def test_errors_of_anyones_dataset_come_through() -> None:
    class Failing(Items):
        def __getitem__(self, index: int) -> Any:
            raise ValueError("my own mistake")

    with pytest.raises(ValueError, match="my own mistake"):
        CleanCrops(Failing([1, 2]), 12, scale=2)[0]


def test_kinds_of_files(tmp_path: Path) -> None:
    """Grey, palette, alpha and 16 bits all become 8-bit RGB."""
    picture = pixels(3, 16, 16)
    Image.fromarray(picture[..., 0]).save(tmp_path / "a.png")
    Image.fromarray(np.concatenate([picture, picture[..., :1]], -1)).save(tmp_path / "b.png")
    Image.fromarray(picture[..., 0].astype(np.uint16) * 257).save(tmp_path / "c.png")
    grey, alpha, deep = crops(tmp_path, flips=False)
    assert {image.dtype for image in (grey, alpha, deep)} == {torch.uint8}
    channels = torch.from_numpy(picture).permute(2, 0, 1)
    for image, whole in ((grey, channels[:1]), (alpha, channels), (deep, channels[:1])):
        windows = whole.unfold(1, 12, 1).unfold(2, 12, 1)
        assert (windows == image[:, None, None]).all(4).all(3).all(0).any()


# -- datasets -----------------------------------------------------------------------------------


class Items(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def channels_first(picture: Any) -> Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)


@pytest.mark.parametrize(
    "item",
    [
        Image.fromarray,
        np.asarray,
        channels_first,
        lambda picture: channels_first(picture).float() / 255,
        lambda picture: (Image.fromarray(picture), 3),
        lambda picture: [7, channels_first(picture), np.zeros((4, 4, 3), np.uint8)],
        lambda picture: {"label": 3, "box": torch.zeros(4), "image": picture},
    ],
    ids=["PIL", "array", "tensor", "float tensor", "tuple", "list", "dict"],
)
def test_items_of_any_dataset(item: Any, expected: list[Tensor]) -> None:
    assert same(crops(Items([item(picture) for picture in pictures()])), expected)


def test_plain_lists_and_tensor_datasets(expected: list[Tensor]) -> None:
    assert same(crops([Image.fromarray(picture) for picture in pictures()]), expected)
    batch = torch.stack([channels_first(pixels(number, 16, 16)) for number in range(3)])
    assert same(crops(TensorDataset(batch)), crops(batch))


@pytest.mark.parametrize(
    ("clean", "message"),
    [
        (Items([]), "the Items of clean images is empty"),
        (Items(["a.png"]), "a tuple or dict with one, got str"),
        (Items([{"label": 3}]), "holds no image: {'label': 'int'}"),
        (Items([(1, "a")]), "holds no image: {0: 'int', 1: 'str'}"),
        (Items([torch.rand(2, 3, 16, 16)]), "got Tensor"),
        (Items([torch.rand(16, 17, 3)]), r"got \(16, 17, 3\).*permute\(2, 0, 1\)"),
        (Items([np.zeros((3, 16, 17), np.uint8)]), r"got \(3, 16, 17\).*transpose\(1, 2, 0\)"),
        (Items([torch.randn(3, 16, 16) * 9]), "undo the normalisation"),
        (iter([]), "StreamedPairs"),
        (Path("shards-000.tar"), "StreamedPairs"),
        (7, "expected a folder, a list of files.*got int"),
    ],
)
def test_what_is_no_clean_image(clean: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CleanCrops(clean, 12, scale=2)[0]


# -- LMDB ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lmdb") / "photos.lmdb"
    with lmdb.open(str(path), map_size=2**20) as environment, environment.begin(write=True) as all_:
        for number, picture in enumerate(pictures()):
            all_.put(f"photo {number}".encode(), encoded(picture))
    path.joinpath("meta_info.txt").write_text(
        "".join(
            f"photo {number}.png ({height},{width},3) 1\n"
            for number, (height, width) in enumerate(SIDES)
        )
    )
    return path


def test_lmdb(database: Path, expected: list[Tensor], model: DeFlowDegrader) -> None:
    assert same(crops(database), expected)
    pairs = DegradedPairs(database, model, 2, 12, "basicsr")
    assert pairs[1]["gt_path"] == "photo 1"
    alone = [pairs[index] for index in range(len(pairs))]
    # One process may open a database only once, and a fork must not use its parent's.
    assert same([*copy.deepcopy(pairs)], alone)
    assert same([*pickle.loads(pickle.dumps(pairs))], alone)
    for workers in (1, 2):
        loader = DataLoader(pairs, None, num_workers=workers, multiprocessing_context="fork")
        assert same([*loader], alone)
    assert same([*pairs], alone)


def test_lmdb_leaves_small_images_out(database: Path) -> None:
    with pytest.warns(UserWarning, match=r"4 are smaller than the patch.*photo 0, photo 1"):
        data = CleanCrops(database, 24, scale=2)
    assert [item["gt_path"] for item in data] == ["photo 2"]


def test_lmdb_that_is_damaged(database: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no LMDB with images.*meta_info\.txt"):
        CleanCrops(tmp_path / "other.lmdb", 12, scale=2)
    other = tmp_path / "photos.lmdb"
    with (
        lmdb.open(str(other), map_size=2**20) as environment,
        environment.begin(write=True) as all_,
    ):
        all_.put(b"broken", b"no image")
    index = other / "meta_info.txt"
    index.write_text("photo.png 20 24\n")
    with pytest.raises(DataError, match=re.escape("expected 'name.png (480,480,3) 1', got")):
        CleanCrops(other, 12, scale=2)
    index.write_text("broken.png (20,24,3) 1\n")
    with (
        pytest.warns(UserWarning, match="the clean image broken is skipped"),
        pytest.raises(DataError, match=r"none of the 1.*cannot decode image broken"),
    ):
        CleanCrops(other, 12, scale=2)[0]
    index.write_text("missing.png (20,24,3) 1\n")
    with pytest.raises(DataError, match="has no key 'missing'"):
        CleanCrops(other, 12, scale=2)[0]
    empty = tmp_path / "empty.lmdb"
    empty.mkdir()
    (empty / "meta_info.txt").write_text("missing.png (20,24,3) 1\n")
    with pytest.raises(DataError, match=r"cannot read the LMDB .*empty\.lmdb"):
        CleanCrops(empty, 12, scale=2)[0]


def test_lmdb_in_threads_and_by_several_paths(
    database: Path, expected: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmdb, "open", slow := Slow(lmdb.open))
    lmdb_images._ENVIRONMENTS.clear()
    monkeypatch.chdir(database.parent)
    opened = [CleanCrops(path, 12, scale=2) for path in (database, Path(database.name))]
    with ThreadPoolExecutor(4) as threads:
        made = [[*threads.map(one.__getitem__, range(len(one)))] for one in opened]
    assert [same([item["gt"] for item in one], expected) for one in made] == [True, True]
    assert slow.calls == 1


class Slow:
    """A function that takes its time, so that threads meet in it; how often it was called."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any, **settings: Any) -> Any:
        self.calls += 1
        time.sleep(0.05)
        return self.function(*args, **settings)


def test_without_lmdb(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ImportError, match=r'pip install "deflow-aug\[lmdb\]"'):
        CleanCrops(database, 12, scale=2)


# -- WebDataset shards -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three shards; the last has one picture, the others two."""
    folder = tmp_path_factory.mktemp("shards")
    for number, picture in enumerate(pictures()):
        with tarfile.open(folder / f"photos-{number // 2}.tar", "a") as shard:
            for name, data in ((f"p{number}.json", b"{}"), (f"p{number}.png", encoded(picture))):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                shard.addfile(entry, io.BytesIO(data))
    return str(folder / "photos-{0..2}.tar")


def by_key(items: Any) -> list[Any]:
    return sorted(items, key=lambda item: item["gt_path"])


@pytest.fixture(scope="module")
def streamed(shards: str, model: DeFlowDegrader) -> list[Any]:
    return [*StreamedPairs(shards, model, 2, 12, "basicsr", seed=4)]


def test_shards(streamed: list[Any], shards: str, model: DeFlowDegrader) -> None:
    assert [item["gt_path"] for item in streamed] == [f"p{number}" for number in range(len(SIDES))]
    for item, picture in zip(streamed, pictures(), strict=True):
        windows = channels_first(picture).float().div(255).unfold(1, 12, 1).unfold(2, 12, 1)
        turns = [item["gt"].rot90(k, (1, 2)) for k in range(4)]
        turns += [turn.flip(1) for turn in turns]
        assert any((windows == t[:, None, None]).all(4).all(3).all(0).any() for t in turns)
        assert item["lq"].shape == (3, 6, 6)
    crops_apart = StreamedPairs(shards, model, 2, 12, "basicsr", seed=5)
    assert not same([*crops_apart], streamed)


@pytest.mark.parametrize("workers", [1, 4])
def test_shards_are_shared_out_to_workers(
    streamed: list[Any], shards: str, model: DeFlowDegrader, workers: int
) -> None:
    pairs = StreamedPairs(shards, model, 2, 12, "basicsr", seed=4)
    loader = DataLoader(
        pairs,
        None,
        num_workers=workers,
        multiprocessing_context="fork",
        persistent_workers=True,
    )
    assert same(by_key(loader), streamed)
    pairs.set_epoch(1)
    later = by_key(loader)
    assert not same(later[0], streamed[0])
    assert same(later, by_key(pairs))
    # That is what a spawned worker is given.
    assert same(by_key(pickle.loads(pickle.dumps(pairs))), later)


def test_any_stream_of_samples_with_keys(
    streamed: list[Any], shards: str, model: DeFlowDegrader
) -> None:
    urls = webdataset.shardlists.expand_urls(shards)
    shuffled = webdataset.WebDataset(urls, shardshuffle=False, seed=1).shuffle(5, initial=5)
    pairs = StreamedPairs(shuffled.decode("pil"), model, 2, 12, "basicsr", seed=4)
    assert same(by_key(pairs), streamed)
    samples = [{"__key__": f"p{n}", "image": picture} for n, picture in enumerate(pictures())]
    assert same([*StreamedPairs(samples, model, 2, 12, "basicsr", seed=4)], streamed)
    for several in (urls, tuple(urls), [Path(url) for url in urls]):
        assert same([*StreamedPairs(several, model, 2, 12, "basicsr", seed=4)], streamed)
    # Workers share out what does not do so itself.
    pairs = StreamedPairs(samples, model, 2, 12, "basicsr", seed=4)
    loader = DataLoader(pairs, None, num_workers=2, multiprocessing_context="fork")
    assert same(by_key(loader), streamed)


def test_samples_that_cannot_be_used_are_skipped(model: DeFlowDegrader) -> None:
    good = [{"__key__": f"p{n}", "png": encoded(picture)} for n, picture in enumerate(pictures())]
    bad = [{"__key__": "bad", "png": b"{}"}, {"__key__": "tiny", "png": encoded(pixels(0, 8, 8))}]
    pairs = StreamedPairs([bad[0], *good, bad[1]], model, 2, 12, "basicsr")
    with pytest.warns(UserWarning, match="the sample bad is skipped") as told:
        made = [*pairs]
    assert len(told) == 1
    assert pairs.skipped == 2
    assert same(made, [*StreamedPairs(good, model, 2, 12, "basicsr")])


def broken_samples(count: int) -> list[dict[str, Any]]:
    return [{"__key__": f"bad{n}", "png": b"{}"} for n in range(count)]


@pytest.mark.filterwarnings("ignore:the sample bad")
def test_how_many_were_skipped_is_told_now_and_then(model: DeFlowDegrader) -> None:
    good = {"__key__": "good", "png": encoded(pictures()[0])}
    pairs = StreamedPairs([good, *broken_samples(120)], model, 2, 12)
    with pytest.warns(UserWarning, match="is skipped") as told:
        assert len([*pairs]) == 1
    numbers = [re.search(r"(\d+) so far", str(one.message)) for one in told]
    assert [found and int(found[1]) for found in numbers] == [1, 10, 100]
    assert pairs.skipped == 120


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.filterwarnings("ignore:the sample bad")
def test_a_stream_of_which_nothing_can_be_used_is_an_error(
    model: DeFlowDegrader, workers: int
) -> None:
    """Whoever has the pieces, also one that has none; each pass anew."""
    pairs = StreamedPairs(broken_samples(2), model, 2, 12, seed=None)
    context = "fork" if workers else None
    data = DataLoader(pairs, None, num_workers=workers, multiprocessing_context=context)
    for _ in range(2):
        with pytest.raises(DataError, match=r"none of the stream's 2 samples can be used"):
            list(data)


class ShareOfItsOwn(IterableDataset[Any]):
    """The first of two workers has but a damaged sample; one of them comes late."""

    def __init__(self, late: int) -> None:
        self.late = late

    def __iter__(self) -> Any:
        worker = get_worker_info()
        if worker.id == self.late:
            time.sleep(0.3)
        yield from broken_samples(1)
        if worker.id == 1:
            yield {"__key__": "good", "png": encoded(pictures()[0])}


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.filterwarnings("ignore:the sample bad")
def test_a_worker_that_has_nothing_but_damaged_samples_is_no_error(
    model: DeFlowDegrader, late: int
) -> None:
    pairs = StreamedPairs(ShareOfItsOwn(late), model, 2, 12, "basicsr", seed=None)
    made = [*DataLoader(pairs, None, num_workers=2, multiprocessing_context="fork")]
    assert [item["gt_path"] for item in made] == ["good"]


def test_as_many_workers_as_there_are_may_tell_together() -> None:
    """In any order, once the last of them has ended; not where one has given a pair."""
    epoch = SharedEpoch()
    assert [epoch.nothing_came(worker, 3, 5) for worker in (2, 0, 0)] == [0, 0, 0]
    assert pickle.loads(pickle.dumps(epoch)).nothing_came(1, 3, 7) == 17
    epoch.gave_one()
    assert epoch.nothing_came(1, 3, 7) == 0
    assert SharedEpoch().nothing_came(300, MOST_WORKERS + 100, 1) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_passes_of_a_stream_without_set_epoch_are_told_once(
    model: DeFlowDegrader, workers: int, recwarn: pytest.WarningsRecorder
) -> None:
    samples = [{"__key__": f"p{n}", "png": encoded(one)} for n, one in enumerate(pictures())]
    for seed, epoch, expected in ((1, None, 1), (None, None, 0), (1, 0, 0)):
        recwarn.clear()
        pairs = StreamedPairs(samples, model, 2, 12, seed=seed)
        if epoch is not None:
            pairs.set_epoch(epoch)
        told = []
        for _ in range(3):
            list(DataLoader(pairs, None, num_workers=workers))
            # The warnings of workers go to their own stderr; what they share tells as well.
            told.append(int(pairs._epoch._value[3]))
        assert told == [0, expected, expected]
        if not workers:
            count = sum("set_epoch was never called" in str(one.message) for one in recwarn)
            assert count == expected


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([Image.new("RGB", (16, 16))], "the string '__key__'"),
        ([{"__key__": "a", "json": b"{}"}], "holds no image"),
        ([{"__key__": "a", "png": b"{}"}], "cannot decode image a"),
        ([{"__key__": "a", "png": encoded(pixels(0, 8, 30))}], "larger than the image: a has 8"),
    ],
)
@pytest.mark.filterwarnings("ignore:the sample a is skipped")
def test_samples_that_do_not_fit(model: DeFlowDegrader, samples: Any, message: str) -> None:
    with pytest.raises((DataError, UnreadableImageError), match=message):
        next(iter(StreamedPairs(samples, model, 2, 12)))


def test_without_webdataset(
    shards: str, model: DeFlowDegrader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match=r'pip install "deflow-aug\[webdataset\]"'):
        StreamedPairs(shards, model, 2, 12)
    with pytest.raises(DataError, match="the list of shards is empty"):
        StreamedPairs([], model, 2, 12)
