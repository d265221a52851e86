"""How fast degrading is: beside the plain computation, and beside this machine's peak.

    python benchmarks/throughput.py                                   # two threads, 1 minute or so
    python benchmarks/throughput.py --max-pixels 67108864 --plot docs/throughput.png
    python benchmarks/throughput.py --threads 1 --cpu-time            # on a machine that is busy
    python benchmarks/throughput.py --weights camera-noise my-weights # their cost, nothing else

The plain computation (``tests/plain.py``) runs every layer on its own and convolves the features
anew in every step, when encoding and when decoding, as the released code does. All times are the
least of several, taken in turns, so that all meet the same machine. FLOPs are counted by PyTorch
while they run: "needed" are those with every convolution of the features computed once and nothing
upsampled; "done" are fewer, since some convolutions are computed by Winograd's algorithm. The peak
is that of a matrix product; where the same product takes less time as a convolution (MKL uses half
of the width that AMD's cores with AVX-512 have, oneDNN all of it), so does the plain computation.
How it is with AVX2 alone: ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
ATEN_CPU_CAPABILITY=avx2 before the command.

On a GPU: images a second of batches, in float32 and with bfloat16 in the conditioning network,
each as the library does it and recorded as a CUDA graph. The library itself uses neither CUDA
graphs nor torch.compile.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import plain

from deflow_aug import DeFlowDegrader
from deflow_aug.config import ModelConfig
from deflow_aug.devices import resolve
from deflow_aug.model import DeFlow, channels_last

Action = Callable[[], object]
SIDES = (64, 128, 256, 512, 1024, 2048, 4096)
SAMPLES = (1, 4, 16, 64)
GPU_BATCHES = ((16, 64), (8, 512))
MATRIX = {"cpu": 2048, "cuda": 8192}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--side", type=int, default=160, help="of the image beside the plain one")
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=2**20,
        help="of all samples of an image together, in the table of sizes",
    )
    parser.add_argument("--plot", type=Path, help="where to draw the table of sizes")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of all threads together, not of the clock"
    )
    parser.add_argument("--weights", nargs="+", metavar="W", help="what to compare; see above")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = resolve(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where graphs are recorded, and events
    clock = Clock(device, arguments.repeat, arguments.cpu_time)
    print(f"{name_of(device)}, {clock.what}, the least of {arguments.repeat}\n")
    if arguments.weights:
        beside_each_other(arguments.weights, device, clock)
        return
    beside_plain(device, clock, arguments.side)
    if device.type == "cuda":
        batches(device, clock)
    degrader = DeFlowDegrader.from_pretrained(device=device)
    table = sizes(degrader, clock, arguments.max_pixels)
    if arguments.plot:
        draw(table, arguments.plot, f"{name_of(device)}, default weights")


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


class Clock:
    """Seconds that actions take, taken in turns: of each the least of ``repeat``."""

    def __init__(self, device: torch.device, repeat: int, cpu_time: bool) -> None:
        self.device, self.repeat, self.cpu_time = device, repeat, cpu_time
        self.what = "seconds of its cores" if cpu_time else "seconds"

    def __call__(self, **actions: Action) -> dict[str, float]:
        taken: dict[str, list[float]] = {name: [] for name in actions}
        for turn in range(self.repeat + 1):
            for name, action in actions.items():
                seconds = self._once(action)
                if turn:  # the first fills caches
                    taken[name].append(seconds)
        return {name: min(values) for name, values in taken.items()}

    def _once(self, action: Action) -> float:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            action()
            end.record()
            torch.cuda.synchronize(self.device)
            return start.elapsed_time(end) / 1e3
        now = time.process_time if self.cpu_time else time.perf_counter
        began = now()
        action()
        return now() - began


def convolution_flops(
    x: Sequence[int], weight: Sequence[int], *_: object, out_shape: Sequence[int], **__: object
) -> int:
    """Of oneDNN's operations that PyTorch does not count."""
    return conv_flop_count(list(x), list(weight), list(out_shape))


COUNTED = {
    operation: convolution_flops
    for operation in (
        torch.ops.aten.mkldnn_convolution,
        getattr(torch.ops.mkldnn, "_convolution_pointwise", None),
    )
    if operation is not None
}


def gigaflops(action: Action) -> float:
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        action()
    return counter.get_total_flops() / 1e9


def product(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Action, float]:
    """A matrix product, whose speed is this machine's peak, and its 10^9 FLOPs."""
    side = MATRIX[device.type]
    matrix = torch.randn(side, side, device=device).to(dtype)
    return lambda: matrix @ matrix, 2 * side**3 / 1e9


