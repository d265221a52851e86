"""The state of a run: all that a checkpoint holds."""

from __future__ import annotations

import copy
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from deflow_aug.config import CLEAN, to_dict
from deflow_aug.model import DeFlow
from deflow_aug.training import checkpoints
from deflow_aug.training.checkpoints import Checkpoint
from deflow_aug.training.progress import Smoothed
from deflow_aug.training.recipe import Recipe
from deflow_aug.training.safety import IN_A_ROW, Safety

INSANE = 100.0
"""Bits per dimension that no model is released with, unless it began with about as many: pixels
of which nothing is known take 8."""

Facts = Mapping[str, Mapping[str, Any]]
"""What is known of the data, by the name of a folder."""

History = Sequence[tuple[int, Facts]]
"""The data of a run: how many steps had been taken when it took these up."""


class State:
    """Of a run that is about to begin; :meth:`resume` makes it that of a checkpoint.

    Args:
        model: where it starts.
        recipe: the settings.
        data: a hash of the images of every domain.
        facts: what is known of them.
        encoder: name of the file that the conditioning network started from.
    """

    def __init__(
        self,
        model: DeFlow,
        recipe: Recipe,
        data: dict[str, str],
        facts: Facts,
        encoder: str | None,
    ) -> None:
        self.model, self.recipe, self.data, self.encoder = model, recipe, data, encoder
        self.history: History = [(0, facts)]
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, fused=True)
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self.step = 0
        self.finished = False  # whether all was done that follows the last step
        self.safety, self.smoothed = Safety(recipe.outlier_factor), Smoothed()
        self.first: float | None = None  # loss of the first good step
        self.last: deque[float] = deque(maxlen=IN_A_ROW)  # and those of the last ones
        self.best: tuple[int, float] | None = None  # step and smoothed loss
        self.went_back = (-1, 0)  # at which step, and to which

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.recipe.learning_rate(self.step) * self.safety.lr_factor

    @property
    def wrecked(self) -> str | None:
        """Why the average is not worth releasing; None if it may be."""
        # Finite weights whose products overflow are found by the likelihood.
        if not all(bool(t.isfinite().all()) for t in self.average.state_dict().values()):
            return "its weights are not finite"
        if self.safety.skipped > self.step / 2:
            return f"{self.safety.skipped} of its {self.step} steps were bad and changed nothing"
        at, to = self.went_back
        if at >= 0 and (at == self.step or to + self.step - at < self.step / 2):
            return f"at step {at} it went back to the weights of step {to}, after bad steps"
        if not self.safety.mostly_good:
            return "most of its last steps were bad and changed nothing"
        # Not the smoothed one, which remembers a wild step for thousands.
        loss = statistics.median(self.last) if self.last else 0.0
        if not loss < max(INSANE, 2 * (self.first or 0)):
            return f"its loss is {loss:.3g} bits per dimension"
        fitted = self.recipe.model.shift == "fitted" and self.finished
        if fitted and not any(bool(s.mean.any()) for s in self.average.domain_shifts()):
            return "no shift could be fitted to its latents"
        return None

    def add_loss(self, value: float) -> None:
        """Take down the loss of a good step."""
        self.first = value if self.first is None else self.first
        self.last.append(value)
        self.smoothed.add(value)

    @torch.no_grad()
    def update_average(self) -> None:
        """Draw the average towards the model; it starts short, so that the start is forgotten."""
        decay = min(self.recipe.average, (1 + self.step) / (10 + self.step))
        means, values = list(self.average.parameters()), list(self.model.parameters())
        # All in one call: a GPU would spend more time on starting each than on computing it.
        get_ema_multi_avg_fn(decay)(means, values, 0)

    def checkpoint(self) -> Checkpoint:
        """A checkpoint of now; this also decides whether it is the best."""
        good = self.safety.calm and self.step != self.went_back[0]
        regular = self.step % self.recipe.checkpoint_every == 0
        loss = self.smoothed.value
        if regular and good and loss is not None and (self.best is None or loss < self.best[1]):
            self.best = (self.step, loss)
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        tensors |= {f"average.{name}": t for name, t in self.average.state_dict().items()}
        tensors |= checkpoints.pack_optimizer(self.optimizer, self.names)
        told = {
            "good": good,
            "finished": self.finished,
            "safety": self.safety.state(),
            "smoothed": self.smoothed.state,
            "first": self.first,
            "last": list(self.last),
            "best": self.best,
            "went_back": self.went_back,
            "encoder": self.encoder,
            "data": self.data,
            "history": self.history,
        }
        return Checkpoint(self.step, tensors, to_dict(self.recipe), told)

    def resume(self, found: Checkpoint) -> None:
        """Be where the run was; :attr:`data` stays that of now."""
        now = self.history[0][1]
        self._load(found)
        told = found.state
        if told["data"] != self.data:
            self.history = [e for e in history(found) if e[0] < found.step] + [(found.step, now)]
        elif "history" in told:
            self.history = history(found)
        self.step, self.encoder = found.step, told["encoder"]
        self.finished = finished(found)
        self.safety = Safety.restore(self.recipe.outlier_factor, told["safety"])
        self.first, self.last = told.get("first"), deque(told.get("last", ()), IN_A_ROW)
        self.best = None if told["best"] is None else (told["best"][0], told["best"][1])
        self.went_back = (told["went_back"][0], told["went_back"][1])

    def go_back(self, target: Checkpoint) -> None:
        """Take the weights of an earlier checkpoint, and half the learning rate.

        The step stays: data that the run failed on are not met again at once.
        """
        self._load(target)
        self.last.clear()
        self.safety.go_back(target.state["safety"]["norms"])
        self.went_back = (self.step, target.step)

    def _load(self, found: Checkpoint) -> None:
        for prefix, model in (("model.", self.model), ("average.", self.average)):
            model.load_state_dict(
                {
                    name.removeprefix(prefix): tensor
                    for name, tensor in found.tensors.items()
                    if name.startswith(prefix)
                }
            )
        checkpoints.unpack_optimizer(self.optimizer, self.names, found.tensors)
        self.smoothed = Smoothed(*found.state["smoothed"])


def finished(found: Checkpoint) -> bool:
    """Whether what is done after the last step is part of a checkpoint."""
    # Earlier versions saved the last step when all was done.
    return bool(found.state.get("finished", found.step == found.recipe["steps"]))


def history(found: Checkpoint) -> History:
    """The data of a run up to a checkpoint; of one from before it was kept, the hashes alone."""
    told = found.state.get("history")
    if told is None:
        hashes = found.state["data"].items()
        return [(0, {k.replace(f"|{CLEAN}", ", paired"): {"sha256": v} for k, v in hashes})]
    return [(step, facts) for step, facts in told]
