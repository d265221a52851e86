"""Large images: how far a pixel sees, what tiles change, and what they cost.

    python benchmarks/large_images.py halo [--weights W | --published]
    python benchmarks/large_images.py accuracy [...] [--side 512] [--tile 128]
    python benchmarks/large_images.py photo [...] [--size 3840 2160] [--tiles N]
    python benchmarks/large_images.py file [--weights W] [--size 10000 10000] [--suffix .png]

- halo: at which distance from a cut through an image its results differ by less than so many
  levels of 255, for random pictures (from which the halo is derived) and for photographs.
- accuracy: the largest difference between results in tiles and at once, on photographs.
- photo: time for each pixel of a large image beside that of one of 512 x 512, and the peak of
  memory of this process. With --tiles only the first tiles are computed, and the time is that of
  all of them at the same speed.
- file: peak of memory and time of ``deflow-aug degrade`` of a file of that size. PNG files are read
  by bands of rows, others are decoded whole; results are written by bands.

Peaks are resident memory, libraries and all. --published takes ModelConfig(), the architecture of
the published x4 models, with random weights: the last layers of its networks drawn with a standard
deviation of --spread, its actnorms initialised by photographs.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deflow_aug import DeFlowDegrader, randomness
from deflow_aug.config import ModelConfig
from deflow_aug.halo import INVISIBLE, cut_errors, radius
from deflow_aug.hub import DEFAULT_WEIGHTS
from deflow_aug.model import DeFlow
from deflow_aug.sampling import Place, Request, sample
from deflow_aug.tiling import bytes_per_pixel, most_pixels, plan

PHOTOS = Path(__file__).parents[1] / "examples" / "images"
NAMES = ("dog", "city", "grass", "sunset")
LEVELS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)


def photographs(height: int, width: int) -> Tensor:
    """[B, 3, height, width] in [0, 1]; mirrored where they are smaller."""
    pictures = []
    for name in NAMES:
        with Image.open(PHOTOS / f"{name}.png") as photo:
            pixels = np.asarray(photo.convert("RGB"))
        more = [(0, max(0, height - pixels.shape[0])), (0, max(0, width - pixels.shape[1])), (0, 0)]
        pictures.append(np.pad(pixels, more, "symmetric")[:height, :width])
    return torch.from_numpy(np.stack(pictures)).movedim(-1, 1) / 255


def published(spread: float) -> DeFlow:
    """The published x4 architecture with random weights."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = DeFlow(ModelConfig())
        for name, parameter in model.named_parameters():
            if name.endswith(("last.conv.weight", "prior.conv.weight")):
                parameter.normal_(0, spread)
        crops = photographs(96, 96)
        model.initialize(crops, dequantization=randomness.uniform(tuple(crops.shape), 0))
    return model


def peak() -> float:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def halo(degrader: DeFlowDegrader) -> None:
    print("pixels from a cut beyond which no pixel differs by more than so many levels of 255\n")
    print("| pictures | | " + " | ".join(f"{level:g}" for level in LEVELS) + " |")
    print("|---|---|" + "---:|" * len(LEVELS))
    multiple = degrader.model.config.size_multiple
    for label, pictures in (("random", None), ("photographs", photographs(128, 48 * multiple))):
        for restoring in (False, True):
            errors = cut_errors(degrader.model, restoring, pictures)
            reach = " | ".join(str(radius(errors, level / 255, 1)) for level in LEVELS)
            print(f"| {label} | {'restored' if restoring else 'degraded'} | {reach} |", flush=True)
    print(f"\nhalo, from {255 * INVISIBLE:g} levels: {degrader.halo()} pixels")


def accuracy(degrader: DeFlowDegrader, side: int, tile: int) -> None:
    images = photographs(side, side)
    seeds = list(range(len(images)))
    for label, call in (("degraded", degrader.degrade), ("restored", degrader.restore)):
        whole = call(images, seed=seeds, tile=None)
        tiles = call(images, seed=seeds, tile=tile)
        difference = 255 * (whole - tiles).abs()
        changed = ((255 * whole).round() != (255 * tiles).round()).float().mean()
        print(
            f"{label}: {len(images)} photographs of {side} x {side} in tiles of {tile} and a halo "
            f"of {degrader.halo()}: largest difference {difference.max():.3f} levels of 255, "
            f"{100 * changed:.4f} % of 8-bit values differ (standard deviation of what was done "
            f"to the photographs: {255 * (whole - images).std():.1f})",
            flush=True,
        )


