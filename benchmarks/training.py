"""Memory and time of a training step: this library's beside the plain computation.

    python benchmarks/training.py                      # published x4 architecture, 2 crops of 160
    python benchmarks/training.py --config small       # a recipe's own model, batch and crop

The plain computation (``tests/plain.py``) convolves the features anew in every step of the flow
and keeps every activation for the backward pass; "lean" is this library's, "kept" the same with
``keep_activations``. A step is likelihood, gradients and Adam's update. Memory is the peak of a
process of its own for each, less what Python and PyTorch take that trained a tiny one (on a GPU: of
what PyTorch allocated); times are medians of steps taken in turns in one process, so that both meet
the same machine. What the plain computation takes depends on how wide PyTorch's convolutions are
beside its matrix products, see ``throughput.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import plain

from deflow_aug.config import EncoderConfig, ModelConfig
from deflow_aug.devices import resolve
from deflow_aug.model import DeFlow, channels_last
from deflow_aug.recompute import keeping_activations
from deflow_aug.training import recipes

WAYS = ("plain", "lean", "kept")

TINY = ModelConfig(
    steps=1, hidden=8, encoder=EncoderConfig(channels=8, growth=4, blocks=1, stacked_blocks=(0,))
)
"""Loads all the libraries' code that a step needs, and takes next to no memory itself."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="a recipe, bundled or a YAML file")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--crop", type=int, default=160)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's")
    parser.add_argument("--seconds", type=float, default=60, help="to time for")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of all threads together, not of the clock"
    )
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = resolve(arguments.device)
    config, batch, crop = ModelConfig(), arguments.batch, arguments.crop
    if arguments.config:
        recipe = recipes.load(arguments.config)
        config, batch, crop = recipe.model, recipe.batch_size, recipe.crop
    if arguments.memory_of:
        print(json.dumps(peak(arguments.memory_of, config, batch, crop, device)))
        return

    print(
        f"{config.levels} levels of {config.steps} steps, {config.hidden} hidden channels, "
        f"s = {config.scale}; batch of {batch} x {crop} x {crop}; {device}, "
        f"{torch.get_num_threads()} threads"
    )
    # Before there is a model here: a process inherits the peak of the one that starts it.
    memory = {way: measure_elsewhere(way) for way in WAYS}
    model, steps = make_steps(config, batch, crop, device)
    times = in_turns(steps, arguments.seconds, arguments.cpu_time)
    # Weights, gradients and Adam's two moments, which no scheme can do without.
    state = 4 * sum(p.nbytes for p in model.parameters()) / 1e9
    print(f"{'':8}{'peak':>10}{'of it activations':>20}{'a step':>12}")
    for way in WAYS:
        print(f"{way:8}{memory[way]:7.2f} GB{memory[way] - state:17.2f} GB{times[way]:10.2f} s")
    for way in WAYS[1:]:
        activations = (memory[way] - state) / (memory["plain"] - state)
        peaks, seconds = memory[way] / memory["plain"], times[way] / times["plain"]
        print(f"{way + ' / plain':14}{peaks:4.3f}   {activations:15.2f}   {seconds:10.3f}")


def make_steps(
    config: ModelConfig, batch: int, crop: int, device: torch.device
) -> tuple[DeFlow, dict[str, Callable[[], None]]]:
    """A model, and a training step of each way on it."""
    torch.manual_seed(0)
    model = channels_last(DeFlow(config)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, fused=True)
    x = torch.rand(batch, 3, crop, crop, device=device).contiguous(
        memory_format=torch.channels_last
    )
    small = crop // config.scale
    noise = torch.randn(batch, 3, small, small, device=device)
    draws = torch.rand_like(x) - 0.5
    domains = (["clean", *config.domains] * batch)[:batch]
    model.initialize(x, dequantization=draws, noise=noise)

    def step(nll: Callable[..., torch.Tensor]) -> None:
        optimizer.zero_grad(set_to_none=True)
        nll(x, domains, dequantization=draws, noise=noise).mean().backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    def kept(*args: Any, **kwargs: Any) -> torch.Tensor:
        with keeping_activations():
            return model.nll(*args, **kwargs)

    return model, {
        "plain": lambda: step(lambda *a, **k: plain.nll(model, *a, **k)),
        "lean": lambda: step(model.nll),
        "kept": lambda: step(kept),
    }


def peak(way: str, config: ModelConfig, batch: int, crop: int, device: torch.device) -> float:
    """GB at the peak of two steps, less what Python and PyTorch take that trained a tiny model."""
    _, steps = make_steps(TINY, 2, 2 * TINY.size_multiple, device)
    steps[way]()
    bare = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    _, steps = make_steps(config, batch, crop, device)
    steps[way]()
    steps[way]()  # Adam's moments exist from the first on
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 - bare


def measure_elsewhere(way: str) -> float:
    """:func:`peak` in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", way]
    # The C library then gives freed tensors back at once: what is resident is what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    total: float = json.loads(result.stdout)
    return total


def in_turns(
    steps: dict[str, Callable[[], None]], seconds: float, cpu_time: bool
) -> dict[str, float]:
    """Median seconds of a step of each way: of the clock, or of all threads together."""
    now = time.process_time if cpu_time else time.perf_counter
    taken: dict[str, list[float]] = {way: [] for way in steps}
    for step in steps.values():
        step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken["lean"]) < 3:
        for way, step in steps.items():
            started = now()
            step()
            taken[way].append(now() - started)
    return {way: statistics.median(values) for way, values in taken.items()}


if __name__ == "__main__":
    main()
