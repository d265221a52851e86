"""examples/train_sr.py: the comparison is fair, and its figures are what they say."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clean_images import degrader, same
from PIL import Image
from without_torchvision import without_torchvision

from deflow_aug import randomness
from deflow_aug.evaluation import Pair

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "train_sr.py"
SIDE = 48


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    """The example as a module."""
    with without_torchvision() as patch:
        spec = importlib.util.spec_from_file_location("train_sr", EXAMPLE)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        patch.setattr(module.DeFlowDegrader, "from_pretrained", lambda *_, **__: degrader())
        yield module


def picture(number: int, height: int, width: int) -> np.ndarray[Any, Any]:
    """Smooth, within reach of the noise of small models, and another for each number."""
    coarse = randomness.generator(number).integers(90, 160, (6, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    for number in range(5):
        Image.fromarray(picture(number, SIDE, SIDE)).save(folder / f"photo{number}.png")
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of photographs of two tiles and a rest."""
    folder = tmp_path_factory.mktemp("pairs")
    image = picture(9, 130, 260)
    noise = randomness.generator(10).normal(0, 4, image.shape)
    Image.fromarray(image).save(folder / "scene_clean.png")
    Image.fromarray((image + noise).astype(np.uint8)).save(folder / "scene_degraded.png")
    return folder


def tiny(clean: Path, *more: str) -> list[str]:
    settings = ["--held-out", "2", "--patch", "8", "--batch", "2", "--channels", "4"]
    return ["--clean", str(clean), *settings, *more]


@pytest.mark.parametrize("scale", [2, 4])
def test_it_trains_and_measures(
    example: Any, clean: Path, pairs: Path, tmp_path: Path, scale: int
) -> None:
    output = tmp_path / "comparison.png"
    more = ["--scale", str(scale), "--noise-from", str(pairs), "--output", str(output)]
    figures = example.main(tiny(clean, "--steps", "2", *more))
    trained = [f"trained on {name}" for name in ("bicubic", "white noise", "DeFlow")]
    assert list(figures) == ["bicubic upscaling", *trained]
    for by_set in figures.values():
        assert list(by_set) == ["bicubic", "DeFlow", "real noise"]
        for psnr, ssim in by_set.values():
            assert 10 < psnr < 80
            assert 0 < ssim <= 1
    # All three have learned something else.
    assert len({figures[one]["DeFlow"] for one in figures}) == 4
    with Image.open(output) as sheet:
        assert sheet.size == (6 * 2 * example.TILE, 3 * (2 * example.TILE + 16))


def test_without_training_all_are_bicubic_upscaling(example: Any, clean: Path) -> None:
    figures = example.main(tiny(clean, "--steps", "0"))
    bicubic = figures.pop("bicubic upscaling")
    assert list(figures.values()) == [bicubic] * 3


def test_held_out_images_are_not_trained_on(
    example: Any, clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[Path]] = {}

    def spy(kind: str) -> Any:
        original = getattr(example, kind)

        def make(images: list[Path], *args: Any, **kwargs: Any) -> Any:
            seen[kind] = set(images)
            return original(images, *args, **kwargs)

        return make

    for kind in ("CleanCrops", "DegradedPairs"):
        monkeypatch.setattr(example, kind, spy(kind))
    example.main(tiny(clean, "--steps", "1"))
    assert len(seen["DegradedPairs"]) == 2
    assert not seen["CleanCrops"] & seen["DegradedPairs"]
    assert seen["CleanCrops"] | seen["DegradedPairs"] == set(clean.iterdir())


@pytest.mark.parametrize("held_out", [0, 5])
def test_an_impossible_split_is_refused(example: Any, clean: Path, held_out: int) -> None:
    with pytest.raises(SystemExit, match=f"cannot hold out {held_out} of 5 images"):
        example.split(sorted(clean.iterdir()), held_out)


def network(example: Any) -> Any:
    torch.manual_seed(0)
    return example.SuperResolution(2, channels=4, blocks=1)


