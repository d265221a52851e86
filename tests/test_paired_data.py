"""Paired data: finding pairs, and crops at the same place of both halves."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deflow_aug.data.loading import loader
from deflow_aug.data.paired import PairedBatches, PairFolder, find_pairs
from deflow_aug.data.pictures import DataError


def write(path: Path, pixels: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def noise(seed: int, height: int = 24, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 128, (height, width, 3), dtype=np.uint8)


def write_pair(folder: Path, name: str, seed: int = 0, *, beside: bool = False) -> np.ndarray:
    """A clean picture, and the degraded one, which is brighter by 100."""
    clean = noise(seed)
    for half, pixels in (("clean", clean), ("degraded", clean + 100)):
        path = folder / f"{name}_{half}.png" if beside else folder / half / f"{name}.png"
        write(path, pixels)
    return clean


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_pairs_in_two_folders(tmp_path: Path) -> None:
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "deep/b")
    write(tmp_path / "clean" / "only.png", noise(1))
    (tmp_path / "degraded" / "a.png").rename(tmp_path / "degraded" / "a.tif")
    found = find_pairs(tmp_path)
    assert [(n, c.name, d.name) for n, c, d in found.pairs] == [
        ("a", "a.png", "a.tif"),
        (str(Path("deep/b")), "b.png", "b.png"),
    ]
    assert found.unmatched == (str(Path("clean/only.png")),)


def test_pairs_beside_each_other(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", beside=True)
    write_pair(tmp_path / "deep", "b_c", beside=True)
    write(tmp_path / "only_degraded.png", noise(1))
    write(tmp_path / "neither.png", noise(1))
    found = find_pairs(tmp_path)
    assert [name for name, *_ in found.pairs] == ["a", str(Path("deep/b_c"))]
    assert set(found.unmatched) == {"only_degraded.png", "neither.png"}


def test_folders_without_pairs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no pairs in .*expected two folders"):
        find_pairs(tmp_path)
    write(tmp_path / "clean" / "a.png", noise(0))
    write(tmp_path / "degraded" / "b.png", noise(0))
    with pytest.raises(DataError, match=r"without a partner are .*a\.png.*b\.png"):
        find_pairs(tmp_path)
    write(tmp_path / "clean" / "a.webp", noise(0))
    with pytest.raises(DataError, match="differ in their suffix only"):
        find_pairs(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        find_pairs(tmp_path / "missing")


def test_both_crops_come_from_the_same_place(tmp_path: Path) -> None:
    images = [write_pair(tmp_path, str(number), number) for number in range(3)]
    pairs = PairFolder(tmp_path, crop=8, align=4)
    assert pairs.pixels == 3 * 24 * 32
    seen, flips = set(), 0
    for key in range(150):
        degraded, clean = pairs.draw(3, key)
        assert (degraded == clean + 100).all()
        (place,) = (
            (number, top, left, flip)
            for number, image in enumerate(images)
            for top in range(0, 17, 4)
            for left in range(0, 25, 4)
            for flip, view in ((0, clean), (1, clean[:, ::-1]))
            if (image[top : top + 8, left : left + 8] == view).all()
        )
        seen.add(place[:3])
        flips += place[3]
    assert len(seen) > 60  # of 105
    assert 45 < flips < 105
    degraded, clean = PairFolder(tmp_path, crop=24, align=4, rotations=True).draw(1)
    assert (degraded == clean + 100).all()
    copy = pickle.loads(pickle.dumps(pairs))
    assert all((a == b).all() for a, b in zip(copy.draw(5), pairs.draw(5), strict=True))


def test_pairs_that_cannot_be_used_are_named_and_left_out(tmp_path: Path) -> None:
    write_pair(tmp_path, "good")
    for half, size in (("clean", 24), ("degraded", 48)):
        write(tmp_path / half / "sizes.png", noise(0, size, size))
        write(tmp_path / half / "tiny.png", noise(0, 6, 60))
        write(tmp_path / half / "empty.png", noise(0))
    write(tmp_path / "clean" / "only.png", noise(1))
    (tmp_path / "degraded" / "empty.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="left out of the 4 pairs") as warned:
        pairs = PairFolder(tmp_path, crop=8, align=4)
    assert len(warned) == 1
    message = str(warned[0].message)
    assert pairs.names == ["good"]
    assert "1 without a partner: " + str(Path("clean/only.png")) in message
    assert "1 of two sizes: sizes (24 x 24 clean, 48 x 48 degraded)" in message
    assert "1 smaller than the crop: tiny" in message
    assert "1 unreadable: empty" in message
    facts = pairs.facts()
    assert facts["pairs"] == 1
    assert facts["left_out"] == {
        "without a partner": 1,
        "of two sizes": 1,
        "unreadable": 1,
        "smaller than the crop": 1,
    }
    assert facts["sha256"] == pairs.fingerprint()


def test_no_pair_of_one_size(tmp_path: Path) -> None:
    for half, size in (("clean", 24), ("degraded", 48)):
        write(tmp_path / half / "a.png", noise(0, size, size))
    with (
        pytest.warns(UserWarning, match="of two sizes"),
        pytest.raises(DataError, match=r"none of the 1 pairs .* a \(24 x 24 clean, 48 x 48"),
    ):
        PairFolder(tmp_path, crop=8, align=4)


def test_a_pair_broken_later_is_left_out_as_a_whole(tmp_path: Path) -> None:
    for number in range(3):
        write_pair(tmp_path, str(number), number)
    cut(tmp_path / "degraded" / "1.png")
    first, second = (PairFolder(tmp_path, crop=8, align=4) for _ in range(2))
    with pytest.warns(UserWarning, match=r"1\.png") as warned:
        drawn = [first.draw(key) for key in range(20)]
    assert len(warned) == 1
    assert all((degraded == clean + 100).all() for degraded, clean in drawn)
    assert first.facts()["pairs"] == 2
    assert first.facts()["left_out"]["unreadable"] == 1
    with pytest.warns(UserWarning, match=r"1\.png"):
        again = [second.draw(key) for key in reversed(range(20))][::-1]
    assert all((a[0] == b[0]).all() for a, b in zip(drawn, again, strict=True))
    for number in (0, 2):
        cut(tmp_path / "clean" / f"{number}.png")
    with (
        pytest.warns(UserWarning, match=r"\.png"),
        pytest.raises(DataError, match="none of the 6 images"),
    ):
        PairFolder(tmp_path, crop=8, align=4).draw(0)


def test_a_pair_of_which_one_half_is_shown_turned(tmp_path: Path) -> None:
    """The headers' sizes agree, the pictures' do not."""
    exif = Image.Exif()
    exif[0x0112] = 6
    write_pair(tmp_path, "good")
    write(tmp_path / "clean" / "turned.png", noise(1), exif=exif)
    write(tmp_path / "degraded" / "turned.png", noise(1))
    pairs = PairFolder(tmp_path, crop=8, align=4)
    with pytest.warns(UserWarning, match="turned is 32 x 24 clean, 24 x 32 degraded"):
        drawn = [pairs.draw(key) for key in range(20)]
    assert all((degraded == clean + 100).all() for degraded, clean in drawn)


def test_paired_batches(tmp_path: Path) -> None:
    for number, name in enumerate(("low", "vintage")):
        write_pair(tmp_path / name, "a", number)
        write_pair(tmp_path / name, "b", number + 10)
    folders = {name: PairFolder(tmp_path / name, 8, 4) for name in ("low", "vintage")}
    batches = PairedBatches(folders, batch_size=3, seed=1)
    batch = batches.batch(1)
    assert batch.images.shape == (3, 3, 8, 8)
    assert batch.clean is not None
    assert batch.images.dtype == batch.clean.dtype == torch.uint8
    assert torch.equal(batch.images, batch.clean + 100)
    assert batch.domains == ("vintage", "low", "vintage")
    parts = [batches.batch(1, (number, 2)) for number in range(2)]
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    for made, step in zip(loader(batches, 1, 3, workers=1), range(1, 4), strict=True):
        expected = batches.batch(step)
        assert made.clean is not None
        assert expected.clean is not None
        assert torch.equal(made.images, expected.images)
        assert torch.equal(made.clean, expected.clean)
    with pytest.raises(DataError, match="at least one domain"):
        PairedBatches({}, 2, seed=0)
    with pytest.raises(DataError, match="one size"):
        PairedBatches(folders | {"other": PairFolder(tmp_path / "low", 16, 4)}, 2, seed=0)
