"""The end of a run: averaged weights and the model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deflow_aug.card import model_card
from deflow_aug.config import ConfigError, from_dict, to_dict
from deflow_aug.degrader import DeFlowDegrader
from deflow_aug.model import DeFlow
from deflow_aug.training import checkpoints, curves
from deflow_aug.training.checkpoints import CheckpointError
from deflow_aug.training.loop import Trainer
from deflow_aug.training.noise_check import Noise
from deflow_aug.training.recipe import Recipe
from deflow_aug.training.samples import sheet_path
from deflow_aug.training.state import History, finished, history

SAMPLES = "samples.png"
"""The last sheet, beside the card."""

CARD, CONFIG, WEIGHTS = "README.md", "config.json", "model.safetensors"

UNCORRECTED = "as learned, without the corrections that are made after the last step"
"""What is told of the shifts of an earlier checkpoint."""

LAST = 100
"""Steps whose likelihoods the card tells."""


@dataclass(frozen=True)
class Outcome:
    """What a run has come to, at its end or at one of its checkpoints.

    Args:
        output: the run's folder.
        step: steps that were taken.
        average: the averaged weights.
        recipe: the settings.
        history: the data.
        encoder: name of the file that the conditioning network started from.
        finished: whether its shifts are as they are after the end of the run.
    """

    output: Path
    step: int
    average: DeFlow
    recipe: Recipe
    history: History
    encoder: str | None
    finished: bool

    @classmethod
    def of(cls, run: Trainer) -> Outcome:
        """Where a run is now."""
        state = run.state
        return cls(
            run.output, run.step, run.average, run.recipe, run.history, run.encoder, state.finished
        )

    @classmethod
    def at(cls, output: Path, which: str) -> Outcome:
        """Where a run was at one of its checkpoints.

        Args:
            which: "best", "last", or a step.

        Raises:
            CheckpointError: if there is no such checkpoint, or it is damaged or of no use.
        """
        path = _path(output / "checkpoints", which)
        found = checkpoints.load(path)
        recipe = from_dict(Recipe, found.recipe)
        if recipe.model.shift == "fitted" and not finished(found):
            raise CheckpointError(
                f"{path} was saved before the shifts were fitted, as those of the kind 'fitted' "
                "are after the last step: go on with --resume, or train for fewer steps"
            )
        average = DeFlow(recipe.model)
        average.load_state_dict(
            {
                name.removeprefix("average."): tensor
                for name, tensor in found.tensors.items()
                if name.startswith("average.")
            }
        )
        if not all(bool(t.isfinite().all()) for t in average.state_dict().values()):
            raise CheckpointError(f"the weights in {path} are not finite: they are of no use")
        encoder = found.state["encoder"]
        return cls(output, found.step, average, recipe, history(found), encoder, finished(found))

    @property
    def uncorrected(self) -> bool:
        """Whether the recipe asks for corrections of the shifts that were not made yet."""
        return not self.finished and (self.recipe.fit_in_flat_areas or self.recipe.remove_cast)

    @property
    def sheet(self) -> Path | None:
        """The samples that were drawn at this step, if they were."""
        path = sheet_path(self.output, self.step)
        return path if path.exists() else None


def _path(folder: Path, which: str) -> Path:
    """The checkpoint that is meant.

    Raises:
        ConfigError: if it is none of the words.
        CheckpointError: if it is not there.
    """
    if which not in ("best", "last") and not which.isdecimal():
        raise ConfigError(f"--release takes best, last, or a step such as 800; got {which!r}")
    path: Path | None = folder / checkpoints.BEST
    if which != "best":
        steps = checkpoints.steps(folder)
        path = checkpoints.path_of(folder, int(which)) if which != "last" else None
        if which == "last" and steps:
            path = checkpoints.path_of(folder, steps[-1])
    if path is None or not path.exists():
        there = ", ".join(map(str, checkpoints.steps(folder))) or "none"
        raise CheckpointError(f"{folder} has no checkpoint {which}; there are steps {there}")
    return path


def is_released(output: Path, step: int) -> bool:
    """Whether the folder has the weights and the card of a run's end at this step."""
    card, config = output / CARD, output / CONFIG
    if not all(path.exists() for path in (card, config, output / WEIGHTS)):
        return False
    try:
        training = json.loads(config.read_text(encoding="utf-8"))["training"]
        released = training.get("released_step", training["recipe"]["steps"])
        corrected = "shifts" not in training
    except (ValueError, KeyError, TypeError):
        return False
    # The card is written last.
    return (
        corrected
        and bool(released == step)
        and card.stat().st_mtime_ns >= config.stat().st_mtime_ns
    )


