"""Where the noise of a model is too strong or too weak: by gradient and intensity of the picture.

    python benchmarks/noise_by_place.py --pairs DIR [--weights NAME_OR_FOLDER] [--domain NAME]

DIR holds pairs ``NAME_degraded.*`` and ``NAME_clean.*``. Prints the root mean square of the real
noise and of one sample's, in levels (1/255), and their ratio; pixels are sorted by what the clean
picture has at their place: the gradient of its brightness (levels a pixel; derivatives of a
Gaussian of sigma 1), and its brightness, smoothed by the same Gaussian. Needs scipy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_gradient_magnitude

from deflow_aug import DeFlowDegrader
from deflow_aug.evaluation import load_pairs, noise_of
from deflow_aug.evaluation.tables import Table
from deflow_aug.hub import DEFAULT_WEIGHTS

EDGES = {
    "gradient": [0, 1, 2, 4, 8, 16, 32, np.inf],
    "intensity": [0, 16, 32, 64, 96, 128, 160, 192, np.inf],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=Path, required=True, metavar="DIR")
    parser.add_argument("--weights", default=DEFAULT_WEIGHTS)
    parser.add_argument("--domain")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pairs = load_pairs(arguments.pairs)
    degrader = DeFlowDegrader.from_pretrained(arguments.weights)
    # Pixels, squares of the real noise, squares of ours, in each range.
    sums = {name: np.zeros((3, len(edges) - 1)) for name, edges in EDGES.items()}
    for number, pair in enumerate(pairs):
        sample = degrader.degrade(
            pair.clean,
            arguments.temperature,
            seed=(arguments.seed << 32) + number,
            domain=arguments.domain,
        )
        brightness = pair.clean.mean(-1, dtype=np.float64)
        place = {
            "gradient": gaussian_gradient_magnitude(brightness, 1),
            "intensity": gaussian_filter(brightness, 1),
        }
        squares = [(noise_of(y, pair.clean) ** 2).mean(-1) for y in (pair.degraded, sample)]
        for name, edges in EDGES.items():
            for row, weights in enumerate([None, *squares]):
                sums[name][row] += np.histogram(place[name], edges, weights=weights)[0]
    for name, edges in EDGES.items():
        print(table(name, edges, sums[name]).to_markdown())


def table(name: str, edges: list[float], sums: NDArray[np.float64]) -> Table:
    count, *squares = sums
    rows = []
    for i in np.flatnonzero(count):
        real, ours = (float(np.sqrt(one[i] / count[i])) for one in squares)
        limits = f"{edges[i]:g} to {edges[i + 1]:g}"
        cells = (f"{count[i] / count.sum():.1%}", f"{real:.2f}", f"{ours:.2f}")
        rows.append((limits, *cells, f"{ours / real:.2f}" if real else "-"))
    columns = (f"{name} (levels)", "of the pixels", "real", "ours", "ours / real")
    return Table(f"Noise by {name}", columns, rows, ())


if __name__ == "__main__":
    main()
