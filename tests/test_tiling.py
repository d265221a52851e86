"""Large images: computed in tiles they are what they are when computed at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import small_model
from test_degrader import CALM, KINDS, STATISTICS, difference, look, numbers, stored, tensor
from torch import Tensor
from torch.testing import assert_close

from deflow_aug import DeFlowDegrader, tiled, tiling
from deflow_aug.cli import main
from deflow_aug.config import ModelConfig
from deflow_aug.halo import cut_errors, measured_halo, radius
from deflow_aug.pieces import Box, cut
from deflow_aug.resize import bicubic_downscale
from deflow_aug.sampling import Place, Request, sample
from deflow_aug.tiling import QUICK, bytes_per_pixel, most_pixels, plan

DOG = Path(__file__).parents[1] / "examples" / "images" / "dog.png"
FURTHEST = 100
"""Pixels from which on nothing reaches a pixel in a small model: the trunk's 17 convolutions of
h(x), a quarter as large, 4 pixels of each bicubic kernel, and the flow's convolutions."""


def make(halo: int | None = None, **settings: Any) -> DeFlowDegrader:
    """A small model with every kind of noise; tiles see so many pixels around them."""
    made = DeFlowDegrader(small_model(**{**CALM, **settings}), device="cpu", dequantize=True)
    made._halo = halo
    return made


def calls(made: DeFlowDegrader) -> dict[str, Callable[..., Any]]:
    return {
        "degrade": made.degrade,
        "restore": made.restore,
        "mean": lambda *args, **more: made.restore(*args, mean=True, **more),
    }


# -- results -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["degrade", "restore", "mean"])
def test_tiles_that_see_far_enough_change_nothing(way: str) -> None:
    call = calls(make(FURTHEST))[way]
    image = tensor(2, 3, 131, 250)
    whole = call(image, n_samples=2, seed=[1, 2], tile=None)
    tiles = call(image, n_samples=2, seed=[1, 2], tile=70)
    assert_close(tiles, whole, rtol=0, atol=1e-5)
    assert difference(whole[0], image) > 0.01


@pytest.mark.parametrize("way", ["degrade", "restore"])
def test_measured_halo_suffices(way: str) -> None:
    seeing, blind = make(), make(halo=0)
    image = tensor(1, 3, 150, 161)
    whole = calls(seeing)[way](image, seed=1, tile=0)
    tiles = calls(seeing)[way](image, seed=1, tile=48)
    assert difference(tiles, whole) < 1 / 255
    assert difference(calls(blind)[way](image, seed=1, tile=48), whole) > 1.5 / 255
    assert 8 <= seeing.halo() < FURTHEST


def test_default_weights_in_tiles() -> None:
    made = DeFlowDegrader.from_pretrained(device="cpu")
    with Image.open(DOG) as photo:
        image = np.asarray(photo.convert("RGB"))[:160, :200]
    whole, tiles = (made.degrade(image, seed=1, tile=tile) for tile in (None, 96))
    assert np.abs(whole.astype(int) - tiles).max() <= 1
    assert (whole != tiles).mean() < 0.01
    assert np.abs(whole.astype(int) - image).mean() > 1


def test_temperature_domain_and_statistics_of_each_image_in_tiles() -> None:
    made = make(FURTHEST, domains=("night", "day"), statistics={"night": STATISTICS})
    image = tensor(3, 3, 60, 150)
    arguments: dict[str, Any] = {"temperature": [0.2, 1.0, 1.5], "n_samples": 3, "seed": [3, 4, 5]}
    arguments["domain"] = ["random", {"night": 0.3, "day": 0.7}, "day"]
    whole = made.degrade(image, **arguments, tile=None)
    assert_close(made.degrade(image, **arguments, tile=40), whole, rtol=0, atol=1e-5)


PICTURES: dict[str, Callable[[], Any]] = {
    mode: lambda mode=mode: picture(mode)
    for mode in ("1", "P", "PA", "La", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F")
} | {"I;16B": lambda: Image.frombytes("I;16B", (9, 6), stored("uint16", 6, 9).tobytes())}


def picture(mode: str) -> Image.Image:
    if mode == "I":
        return Image.fromarray(stored("uint16", 6, 9).astype(np.int32))
    if mode == "F":
        return Image.fromarray(stored("float32", 6, 9))
    image = Image.fromarray(stored("uint8", 6, 9, 4))
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image.convert("RGB"), *profiles, outputMode="LAB")
    if mode in ("La", "PA"):
        return image.convert("LA").convert(mode)
    return image.convert(mode) if mode == "RGBa" else image.convert("RGB").convert(mode)