def release(outcome: Outcome, start: str | None, sheet: Path | None) -> None:
    """Write the averaged weights, in float16, and their card: a folder for from_pretrained.

    Args:
        start: the weights that it fine-tuned, if it did.
        sheet: the picture of samples that the card shows; None: none.
    """
    output = outcome.output
    training = facts(outcome, start)
    degrader = DeFlowDegrader(outcome.average, training=training, device="cpu")
    # The moving average knows its weights no better than float16 does.
    degrader.save_pretrained(output, half=True)
    pictures = {}
    if (output / curves.PICTURE).exists():
        pictures["curves"] = curves.PICTURE
    (output / SAMPLES).unlink(missing_ok=True)
    if sheet is not None:
        shutil.copyfile(sheet, output / SAMPLES)
        pictures["samples"] = SAMPLES
    # Written anew: one that is there comes from before this run was resumed.
    temporary = output / f".{CARD}.partial"
    try:
        temporary.write_text(
            model_card(degrader.model, training, pictures=pictures), encoding="utf-8"
        )
        os.replace(temporary, output / CARD)
    finally:
        temporary.unlink(missing_ok=True)


def facts(outcome: Outcome, start: str | None) -> dict[str, Any]:
    """What config.json and the card tell of the training; paths are cut to their last part."""
    recipe = to_dict(outcome.recipe)
    del recipe["model"]  # it stands in config.json already
    if recipe["blur_kernels"] is not None:
        recipe["blur_kernels"] = Path(recipe["blur_kernels"]).name
    result: dict[str, Any] = {"data": data(outcome.history)}
    if start is not None:
        result["fine_tuned_from"] = Path(start).name if Path(start).is_dir() else start
    if outcome.encoder is not None:
        result["encoder_weights"] = outcome.encoder
    result["recipe"] = recipe
    if outcome.step != outcome.recipe.steps:
        result["released_step"] = outcome.step
    if outcome.uncorrected:
        result["shifts"] = UNCORRECTED
    log = [r for r in curves.read(outcome.output / curves.LOG) if r["step"] <= outcome.step]
    if log:
        result["result"] = {
            f"bits per dimension, mean of the last {LAST} steps": _last_bits(log[-LAST:]),
            "skipped steps": log[-1]["skipped"],
            "times gone back": log[-1]["rolled_back"],
        }
    if noise := _noise(outcome):
        what = "noise in flat areas (standard deviation in 1/255, correlation of neighbours)"
        result[what] = noise
    return result


def _noise(outcome: Outcome) -> dict[str, Any]:
    """By domain the noise of samples and that of the photographs, if they were compared."""
    health = curves.read(outcome.output / curves.HEALTH)
    found = [r["flat"] for r in health if r["step"] == outcome.step and "flat" in r]
    last = found[-1] if found else {}
    return {
        domain: {
            "of samples": str(Noise(**compared["samples"])),
            "of the photographs": str(Noise(**compared["photographs"])),
        }
        for domain, compared in last.items()
    }


def data(history: History) -> dict[str, dict[str, Any]]:
    """All data of a run by name; what was not there all the time, with the steps that it was."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for _, told in history for name in told):
        periods: list[tuple[int, Mapping[str, Any] | None]] = []
        for step, told in history:
            fact = told.get(name)
            if periods and _hash(periods[-1][1]) == _hash(fact):
                periods[-1] = (periods[-1][0], fact)  # the same; the newer one knows more
            else:
                periods.append((step, fact))
        for number, (step, fact) in enumerate(periods):
            if fact is None:
                continue
            last = number == len(periods) - 1
            steps = f"from step {step + 1}" if last else f"steps {step + 1} to "
            steps += "" if last else str(periods[number + 1][0])
            found[f"{name} ({steps})" if len(periods) > 1 else name] = dict(fact)
    return found


def _hash(fact: Mapping[str, Any] | None) -> Any:
    return None if fact is None else fact.get("sha256")


def _last_bits(log: Sequence[curves.Record]) -> dict[str, float]:
    """The mean of each name's bits, without steps whose loss was not finite."""
    found: dict[str, list[float]] = {}
    for record in log:
        for name, value in record["bits"].items():
            if value is not None:
                found.setdefault(name.replace("|", " given "), []).append(value)
    return {name: round(sum(values) / len(values), 3) for name, values in sorted(found.items())}
