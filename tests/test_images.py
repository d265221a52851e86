"""Images in and out: every kind that is accepted, every file that is not."""

from __future__ import annotations

import builtins
import copy
import io
import os
import pickle
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps, ImageSequence, JpegImagePlugin

from deflow_aug import image_files, images
from deflow_aug.image_files import (
    IMAGE_SUFFIXES,
    UnreadableImageError,
    image_size,
    read_image,
    write_image,
)
from deflow_aug.images import unpack

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    ),
]
TENSOR_DTYPES = [
    torch.uint8,
    torch.uint16,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]
needs_avif = pytest.mark.skipif(".avif" not in IMAGE_SUFFIXES, reason="Pillow without AVIF")
ARRAY_DTYPES = ["uint8", "uint16", ">u2", "float16", "float32", "float64", ">f4"]


def random_array(shape: tuple[int, ...], dtype: Any = np.uint8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        # Through float32, the precision that images are worked on with.
        return rng.random(shape, dtype=np.float32).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def random_pil(mode: str, size: tuple[int, int] = (7, 5), seed: int = 0) -> Image.Image:
    """A PIL image with random bytes in every band, of any mode but 1."""
    like = np.asarray(Image.new(mode, size))
    if mode == "I":
        values = random_array(like.shape, np.uint16, seed).astype(np.int32)
    else:
        values = random_array(like.shape, like.dtype, seed)
    if mode in ("La", "RGBa"):  # premultiplied colours do not exceed their alpha
        values = np.minimum(values, values[..., -1:])
    image = Image.frombytes(mode, size, values.tobytes())
    if mode in ("P", "PA"):
        image.putpalette(random_array((768,), seed=seed + 1).tobytes())
    return image


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    if dtype in (torch.uint8, torch.uint16):
        name = str(dtype).removeprefix("torch.")
        return torch.from_numpy(random_array(shape, name, seed))
    return torch.from_numpy(random_array(shape, np.float32, seed)).to(dtype)


def same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    # torch.equal is not there for uint16 everywhere
    return a.dtype == b.dtype and a.device == b.device and a.tolist() == b.tolist()


def inverted(pixels: torch.Tensor) -> torch.Tensor:
    """One sample, different from the input everywhere but at mid grey."""
    return 1 - pixels[None]


# -- PIL images ------------------------------------------------------------------------------

SAME_MODE = ["L", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "I", "F"]
SAME_MODE += ["I;16", "I;16B", "I;16L", "I;16N", "YCbCr", "HSV", "LAB"]


@pytest.mark.parametrize("mode", SAME_MODE)
def test_pil_identity_is_bit_exact(mode: str) -> None:
    image = random_pil(mode, (40, 30))
    before = image.tobytes()
    unpacked = unpack(image)
    assert unpacked.pixels.shape == (1, 3, 30, 40)
    assert unpacked.pixels.dtype == torch.float32
    assert 0 <= unpacked.pixels.min() < 0.1
    assert 0.9 < unpacked.pixels.max() <= 1
    back = unpacked.pack(unpacked.pixels[None])
    assert isinstance(back, Image.Image)
    assert (back.mode, back.size) == (mode, image.size)
    assert back.tobytes() == before
    assert image.tobytes() == before


@pytest.mark.parametrize("mode", SAME_MODE)
def test_pil_changed_colours_arrive(mode: str) -> None:
    # The bounds are what 8 bits in that mode can tell apart at worst, in dark or strong colours.
    image = random_pil(mode)
    if mode in ("HSV", "LAB", "YCbCr"):
        image = images._converted(random_pil("RGB"), mode)
    elif mode in ("La", "RGBa"):  # where alpha is small few colours can be told apart
        bands = np.array(image)
        bands[..., -1] = 255
        image = Image.frombytes(mode, image.size, bands.tobytes())
    elif mode == "CMYK":
        image = Image.merge("CMYK", [*image.split()[:3], Image.new("L", image.size, 90)])
    unpacked = unpack(image)
    sample = inverted(unpacked.pixels)
    again = unpack(unpacked.pack(sample)).pixels
    tolerance = {"HSV": 6, "LAB": 20, "YCbCr": 3}.get(mode, 0.6) / 255
    torch.testing.assert_close(again, sample[0], atol=tolerance, rtol=0)
    assert (again - sample[0]).abs().mean() < 2 / 255
    assert (again - unpacked.pixels).abs().max() > 0.5


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa", "RGBX"])
def test_pil_alpha_is_untouched(mode: str) -> None:
    image = random_pil(mode, (40, 30))
    unpacked = unpack(image)
    back = unpacked.pack(torch.rand(1, 1, 3, 30, 40))
    assert np.array_equal(np.asarray(back)[..., -1], np.asarray(image)[..., -1])
    assert not np.array_equal(np.asarray(back)[..., 0], np.asarray(image)[..., 0])


def test_pil_values() -> None:
    assert unpack(Image.new("RGB", (2, 1), (255, 51, 0))).pixels[0, :, 0, 0].tolist() == [
        1.0,
        pytest.approx(0.2),
        0.0,
    ]
    assert (
        unpack(Image.new("I;16", (2, 1), 13107)).pixels[0, :, 0, 1].tolist()
        == [pytest.approx(0.2)] * 3
    )
    # half the cyan under one fifth of black
    cmyk = unpack(Image.new("CMYK", (1, 1), (255, 51, 0, 51))).pixels.flatten().tolist()
    assert cmyk == pytest.approx([0, 0.64, 0.8])
    # premultiplied: stored 60 under alpha 120 is one half
    assert unpack(Image.new("La", (1, 1), (60, 120))).pixels.flatten().tolist() == [0.5] * 3
    # every premultiplied sample is multiplied again
    packed = unpack(Image.new("La", (1, 1), (60, 120))).pack(torch.ones(1, 1, 3, 1, 1))
    assert packed.getpixel((0, 0)) == (120, 120)


@pytest.mark.parametrize(("mode", "white"), [("L", 255), ("I;16", 65535)])
def test_grey_is_the_luma_of_the_sample(mode: str, white: int) -> None:
    sample = torch.tensor([1.0, 0.5, 0.25]).reshape(1, 1, 3, 1, 1)
    packed = unpack(Image.new(mode, (1, 1))).pack(sample)
    assert packed.getpixel((0, 0)) == round(white * (0.299 + 0.587 * 0.5 + 0.114 * 0.25))


def test_cmyk_keeps_black_ink_where_it_can() -> None:
    image = Image.new("CMYK", (1, 1), (10, 20, 30, 100))

    def packed(value: float) -> tuple[int, ...]:
        return unpack(image).pack(torch.full((1, 1, 3, 1, 1), value)).getpixel((0, 0))

    assert packed(0.3)[3] == 100
    assert packed(1.0) == (0, 0, 0, 0)  # white paper has no ink
    assert packed(0.0) == (255, 255, 255, 100)
    # unseen inks under full black are kept
    image = Image.new("CMYK", (1, 1), (10, 20, 30, 255))
    assert packed(0.0) == (10, 20, 30, 255)


def test_bilevel_comes_back_grey() -> None:
    image = Image.fromarray(random_array((6, 5)) > 100)
    assert image.mode == "1"
    unpacked = unpack(image)
    back = unpacked.pack(unpacked.pixels[None])
    assert back.mode == "L"
    assert np.array_equal(np.asarray(back), np.asarray(image) * 255)


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))])
def test_palette_comes_back_in_full_colour(transparency: int | bytes | None) -> None:
    image = random_pil("P", (30, 20))
    if transparency is not None:
        image.info["transparency"] = transparency
    expected = image.convert("RGB" if transparency is None else "RGBA")
    unpacked = unpack(image)
    back = unpacked.pack(unpacked.pixels[None])
    assert back.mode == expected.mode
    assert back.tobytes() == expected.tobytes()
    assert "transparency" not in back.info
    noisy = unpacked.pack(torch.rand(1, 1, 3, 20, 30))
    if transparency is not None:
        assert noisy.getchannel("A").tobytes() == expected.getchannel("A").tobytes()


