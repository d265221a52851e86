"""Seeing a run: pictures and figures in its folder, and in TensorBoard on request."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deflow_aug.config import CLEAN
from deflow_aug.flat import Image8
from deflow_aug.latent import ShiftHealth
from deflow_aug.model import DeFlow
from deflow_aug.training import curves, noise_check
from deflow_aug.training.noise_check import Comparison, Noise
from deflow_aug.training.samples import AS_LEARNED, PAIR, SampleSheet, Sheet, sheet_path

if TYPE_CHECKING:
    from deflow_aug.training.loop import Progress, Trainer

SHIFTS_PER_SHEET = 10
"""How often the latent shift is written down between two sheets of samples."""


class TrackingError(RuntimeError):
    """TensorBoard was asked for and is not installed."""


class Watch:
    """Looks at a run after every step; for the main process alone.

    In the run's folder it keeps ``samples/step-*.png``, ``curves.png`` and ``health.jsonl`` (the
    latent shift, and the noise of samples).

    Args:
        trainer: the run, at the step that it goes on from.
        sheet: what its samples are drawn from.
        tensorboard: whether to write ``tensorboard/`` as well.

    :attr:`compared` has the noise of the last samples beside that of the photographs, by domain.

    Raises:
        TrackingError: if ``tensorboard`` is asked for and not installed.
    """

    def __init__(self, trainer: Trainer, sheet: SampleSheet, *, tensorboard: bool = False) -> None:
        self.trainer, self.sheet, self.output = trainer, sheet, trainer.output
        self.steps, self.every = trainer.recipe.steps, trainer.recipe.sample_every
        self.board = TensorBoard(self.output, trainer.step) if tensorboard else None
        self.plots = curves.available()
        if not self.plots:
            warnings.warn(curves.INSTALL, stacklevel=2)
        self.drawn = trainer.step
        self.compared: dict[str, Comparison] = {}
        self.health = self.output / curves.HEALTH
        # What it has of the last step is written anew at the end.
        curves.trim(self.health, min(trainer.step, self.steps - 1))

    def __call__(self, progress: Progress) -> None:
        step = progress.step
        self._tell(progress_scalars(progress), step)
        if step == self.steps:
            return  # the shifts are yet to be corrected
        if step == 1 or step % max(1, self.every // SHIFTS_PER_SHEET) == 0:
            self._shift(step)
        if step % self.every == 0:
            self.pictures(step)

    def pictures(self, step: int) -> None:
        """Draw the samples and the curves of now; if that fails, say so and go on."""
        # Too little memory to sample beside the training, say, or a step whose samples are not
        # finite: no reason to end it.
        with _forgiven(f"no pictures of step {step}"):
            self._samples(step)
        self._curves(step)

    def _samples(self, step: int) -> None:
        sheet = self.sheet.draw(self.trainer.average, f"step {step}")
        sheet.write(self._sheet(step))
        noise = {domain: columns[AS_LEARNED] for domain, columns in sheet.figures.items()}
        real = {
            domain: columns[PAIR] for domain, columns in sheet.figures.items() if PAIR in columns
        }
        self.compared = self._compared()
        flat = {domain: asdict(one) for domain, one in self.compared.items()}
        self._write({"step": step, "noise": noise, "real": real, "flat": flat})
        if self.board:
            with self._board_forgiven():
                self.board.sheet(sheet, step)

    def finish(self) -> Path | None:
        """Draw what has come of it in the end; returns the sheet, if there is one."""
        step = self.trainer.step
        path = self._sheet(step)
        path.unlink(missing_ok=True)  # of before the corrections, if the run was to be longer
        self.compared = {}
        self._shift(step)
        self.pictures(step)
        return path if path.exists() else None

    @cached_property
    def photographs(self) -> dict[str, Noise]:
        """The noise in flat areas of each degraded domain, where M is set by these."""
        recipe = self.trainer.recipe
        if not recipe.fit_in_flat_areas or recipe.model.shift == "zero":
            return {}
        return noise_check.of_photographs(self.trainer.feed.folders, recipe.seed)

    @cached_property
    def clean_crops(self) -> Image8:
        """What is degraded to measure the noise of samples."""
        return noise_check.clean_crops(self.trainer.feed.folders[CLEAN], self.trainer.recipe.seed)

    def _compared(self) -> dict[str, Comparison]:
        """Samples and photographs of each domain whose noise can be measured."""
        run, found = self.trainer, {}
        for domain, photographs in self.photographs.items():
            samples = noise_check.of_samples(
                run.average, domain, self.clean_crops, photographs, run.recipe.seed
            )
            if samples is not None:
                found[domain] = Comparison(samples, photographs)
        return found

    def close(self) -> None:
        """Finish what is open, and show how far the run came."""
        if self.drawn != self.trainer.step:
            self._curves(self.trainer.step)
        if self.board:
            with self._board_forgiven():
                self.board.close()

    def _sheet(self, step: int) -> Path:
        return sheet_path(self.output, step)

    def _curves(self, step: int) -> None:
        if self.plots:
            with _forgiven(f"no curves of step {step}"):
                curves.draw(self.output)
                self.drawn = step

    def _shift(self, step: int) -> None:
        with _forgiven(f"the latent shift of step {step} is not written down"):
            shift = shift_figures(self.trainer.average)
            self._write({"step": step, "shift": shift})
            self._tell(
                {
                    f"shift {key}/{domain}, latent {number}": latent[key]
                    for domain, latents in shift.items()
                    for number, latent in enumerate(latents)
                    for key in ("mean_norm", "largest", "median", "smallest")
                },
                step,
            )

    def _tell(self, values: dict[str, float], step: int) -> None:
        """Write scalars to TensorBoard, if it is asked for."""
        if self.board:
            with self._board_forgiven():
                self.board.scalars(values, step)

    @contextmanager
    def _board_forgiven(self) -> Iterator[None]:
        """A TensorBoard that fails once, on a full disk say, is not written to again."""
        try:
            yield
        except Exception as error:
            self.board = None
            warnings.warn(f"no more is written to tensorboard/: {error}", stacklevel=4)

    def _write(self, record: dict[str, Any]) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        with open(self.health, "a", encoding="utf-8") as file:
            file.write(json.dumps(_without_nan(record)) + "\n")


@contextmanager
def _forgiven(failure: str) -> Iterator[None]:
    """What fails in here is told, and no more than that: whoever watches must not stop a run."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"{failure}: {error}", stacklevel=4)


