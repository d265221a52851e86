"""Settings: their way through JSON, what is refused and how, and the channels they imply."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deflow_aug.config import (
    CLEAN,
    ChannelStatistics,
    ConfigError,
    EncoderConfig,
    ModelConfig,
    from_dict,
    to_dict,
)

UNUSUAL = ModelConfig(
    scale=8,
    levels=4,
    steps=2,
    transition_steps=0,
    split_levels=(1, 3),
    hidden=16,
    encoder=EncoderConfig(channels=8, growth=4, blocks=3, stacked_blocks=(0, 2)),
    conditioning_noise=0.0,
    dequantization_steps=32,
    shift_init=0.0,
    domains=("night", "scan-2"),
    statistics={
        "scan-2": ChannelStatistics((0.4, 0.0, 1.0), (0.2,) * 3, (0.3, 0.5, 0.6), (0.1,) * 3)
    },
)

STATISTICS = to_dict(UNUSUAL)["statistics"]["scan-2"]


@pytest.mark.parametrize("config", [ModelConfig(), UNUSUAL, EncoderConfig(stacked_blocks=())])
def test_settings_survive_json(config: Any) -> None:
    assert from_dict(type(config), to_dict(config)) == config
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


def test_settings_that_are_left_out_have_their_defaults() -> None:
    assert from_dict(ModelConfig, {}) == ModelConfig()
    config = from_dict(ModelConfig, {"encoder": {"blocks": 30}})
    assert config == ModelConfig(encoder=EncoderConfig(blocks=30))


def test_statistics_as_json() -> None:
    assert STATISTICS["clean_mean"] == [0.4, 0.0, 1.0]
    assert hash(UNUSUAL) == hash(from_dict(ModelConfig, to_dict(UNUSUAL)))
    read = from_dict(ChannelStatistics, {**STATISTICS, "clean_mean": [0, 1, 0.5]})
    assert read.clean_mean == (0.0, 1.0, 0.5)
    assert all(type(value) is float for value in read.clean_mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hue": 1}, r"unknown setting statistics\.degraded\.hue;"),
        ({"clean_std": None}, r"statistics\.degraded\.clean_std must be of type tuple"),
        ({"clean_std": ["a", 1, 1]}, r"statistics\.degraded\.clean_std must be of type tuple"),
        ({"clean_std": [True, 1, 1]}, r"statistics\.degraded\.clean_std must be of type tuple"),
        ({"clean_mean": [0.5, 0.5]}, r"clean_mean must be three numbers.*got \(0.5, 0.5\)"),
        ({"degraded_mean": [0.5, 0.5, 98]}, "degraded_mean must be from 0 to 1, got 98.*by 255"),
        ({"degraded_mean": [0.5, -0.1, 1]}, "degraded_mean must be from 0 to 1, got -0.1"),
        ({"degraded_std": [0.5, 0.0, 1]}, "degraded_std must be above 0 to 1, got 0"),
        ({"clean_std": [0.5, float("nan"), 1]}, "clean_std must be above 0 to 1, got nan"),
    ],
)
def test_wrong_statistics_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(ModelConfig, {"statistics": {"degraded": {**STATISTICS, **change}}})


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        (3, "statistics must be of type dict"),
        ({1: STATISTICS}, "statistics must be of type dict"),
        ({"degraded": 3}, r"statistics\.degraded\.: expected a mapping"),
        ({"degraded": {}}, r"missing setting statistics\.degraded\.clean_mean, "),
        ({CLEAN: STATISTICS}, "given for 'clean', which is none of the degraded .*degraded"),
    ],
)
def test_statistics_are_of_degraded_domains(statistics: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(ModelConfig, {"statistics": statistics})


def test_whole_numbers_are_accepted_for_fractions() -> None:
    config = from_dict(ModelConfig, {"shift_init": 1})
    assert type(config.shift_init) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heat": 1.0}, "unknown setting heat;"),
        ({"encoder": {"foo": 1}}, "unknown setting encoder.foo;"),
        ({"encoder": {"foo": 1, "bar": 2}}, "unknown setting encoder.bar, encoder.foo;"),
        ({"steps": 1.5}, "steps must be of type int, got 1.5"),
        ({"steps": "16"}, "steps must be of type int, got '16'"),
        ({"steps": True}, "steps must be of type int, got True"),
        ({"steps": None}, "steps must be of type int, got None"),
        ({"shift_init": "small"}, "shift_init must be of type float, got 'small'"),
        ({"shift_init": True}, "shift_init must be of type float, got True"),
        ({"domains": "rain"}, "domains must be of type tuple"),
        ({"domains": [1]}, "domains must be of type tuple"),
        ({"split_levels": ["1"]}, "split_levels must be of type tuple"),
        ({"encoder": {"stacked_blocks": [0.5]}}, "encoder.stacked_blocks must be of type tuple"),
        ({"encoder": 3}, "encoder.*expected a mapping of settings, got 3"),
        ([], "ModelConfig: expected a mapping of settings"),
    ],
)
def test_wrong_keys_and_types_are_named(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(ModelConfig, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *(
            ({name: 0}, f"{name} must be at least 1, got 0")
            for name in ("scale", "levels", "steps", "hidden", "dequantization_steps")
        ),
        *(
            ({"encoder": {name: 0}}, f"{name} must be at least 1, got 0")
            for name in ("channels", "growth", "blocks")
        ),
        ({"scale": 6}, "scale must be a power of two"),
        ({"transition_steps": -1}, "transition_steps must be at least 0"),
        ({"split_levels": [3]}, "split_levels names level 3: .* levels 1 to 2"),
        ({"split_levels": [0]}, "split_levels names level 0"),
        ({"split_levels": [1, 1]}, "split_levels names a level twice"),
        ({"shift_init": float("nan")}, "shift_init must be finite"),
        ({"conditioning_noise": -0.1}, "conditioning_noise must be >= 0"),
        ({"conditioning_noise": float("nan")}, "conditioning_noise must be >= 0"),
        ({"conditioning_noise": float("inf")}, "conditioning_noise must be >= 0"),
        ({"domains": []}, "domains is empty"),
        ({"domains": [CLEAN]}, "'clean' cannot name a degraded domain"),
        ({"domains": ["a b"]}, "'a b' cannot name a degraded domain"),
        ({"domains": ["a.b"]}, "'a.b' cannot name a degraded domain"),
        ({"domains": [""]}, "'' cannot name a degraded domain"),
        ({"domains": ["rain", "rain"]}, "domains are named twice"),
        ({"encoder": {"stacked_blocks": [23]}}, "names block 23, but there are blocks 0 to 22"),
        ({"encoder": {"stacked_blocks": [-1]}}, "names block -1"),
    ],
)
def test_values_that_make_no_model_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(ModelConfig, values)


@pytest.mark.parametrize("scale", [4, 8])
def test_published_models_split_after_the_first_level(scale: int) -> None:
    config = ModelConfig(scale=scale)
    assert config.split_levels == (1,)
    assert config.level_channels == (12, 24, 96)
    assert config.latent_channels == (6, 96)
    assert config.size_multiple == 8


@pytest.mark.parametrize(
    ("levels", "splits", "inside", "latents"),
    [
        (1, None, (12,), (12,)),
        (2, None, (12, 48), (48,)),
        (2, (1,), (12, 24), (6, 24)),
        (3, (), (12, 48, 192), (192,)),
        (3, (2, 1), (12, 24, 48), (6, 12, 48)),
        (4, None, (12, 24, 48, 192), (6, 12, 192)),
    ],
)
def test_channels_follow_from_levels_and_splits(
    levels: int,
    splits: tuple[int, ...] | None,
    inside: tuple[int, ...],
    latents: tuple[int, ...],
) -> None:
    config = ModelConfig(levels=levels, split_levels=splits)
    assert config.level_channels == inside
    assert config.latent_channels == latents


@pytest.mark.parametrize(
    ("scale", "levels", "multiple"), [(2, 1, 2), (2, 3, 8), (8, 2, 8), (16, 3, 16)]
)
def test_image_sides_are_multiples_of_what_is_divided(
    scale: int, levels: int, multiple: int
) -> None:
    assert ModelConfig(scale=scale, levels=levels).size_multiple == multiple