@pytest.mark.parametrize("kind", [*KINDS, *PICTURES])
@pytest.mark.parametrize("number", [1, 2])
def test_tiles_of_every_kind_of_image(kind: str, number: int) -> None:
    """Each window is the whole image here, so that no rounding may differ."""
    made = make(FURTHEST)
    image = {**KINDS, **PICTURES}[kind]()
    if isinstance(image, Image.Image):
        image.info["dpi"] = (72, 72)
    whole = made.degrade(image, n_samples=number, seed=1, tile=None)
    tiles = made.degrade(image, n_samples=number, seed=1, tile=4)
    assert type(whole) is type(tiles)
    for one, other in zip(*([x] if number == 1 else x for x in (whole, tiles)), strict=True):
        assert look(one) == look(other)
        assert np.array_equal(numbers(one), numbers(other))
        if isinstance(image, Image.Image):
            assert one.info == other.info
    if isinstance(tiles, (np.ndarray, Tensor)):
        assert look(tiles) == look(whole)


def test_a_parameter_in_tiles_comes_back_as_a_tensor_that_can_be_trained_on() -> None:
    made = make(FURTHEST)
    result = made.degrade(torch.nn.Parameter(tensor(3, 12, 12)), seed=1, tile=8)
    assert type(result) is Tensor
    weight = torch.ones(3, 1, 1, requires_grad=True)
    (weight * result).sum().backward()
    assert weight.grad is not None


def test_inference_mode_around_tiles_gives_what_can_be_trained_on() -> None:
    made = make(FURTHEST)
    with torch.inference_mode():
        results = [made.degrade(tensor(3, 12, 12), seed=1, tile=tile) for tile in (None, 8)]
    for result in results:
        assert not result.is_inference()
        torch.nn.Conv2d(3, 1, 1)(result).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_halo_is_measured_whatever_the_default_dtype(dtype: torch.dtype) -> None:
    image, expected = tensor(3, 150, 161), make().halo()
    before, made = torch.get_default_dtype(), make()
    torch.set_default_dtype(dtype)
    try:
        result = made.degrade(image, seed=1, tile=48)
    finally:
        torch.set_default_dtype(before)
    assert made.halo() == expected
    assert torch.equal(result, make().degrade(image, seed=1, tile=48))


def test_what_is_wrong_with_an_image_is_told_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("computed")

    made = make(8)
    monkeypatch.setattr(tiled, "sample", fail)
    image = np.full((40, 40, 3), 0.5)
    image[39, 39] = 3.0
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        made.degrade(image, tile=16)


@pytest.mark.parametrize("tile", [-1, 1.5, "large", True, [64]])
def test_tiles_that_are_none(tile: Any) -> None:
    with pytest.raises(ValueError, match='tile must be "auto", None, or the side'):
        make().degrade(tensor(3, 8, 8), tile=tile)


# -- windows ---------------------------------------------------------------------------------------


def test_h_of_a_window_is_that_of_the_whole_image() -> None:
    """But for two pixels at borders that are not the image's."""
    x = tensor(1, 3, 80, 96)
    whole = bicubic_downscale(x, 4)
    part = bicubic_downscale(x[..., 16:64, 32:], 4)
    assert_close(part[..., 2:-2, 2:], whole[..., 6:14, 10:], rtol=0, atol=1e-6)


def test_a_window_at_the_border_is_padded_as_the_image_is() -> None:
    """Sides that are no multiples: the mirrored pixels and their noise are the same."""
    model = small_model(**CALM)
    x = tensor(1, 3, 131, 233)
    request = Request([5], torch.ones(1), ["degraded"], dequantize=True)
    whole = sample(model, x, request)
    part = sample(model, x[..., 20:, 80:], request, Place(20, 80, 131, 233))
    assert_close(part[..., FURTHEST:, FURTHEST:], whole[..., 120:, 180:], rtol=0, atol=1e-5)


