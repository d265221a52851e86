"""Does decoding keep a training fed? Crops a second from large photographs, beside training steps.

    python benchmarks/loading.py                                  # 12-megapixel JPEGs, made here
    python benchmarks/loading.py --folder DIR --config published-ntire --workers 0 4 8 16

For each number of workers and each cache: crops a second that the loader makes (without a cache
each crop costs the decoding of an image, so that these are images a second too), the steps a second
that they would be enough for, and, of training steps really taken with it on this device, the share
of the time that they waited for data.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from deflow_aug.config import CLEAN
from deflow_aug.data.batches import Batch
from deflow_aug.data.folders import CropFolder
from deflow_aug.data.loading import loader
from deflow_aug.data.pictures import decode
from deflow_aug.data.unpaired import UnpairedBatches
from deflow_aug.devices import resolve
from deflow_aug.model import DeFlow, channels_last
from deflow_aug.training.recipe import Recipe
from deflow_aug.training.recipes import load

EXAMPLES = Path(__file__).parents[1] / "examples" / "images"
FOREVER = 10**9  # steps
CACHES = ("none", "memory", "disk")
RATES = (1, 2, 5, 10)  # steps a second to tell the needs of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="photographs; default: made from examples/")
    parser.add_argument("--images", type=int, default=12, help="how many to make")
    parser.add_argument("--size", type=int, nargs=2, default=(4000, 3000), metavar=("W", "H"))
    parser.add_argument("--config", default="small", help="a recipe, bundled or a YAML file")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--downscale", type=int, help="default: the recipe's clean_downscale")
    parser.add_argument("--seconds", type=float, default=5, help="to time each for")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    recipe, device = load(arguments.config), resolve(arguments.device)
    downscale = arguments.downscale or recipe.clean_downscale
    train = Training(recipe, device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or make_photographs(
            Path(temporary, "photographs"), arguments.images, tuple(arguments.size)
        )
        measure_folder(folder, recipe, downscale, Path(temporary, "statistics"))
        step_seconds = train.seconds_per_step(arguments.seconds)
        needed = recipe.batch_size / step_seconds
        print(
            f"\n{arguments.config}: {recipe.batch_size} crops of {recipe.crop} x {recipe.crop} a "
            f"step, {1 / step_seconds:.2f} steps/s on {name_of(device)} with data at hand: "
            f"{needed:.1f} crops/s needed; images downscaled by {downscale}\n"
        )
        print("| workers | cache | crops/s | enough for steps/s | steps/s in training | waiting |")
        print("|---:|---|---:|---:|---:|---:|")
        rates: dict[tuple[int, str], float] = {}
        for workers, cache in itertools.product(arguments.workers, CACHES):
            batches = make_batches(folder, recipe, downscale, cache, Path(temporary, "cache"))
            rate = crops_per_second(batches, workers, arguments.seconds)
            rates[workers, cache] = rate
            steps, waiting = train.fed_by(batches, workers, arguments.seconds)
            print(
                f"| {workers} | {cache} | {rate:.1f} | {rate / recipe.batch_size:.2f} | "
                f"{steps:.2f} | {waiting:.1%} |",
                flush=True,
            )
        print(
            f"\nFewest workers that make the crops of {arguments.config} (- : more than those):\n"
        )
        print("| steps/s | crops/s | " + " | ".join(f"cache: {c}" for c in CACHES) + " |")
        print("|---:|---:|" + "---:|" * len(CACHES))
        for steps in RATES:
            need = steps * recipe.batch_size
            fewest = (
                min((w for w in arguments.workers if rates[w, c] >= need), default="-")
                for c in CACHES
            )
            print(f"| {steps} | {need} | " + " | ".join(map(str, fewest)) + " |")


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU ({torch.get_num_threads()} threads)"


def make_photographs(folder: Path, images: int, size: tuple[int, int]) -> Path:
    """JPEG files of this size, of mosaics of the example photographs with some sensor noise."""
    folder.mkdir()
    pieces = [Image.open(path).convert("RGB") for path in sorted(EXAMPLES.glob("*.png"))]
    for number in range(images):
        rng = np.random.default_rng(number)
        mosaic = Image.new("RGB", size)
        side = pieces[0].width * 2
        for left, top in itertools.product(range(0, size[0], side), range(0, size[1], side)):
            piece = pieces[rng.integers(len(pieces))].resize((side, side), Image.Resampling.BICUBIC)
            mosaic.paste(piece, (left, top))
        noise = rng.standard_normal((size[1], size[0], 1), np.float32) * 3
        noisy = np.clip(np.asarray(mosaic) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:03}.jpg", quality=92)
    return folder


def measure_folder(folder: Path, recipe: Recipe, downscale: int, cache: Path) -> None:
    started = time.perf_counter()
    crops = CropFolder(folder, recipe.crop, recipe.model.scale, downscale=downscale)
    opened = time.perf_counter() - started
    files = [file.path for file in crops.pictures.files]
    megapixels = sum(f.height * f.width for f in crops.pictures.files) / len(files) / 1e6
    size = sum(path.stat().st_size for path in files) / len(files) / 2**20
    print(f"{len(files)} images of {megapixels:.1f} megapixels and {size:.1f} MiB on average")
    print(f"- found and headers read in {opened:.3f} s")
    started = time.perf_counter()
    for path in files[:8]:
        decode(path)
    alone = min(len(files), 8) / (time.perf_counter() - started)
    print(f"- decoded one after the other: {alone:.1f} images/s")
    started = time.perf_counter()
    crops = CropFolder(
        folder, recipe.crop, recipe.model.scale, downscale=downscale, cache_dir=cache
    )
    crops.statistics()
    passed = len(files) / (time.perf_counter() - started)
    print(f"- a pass for channel statistics that fills the cache on disk: {passed:.1f} images/s")


def make_batches(
    folder: Path, recipe: Recipe, downscale: int, cache: str, cache_dir: Path
) -> UnpairedBatches:
    """Of one domain, since the other one's images would be decoded alike."""
    crops = CropFolder(
        folder,
        recipe.crop,
        recipe.model.scale,
        downscale=downscale,
        cache_bytes=recipe.cache_megabytes * 2**20 if cache == "memory" else 0,
        cache_dir=cache_dir if cache == "disk" else None,
    )
    if cache == "disk":
        crops.statistics()  # fills it
    return UnpairedBatches({CLEAN: crops}, recipe.batch_size, recipe.seed)