def test_palette_with_alpha_band_comes_back_rgba() -> None:
    image = random_pil("PA")
    unpacked = unpack(image)
    back = unpacked.pack(unpacked.pixels[None])
    assert back.mode == "RGBA"
    assert back.tobytes() == image.convert("RGBA").tobytes()


@pytest.mark.parametrize(
    ("mode", "key", "result"), [("L", 7, "LA"), ("RGB", (1, 2, 3), "RGBA"), ("1", 255, "LA")]
)
def test_transparent_colour_becomes_alpha(mode: str, key: Any, result: str) -> None:
    image = Image.new(mode, (4, 3), key)
    image.putpixel((1, 1), 0)
    image.info["transparency"] = key
    back = unpack(image).pack(torch.full((1, 1, 3, 3, 4), 0.9))
    assert back.mode == result
    alpha = np.asarray(back)[..., -1]
    assert alpha[1, 1] == 255
    assert alpha.sum() == 255  # all others are transparent still, though their colour changed


def test_pil_info_that_matters_is_kept() -> None:
    image = random_pil("RGB")
    exif = Image.Exif()
    exif[0x010E] = "a picture"
    kept = {"icc_profile": b"profile", "exif": exif.tobytes(), "dpi": (300, 300)}
    image.info.update(kept, comment="dropped", duration=3)
    (back,) = unpack(image).pack(torch.rand(1, 1, 3, 5, 7), stack=True)
    assert back.info == kept
    assert back.getexif()[0x010E] == "a picture"


def test_stack_of_pil_images() -> None:
    samples = torch.rand(3, 1, 3, 5, 7)
    unpacked = unpack(random_pil("RGBA"))
    stacked = unpacked.pack(samples, stack=True)
    assert isinstance(stacked, list)
    assert [image.mode for image in stacked] == ["RGBA"] * 3
    for image, sample in zip(stacked, samples, strict=True):
        assert image.tobytes() == unpacked.pack(sample[None]).tobytes()


@pytest.mark.parametrize("value", [-1, 65536])
def test_mode_i_out_of_range(value: int) -> None:
    with pytest.raises(ValueError, match=rf"\[0, 65535\], got \[.*{value}"):
        unpack(_with_pixel(Image.new("I", (2, 2)), value))


def test_mode_f_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"got \[0, 200\]; divide by 255"):
        unpack(_with_pixel(Image.new("F", (2, 2)), 200.0))