def convolution(device: torch.device) -> Action:
    """The same matrix product as a 1x1 convolution."""
    side = MATRIX[device.type]
    pixels = torch.randn(1, 1, side, side, device=device).permute(0, 3, 1, 2)
    weight = torch.randn(side, side, 1, 1, device=device)

    @torch.inference_mode()
    def convolve() -> torch.Tensor:
        return F.conv2d(pixels, weight)

    return convolve


class Sampler:
    """One image of a model, and its samples, computed in either way."""

    def __init__(self, model: DeFlow, x: torch.Tensor) -> None:
        self.model = model.requires_grad_(False).eval()
        self.x, self.degraded = x, torch.ones(len(x), dtype=torch.int64, device=x.device)
        shapes = model.latent_shapes(*x.shape[-2:])
        self.draws = [torch.randn(len(x), *shape, device=x.device) for shape in shapes]
        self.tau = torch.ones(len(x), device=x.device)

    @torch.inference_mode()
    def fast(self, samples: int = 1) -> torch.Tensor:
        features = self.model.features(self.x)
        latents, _ = self.model.encode(self.x, features)
        shifts = self.model.domain_shifts()
        for _ in range(samples):
            # Not the model's own method, whose check of the domains waits for the GPU.
            shifted = [
                shift.degrade(z, u, self.degraded, self.tau)
                for shift, z, u in zip(shifts, latents, self.draws, strict=True)
            ]
            result = self.model.decode(shifted, features)
        return result

    @torch.inference_mode()
    def plain(self) -> torch.Tensor:
        return plain.degrade(self.model, self.x, self.draws, self.model.config.domains[0])

    def needed(self) -> tuple[float, float]:
        """10^9 FLOPs of one sample, and of each further one."""
        with torch.inference_mode():
            features = self.model.features(self.x)
            latents, _ = self.model.encode(self.x, features)
            further = gigaflops(lambda: self.model.decode(latents, features))
        # In low precision, with gradients, the convolutions are PyTorch's own: none in tiles.
        self.model.requires_grad_(True)
        with torch.enable_grad(), torch.autocast(self.x.device.type, dtype=torch.bfloat16):
            first = gigaflops(lambda: self.model.encode(self.x, self.model.features(self.x)))
        self.model.requires_grad_(False)
        return first + further, further


def beside_plain(device: torch.device, clock: Clock, side: int) -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 3, side, side, device=device)
    last = x.contiguous(memory_format=torch.channels_last)
    sampler = Sampler(channels_last(DeFlow(ModelConfig()).to(device)), last)
    other = Sampler(DeFlow(ModelConfig()).to(device), x)
    multiply, flops = product(device)
    seconds = clock(
        product=multiply,
        convolution=convolution(device),
        plain=sampler.plain,
        other=other.plain,
        one=sampler.fast,
        eight=partial(sampler.fast, 8),
    )
    peak = flops / seconds["product"]
    first, further = sampler.needed()
    print(f"Published x4 architecture, one image of {side} x {side}, random weights")
    by_convolution = flops / seconds["convolution"]
    print(f"matrix product: {peak:.0f} GFLOP/s, by a 1x1 convolution {by_convolution:.0f}\n")
    print("| | time | times faster | GFLOP done | needed | of the peak, needed | done |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    rows: list[tuple[str, float, int, float, float | None]] = [
        ("plain", seconds["plain"], 1, gigaflops(sampler.plain), None),
        ("plain, memory not channels last", seconds["other"], 1, gigaflops(other.plain), None),
        ("one sample", seconds["one"], 1, gigaflops(sampler.fast), first),
        (
            "eight samples",
            seconds["eight"],
            8,
            gigaflops(partial(sampler.fast, 8)),
            first + 7 * further,
        ),
    ]
    for name, time_, samples, done, need in rows:
        faster = samples * seconds["plain"] / time_
        needed = "" if need is None else f"{need:.0f}"
        share = "" if need is None else f"{need / time_ / peak:.0%}"
        print(
            f"| {name} | {time_:.3f} s | {faster:.1f} | {done:.0f} | {needed} | {share} | "
            f"{done / time_ / peak:.0%} |"
        )
    trained = DeFlowDegrader.from_pretrained(device=device).model
    sampler = Sampler(trained, last)
    difference = float((sampler.fast() - sampler.plain()).abs().max())
    print(f"\nlargest difference of a sample of the default weights: {difference:.1e}\n")


