"""The settings of a run: checked when they are made, and readable without torch."""

import subprocess
import sys

import pytest
from tiny_run import recipe

from deflow_aug.config import ConfigError, from_dict, to_dict
from deflow_aug.training.recipe import Recipe


def test_the_learning_rate_is_halved_as_published() -> None:
    settings = Recipe(steps=1000, lr=1.0, warmup=0, halve_lr_at=(0.5, 0.75, 0.9, 0.95))
    rates = [settings.learning_rate(s) for s in (0, 499, 500, 750, 900, 950, 999)]
    assert rates == [1, 1, 0.5, 0.25, 0.125, 0.0625, 0.0625]
    assert Recipe(lr=1.0, warmup=3).learning_rate(0) == 0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": 10}, "crop must be a multiple of 4"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"steps": 0}, "steps"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr must be > 0 and finite, got nan"),
        ({"clip_norm": float("inf")}, "clip_norm"),
        ({"average": 1.0}, "average"),
        ({"seed": -1}, "seed"),
        ({"outlier_factor": 1.0}, "outlier_factor must be above 1, or 0"),
        ({"halve_lr_at": (0.5, 1.0)}, "halve_lr_at"),
        ({"halve_lr_at": (500.0,)}, "shares of the steps"),
        ({"clean_downscale": 0}, "clean_downscale"),
        ({"degraded_as_clean": 1}, "would teach that they are clean"),
        ({"paired_share": 1.0}, "give no data of the other"),
        ({"precision": "fp16"}, "precision must be one of float32, bf16, got 'fp16'"),
        ({"workers": -1}, "workers"),
        ({"keep_checkpoints": 1}, "keep_checkpoints must be at least 2"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(**change)


@pytest.mark.parametrize(
    ("size", "share", "given", "expected"),
    [
        (8, 0.5, {}, (8, 0)),
        (8, 0.5, {"paired": True}, (4, 4)),
        (8, 0.25, {"paired": True, "processes": 2}, (6, 2)),
        (3, 0.5, {"unpaired": False, "paired": True, "processes": 3}, (0, 3)),
        (1, 0.5, {"unpaired": False, "paired": True}, (0, 1)),
    ],
)
def test_batches_are_shared_out(
    size: int, share: float, given: dict[str, bool], expected: tuple[int, int]
) -> None:
    assert recipe(batch_size=size, paired_share=share).batch_sizes(**given) == expected


@pytest.mark.parametrize(
    ("size", "share", "given", "message"),
    [
        (1, 0.5, {}, "leaves 1 unpaired images in a step; there must be at least 2"),
        (2, 0.5, {"paired": True}, "with paired_share 0.5 leaves 1 unpaired"),
        (8, 0.01, {"paired": True}, "leaves no pair"),
        (8, 0.5, {"processes": 3}, "8 unpaired images and 0 pairs a step, .* 3 processes"),
        (8, 0.25, {"paired": True, "processes": 4}, "6 unpaired images and 2 pairs"),
        (8, 0.5, {"unpaired": False}, "neither unpaired nor paired"),
    ],
)
def test_batches_that_cannot_be_shared_out(
    size: int, share: float, given: dict[str, bool], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(batch_size=size, paired_share=share).batch_sizes(**given)


def test_settings_are_kept_as_plain_values() -> None:
    settings = recipe(blur_kernels="kernels", halve_lr_at=(0.5,), precision="bf16")
    assert from_dict(Recipe, to_dict(settings)) == settings


def test_torch_is_not_needed() -> None:
    code = "import sys, deflow_aug.training.recipe; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
