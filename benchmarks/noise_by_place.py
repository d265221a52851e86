"""Where the noise of a model is too strong or too weak: by gradient and intensity of the picture.

    python benchmarks/noise_by_place.py --pairs DIR [--weights NAME_OR_FOLDER] [--domain NAME]
    python benchmarks/noise_by_place.py --clean examples/images

Pairs are ``NAME_degraded.*`` and ``NAME_clean.*``. Prints the root mean square of one sample's
noise, in levels (1/255), and with pairs that of the real noise and their ratio; pixels are sorted
by what the clean picture has at their place: the gradient of its brightness (levels a pixel;
derivatives of a Gaussian of sigma 1), and its brightness, smoothed by the same Gaussian. Needs
scipy.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter, gaussian_gradient_magnitude

from deflow_aug import DeFlowDegrader
from deflow_aug.evaluation import load_pairs, noise_of
from deflow_aug.evaluation.tables import Table
from deflow_aug.hub import DEFAULT_WEIGHTS
from deflow_aug.image_folders import find_images

Pixels = NDArray[np.uint8]

EDGES = {
    "gradient": [0, 1, 2, 4, 8, 16, 32, np.inf],
    "intensity": [0, 16, 32, 64, 96, 128, 160, 192, np.inf],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    pictures = parser.add_mutually_exclusive_group(required=True)
    pictures.add_argument("--pairs", type=Path, metavar="DIR")
    pictures.add_argument("--clean", type=Path, metavar="DIR", help="pictures of no known noise")
    parser.add_argument("--weights", default=DEFAULT_WEIGHTS)
    parser.add_argument("--domain")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    degrader = DeFlowDegrader.from_pretrained(arguments.weights)
    # Pixels, squares of our noise, squares of the real one, in each range.
    sums = {name: np.zeros((3, len(edges) - 1)) for name, edges in EDGES.items()}
    for number, (clean, degraded) in enumerate(_pictures(arguments.pairs, arguments.clean)):
        sample = degrader.degrade(
            clean,
            arguments.temperature,
            seed=(arguments.seed << 32) + number,
            domain=arguments.domain,
        )
        brightness = clean.mean(-1, dtype=np.float64)
        place = {
            "gradient": gaussian_gradient_magnitude(brightness, 1),
            "intensity": gaussian_filter(brightness, 1),
        }
        noisy = [sample] if degraded is None else [sample, degraded]
        squares = [(noise_of(y, clean) ** 2).mean(-1) for y in noisy]
        for name, edges in EDGES.items():
            for row, weights in enumerate([None, *squares]):
                sums[name][row] += np.histogram(place[name], edges, weights=weights)[0]
    for name, edges in EDGES.items():
        print(table(name, edges, sums[name], real=arguments.pairs is not None).to_markdown())


def _pictures(pairs: Path | None, clean: Path | None) -> Iterator[tuple[Pixels, Pixels | None]]:
    """Clean pictures and the real degraded version of each, if there is one."""
    if pairs is not None:
        for pair in load_pairs(pairs):
            yield pair.clean, pair.degraded
    elif clean is not None:
        for path in find_images(clean):
            with Image.open(path) as image:
                yield np.asarray(image.convert("RGB")), None


def table(name: str, edges: list[float], sums: NDArray[np.float64], real: bool) -> Table:
    count, *squares = sums
    rows = []
    for i in np.flatnonzero(count):
        ours, theirs = (float(np.sqrt(one[i] / count[i])) for one in squares)
        cells = [f"{edges[i]:g} to {edges[i + 1]:g}", f"{count[i] / count.sum():.1%}"]
        compared = [f"{theirs:.2f}", f"{ours / theirs:.2f}" if theirs else "-"] if real else []
        rows.append((*cells, f"{ours:.2f}", *compared))
    columns = (f"{name} (levels)", "of the pixels", "ours", *["real", "ours / real"] * real)
    return Table(f"Noise by {name}", columns, rows, ())


if __name__ == "__main__":
    main()