def shift_figures(model: DeFlow) -> dict[str, list[dict[str, float]]]:
    """By domain and latent: the norm of mu, and the spectrum of Sigma."""
    result = {}
    for index, domain in enumerate(model.config.domains, start=1):
        latents = []
        for shift in model.domain_shifts():
            health = ShiftHealth.of(shift, index)
            values = health.eigenvalues
            latents.append(
                {
                    "mean_norm": health.mean_norm,
                    "largest": values[0],
                    "median": values[len(values) // 2],
                    "smallest": values[-1],
                }
            )
        result[domain] = latents
    return result


def progress_scalars(progress: Progress) -> dict[str, float]:
    """What TensorBoard is told of each step."""
    return {
        **{
            f"bits per dimension/{name.replace('|', ' given ')}": value
            for name, value in progress.bits.items()
        },
        "training/gradient norm": progress.gradient_norm,
        "training/learning rate": progress.lr,
        "training/skipped steps": progress.skipped,
        "training/outliers": progress.outliers,
        "training/times gone back": progress.rolled_back,
        "time/seconds a step": progress.seconds,
        "time/waiting for data": progress.waiting,
    }


def require_tensorboard() -> None:
    """Raise TrackingError if TensorBoard cannot be written."""
    if any(find_spec(package) is None for package in ("accelerate", "tensorboard")):
        raise TrackingError("--tensorboard needs a package: pip install 'deflow-aug[tensorboard]'")


class TensorBoard:
    """Scalars and pictures by accelerate's tracker, in the folder ``tensorboard``.

    Args:
        output: the run's folder.
        step: events after this step, of before the run was resumed, are hidden.
    """

    def __init__(self, output: Path, step: int) -> None:
        require_tensorboard()
        from accelerate import PartialState
        from accelerate.tracking import TensorBoardTracker

        PartialState()  # which the tracker asks whether this is the main process
        self.tracker = TensorBoardTracker("tensorboard", output, purge_step=step + 1)
        self.tracker.start()

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Those that are finite."""
        for name, value in values.items():
            if math.isfinite(value):
                self.tracker.writer.add_scalar(name, value, step)

    def sheet(self, sheet: Sheet, step: int) -> None:
        """The picture, and the noise statistics of every column."""
        self.tracker.log_images(
            {"samples": np.asarray(sheet.image)[None]}, step, dataformats="NHWC"
        )
        for domain, columns in sheet.figures.items():
            for column, values in columns.items():
                named = {f"noise {k}/{domain}, {column}": v for k, v in values.items()}
                self.scalars(named, step)

    def close(self) -> None:
        """Write what is left, and close the file."""
        self.tracker.finish()


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
