"""Image files by bands of rows: the same pictures as when they are read and written whole."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from small import small_model
from test_images import random_pil

from deflow_aug import DeFlowDegrader, image_rows
from deflow_aug.cli import main
from deflow_aug.image_files import UnreadableImageError, read_image, write_image
from deflow_aug.image_rows import open_rows, png_writer
from deflow_aug.pieces import extent
from deflow_aug.png_format import Header, pack, picture, unfiltered


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows a block, some bytes read at once."""
    monkeypatch.setattr(image_rows, "_BLOCK", 500)
    monkeypatch.setattr(image_rows, "_READ", 50)


def smooth(*shape: int, dtype: str = "uint8") -> Any:
    """Pixels that filters pay for: all five are used."""
    noise = np.random.default_rng(0).normal(0, 1, shape)
    values = (np.cumsum(np.cumsum(noise, 0), 1) * 3 + 90).clip(0, 255)
    return values.astype(dtype) * (257 if dtype == "uint16" else 1)


def pictures() -> dict[str, Any]:
    grey = Image.fromarray(smooth(37, 29))
    key = Image.fromarray(smooth(37, 29, 3))
    key.info["transparency"] = (1, 2, 3)
    palette = key.convert("P", palette=Image.Palette.ADAPTIVE, colors=200)
    four_bits = key.convert("P", palette=Image.Palette.ADAPTIVE, colors=13)
    return {
        "L": grey,
        "1": grey.convert("1"),
        "RGB": Image.fromarray(smooth(37, 29, 3)),
        "LA": Image.fromarray(smooth(37, 29, 2), "LA"),
        "RGBA": Image.fromarray(smooth(37, 29, 4)),
        "key": key,
        "P": palette,
        "four bits": four_bits,
        "I;16": Image.fromarray(smooth(37, 29, dtype="uint16")),
        **{f"16 bits, {c}": smooth(37, 29, c, dtype="uint16") for c in (2, 3, 4)},
    }


def write(image: Any, path: Path) -> None:
    """As other programs write: with metadata, and with every filter."""
    if isinstance(image, np.ndarray):
        write_image(image, path)
        return
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "a photograph")
    more = {"transparency": image.info["transparency"]} if "transparency" in image.info else {}
    image.save(path, dpi=(300, 300), pnginfo=text, icc_profile=b"colours" * 50, **more)


def same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, Image.Image):
        assert (one.mode, one.size, one.getpalette()) == (
            other.mode,
            other.size,
            other.getpalette(),
        )
        kept = ("transparency", "dpi", "icc_profile", "exif")
        assert [one.info.get(key) for key in kept] == [other.info.get(key) for key in kept]
    assert np.array_equal(np.asarray(one), np.asarray(other))


def piece(image: Any, start: int, stop: int) -> Any:
    if isinstance(image, Image.Image):
        return image.crop((0, start, image.width, stop))
    return image[start:stop]


@pytest.mark.parametrize("name", pictures())
def test_bands_of_png_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.png"
    write(pictures()[name], path)
    whole = read_image(path)
    with ExitStack() as files:
        rows = open_rows(path, files)
        assert isinstance(rows, image_rows._PngRows)
        assert (1, rows.height, rows.width) == extent(whole) == (1, 37, 29)
        for start, stop in ((0, 10), (0, 11), (8, 9), (9, 30), (20, 37)):
            same(rows.read(slice(start, stop)), piece(whole, start, stop))


@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize("pixel", [1, 2, 3, 4, 6, 8])
def test_filters_are_undone(kind: int, pixel: int) -> None:
    """Against the rule of the PNG specification, byte by byte."""
    rng = np.random.default_rng(kind)
    above = rng.integers(0, 256, 5 * pixel, np.uint8)
    filtered = rng.integers(0, 256, (3, 1 + 5 * pixel), np.uint8)
    filtered[:, 0] = kind
    expected = [above.tolist()]
    for row in filtered[:, 1:].tolist():
        result: list[int] = []
        for i, value in enumerate(row):
            a = result[i - pixel] if i >= pixel else 0
            b, c = expected[-1][i], expected[-1][i - pixel] if i >= pixel else 0
            nearest = min((a, b, c), key=lambda one: abs(a + b - c - one))
            guess = (0, a, b, (a + b) // 2, nearest)[kind]
            result.append((value + guess) % 256)
        expected.append(result)
    assert unfiltered(filtered, above, pixel).tolist() == expected[1:]


@pytest.mark.parametrize(
    "name", [name for name in pictures() if name not in ("1", "P", "four bits")]
)
@pytest.mark.parametrize("bands", [(37,), (1, 1, 30, 5)])
def test_written_bands_make_the_whole(tmp_path: Path, name: str, bands: tuple[int, ...]) -> None:
    write(pictures()[name], tmp_path / "a.png")
    whole = read_image(tmp_path / "a.png")
    if isinstance(whole, Image.Image):
        whole.info.pop("transparency", None)
    write_image(whole, tmp_path / "whole.png")
    start = 0
    with png_writer(tmp_path / "new" / "b.png", 37) as write_band:
        for count in bands:
            write_band(piece(whole, start, start + count))
            start += count
    same(read_image(tmp_path / "new" / "b.png"), read_image(tmp_path / "whole.png"))
    with Image.open(tmp_path / "new" / "b.png") as image:
        image.verify()  # the sums of all chunks
    sizes = [path.stat().st_size for path in (tmp_path / "new" / "b.png", tmp_path / "whole.png")]
    assert sizes[0] < 1.2 * sizes[1] + 200


def test_rows_that_are_missing_or_too_many_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    band = Image.fromarray(smooth(8, 8))

    def write_bands(count: int) -> None:
        with png_writer(path, 16) as write_band:
            for _ in range(count):
                write_band(band)

    for count in (1, 3):
        with pytest.raises(ValueError, match=rf"has 16 rows, but {8 * count} were written"):
            write_bands(count)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth(20, 10, 3)).save(path, exif=exif)