# -- plans -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", ["auto", 100])
@pytest.mark.parametrize("size", [(1, 333, 501), (3, 1000, 203), (2, 16, 5000)])
def test_tiles_cover_everything_once(tile: Any, size: tuple[int, int, int]) -> None:
    limit, halo = 60_000, 24
    tiles = plan(size, tile, 8, limit, lambda: halo)
    assert len(tiles) > 1
    count = np.zeros(size, int)
    for part in tiles:
        box, window = part.box, part.window
        count[box.images, box.rows, box.columns] += 1
        for one, seen, side in zip(
            (box.rows, box.columns), (window.rows, window.columns), size[1:], strict=True
        ):
            assert seen.start == max(0, one.start - halo)
            assert seen.stop == min(side, one.stop + halo)
            assert seen.start % 8 == 0
            assert seen.stop % 8 == 0 or seen.stop == side
        images = window.images.stop - window.images.start
        assert (
            tile != "auto" or images * math.prod(s + 7 for s in window_size(window)) <= limit * 1.1
        )
        assert tile == "auto" or max(window_size(box)) <= 104
    assert (count == 1).all()


def window_size(box: Box) -> tuple[int, int]:
    return box.rows.stop - box.rows.start, box.columns.stop - box.columns.start


def test_small_images_are_computed_at_once() -> None:
    def halo() -> int:
        raise AssertionError("measured without need")

    for tile, limit in (("auto", 2 * 104 * 104), (None, 10), (0, 10), (100, 10)):
        assert len(plan((2, 99, 100), tile, 8, limit, halo)) == 1
    # A batch is rather taken apart than its images.
    parts = plan((5, 99, 100), "auto", 8, 2 * 104 * 104, halo)
    assert [part.box.images for part in parts] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert all(part.box.area == 9900 for part in parts)


def test_the_grid_computes_little_more_than_the_image() -> None:
    """3840 x 2160 with the published x4 model, whose halo is 32."""
    limit = most_pixels(ModelConfig(), 1, torch.device("cpu"), 10**8)
    tiles = plan((1, 2160, 3840), "auto", 8, limit, lambda: 32)
    assert max(part.window.area for part in tiles) <= limit
    assert sum(part.window.area for part in tiles) < 1.18 * 2160 * 3840


def test_where_hardly_a_halo_fits_tiles_stay_useful() -> None:
    tiles = plan((1, 1000, 1000), "auto", 8, 100, lambda: 64)
    assert max(part.window.area for part in tiles) < 4 * (3 * 64 + 16) ** 2
    assert sum(part.window.area for part in tiles) < 16 * 1000 * 1000


def test_auto_keeps_to_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(model: Any, pixels: Tensor, *rest: Any) -> Tensor:
        seen.append(pixels.shape[0] * pixels.shape[-2] * pixels.shape[-1])
        return sample(model, pixels, *rest)

    made = make(32)
    image = tensor(2, 3, 130, 400)
    whole = made.degrade(image, seed=7)
    monkeypatch.setattr(tiled, "sample", spy)
    monkeypatch.setattr(tiling, "WORKING_MEMORY", 22_000 * bytes_per_pixel(made.model.config, 1))
    assert difference(made.degrade(image, seed=7), whole) < 0.1 / 255
    assert len(seen) > 4
    assert max(seen) <= 22_000
    seen.clear()
    part = made.degrade(image[..., :80], seed=7)
    assert part.shape == (2, 3, 130, 80)
    assert seen == [2 * 130 * 80]
    made.degrade(image[..., :100], seed=7)
    assert seen[1:] == [130 * 100] * 2


def test_memory_grows_with_model_and_samples() -> None:
    config = ModelConfig()
    assert 2750 < bytes_per_pixel(config, 1) < 3000  # 2856 measured, of 724 x 724
    assert bytes_per_pixel(config, 50) > bytes_per_pixel(config, 1) + 49 * 12
    # Measured with 128 samples of the default weights, of 512 x 512: 63.
    assert bytes_per_pixel(config, 1000) > 1000 * 60
    cpu = torch.device("cpu")
    assert most_pixels(config, 1, cpu, 10**8) == QUICK
    many = most_pixels(config, 300, cpu, 10**8)
    assert many == tiling.WORKING_MEMORY // bytes_per_pixel(config, 300) < QUICK / 2 + 1
    assert bytes_per_pixel(ModelConfig(steps=4, hidden=32), 1) < bytes_per_pixel(config, 1) / 2


