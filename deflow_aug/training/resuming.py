"""Taking up a run where a checkpoint has it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from deflow_aug.config import from_dict, to_dict
from deflow_aug.training import checkpoints
from deflow_aug.training.checkpoints import Checkpoint, CheckpointError
from deflow_aug.training.curves import LOG
from deflow_aug.training.processes import Processes, TrainingError
from deflow_aug.training.recipe import Recipe, differences
from deflow_aug.training.safety import ROLLBACKS
from deflow_aug.training.state import State

MAY_CHANGE = {
    *("steps", "checkpoint_every", "keep_checkpoints", "sample_every"),
    *("workers", "cache_megabytes", "keep_activations"),
}
"""Settings that a resumed run may have other values of."""


def as_started(recipe: Recipe, found: Checkpoint) -> Recipe:
    """The recipe to go on with: the given one, with what the run measured of its data.

    Raises:
        CheckpointError: if the run was started with other settings, or is further than asked for.
    """
    # By way of a Recipe, for a checkpoint from before a setting existed has its default.
    started = from_dict(Recipe, found.recipe)
    model = recipe.model
    if recipe.match_statistics:
        model = replace(model, statistics=started.model.statistics)
    if recipe.dequantize_as_noise:
        model = replace(model, dequantization_curve=started.model.dequantization_curve)
    if recipe.condition_as_noise:
        model = replace(model, conditioning_noise=started.model.conditioning_noise)
    recipe = replace(recipe, model=model)
    mine, theirs = to_dict(recipe), to_dict(started)
    changed = [
        f"{key}: {now}, was {before}"
        for key, now, before in differences(mine, theirs)
        if key not in MAY_CHANGE
    ]
    if changed:
        raise CheckpointError(
            f"the checkpoint of step {found.step} comes from other settings "
            f"({'; '.join(changed)}); resume with the settings it was started with, or choose "
            "another output folder"
        )
    if found.step > recipe.steps:
        raise CheckpointError(
            f"the checkpoint of step {found.step} is beyond the {recipe.steps} steps asked for"
        )
    return recipe


def target(folder: Path, state: State) -> Checkpoint:
    """The checkpoint to go back to: the newest good one.

    If none is newer than when the run last went back, the same would fail again: one from before
    the one it then went back to is taken, if there is any.

    Raises:
        TrainingError: if there is none, or the run has gone back too often.
    """
    recipe, safety = state.recipe, state.safety
    if safety.rollbacks == ROLLBACKS:
        raise TrainingError(
            f"bad steps (loss or gradient not finite, or gradient norms far off) do not end at "
            f"step {state.step}, after {ROLLBACKS} returns to an earlier state and with the "
            f"learning rate down to {recipe.lr * safety.lr_factor:g}. Start anew, in another "
            "output folder, with a lower lr, a longer warmup or a lower clip_norm; with "
            "match_statistics if the domains differ much in colour or brightness; in float32 if "
            f"precision was bf16 (it is {recipe.precision})"
        )
    found = checkpoints.good(folder, recipe.checkpoint_every)
    at, to = state.went_back
    for step in reversed([step for step in found if step > at or step < to] or found):
        with contextlib.suppress(CheckpointError):
            return checkpoints.load(checkpoints.path_of(folder, step))
    raise TrainingError(
        f"too many bad steps up to step {state.step}, and no good checkpoint in {folder} to go "
        "back to; start anew with a lower lr"
    )


def find(output: Path) -> Checkpoint | None:
    """The checkpoint that a run in this folder goes on from; None if it starts there.

    Raises:
        CheckpointError: if there were some, and none can be used.
    """
    found = checkpoints.load_newest(output / "checkpoints")
    if found is None:
        refuse_anew(output)
    return found


def refuse_anew(output: Path) -> None:
    """Nothing of a run that has no checkpoint any more may be overwritten.

    Raises:
        CheckpointError: if there is anything left of one.
    """
    left = [*checkpoints.damaged(output / "checkpoints"), output / LOG]
    if names := [path.name for path in left if path.exists()]:
        raise CheckpointError(
            f"{output} holds what is left of a run ({', '.join(names)}), but no checkpoint to go "
            "on from; choose another --output folder, or remove what is there to start anew"
        )


def share(processes: Processes, find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """The checkpoint that the main process finds, on all: others may not see its disk."""
    found: list[Checkpoint | None] = [None]

    def head() -> Checkpoint | None:
        found[0] = find()
        return None if found[0] is None else replace(found[0], tensors={})

    told = processes.from_main(head)
    if told is None:
        return None
    own = {} if found[0] is None else found[0].tensors
    return replace(told, tensors=processes.tensors_from_main(own))
