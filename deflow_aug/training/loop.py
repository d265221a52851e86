"""The training loop: maximum likelihood of unpaired images and of pairs (eq. 1, 5, 7)."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deflow_aug.adaptation import fit_shifts
from deflow_aug.data.paired import PairedBatches
from deflow_aug.data.unpaired import UnpairedBatches
from deflow_aug.model import DeFlow
from deflow_aug.training import checkpoints, resuming, starting
from deflow_aug.training.checkpoints import CheckpointError
from deflow_aug.training.correcting import correct_shifts
from deflow_aug.training.curves import LOG
from deflow_aug.training.feed import Feed, Portion
from deflow_aug.training.objective import Objective
from deflow_aug.training.processes import (
    Processes,
    Stopped,
    StopSignal,
    TrainingError,
    stop_signal,
)
from deflow_aug.training.progress import Log, Progress, means
from deflow_aug.training.recipe import Recipe
from deflow_aug.training.safety import Verdict
from deflow_aug.training.state import History, State

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Progress", "Trainer", "TrainingError"]

INITIALIZATION_BATCHES = 4
"""Batches whose first images initialise the actnorms."""

FIT_CROPS = 256
"""Crops of each domain that a "fitted" shift is fitted to."""


class Trainer:
    """A run: it owns the data, the state and the folder, and takes one step after the other.

    Every process of a run makes one, and all call the same methods; the main one alone writes.

    Args:
        recipe: the settings.
        batches: unpaired training data; None to train on pairs alone.
        output: folder of checkpoints and of the log; a checkpoint found there is taken up.
        accelerator: see :class:`~deflow_aug.training.processes.Processes`; or the device of a
            single process.
        encoder: file of RRDB (ESRGAN) weights that the conditioning network starts from. Not read
            where a checkpoint is taken up: it has been part of that run, or has not.
        start: a model to fine-tune; see :func:`~deflow_aug.training.starting.fine_tune`. Not used
            where a checkpoint is taken up.
        paired: paired training data. The sizes of both kinds of batches are those of
            :meth:`Recipe.batch_sizes`.

    Raises:
        deflow_aug.config.ConfigError: the recipe, the data and ``start`` contradict each other.
        deflow_aug.convert.ConversionError: ``encoder`` holds no RRDB weights, or not those of the
            recipe's architecture.
        deflow_aug.training.checkpoints.CheckpointError: the checkpoints found in ``output`` are
            all damaged or from other settings, or what is left of a run has none.
    """

    recipe: Recipe
    """The settings, complete with the statistics that were measured."""

    model: DeFlow
    """The model in training."""

    average: DeFlow
    """The moving average of its weights, which is what is released."""

    def __init__(
        self,
        recipe: Recipe,
        batches: UnpairedBatches | None,
        output: Path,
        *,
        accelerator: Accelerator | torch.device | None = None,
        encoder: Path | None = None,
        start: DeFlow | None = None,
        paired: PairedBatches | None = None,
    ) -> None:
        self.output, self.folder = output, output / "checkpoints"
        self.processes = Processes(accelerator)
        self.accelerator, self.is_main = self.processes.accelerator, self.processes.is_main
        self.device = self.processes.device
        self.feed = Feed(recipe, batches, paired, self.processes.part)
        found = resuming.share(self.processes, lambda: resuming.find(output))
        if found is not None:
            recipe = resuming.as_started(recipe, found)
        elif recipe.match_statistics:
            folders = self.feed.folders
            recipe = self.processes.from_main(lambda: starting.with_statistics(recipe, folders))
        if found is None and (recipe.dequantize_as_noise or recipe.condition_as_noise):
            folders = self.feed.folders
            recipe = self.processes.from_main(lambda: starting.with_noise(recipe, folders))
        model = starting.new_model(recipe).to(self.device)
        if found is None:
            if start is not None:
                starting.fine_tune(model, start)
            if encoder is not None:
                starting.load_encoder(model, encoder)
            starting.initialize(model, self.feed.images(INITIALIZATION_BATCHES, model, self.device))
        data, facts = self.processes.from_main(
            lambda: (self.feed.fingerprints(), self.feed.facts())
        )
        self.state = State(model, recipe, data, facts, encoder.name if encoder else None)
        self.fresh, self.began = found is None, 0 if found is None else found.step
        if found is not None:
            self.state.resume(found)
            if found.state["data"] != data and self.is_main:
                warnings.warn(
                    "the images are not those that the run was started with: it goes on with these",
                    stacklevel=2,
                )
        self.recipe, self.model, self.average = recipe, model, self.state.average
        self.updating = False
        self.objective: nn.Module
        self.objective, self.optimizer = self.accelerator.prepare(
            Objective(model, recipe.precision, recipe.keep_activations),
            self.state.optimizer,
        )

    @property
    def step(self) -> int:
        """Steps that have been taken."""
        return self.state.step

    @property
    def encoder(self) -> str | None:
        """Name of the file that the conditioning network started from, also of a resumed run."""
        return self.state.encoder

    @property
    def history(self) -> History:
        """The data by the step from which the run had them; those of now if it took a step."""
        if self.step == self.began:
            return [entry for entry in self.state.history if entry[0] < max(1, self.step)]
        *before, (step, _) = self.state.history
        return [*before, (step, self.feed.facts())]  # more may be known of them by now

    def run(self, every_step: Callable[[Progress], None]) -> bool:
        """Train to the recipe's last step; a checkpoint is written whatever ends the run.

        Args:
            every_step: called after each step, on every process; after the last one, before the
                shifts are corrected.

        Returns:
            True at the end; False if SIGINT (Ctrl-C) or SIGTERM stopped the run before it.

        Raises:
            TrainingError: if bad steps do not end even at a much lower learning rate.
            CheckpointError: if a checkpoint cannot be written.

        Whether what came of it is of use is another matter: see :attr:`State.wrecked`.
        """
        if self.fresh:
            self.save()
        else:
            self._settle()
        if self.state.safety.lost:
            # Stopped just before it went back.
            self._go_back()
            self.save()
        saved = self.step
        with stop_signal() as stop, self._log() as log:
            try:
                for portion in self.feed.portions(self.step):
                    progress, stopping = self._train_step(portion, stop.received)
                    last = self.step == self.recipe.steps
                    if log is not None:
                        log.write(progress)
                    every_step(progress)
                    lost = self.state.safety.lost
                    if lost:
                        self._go_back()
                    if lost or stopping or last or self.step % self.recipe.checkpoint_every == 0:
                        if log is not None:
                            log.sync()
                        self.save()
                        saved = self.step
                    if stopping and not last:
                        return False
                if not self.state.finished:
                    self._finish_shifts(stop)
                    self.save()
            except Stopped:
                return False
            except CheckpointError:
                raise
            except BaseException:
                # Stopped in the middle of an update, the state is of no step and is not saved.
                if saved != self.step and not self.updating:
                    self.save()
                raise
        return True

    def save(self) -> None:
        """Write a checkpoint now; the best one so far is kept under its own name as well.

        The best one has the lowest training loss in bits per dimension, smoothed over the last
        hundred steps or so, of those at multiples of ``checkpoint_every`` steps. That is not always
        the one whose samples look best.
        """
        checkpoint = self.state.checkpoint()
        if self.is_main:
            checkpoints.save(self.folder, checkpoint)
        self._settle()

    def _settle(self) -> None:
        """What follows on writing a checkpoint, and is made up for if the run was killed then."""
        if self.is_main:
            if self.state.best is not None and self.state.best[0] == self.step:
                checkpoints.keep_best(self.folder, self.step)
            recipe = self.recipe
            checkpoints.tidy(self.folder, recipe.keep_checkpoints, recipe.checkpoint_every)

    def _train_step(self, portion: Portion, stop: bool) -> tuple[Progress, bool]:
        """One step, or one that is skipped; and whether any process was asked to stop."""
        started = time.perf_counter()
        state = self.state
        names, lr = self.feed.names(state.step), state.lr
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        bits = self.objective(*self.feed.inputs(portion, self.model, self.device))
        # Every process has as many items, so the mean of the processes' means is that of all.
        bits.mean().backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        # All processes judge by the same numbers, lest they part.
        everyone = self._gathered(norm, stop, bits)
        values = [value for _, _, *bits_of_one in everyone for value in bits_of_one]
        norm_of_main, stopping = everyone[0][0], any(row[1] for row in everyone)
        self.updating = True
        verdict = state.safety.judge(values, norm_of_main)
        if verdict is Verdict.GOOD:
            self.optimizer.step()
            state.update_average()
            state.add_loss(sum(values) / len(values))
        state.step += 1
        state.finished = False
        self.updating = False
        progress = Progress(
            step=state.step,
            bits=means(names, values),
            gradient_norm=norm_of_main,
            lr=lr,
            skipped=state.safety.skipped,
            outliers=state.safety.outliers,
            rolled_back=state.safety.rollbacks,
            seconds=portion.waiting + time.perf_counter() - started,
            waiting=portion.waiting,
        )
        return progress, stopping

    def _gathered(self, norm: Tensor, stop: bool, bits: Tensor) -> list[list[float]]:
        """Of every process: the gradient's norm, whether it was asked to stop, each item's loss."""
        own = torch.cat([norm.reshape(1), norm.new_tensor([stop]), bits.detach()])
        rows: list[list[float]] = self.processes.gather(own).tolist()
        return rows

    def _go_back(self) -> None:
        """Go back to the last good weights, or give up."""
        state = self.state
        target = resuming.share(self.processes, lambda: resuming.target(self.folder, state))
        assert target is not None
        self.updating = True
        state.go_back(target)
        self.updating = False
        if self.is_main:
            warnings.warn(
                f"too many bad steps up to step {self.step}: back to the weights of step "
                f"{target.step}, with half the learning rate ({state.lr:g})",
                stacklevel=3,
            )

    def _finish_shifts(self, stop: StopSignal) -> None:
        """What is done to the average's shifts after the last step, all of it or none.

        The last step is saved by now, so that there is nothing to wait for if the run is to stop:
        a resumed one does all of this again, and nothing else.

        Raises:
            Stopped: if it is.
        """
        before = {name: t.clone() for name, t in self.average.state_dict().items()}
        try:
            with stop.at_once():
                if self.recipe.model.shift == "fitted":
                    self._fit_shifts()
                if self.feed.folders:
                    pairs, quiet = self.feed.paired is not None, not self.is_main
                    correct_shifts(self.average, self.recipe, self.feed.folders, pairs, quiet)
        except BaseException:
            self.average.load_state_dict(before)
            raise
        self.state.finished = True

    def _fit_shifts(self) -> None:
        """Set mu and M of the average from crops that come after those of the training.

        Where that cannot be done they stay as they are, by which :attr:`State.wrecked` knows.
        """
        crops = self.feed.crops(self.recipe.steps, FIT_CROPS)
        batches = {name: images.split(self.recipe.batch_size) for name, images in crops.items()}
        try:
            fit_shifts(self.average, batches, seed=self.recipe.seed)
        except (torch.linalg.LinAlgError, ValueError) as error:  # type: ignore[attr-defined]
            warnings.warn(f"no shift can be fitted: {error}", stacklevel=2)

    def _log(self) -> contextlib.AbstractContextManager[Log | None]:
        """The log, from which steps after this one are dropped; they are about to come again."""
        if not self.is_main:
            return contextlib.nullcontext()
        self.output.mkdir(parents=True, exist_ok=True)
        return Log(self.output / LOG, self.step)