def _with_pixel(image: Image.Image, value: Any) -> Image.Image:
    image.putpixel((0, 0), value)
    return image


# -- arrays ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ARRAY_DTYPES)
@pytest.mark.parametrize(
    "shape", [(6, 5), (6, 5, 1), (6, 5, 2), (6, 5, 3), (6, 5, 4), (2, 6, 5, 3), (2, 6, 5, 2)]
)
def test_array_identity_is_bit_exact(shape: tuple[int, ...], dtype: str) -> None:
    array = random_array(shape, dtype)
    before = array.copy()
    unpacked = unpack(array)
    assert unpacked.pixels.shape == (shape[0] if len(shape) == 4 else 1, 3, 6, 5)
    back = unpacked.pack(unpacked.pixels[None])
    assert back.dtype == array.dtype
    assert np.array_equal(back, before)
    assert np.array_equal(array, before)
    samples = torch.rand(3, *unpacked.pixels.shape)
    stacked = unpacked.pack(samples, stack=True)
    assert stacked.shape == (3, *shape)
    assert stacked.dtype == array.dtype
    for one, sample in zip(stacked, samples, strict=True):
        assert np.array_equal(one, unpacked.pack(sample[None]))
        assert not np.array_equal(one, array)
    if shape[-1] in (2, 4):
        assert np.array_equal(stacked[..., -1], np.stack([array[..., -1]] * 3))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_integer_survives(dtype: str, channels: int) -> None:
    top = np.iinfo(dtype).max
    array = np.arange(top + 1, dtype=dtype).reshape(-1, 64, 1).repeat(channels, axis=2)
    unpacked = unpack(array)
    assert unpacked.pixels.max() == 1
    assert np.array_equal(unpacked.pack(unpacked.pixels[None]), array)