def steady(batches: UnpairedBatches, workers: int) -> Iterator[Batch]:
    """The loader's batches from when its caches have filled, and what was made ahead is used."""
    files = sum(len(folder.files) for folder in batches.domains.values())
    with warnings.catch_warnings(), closing(loader(batches, 0, FOREVER, workers=workers)) as made:
        warnings.simplefilter("ignore")
        kept = any(folder.pictures.cache_bytes for folder in batches.domains.values())
        # Each worker draws at random: ln(n) times n crops until it has seen n images.
        rounds = int(np.ceil((np.log(files) + 1) * files / batches.batch_size)) if kept else 0
        for _ in range(max(workers, 1) * (rounds + 4) + 1):
            next(made)
        yield from made


def crops_per_second(batches: UnpairedBatches, workers: int, seconds: float) -> float:
    with closing(steady(batches, workers)) as made:
        next(made)
        started, crops = time.perf_counter(), 0
        while time.perf_counter() - started < seconds or crops < 4 * batches.batch_size:
            crops += len(next(made).indices)
        return crops / (time.perf_counter() - started)


class Training:
    """Optimiser steps of a recipe's model, without anything around them."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        torch.manual_seed(0)
        self.recipe, self.device = recipe, device
        self.model = channels_last(DeFlow(recipe.model)).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-6)
        x = torch.rand(recipe.batch_size, 3, recipe.crop, recipe.crop, device=device)
        self.model.initialize(x)
        self.batch = Batch((x * 255).byte().cpu(), (CLEAN,) * len(x), tuple(range(len(x))), 0)

    def step(self, batch: Batch) -> None:
        images = batch.images.to(self.device, non_blocking=True).float() / 255
        self.optimizer.zero_grad(set_to_none=True)
        self.model.nll(images, batch.domains).mean().backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds_per_step(self, seconds: float) -> float:
        for _ in range(2):
            self.step(self.batch)
        started, steps = time.perf_counter(), 0
        while time.perf_counter() - started < seconds or steps < 3:
            self.step(self.batch)
            steps += 1
        return (time.perf_counter() - started) / steps

    def fed_by(self, batches: UnpairedBatches, workers: int, seconds: float) -> tuple[float, float]:
        """Steps a second with this loader, and the share of the time spent waiting for it."""
        with closing(steady(batches, workers)) as made:
            self.step(next(made))
            started, steps, waited = time.perf_counter(), 0, 0.0
            while time.perf_counter() - started < seconds or steps < 3:
                asked = time.perf_counter()
                batch = next(made)
                waited += time.perf_counter() - asked
                self.step(batch)
                steps += 1
            passed = time.perf_counter() - started
        return steps / passed, waited / passed


if __name__ == "__main__":
    main()
