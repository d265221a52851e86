"""What a run measures of its data's noise, and the cast that it takes off at its end."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import assert_same_weights, ignore, recipe, trainer, unpaired

from deflow_aug.data.unpaired import CropFolder, UnpairedBatches
from deflow_aug.training import checkpoints, correcting
from deflow_aug.training.checkpoints import CheckpointError
from deflow_aug.training.loop import Progress, Trainer
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


@pytest.fixture
def whole(batches: UnpairedBatches, tmp_path: Path) -> Trainer:
    """A run with both corrections, that nothing stops."""
    run = trainer(batches, tmp_path / "whole", measuring(fit_in_flat_areas=True))
    assert run.run(ignore)
    return run


def correct(resumed: Trainer) -> None:
    """Run on: there are the corrections to make, and no step to take."""
    assert resumed.step == resumed.recipe.steps
    steps: list[Progress] = []
    assert resumed.run(steps.append)
    assert not steps


@pytest.mark.parametrize("where", ["fit_in_flat_areas", "remove_cast"])
def test_a_run_that_ends_in_its_corrections_makes_them_again(
    where: str,
    whole: Trainer,
    batches: UnpairedBatches,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not from halfway, and not without them, though all steps were taken."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    ended = trainer(batches, tmp_path / "ended", whole.recipe)
    with monkeypatch.context() as patch:
        patch.setattr(correcting, where, fail)
        with pytest.raises(MemoryError):
            ended.run(ignore)
    resumed = trainer(batches, tmp_path / "ended", whole.recipe)
    correct(resumed)
    assert_same_weights(resumed, whole)
    # It is told from one that is to go on.
    assert trainer(batches, tmp_path / "ended", whole.recipe).state.finished
    longer = trainer(batches, tmp_path / "ended", replace(whole.recipe, steps=10))
    assert longer.run(ignore)
    assert longer.step == 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_does_not_wait_for_corrections(
    number: signal.Signals,
    whole: Trainer,
    batches: UnpairedBatches,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second one is under way; what the first one did is taken back."""

    def stop(*_: object, **__: object) -> None:
        signal.raise_signal(number)
        raise AssertionError("it went on")

    stopped = trainer(batches, tmp_path / "stopped", whole.recipe)
    with monkeypatch.context() as patch:
        patch.setattr(correcting, "remove_cast", stop)
        with pytest.warns(UserWarning, match=f"{number.name}: stopping"):
            assert not stopped.run(ignore)
    saved = checkpoints.load(checkpoints.path_of(stopped.folder, whole.recipe.steps))
    for name, tensor in stopped.average.state_dict().items():
        assert torch.equal(tensor, saved.tensors[f"average.{name}"]), name
    resumed = trainer(batches, tmp_path / "stopped", whole.recipe)
    for run in (resumed, stopped):  # in another process, and in this one
        correct(run)
        assert_same_weights(run, whole)


def test_a_request_to_stop_in_the_last_step_leaves_the_corrections(
    whole: Trainer, batches: UnpairedBatches, tmp_path: Path
) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == whole.recipe.steps:
            signal.raise_signal(signal.SIGINT)

    stopped = trainer(batches, tmp_path / "stopped", whole.recipe)
    with pytest.warns(UserWarning, match="SIGINT"):
        assert not stopped.run(stop)
    correct(stopped)
    assert_same_weights(stopped, whole)


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
