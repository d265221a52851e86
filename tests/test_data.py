"""Crops of folders of images, and unpaired batches of them."""

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deflow_aug.data import pictures
from deflow_aug.data.folders import CropFolder, DataError
from deflow_aug.data.unpaired import UnpairedBatches
from deflow_aug.image_files import IMAGE_SUFFIXES, UnreadableImageError, image_size


def write_noise(path: Path, height: int, width: int, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def write_broken(path: Path, side: int = 64) -> None:
    """A JPEG file with a sound header that ends in the middle of the picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


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


def test_rotations_are_all_drawn_when_asked_for(tmp_path: Path) -> None:
    image = write_noise(tmp_path / "a.png", 8, 8)
    versions = [np.rot90(flip, turns) for flip in (image, image[:, ::-1]) for turns in range(4)]
    drawn = dict.fromkeys(range(8), 0)
    crops = CropFolder(tmp_path, crop=8, align=4, rotations=True)
    for key in range(160):
        crop = crops.draw(key)
        (number,) = (n for n, version in enumerate(versions) if (version == crop).all())
        drawn[number] += 1
    assert min(drawn.values()) >= 8


def test_the_same_key_draws_the_same_crop(tmp_path: Path) -> None:
    write_noise(tmp_path / "a.png", 16, 16)
    write_noise(tmp_path / "folder" / "b.png", 16, 32, seed=1)
    first, again = (CropFolder(tmp_path, crop=8, align=4) for _ in range(2))
    assert len(first.files) == 2
    assert first.pixels == 16 * 16 + 16 * 32
    assert (first.draw(1, 2, 3) == again.draw(1, 2, 3)).all()
    assert (first.draw(1, 2, 3) != again.draw(1, 2, 4)).any()
    copy = pickle.loads(pickle.dumps(first))  # as worker processes get it
    assert (copy.draw(1, 2, 3) == again.draw(1, 2, 3)).all()


def test_a_crop_is_not_a_piece_of_the_cache(tmp_path: Path) -> None:
    write_noise(tmp_path / "a.png", 8, 8)
    crops = CropFolder(tmp_path, crop=8, align=4)
    before = crops.draw(0)
    crops.draw(0)[:] = 0
    assert (crops.draw(0) == before).all()
    assert before.any()


def test_unreadable_and_small_files_are_named_and_left_out(tmp_path: Path) -> None:
    write_noise(tmp_path / "good.png", 16, 16)
    write_noise(tmp_path / "deep" / "tiny.png", 16, 7)
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "away.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.warns(UserWarning, match="left out") as warned:
        crops = CropFolder(tmp_path, crop=8, align=4)
    assert [path.name for path in crops.files] == ["good.png"]
    assert len(warned) == 2  # one of each kind
    messages = " ".join(str(warning.message) for warning in warned)
    assert "3 of 5 files" in messages
    assert "1 of 5 images" in messages
    for name in ("empty.jpg", "text.png", "away.png", str(Path("deep", "tiny.png"))):
        assert name in messages
    assert crops.facts()["left_out"] == {"unreadable": 3, "smaller than the crop": 1}


def test_many_files_left_out_are_counted_and_a_few_named(tmp_path: Path) -> None:
    write_noise(tmp_path / "good.png", 16, 16)
    for number in range(13):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"13 of 14 files .* and 3 more$"):
        CropFolder(tmp_path, crop=8, align=4)


def test_sizes_are_read_from_headers(tmp_path: Path) -> None:
    write_broken(tmp_path / "broken.jpg", side=40)
    assert image_size(tmp_path / "broken.jpg") == (40, 40)
    for suffix in sorted(IMAGE_SUFFIXES - {".pgm"}):
        write_noise(tmp_path / f"a{suffix}", 10, 13)
        assert image_size(tmp_path / f"a{suffix}") == (10, 13)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no image")
    for name, reason in (("empty", "0 bytes"), ("text", "not an image")):
        with pytest.raises(UnreadableImageError, match=rf"{name}\.png: .*{reason}"):
            image_size(tmp_path / f"{name}.png")
    with pytest.raises(FileNotFoundError):
        image_size(tmp_path / "missing.png")


def test_folders_that_cannot_be_trained_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image files"):
        CropFolder(tmp_path, crop=8, align=4)
    with pytest.raises(OSError, match="missing"):
        CropFolder(tmp_path / "missing", crop=8, align=4)
    write_noise(tmp_path / "tiny.png", 6, 7)
    with (
        pytest.warns(UserWarning, match="smaller than the crop"),
        pytest.raises(DataError, match=r"at least 8 x 8 pixels; the largest is 6 x 7"),
    ):
        CropFolder(tmp_path, crop=8, align=4)
    write_noise(tmp_path / "large.png", 32, 29)
    with (
        pytest.warns(UserWarning, match="smaller than the crop"),
        pytest.raises(DataError, match="after downscaling by 4; the largest is 8 x 8"),
    ):
        CropFolder(tmp_path, crop=16, align=4, downscale=4)
    for wrong in ({"crop": 0}, {"align": 0}, {"downscale": 0}):
        with pytest.raises(DataError, match=f"{next(iter(wrong))} must be at least 1, got 0"):
            CropFolder(tmp_path, **({"crop": 8, "align": 4} | wrong))


def test_at_the_start_no_picture_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        write_noise(tmp_path / f"{number}.png", 16, 16, seed=number)
    decoded: list[Path] = []
    decode = pictures.decode

    def count(path: Path) -> np.ndarray:
        decoded.append(path)
        return decode(path)

    monkeypatch.setattr(pictures, "decode", count)
    crops = CropFolder(tmp_path, crop=8, align=4)
    assert not decoded
    for key in range(40):
        crops.draw(key)
    assert len(decoded) == len(set(decoded)) == 5  # then each once, and kept


def test_files_that_break_when_decoded_are_left_out_in_the_same_way_by_all(tmp_path: Path) -> None:
    for number in range(3):
        write_noise(tmp_path / f"good-{number}.png", 16, 16, seed=number)
        write_broken(tmp_path / f"broken-{number}.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (CropFolder(tmp_path, crop=8, align=4) for _ in range(2))
    assert len(first.files) == 6
    with pytest.warns(UserWarning, match="left out") as warned:
        drawn = [first.draw(7, key) for key in range(30)]
    assert len(warned) == 3  # each once
    messages = " ".join(str(warning.message) for warning in warned)
    assert all(f"broken-{number}.jpg" in messages for number in range(3))
    assert "3 of 6 so far" in messages
    assert first.facts()["images"] == 3
    assert first.facts()["left_out"]["unreadable"] == 3
    # Another process meets the files in another order.
    with pytest.warns(UserWarning, match="left out"):
        again = {key: second.draw(7, key) for key in reversed(range(30))}
    assert all((again[key] == crop).all() for key, crop in enumerate(drawn))


def test_a_folder_of_broken_files_alone(tmp_path: Path) -> None:
    for number in range(2):
        write_broken(tmp_path / f"{number}.jpg")
    crops = CropFolder(tmp_path, crop=8, align=4)
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(DataError, match=r"none of the 2 images .* can be used"),
    ):
        crops.draw(0)


def test_images_of_all_kinds(tmp_path: Path) -> None:
    """Whatever the format and depth, crops are the 8-bit RGB that a viewer shows."""
    import cv2

    rgb = Image.fromarray(write_noise(tmp_path / "kinds" / "rgb.png", 8, 8))
    pixels = np.asarray(rgb)
    grey, palette = rgb.convert("L"), rgb.quantize(16)
    alpha = rgb.convert("RGBA")
    alpha.putalpha(grey)
    cmyk = Image.fromarray(np.dstack([255 - pixels, np.zeros((8, 8), np.uint8)]), "CMYK")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    folder = tmp_path / "kinds"
    grey.save(folder / "grey.png")
    palette.save(folder / "palette.png")
    alpha.save(folder / "alpha.png")
    cmyk.save(folder / "cmyk.tif")
    rgb.save(folder / "turned.png", exif=exif)
    cv2.imwrite(str(folder / "sixteen.png"), pixels[..., ::-1].astype(np.uint16) * 257)
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(folder / "sixteen-grey.png")
    rgb.save(folder / "lossless.webp", lossless=True)
    grey_rgb = np.repeat(np.asarray(grey)[..., None], 3, axis=-1)
    expected = {
        "rgb.png": pixels,
        "grey.png": grey_rgb,
        "palette.png": np.asarray(palette.convert("RGB")),
        "alpha.png": pixels,
        "cmyk.tif": pixels,
        "turned.png": np.rot90(pixels, -1),
        "sixteen.png": pixels,
        "sixteen-grey.png": grey_rgb,
        "lossless.webp": pixels,
    }
    for name, image in expected.items():
        (tmp_path / name).mkdir()
        (folder / name).rename(tmp_path / name / name)
        crop = CropFolder(tmp_path / name, crop=8, align=4).draw(0)
        assert crop.dtype == np.uint8
        assert (crop == image).all() or (crop == image[:, ::-1]).all(), name


def test_a_turned_image_is_cut_as_it_is_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    pixels = np.random.default_rng(0).integers(0, 256, (16, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.tif", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "a.webp", lossless=True, exif=exif)
    crops, shown = CropFolder(tmp_path, crop=16, align=16), np.rot90(pixels)
    for key in range(20):
        crop = crops.draw(key)
        assert find(crop, shown) or find(crop[:, ::-1], shown)


def test_images_downscaled_elsewhere_join_a_domain(tmp_path: Path) -> None:
    write_noise(tmp_path / "clean" / "a.png", 16, 16)
    dark = np.full((64, 64, 3), 7, np.uint8)
    (tmp_path / "degraded").mkdir()
    Image.fromarray(dark).save(tmp_path / "degraded" / "b.png")
    also = [(tmp_path / "degraded", 4)]
    clean = CropFolder(tmp_path / "clean", crop=8, align=4, also=also)
    degraded = CropFolder(tmp_path / "degraded", crop=8, align=4)
    assert clean.pixels == 2 * 16 * 16
    joined = sum(bool((clean.draw(key) == 7).all()) for key in range(100))
    assert 30 < joined < 70
    assert clean.facts()["also"] == [{"folder": "degraded", "images": 1, "downscale": 4}]
    UnpairedBatches({"clean": clean, "degraded": degraded}, 2, seed=0)  # though it shares a file
    with (
        pytest.warns(UserWarning, match="smaller"),
        pytest.raises(DataError, match="after downscaling by 16"),
    ):
        CropFolder(tmp_path / "clean", crop=8, align=4, also=[(tmp_path / "degraded", 16)])


def test_domains_that_share_images_are_refused(tmp_path: Path) -> None:
    write_noise(tmp_path / "all" / "a.png", 16, 16)
    write_noise(tmp_path / "all" / "inner" / "b.png", 16, 16, seed=1)
    write_noise(tmp_path / "other" / "c.png", 16, 16, seed=2)
    (tmp_path / "link").symlink_to(tmp_path / "all")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "d.png").symlink_to(tmp_path / "all" / "a.png")

    def pair(one: str, other: str) -> UnpairedBatches:
        folders = {
            name: CropFolder(tmp_path / folder, crop=8, align=4)
            for name, folder in (("clean", one), ("third", "other"), ("degraded", other))
        }
        return UnpairedBatches(folders, 2, seed=0)

    for other in ("all", "link"):
        with pytest.raises(DataError, match=r"the same folder .*clean \(.*degraded \("):
            pair("all", other)
    with pytest.raises(DataError, match=r"1 images are in both .*b\.png"):
        pair("all", "all/inner")
    with pytest.raises(DataError, match="1 images are in both"):
        pair("all", "links")
    pair("links", "all/inner")
    clean = CropFolder(tmp_path / "other", 8, 4, also=[(tmp_path / "all", 1)])
    with pytest.raises(DataError, match="the same folder"):
        UnpairedBatches({"clean": clean, "a": CropFolder(tmp_path / "all", 8, 4)}, 2, seed=0)
    with pytest.raises(DataError, match="the same folder"):  # within a domain
        CropFolder(tmp_path / "all", 8, 4, also=[(tmp_path / "link", 1)])


def test_the_fingerprint_tells_data_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_noise(tmp_path / name / "a.png", 200, 200)
        write_noise(tmp_path / name / "folder" / "b.png", 16, 16, seed=1)

    def fingerprint(name: str, **settings: int) -> str:
        return CropFolder(tmp_path / name, crop=8, align=4, **settings).fingerprint()

    first = fingerprint("one")
    assert first == fingerprint("two")
    assert first != fingerprint("one", downscale=2)
    large = tmp_path / "two" / "a.png"
    data = bytearray(large.read_bytes())
    data[len(data) // 2] ^= 1  # of the same size, in the middle of a large file
    large.write_bytes(data)
    assert first != fingerprint("two")
    (tmp_path / "one" / "a.png").rename(tmp_path / "one" / "c.png")
    assert first != fingerprint("one")


def test_statistics_are_those_of_all_images(tmp_path: Path) -> None:
    images = [write_noise(tmp_path / f"{n}.png", 16 + n, 20, seed=n) // (n + 1) for n in range(9)]
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    write_broken(tmp_path / "broken.jpg")
    seen: list[tuple[int, int]] = []
    with pytest.warns(UserWarning, match=r"broken\.jpg"):
        mean, std = CropFolder(tmp_path, crop=8, align=4).statistics(lambda *p: seen.append(p))
    assert seen == [(done, 10) for done in range(1, 11)]
    values = [image.reshape(-1, 3) / 255 for image in images]
    expected = np.mean([v.mean(0) for v in values], axis=0)
    square = np.mean([(v**2).mean(0) for v in values], axis=0)
    np.testing.assert_allclose(mean, expected, rtol=1e-12)
    np.testing.assert_allclose(std, np.sqrt(square - expected**2), rtol=1e-10)


def test_statistics_are_those_after_downscaling(tmp_path: Path) -> None:
    write_noise(tmp_path / "a.png", 64, 64)
    mean, std = CropFolder(tmp_path, crop=8, align=4, downscale=4).statistics()
    crop = CropFolder(tmp_path, crop=16, align=4, downscale=4).draw(0) / 255
    np.testing.assert_allclose(mean, crop.mean((0, 1)), rtol=1e-12)
    np.testing.assert_allclose(std, crop.std((0, 1)), rtol=1e-10)
    assert max(std) < 0.15  # of the noise itself: 0.29


def test_domains_are_drawn_equally_often_and_reproducibly(tmp_path: Path) -> None:
    folders = {}
    for number, name in enumerate(("clean", "low", "vintage")):
        write_noise(tmp_path / name / "a.png", 16, 16, seed=number)
        folders[name] = CropFolder(tmp_path / name, crop=8, align=4)
    batches = UnpairedBatches(folders, batch_size=4, seed=3)
    drawn = [name for step in range(6) for name in batches.batch(step).domains]
    assert {name: drawn.count(name) for name in folders} == dict.fromkeys(folders, 8)
    batch = batches.batch(5)
    assert batch.images.shape == (4, 3, 8, 8)
    assert batch.images.dtype == torch.uint8
    assert batch.indices == (0, 1, 2, 3)
    assert batch.step == 5
    assert batch.clean is None
    for index, name in batches.items(5):
        image = batch.images[index].permute(1, 2, 0).numpy()
        pixels = np.asarray(Image.open(tmp_path / name / "a.png"))
        assert find(image, pixels) or find(image[:, ::-1], pixels)
    assert torch.equal(batch.images, batches.batch(5).images)
    assert not torch.equal(batch.images, UnpairedBatches(folders, 4, seed=4).batch(5).images)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_make_up_the_whole_batch(tmp_path: Path, parts: int) -> None:
    folders = {}
    for number, name in enumerate(("clean", "degraded")):
        write_noise(tmp_path / name / "a.png", 16, 16, seed=number)
        folders[name] = CropFolder(tmp_path / name, crop=8, align=4)
    batches = UnpairedBatches(folders, batch_size=5, seed=3)
    whole = batches.batch(11)
    shares = [batches.batch(11, (number, parts)) for number in range(parts)]
    assert torch.equal(torch.cat([share.images for share in shares]), whole.images)
    assert sum((share.domains for share in shares), ()) == whole.domains
    assert sum((share.indices for share in shares), ()) == whole.indices
    lengths = [len(share.indices) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_batches_that_cannot_be_made(tmp_path: Path) -> None:
    write_noise(tmp_path / "a" / "a.png", 16, 16)
    write_noise(tmp_path / "b" / "b.png", 16, 16)
    a, b = (CropFolder(tmp_path / name, crop=8, align=4) for name in "ab")
    with pytest.raises(DataError, match="at least one domain"):
        UnpairedBatches({}, 2, seed=0)
    with pytest.raises(DataError, match="batch_size"):
        UnpairedBatches({"a": a}, 0, seed=0)
    with pytest.raises(DataError, match="one size"):
        UnpairedBatches({"a": a, "b": CropFolder(tmp_path / "b", crop=16, align=4)}, 2, seed=0)
    batches = UnpairedBatches({"a": a, "b": b}, 2, seed=0)
    with pytest.raises(DataError, match="a batch of 2 cannot be shared by 3 processes"):
        batches.batch(0, (0, 3))
    with pytest.raises(ValueError, match="number < of"):
        batches.batch(0, (2, 2))
