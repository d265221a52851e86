"""Compare the noise that a model adds with real noise, on pairs of real photographs.

    python benchmarks/noise_statistics.py --pairs DIR [--pairs DIR2] [--weights NAME_OR_FOLDER]

Each DIR holds pairs ``NAME_degraded.*`` and ``NAME_clean.*``.  Prints markdown tables; ``--json``
writes all figures, ``--plot`` a figure per folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deflow_aug.evaluation import Comparison, Reference, load_pairs
from deflow_aug.evaluation.noise import BINS, LIMIT, Image8, pooled

CROP = 96  # pixels of the enlarged crops in the plot


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, action="append", required=True, metavar="DIR")
    parser.add_argument("--weights", help="name or folder of the weights; default: the library's")
    parser.add_argument("--domain", help="degraded domain, where the weights have several")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dequantize", action="store_true", help="with dequantisation noise at inference"
    )
    parser.add_argument(
        "--plain-conditioning", action="store_true", help="without noise on h(x) at inference"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args(arguments)

    folders = [(folder, load_pairs(folder)) for folder in args.pairs]  # fail before the model loads
    figures = {}
    for index, (folder, pairs) in enumerate(folders):
        # Anew for each folder, so that a folder's figures do not depend on those before it.
        degrade = model(args)
        samples = [degrade(pair.clean) for pair in pairs]
        comparison = Reference.of(pairs, args.seed).compare(samples)
        print(f"## {title(folder)}\n\n{comparison.to_markdown()}", flush=True)
        figures[str(folder)] = comparison.to_dict()
        if args.plot:
            file = args.plot
            if len(folders) > 1:
                file = file.with_name(f"{file.stem}_{index + 1}{file.suffix}")
            plot(comparison, samples, degrade, title(folder), file)
    if args.json:
        names = ("weights", "temperature", "seed", "dequantize", "plain_conditioning")
        settings = {name: getattr(args, name) for name in names}
        text = json.dumps({**settings, "folders": figures}, indent=1, allow_nan=False)
        args.json.write_text(text + "\n", encoding="utf-8")


def model(args: argparse.Namespace) -> Callable[[Image8], Image8]:
    """The model as a function of the picture; every call draws with the next seed.

    The same seed would give pictures of one size the same latent noise, and the pooled figures
    fewer independent draws than they seem to have.
    """
    from deflow_aug import DeFlowDegrader

    degrader = DeFlowDegrader.from_pretrained(
        *([] if args.weights is None else [args.weights]),
        conditioning_noise=not args.plain_conditioning,
        dequantize=args.dequantize,
    )
    seeds = itertools.count(args.seed * 1_000_003)  # far apart, lest neighbouring seeds share draws

    def degrade(clean: Image8) -> Image8:
        result = degrader.degrade(
            clean, temperature=args.temperature, seed=next(seeds), domain=args.domain
        )
        return np.asarray(result)

    return degrade


def title(folder: Path) -> str:
    """The last two parts of a folder's path: the last alone is often just "validation"."""
    return "/".join(folder.resolve().parts[-2:])


def plot(
    comparison: Comparison,
    samples: list[Image8],
    degrade: Callable[[Image8], Image8],
    heading: str,
    file: Path,
) -> None:
    """Draw pooled histograms, standard deviation per pair and enlarged crops of one pair."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    reference = comparison.reference
    figure = plt.figure(figsize=(12, 10.5), layout="constrained")
    figure.suptitle(heading)
    grid = figure.add_gridspec(3, 12, height_ratios=(1, 1, 0.95))

    series: list[tuple[str, Any, dict[str, Any]]] = [
        ("real", pooled(reference.real), {"color": "black", "lw": 1.8}),
        ("ours", pooled(comparison.ours), {"color": "tab:blue", "lw": 1.5}),
        ("best white", pooled(reference.white_pooled), {"color": "tab:orange", "ls": "--"}),
    ]
    centres = (np.arange(BINS) + 0.5) * (2 * LIMIT / BINS) - LIMIT
    for row, name in enumerate(("full", "half", "quarter")):
        axes = figure.add_subplot(grid[0, 4 * row : 4 * row + 4])
        for label, counts, style in series:
            share = counts[row] / counts[row].sum()
            seen = share > 0  # at full resolution 8-bit noise cannot reach every bin
            axes.plot(centres[seen], share[seen], label=label, **style)
        axes.set(yscale="log", ylim=(1e-6, 1), xlabel="noise (levels of 255), end bins open")
        axes.set_title(f"pooled noise, {name} resolution")
        axes.grid(alpha=0.3)
        if row == 0:
            axes.set_ylabel("share of values per bin")
            axes.legend(loc="upper right")

    for column, (key, name) in enumerate(
        (("std", "standard deviation (levels)"), ("lag", "lag-1 correlation"))
    ):
        axes = figure.add_subplot(grid[1, 6 * column : 6 * column + 6])
        real = [getattr(s, key) for s in reference.real]
        ours = [getattr(s, key) for s in comparison.ours]
        top = 1.1 * float(np.nanmax([*real, *ours]))
        bottom = min(0.0, 1.1 * float(np.nanmin([*real, *ours])))
        axes.plot([bottom, top], [bottom, top], color="grey", lw=1, label="equal")
        axes.scatter(real, ours, s=22)
        pearson, spearman = comparison.correlations()[key]
        axes.set(xlabel=f"real {name}", ylabel="ours", xlim=(bottom, top), ylim=(bottom, top))
        axes.set_title(f"per pair: Pearson {pearson:.2f}, Spearman {spearman:.2f}")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")

    # The pair of median real noise, around its middle: picked by rule, not by eye.
    order = np.argsort([s.std for s in reference.real])
    index = int(order[len(order) // 2])
    pair = reference.pairs[index]
    y, x = (max(0, n // 2 - CROP // 2) for n in pair.clean.shape[:2])
    shown = [
        ("clean", pair.clean),
        ("real", pair.degraded),
        ("ours", samples[index]),
        ("ours, again", degrade(pair.clean)),
    ]
    crops = [(name, picture[y : y + CROP, x : x + CROP] / 255) for name, picture in shown]
    # One stretch for all four, from the real crop, or noise in dark flat places is not seen.
    low, high = np.percentile(crops[1][1], (0.2, 99.8))
    for column, (name, crop) in enumerate(crops):
        axes = figure.add_subplot(grid[2, 3 * column : 3 * column + 3])
        stretched = np.clip((crop - low) / max(high - low, 0.02), 0, 1)
        axes.imshow(stretched, interpolation="nearest")
        axes.set_title(name)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.supxlabel(
        f"{pair.name}: {CROP} x {CROP} pixels at its middle, contrast stretched alike", fontsize=9
    )
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
