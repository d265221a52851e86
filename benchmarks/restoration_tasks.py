"""The tasks of benchmarks/downstream.py: pictures to train and to test on, and ways to degrade."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from restoration import Image8, Pool, as_tensor

from deflow_aug import DeFlowDegrader, cli, randomness
from deflow_aug.baselines import fit_all
from deflow_aug.evaluation import load_pairs
from deflow_aug.image_files import read_image, write_image
from deflow_aug.image_folders import find_images
from deflow_aug.resize import bicubic_downscale

SCALE = 4
NOISE = 10.0  # levels; of the hidden recipe
QUALITY = 70  # of its JPEG

DEFLOW = "DeFlow"
REAL = "real pairs"
"""The ceiling's name among the methods."""


@dataclass(frozen=True)
class Fold:
    """What a network is tested on, and the real pairs that the ceiling may learn from.

    Args:
        test: numbers of the pictures in :attr:`Task.test`.
        real: the pool of the ceiling.
    """

    test: tuple[int, ...]
    real: Pool


@dataclass(frozen=True)
class Task:
    """A restoration task.

    Args:
        name: for tables.
        clean: pictures that the methods degrade, and that are the targets, uint8 [H, W, 3].
        inputs: what is degraded of each of them: the picture, or a smaller version of it.
        degraded: unpaired real degraded pictures, all that a method may see of the degradation.
        test: pairs of degraded and clean pictures.
        names: of the pairs.
        folds: parts of the test pairs, each with a ceiling of its own.
        scale: of the super-resolution, or 1.
    """

    name: str
    clean: Sequence[Image8]
    inputs: Sequence[Image8]
    degraded: Sequence[Image8]
    test: Sequence[tuple[Image8, Image8]]
    names: Sequence[str]
    folds: Sequence[Fold]
    scale: int = 1


def pictures(folder: Path) -> list[Image8]:
    """All pictures of a folder, in the order of their names."""
    return [np.array(Image.fromarray(_array(p)).convert("RGB")) for p in find_images(folder)]


def _array(path: Path) -> Image8:
    return np.asarray(read_image(path), np.uint8)


def denoising(folder: Path) -> Task:
    """Real noise: FOLDER/clean, FOLDER/degraded (other scenes), FOLDER/validation (pairs).

    The ceiling learns from the pairs of all scenes but the one that it is tested on. What shows
    the same scene is told by the names: all but a number at their end.
    """
    pairs = load_pairs(folder / "validation")
    clean = pictures(folder / "clean")
    scenes: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        scenes.setdefault(re.sub(r"_+\d+$", "", pair.name), []).append(number)
    if len(scenes) < 2:
        raise SystemExit(
            f"{folder / 'validation'} needs pairs of two scenes at least, for the ceiling"
        )
    folds = []
    for mine in scenes.values():
        others = [pair for number, pair in enumerate(pairs) if number not in mine]
        folds.append(
            Fold(tuple(mine), Pool([p.clean for p in others], [[p.degraded] for p in others]))
        )
    return Task(
        folder.name,
        clean,
        clean,
        pictures(folder / "degraded"),
        [(p.degraded, p.clean) for p in pairs],
        [p.name for p in pairs],
        folds,
    )


# -- super-resolution of an unknown degradation ---------------------------------------------------


def hidden(picture: Image8, *key: int) -> Image8:
    """The degradation that no method is told: correlated high-frequency noise, then JPEG.

    As in the real-world challenges of AIM 2019 and NTIRE 2020, whose recipes are unknown: white
    noise averaged over two pixels in a row and freed of its low frequencies, half of it common to
    the channels; NOISE levels in all; JPEG of quality QUALITY.
    """
    rng = randomness.generator(*key)
    white = rng.standard_normal((*picture.shape[:2], 4)).astype(np.float32)
    mixed = (white[..., :3] + white[..., 3:]) / np.sqrt(2)
    pairs = cv2.blur(mixed, (2, 1), borderType=cv2.BORDER_REFLECT)
    fine = pairs - cv2.GaussianBlur(pairs, (0, 0), 2.0)
    noisy = picture + NOISE * fine / fine.std()
    buffer = BytesIO()
    levels = noisy.round().clip(0, 255).astype(np.uint8)
    Image.fromarray(levels).save(buffer, "JPEG", quality=QUALITY)
    return np.asarray(Image.open(buffer).convert("RGB"))


def downscaled(picture: Image8) -> Image8:
    small = bicubic_downscale(as_tensor(picture[None]), SCALE)[0].clamp(0, 1)
    return (small * 255).round().byte().permute(1, 2, 0).numpy()


