"""Small classifiers of crops: trained on some units, scoring others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deflow_aug import randomness
from deflow_aug.evaluation.auc import Array, Bools, Integers

TILE = 32
"""Side of what a classifier sees at once, in pixels; the logits of a crop's tiles are averaged, so
that a crop is judged by all of its area."""

FOLDS = 4
BATCH = 32
LEARNING_RATE = 1e-2

Net = TypeVar("Net", bound=nn.Module)


def equal_weights(units: Integers, degraded: Bools) -> Array:
    """Weights of crops, [N], that count every unit once, each domain's sum to half of all units.

    Args:
        units: the unit (image, scene) of every crop, [N], from 0.
        degraded: whether a crop is of the degraded domain, [N].
    """
    weights = 1 / np.bincount(units)[units]
    total = weights.sum()
    for domain in (False, True):
        mine = degraded == domain
        weights[mine] *= total / 2 / weights[mine].sum()
    return np.asarray(weights)


def seeded(make: Callable[[], Net], seed: int) -> Net:
    """A network whose initial values depend on the seed alone; no generator is touched."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the GPUs of whoever calls as well.
        torch.default_generator.manual_seed(seed)
        return make()


def train(
    net: Net,
    crops: Tensor,
    degraded: Bools,
    weights: Array,
    steps: int,
    key: tuple[int, ...],
    *,
    noise: float = 0.0,
) -> Net:
    """The network, trained on tiles of crops drawn by their weights, half of each batch clean.

    Args:
        net: logits [B] of "degraded" from tiles [B, 3, h, w].
        crops: float32 [N, 3, side, side]; tiles are of ``TILE`` pixels, or of all where it is less.
        degraded: what to learn, [N].
        weights: how often a crop is drawn, [N]; 0 for those kept out.
        steps: of AdamW, with one cycle of the learning rate.
        key: names the draws of crops, tiles, flips and noise.
        noise: standard deviation of white noise, drawn anew for every tile.
    """
    rng = randomness.generator(*key)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    target = torch.arange(BATCH).ge(BATCH // 2).float()
    side = crops.shape[-1]
    tile = min(TILE, side)
    chances = []
    for domain in (False, True):
        of_domain = np.where(degraded == domain, weights, 0)
        chances.append(of_domain / of_domain.sum())
    for _ in range(steps):
        drawn = [rng.choice(len(chance), BATCH // 2, p=chance) for chance in chances]
        tiles = []
        for crop in np.concatenate(drawn):
            top, left = rng.integers(side - tile + 1, size=2)
            patch = crops[crop, :, top : top + tile, left : left + tile]
            flips = [axis for axis in (1, 2) if rng.random() < 0.5]
            tiles.append(patch.flip(flips))
        batch = torch.stack(tiles)
        if noise:
            batch = batch + noise * torch.randn(batch.shape, generator=generator)
        optimizer.zero_grad(set_to_none=True)
        F.binary_cross_entropy_with_logits(net(batch), target).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def scores(net: nn.Module, crops: Tensor) -> Array:
    """Mean logit over the tiles of every crop, [N]; crops: [N, 3, side, side]."""
    side = crops.shape[-1]
    tile = min(TILE, side)
    # Tiles cover the crop, overlapping where its side is no multiple of theirs.
    starts = np.unique(np.linspace(0, side - tile, -(-side // tile)).round().astype(int))
    logits = [
        torch.cat([net(part) for part in crops[:, :, y : y + tile, x : x + tile].split(64)])
        for y in starts
        for x in starts
    ]
    return np.asarray(torch.stack(logits).double().mean(0).numpy())