def test_layout_of_arrays() -> None:
    array = random_array((6, 5, 3))
    expected = torch.from_numpy(array.astype(np.float32) / 255).permute(2, 0, 1)[None]
    assert torch.equal(unpack(array).pixels, expected)
    flipped = array[::-1, ::-1]  # negative strides
    assert torch.equal(unpack(flipped).pixels, expected.flip(2, 3))
    frozen = array.copy()
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(unpack(frozen).pixels, expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_rounding_is_to_nearest_and_clamped(channels: int) -> None:
    row = torch.tensor([-0.5, 0.6 / 255, 1.4 / 255, 0.9999, 1.5])
    samples = row.expand(1, 1, 3, 1, 5)
    packed = unpack(np.zeros((1, 5, channels), np.uint8)).pack(samples)
    assert packed[0].T.tolist() == [[0, 1, 1, 255, 255]] * channels
    packed = unpack(np.zeros((1, 5, channels), np.float32)).pack(samples)
    assert np.array_equal(packed[0].T, [row.clamp(0, 1).numpy()] * channels)


def test_later_changes_of_the_input_do_not_show() -> None:
    for image in (random_array((6, 5, 4), np.float32), random_tensor((4, 6, 5), torch.float32)):
        before = copy.deepcopy(image)
        unpacked = unpack(image)
        image[:] = 0
        back = unpacked.pack(unpacked.pixels[None])
        assert np.array_equal(np.asarray(back), np.asarray(before))


# -- tensors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TENSOR_DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 6, 5), (2, 6, 5), (3, 6, 5), (4, 6, 5), (2, 3, 6, 5), (2, 2, 6, 5), (2, 1, 6, 5)]
)
def test_tensor_identity_is_bit_exact(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    tensor = random_tensor(shape, dtype).to(device)
    before = tensor.clone()
    unpacked = unpack(tensor)
    assert unpacked.pixels.shape == (shape[0] if len(shape) == 4 else 1, 3, 6, 5)
    assert unpacked.pixels.dtype == torch.float32
    assert unpacked.pixels.device == tensor.device
    assert same_tensor(unpacked.pack(unpacked.pixels[None]), before)
    assert same_tensor(tensor, before)
    samples = torch.rand(3, *unpacked.pixels.shape)  # on the CPU, wherever the input is
    stacked = unpacked.pack(samples, stack=True)
    assert stacked.shape == (3, *shape)
    for one, sample in zip(stacked, samples, strict=True):
        assert same_tensor(one, unpacked.pack(sample[None]))
        assert not same_tensor(one, before)
    if shape[-3] in (2, 4):
        assert same_tensor(stacked[1][..., -1, :, :], before[..., -1, :, :])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tensor_memory_format_is_kept(channels: int) -> None:
    tensor = torch.rand(2, channels, 6, 5).to(memory_format=torch.channels_last)
    unpacked = unpack(tensor)
    assert unpacked.pixels.is_contiguous()
    one = unpacked.pack(unpacked.pixels[None])
    assert one.stride() == tensor.stride()
    assert torch.equal(one, tensor)
    image = torch.rand(6, 5, channels).permute(2, 0, 1)
    two = unpack(image).pack(torch.rand(2, 1, 3, 6, 5), stack=True)
    assert [t.stride() for t in two] == [image.stride()] * 2


def test_expanded_tensor() -> None:
    tensor = torch.rand(1, 1, 5).expand(3, 6, 5)
    unpacked = unpack(tensor)
    assert torch.equal(unpacked.pack(unpacked.pixels[None]), tensor)


def test_gradients_are_cut() -> None:
    tensor = torch.rand(3, 6, 5, requires_grad=True)
    unpacked = unpack(tensor)
    assert not unpacked.pixels.requires_grad
    packed = unpacked.pack(torch.rand(1, 1, 3, 6, 5, requires_grad=True))
    assert not packed.requires_grad
    parameter = torch.nn.Parameter(torch.rand(3, 6, 5))
    assert type(unpack(parameter).pack(torch.rand(1, 1, 3, 6, 5))) is torch.Tensor


@pytest.mark.parametrize("stack", [False, True])
def test_packed_tensors_can_be_trained_on(stack: bool) -> None:
    tensor = torch.rand(4, 6, 5)
    with torch.inference_mode():
        unpacked = unpack(tensor)
        packed = unpacked.pack(unpacked.pixels[None], stack=stack)
    assert not packed.is_inference()
    packed.mul_(0.5)
    weight = torch.ones((), requires_grad=True)
    (packed * weight).sum().backward()  # saves the tensor, which inference tensors refuse
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(tensor.sum().item() / 2)


def test_tensor_subclass_is_kept() -> None:
    class Picture(torch.Tensor):
        pass

    unpacked = unpack(torch.rand(4, 6, 5).as_subclass(Picture))
    assert type(unpacked.pixels) is torch.Tensor
    assert type(unpacked.pack(torch.rand(1, 1, 3, 6, 5))) is Picture


def test_unpacked_images_can_be_pickled() -> None:
    image = random_pil("RGBA")
    unpacked = pickle.loads(pickle.dumps(unpack(image)))
    assert unpacked.pack(unpacked.pixels[None]).tobytes() == image.tobytes()


# -- what is refused -------------------------------------------------------------------------

REFUSED: list[tuple[Any, type[Exception], str]] = [
    ("picture.png", TypeError, "got str; read a file with read_image"),
    (None, TypeError, "got NoneType"),
    ([[0, 1]], TypeError, "got list"),
    (np.zeros((4, 4), np.int64), TypeError, "got int64"),
    (np.zeros((4, 4), bool), TypeError, "got bool"),
    (torch.zeros(3, 4, 4, dtype=torch.int32), TypeError, "got int32"),
    (torch.zeros(3, 4, 4, dtype=torch.complex64), TypeError, "got complex64"),
    (torch.zeros(4, 4), ValueError, r"shape \(4, 4\); add the channel axis with img\[None\]"),
    (torch.zeros(1, 1, 3, 4, 4), ValueError, r"\(1, 1, 3, 4, 4\)"),
    (torch.zeros(6, 5, 3), ValueError, r"\(6, 5, 3\); channels look.*img.permute\(2, 0, 1\)"),
    (torch.zeros(2, 6, 5, 3), ValueError, r"channels look.*img.permute\(0, 3, 1, 2\)"),
    (torch.zeros(5, 6, 7), ValueError, r"got shape \(5, 6, 7\)$"),
    (torch.zeros(3, 0, 7), ValueError, r"empty: shape \(3, 0, 7\)"),
    (torch.zeros(0, 3, 4, 7), ValueError, "empty"),
    (np.zeros((3, 6, 7)), ValueError, r"\(3, 6, 7\); channels look.*np.moveaxis"),
    (np.zeros((6, 7, 5)), ValueError, r"got shape \(6, 7, 5\)$"),
    (np.zeros(6), ValueError, r"got shape \(6,\)"),
    (np.zeros((0, 5)), ValueError, "empty"),
    (Image.new("RGB", (0, 5)), ValueError, "empty: size 0x5"),
    (np.full((4, 4), 200.0), ValueError, r"got \[200, 200\]; divide by 255"),
    (np.full((4, 4), 40000.0), ValueError, "divide by 65535"),
    (np.full((4, 4, 3), 1.0011), ValueError, r"got \[1.0011, 1.0011\]; clamp"),
    (torch.full((4, 4, 4), -0.0011), ValueError, "clamp"),
    (torch.full((3, 4, 4), -1.0), ValueError, r"\(image \+ 1\) / 2"),
    (torch.tensor([-2.1, 2.6]).reshape(1, 1, 2), ValueError, "undo the normalisation first$"),
    (torch.full((3, 4, 4), float("nan")), ValueError, "finite"),
    (torch.tensor([0.5, float("inf")]).reshape(1, 1, 2), ValueError, "finite"),
    (np.array([[0.5, np.nan]], np.float16), ValueError, "finite"),
]


@pytest.mark.parametrize(("image", "error", "message"), REFUSED)
def test_refused_images(image: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        unpack(image)


def test_slight_overshoot_is_clamped() -> None:
    pixels = unpack(torch.tensor([-0.0009, 1.0009]).reshape(1, 1, 2)).pixels
    assert [pixels.min().item(), pixels.max().item()] == [0, 1]


def test_refused_samples() -> None:
    unpacked = unpack(np.zeros((6, 5), np.uint8))
    good = torch.rand(1, 1, 3, 6, 5)
    with pytest.raises(TypeError, match=r"torch.uint8 tensor"):
        unpacked.pack((good * 255).to(torch.uint8))
    with pytest.raises(TypeError, match="ndarray"):
        unpacked.pack(good.numpy())  # type: ignore[arg-type]
    for wrong in (good[0], good[..., :4], good[:, :, :1], good[:0], good.repeat(1, 2, 1, 1, 1)):
        with pytest.raises(ValueError, match=r"\(N, 1, 3, 6, 5\) with N at least 1, got"):
            unpacked.pack(wrong, stack=True)
    with pytest.raises(ValueError, match="got 2 samples; pass stack=True"):
        unpacked.pack(good.repeat(2, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="finite"):
        unpacked.pack(good / 0)


# -- reading ---------------------------------------------------------------------------------


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep_png(array: np.ndarray, extra: bytes = b"") -> bytes:
    """A 16-bit PNG written by hand, independent of the writers under test."""
    height, width, channels = array.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + extra
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


def deep_tiff(array: np.ndarray, orientation: int = 1) -> bytes:
    """A 16-bit RGB TIFF written by hand, uncompressed."""
    height, width, channels = array.shape
    data = array.astype("<u2").tobytes()
    count = 11
    bits_at = 8 + 2 + 12 * count + 4
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, bits_at),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, bits_at + 2 * channels),
        (274, 3, 1, orientation),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
        (284, 3, 1, 1),
    ]
    return (
        struct.pack("<2sHIH", b"II", 42, 8, count)
        + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        + struct.pack(f"<I{channels}H", 0, *[16] * channels)
        + data
    )


