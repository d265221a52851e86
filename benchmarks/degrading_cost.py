"""What share of a super-resolution training step does degrading cost?

    python benchmarks/degrading_cost.py [--bf16] [--blocks N] [--batch N]

A step takes clean uint8 crops in the memory of the host, makes the low-resolution input of them,
and trains ESRGAN's x4 network (64 channels, growth 32) on the pair by the L1 distance and Adam: 23
blocks and 16 inputs of 64 x 64 on a GPU, 4 blocks and 4 inputs on a CPU. The ways to make it:

- nothing: the inputs are made before; what everything else is compared with.
- bicubic downscaling, and bicubic downscaling with white Gaussian noise.
- DeFlow, inline: ``degrader.feed`` before the step; overlapped: a ``DegradingLoader`` that works
  one batch ahead, on a GPU in a stream of its own.
- second order: blur, resize, noise and JPEG, twice, of the kind that Real-ESRGAN made common,
  written with Kornia (the extra ``kornia``; left out where it is missing). Real-ESRGAN also draws
  anisotropic, generalised and sinc kernels, Poisson and grey noise; these would cost more.

The ways take turns of some steps each, in one process, so that whatever else slows the machine
down meets all of them; the medians of the turns are compared. The share of a way is
(its step - the step of "nothing") / its step.

On a CPU that others use too, ``--cpu-seconds`` counts this process's seconds of computing instead
of those that pass. (They say nothing of what working ahead gains, which is not less computing.)
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deflow_aug import DeFlowDegrader, DegradingLoader
from deflow_aug.devices import resolve
from deflow_aug.hub import DEFAULT_WEIGHTS
from deflow_aug.resize import bicubic_downscale
from deflow_aug.rrdb import RRDB

SCALE = 4
NOTHING = "nothing"
SIGMA = 5 / 255  # of the white noise; any costs the same

Batches = Iterable[Tensor]  # uint8 [B, 3, H, W] in the memory of the host
Pairs = Iterator[tuple[Tensor, Tensor]]  # lq and gt on the device, in [0, 1]
Way = Callable[[Batches], Pairs]


class ESRGAN(nn.Module):
    """The x4 network of Wang et al. (2018)."""

    def __init__(self, channels: int, growth: int, blocks: int) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 3, padding=1)

        self.first = conv(3, channels)
        # Not RRDBTrunk, which computes its blocks twice to save memory: ESRGAN's is quicker.
        self.body = nn.Sequential(
            *(RRDB(channels, growth) for _ in range(blocks)), conv(channels, channels)
        )
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.Upsample(scale_factor=2), conv(channels, channels), nn.LeakyReLU(0.2)]
        layers += [conv(channels, channels), nn.LeakyReLU(0.2), conv(channels, 3)]
        self.tail = nn.Sequential(*layers)

    def forward(self, lq: Tensor) -> Tensor:
        features = self.first(lq)
        return self.tail(features + self.body(features))


# -- ways to make the low-resolution input --------------------------------------------------------


def each(make: Callable[[Tensor], Tensor], device: torch.device) -> Way:
    """A way that makes the input of the clean images on the device, [0, 1], before each step."""

    @torch.no_grad()
    def pair(gt: Tensor) -> tuple[Tensor, Tensor]:
        images = gt.to(device, non_blocking=True).float() / 255
        return make(images), images

    return lambda batches: map(pair, batches)


def bicubic(gt: Tensor) -> Tensor:
    return bicubic_downscale(gt, SCALE).clamp(0, 1)


def with_white_noise(gt: Tensor) -> Tensor:
    small = bicubic(gt)
    return (small + SIGMA * torch.randn_like(small)).clamp(0, 1)


def second_order() -> Callable[[Tensor], Tensor] | None:
    """Two rounds of blur, resize, noise and JPEG; None without Kornia."""
    try:
        from kornia import augmentation as K
    except ImportError:
        return None

    def steps(blur: float, noise: float) -> list[Any]:
        return [
            K.RandomGaussianBlur((21, 21), (0.2, blur), p=1.0),
            K.RandomGaussianNoise(std=noise, p=1.0),
            K.RandomJPEG((30.0, 95.0), p=1.0),
        ]

    rounds = ((steps(3.0, 15 / 255), (0.15, 1.5)), (steps(1.5, 12 / 255), (0.3, 1.2)))
    draws = random.Random(0)

    def resized(image: Tensor, side: int) -> Tensor:
        mode = draws.choice(("area", "bilinear", "bicubic"))
        return F.interpolate(image, (side, side), mode=mode)

    def make(gt: Tensor) -> Tensor:
        image, small = gt, gt.shape[-1] // SCALE
        for number, ((blur, noise, jpeg), (least, greatest)) in enumerate(rounds):
            base = gt.shape[-1] if number == 0 else small
            image = blur(image)
            image = resized(image, max(16, round(base * draws.uniform(least, greatest))))
            image = noise(image).clamp(0, 1)
            if number == 1:  # the last JPEG is of the final size
                image = resized(image, small).clamp(0, 1)
            image = jpeg(image)
        return image.clamp(0, 1)

    return make


def ways(degrader: DeFlowDegrader, gt: Tensor) -> dict[str, Way]:
    device = degrader.device
    ready = bicubic(gt.to(device).float() / 255)

    def inline(batches: Batches) -> Pairs:
        return (degrader.feed(batch, SCALE) for batch in batches)

    def overlapped(batches: Batches) -> Pairs:
        return iter(DegradingLoader(batches, degrader, SCALE, ahead=True))

    made: dict[str, Way] = {
        NOTHING: each(lambda _: ready, device),
        "bicubic downscaling": each(bicubic, device),
        "bicubic and Gaussian noise": each(with_white_noise, device),
        "DeFlow, inline": inline,
        "DeFlow, overlapped": overlapped,
    }
    if (pipeline := second_order()) is not None:
        made["second order (Kornia)"] = each(pipeline, device)
    return made


# -- training -------------------------------------------------------------------------------------


class Training:
    """Steps of a network, on pairs from anywhere."""

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        bf16: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.network = network.to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.network.parameters(), 1e-4)
        self.device, self.bf16, self.clock = device, bf16, clock

    def step(self, lq: Tensor, gt: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            result = self.network(lq)
        F.l1_loss(result.float(), gt).backward()
        self.optimizer.step()

    def turn(self, way: Way, gt: Tensor, steps: int) -> float:
        """Seconds a step, with the next pair made, as in the middle of a training."""
        pairs = way([gt] * (steps + 2))
        pair = next(pairs)
        self.synchronize()
        start = self.clock()
        for _ in range(steps):
            self.step(*pair)
            pair = next(pairs)
        self.synchronize()
        seconds = (self.clock() - start) / steps
        for _ in pairs:  # what is made ahead must not reach into the next way's turn
            pass
        self.synchronize()
        return seconds

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Seconds a step of every way, turn by turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default=DEFAULT_WEIGHTS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--blocks", type=int, help="default: 23 on a GPU, 4 on a CPU")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--growth", type=int, default=32)
    parser.add_argument("--batch", type=int, help="default: 16 on a GPU, 4 on a CPU")
    parser.add_argument("--patch", type=int, default=64, help="side of the low-resolution input")
    parser.add_argument("--bf16", action="store_true", help="train the network in bfloat16")
    parser.add_argument("--steps", type=int, help="of a turn; default: 10 on a GPU, 2 on a CPU")
    parser.add_argument("--turns", type=int, help="default: 9 on a GPU, 3 on a CPU")
    parser.add_argument("--cpu-seconds", action="store_true", help="see above")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = resolve(options.device)
    on_gpu = device.type == "cuda"
    blocks = options.blocks or (23 if on_gpu else 4)
    batch = options.batch or (16 if on_gpu else 4)
    steps, turns = options.steps or (10 if on_gpu else 2), options.turns or (9 if on_gpu else 3)

    draws = torch.Generator().manual_seed(0)
    side = options.patch * SCALE
    gt = (torch.rand(batch, 3, 8, 8, generator=draws) * 255).byte()
    gt = F.interpolate(gt, (side, side))  # flat areas and edges
    gt = gt.pin_memory() if on_gpu else gt
    torch.manual_seed(0)
    network = ESRGAN(options.channels, options.growth, blocks)
    clock = time.process_time if options.cpu_seconds else time.perf_counter
    training = Training(network, device, options.bf16, clock)
    compared = ways(DeFlowDegrader.from_pretrained(options.weights, device=device), gt)

    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    print(
        f"{name}, PyTorch {torch.__version__}, {torch.get_num_threads()} CPU thread(s); weights "
        f"{options.weights}; ESRGAN x{SCALE} of {blocks} blocks and {options.channels} channels in "
        f"{'bfloat16' if options.bf16 else 'float32'}; batches of {batch} x {options.patch} x "
        f"{options.patch}; {'CPU' if options.cpu_seconds else 'wall'} time of {turns} turn(s) of "
        f"{steps} step(s)"
    )
    if "second order (Kornia)" not in compared:
        print('The second-order pipeline is left out: pip install "deflow-aug[kornia]" for it.')
    for way in compared.values():
        training.turn(way, gt, 1)  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    for _ in range(turns):
        for name, way in compared.items():
            seconds[name].append(training.turn(way, gt, steps))
    print(table(seconds))
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """The medians of the turns, and what they say, as markdown."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    nothing = medians[NOTHING]
    lines = [
        "| input made by | ms a step (least to greatest) | times nothing | share of the step |",
        "|---|---:|---:|---:|",
    ]
    for name, times in seconds.items():
        least, median, greatest = (1000 * x for x in (min(times), medians[name], max(times)))
        lines.append(
            f"| {name} | {median:.1f} ({least:.1f} to {greatest:.1f}) | "
            f"{medians[name] / nothing:.3f} | {1 - nothing / medians[name]:.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
