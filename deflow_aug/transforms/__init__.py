"""Degradations for input pipelines: torchvision v2, plain callables, Albumentations, Kornia.

    from deflow_aug.transforms import RandomDeFlow

    augment = v2.Compose([v2.RandomCrop(128), RandomDeFlow(degrader, temperature=(0.5, 1.2))])

The wrappers for Albumentations and Kornia are modules of their own, which need those packages:
``deflow_aug.transforms.albumentations.DeFlow`` and ``deflow_aug.transforms.kornia.RandomDeFlow``.
"""

from deflow_aug.transforms.base import ImageTransform
from deflow_aug.transforms.classical import (
    GaussianNoise,
    RandomBlur,
    RandomJPEG,
    RandomRescale,
    Resize,
)
from deflow_aug.transforms.groups import Params
from deflow_aug.transforms.mixing import Chain, MixedDegradation, RandomOrder
from deflow_aug.transforms.random_deflow import RandomDeFlow

__all__ = [
    "Chain",
    "GaussianNoise",
    "ImageTransform",
    "MixedDegradation",
    "Params",
    "RandomBlur",
    "RandomDeFlow",
    "RandomJPEG",
    "RandomOrder",
    "RandomRescale",
    "Resize",
]