def oriented(array: np.ndarray, orientation: int) -> np.ndarray:
    """What Pillow makes of each band of a uint8 or uint16 array with this EXIF orientation."""
    bands = []
    for band in np.moveaxis(array, -1, 0):
        image = Image.fromarray(np.ascontiguousarray(band))
        image.getexif()[0x0112] = orientation
        bands.append(np.asarray(ImageOps.exif_transpose(image)))
    return np.stack(bands, axis=-1)


def exif_bytes(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "a picture"
    return exif.tobytes()


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_read_deep_png(tmp_path: Path, channels: int) -> None:
    array = random_array((6, 5, channels), np.uint16)
    path = tmp_path / "deep.png"
    path.write_bytes(deep_png(array))
    read = read_image(path)
    assert isinstance(read, np.ndarray)
    assert read.dtype == np.uint16
    assert np.array_equal(read, array)
    unpacked = unpack(read)
    assert np.array_equal(unpacked.pack(unpacked.pixels[None]), array)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_deep_files_upright(tmp_path: Path, orientation: int) -> None:
    array = random_array((6, 5, 3), np.uint16)
    expected = oriented(array, orientation)
    png = deep_png(array, png_chunk(b"eXIf", exif_bytes(orientation).removeprefix(b"Exif\0\0")))
    (tmp_path / "deep.png").write_bytes(png)
    (tmp_path / "deep.tif").write_bytes(deep_tiff(array, orientation))
    for name in ("deep.png", "deep.tif"):
        read = read_image(tmp_path / name)
        assert isinstance(read, np.ndarray)
        assert np.array_equal(read, expected), name


@pytest.mark.parametrize("white", [65535, 1023, 255])
def test_read_ppm_of_any_depth(tmp_path: Path, white: int) -> None:
    array = random_array((6, 5, 3), np.uint16) // (65535 // white)
    array[0, 0] = white
    path = tmp_path / "deep.ppm"
    pixels = array.astype(">u2" if white > 255 else "u1").tobytes()
    path.write_bytes(b"P6\n5 6\n%d\n" % white + pixels)
    read = read_image(path)
    assert isinstance(read, np.ndarray if white > 255 else Image.Image)
    torch.testing.assert_close(
        unpack(read).pixels[0].permute(1, 2, 0),
        torch.from_numpy(array.astype(np.float32)) / white,
        atol=1e-5,
        rtol=0,
    )


def test_read_deep_grey_png_is_a_pil_image(tmp_path: Path) -> None:
    array = random_array((6, 5), np.uint16)
    Image.fromarray(array).save(tmp_path / "grey.png")
    read = read_image(tmp_path / "grey.png")
    assert isinstance(read, Image.Image)
    assert read.mode == "I;16"
    assert np.array_equal(np.asarray(read), array)


@pytest.mark.parametrize("suffix", [".jpg", pytest.param(".avif", marks=needs_avif)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_photographs_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:8, :8] = 255  # a corner and what is next to it tell all eight orientations apart
    stored[:8, 8:16] = 128
    path = tmp_path / f"turned{suffix}"
    options: dict[str, Any] = {"subsampling": 0 if suffix == ".jpg" else "4:4:4"}
    Image.fromarray(stored).save(path, exif=exif_bytes(orientation), quality=95, **options)
    read = read_image(path)
    assert isinstance(read, Image.Image)
    expected = oriented(stored, orientation).astype(int)
    assert read.size == expected.shape[1::-1]
    assert np.abs(np.asarray(read) - expected).max() < 20
    assert read.getexif().get(0x0112, 1) == 1
    assert read.getexif()[0x010E] == "a picture"
    # and it stays upright on the way through unpack and a file
    back = unpack(read).pack(unpack(read).pixels[None])
    write_image(back, tmp_path / "again.jpg")
    again = Image.open(tmp_path / "again.jpg")
    assert again.size == read.size
    assert again.getexif().get(0x0112, 1) == 1
    assert again.getexif()[0x010E] == "a picture"


@pytest.mark.parametrize("kind", ["png", "deep png", "jpg"])
def test_damaged_exif_does_not_cost_the_picture(tmp_path: Path, kind: str) -> None:
    junk = b"not EXIF data"
    array = random_array((6, 5, 3), np.uint16 if kind == "deep png" else np.uint8)
    path = tmp_path / "a.png"
    if kind == "deep png":
        path.write_bytes(deep_png(array, png_chunk(b"eXIf", junk)))
    else:
        path = path.with_suffix(f".{kind}")
        Image.fromarray(array).save(path, exif=b"Exif\0\0" + junk)
    read = read_image(path)
    if kind != "jpg":
        assert np.array_equal(np.asarray(read), array)
    write_image(read, tmp_path / "b.tif")
    again = read_image(tmp_path / "b.tif")
    assert np.array_equal(np.asarray(again), np.asarray(read))


def test_read_palette_png_with_transparency(tmp_path: Path) -> None:
    image = random_pil("P")
    image.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    read = read_image(tmp_path / "palette.png")
    assert isinstance(read, Image.Image)
    assert read.mode == "P"
    back = unpack(read).pack(torch.rand(1, 1, 3, 5, 7))
    assert back.mode == "RGBA"
    assert np.array_equal(np.asarray(back)[..., 3], np.asarray(image))


def test_read_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    read = read_image(tmp_path / "print.jpg")
    assert isinstance(read, Image.Image)
    assert read.mode == "CMYK"
    assert unpack(read).pixels[0, :, 4, 4].tolist() == pytest.approx([1, 0, 0], abs=0.02)


def test_read_grey_alpha_png(tmp_path: Path) -> None:
    image = random_pil("LA")
    image.save(tmp_path / "la.png")
    read = read_image(str(tmp_path / "la.png"))
    assert isinstance(read, Image.Image)
    assert (read.mode, read.tobytes()) == ("LA", image.tobytes())


@pytest.mark.parametrize("name", ["frames.gif", "frames.webp", "frames.tif"])
def test_first_frame_is_read(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    options: dict[str, Any] = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert ImageSequence.all_frames(Image.open(tmp_path / name))[2:]
    read = read_image(tmp_path / name)
    assert isinstance(read, Image.Image)
    assert np.array_equal(np.asarray(read.convert("RGB")), np.asarray(frames[0]))


def test_read_result_needs_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    random_pil("RGB").save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        read = read_image(path)
    path.unlink()
    assert isinstance(read, Image.Image)
    assert read.tobytes() == random_pil("RGB").tobytes()


def jpeg_bytes() -> bytes:
    buffer = io.BytesIO()
    random_pil("RGB", (64, 64)).save(buffer, "JPEG")
    return buffer.getvalue()


def png_bytes() -> bytes:
    buffer = io.BytesIO()
    random_pil("RGB", (64, 64)).save(buffer, "PNG")
    return buffer.getvalue()


def damaged_png() -> bytes:
    data = bytearray(png_bytes())
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


UNREADABLE = {
    "empty.png": (b"", r"0 bytes"),
    "text.png": (b"this is no image\n" * 20, "not an image"),
    "truncated.jpg": (jpeg_bytes()[:-500], "truncated"),
    "truncated.png": (png_bytes()[:-3000], "."),
    "header_only.jpg": (jpeg_bytes()[:30], "."),
    "damaged.png": (damaged_png(), "."),
    "truncated_deep.png": (deep_png(random_array((64, 64, 3), np.uint16))[:-9000], "."),
    "truncated_deep.tif": (deep_tiff(random_array((64, 64, 3), np.uint16))[:-9000], "."),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files(tmp_path: Path, name: str) -> None:
    data, message = UNREADABLE[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UnreadableImageError, match=message) as caught:
        read_image(path)
    cause = str(caught.value).removeprefix(f"cannot read image {path}: ")
    assert cause
    assert cause != str(caught.value)


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_pil("RGB", (64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImageError, match=r"bomb\.png.*decompression bomb"):
        read_image(tmp_path / "bomb.png")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        read_image(tmp_path / "missing.png")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder") as caught:
        read_image(tmp_path / "folder")
    assert not isinstance(caught.value, UnreadableImageError)


def test_memory_errors_are_not_blamed_on_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(image: Image.Image) -> Image.Image:
        raise MemoryError

    random_pil("RGB").save(tmp_path / "a.png")
    monkeypatch.setattr(image_files, "_upright", full)
    with pytest.raises(MemoryError):
        read_image(tmp_path / "a.png")


def test_without_opencv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep.png").write_bytes(deep_png(random_array((6, 5, 3), np.uint16)))
    random_pil("RGB").save(tmp_path / "plain.png")
    plain_import = builtins.__import__

    def broken(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "cv2":
            raise ImportError("libGL.so.1: cannot open shared object file")
        return plain_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(ImportError, match=r"libGL.*pip install opencv-python-headless"):
        read_image(tmp_path / "deep.png")
    with pytest.raises(ImportError, match=r"pip install opencv-python-headless"):
        write_image(random_array((6, 5, 3), np.uint16), tmp_path / "out.png")
    assert isinstance(read_image(tmp_path / "plain.png"), Image.Image)


# -- writing ---------------------------------------------------------------------------------

LOSSLESS = [
    *[(".png", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")],
    *[(".tif", mode) for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I", "F", "I;16")],
    *[(".tiff", mode) for mode in ("I;16B", "CMYK", "YCbCr", "LAB")],
    *[(".bmp", mode) for mode in ("1", "L", "P", "RGB")],
    *[(".webp", mode) for mode in ("RGB", "RGBA")],
    *[(".pgm", mode) for mode in ("1", "L")],
    *[(".ppm", mode) for mode in ("1", "L", "RGB")],
    (".gif", "P"),
    (".PNG", "RGB"),
]


@pytest.mark.parametrize(("suffix", "mode"), LOSSLESS)
def test_written_images_read_back(tmp_path: Path, suffix: str, mode: str) -> None:
    image = Image.fromarray(random_array((5, 7)) > 99) if mode == "1" else random_pil(mode)
    path = tmp_path / f"picture{suffix}"
    write_image(image, path)
    read = read_image(path)
    assert isinstance(read, Image.Image)
    assert read.mode == mode
    if mode == "P":  # writers may renumber palettes
        image, read = image.convert("RGB"), read.convert("RGB")
    assert read.tobytes() == image.tobytes()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "I;16L", "I;16N"])
@pytest.mark.parametrize("suffix", [".png", ".pgm", ".tif"])
def test_sixteen_bit_grey_in_any_mode(tmp_path: Path, suffix: str, mode: str) -> None:
    image = random_pil(mode)
    write_image(image, tmp_path / f"grey{suffix}")
    read = read_image(tmp_path / f"grey{suffix}")
    assert np.array_equal(np.asarray(read), np.asarray(image))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 3), (6, 5, 4)])
def test_written_arrays_read_back(
    tmp_path: Path, suffix: str, shape: tuple[int, ...], dtype: str
) -> None:
    array = random_array(shape, dtype)
    before = array.copy()
    write_image(array, tmp_path / f"array{suffix}")
    read = np.asarray(read_image(tmp_path / f"array{suffix}"))
    assert read.dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(read.reshape(shape), before)
    assert np.array_equal(array, before)


def test_write_grey_alpha_arrays(tmp_path: Path) -> None:
    shallow = random_array((6, 5, 2))
    write_image(shallow, tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), shallow)
    deep = random_array((6, 5, 2), np.uint16)
    write_image(deep, tmp_path / "b.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "b.png")), deep[..., [0, 0, 0, 1]])


def test_write_deep_ppm(tmp_path: Path) -> None:
    array = random_array((6, 5, 3), np.uint16)
    write_image(array, tmp_path / "a.ppm")
    read = read_image(tmp_path / "a.ppm")
    assert isinstance(read, np.ndarray)
    assert np.array_equal(read, array)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg"])
def test_jpeg_keeps_fine_colour(tmp_path: Path, suffix: str) -> None:
    # Columns of alternating colour with the same luma vanish when chroma is subsampled.
    array = np.full((16, 16, 3), (200, 80, 80), np.uint8)
    array[:, ::2] = (80, 140, 80)
    write_image(array, tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as image:
        assert isinstance(image, JpegImagePlugin.JpegImageFile)
        assert all(part[1:3] == (1, 1) for part in image.layer)
        assert np.abs(np.asarray(image).astype(int) - array).max() < 20


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_profile_and_exif_are_written(tmp_path: Path, suffix: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = random_pil("RGB")
    image.info.update(icc_profile=profile, exif=exif_bytes(1), dpi=(300.0, 300.0))
    write_image(image, tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as read:
        assert read.info["icc_profile"] == profile
        assert read.getexif()[0x010E] == "a picture"
        if suffix != ".webp":
            assert read.info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_senseless_dpi_is_dropped(tmp_path: Path) -> None:
    image = random_pil("RGB")
    for dpi in [(0, 0), (float("nan"), 72), (-1, 1)]:
        image.info["dpi"] = dpi
        write_image(image, tmp_path / "a.jpg")
        with Image.open(tmp_path / "a.jpg") as read:
            assert "dpi" not in read.info


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        (".jpg", "RGBA"),
        (".jpeg", "LA"),
        (".jpg", "I;16"),
        (".jpg", "P"),
        (".bmp", "RGBA"),
        (".gif", "RGB"),
        (".ppm", "RGBA"),
        (".pgm", "RGB"),
        (".webp", "I;16"),
        (".webp", "CMYK"),
        (".png", "CMYK"),
        (".png", "F"),
        (".tif", "HSV"),
    ],
)
def test_modes_that_a_suffix_cannot_hold(tmp_path: Path, suffix: str, mode: str) -> None:
    with pytest.raises(ValueError, match=rf"\{suffix} files cannot hold mode {mode} "):
        write_image(random_pil(mode), tmp_path / f"a{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_other_refused_writes(tmp_path: Path) -> None:
    deep = random_array((6, 5, 3), np.uint16)
    keyed = Image.new("RGB", (3, 3))
    keyed.info["transparency"] = (0, 0, 0)
    refused: list[tuple[Any, str, type[Exception], str]] = [
        (deep, "a.jpg", ValueError, r"\.jpg files cannot hold 16-bit colour with 3 channels"),
        (deep[..., [0, 1, 2, 0]], "a.ppm", ValueError, "16-bit colour with 4 channels"),
        (deep.astype(np.float32), "a.png", TypeError, "got float32; floats in"),
        (torch.zeros(3, 4, 4), "a.png", TypeError, "got Tensor"),
        (deep[None], "a.png", ValueError, r"got shape \(1, 6, 5, 3\)"),
        (deep.T, "a.png", ValueError, r"got shape \(3, 5, 6\)"),
        (deep[:0], "a.png", ValueError, "empty"),
        (random_pil("RGB"), "a.xyz", ValueError, r"unknown suffix '\.xyz', use one of \.bmp"),
        (random_pil("RGB"), "a", ValueError, "unknown suffix ''"),
        (_with_pixel(Image.new("I", (2, 2)), -1), "a.png", ValueError, "cannot hold mode I "),
        (keyed, "a.jpg", ValueError, "transparent colour"),
        (random_pil("RGB"), "missing/a.png", FileNotFoundError, "create it first"),
    ]
    for image, name, error, message in refused:
        with pytest.raises(error, match=message):
            write_image(image, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_failed_writes_leave_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    write_image(random_pil("RGB"), path)
    before = path.read_bytes()

    def refuse(source: Any, target: Any) -> None:
        assert Path(source).parent == path.parent
        assert Path(source).stat().st_size > 0
        raise PermissionError("target is open elsewhere")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", refuse)
        with pytest.raises(PermissionError):
            write_image(random_pil("RGB", seed=5), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    write_image(random_pil("RGB", seed=5), path)
    assert read_image(path).tobytes() == random_pil("RGB", seed=5).tobytes()


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_image(random_pil("RGB"), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


# -- kinds of files --------------------------------------------------------------------------


def test_every_suffix_can_be_read(tmp_path: Path) -> None:
    assert {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"} < IMAGE_SUFFIXES
    for suffix in IMAGE_SUFFIXES:
        path = tmp_path / f"a{suffix}"
        if suffix == ".avif":
            random_pil("L").save(path)
        else:
            write_image(random_pil("L"), path)
        read = read_image(path)
        assert isinstance(read, Image.Image)
        assert read.size == (7, 5)


@pytest.mark.parametrize("read", [read_image, image_size])
@pytest.mark.parametrize(
    ("suffix", "message"), [(".NEF", "develop it"), (".heic", r"\.heic files .* convert it to PNG")]
)
def test_photographs_of_other_kinds_are_refused(
    tmp_path: Path, read: Callable[[Path], object], suffix: str, message: str
) -> None:
    """Camera raw too where Pillow reads it: as a TIFF file, whose picture is a small preview."""
    path = tmp_path / f"a{suffix}"
    if suffix == ".NEF":
        random_pil("RGB").save(path, "TIFF")
    else:
        path.write_bytes(b"another format")
    with pytest.raises(UnreadableImageError, match=message):
        read(path)


@needs_avif
def test_avif_files(tmp_path: Path) -> None:
    image = Image.new("RGBA", (32, 24), (200, 100, 50, 255))
    image.paste((20, 40, 60, 0), (0, 0, 16, 24))
    path = tmp_path / "a.avif"
    image.save(path, quality=100)
    read = read_image(path)
    assert isinstance(read, Image.Image)
    assert (read.mode, image_size(path)) == ("RGBA", (24, 32))
    assert np.abs(np.asarray(read).astype(int) - np.asarray(image))[:, 20:].max() < 8
    assert np.array_equal(np.asarray(read)[..., 3], np.asarray(image)[..., 3])
    sound = path.read_bytes()
    for length in (0, 100, len(sound) // 2, len(sound) - 20):
        path.write_bytes(sound[:length])
        with pytest.raises(UnreadableImageError, match=r"cannot read image .*a\.avif: \w"):
            read_image(path)


@pytest.mark.parametrize("read", [read_image, image_size])
def test_a_pipe_is_no_image(tmp_path: Path, read: Callable[[Path], object]) -> None:
    """To open it would wait for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UnreadableImageError, match="no regular file"):
        read(tmp_path / "pipe.png")


@pytest.mark.parametrize("read", [read_image, image_size])
def test_an_image_over_the_limit_says_which_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object]
) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(UnreadableImageError, match=r"raise PIL\.Image\.MAX_IMAGE_PIXELS") as caught:
        read(tmp_path / "large.png")
    assert "more than 0.001 megapixels, Pillow's limit" in str(caught.value)
    assert ".." not in str(caught.value).replace(str(tmp_path), "")


@pytest.mark.parametrize("read", [read_image, image_size])
def test_tiff_files_of_floating_point_colours(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    cv2 = pytest.importorskip("cv2")
    cv2.imwrite(str(tmp_path / "a.tif"), np.zeros((4, 5, 3), np.float32))
    expected = r"a TIFF file with 3 channels of 32-bit floating-point .* 8 or 16 bits first"
    with pytest.raises(UnreadableImageError, match=expected):
        read(tmp_path / "a.tif")