@torch.inference_mode()
def test_no_more_is_kept_between_encoding_and_decoding_than_they_need() -> None:
    """Of each step the coupling's response, and shift and scale of the injector; no maps."""
    model = small_model(hidden=8)
    config = model.config
    prepared = model.features(tensor(1, 3, 64, 64))
    kept = {
        (storage := one.untyped_storage()).data_ptr(): storage.nbytes()
        for steps in prepared.steps
        for one in tensors(steps)
    }
    floats = sum(
        config.steps * (config.hidden + 2 * channels) * 64**2 // 4**level
        for level, channels in enumerate(config.level_channels, start=1)
    )
    assert sum(kept.values()) == 4 * floats


def tensors(prepared: Any) -> Iterator[Tensor]:
    """All maps in what was prepared; parameters, and what they were folded into, are none."""
    if isinstance(prepared, Tensor):
        yield prepared
    elif isinstance(prepared, (list, tuple)):
        for one in prepared:
            yield from tensors(one)


# -- the halo --------------------------------------------------------------------------------------


def test_errors_vanish_with_the_distance_from_the_cut() -> None:
    model = small_model(**CALM)
    for restoring in (False, True):
        errors = cut_errors(model, restoring)
        assert errors[:8].max() > 1 / 255
        assert errors[FURTHEST:].max() < 1e-5
    assert measured_halo(model) % model.config.size_multiple == 0


def test_the_halo_covers_every_domain() -> None:
    model = small_model(domains=("weak", "strong"), **CALM)
    before = measured_halo(model)
    for shift in model.domain_shifts():
        shift.factor.data[1] *= 100
    assert measured_halo(model) > before


def test_radius() -> None:
    errors = torch.zeros(100)
    assert radius(errors, 0.1, 8) == 0
    errors[17] = 0.2
    assert radius(errors, 0.1, 1) == 18
    assert radius(errors, 0.1, 8) == 24
    # Rounding at all distances is no reach, unless it is visible.
    errors += 0.3 / 255
    assert radius(errors, 0.1 / 255, 8) == 104
    errors[:] = 0.12 / 255
    errors[17] = 0.2
    assert radius(errors, 0.1 / 255, 8) == 24


def test_torchs_default_device_plays_no_part() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 72, 3), dtype=np.uint8)
    expected = make().degrade(image, seed=1, tile=32)
    made = make()
    with torch.device("meta"):  # holds no data
        result = made.degrade(image, seed=1, tile=32)
    assert np.array_equal(result, expected)


# -- pieces and the command line ---------------------------------------------------------------


def test_a_piece_is_of_the_kind_of_the_image() -> None:
    box = Box(slice(0, 1), slice(1, 3), slice(2, 7))
    for kind in KINDS.values():
        image = kind()
        piece = cut(image, box)
        assert type(piece) is type(image)
        values = numbers(image)
        if isinstance(image, Tensor):
            expected = (values[:1] if image.ndim == 4 else values)[..., 1:3, 2:7]
        else:
            expected = values[:1, 1:3, 2:7] if values.ndim == 4 else values[1:3, 2:7]
        assert np.array_equal(numbers(piece), expected)


def test_tiles_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make(FURTHEST)
    made.save_pretrained(tmp_path / "w")
    Image.fromarray(stored("uint8", 60, 70, 3)).save(tmp_path / "a.png")
    command = ["degrade", str(tmp_path / "a.png"), f"--weights={tmp_path / 'w'}"]
    results = []
    for tile in ("0", "48", "auto"):
        output = tmp_path / tile
        assert main([*command, f"--output={output}", f"--tile={tile}"]) == 0
        results.append(np.asarray(Image.open(output / "a.png")).astype(int))
    assert np.array_equal(results[0], results[2])
    assert np.abs(results[0] - results[1]).max() <= 1
    for wrong in ("-1", "1.5", "large", ""):
        assert main([*command, f"--output={tmp_path / 'no'}", f"--tile={wrong}"]) == 2
        assert "--tile takes auto or a number of pixels" in capsys.readouterr().err
