"""What and how to train: the settings of a run. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from deflow_aug.config import ConfigError, EncoderConfig, ModelConfig


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run. The defaults train the bundled ``camera-noise`` weights.

    Args:
        model: the architecture.
        steps: optimiser steps.
        batch_size: crops in a step, of all domains together.
        crop: side of the training crops, a multiple of the model's ``size_multiple``.
        lr: Adam's learning rate.
        halve_lr_at: shares of the steps after which it is halved; in the paper (section 5.4) at
            0.5, 0.75, 0.9 and 0.95.
        warmup: steps over which the learning rate rises linearly.
        clip_norm: gradients are scaled down to this norm.
        average: decay of the moving average of the weights; the average is what is released.
        seed: of the initial weights, the crops and all noise.
        checkpoint_every: steps between checkpoints.
        sample_every: steps between sample pictures.
    """

    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            scale=4,
            levels=3,
            steps=4,
            split_levels=(),
            hidden=32,
            encoder=EncoderConfig(channels=32, growth=16, blocks=4, stacked_blocks=(1,)),
            dequantization_steps=20,
            shift_init=0.8,
        )
    )
    steps: int = 1600
    batch_size: int = 4
    crop: int = 48
    lr: float = 8e-4
    halve_lr_at: tuple[float, ...] = ()
    warmup: int = 100
    clip_norm: float = 10.0
    average: float = 0.999
    seed: int = 0
    checkpoint_every: int = 200
    sample_every: int = 400

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "crop", "checkpoint_every", "sample_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.crop % self.model.size_multiple:
            raise ConfigError(
                f"crop must be a multiple of {self.model.size_multiple} (the model's scale and "
                f"levels ask for it), got {self.crop}"
            )
        if self.batch_size <= len(self.model.domains):
            raise ConfigError(
                f"batch_size must be at least {1 + len(self.model.domains)}, one image of each "
                f"domain, got {self.batch_size}"
            )
        if not self.lr > 0 or not self.clip_norm > 0:
            raise ConfigError(f"lr and clip_norm must be > 0, got {self.lr}, {self.clip_norm}")
        if not 0 <= self.average < 1:
            raise ConfigError(f"average must be in [0, 1), got {self.average}")
        if self.warmup < 0 or self.seed < 0:
            raise ConfigError(f"warmup and seed must be >= 0, got {self.warmup}, {self.seed}")

    def learning_rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        halvings = sum(step >= share * self.steps for share in self.halve_lr_at)
        return self.lr * 0.5**halvings * min(1.0, (step + 1) / (self.warmup + 1))
