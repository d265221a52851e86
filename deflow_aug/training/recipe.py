"""What and how to train: the settings of a run. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deflow_aug.config import ConfigError, EncoderConfig, ModelConfig

PRECISIONS = ("float32", "bf16")
"""Numbers that the conditioning network computes in; the flow is always in float32."""


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run. The defaults train the bundled ``camera-noise`` weights.

    Args:
        model: the architecture.
        steps: optimiser steps.
        batch_size: crops in a step, of all domains and all processes together.
        crop: side of the training crops, a multiple of the model's ``size_multiple``.
        lr: Adam's learning rate.
        halve_lr_at: shares of the steps after which it is halved; in the paper (section 5.4) at
            0.5, 0.75, 0.9 and 0.95.
        warmup: steps over which the learning rate rises linearly.
        clip_norm: gradients are scaled down to this norm.
        outlier_factor: a step whose gradient norm is more than this many times the median of
            recent ones is skipped; 0 skips none.
        average: decay of the moving average of the weights; the average is what is released.
        seed: of the initial weights, the crops and all noise.
        clean_downscale: clean images are downscaled by this factor, bicubic (the paper: 4).
        degraded_as_clean: degraded images downscaled by this factor join the clean domain (the
            paper's DPED setting); 0: they do not.
        blur_kernels: folder of blur kernels, .npy or .png; clean crops are blurred with one of
            them, drawn at random.
        rotations: crops are turned by 0, 90, 180 or 270 degrees, not only flipped.
        dequantize_as_noise: standard deviation of the dequantisation noise, in multiples of that of
            the degraded images' own noise, which is measured in their flat areas, by channel and
            intensity, and stored as ``model.dequantization_curve``. 0: the model's settings.
        condition_as_noise: standard deviation of the noise on h(x), likewise, but one number, at
            least ``model.conditioning_noise``; 0: that.
        fit_in_flat_areas: after the last step M is set by the latents in flat areas, and scaled to
            be as strong as it was (see :func:`deflow_aug.adaptation.fit_in_flat_areas`); not where
            there are pairs, which say more.
        remove_cast: after the last step mu is corrected such that degraded images keep the mean
            colours of clean ones (see :func:`deflow_aug.adaptation.remove_cast`).
        match_statistics: degraded images are given the clean ones' mean and standard deviation of
            each channel; the statistics are stored with the model, whose results get them back.
        paired_share: share of a batch that is pairs, where there are paired and unpaired data.
        precision: "float32", or "bf16" for the conditioning network alone.
        keep_activations: keep them for the backward pass, which else computes most of them again:
            less time for more memory (benchmarks/training.py measures both); the same results.
        workers: processes that decode images; results do not depend on it. 0: the training's own.
        cache_megabytes: memory for decoded images of each folder, of all workers together.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: checkpoints that are kept; the best one is kept besides.
        sample_every: steps between sample pictures.
    """

    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            scale=2,
            levels=3,
            steps=4,
            split_levels=(),
            hidden=16,
            encoder=EncoderConfig(channels=32, growth=16, blocks=4, stacked_blocks=(1,)),
            dequantization_steps=20,
            shift_init=0.8,
        )
    )
    steps: int = 1550
    batch_size: int = 4
    crop: int = 48
    lr: float = 8e-4
    halve_lr_at: tuple[float, ...] = ()
    warmup: int = 100
    clip_norm: float = 10.0
    outlier_factor: float = 10.0
    average: float = 0.999
    seed: int = 0
    clean_downscale: int = 1
    degraded_as_clean: int = 0
    blur_kernels: str | None = None
    rotations: bool = True
    dequantize_as_noise: float = 1.2
    condition_as_noise: float = 5.0
    fit_in_flat_areas: bool = True
    remove_cast: bool = True
    match_statistics: bool = False
    paired_share: float = 0.5
    precision: str = "float32"
    keep_activations: bool = False
    workers: int = 0
    cache_megabytes: int = 2048
    checkpoint_every: int = 200
    keep_checkpoints: int = 3
    sample_every: int = 400

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.crop % self.model.size_multiple:
            raise ConfigError(
                f"crop must be a multiple of {self.model.size_multiple} (the model's scale and "
                f"levels ask for it), got {self.crop}"
            )
        for name in ("lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be > 0 and finite, got {getattr(self, name)}")
        for name in ("dequantize_as_noise", "condition_as_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be >= 0 and finite, got {getattr(self, name)}")
        if self.outlier_factor != 0 and not self.outlier_factor > 1:
            raise ConfigError(
                f"outlier_factor must be above 1, or 0 to skip no outliers, "
                f"got {self.outlier_factor}"
            )
        if not 0 <= self.average < 1:
            raise ConfigError(f"average must be in [0, 1), got {self.average}")
        if not all(0 < share < 1 for share in self.halve_lr_at):
            raise ConfigError(
                f"halve_lr_at are shares of the steps, between 0 and 1, got {self.halve_lr_at}"
            )
        if not 0 < self.paired_share < 1:
            raise ConfigError(
                f"paired_share must be between 0 and 1, got {self.paired_share}; to train on one "
                "kind of data alone, give no data of the other"
            )
        if self.degraded_as_clean == 1:
            raise ConfigError(
                "degraded_as_clean must be 0 (off) or a factor of at least 2, got 1: degraded "
                "images as they are would teach that they are clean"
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )

    def learning_rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., before any rollback has halved it."""
        halvings = sum(step >= share * self.steps for share in self.halve_lr_at)
        return self.lr * 0.5**halvings * min(1.0, (step + 1) / (self.warmup + 1))

    def batch_sizes(
        self, *, unpaired: bool = True, paired: bool = False, processes: int = 1
    ) -> tuple[int, int]:
        """Unpaired and paired items of a step, over all processes; 0 of what is not given.

        Raises:
            ConfigError: if there are too few for the domains, the processes do not divide them,
                or no data are given at all.
        """
        if not (unpaired or paired):
            raise ConfigError("there are neither unpaired nor paired data to train on")
        pairs = self.batch_size if paired else 0
        if unpaired and paired:
            pairs = round(self.batch_size * self.paired_share)
        singles = self.batch_size - pairs
        told = f"batch_size {self.batch_size}" + (
            f" with paired_share {self.paired_share:g}" if unpaired and paired else ""
        )
        least = 1 + len(self.model.domains)
        if unpaired and singles < least:
            raise ConfigError(
                f"{told} leaves {singles} unpaired images in a step; there must be at least "
                f"{least}, one of each domain: raise batch_size"
            )
        if paired and pairs < 1:
            raise ConfigError(f"{told} leaves no pair in a step: raise either")
        if singles % processes or pairs % processes:
            raise ConfigError(
                f"{told} makes {singles} unpaired images and {pairs} pairs a step, over all "
                f"processes together; {processes} processes must divide both numbers"
            )
        return singles, pairs


def differences(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], where: str = ""
) -> list[tuple[str, Any, Any]]:
    """What settings, as plain values, differ in: name as in flags, my value, their value."""
    found = []
    for key in sorted(mine.keys() | theirs.keys()):
        one, other = mine.get(key), theirs.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{where}{key}.")
        elif one != other:
            found.append((f"{where}{key}", one, other))
    return found


_LEAST = {
    "steps": 1,
    "batch_size": 1,
    "crop": 1,
    "warmup": 0,
    "seed": 0,
    "clean_downscale": 1,
    "degraded_as_clean": 0,
    "workers": 0,
    "cache_megabytes": 0,
    "checkpoint_every": 1,
    "keep_checkpoints": 2,
    "sample_every": 1,
}
"""The least value of whole-number settings."""