def animated(path: Path) -> None:
    frames = [Image.fromarray(smooth(20, 10, 3)[::step]) for step in (1, -1)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("make", [turned, animated])
def test_files_whose_rows_are_no_bands_are_read_whole(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "a.png")
    whole = read_image(tmp_path / "a.png")
    with ExitStack() as files:
        rows = open_rows(tmp_path / "a.png", files)
        assert (1, rows.height, rows.width) == extent(whole)
        same(rows.read(slice(3, 9)), piece(whole, 3, 9))
        assert not isinstance(rows, image_rows._PngRows)


def test_interlaced_files_are_read_whole(tmp_path: Path) -> None:
    """The two passes of a picture two pixels wide and one high: the left one, the right one."""
    header = Header(2, 1, 8, 0, interlaced=1)
    data = zlib.compress(bytes([0, 10, 0, 20]))
    end = pack(b"IDAT", data) + pack(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header.packed(1) + end)
    with ExitStack() as files:
        band = open_rows(tmp_path / "a.png", files).read(slice(0, 1))
    assert np.array_equal(np.asarray(band), [[10, 20]])


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_what_png_files_cannot_hold_comes_as_rgb(tmp_path: Path, mode: str) -> None:
    Image.fromarray(smooth(20, 10, 3)).convert(mode).save(tmp_path / "a.tif")
    with ExitStack() as files:
        band = open_rows(tmp_path / "a.tif", files).read(slice(2, 5))
    assert (band.mode, band.size) == ("RGB", (10, 3))


def test_floating_point_is_refused_before_it_is_computed(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImageError, match=r"a\.tif .*16 bits"), ExitStack() as files:
        open_rows(tmp_path / "a.tif", files)


def damaged_files() -> dict[str, bytes]:
    image = Image.fromarray(smooth(60, 40, 3))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    sound = buffer.getvalue()
    place = sound.index(b"IDAT")
    length = struct.unpack(">I", sound[place - 4 : place])[0]
    header = Header(40, 60, 8, 2)
    few = picture(header, b"", np.zeros((30, 121), np.uint8))
    few = few.replace(header.packed(30), header.packed(60))
    wrong = picture(header, b"", np.full((60, 121), 7, np.uint8))
    changed = bytearray(sound)
    changed[place + 4 + length // 2] ^= 255
    return {
        "empty": b"",
        "text": b"no image",
        "header alone": sound[:33],
        "truncated": sound[: place + length // 2],
        "no end": sound[: place + 4 + length],
        "changed": bytes(changed),
        "too few rows": few,
        "unknown filters": wrong,
        "no header": sound[:8] + sound[33:],
    }


@pytest.mark.parametrize("name", damaged_files())
def test_damaged_files_are_told_when_opened(tmp_path: Path, name: str) -> None:
    """As when they are read whole; in two of these kinds Pillow finds nothing wrong."""
    path = tmp_path / "a.png"
    path.write_bytes(damaged_files()[name])
    if name in ("no end", "too few rows"):
        with ExitStack() as files:
            same(open_rows(path, files).read(slice(0, 60)), read_image(path))
        return
    with (
        pytest.raises(UnreadableImageError, match=r"cannot read image .*a\.png"),
        ExitStack() as files,
    ):
        open_rows(path, files)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match=r"a\.png"), ExitStack() as files:
        open_rows(tmp_path / "a.png", files)


def test_png_files_of_any_size_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's limit is for what is decoded at once."""
    random_pil("RGB", (30, 300)).save(tmp_path / "a.png")
    whole = read_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(UnreadableImageError, match="decompression bomb"):
        read_image(tmp_path / "a.png")
    with ExitStack() as files:
        rows = open_rows(tmp_path / "a.png", files)
        same(rows.read(slice(250, 300)), piece(whole, 250, 300))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("turned.png", "its rows are not those of the upright picture"),
        ("animated.png", "its rows are not stored one after another"),
        ("truncated.png", "it is truncated"),
        ("photo.bmp", "it is no PNG file"),
    ],
)
def test_why_a_large_file_cannot_be_read_by_bands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, reason: str
) -> None:
    path = tmp_path / kind
    makers = {"turned.png": turned, "animated.png": animated}
    makers.get(kind, random_pil("RGB", (20, 20)).save)(path)
    if kind == "truncated.png":
        path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90)
    with pytest.raises(UnreadableImageError) as caught, ExitStack() as files:
        open_rows(path, files)
    message = str(caught.value)
    assert message.count(str(path)) == 1
    assert "more than 0.00018 megapixels, Pillow's limit" in message
    assert f"but not this one: {reason}. Cut it into parts, or save it anew as PNG" in message
    assert "deflow-aug" not in message  # which may be what just failed