def super_resolution(folder: Path, draws: int) -> Task:
    """A third of the pictures is tested on, a third is degraded, the rest are the clean ones.

    Args:
        folder: of clean pictures.
        draws: of the hidden degradation, for each picture that the ceiling learns from.
    """
    everything = [p[: p.shape[0] // 8 * 8, : p.shape[1] // 8 * 8] for p in pictures(folder)]
    if len(everything) < 6:
        raise SystemExit(
            f"{folder} has {len(everything)} pictures; 6 are needed, to have 2 of each"
        )
    order = randomness.generator(0, 0).permutation(len(everything))
    third = len(everything) // 3
    test, other, clean = (
        [everything[i] for i in part] for part in np.split(order, (third, 2 * third))
    )
    small = [downscaled(p) for p in clean]
    real = [[hidden(p, 1, 2, i, d) for d in range(draws)] for i, p in enumerate(small)]
    return Task(
        "sr",
        clean,
        small,
        [hidden(downscaled(p), 1, 1, i) for i, p in enumerate(other)],
        [(hidden(downscaled(p), 1, 0, i), p) for i, p in enumerate(test)],
        [find_images(folder)[i].stem for i in order[:third]],
        [Fold(tuple(range(third)), Pool(clean, real, SCALE))],
        SCALE,
    )


def train_deflow(task: Task, folder: Path, steps: int | None, device: str) -> Path:
    """Weights trained on the task's unpaired pictures, in a folder; taken up where they are.

    With the settings of the small recipe, but for the steps if they are given.
    """
    weights = folder / "weights"
    if not (weights / "config.json").exists():
        for kind, some in (("clean", task.inputs), ("degraded", task.degraded)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            for number, picture in enumerate(some):
                write_image(picture, folder / kind / f"{number:03d}.png")
        command = ["train", "--config", "small", "--device", device]
        command += [] if steps is None else ["--steps", str(steps)]
        command += ["--clean", str(folder / "clean"), "--degraded", str(folder / "degraded")]
        command += ["--output", str(weights), "--card-samples", "false"]
        if status := cli.main(command):
            raise SystemExit(status)
    return weights


# -- ways to degrade ------------------------------------------------------------------------------

Degrade = Callable[..., Any]
"""As ``DeFlowDegrader.degrade``: of a picture, temperature= and seed=."""


@dataclass(frozen=True)
class Method:
    """A way to degrade with temperatures drawn from a range, written NAME or NAME@LOW:HIGH."""

    text: str
    name: str
    temperatures: tuple[float, float]

    @classmethod
    def parse(cls, text: str) -> Method:
        name, at, between = text.partition("@")
        try:
            low, high = (float(t) for t in between.split(":")) if at else (1.0, 1.0)
        except ValueError:
            low, high = 1.0, -1.0
        if not 0 <= low <= high:
            raise SystemExit(f"expected NAME or NAME@LOW:HIGH, as DeFlow@0.5:1.5, got {text!r}")
        return cls(text, name, (low, high))


def deflow(weights: str, device: str) -> Degrade:
    """Of weights NAME_OR_FOLDER, or NAME_OR_FOLDER@DOMAIN where they know several."""
    name, _, domain = weights.partition("@")
    degrader = DeFlowDegrader.from_pretrained(name, device=device)
    degrader.check_domain(domain or None)

    def degrade(picture: Image8, temperature: float, *, seed: int) -> Any:
        return degrader.degrade(picture, temperature, seed=seed, domain=domain or None)

    return degrade


def baselines(task: Task) -> Mapping[str, Degrade]:
    """Fitted to the task's degraded pictures, by name."""
    return {name: one.degrade for name, one in fit_all(task.degraded, task.inputs).items()}


def pool(task: Task, degrade: Degrade, method: Method, draws: int, seed: int) -> Pool:
    """The task's clean pictures, each degraded ``draws`` times."""
    degraded: list[list[NDArray[np.uint8]]] = []
    for number, picture in enumerate(task.inputs):
        mine = []
        for draw in range(draws):
            rng = randomness.generator(seed, randomness.Stream.CHOICE, number, draw)
            temperature = float(rng.uniform(*method.temperatures))
            with torch.no_grad():
                result = degrade(picture, temperature, seed=int(rng.integers(2**62)))
            mine.append(np.asarray(result))
        degraded.append(mine)
    return Pool(task.clean, degraded, task.scale)
