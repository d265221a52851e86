"""A training run that takes a moment: tiny crops of noise, a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from deflow_aug.config import EncoderConfig, ModelConfig
from deflow_aug.data.paired import PairedBatches, PairFolder
from deflow_aug.data.unpaired import CropFolder, UnpairedBatches
from deflow_aug.training.loop import Progress, Trainer
from deflow_aug.training.recipe import Recipe

MODEL = ModelConfig(
    scale=2,
    levels=2,
    steps=1,
    hidden=4,
    encoder=EncoderConfig(channels=4, growth=4, blocks=1, stacked_blocks=(0,)),
)


def write_noise(path: Path, side: int, seed: int) -> None:
    """A picture of white noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def recipe(**changes: object) -> Recipe:
    settings: dict[str, object] = {
        "model": MODEL,
        "steps": 8,
        "batch_size": 2,
        "crop": 8,
        "checkpoint_every": 3,
        "warmup": 2,
        "rotations": False,
        # Pictures as small as these have no flat areas to measure noise in.
        "dequantize_as_noise": 0.0,
        "condition_as_noise": 0.0,
        "fit_in_flat_areas": False,
        "remove_cast": False,
    }
    return Recipe(**(settings | changes))  # type: ignore[arg-type]


def unpaired(
    folder: Path, domains: tuple[str, ...] = ("degraded",), batch_size: int = 2
) -> UnpairedBatches:
    """Crops of noise, a picture for each domain, written if it is not there."""
    crops = {}
    for number, name in enumerate(("clean", *domains)):
        if not (folder / name).exists():
            write_noise(folder / name / "a.png", 32, seed=number)
        crops[name] = CropFolder(folder / name, crop=8, align=2)
    return UnpairedBatches(crops, batch_size, seed=0)


def paired(folder: Path, domain: str = "degraded", batch_size: int = 2) -> PairedBatches:
    """One pair of noise pictures, written if it is not there."""
    for number, half in enumerate(("clean", "degraded")):
        if not (folder / half).exists():
            write_noise(folder / half / "a.png", 32, seed=10 + number)
    return PairedBatches({domain: PairFolder(folder, crop=8, align=2)}, batch_size, seed=0)


def trainer(batches: UnpairedBatches, output: Path, settings: Recipe | None = None) -> Trainer:
    return Trainer(settings or recipe(), batches, output, accelerator=torch.device("cpu"))


def ignore(progress: Progress) -> None:
    pass


def assert_same_weights(one: Trainer, other: Trainer) -> None:
    """Bit by bit, of the models and of the averages."""
    for mine, theirs in ((one.model, other.model), (one.average, other.average)):
        expected = theirs.state_dict()
        for name, tensor in mine.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
