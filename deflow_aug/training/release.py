"""The end of a run: averaged weights and the model card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deflow_aug.card import model_card
from deflow_aug.config import to_dict
from deflow_aug.degrader import DeFlowDegrader
from deflow_aug.training import curves
from deflow_aug.training.loop import Trainer
from deflow_aug.training.plan import Plan

SAMPLES = "samples.png"
"""The last sheet, beside the card."""

LAST = 100
"""Steps whose likelihoods the card tells."""


def release(
    trainer: Trainer,
    plan: Plan,
    data: Mapping[str, Mapping[str, Any]],
    sheet: Path | None,
) -> None:
    """Write the averaged weights, in float16, and their card: a folder for from_pretrained.

    Args:
        data: what is known of each folder, by name.
        sheet: the picture of samples that the card shows; None: none.
    """
    output = trainer.output
    training = facts(trainer, plan, data)
    degrader = DeFlowDegrader(trainer.average, training=training, device="cpu")
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
    temporary = output / ".README.md.partial"
    try:
        temporary.write_text(
            model_card(degrader.model, training, pictures=pictures), encoding="utf-8"
        )
        os.replace(temporary, output / "README.md")
    finally:
        temporary.unlink(missing_ok=True)


def facts(trainer: Trainer, plan: Plan, data: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What config.json and the card tell of the training; paths are cut to their last part."""
    recipe = to_dict(trainer.recipe)
    del recipe["model"]  # it stands in config.json already
    if recipe["blur_kernels"] is not None:
        recipe["blur_kernels"] = Path(recipe["blur_kernels"]).name
    result: dict[str, Any] = {"data": {name: dict(fact) for name, fact in data.items()}}
    if plan.start is not None:
        local = Path(plan.start).is_dir()
        result["fine_tuned_from"] = Path(plan.start).name if local else plan.start
    if trainer.encoder is not None:
        result["encoder_weights"] = trainer.encoder
    result["recipe"] = recipe
    log = curves.read(trainer.output / curves.LOG)
    if log:
        result["result"] = {
            f"bits per dimension, mean of the last {LAST} steps": _last_bits(log[-LAST:]),
            "skipped steps": log[-1]["skipped"],
            "times gone back": log[-1]["rolled_back"],
        }
    return result


def _last_bits(log: Sequence[curves.Record]) -> dict[str, float]:
    """The mean of each name's bits, without steps whose loss was not finite."""
    found: dict[str, list[float]] = {}
    for record in log:
        for name, value in record["bits"].items():
            if value is not None:
                found.setdefault(name.replace("|", " given "), []).append(value)
    return {name: round(sum(values) / len(values), 3) for name, values in sorted(found.items())}
