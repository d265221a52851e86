"""What a new run starts from: the statistics of its data, and initial weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from deflow_aug.config import CLEAN, ChannelStatistics, ConfigError, DequantizationCurve
from deflow_aug.convert import encoder_weights, load_checkpoint
from deflow_aug.data.folders import CropFolder
from deflow_aug.flat import NoFlatAreasError, flat_windows
from deflow_aug.latent import ShiftHealth
from deflow_aug.model import DeFlow, channels_last
from deflow_aug.noise_curve import noise_curve, noise_level
from deflow_aug.training.objective import Inputs
from deflow_aug.training.recipe import Recipe

INITIALIZATION_IMAGES = 64
"""At most so many images initialise the actnorms."""


MEASURED_IMAGES = 256
"""At most so many images of a domain have their noise measured."""


def with_statistics(recipe: Recipe, domains: Mapping[str, CropFolder]) -> Recipe:
    """The recipe with the channel statistics of the data in its model, measured in one pass.

    Args:
        domains: the folder of every domain, the clean one among them.
    """
    if CLEAN not in domains:
        raise ConfigError(
            "match_statistics needs unpaired data: the clean folder's statistics and each degraded "
            "folder's"
        )
    clean = domains[CLEAN].statistics()
    statistics = {
        name: ChannelStatistics(*clean, *domains[name].statistics())
        for name in recipe.model.domains
        if name in domains
    }
    return replace(recipe, model=replace(recipe.model, statistics=statistics))


def with_noise(recipe: Recipe, domains: Mapping[str, CropFolder]) -> Recipe:
    """The recipe with dequantisation and the noise on h(x) as the noise of its data has it.

    Of several degraded domains the mean of their variances counts, for noise must not differ
    between domains: it would give them away. Where none has flat areas that show its noise, the
    model's own settings stay, with a warning.

    Args:
        domains: the folder of every domain.
    """
    curves, levels = [], []
    for name in recipe.model.domains:
        if name in domains:
            try:
                pictures = domains[name].whole_pictures(MEASURED_IMAGES, recipe.seed)
                windows = flat_windows(pictures, recipe.seed)
            except NoFlatAreasError as error:
                warnings.warn(f"the noise of {name} cannot be measured: {error}", stacklevel=2)
                continue
            curves.append(noise_curve(windows))
            levels.append(noise_level(windows))
    if not curves:
        return recipe
    model = recipe.model
    if recipe.dequantize_as_noise:
        # Uniform noise of width w has the standard deviation w / sqrt(12).
        deviation = np.sqrt(np.mean(np.square(curves), axis=0)) * recipe.dequantize_as_noise / 255
        widths = np.clip(deviation * math.sqrt(12), 1 / 255, 1)
        rows = [tuple(round(w, 5) for w in row) for row in widths.tolist()]
        model = replace(model, dequantization_curve=DequantizationCurve(*rows))
    if recipe.condition_as_noise:
        level = math.sqrt(np.mean(np.square(levels))) * recipe.condition_as_noise / 255
        noise = round(max(level, model.conditioning_noise), 4)
        model = replace(model, conditioning_noise=noise)
    return replace(recipe, model=model)


def new_model(recipe: Recipe) -> DeFlow:
    """A model with random weights, a function of the recipe alone; on the CPU."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the GPUs of whoever calls as well.
        torch.default_generator.manual_seed(recipe.seed)
        model = DeFlow(recipe.model)
    # Channels last is what the convolution kernels of CPUs and GPUs are fastest in.
    return channels_last(model)


def load_encoder(model: DeFlow, path: Path) -> None:
    """Give the conditioning network the weights of an RRDB (ESRGAN) file.

    Raises:
        deflow_aug.convert.ConversionError: if it holds none, or not of this architecture.
    """
    model.conditioning.load_state_dict(encoder_weights(load_checkpoint(path), model.config))


@torch.no_grad()
def fine_tune(model: DeFlow, start: DeFlow) -> None:
    """Give a new model the weights of another of the same architecture.

    Shifts are matched by the domain's name: one that ``start`` lacks is as in any new model. So is
    an M that has collapsed to zero, which could never move.

    Raises:
        ConfigError: if the architectures differ.
    """
    shifts = {
        name: tensor for name, tensor in model.state_dict().items() if name.startswith("shifts.")
    }
    others = {
        name: tensor
        for name, tensor in start.state_dict().items()
        if not name.startswith("shifts.")
    }
    try:
        model.load_state_dict(others | shifts)
    except RuntimeError as error:
        raise ConfigError(
            f"the weights to start from are of another architecture than model.*: {error}"
        ) from error
    if model.config.shift == "fitted":
        return  # to what the latents will be after training
    for mine, theirs in zip(model.domain_shifts(), start.domain_shifts(), strict=True):
        for number, name in enumerate(model.config.domains, 1):
            if name in start.config.domains:
                other = 1 + start.config.domains.index(name)
                collapsed = ShiftHealth.of(theirs, other).collapsed
                factor = mine.factors()[number] if collapsed else theirs.factors()[other]
                mine.assign(number, theirs.means()[other], factor)


def initialize(model: DeFlow, batches: Iterable[Inputs]) -> None:
    """Set the actnorms, those without values, from the first ``INITIALIZATION_IMAGES`` images."""
    parts: list[Inputs] = []
    for batch in batches:
        parts.append(batch)
        if sum(len(part.images) for part in parts) >= INITIALIZATION_IMAGES:
            break
    images, _, dequantization, noise = (
        torch.cat(tensors)[:INITIALIZATION_IMAGES] for tensors in zip(*parts, strict=True)
    )
    model.initialize(images, dequantization=dequantization, noise=noise)
