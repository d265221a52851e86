"""Widths of dequantisation noise, and what they do to likelihoods."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from small import SMALL, small_model
from torch.testing import assert_close

from deflow_aug.config import ConfigError, DequantizationCurve, ModelConfig, from_dict, to_dict
from deflow_aug.degrader import DeFlowDegrader
from deflow_aug.dequantization import bin_widths, log_volume

CURVE = DequantizationCurve((0.1, 0.2, 0.4), (0.1, 0.1, 0.1), (0.5, 0.3, 0.2))
CURVED = dataclasses.replace(SMALL, dequantization_curve=CURVE)


def test_widths_are_linear_between_the_knots() -> None:
    for grey, expected in (
        (0.0, (0.1, 0.1, 0.5)),
        (0.25, (0.15, 0.1, 0.4)),
        (1.0, (0.4, 0.1, 0.2)),
    ):
        x = torch.full((2, 3, 8, 12), grey).double()
        widths = bin_widths(x, CURVED)
        assert_close(widths, torch.tensor(expected).double()[:, None, None].expand_as(x))
    beyond = bin_widths(torch.full((1, 3, 8, 8), 1.3), CURVED)
    assert_close(beyond[0, :, 0, 0], torch.tensor([0.4, 0.1, 0.2]))


def test_widths_follow_means_and_hardly_the_noise() -> None:
    torch.manual_seed(0)
    x = torch.linspace(0.2, 0.8, 64)[None, None, None].expand(1, 3, 64, 64)
    spread = bin_widths(x + 0.1 * torch.randn_like(x), CURVED) - bin_widths(x, CURVED)
    # A change of 0.1 of the intensity would move them by 0.02 to 0.04.
    assert float(spread.std()) < 0.01


def test_without_a_curve_they_are_the_same_everywhere() -> None:
    config = dataclasses.replace(SMALL, dequantization_steps=20)
    widths = bin_widths(torch.rand(2, 3, 8, 8), config)
    assert_close(widths.expand(2, 3, 8, 8), torch.full((2, 3, 8, 8), 0.05))


def test_a_constant_curve_is_a_number_of_steps() -> None:
    even = DequantizationCurve(*[(1 / 20,) * 9] * 3)
    models = [
        small_model(dequantization_steps=20).double(),
        small_model(dequantization_curve=even).double(),
    ]
    torch.manual_seed(0)
    x = torch.rand(2, 3, 16, 16).double()
    draws = torch.rand_like(x) - 0.5
    results = [m.nll(x, ["clean", "degraded"], dequantization=draws) for m in models]
    assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_bits_are_of_the_bins_of_each_value() -> None:
    """-log2(density times volume) per dimension, the noise as wide as the bins."""
    model = small_model(dequantization_curve=CURVE).double()
    torch.manual_seed(0)
    x = torch.rand(1, 3, 16, 16).double()
    draws = torch.rand_like(x) - 0.5
    widths = bin_widths(x, model.config)
    density = model.log_prob(x + draws * widths, ["degraded"], model.features(x))
    expected = -(density + widths.log().sum()) / (math.log(2) * x.numel())
    assert_close(model.nll(x, ["degraded"], dequantization=draws), expected)
    assert_close(log_volume(widths, x), widths.log().sum()[None])


def test_log_prob_of_the_degrader_is_of_8_bit_images_whatever_the_curve() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    plain, curved = (
        DeFlowDegrader(small_model(**changes), device="cpu").log_prob(image)
        for changes in ({}, {"dequantization_curve": CURVE})
    )
    assert plain == pytest.approx(curved, abs=1e-6)


def test_dequantised_samples_have_noise_of_the_curve() -> None:
    model = small_model(dequantization_curve=CURVE)
    degrader = DeFlowDegrader(model, device="cpu", dequantize=True)
    image = torch.full((3, 32, 32), 0.5)
    without = DeFlowDegrader(model, device="cpu").degrade(image, temperature=1.0, seed=1)
    noise = (degrader.degrade(image, temperature=1.0, seed=1) - without).std((1, 2))
    expected = torch.tensor([0.2, 0.1, 0.3]) / math.sqrt(12)
    assert_close(noise, expected, rtol=0.25, atol=0)


def test_a_curve_is_saved_and_checked() -> None:
    values = json.loads(json.dumps(to_dict(CURVED)))
    assert from_dict(ModelConfig, values) == CURVED
    values["dequantization_curve"]["red"] = [0.1, 0.2]
    with pytest.raises(ConfigError, match="equally many widths"):
        from_dict(ModelConfig, values)
    values["dequantization_curve"]["red"] = [0.1, 0.2, 0.0]
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        from_dict(ModelConfig, values)
    values["dequantization_curve"]["colour"] = [0.1]
    with pytest.raises(ConfigError, match=r"unknown setting dequantization_curve\.colour"):
        from_dict(ModelConfig, values)
