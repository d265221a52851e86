"""Does DeFlow pay? Train a super-resolution network on its pairs, and on what is used without it.

    pip install "deflow-aug[examples]"
    python examples/train_sr.py --scale 2 [--noise-from PAIRS] [--output comparison.png]

The same network is trained three times at once, from the same weights on the same crops for the
same steps; only its low-resolution input differs: bicubic downscaling alone, DeFlow's degradation
of that, or white noise on it. The white noise of a crop has the standard deviation of the noise
that DeFlow gave the very same crop, so that it is not the level of the noise that decides.

PSNR and SSIM (RGB, mean over images, as many pixels as the scale cut off at the borders) are
measured on images kept out of training:

- "bicubic": downscaled without any degradation. What robustness costs where nothing is amiss.
- "DeFlow": degraded by the degrader itself at temperature 1, by other draws than training's. The
  network trained on DeFlow pairs has to win here; this only shows that it learned its task.
- "real noise", with ``--noise-from PAIRS``, a folder of photographs NAME_clean.* and
  NAME_degraded.* of the same size: the judge, for no model made it. Tiles of the clean photograph
  are the target; their downscaled version plus the difference degraded - clean, cut at full
  resolution from the middle of the same tile, is the input. The noise is real and stays next to
  the content that it was recorded on, but not on it pixel by pixel: how it depends on brightness
  is kept roughly. (To downscale the degraded photograph would average its noise away.)

With the default settings, minutes on a CPU, and 13 pairs of the PolyU set as PAIRS (four cameras,
ISO 3200 to 12800), PSNR (dB) / SSIM:

| x2 | bicubic | DeFlow | real noise |
|---|---:|---:|---:|
| bicubic upscaling | 30.43 / 0.8487 | 27.43 / 0.7938 | 36.88 / 0.9271 |
| trained on bicubic | 31.17 / 0.8739 | 27.42 / 0.8064 | 36.63 / 0.9174 |
| trained on white noise | 30.52 / 0.8515 | 27.44 / 0.7962 | 36.88 / 0.9253 |
| trained on DeFlow | 30.17 / 0.8447 | 27.75 / 0.8010 | 37.10 / 0.9327 |

| x4 | bicubic | DeFlow | real noise |
|---|---:|---:|---:|
| bicubic upscaling | 26.11 / 0.6421 | 24.55 / 0.6182 | 35.02 / 0.9099 |
| trained on bicubic | 26.48 / 0.6662 | 24.57 / 0.6340 | 35.01 / 0.9057 |
| trained on white noise | 26.20 / 0.6469 | 24.57 / 0.6224 | 35.02 / 0.9090 |
| trained on DeFlow | 26.07 / 0.6461 | 24.76 / 0.6265 | 35.09 / 0.9128 |

With ``--clean`` on 24 clean photographs of that set instead (``--held-out 2``; other scenes than
PAIRS', but the default weights saw them in training), real noise alone:

| | x2 | x4 |
|---|---:|---:|
| bicubic upscaling | 36.88 / 0.9271 | 35.02 / 0.9099 |
| trained on bicubic | 36.85 / 0.9259 | 35.07 / 0.9092 |
| trained on white noise | 36.97 / 0.9295 | 35.03 / 0.9092 |
| trained on DeFlow | 37.15 / 0.9345 | 35.16 / 0.9132 |

On real noise DeFlow's network is ahead, clearly in SSIM, by little in PSNR. Without noise it is the
worst. These are single runs of 300 steps, which tell a direction. On a GPU, for real:
--clean FOLDER --channels 64 --blocks 23 --patch 64 --batch 16 --lr 2e-4 --steps 200000 --workers 8
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional import image as metrics
from tqdm import tqdm

from deflow_aug import CleanCrops, DeFlowDegrader, DegradedPairs, DegradingLoader, evaluation
from deflow_aug.image_files import write_image
from deflow_aug.image_folders import find_images
from deflow_aug.resize import bicubic_downscale
from deflow_aug.rrdb import RRDB

EXAMPLES = Path(__file__).parent / "images"
INPUTS = ("bicubic", "white noise", "DeFlow")  # what the networks are trained on
CROPS_PER_IMAGE = 50  # an epoch; one of a single crop an image would be over in a few steps
TILE = 128  # pixels, of the target, where real noise is added

Pair = tuple[Tensor, Tensor]  # lq [B, 3, H / scale, W / scale] and gt [B, 3, H, W], in [0, 1]
Upscale = Callable[[Tensor], Tensor]


class SuperResolution(nn.Module):
    """Bicubic upscaling, plus what ESRGAN's trunk with a sub-pixel convolution adds to it."""

    def __init__(self, scale: int, channels: int, blocks: int) -> None:
        super().__init__()
        self.scale = scale
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(
            *(RRDB(channels, channels // 2) for _ in range(blocks)),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.tail = nn.Sequential(
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 3 * scale**2, 3, padding=1),
            nn.PixelShuffle(scale),
        )
        nn.init.zeros_(self.tail[1].weight)  # training starts at bicubic upscaling
        nn.init.zeros_(self.tail[1].bias)

    def forward(self, lq: Tensor) -> Tensor:
        features = self.first(lq)
        return bicubic_upscale(lq, self.scale) + self.tail(features + self.body(features))


def bicubic_upscale(lq: Tensor, scale: int) -> Tensor:
    # With antialias=True, which leaves upscaling alone but for this, the kernel is MATLAB's.
    return F.interpolate(lq, scale_factor=scale, mode="bicubic", antialias=True)


def eight_bits(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * 255).round() / 255


# -- training ------------------------------------------------------------------------------------


def split(images: list[Path], held_out: int) -> tuple[list[Path], list[Path]]:
    """Images to train on, and ``held_out`` others spread evenly over the list."""
    if not 0 < held_out < len(images):
        raise SystemExit(f"cannot hold out {held_out} of {len(images)} images and train on others")
    test = [images[i * len(images) // held_out] for i in range(held_out)]
    return [image for image in images if image not in test], test


def all_inputs(batch: dict[str, Tensor], scale: int, draws: torch.Generator) -> dict[str, Tensor]:
    """What each of the networks gets to see of a batch of DeFlow pairs."""
    bicubic = eight_bits(bicubic_downscale(batch["gt"], scale))
    sigma = (batch["lq"] - bicubic).std((1, 2, 3), keepdim=True)
    white = torch.randn(bicubic.shape, generator=draws).to(bicubic)
    inputs = (bicubic, eight_bits(bicubic + sigma * white), batch["lq"])
    return dict(zip(INPUTS, inputs, strict=True))


def train(
    start: nn.Module, loader: DegradingLoader, scale: int, steps: int, lr: float, seed: int
) -> dict[str, nn.Module]:
    """A copy of ``start`` for each of INPUTS, trained by the L1 distance."""
    networks = {name: copy.deepcopy(start).train() for name in INPUTS}
    # One optimiser for all: Adam treats every weight by itself.
    weights = [weight for network in networks.values() for weight in network.parameters()]
    optimizer = torch.optim.Adam(weights, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draws = torch.Generator().manual_seed(seed)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # pass after pass, all other
    for batch in tqdm(itertools.islice(batches, steps), "training", total=steps, unit="step"):
        optimizer.zero_grad(set_to_none=True)
        for name, lq in all_inputs(batch, scale, draws).items():
            F.l1_loss(networks[name](lq), batch["gt"]).backward()
        optimizer.step()
        schedule.step()
    return {name: network.eval() for name, network in networks.items()}


# -- measuring -----------------------------------------------------------------------------------


def test_sets(
    images: list[Path], degrader: DeFlowDegrader, scale: int, seed: int, noise_from: Path | None
) -> dict[str, list[Pair]]:
    """Pairs that no network has seen, by their kind."""
    degraded = DegradedPairs(
        images, degrader, scale, patch=None, temperature=1.0, seed=seed, flips=False
    )
    deflow = [(lq[None], gt[None]) for lq, gt in degraded]
    bicubic = [(eight_bits(bicubic_downscale(gt, scale)), gt) for _, gt in deflow]
    sets = {"bicubic": bicubic, "DeFlow": deflow}
    if noise_from is not None:
        sets["real noise"] = [
            with_real_noise(pair, scale) for pair in evaluation.load_pairs(noise_from)
        ]
    return sets


def with_real_noise(photograph: evaluation.Pair, scale: int) -> Pair:
    """The tiles of a photograph; see the top of the file."""
    clean, degraded = tiles(photograph.clean), tiles(photograph.degraded)
    noise = middle(degraded - clean, TILE // scale)
    return eight_bits(bicubic_downscale(clean, scale) + noise), clean


def tiles(picture: NDArray[np.uint8]) -> Tensor:
    """[n, 3, TILE, TILE] in [0, 1] of [H, W, 3]; what is left over is cut off."""
    image = torch.from_numpy(picture).permute(2, 0, 1) / 255
    return image.unfold(1, TILE, TILE).unfold(2, TILE, TILE).flatten(1, 2).transpose(0, 1)


def middle(image: Tensor, side: int) -> Tensor:
    top, left = (max(size - side, 0) // 2 for size in image.shape[-2:])
    return image[..., top : top + side, left : left + side]


@torch.no_grad()
def measure(upscale: Upscale, pairs: Iterable[Pair], border: int) -> tuple[float, float]:
    """PSNR in dB and SSIM, means over the pairs."""
    inner = slice(border, -border)
    figures = [psnr_ssim(*(x[..., inner, inner] for x in (upscale(lq), gt))) for lq, gt in pairs]
    psnrs, ssims = zip(*figures, strict=True)
    return statistics.fmean(psnrs), statistics.fmean(ssims)


def psnr_ssim(result: Tensor, gt: Tensor) -> tuple[float, float]:
    """PSNR in dB and SSIM of images [B, 3, H, W], the result rounded to 8 bits."""
    both = eight_bits(result), gt
    psnr = metrics.peak_signal_noise_ratio(*both, data_range=1.0, dim=(1, 2, 3))
    return float(psnr), float(metrics.structural_similarity_index_measure(*both, data_range=1.0))


@torch.no_grad()
def comparison(
    upscales: dict[str, Upscale], sets: dict[str, list[Pair]], scale: int
) -> Image.Image:
    """A row for each set: the input, every result and the target, from the middle of an image."""
    side = 2 * TILE
    sheet = Image.new("RGB", (side * (len(upscales) + 2), (side + 16) * len(sets)), "white")
    for row, (name, pairs) in enumerate(sets.items()):
        lq, gt = (half[len(half) // 2 :][:1] for half in pairs[len(pairs) // 2])
        cells = {f"input: {name}": F.interpolate(lq, scale_factor=scale)}
        cells |= {told: eight_bits(upscale(lq)) for told, upscale in upscales.items()}
        for column, (told, image) in enumerate({**cells, "target": gt}.items()):
            left, top = column * side, row * (side + 16)
            cut = (middle(image[0], TILE) * 255).byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(cut).resize((side, side), 0), (left, top + 16))
            ImageDraw.Draw(sheet).text((left + 4, top + 2), told, "black")
    return sheet


def main(arguments: list[str] | None = None) -> dict[str, dict[str, tuple[float, float]]]:
    """The figures: (PSNR, SSIM) by way of upscaling, by test set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=int, choices=(2, 4), default=2)
    parser.add_argument("--clean", type=Path, default=EXAMPLES, help="folder of clean images")
    parser.add_argument("--held-out", type=int, default=4, help="images of it to measure on")
    parser.add_argument("--noise-from", type=Path, metavar="PAIRS", help="real pairs; see above")
    parser.add_argument("--weights", default="camera-noise", help="of DeFlow")
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="a picture to look at")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--patch", type=int, default=32, help="side of the downscaled crops")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode and crop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)

    scale, seed = options.scale, options.seed
    degrader = DeFlowDegrader.from_pretrained(options.weights, device=options.device)
    device = degrader.device
    images, held_out = split(find_images(options.clean), options.held_out)
    sets = test_sets(held_out, degrader, scale, seed + 1, options.noise_from)

    crops = CleanCrops(images * CROPS_PER_IMAGE, options.patch * scale, scale=scale, seed=seed)
    clean = DataLoader(
        crops,
        options.batch,
        shuffle=True,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(seed),
    )
    loader = DegradingLoader(clean, degrader, scale, seed=seed)
    torch.manual_seed(seed)
    start = SuperResolution(scale, options.channels, options.blocks).to(device)
    weights = sum(weight.numel() for weight in start.parameters())
    print(
        f"x{scale}: {len(images)} images to train on, {len(held_out)} held out; {weights:,} weights"
    )
    networks = train(start, loader, scale, options.steps, options.lr, seed)

    upscales: dict[str, Upscale] = {"bicubic upscaling": lambda lq: bicubic_upscale(lq, scale)}
    for name, network in networks.items():
        upscales[f"trained on {name}"] = lambda lq, network=network: network(lq.to(device)).cpu()
    print("\n| PSNR (dB) / SSIM | " + " | ".join(sets) + " |\n|---|" + "---:|" * len(sets))
    figures = {}
    for told, upscale in upscales.items():
        figures[told] = {name: measure(upscale, pairs, scale) for name, pairs in sets.items()}
        cells = [f"{psnr:.2f} / {ssim:.4f}" for psnr, ssim in figures[told].values()]
        print(f"| {told} | " + " | ".join(cells) + " |", flush=True)
    if options.output:
        write_image(comparison(upscales, sets, scale), options.output)
    return figures


if __name__ == "__main__":
    main()
