"""Settings of a model: frozen dataclasses of plain values, readable without torch.

The same dataclasses are the ``model`` part of a recipe (what to train) and of a ``config.json``
(what was trained).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

CLEAN = "clean"
"""Name of the domain that every flow has: latents N(0, I), no shift."""

MOST_LEVELS = 16
"""Sides of images are multiples of 2^levels."""

SHIFTS = ("full", "diagonal", "zero", "fitted")
"""Kinds of latent shift; see :class:`ModelConfig`."""

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting is unknown, missing, of the wrong type or contradicts another."""


@dataclass(frozen=True)
class EncoderConfig:
    """The conditioning network: the RRDB trunk of ESRGAN (Wang et al., 2018) on h(x).

    Args:
        channels: feature channels of the trunk ("nf").
        growth: channels that each dense convolution adds ("gc").
        blocks: number of residual-in-residual dense blocks.
        stacked_blocks: 0-based numbers of the blocks whose outputs are appended to the features
            of every level.
    """

    channels: int = 64
    growth: int = 32
    blocks: int = 23
    stacked_blocks: tuple[int, ...] = (1, 8, 15, 22)

    def __post_init__(self) -> None:
        _positive(self, "channels", "growth", "blocks")
        for block in self.stacked_blocks:
            if not 0 <= block < self.blocks:
                raise ConfigError(
                    f"encoder.stacked_blocks names block {block}, but there are blocks 0 to "
                    f"{self.blocks - 1}"
                )

    @property
    def feature_channels(self) -> int:
        """Channels of the conditioning map of each level."""
        return self.channels * (1 + len(self.stacked_blocks))


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation of red, green and blue in a clean and in a degraded domain.

    The flow of such a degraded domain is trained on images that were given the statistics of the
    clean one, so that it has no change of colours to learn (AIM-RWSR's models; the paper's
    ``normalize``); its results are given those of the degraded domain. All of images in [0, 1].
    """

    clean_mean: tuple[float, float, float]
    clean_std: tuple[float, float, float]
    degraded_mean: tuple[float, float, float]
    degraded_std: tuple[float, float, float]

    def __post_init__(self) -> None:
        for part in dataclasses.fields(self):
            values = getattr(self, part.name)
            if len(values) != 3:
                raise ConfigError(
                    f"{part.name} must be three numbers, of red, green and blue, got {values}"
                )
            lowest = "above 0" if part.name.endswith("std") else "from 0"
            for value in values:
                # NaN is in no range.
                if not 0 <= value <= 1 or (value == 0 and lowest == "above 0"):
                    raise ConfigError(
                        f"{part.name} must be {lowest} to 1, got {value}; divide statistics of "
                        "8-bit values by 255"
                    )


@dataclass(frozen=True)
class DequantizationCurve:
    """Widths of dequantisation noise by intensity, of each channel; images in [0, 1].

    Args:
        red, green, blue: the widths at equally spaced intensities from 0 to 1, linear in between.
    """

    red: tuple[float, ...]
    green: tuple[float, ...]
    blue: tuple[float, ...]

    def __post_init__(self) -> None:
        channels = (self.red, self.green, self.blue)
        if len({len(channel) for channel in channels}) > 1 or len(self.red) < 2:
            raise ConfigError(
                "a dequantization_curve has equally many widths for red, green and blue, at least "
                f"two, got {', '.join(str(len(channel)) for channel in channels)}"
            )
        for width in (width for channel in channels for width in channel):
            if not 0 < width <= 1:  # NaN is in no range
                raise ConfigError(
                    f"the widths of a dequantization_curve must be above 0 and at most 1, "
                    f"got {width}"
                )


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a DeFlow model (paper, section 4.1). Defaults: the published x4 models.

    Args:
        scale: downsampling factor s of h(x), a power of two.
        levels: number of levels L; each halves the resolution.
        steps: flow steps K per level.
        transition_steps: unconditional steps (actnorm, 1x1 convolution) after each squeeze.
        split_levels: levels (counted from 1) that end in a split. None: the published rule, all
            but the last two.
        hidden: hidden channels of the networks in couplings and injectors.
        encoder: the conditioning network.
        conditioning_noise: standard deviation of the noise added to h(x), images in [0, 1].
        dequantization_steps: dequantisation noise is uniform of width 1/dequantization_steps;
            255 fills the gaps of 8-bit images exactly, the published models use 32 ("5 bit").
        dequantization_curve: in place of that, widths that depend on channel and intensity, as the
            noise of photographs does. None: the same width everywhere.
        shift: what the latent shift learns (the paper's ablation, section 5.7): "full", any M;
            "diagonal", a diagonal M; "zero", M = 0, mu alone; "fitted", nothing while the flow
            trains, with N(0, I) for all domains: mu and M are fitted to the latents afterwards.
        shift_init: the shift's factor M starts at shift_init times the identity. Zero never
            trains: the gradient of the likelihood in M is 2 G M.
        conditioned: False puts h(x) = 0, which tells the flow nothing (the ablation's "no
            conditional").
        domains: names of the degraded domains, each with its own latent shift.
        statistics: for degraded domains whose colours were matched to the clean ones before
            training: their channel statistics. None, or a domain left out: not matched.
    """

    scale: int = 4
    levels: int = 3
    steps: int = 16
    transition_steps: int = 2
    split_levels: tuple[int, ...] | None = None
    hidden: int = 64
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    conditioning_noise: float = 0.03
    dequantization_steps: int = 255
    dequantization_curve: DequantizationCurve | None = None
    shift: str = "full"
    shift_init: float = 0.1
    conditioned: bool = True
    domains: tuple[str, ...] = ("degraded",)
    statistics: dict[str, ChannelStatistics] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        _positive(self, "scale", "levels", "steps", "hidden", "dequantization_steps")
        if self.scale & (self.scale - 1):
            raise ConfigError(f"scale must be a power of two (2, 4, 8, ...), got {self.scale}")
        if self.levels > MOST_LEVELS:
            raise ConfigError(
                f"levels must be at most {MOST_LEVELS}, got {self.levels}: image sides must be "
                "multiples of 2^levels"
            )
        if self.transition_steps < 0:
            raise ConfigError(f"transition_steps must be at least 0, got {self.transition_steps}")
        if self.split_levels is None:
            object.__setattr__(self, "split_levels", tuple(range(1, self.levels - 1)))
        for level in self.split_levels or ():
            if not 1 <= level < self.levels:
                raise ConfigError(
                    f"split_levels names level {level}: a split may follow levels 1 to "
                    f"{self.levels - 1} (the last level's output is a latent already)"
                )
        if len(set(self.split_levels or ())) != len(self.split_levels or ()):
            raise ConfigError(f"split_levels names a level twice: {self.split_levels}")
        if self.shift not in SHIFTS:
            raise ConfigError(f"shift must be one of {', '.join(SHIFTS)}, got {self.shift!r}")
        if not math.isfinite(self.shift_init):
            raise ConfigError(f"shift_init must be finite, got {self.shift_init}")
        if self.conditioning_noise < 0 or not math.isfinite(self.conditioning_noise):
            raise ConfigError(f"conditioning_noise must be >= 0, got {self.conditioning_noise}")
        if not self.domains:
            raise ConfigError("domains is empty: name at least one degraded domain")
        for name in self.domains:
            if name == CLEAN or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ConfigError(
                    f"{name!r} cannot name a degraded domain: use letters, digits, '_' and '-', "
                    f"and not {CLEAN!r}"
                )
        if len(set(self.domains)) != len(self.domains):
            raise ConfigError(f"domains are named twice: {', '.join(self.domains)}")
        for name in self.statistics or ():
            if name not in self.domains:
                raise ConfigError(
                    f"statistics are given for {name!r}, which is none of the degraded domains "
                    f"({', '.join(self.domains)})"
                )

    @property
    def size_multiple(self) -> int:
        """Image sides must be multiples of this (others are padded to it)."""
        return max(self.scale, 2**self.levels)

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels inside each level, after its squeeze."""
        channels, result = 3, []
        for level in range(1, self.levels + 1):
            channels *= 4
            result.append(channels)
            if level in (self.split_levels or ()):
                channels -= channels // 2
        return tuple(result)

    @property
    def latent_channels(self) -> tuple[int, ...]:
        """Channels of each latent, in the order the flow emits them (splits first)."""
        per_level = self.level_channels
        splits = [per_level[level - 1] // 2 for level in sorted(self.split_levels or ())]
        return (*splits, per_level[-1])


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as JSON-ready values; the inverse of :func:`from_dict`."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a settings dataclass from JSON values.

    Raises:
        ConfigError: for an unknown or missing key or a value of the wrong type; the message names
            it.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{where or cls.__name__}: expected a mapping of settings, got {values!r}"
        )
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        names = ", ".join(f"{where}{key}" for key in unknown)
        raise ConfigError(f"unknown setting {names}; known are: {', '.join(known)}")
    missing = [
        f"{where}{name}"
        for name, f in known.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing setting {', '.join(missing)}")
    arguments = {}
    for name, value in values.items():
        kind = str(known[name].type)
        arguments[name] = _convert(kind, value, f"{where}{name}")
    return cls(**arguments)


def _convert(kind: str, value: Any, name: str) -> Any:
    """Check one JSON value against the (string) annotation of its field."""
    if "None" in kind and value is None:
        return None
    if (nested := kind.removesuffix(" | None")) in _NESTED:
        return from_dict(_NESTED[nested], value, f"{name}.")
    if kind.startswith("dict"):
        if isinstance(value, Mapping) and all(type(key) is str for key in value):
            return {
                key: from_dict(ChannelStatistics, item, f"{name}.{key}.")
                for key, item in value.items()
            }
    elif kind.startswith("tuple"):
        items = (str,) if "str" in kind else (int, float) if "float" in kind else (int,)
        if isinstance(value, (list, tuple)) and all(type(v) in items for v in value):
            return tuple(float(v) if "float" in kind else v for v in value)
    elif kind in ("int", "bool", "str", "str | None"):
        if type(value).__name__ == kind.split(" ")[0]:
            return value
    elif kind == "float" and type(value) in (int, float):
        return float(value)
    raise ConfigError(f"{name} must be of type {kind}, got {value!r}")


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(config, name)}")


_NESTED: dict[str, type] = {
    one.__name__: one for one in (EncoderConfig, DequantizationCurve, ModelConfig)
}
