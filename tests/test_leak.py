"""What h gives away: the statistics, the crops, the classifiers, the advice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deflow_aug.evaluation import auc, classifying, crops, leak, leak_report
from deflow_aug.evaluation.auc import Separation
from deflow_aug.evaluation.leak import Reading, Sweep
from deflow_aug.image_files import write_image

SIDE = 96


def texture(rng: np.random.Generator, brightness: float) -> np.ndarray:
    """A smooth texture in [0, 1], [SIDE, SIDE, 3], of this mean."""
    waves = rng.standard_normal((SIDE // 8, SIDE // 8, 3)).astype(np.float32)
    small = torch.from_numpy(waves).permute(2, 0, 1)[None]
    smooth = torch.nn.functional.interpolate(small, (SIDE, SIDE), mode="bicubic")[0]
    values = smooth.permute(1, 2, 0).numpy()
    return brightness + 0.06 * (values - values.mean()) / values.std()


def fine_noise(rng: np.random.Generator, size: float) -> np.ndarray:
    """Noise that has nothing left in the means of blocks of 4 x 4 pixels."""
    blocks = rng.standard_normal((SIDE // 4, 4, SIDE // 4, 4, 3))
    blocks -= blocks.mean((1, 3), keepdims=True)
    return size * blocks.reshape(SIDE, SIDE, 3)


def write_folder(folder: Path, images: list[np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        write_image((image.clip(0, 1) * 255).round().astype(np.uint8), folder / f"{number}.png")
    return folder


def two_folders(
    tmp_path: Path, count: int = 8, noise: float = 0.0, darker: float = 0.0
) -> tuple[Path, Path]:
    """Clean and degraded textures of overlapping brightness."""
    rng = np.random.default_rng(7)
    clean = [texture(rng, rng.uniform(0.35, 0.65)) for _ in range(count)]
    degraded = [
        texture(rng, rng.uniform(0.35, 0.65) - darker) + fine_noise(rng, noise)
        for _ in range(count)
    ]
    return write_folder(tmp_path / "a", clean), write_folder(tmp_path / "b", degraded)


def measure(
    clean: Path, degraded: Path, scales: tuple[int, ...], *, matched: bool = False
) -> Sweep:
    loaded = crops.load(clean, degraded, scales)
    return leak.sweep(loaded, scales, [0.03], match_brightness=matched, steps=25)


def test_equal_domains_give_nothing_away(tmp_path: Path) -> None:
    sweep = measure(*two_folders(tmp_path), (2, 8))
    for reading in sweep.readings:
        for found in (reading.network, reading.colour, reading.contrast):
            assert found.low < 0.5 < found.high
        assert not leak_report.gives_away(reading, sweep.readings)


def test_noise_that_only_a_large_s_hides_is_found_at_the_small_one(tmp_path: Path) -> None:
    sweep = measure(*two_folders(tmp_path, noise=0.08), (2, 8))
    by_scale = {reading.scale: reading for reading in sweep.readings}
    assert leak_report.leaks(by_scale[2].network)
    assert by_scale[2].network.auc > 0.9
    assert by_scale[2].colour.auc < 0.8  # not the brightness gave it away
    assert by_scale[8].network.low < 0.5
    assert [r.scale for r in sweep.readings if leak_report.gives_away(r, sweep.readings)] == [2]


def test_matching_brightness_takes_a_difference_in_brightness_out(tmp_path: Path) -> None:
    clean, degraded = two_folders(tmp_path, count=20, darker=0.2)
    plain, matched = (measure(clean, degraded, (8,), matched=m) for m in (False, True))
    assert leak_report.leaks(plain.readings[0].network)
    assert leak_report.leaks(plain.readings[0].colour)
    assert leak_report.verdict(plain, False).choice is None
    assert "--match_brightness" in leak_report.to_markdown(plain, False)
    assert not leak_report.leaks(matched.readings[0].network)
    assert not leak_report.leaks(matched.readings[0].colour)
    assert matched.readings[0].colour.auc < plain.readings[0].colour.auc - 0.1
    assert plain.units == (20, 20)
    assert max(matched.units) < 20


def test_a_sweep_repeats_itself_and_touches_no_global_generator(tmp_path: Path) -> None:
    folders = two_folders(tmp_path, count=4)
    loaded = crops.load(*folders, (4,))
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = leak.sweep(loaded, (4,), [0.0], steps=3)
    torch.rand(3)
    after_drawing = torch.get_rng_state()
    again = leak.sweep(crops.load(*folders, (4,)), (4,), [0.0], steps=3)
    assert again == first
    assert torch.equal(torch.get_rng_state(), after_drawing)
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert leak.sweep(loaded, (4,), [0.0], steps=3, seed=1) != first


def test_unreadable_small_and_surplus_images_are_left_out_and_counted(tmp_path: Path) -> None:
    clean, degraded = two_folders(tmp_path, count=6)
    whole = (clean / "0.png").read_bytes()
    (clean / "broken.png").write_bytes(whole[: len(whole) // 2])
    (clean / "dangling.png").symlink_to(clean / "nowhere.png")
    Image.new("RGB", (20, 200)).save(degraded / "small.png")
    loaded = crops.load(clean, degraded, (2,), crop=64)
    assert loaded.images == (6, 6)
    assert loaded.side == 64
    notes = " ".join(loaded.notes)
    assert "2 files" in notes
    assert "dangling.png" in notes
    assert "broken.png" in notes
    assert "small.png" in notes
    fewer = crops.load(clean, degraded, (2,), crop=64, images=5)
    assert max(fewer.images) <= 5
    assert any("5 of the 7 images" in note for note in fewer.notes)


def test_crops_are_of_their_images_at_multiples_of_every_scale(tmp_path: Path) -> None:
    clean, degraded = two_folders(tmp_path, count=4)
    loaded = crops.load(clean, degraded, (4, 8), crop=64)
    assert loaded.pixels.shape[1:] == (3, 64, 64)
    assert loaded.pixels.shape[0] == 2 * 4 * crops.CROPS
    pictures = [
        torch.from_numpy(np.array(Image.open(clean / f"{number}.png"))).permute(2, 0, 1)
        for number in range(4)
    ]
    for crop in loaded.pixels[:3]:
        found = [
            (top, left)
            for picture in pictures
            for top in range(SIDE - 63)
            for left in range(SIDE - 63)
            if torch.equal(crop[:, 0], picture[:, top, left : left + 64])
        ]
        assert len(found) == 1
        assert all(place % 8 == 0 for place in found[0])


def test_a_scale_that_leaves_too_little_is_left_out(tmp_path: Path) -> None:
    loaded = crops.load(*two_folders(tmp_path, count=4), (4, 16))
    sweep = leak.sweep(loaded, (4, 16), [0.0], steps=2)
    assert {reading.scale for reading in sweep.readings} == {4}
    assert any("s = 16 left out" in note for note in sweep.notes)


def test_crops_that_are_too_small_for_every_scale_are_refused(tmp_path: Path) -> None:
    loaded = crops.load(*two_folders(tmp_path, count=4), (16,), crop=64)
    with pytest.raises(crops.LeakError, match=r"crops of 64 pixels .* at least 128"):
        leak.sweep(loaded, (16,), [0.0], steps=2)


def test_a_few_thumbnails_do_not_make_all_crops_small(tmp_path: Path) -> None:
    clean, degraded = two_folders(tmp_path, count=6)
    expected = crops.load(clean, degraded, (2, 4)).side
    assert expected >= 64
    for folder in (clean, degraded):
        Image.new("RGB", (16, 16)).save(folder / "thumbnail.png")
    loaded = crops.load(clean, degraded, (2, 4))
    assert loaded.side == expected
    assert "thumbnail.png" in " ".join(loaded.notes)


def test_scenes_are_the_units(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        write_folder(tmp_path / name, [texture(rng, 0.5) for _ in range(8)])
        for number in range(8):
            old = tmp_path / name / f"{number}.png"
            old.rename(old.with_name(f"scene{number // 2}_{number}.png"))
    loaded = crops.load(tmp_path / "a", tmp_path / "b", (4,), scenes=r"^(.*)_\d+")
    assert len(np.unique(loaded.units)) == 8
    assert loaded.images == (8, 8)
    with pytest.raises(crops.LeakError, match="only 1 scenes"):
        crops.load(tmp_path / "a", tmp_path / "b", (4,), scenes="scene")
    with pytest.raises(crops.LeakError, match="does not match"):
        crops.load(tmp_path / "a", tmp_path / "b", (4,), scenes="kitchen")


def test_folders_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    clean, degraded = two_folders(tmp_path, count=4)
    with pytest.raises(crops.LeakError, match="share 4 of their files"):
        crops.load(clean, clean, (2,))
    with pytest.raises(crops.LeakError, match="share 4 of their files"):
        crops.load(tmp_path, degraded, (2,))
    with pytest.raises(crops.LeakError, match=r"only 0 images.*smaller than 112 x 112"):
        crops.load(clean, degraded, (2,), crop=112)
    with pytest.raises(crops.LeakError, match="multiple of 16"):
        crops.load(clean, degraded, (2, 16), crop=40)
    (degraded / "0.png").unlink()
    with pytest.raises(crops.LeakError, match="has 3 image files; at least 4"):
        crops.load(clean, degraded, (2,))


def ranked(scores: list[float], degraded: list[bool], units: list[int], fold: list[int]):
    return auc.held_out(
        np.array(scores), np.ones(len(scores)), np.array(degraded), np.array(units), np.array(fold)
    )


def test_auc_counts_pairs_of_one_fold_and_halves_of_ties() -> None:
    # Fold 0: 2 against 1 (right), fold 1: 0 against 0 (a tie). Across folds: not compared.
    found = ranked([1, 2, 0, 0], [False, True, False, True], [0, 1, 2, 3], [0, 0, 1, 1])
    assert found.auc == 0.75


def test_a_perfect_separation_of_few_images_is_not_certain() -> None:
    few, many = (
        ranked(
            [float(i >= n) for i in range(2 * n)],
            [i >= n for i in range(2 * n)],
            list(range(2 * n)),
            [i % 4 for i in range(2 * n)],
        )
        for n in (8, 40)
    )
    assert few.auc == many.auc == few.high == 1
    assert 0.5 < few.low < many.low < 1


def test_more_crops_of_the_same_images_do_not_narrow_the_interval() -> None:
    rng = np.random.default_rng(3)
    scores = rng.standard_normal(24)
    degraded, units, fold = np.arange(24) >= 12, np.arange(24), np.arange(24) % 4
    once = auc.held_out(scores, np.ones(24), degraded, units, fold)
    repeated = [np.repeat(values, 5) for values in (scores, np.ones(24), degraded, units, fold)]
    many = auc.held_out(*repeated)
    assert many.auc == pytest.approx(once.auc)
    assert many.low == pytest.approx(once.low)


def test_the_interval_covers_one_half_where_there_is_nothing() -> None:
    rng, misses = np.random.default_rng(0), 0
    for _ in range(200):
        degraded, units = np.arange(24) >= 11, np.arange(24)
        fold = auc.deal(units, degraded, 4, rng)
        x = rng.standard_normal((24, 2))
        scores = np.zeros(24)
        for number in range(4):
            train = fold != number
            beta = auc.logistic(x[train], degraded[train], np.ones(train.sum()), 1.0)
            scores[~train] = auc.probability(x[~train], beta)
        found = auc.held_out(scores, np.ones(24), degraded, units, fold)
        misses += not found.low <= 0.5 <= found.high
    assert misses <= 16


def test_folds_share_out_the_units_of_both_domains() -> None:
    units = np.repeat(np.arange(12), 3)
    fold = auc.deal(units, units >= 5, 4, np.random.default_rng(0))
    for unit in range(12):
        assert len(set(fold[units == unit])) == 1
    for domain in (units < 5, units >= 5):
        assert set(fold[domain]) == {0, 1, 2, 3}


def test_overlap_weights_of_a_logistic_regression_balance_the_features() -> None:
    rng = np.random.default_rng(1)
    degraded = np.arange(300) >= 120
    x = rng.standard_normal((300, 3)) + 0.7 * degraded[:, None]
    p = auc.probability(x, auc.logistic(x, degraded, np.ones(300), spread=1e4))
    weights = np.where(degraded, 1 - p, p)
    for domain in (degraded, ~degraded):
        assert weights[domain].sum() == pytest.approx(weights[degraded].sum(), rel=1e-4)
    means = [np.average(x[d], axis=0, weights=weights[d]) for d in (degraded, ~degraded)]
    np.testing.assert_allclose(means[0], means[1], atol=1e-5)


def test_logistic_regression_stays_finite_where_the_domains_are_apart() -> None:
    x = np.array([[-1.0], [-0.9], [0.9], [1.0]])
    beta = auc.logistic(x, np.array([False, False, True, True]), np.ones(4), spread=3.0)
    assert np.isfinite(beta).all()
    assert 1 < beta[0] < 30


def test_the_classifier_takes_tiles_of_every_size_and_trains_all_of_itself() -> None:
    net = leak.Classifier(0.03)
    generator = torch.Generator().manual_seed(0)
    for side in (leak.SMALLEST_SIDE, 13, classifying.TILE):
        h = torch.rand(4, 3, side, side, generator=generator)
        logits = net(h)
        assert logits.shape == (4,)
        logits.square().sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in net.parameters())
        net.zero_grad()


def reading(scale: int, noise: float, low: float, value: float, high: float) -> Reading:
    nothing = Separation(0.5, 0.3, 0.7)
    return Reading(scale, noise, Separation(value, low, high), nothing, nothing)


def test_the_smallest_s_is_taken_that_neither_leaks_nor_is_contradicted() -> None:
    blind, seen = (0.4, 0.5, 0.6), (0.7, 0.8, 0.9)
    sweep = Sweep(
        (
            reading(2, 0.0, *seen),
            reading(2, 0.03, *blind),  # missed: more noise, at a larger s, still leaks
            reading(4, 0.0, *seen),
            reading(4, 0.03, *seen),
            reading(8, 0.0, *seen),
            reading(8, 0.03, *blind),
            reading(16, 0.0, *blind),
            reading(16, 0.03, *blind),
        ),
        (40.0, 40.0),
        ("a note",),
    )
    found = leak_report.verdict(sweep, False)
    assert found.choice == sweep.readings[5]
    assert found.sure
    text = leak_report.to_markdown(sweep, False)
    assert "Take s = 8 with noise 0.03" in text
    assert "- a note" in text
    assert leak_report.to_dict(sweep, False)["scale"] == 8


def test_an_auc_near_one_half_is_nothing_however_sure() -> None:
    assert not leak_report.leaks(Separation(0.58, 0.55, 0.61))
    assert not leak_report.leaks(Separation(0.75, 0.45, 1.0))
    assert leak_report.leaks(Separation(0.62, 0.55, 0.69))


def test_few_images_make_a_weak_answer_and_no_s_a_remedy() -> None:
    readings = reading(2, 0.03, 0.2, 0.7, 0.95), reading(4, 0.03, 0.2, 0.55, 0.9)
    weak = Sweep(readings, (5.0, 5.0), ())
    # That an AUC of 0.7 may be chance is no reason to take its s.
    assert leak_report.verdict(weak, False).choice == readings[1]
    text = leak_report.to_markdown(weak, False)
    assert "up to 0.90 cannot be ruled out" in text
    assert "s = 4 with noise 0.03" in text
    assert "Take" not in text
    assert leak_report.to_dict(weak, False)["sure"] is False
    assert text.count("too few images to tell") == 1
    # Nor do narrow intervals of images that, weighted, are worth too few.
    narrow = Sweep((reading(4, 0.03, 0.4, 0.5, 0.6),), (1.5, 9.0), ())
    assert not leak_report.verdict(narrow, True).sure
    assert "too few images to be sure" in leak_report.to_markdown(narrow, True)
    unsure = Sweep(readings[:1], (5.0, 5.0), ())
    found = leak_report.verdict(unsure, False)
    assert found.choice is None
    assert "least is s = 2" in found.sentences[0]
    none = Sweep((reading(2, 0.03, 0.8, 0.9, 1.0),), (50.0, 50.0), ())
    found = leak_report.verdict(none, False)
    assert found.choice is None
    assert "larger --noises or --scales" in " ".join(found.sentences)


def test_what_the_mean_colour_tells_is_no_contradiction() -> None:
    """The network sees nothing, and is not said to speak for all that h holds."""
    blind, colour = Separation(0.5, 0.4, 0.6), Separation(0.9, 0.8, 1.0)
    sweep = Sweep((Reading(2, 0.03, blind, colour, blind),), (40.0, 40.0), ())
    first, second = leak_report.verdict(sweep, False).sentences
    assert "at which nothing is seen" in first
    assert second.startswith("But the mean colour alone tells the domains apart (AUC 0.90")
