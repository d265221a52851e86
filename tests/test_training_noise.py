"""What a run measures of its data's noise, and the cast that it takes off at its end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import assert_same_weights, ignore, recipe, trainer, unpaired

from deflow_aug.data.unpaired import CropFolder, UnpairedBatches
from deflow_aug.training import correcting
from deflow_aug.training.checkpoints import CheckpointError
from deflow_aug.training.recipe import Recipe

SIGMA = 6.0


def flat_pictures(folder: Path, sigma: float, seed: int) -> CropFolder:
    """Grey stripes with white noise of this standard deviation, in levels."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(2):
        stripes = np.repeat(rng.uniform(40, 200, (12, 1, 1)), 16, 0)
        noisy = stripes + sigma * rng.standard_normal((192, 160, 3))
        pixels = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return CropFolder(folder, crop=8, align=2)


@pytest.fixture
def batches(tmp_path: Path) -> UnpairedBatches:
    folders = {
        "clean": flat_pictures(tmp_path / "data" / "clean", 1.0, 0),
        "degraded": flat_pictures(tmp_path / "data" / "degraded", SIGMA, 1),
    }
    return UnpairedBatches(folders, 2, seed=0)


def measuring(**changes: object) -> Recipe:
    asked = {"dequantize_as_noise": 1.5, "condition_as_noise": 4.0, "remove_cast": True}
    return recipe(**(asked | changes))


def test_noise_of_the_data_becomes_that_of_the_training(
    batches: UnpairedBatches, tmp_path: Path
) -> None:
    run = trainer(batches, tmp_path / "run", measuring())
    curve = run.recipe.model.dequantization_curve
    assert curve is not None
    widths = np.array([curve.red, curve.green, curve.blue])
    assert widths[:, 2:6].mean() * 255 / 12**0.5 == pytest.approx(1.5 * SIGMA, rel=0.1)
    assert run.recipe.model.conditioning_noise * 255 == pytest.approx(4 * SIGMA, rel=0.1)
    assert run.model.config == run.recipe.model


def test_a_resumed_run_keeps_what_it_measured(batches: UnpairedBatches, tmp_path: Path) -> None:
    whole = trainer(batches, tmp_path / "whole", measuring())
    assert whole.run(ignore)
    part = trainer(batches, tmp_path / "stopped", measuring())

    def stop(progress: object) -> None:
        if part.step == 3:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        part.run(stop)
    resumed = trainer(batches, tmp_path / "stopped", measuring())
    assert resumed.recipe == whole.recipe
    assert resumed.run(ignore)
    assert_same_weights(resumed, whole)
    with pytest.raises(CheckpointError, match="dequantize_as_noise: 2"):
        trainer(batches, tmp_path / "stopped", measuring(dequantize_as_noise=2.0))


@pytest.mark.parametrize(
    ("correction", "corrects"), [("remove_cast", ".mean"), ("fit_in_flat_areas", ".factor")]
)
def test_shifts_are_corrected_in_the_average_alone(
    correction: str, corrects: str, batches: UnpairedBatches, tmp_path: Path
) -> None:
    runs = [
        trainer(batches, tmp_path / str(on), measuring(**{"remove_cast": False, correction: on}))
        for on in (False, True)
    ]
    for run in runs:
        assert run.run(ignore)
    kept, corrected = runs
    for name, tensor in kept.model.state_dict().items():
        assert torch.equal(tensor, corrected.model.state_dict()[name]), name
    moved = [
        name
        for name, tensor in kept.average.state_dict().items()
        if not torch.equal(tensor, corrected.average.state_dict()[name])
    ]
    assert moved == [name for name in kept.average.state_dict() if name.endswith(corrects)]


def test_pictures_cached_on_disk_are_corrected_by_too(
    batches: UnpairedBatches, tmp_path: Path
) -> None:
    settings, averages = measuring(fit_in_flat_areas=True), []
    folders = {
        name: CropFolder(tmp_path / "data" / name, 8, 2, cache_dir=tmp_path / "cache")
        for name in ("clean", "degraded")
    }
    for number, own in enumerate((batches, UnpairedBatches(folders, 2, seed=0))):
        run = trainer(own, tmp_path / str(number), settings)
        assert run.run(ignore)
        averages.append(run)
    assert list((tmp_path / "cache").rglob("*"))
    assert_same_weights(*averages)


@pytest.mark.parametrize("where", ["fit_in_flat_areas", "remove_cast"])
def test_a_run_that_ends_in_its_corrections_makes_them_again(
    where: str, batches: UnpairedBatches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from halfway, and not without them, though all steps were taken."""
    settings = measuring(fit_in_flat_areas=True)
    whole = trainer(batches, tmp_path / "whole", settings)
    assert whole.run(ignore)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    ended = trainer(batches, tmp_path / "ended", settings)
    with monkeypatch.context() as patch:
        patch.setattr(correcting, where, stop)
        with pytest.raises(KeyboardInterrupt):
            ended.run(ignore)
    resumed = trainer(batches, tmp_path / "ended", settings)
    assert 0 < resumed.step < settings.steps
    assert resumed.run(ignore)
    assert_same_weights(resumed, whole)


def test_without_flat_areas_m_stays(tmp_path: Path) -> None:
    asked = {"dequantize_as_noise": 0.0, "condition_as_noise": 0.0, "remove_cast": False}
    runs = [
        trainer(
            unpaired(tmp_path / "data"),
            tmp_path / str(fit),
            measuring(fit_in_flat_areas=fit, **asked),
        )
        for fit in (False, True)
    ]
    assert runs[0].run(ignore)
    with pytest.warns(UserWarning, match="M stays as it was learned: none of the"):
        assert runs[1].run(ignore)
    assert_same_weights(runs[0], runs[1])


def test_without_flat_areas_the_settings_stay(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the noise of degraded cannot be measured"):
        run = trainer(unpaired(tmp_path / "data"), tmp_path / "run", measuring())
    assert run.recipe.model == measuring().model
