"""The training loop: maximum likelihood of unpaired images of all domains (eq. 1, 7)."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from deflow_aug import randomness
from deflow_aug.config import from_dict, to_dict
from deflow_aug.convert import encoder_weights, load_checkpoint
from deflow_aug.data.unpaired import UnpairedBatches
from deflow_aug.model import DeFlow, channels_last
from deflow_aug.randomness import Stream
from deflow_aug.training import checkpoints
from deflow_aug.training.recipe import Recipe

INITIALIZATION_BATCHES = 4
MAX_SKIPPED_IN_A_ROW = 50

MAY_CHANGE = {"steps", "checkpoint_every", "sample_every"}
"""Settings that a resumed run may have other values of."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Progress:
    """What one step did. Likelihoods are in bits per dimension, averaged by domain."""

    step: int
    bits: Mapping[str, float]
    gradient_norm: float
    lr: float
    skipped: int
    seconds: float


class Trainer:
    """A run: the model, its moving average, the optimiser and the step it is at.

    Args:
        recipe: the settings.
        batches: training data.
        output: folder of checkpoints and of the log; a checkpoint found there is taken up.
        device: where to train.
        encoder: file of RRDB (ESRGAN) weights that the conditioning network starts from. Not read
            where a checkpoint is taken up: it has been part of that run, or has not.
        start: a model of the recipe's architecture to fine-tune: its weights are the start, but
            for M, which starts anew (one that has collapsed to zero would never move). Not used
            where a checkpoint is taken up.

    Raises:
        deflow_aug.convert.ConversionError: ``encoder`` holds no RRDB weights, or not those of the
            recipe's architecture.
    """

    encoder: str | None
    """Name of the file that the conditioning network started from, in whichever session."""

    def __init__(
        self,
        recipe: Recipe,
        batches: UnpairedBatches,
        output: Path,
        device: torch.device,
        encoder: Path | None = None,
        start: DeFlow | None = None,
    ) -> None:
        self.recipe, self.batches, self.output, self.device = recipe, batches, output, device
        self.step = self.skipped = self.skipped_in_a_row = 0
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the GPUs of whoever calls as well.
            torch.default_generator.manual_seed(recipe.seed)
            model = DeFlow(recipe.model)
        # Channels last is what the convolution kernels of CPUs and GPUs are fastest in.
        self.model = channels_last(model).to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.names: dict[Tensor, str] = {
            parameter: name for name, parameter in self.model.named_parameters()
        }
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=recipe.lr)
        newest = checkpoints.latest(output / "checkpoints")
        if newest is None:
            if start is not None:
                kept = {
                    name: tensor
                    for name, tensor in start.state_dict().items()
                    if not name.endswith(".factor")
                }
                self.model.load_state_dict(kept, strict=False)
            self.encoder = None if encoder is None else encoder.name
            if encoder is not None:
                weights = encoder_weights(load_checkpoint(encoder), recipe.model)
                self.model.conditioning.load_state_dict(weights)
            self._initialize()
        else:
            self._resume(newest)

    def run(self, every_step: Callable[[Progress], None]) -> None:
        """Train to the recipe's last step; a checkpoint is written whatever ends the run."""
        self.output.mkdir(parents=True, exist_ok=True)
        log = self.output / "log.jsonl"
        self._trim(log)
        saved = self.step
        self.updating = False
        try:
            with open(log, "a", encoding="utf-8") as file:
                while self.step < self.recipe.steps:
                    progress = self._train_step()
                    file.write(json.dumps(asdict(progress)) + "\n")
                    every_step(progress)
                    if self.step % self.recipe.checkpoint_every == 0:
                        file.flush()
                        self.save()
                        saved = self.step
        finally:
            # Stopped in the middle of an update, the state is of no step and is not saved.
            if saved != self.step and not self.updating:
                self.save()

    def save(self) -> None:
        """Write a checkpoint now."""
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        tensors |= {f"average.{name}": t for name, t in self.average.state_dict().items()}
        tensors |= checkpoints.pack_optimizer(self.optimizer, self.names)
        folder = self.output / "checkpoints"
        checkpoints.save(folder, self.step, tensors, to_dict(self.recipe), self.encoder)

    def _train_step(self) -> Progress:
        started = time.perf_counter()
        lr = self.recipe.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        images, domains, dequantization, noise = self._batch(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        bits = self.model.nll(images, domains, dequantization=dequantization, noise=noise)
        bits.mean().backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm))
        if math.isfinite(norm) and bool(torch.isfinite(bits).all()):
            self.updating = True
            self.optimizer.step()
            self._update_average()
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
                raise TrainingError(
                    f"the loss was not finite for {self.skipped_in_a_row} steps in a row (step "
                    f"{self.step}); lower lr (now {self.recipe.lr:g}) and start again"
                )
        self.step += 1
        self.updating = False
        values = bits.tolist()
        per_domain = {
            name: sum(v for v, d in zip(values, domains, strict=True) if d == name)
            / domains.count(name)
            for name in dict.fromkeys(domains)
        }
        seconds = time.perf_counter() - started
        return Progress(self.step, per_domain, norm, lr, self.skipped, seconds)

    def _batch(self, step: int) -> tuple[Tensor, list[str], Tensor, Tensor]:
        """Images, their domains, dequantisation and conditioning noise of a step."""
        images, domains = self.batches.batch(step)
        seed, scale = self.recipe.seed, self.recipe.model.scale
        small = (*images.shape[:2], images.shape[2] // scale, images.shape[3] // scale)
        dequantization = randomness.uniform(tuple(images.shape), seed, Stream.DEQUANTIZATION, step)
        noise = randomness.normal(small, seed, Stream.CONDITIONING, step)
        images, dequantization, noise = (
            tensor.to(self.device, memory_format=torch.channels_last)
            for tensor in (images, dequantization, noise)
        )
        images = self.model.match_colours(images, domains)
        return images, list(domains), dequantization, noise

    def _initialize(self) -> None:
        batches = (self._batch(step) for step in range(INITIALIZATION_BATCHES))
        images, _, dequantization, noise = zip(*batches, strict=True)
        self.model.initialize(
            torch.cat(images), dequantization=torch.cat(dequantization), noise=torch.cat(noise)
        )
        self.average.load_state_dict(self.model.state_dict())

    @torch.no_grad()
    def _update_average(self) -> None:
        # The average starts short, so that the random start is soon forgotten.
        decay = min(self.recipe.average, (1 + self.step) / (10 + self.step))
        for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)

    def _resume(self, path: Path) -> None:
        step, tensors, stored, self.encoder = checkpoints.load(path)
        # By way of a Recipe, for a checkpoint from before a setting existed has its default.
        recipe, mine = to_dict(from_dict(Recipe, stored)), to_dict(self.recipe)
        changed = sorted(k for k in mine.keys() - MAY_CHANGE if recipe.get(k) != mine[k])
        if step > self.recipe.steps:
            raise checkpoints.CheckpointError(
                f"{path} is beyond the {self.recipe.steps} steps asked for"
            )
        if changed:
            raise checkpoints.CheckpointError(
                f"{path} comes from other settings ({', '.join(changed)} differ); resume with the "
                "settings it was started with, or choose another output folder"
            )
        for prefix, model in (("model.", self.model), ("average.", self.average)):
            model.load_state_dict(
                {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            )
        checkpoints.unpack_optimizer(self.optimizer, self.names, tensors)
        self.step = step

    def _trim(self, log: Path) -> None:
        """Drop the log's lines after the step that is taken up: they will be written again."""
        if log.exists():
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            log.write_text("".join(lines[: self.step]), encoding="utf-8")
