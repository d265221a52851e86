"""Unpaired training data."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deflow_aug.data.unpaired import CropFolder, DataError, UnpairedBatches


def write_noise(path: Path, height: int, width: int, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def find(crop: np.ndarray, image: np.ndarray) -> list[tuple[int, int]]:
    """Where a crop occurs in an image of random pixels."""
    height, width = crop.shape[:2]
    return [
        (top, left)
        for top in range(image.shape[0] - height + 1)
        for left in range(image.shape[1] - width + 1)
        if (image[top : top + height, left : left + width] == crop).all()
    ]


def test_crops_lie_on_the_grid_and_half_are_flipped(tmp_path: Path) -> None:
    image = write_noise(tmp_path / "a.png", 23, 30)
    crops = CropFolder(tmp_path, crop=8, align=4)
    flipped, places = 0, set()
    for key in range(200):
        crop = crops.draw(0, key)
        straight = find(crop, image)
        ((top, left),) = straight or find(crop[:, ::-1], image)
        flipped += not straight
        places.add((top, left))
    assert places == {(top, left) for top in (0, 4, 8, 12) for left in (0, 4, 8, 12, 16, 20)}
    assert 70 < flipped < 130


def test_the_same_key_draws_the_same_crop(tmp_path: Path) -> None:
    write_noise(tmp_path / "a.png", 32, 32)
    write_noise(tmp_path / "sub" / "b.png", 40, 40, seed=1)
    first, again = (CropFolder(tmp_path, crop=8, align=4) for _ in range(2))
    assert len(first.files) == 2
    assert (first.draw(1, 2, 3) == again.draw(1, 2, 3)).all()
    assert (first.draw(1, 2, 3) != again.draw(1, 2, 4)).any()


def test_unreadable_and_small_files_are_named_and_left_out(tmp_path: Path) -> None:
    write_noise(tmp_path / "good.png", 16, 16)
    write_noise(tmp_path / "tiny.png", 16, 7)
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="left out") as warned:
        crops = CropFolder(tmp_path, crop=8, align=4)
    assert [path.name for path in crops.files] == ["good.png"]
    messages = " ".join(str(warning.message) for warning in warned)
    assert "1 of 3 files" in messages
    assert "cut.png" in messages
    assert "tiny.png" in messages


def test_folders_that_cannot_be_trained_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image files"):
        CropFolder(tmp_path, crop=8, align=4)
    with pytest.raises(OSError, match="missing"):
        CropFolder(tmp_path / "missing", crop=8, align=4)
    write_noise(tmp_path / "tiny.png", 6, 6)
    with (
        pytest.warns(UserWarning, match="smaller than the crop"),
        pytest.raises(DataError, match="at least 8 x 8"),
    ):
        CropFolder(tmp_path, crop=8, align=4)


def test_a_small_cache_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        write_noise(tmp_path / f"{number}.png", 16, 16, seed=number)
    whole = CropFolder(tmp_path, crop=8, align=4)
    monkeypatch.setattr("deflow_aug.data.unpaired.CACHE_BYTES", 2 * 16 * 16 * 3)
    small = CropFolder(tmp_path, crop=8, align=4)
    for key in range(20):
        assert (whole.draw(key) == small.draw(key)).all()
    assert small.cached_bytes == sum(image.nbytes for image in small.cache.values())
    assert len(small.cache) <= 2


def test_sixteen_bit_images_are_trained_on_as_eight_bit(tmp_path: Path) -> None:
    import cv2

    image = write_noise(tmp_path / "eight" / "a.png", 16, 16)
    (tmp_path / "sixteen").mkdir()
    deep = image[..., ::-1].astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / "sixteen" / "a.png"), deep)
    eight, sixteen = (CropFolder(tmp_path / name, crop=8, align=4) for name in ("eight", "sixteen"))
    assert (eight.draw(5) == sixteen.draw(5)).all()


def test_domains_are_drawn_equally_often_and_reproducibly(tmp_path: Path) -> None:
    folders = {}
    for number, name in enumerate(("clean", "low", "vintage")):
        write_noise(tmp_path / name / "a.png", 16, 16, seed=number)
        folders[name] = CropFolder(tmp_path / name, crop=8, align=4)
    batches = UnpairedBatches(folders, batch_size=4, seed=3)
    drawn = [name for step in range(6) for name in batches.batch(step)[1]]
    assert {name: drawn.count(name) for name in folders} == dict.fromkeys(folders, 8)
    images, _ = batches.batch(5)
    assert images.shape == (4, 3, 8, 8)
    assert images.dtype == torch.float32
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    assert torch.equal(images, batches.batch(5)[0])
    assert not torch.equal(images, UnpairedBatches(folders, 4, seed=4).batch(5)[0])
