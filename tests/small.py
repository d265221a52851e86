"""A small DeFlow for tests: quick, and with nothing in it that is still at its zero start."""

from __future__ import annotations

import dataclasses

import torch

from deflow_aug.config import EncoderConfig, ModelConfig
from deflow_aug.model import DeFlow

SMALL = ModelConfig(
    scale=4,
    levels=2,
    steps=1,
    transition_steps=1,
    split_levels=(1,),
    hidden=4,
    encoder=EncoderConfig(channels=4, growth=2, blocks=1, stacked_blocks=(0,)),
    shift_init=0.03,
    domains=("degraded",),
)


def small_model(seed: int = 0, **changes: object) -> DeFlow:
    """A random model with the settings SMALL, some of them changed.

    Its parameters are moved off their start, those of the shifts least: degraded versions of a
    mid-grey image stay within [0, 1].
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = DeFlow(dataclasses.replace(SMALL, **changes))
        for name, parameter in model.named_parameters():
            spread = 0.005 if name.startswith("shifts.") else 0.1
            parameter += spread * torch.randn_like(parameter)
    return model
