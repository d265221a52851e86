"""Time the default weights on this machine's CPU, beside its speed at matrix products.

    python benchmarks/speed.py [--weights W] [--threads 2] [--repeat 5]

Prints the least time of several runs, for one sample and for each further sample of an image, and
how many 2048 x 2048 float32 matrix products take as long, which compares machines.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from deflow_aug import DeFlowDegrader
from deflow_aug.hub import DEFAULT_WEIGHTS

SIDES = (128, 256, 512)


def least_seconds(action: Callable[[], object], repeat: int) -> float:
    action()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default=DEFAULT_WEIGHTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    matrix = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    product = least_seconds(lambda: matrix @ matrix, arguments.repeat)
    print(f"{arguments.threads} threads; matrix product: {2 * 2048**3 / product / 1e9:.0f} GFLOP/s")
    print("| image | one sample | products | each further sample |")
    print("|---|---:|---:|---:|")
    degrader = DeFlowDegrader.from_pretrained(arguments.weights, device="cpu")
    for side in SIDES:
        image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
        one, three = (
            least_seconds(partial(degrader.degrade, image, n_samples=n, seed=0), arguments.repeat)
            for n in (1, 3)
        )
        further = (three - one) / 2
        print(f"| {side} x {side} | {one:.2f} s | {one / product:.0f} | {further:.2f} s |")


if __name__ == "__main__":
    main()