def test_networks_that_see_the_same_stay_the_same(example: Any) -> None:
    gt = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    lq = example.eight_bits(example.bicubic_downscale(gt, 2))  # no noise, so the white one is none
    start = network(example)
    trained = example.train(start, [{"gt": gt, "lq": lq}], 2, 3, 1e-3, 0)
    states = [list(one.state_dict().values()) for one in trained.values()]
    assert len(states) == 3
    assert same(states[0], states[1])
    assert same(states[0], states[2])
    assert not same(states[0], list(start.state_dict().values()))


def test_training_learns(example: Any) -> None:
    gt = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) / 2
    # What only the third network sees is much too bright.
    lq = example.eight_bits(example.bicubic_downscale(gt, 2) + 0.2)
    trained = example.train(network(example), [{"gt": gt, "lq": lq}], 2, 60, 5e-3, 0)
    before = example.measure(lambda x: example.bicubic_upscale(x, 2), [(lq, gt)], 2)
    after = example.measure(trained["DeFlow"], [(lq, gt)], 2)
    other = example.measure(trained["bicubic"], [(lq, gt)], 2)
    assert after[0] > before[0] + 2
    assert after[0] > other[0] + 2


def test_white_noise_has_the_strength_of_the_same_crops_degradation(example: Any) -> None:
    draws = torch.Generator().manual_seed(1)
    gt = torch.full((2, 3, 128, 128), 0.5)
    strengths = torch.tensor([4.0, 12.0]).reshape(2, 1, 1, 1) / 255
    # Every two neighbours share their noise.
    rough = torch.randn(2, 3, 64, 32, generator=draws).repeat_interleave(2, -1)
    lq = example.eight_bits(gt[..., :64, :64] + strengths * rough)
    inputs = example.all_inputs({"gt": gt, "lq": lq}, 2, draws)
    assert torch.equal(inputs["DeFlow"], lq)
    assert torch.equal(inputs["bicubic"], torch.full_like(lq, 128 / 255))
    white = inputs["white noise"] - inputs["bicubic"]
    expected = (lq - inputs["bicubic"]).std((1, 2, 3))
    torch.testing.assert_close(white.std((1, 2, 3)), expected, rtol=0.03, atol=0)
    assert (white[0, :, :, 1:] * white[0, :, :, :-1]).mean().abs() < 0.05 * white[0].var()


@pytest.mark.parametrize("scale", [2, 4])
def test_real_noise_is_added_as_it_is_from_the_middle_of_the_tile(example: Any, scale: int) -> None:
    clean = np.full((2 * 128 + 5, 3 * 128, 3), 100, np.uint8)
    noise = randomness.generator(0).integers(-30, 30, clean.shape)
    lq, gt = example.with_real_noise(Pair("one", clean, (clean + noise).astype(np.uint8)), scale)
    side = 128 // scale
    assert lq.shape == (6, 3, side, side)
    assert torch.equal(gt, torch.full((6, 3, 128, 128), 100 / 255))
    for number in range(6):
        top, left = (start * 128 + (128 - side) // 2 for start in divmod(number, 3))
        expected = 100 + noise[top : top + side, left : left + side]
        np.testing.assert_array_equal((lq[number] * 255).round().permute(1, 2, 0), expected)


def test_upscaling_is_bicubic_as_elsewhere(example: Any) -> None:
    image = randomness.generator(3).random((20, 24), np.float32)
    expected = Image.fromarray(image).resize((48, 40), Image.Resampling.BICUBIC)
    result = example.bicubic_upscale(torch.from_numpy(image)[None, None], 2)[0, 0]
    np.testing.assert_allclose(result.numpy(), np.asarray(expected), atol=1e-5)


def test_psnr_is_the_mean_over_images_without_borders(example: Any) -> None:
    gt = torch.full((2, 3, 24, 24), 100 / 255)
    result = gt.clone()
    result[0] += 2 / 255
    result[1] += 8 / 255
    result[..., 0, :] = 1.0  # in the border
    psnr, ssim = example.measure(lambda _: result, [(gt, gt)], 2)
    expected = [20 * math.log10(255 / error) for error in (2, 8)]
    assert psnr == pytest.approx(sum(expected) / 2, abs=1e-3)
    assert 0.9 < ssim < 1