def photo(degrader: DeFlowDegrader, width: int, height: int, tiles: int | None) -> None:
    model, config = degrader.model, degrader.model.config
    request = Request([0], torch.ones(1), [config.domains[0]])

    def seconds(pixels: Tensor, place: Place | None = None) -> float:
        start = time.process_time()
        sample(model, pixels, request, place)
        return time.process_time() - start

    small = photographs(512, 512)[:1]
    seconds(small[..., :64, :64])
    before = peak()
    each = min(seconds(small) for _ in range(2)) / 512**2
    print(f"512 x 512 at once: {1e6 * each:.2f} us a pixel (time of the processor)", flush=True)
    margin = degrader.halo()
    limit = most_pixels(config, 1, degrader.device, width * height)
    parts = plan((1, height, width), "auto", config.size_multiple, limit, lambda: margin)
    windows = [part.window for part in parts]
    share = sum(window.area for window in windows) / (width * height)
    largest = max(windows, key=lambda window: window.area)
    print(
        f"{width} x {height}: {len(parts)} tiles, halo {margin}, windows of up to "
        f"{largest.area / 1e6:.2f} megapixels, {share:.3f} times the image in all",
        flush=True,
    )
    if tiles is None:
        image = (photographs(height, width)[0].movedim(0, -1) * 255).byte().numpy()
        start = time.process_time()
        degrader.degrade(image, seed=0)
        whole = (time.process_time() - start) / (width * height)
    else:
        # The largest first, for the peak.
        some = sorted(windows, key=lambda window: -window.area)[:tiles]
        spent = 0.0
        for window in some:
            size = (
                window.rows.stop - window.rows.start,
                window.columns.stop - window.columns.start,
            )
            place = Place(window.rows.start, window.columns.start, height, width)
            spent += seconds(photographs(*size)[:1], place)
        whole = spent / sum(window.area for window in some) * share
        print(f"computed {len(some)} of {len(parts)} tiles, and scaled to all")
    used = (peak() - before) / largest.area
    print(
        f"{1e6 * whole:.2f} us a pixel, {100 * (whole / each - 1):+.0f} % beside 512 x 512; peak "
        f"{peak() / 1e9:.2f} GB, {before / 1e9:.2f} GB of it before; {used:.0f} bytes a pixel of "
        f"the largest window (planned with {bytes_per_pixel(config, 1)})"
    )


MEASURED = """
import resource, sys, time
from deflow_aug.cli import main
status = main(sys.argv[1:])
usage = resource.getrusage(resource.RUSAGE_SELF)
print(f"peak {usage.ru_maxrss * 1024 / 1e9:.2f} GB; processor "
      f"{usage.ru_utime + usage.ru_stime:.0f} s")
sys.exit(status)
"""


def file(weights: str, width: int, height: int, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"large{suffix}")
        with Image.open(PHOTOS / "dog.png") as photo:
            one = photo.convert("RGB")
        large = Image.new("RGB", (width, height))
        for top in range(0, height, one.height):
            for left in range(0, width, one.width):
                large.paste(one, (left, top))
        large.save(source)
        del large
        command = [sys.executable, "-c", MEASURED, "degrade", str(source)]
        subprocess.run([*command, f"--output={folder}/out", f"--weights={weights}"], check=True)
        written = Path(folder, "out", "large.png").stat().st_size
        print(
            f"{width} x {height}: {source.stat().st_size / 1e6:.0f} MB read, "
            f"{written / 1e6:.0f} MB written"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("halo", "accuracy", "photo", "file"))
    parser.add_argument("--weights", default=DEFAULT_WEIGHTS)
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--spread", type=float, default=0.01)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--tile", type=int, default=128)
    parser.add_argument("--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--tiles", type=int)
    parser.add_argument("--suffix", default=".png", help="of the file; .jpg, .tif, ...")
    arguments = parser.parse_args()
    if arguments.what == "file":
        file(arguments.weights, *(arguments.size or (10_000, 10_000)), arguments.suffix)
        return
    if arguments.published:
        degrader = DeFlowDegrader(published(arguments.spread), device="cpu")
    else:
        degrader = DeFlowDegrader.from_pretrained(arguments.weights, device="cpu")
    if arguments.what == "halo":
        halo(degrader)
    elif arguments.what == "accuracy":
        accuracy(degrader, arguments.side, arguments.tile)
    else:
        photo(degrader, *(arguments.size or (3840, 2160)), arguments.tiles)


if __name__ == "__main__":
    main()
