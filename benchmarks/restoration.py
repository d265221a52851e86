"""Small restoration networks for benchmarks/downstream.py: their training, and what is measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics.functional import image as metrics

from deflow_aug import randomness
from deflow_aug.randomness import Stream

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from train_sr import SuperResolution, eight_bits, psnr_ssim

Image8 = NDArray[np.uint8]

AVERAGE = 0.99
"""What the moving average of the weights keeps in a step."""

GAIN = 20.0

LPIPS_FILE = "alexnet-owt-7be5be79.pth"
"""Of the network that LPIPS looks through, as PyTorch names it in its folder of downloads."""


class Denoiser(nn.Module):
    """The picture, plus what a few convolutions at half its resolution add to it.

    They see the difference from a local mean, GAIN times, and the mean: of the picture itself,
    whose noise is a hundredth of its range, they take far longer to learn anything.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.PixelUnshuffle(2)]
        for number in range(layers - 1):
            inner = nn.Conv2d(channels if number else 24, channels, 3, padding=1)
            # PyTorch's own initial values let the signal die out within some layers.
            nn.init.kaiming_normal_(inner.weight, nonlinearity="relu")
            parts += [inner, nn.ReLU(True)]
        last = nn.Conv2d(channels, 12, 3, padding=1)
        for values in last.parameters():  # training starts at doing nothing
            nn.init.zeros_(values)
        self.body = nn.Sequential(*parts, last, nn.PixelShuffle(2))

    def forward(self, lq: Tensor) -> Tensor:
        height, width = lq.shape[2:]
        even = F.pad(lq, (0, width % 2, 0, height % 2), "replicate")
        level = F.avg_pool2d(even, 9, stride=1, padding=4, count_include_pad=False)
        seen = torch.cat([(even - level) * GAIN, 2 * level - 1], 1)
        return (even + self.body(seen) / GAIN)[..., :height, :width]


@dataclass(frozen=True)
class Pool:
    """Pictures to train on: clean ones, and draws of their degradation.

    Args:
        clean: uint8 [H, W, 3] each.
        degraded: a list of draws for each of them, uint8 [H / scale, W / scale, 3] each.
        scale: of the super-resolution; 1 where pictures keep their size.
    """

    clean: Sequence[Image8]
    degraded: Sequence[Sequence[Image8]]
    scale: int = 1

    def batch(self, size: int, crop: int, *key: int) -> tuple[Tensor, Tensor]:
        """Crops lq [B, 3, crop, crop] and gt [B, 3, scale crop, scale crop] in [0, 1].

        Which pictures, places and flips depends on the key and the sizes alone: pools of the same
        clean pictures give the same clean crops.
        """
        rng = randomness.generator(*key)
        lq, gt = [], []
        for _ in range(size):
            picture = int(rng.integers(len(self.clean)))
            draws = self.degraded[picture]
            chance = rng.random()  # always one number, whatever the number of draws
            small = draws[int(chance * len(draws))]
            top, left = (int(rng.integers(n - crop + 1)) for n in small.shape[:2])
            flips = [axis for axis in (0, 1) if rng.random() < 0.5]
            for kind, whole, s in ((lq, small, 1), (gt, self.clean[picture], self.scale)):
                part = whole[s * top : s * (top + crop), s * left : s * (left + crop)]
                kind.append(np.flip(part, flips))
        return as_tensor(np.stack(lq)), as_tensor(np.stack(gt))


def as_tensor(pictures: Image8) -> Tensor:
    """[B, 3, H, W] in [0, 1] of uint8 [B, H, W, 3]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2) / 255


@dataclass(frozen=True)
class Settings:
    """Of a network and its training, the same for all that it is trained on."""

    channels: int
    layers: int
    steps: int
    batch: int
    crop: int
    lr: float = 1e-3


def train(pool: Pool, settings: Settings, seed: int, device: torch.device) -> nn.Module:
    """The network that learned from this pool; the same seed sees the same clean crops.

    L1 distance, Adam with a cosine schedule, and the moving average of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net: nn.Module = (
            Denoiser(settings.channels, settings.layers)
            if pool.scale == 1
            else SuperResolution(pool.scale, settings.channels, max(settings.layers // 6, 1))
        )
    net = net.to(device, memory_format=torch.channels_last)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    optimizer = torch.optim.Adam(net.parameters(), settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for step in range(settings.steps):
        lq, gt = pool.batch(settings.batch, settings.crop, seed, Stream.CROP, step)
        optimizer.zero_grad(set_to_none=True)
        F.l1_loss(net(lq.to(device)), gt.to(device)).backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(net)
    return average.module.eval()


Restore = Callable[[Tensor], Tensor]
Lpips = Callable[[Tensor, Tensor], float]


@torch.no_grad()
def measure(
    restore: Restore,
    pairs: Sequence[tuple[Image8, Image8]],
    scale: int,
    device: torch.device,
    lpips: Lpips | None,
) -> dict[str, list[float]]:
    """PSNR (dB), SSIM and, where there is one, LPIPS of every pair.

    Args:
        restore: lq [1, 3, h, w] into [1, 3, scale h, scale w], in [0, 1].
        pairs: degraded and clean pictures.
        scale: as many pixels are cut off at every border, none at 1.
        lpips: as :func:`installed_lpips` gives it.
    """
    figures: dict[str, list[float]] = {kind: [] for kind in ("psnr", "ssim")}
    border = slice(scale, -scale) if scale > 1 else slice(None)
    for degraded, clean in pairs:
        result = restore(as_tensor(degraded[None]).to(device)).cpu()
        both = [x[..., border, border].contiguous() for x in (result, as_tensor(clean[None]))]
        for kind, figure in zip(figures, psnr_ssim(*both), strict=False):
            figures[kind].append(figure)
        if lpips is not None:
            figures.setdefault("lpips", []).append(lpips(eight_bits(both[0]), both[1]))
    return figures


def installed_lpips() -> Lpips | None:
    """LPIPS, smaller for pictures that look more alike, of images [B, 3, H, W] in [0, 1].

    Only where the network that it looks through is there already; nothing is downloaded.
    """
    if not (Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_FILE).exists():
        return None

    def distance(one: Tensor, other: Tensor) -> float:
        similarity = metrics.learned_perceptual_image_patch_similarity
        return float(similarity(one, other, net_type="alex", normalize=True))

    return distance