def test_bands_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_pil("RGB", (30, 300)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with ExitStack() as files:
        rows = open_rows(tmp_path / "a.png", files)
        with pytest.raises(UnreadableImageError, match=r"200 rows of it do, too: .* smaller tiles"):
            rows.read(slice(0, 200))


# -- degrading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("samples", [1, 2])
def test_files_are_degraded_as_images_are(tmp_path: Path, suffix: str, samples: int) -> None:
    made = DeFlowDegrader(small_model(shift_init=0.1), device="cpu")
    made._halo = 16
    image = random_pil("RGBA", (75, 90))
    image.save(tmp_path / f"a{suffix}", dpi=(72, 72))
    targets = [tmp_path / "new" / f"{number}.png" for number in range(samples)]
    made.degrade_file(tmp_path / f"a{suffix}", targets, 0.7, seed=3, tile=32)
    results = made.degrade(image, 0.7, samples, seed=3, tile=32)
    for target, result in zip(targets, [results] if samples == 1 else results, strict=True):
        written = read_image(target)
        assert np.array_equal(np.asarray(written), np.asarray(result))
        assert written.info["dpi"] == pytest.approx((72, 72), abs=0.1)
    assert (np.asarray(result) != np.asarray(image)).any()
    assert len(list((tmp_path / "new").iterdir())) == samples


def test_no_results_are_left_where_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = DeFlowDegrader(small_model(), device="cpu")
    made._halo = 8
    random_pil("RGB", (40, 90)).save(tmp_path / "a.png")
    honest, calls = image_rows.encoded, []

    def encoded(*arguments: Any, **more: Any) -> bytes:
        calls.append(arguments)
        if len(calls) > 3:
            raise OSError("the disk is full")
        return honest(*arguments, **more)

    monkeypatch.setattr(image_rows, "encoded", encoded)
    targets = [tmp_path / "new" / name for name in ("1.png", "2.png")]
    with pytest.raises(OSError, match="the disk is full"):
        made.degrade_file(tmp_path / "a.png", targets, tile=32)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("targets", [[], "a.png", Path("a.png")])
def test_targets_that_are_none(targets: Any) -> None:
    with pytest.raises(ValueError, match="expected a list of files to write"):
        DeFlowDegrader(small_model(), device="cpu").degrade_file("a.png", targets)


MEASURED = """
import resource, sys
from deflow_aug import tiled, tiling
from deflow_aug.cli import main
tiling.WORKING_MEMORY = 20_000_000
# Nothing is computed, which would take minutes: all else is as ever.
tiled.sample = lambda model, pixels, request, place=None: pixels.repeat(request.samples, 1, 1, 1, 1)
assert main(sys.argv[1:]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Of 8 megapixels the source alone would take 24 MB, and each result as much."""
    made = DeFlowDegrader(small_model(), device="cpu")
    made.save_pretrained(tmp_path / "w")
    peaks = []
    band = Image.fromarray(smooth(1000, 1000, 3))
    for height in (1000, 8000):
        path = tmp_path / f"{height}.png"
        with png_writer(path, height) as write_band:
            for _ in range(height // 1000):
                write_band(band)
        command = ["degrade", str(path), f"--output={tmp_path / 'out'}", "--samples=2"]
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, *command, f"--weights={tmp_path / 'w'}"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        peaks.append(int(done.stdout.split()[-1]))
        assert len(list((tmp_path / "out").glob(f"{height}_*.png"))) == 2
    assert peaks[1] < peaks[0] + 15e6
    with Image.open(tmp_path / "out" / "8000_2.png") as result:
        assert np.array_equal(np.asarray(result)[-1000:], np.asarray(band))


def test_large_photos_on_the_command_line_raise_no_alarm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a size that Pillow warns of: one read by rows, one decoded whole."""
    DeFlowDegrader(small_model(), device="cpu").save_pretrained(tmp_path / "w")
    for name in ("a.png", "b.jpg"):
        random_pil("RGB", (30, 50)).save(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    photos = [str(tmp_path / name) for name in ("a.png", "b.jpg")]
    command = ["degrade", *photos, f"--weights={tmp_path / 'w'}", "--tile=16"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        assert main([*command, f"--output={tmp_path / 'out'}"]) == 0