def recorded(
    action: Callable[[], torch.Tensor], device: torch.device
) -> tuple[Action, torch.Tensor]:
    """The same as a CUDA graph, which starts all of its kernels at once; where its result lies."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # choices of algorithms and folded parameters are no part of it
            action()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = action()
    return graph.replay, result


def batches(device: torch.device, clock: Clock) -> None:
    """Images a second on a GPU."""

    @torch.inference_mode()
    def in_bfloat16(action: Callable[[], torch.Tensor]) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return action()

    model = channels_last(DeFlow(ModelConfig()).to(device))
    print(
        "| batch | in | images/s | of the peak in it | as a CUDA graph | of the peak | differs by |"
    )
    print("|---|---|---:|---:|---:|---:|---:|")
    for number, side in GPU_BATCHES:
        x = torch.rand(number, 3, side, side, device=device)
        sampler = Sampler(model, x.contiguous(memory_format=torch.channels_last))
        done = gigaflops(sampler.fast)
        ways: list[tuple[str, torch.dtype, Callable[[], torch.Tensor]]] = [
            ("float32", torch.float32, sampler.fast),
            ("bfloat16", torch.bfloat16, partial(in_bfloat16, sampler.fast)),
        ]
        for name, dtype, action in ways:
            multiply, flops = product(device, dtype)
            graph, result = recorded(action, device)
            seconds = clock(eager=action, graph=graph, product=multiply)
            difference = float((result - action()).abs().max())
            cells = [f"{number} x {side} x {side}", name]
            for way in ("eager", "graph"):
                share = done / seconds[way] / flops * seconds["product"]
                cells += [f"{number / seconds[way]:.1f}", f"{share:.0%}"]
            cells.append(f"{difference:.0e}")
            print("| " + " | ".join(cells) + " |", flush=True)
    print()


def beside_each_other(weights: list[str], device: torch.device, clock: Clock) -> None:
    """Seconds of weights, and how many times as long as the first ones they take."""
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    degraders = [DeFlowDegrader.from_pretrained(name, device=device) for name in weights]
    seconds = clock(
        **{
            f"{number} {samples}": partial(degrader.degrade, image, n_samples=samples, seed=0)
            for number, degrader in enumerate(degraders)
            for samples in (1, 8)
        }
    )
    print("An image of 256 x 256: seconds (times the first)\n")
    print("| weights | parameters | one sample | eight samples |")
    print("|---|---:|---:|---:|")
    for number, (name, degrader) in enumerate(zip(weights, degraders, strict=True)):
        times = [(seconds[f"{number} {n}"], seconds[f"0 {n}"]) for n in (1, 8)]
        cells = " | ".join(f"{own:.3f} ({own / first:.2f})" for own, first in times)
        count = sum(parameter.numel() for parameter in degrader.model.parameters())
        print(f"| {name} | {count / 1e6:.2f} million | {cells} |")


def sizes(
    degrader: DeFlowDegrader, clock: Clock, max_pixels: int
) -> dict[int, list[tuple[int, float]]]:
    """Seconds of the default weights by samples and side, for as many pixels as allowed."""
    table: dict[int, list[tuple[int, float]]] = {samples: [] for samples in SAMPLES}
    print("Default weights, `degrade`: seconds (output megapixels a second)\n")
    print("| image | " + " | ".join(f"{samples} samples" for samples in SAMPLES) + " |")
    print("|---|" + "---:|" * len(SAMPLES))
    for side in SIDES:
        allowed = [samples for samples in SAMPLES if samples * side**2 <= max_pixels]
        if not allowed:
            break
        image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
        seconds = clock(
            **{
                str(samples): partial(degrader.degrade, image, n_samples=samples, seed=0)
                for samples in allowed
            }
        )
        cells = []
        for samples in allowed:
            table[samples].append((side, seconds[str(samples)]))
            rate = samples * side**2 / 1e6 / seconds[str(samples)]
            cells.append(f"{seconds[str(samples)]:.3f} ({rate:.2f})")
        cells += [""] * (len(SAMPLES) - len(cells))
        print(f"| {side} x {side} | " + " | ".join(cells) + " |", flush=True)
    return table


def draw(table: dict[int, list[tuple[int, float]]], path: Path, title: str) -> None:
    """Time against size, one line for each number of samples; both axes are logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4.2), layout="constrained")
    for samples, row in table.items():
        if row:
            pixels = [side**2 for side, _ in row]
            label = f"{samples} sample{'s' * (samples > 1)}"
            axes.plot(pixels, [seconds for _, seconds in row], marker="o", label=label)
    # Where cost grows linearly, lines run parallel to this one.
    side, seconds = table[1][-1]
    ends = [SIDES[0] ** 2, side**2]
    axes.plot(ends, [seconds * end / side**2 for end in ends], "k:", lw=1, label="linear")
    ticks = [side for side, _ in table[1]]
    axes.set(xscale="log", yscale="log", xlabel="image", ylabel="seconds", title=title)
    axes.set_xticks([side**2 for side in ticks], [f"{side}²" for side in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
