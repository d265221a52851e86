"""The state of a run: all that a checkpoint holds."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from deflow_aug.config import to_dict
from deflow_aug.model import DeFlow
from deflow_aug.training import checkpoints
from deflow_aug.training.checkpoints import Checkpoint
from deflow_aug.training.progress import Smoothed
from deflow_aug.training.recipe import Recipe
from deflow_aug.training.safety import Safety


class State:
    """Of a run that is about to begin; :meth:`resume` makes it that of a checkpoint.

    Args:
        model: where it starts.
        recipe: the settings.
        data: a hash of the images of every domain.
        encoder: name of the file that the conditioning network started from.
    """

    def __init__(
        self, model: DeFlow, recipe: Recipe, data: dict[str, str], encoder: str | None
    ) -> None:
        self.model, self.recipe, self.data, self.encoder = model, recipe, data, encoder
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr)
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self.step = 0
        self.safety, self.smoothed = Safety(recipe.outlier_factor), Smoothed()
        self.best: tuple[int, float] | None = None  # step and smoothed loss
        self.went_back = (-1, 0)  # at which step, and to which

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.recipe.learning_rate(self.step) * self.safety.lr_factor

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
            "safety": self.safety.state(),
            "smoothed": self.smoothed.state,
            "best": self.best,
            "went_back": self.went_back,
            "encoder": self.encoder,
            "data": self.data,
        }
        return Checkpoint(self.step, tensors, to_dict(self.recipe), told)

    def resume(self, found: Checkpoint) -> None:
        """Be where the run was; :attr:`data` stays that of now."""
        self._load(found)
        told = found.state
        self.step, self.encoder = found.step, told["encoder"]
        self.safety = Safety.restore(self.recipe.outlier_factor, told["safety"])
        self.best = None if told["best"] is None else (told["best"][0], told["best"][1])
        self.went_back = (told["went_back"][0], told["went_back"][1])

    def go_back(self, target: Checkpoint) -> None:
        """Take the weights of an earlier checkpoint, and half the learning rate.

        The step stays: data that the run failed on are not met again at once.
        """
        self._load(target)
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
