"""Blocks of downscaled pictures, blur kernels, and crops made with both."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deflow_aug.data.folders import CropFolder, DataError
from deflow_aug.data.kernels import blur, load_kernels, margin
from deflow_aug.data.regions import Picture, mirrored
from deflow_aug.resize import bicubic_downscale, pad_symmetric


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9 + c) + np.cos(y / (7 + c)) for c in range(3)]
    return np.rint(127 + 60 * np.stack(waves, -1)).astype(np.uint8)


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
@pytest.mark.parametrize(("height", "width"), [(96, 120), (95, 122), (9, 301)])
def test_downscaling_is_that_of_the_library(factor: int, height: int, width: int) -> None:
    for pixels in (noise(height, width), smooth(height, width)):
        small = Picture(pixels, factor).downscaled().pixels
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
        expected = bicubic_downscale(x, factor)[0].permute(1, 2, 0).clamp(0, 255).numpy()
        assert small.shape == expected.shape
        assert small.shape[:2] == Picture(pixels, factor).sides
        assert np.abs(small - expected).max() < 0.5 + 1e-3  # rounded to the nearest level


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
def test_a_block_equals_the_piece_of_the_whole_downscaled_picture(factor: int) -> None:
    picture = Picture(noise(331, 650), factor)
    whole = picture.downscaled().pixels
    height, width = whole.shape[:2]
    rng = np.random.default_rng(factor)
    for _ in range(20):
        top, left = (int(rng.integers(side - 8)) for side in (height, width))
        h = int(rng.integers(1, height - top + 1))
        w = int(rng.integers(1, width - left + 1))
        assert (picture.block(top, left, h, w) == whole[top : top + h, left : left + w]).all()


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_blocks_are_mirrored_beyond_the_borders(factor: int) -> None:
    picture = Picture(noise(31, 40), factor)
    whole = torch.from_numpy(picture.downscaled().pixels).permute(2, 0, 1)
    padded = pad_symmetric(whole, 20, 30, 40, 10).permute(1, 2, 0).numpy()
    assert (picture.block(-40, -20, *padded.shape[:2]) == padded).all()
    assert (mirrored(picture.downscaled().pixels, -40, -20, 7, 5) == padded[:7, :5]).all()
    assert (picture.block(-2, 3, 6, 4) == padded[38:44, 23:27]).all()


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_crops_of_downscaled_images_lie_on_the_grid(tmp_path: Path) -> None:
    write(tmp_path / "a.png", noise(90, 110))
    small = Picture(noise(90, 110), 3).downscaled().pixels
    crops = CropFolder(tmp_path, crop=8, align=4, downscale=3)
    assert crops.pixels == 30 * 37
    places = {
        (top, left): small[top : top + 8, left : left + 8]
        for top in range(0, 23, 4)
        for left in range(0, 30, 4)
    }
    seen = set()
    for key in range(200):
        crop = crops.draw(key)
        seen |= {
            place
            for place, block in places.items()
            if (crop == block).all() or (crop[:, ::-1] == block).all()
        }
    assert len(seen) > 40  # of 48
    assert crops.facts()["downscale"] == 3


def test_memory_for_downscaled_images_changes_nothing(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.png", noise(70, 90, number))
    # Room for all of them downscaled; for one as it is, but not for half of them downscaled.
    settings = {"crop": 8, "align": 4, "downscale": 2}
    small = 3 * 35 * 45
    whole = CropFolder(tmp_path, **settings, cache_bytes=3 * small)
    block = CropFolder(tmp_path, **settings, cache_bytes=small)
    for key in range(20):
        assert (whole.draw(key) == block.draw(key)).all()
    assert {p.factor for p in whole.pictures.kept.values()} == {1}
    assert len(whole.pictures.kept) == 3
    assert not block.pictures.kept  # downscaled by block, and too large to be kept


def test_blurring_is_correlation_with_the_kernel() -> None:
    rng = np.random.default_rng(0)
    pixels = noise(30, 34)
    for shape in ((1, 1), (3, 5), (7, 1)):
        kernel = rng.random(shape)
        kernel /= kernel.sum()
        around = (shape[0] // 2 + 1, shape[1] // 2 + 2)
        x = torch.from_numpy(pixels).double().permute(2, 0, 1)[:, None]
        full = torch.nn.functional.conv2d(x, torch.from_numpy(kernel)[None, None])
        expected = full[:, 0].permute(1, 2, 0).round().numpy()[1:-1, 2:-2]
        assert (blur(pixels, kernel, around) == expected).all()


def test_kernels_are_drawn_and_applied_after_downscaling(tmp_path: Path) -> None:
    write(tmp_path / "images" / "a.png", noise(32, 32))
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    box = np.ones((3, 3))
    np.save(kernels / "box.npy", box)
    dot = np.zeros((5, 5), np.uint8)
    dot[0, 4] = 255  # moves the picture by two pixels each way
    Image.fromarray(dot).save(kernels / "dot.png")
    (kernels / "notes.txt").write_text("not a kernel")
    loaded = load_kernels(kernels)
    assert [k.shape for k in loaded] == [(3, 3), (5, 5)]
    assert all(k.sum() == pytest.approx(1) for k in loaded)
    assert margin(loaded) == (2, 2)
    crops = CropFolder(tmp_path / "images", crop=16, align=4, downscale=2, kernels=kernels)
    assert crops.facts()["blur_kernels"] == 2
    small = Picture(noise(32, 32), 2).downscaled().pixels
    padded = pad_symmetric(torch.from_numpy(small).permute(2, 0, 1), 2, 2, 2, 2).numpy()
    moved = padded[:, :16, 4:].transpose(1, 2, 0)
    boxed = sum(
        padded[:, y : y + 16, x : x + 16].astype(float) for y in (1, 2, 3) for x in (1, 2, 3)
    )
    boxed = np.rint(boxed.transpose(1, 2, 0) / 9)
    counts = [0, 0]
    for key in range(60):
        crop = crops.draw(key)
        matches = [
            any((turned == blurred).all() for turned in (crop, crop[:, ::-1]))
            for blurred in (boxed, moved)
        ]
        counts = [c + m for c, m in zip(counts, matches, strict=True)]
    assert sum(counts) == 60
    assert min(counts) > 15


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (np.ones((4, 3)), "two odd sides"),
        (np.ones((3, 3, 3)), "two odd sides"),
        (np.zeros((3, 3)), "positive sum"),
        (np.full((3, 3), np.nan), "finite"),
        (np.array([["a"]]), "cannot read"),
    ],
)
def test_unusable_kernels_are_named(tmp_path: Path, kernel: np.ndarray, message: str) -> None:
    np.save(tmp_path / "bad.npy", kernel)
    with pytest.raises(DataError, match=rf"bad\.npy.*{message}|{message}.*bad\.npy"):
        load_kernels(tmp_path)


def test_folders_without_kernels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_kernels(tmp_path / "missing")
    (tmp_path / "kernel").touch()
    with pytest.raises(DataError, match="is a file"):
        load_kernels(tmp_path / "kernel")
    with pytest.raises(DataError, match="no blur kernels"):
        load_kernels(tmp_path)
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"cut\.npy"):
        load_kernels(tmp_path)
