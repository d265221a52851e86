"""Make the picture at the top of README.md.

    python docs/overview.py --pairs DIR [--real DIR] [--output docs/overview.png]

Needs matplotlib: ``pip install ".[plots]"``.

First row: a clean photograph and three samples of the default weights, magnified. Second row, with
``--real``: crops of real degraded photographs (the pictures that the default weights were trained
on may be looked at, but not published, so the committed picture has none). Last row: statistics of
the noise of real pairs ``NAME_clean.*``, ``NAME_degraded.*`` beside ours and white noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deflow_aug import DeFlowDegrader
from deflow_aug.evaluation.noise import add_white_noise, best_white_noise, load_pairs, noise_of
from deflow_aug.image_folders import find_images

PHOTO = Path(__file__).parents[1] / "examples" / "images" / "guitar.png"
CROP = (slice(216, 312), slice(200, 296))
SIDE, ZOOM = 96, 3
LAGS = range(9)
COLOURS = {"real": "black", "ours": "tab:red", "white": "tab:blue"}
Image8 = NDArray[np.uint8]


def autocorrelation(noise: NDArray[np.float64]) -> list[float]:
    """Mean over channels and both directions, for every lag of LAGS."""
    noise = noise - noise.mean((0, 1))
    power = (noise**2).mean()
    values = []
    for lag in LAGS:
        size = noise.shape[0] - lag, noise.shape[1] - lag
        down = (noise[lag:] * noise[: size[0]]).mean()
        right = (noise[:, lag:] * noise[:, : size[1]]).mean()
        values.append(float((down + right) / 2 / power))
    return values


def level_by_brightness(
    noises: list[NDArray[np.float64]], cleans: list[Image8]
) -> tuple[NDArray[np.float64], list[float]]:
    """Standard deviation of the noise in bins of the clean brightness."""
    edges = np.linspace(0, 256, 9)
    noise = np.concatenate([n.reshape(-1) for n in noises])
    clean = np.concatenate([c.reshape(-1) for c in cleans])
    bins = np.digitize(clean, edges) - 1
    return (edges[1:] + edges[:-1]) / 2, [float(noise[bins == i].std()) for i in range(8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--real", type=Path, help="folder of real degraded photographs")
    parser.add_argument("--output", type=Path, default=Path("docs/overview.png"))
    arguments = parser.parse_args()

    degrader = DeFlowDegrader.from_pretrained()
    with Image.open(PHOTO) as image:
        photo = np.asarray(image.convert("RGB"))
    samples = degrader.degrade(photo, n_samples=3, seed=0)
    rows = [
        [("clean photograph", photo[CROP])]
        + [(f"sample {i + 1}", sample[CROP]) for i, sample in enumerate(samples)]
    ]
    if arguments.real:
        crops = []
        for path in find_images(arguments.real)[::12][:4]:
            with Image.open(path) as image:
                crop = np.asarray(image.convert("RGB"))[200 : 200 + SIDE, 200 : 200 + SIDE]
            crops.append(("real photograph", crop))
        rows.append(crops)

    pairs = load_pairs(arguments.pairs)
    white = best_white_noise(pairs)
    versions = {
        "real": [pair.degraded for pair in pairs],
        "ours": [degrader.degrade(pair.clean, seed=i) for i, pair in enumerate(pairs)],
        "white": [
            add_white_noise(pair.clean, white.sigma_pooled, np.random.default_rng(i))
            for i, pair in enumerate(pairs)
        ],
    }
    cleans = [pair.clean for pair in pairs]
    noises = {
        name: [noise_of(image, clean) for image, clean in zip(images, cleans, strict=True)]
        for name, images in versions.items()
    }

    # In pixels: the crops are magnified by a whole number, since any other would blur their noise.
    width, panel, plots = 1200, SIDE * ZOOM, 280
    height = len(rows) * (panel + 34) + plots
    figure = plt.figure(figsize=(width / 100, height / 100), dpi=100)

    def axes(x: float, y: float, w: float, h: float) -> Any:
        """Axes with this left, top, width and height."""
        return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

    for y, row in enumerate(rows):
        for x, (title, crop) in enumerate(row):
            picture = axes(9 + 298 * x, 28 + y * (panel + 34), panel, panel)
            picture.imshow(np.kron(crop, np.ones((ZOOM, ZOOM, 1), np.uint8)))
            picture.set_title(title, fontsize=11)
            picture.axis("off")
    histogram, correlation, level = (
        axes(60 + 395 * i, height - plots + 40, 330, plots - 90) for i in range(3)
    )
    bins = np.arange(-25.5, 26.5)
    for name, colour in COLOURS.items():
        label = {"real": "real noise", "ours": "our noise", "white": "best white noise"}[name]
        values = np.concatenate([noise.reshape(-1) for noise in noises[name]])
        density, _ = np.histogram(values, bins, density=True)
        histogram.semilogy(bins[:-1] + 0.5, density, color=colour, label=label)
        curves = np.mean([autocorrelation(noise) for noise in noises[name]], 0)
        correlation.plot(list(LAGS), curves, "o-", color=colour, markersize=3)
        level.plot(*level_by_brightness(noises[name], cleans), "o-", color=colour, markersize=3)
    histogram.set(title="distribution of the noise", xlabel="noise (levels of 255)", ylim=(1e-5, 1))
    histogram.legend(fontsize=8)
    correlation.set(title="correlation between pixels", xlabel="distance (pixels)")
    level.set(title="noise level by brightness", xlabel="brightness", ylim=(0, None))
    figure.savefig(arguments.output)


if __name__ == "__main__":
    main()
