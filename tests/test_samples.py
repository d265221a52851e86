"""What is seen of a run: sheets of samples, noise statistics, curves."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import small_model

from deflow_aug.config import ChannelStatistics
from deflow_aug.latent import ShiftHealth
from deflow_aug.training import curves
from deflow_aug.training.samples import (
    ELSEWHERE,
    PAIR,
    SAMPLES,
    Crops,
    SampleSheet,
    figures,
    in_colours,
)
from deflow_aug.training.tracking import shift_figures


def crops(seed: int = 0, paired: bool = False, size: int = 16) -> Crops:
    """Grey crops with a little structure, and noisy ones."""
    rng = np.random.default_rng(seed)
    clean = np.repeat(rng.integers(90, 160, (4, size, size, 1)), 3, 3).astype(np.uint8)
    noise = np.round(rng.normal(0, 10, clean.shape))
    return Crops(clean, (clean + noise).astype(np.uint8), paired)


def test_figures_are_those_of_the_noise() -> None:
    """Of noise made to measure: a level for each channel, equal neighbours in rows."""
    rng = np.random.default_rng(0)
    white = rng.normal(0, 1, (4, 64, 64))
    rows = np.repeat(white[:, :, ::2], 2, axis=2)
    noise = np.stack([8 * rows, 8 * rows, -4 * rows], axis=-1)
    clean = np.full(noise.shape, 128, np.uint8)
    found = figures(np.round(clean + noise).astype(np.uint8), clean)
    assert found["std_r"] == pytest.approx(8, rel=0.03)
    assert found["std_b"] == pytest.approx(4, rel=0.03)
    assert found["std"] == pytest.approx(math.sqrt((64 + 64 + 16) / 3), rel=0.03)
    assert found["lag_h"] == pytest.approx(0.5, abs=0.03)
    assert found["lag_v"] == pytest.approx(0, abs=0.04)
    assert found["rg"] == pytest.approx(1)
    assert found["gb"] == found["rb"] == pytest.approx(-1, abs=0.01)


def test_figures_of_no_noise() -> None:
    clean = crops().clean
    found = figures(clean, clean)
    assert found["std"] == 0
    assert math.isnan(found["lag_h"])
    one = clean.copy()
    one[0] = crops(seed=1).real[0]
    # A crop without noise has no correlation, and does not spoil the others'.
    assert not math.isnan(figures(one, clean)["lag_h"])


def test_a_sheet_has_samples_of_growing_strength() -> None:
    model = small_model(shift_init=0.3)
    sheet = SampleSheet({"degraded": crops()}, seed=3).draw(model, "step 5")
    columns = sheet.figures["degraded"]
    assert list(columns) == list(SAMPLES)  # real crops of other scenes have no noise to measure
    stds = [columns[f"temperature {t}"]["std"] for t in ("0", "0.5", "1", "1.2")]
    assert stds[0] < 1 < stds[1] < stds[2] < stds[3]
    assert columns["1, another draw"]["std"] != stds[2]
    again = SampleSheet({"degraded": crops()}, seed=3).draw(model, "step 5")
    assert again.image.tobytes() == sheet.image.tobytes()
    other = SampleSheet({"degraded": crops()}, seed=4).draw(model, "step 5")
    assert other.image.tobytes() != sheet.image.tobytes()


def test_pairs_show_real_noise(tmp_path: Path) -> None:
    model = small_model(domains=("a", "b"))
    sheet = SampleSheet({"a": crops(paired=True), "b": crops()}, 0).draw(model, "step 1")
    assert sheet.figures["a"][PAIR]["std"] == pytest.approx(10, rel=0.1)
    assert PAIR not in sheet.figures["b"]
    assert ELSEWHERE not in sheet.figures["b"]
    sheet.write(tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as picture:
        alone = SampleSheet({"a": crops(paired=True)}, 0).draw(model, "step 1").image
        assert picture.size == (alone.width, 2 * alone.height)


def test_a_model_without_a_random_shift_gets_dequantisation_noise() -> None:
    model = small_model()
    for shift in model.domain_shifts():
        shift.factor.data.zero_()
    columns = SampleSheet({"degraded": crops()}, 0).draw(model, "").figures["degraded"]
    assert columns["temperature 1"] != columns["1, another draw"]


def test_tiles_show_the_pixels() -> None:
    """The first tile of the sheet is the first clean crop, magnified."""
    shown = crops()
    sheet = np.asarray(SampleSheet({"degraded": shown}, 0).draw(small_model(), "").image)
    zoom = round(168 / 16)
    tile = shown.clean[0].repeat(zoom, 0).repeat(zoom, 1)
    left, top = 92, 62
    assert (sheet[top : top + len(tile), left : left + len(tile)] == tile).all()


def test_shift_figures_are_those_of_the_shift() -> None:
    model = small_model(domains=("a", "b"))
    found = shift_figures(model)
    assert [len(found[name]) for name in ("a", "b")] == [2, 2]
    health = ShiftHealth.of(model.domain_shifts()[1], 2)
    latent = found["b"][1]
    assert latent["mean_norm"] == health.mean_norm
    assert (latent["largest"], latent["smallest"]) == (
        health.eigenvalues[0],
        health.eigenvalues[-1],
    )


def write_run(folder: Path, steps: int) -> None:
    """Records of a run with two domains, a step that was not finite, and a return."""
    with open(folder / curves.LOG, "w") as file:
        for step in range(1, steps + 1):
            bits = {"clean": 2.0, "low": None if step == 3 else 3.0, "low|clean": 1.0}
            record = {
                "step": step, "bits": bits, "gradient_norm": None if step == 3 else 1.5, "lr": 1e-3,
                "skipped": int(step >= 3), "rolled_back": int(step >= 5), "seconds": 0.1,
                "waiting": 0.01,
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")
        file.write('{"step": 9, "bi')  # killed while it wrote
    latents = [{"mean_norm": 1.0, "largest": 2.0, "median": 1.0, "smallest": 0.0}] * 2
    noise = {"std": 4.0, "lag_h": 0.5, "lag_v": None, "rg": 0.1, "gb": 0.2, "rb": 0.3}
    with open(folder / curves.HEALTH, "w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps({"step": step, "shift": {"low": latents}}) + "\n")
            file.write(json.dumps({"step": step, "noise": {"low": noise}, "real": {"low": noise}}))
            file.write("\n")


def test_curves_of_a_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_run(tmp_path, 8)
    with Image.open(curves.draw(tmp_path)) as picture:
        drawn = np.asarray(picture.convert("L"))
    write_run(tmp_path, 2)
    with Image.open(curves.draw(tmp_path)) as picture:
        assert (np.asarray(picture.convert("L")) != drawn).any()
    assert [path.name for path in tmp_path.glob("*curves*")] == ["curves.png"]


def test_records_are_read_and_cut(tmp_path: Path) -> None:
    write_run(tmp_path, 8)
    assert [record["step"] for record in curves.read(tmp_path / curves.LOG)] == list(range(1, 9))
    curves.trim(tmp_path / curves.HEALTH, 3)
    assert [r["step"] for r in curves.read(tmp_path / curves.HEALTH)] == [1, 1, 2, 2, 3, 3]
    curves.trim(tmp_path / "none", 3)
    assert curves.read(tmp_path / "none") == []


def test_the_mapping_of_colours_is_no_noise() -> None:
    """Of a domain that is darker and of less contrast: samples without noise have none."""
    statistics = ChannelStatistics(
        clean_mean=(0.5,) * 3, clean_std=(0.2,) * 3, degraded_mean=(0.3,) * 3,
        degraded_std=(0.1,) * 3,
    )  # fmt: skip
    model = small_model(shift_init=0.0, statistics={"degraded": statistics})
    shown = crops(paired=True)
    expected = np.clip((shown.clean / 255 - 0.5) / 0.2 * 0.1 + 0.3, 0, 1) * 255
    recoloured = in_colours(model, shown.clean, "degraded")
    assert np.abs(recoloured - expected).max() <= 0.5 + 1e-6
    noise = np.random.default_rng(0).normal(0, 5, recoloured.shape)
    real = np.clip(np.rint(recoloured + noise), 0, 255).astype(np.uint8)
    sheet = SampleSheet({"degraded": Crops(shown.clean, real, paired=True)}, 0).draw(model, "")
    found = sheet.figures["degraded"]
    assert found["temperature 0"]["std"] < 1
    assert found[PAIR]["std"] == pytest.approx(5, rel=0.1)
    assert figures(real, shown.clean)["std"] > 10  # what the colours alone would seem to be
    plain = SampleSheet({"degraded": shown}, 0).draw(small_model(), "").image
    assert sheet.image.width > plain.width  # the recoloured crops are shown
    assert in_colours(small_model(), shown.clean, "degraded") is shown.clean


def test_panels_from_zero_have_room_on_top() -> None:
    """Also above a line across the panel, and with values that are all but the same."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    noise = {"std": 4.0, "lag_h": 0.5, "lag_v": None, "rg": 0.1, "gb": 0.2, "rb": 0.3}
    health = [
        {"step": 1, "noise": {"low": noise}, "real": {"low": noise | {"std": 6.0}}},
        {"step": 2, "noise": {"low": noise | {"std": None}}},
    ]
    axis = figure.subplots()
    curves._deviation(axis, [], health)
    assert axis.get_ylim() == (0, pytest.approx(6.6))
    axis = figure.subplots()
    curves._deviation(axis, [], [])
    assert axis.get_ylim() == (0, 1)


def test_noise_of_photographs_is_a_line_beside_that_of_samples() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    noise = {"std": 4.0, "lag_h": 0.5, "lag_v": 0.5, "rg": -0.4, "gb": -0.4, "rb": -0.4}
    health = [
        {"step": s, "noise": {"low": noise}, "real": {},
         "flat": {"low": {"samples": {"std": 6.0 - s}, "photographs": {"std": 3.0}}}}
        for s in (1, 2)
    ]  # fmt: skip
    axis = figure.subplots()
    curves._deviation(axis, [], health)
    lines = {str(line.get_label()): [*line.get_ydata()] for line in axis.get_lines()}
    assert lines["low, in flat areas"] == [5, 4]
    assert lines["low, in flat areas of photographs"] == [3, 3]
    axis = figure.subplots()
    curves._correlation(axis, [], health)
    assert axis.get_ylim()[0] < -0.4  # nothing lies below the panel
