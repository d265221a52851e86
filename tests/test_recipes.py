"""Recipes: the bundled ones, and anyone's own."""

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deflow_aug.cli import main
from deflow_aug.config import ConfigError
from deflow_aug.model import DeFlow
from deflow_aug.training import recipes
from deflow_aug.training.plan import Plan
from deflow_aug.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ("published-aim", "published-ntire", "published-dped")


def test_the_bundled_ones() -> None:
    free = [f"{name}-free" for name in PUBLISHED]
    assert sorted(recipes.bundled()) == sorted([*PUBLISHED, *free, "small"])


def test_small_is_what_the_defaults_are() -> None:
    assert recipes.load("small") == Recipe()


@pytest.mark.parametrize("name", recipes.bundled())
def test_a_bundled_recipe_has_a_model_and_a_head(name: str) -> None:
    recipe = recipes.load(name)
    with torch.device("meta"):
        model = DeFlow(recipe.model)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1e6
    singles, pairs = recipe.batch_sizes(paired=True)
    assert singles + pairs == recipe.batch_size
    first = recipes.bundled()[name].read_text().splitlines()
    assert any(line.startswith("# Memory and time per step") for line in first)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("published-aim", (8, 128, 1e-4, 8, 160, 0, True)),
        ("published-ntire", (4, 64, 5e-5, 8, 160, 0, False)),
        ("published-dped", (4, 64, 5e-6, 48, 80, 4, False)),
    ],
)
def test_published_settings(name: str, expected: tuple[object, ...]) -> None:
    r = recipes.load(name)
    m = r.model
    own = (m.scale, m.hidden, r.lr, r.batch_size, r.crop, r.degraded_as_clean, r.match_statistics)
    assert own == expected
    assert (m.levels, m.steps, m.transition_steps, m.split_levels) == (3, 16, 2, (1,))
    assert (m.conditioning_noise, m.dequantization_steps, m.shift_init) == (0.03, 32, 0)
    e = m.encoder
    assert (e.channels, e.growth, e.blocks, e.stacked_blocks) == (64, 32, 23, (1, 8, 15, 22))
    assert (r.steps, r.clean_downscale, r.rotations) == (100_000, 4, False)
    assert (r.dequantize_as_noise, r.condition_as_noise) == (0, 0)
    assert (r.fit_in_flat_areas, r.remove_cast) == (False, False)
    # No averaging, and nothing that the published training did not do to a step.
    assert (r.average, r.warmup, r.outlier_factor) == (0, 0, 0)
    assert r.clip_norm >= 1e30
    rates = [r.learning_rate(step) for step in (0, 49_999, 50_000, 75_000, 90_000, 99_999)]
    assert rates == [r.lr * factor for factor in (1, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_free_ones_have_a_shift_that_moves(name: str) -> None:
    published, free = recipes.load(name), recipes.load(f"{name}-free")
    assert (free.model.shift_init, free.model.dequantization_steps) == (0.1, 255)
    for same in ("lr", "batch_size", "crop", "steps", "halve_lr_at", "clean_downscale"):
        assert getattr(free, same) == getattr(published, same)
    assert free.average > 0


def test_what_is_dumped_is_read_back(tmp_path: Path) -> None:
    recipe = Recipe(lr=5e-6, halve_lr_at=(0.5, 0.75), blur_kernels="kernels", steps=7)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipes.dump(recipe))
    assert recipes.load(file) == recipe


def test_a_file_goes_before_a_bundled_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small").write_text("steps: 9\n")
    monkeypatch.chdir(tmp_path)
    assert recipes.load("small").steps == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [("stepps: 3\n", "stepps"), ("steps: [\n", "parsing"), ("model: {scale: 3}\n", "power of two"),
     ("steps: 0.5\n", "steps")],
)  # fmt: skip
def test_a_recipe_with_something_wrong(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        recipes.load(file)
    assert "mine.yaml" in str(raised.value)


def test_a_recipe_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'nothing'.*published-aim"):
        recipes.load("nothing")


def test_the_wheel_has_them(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel")
    (path,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(path).namelist()
    assert {f"deflow_aug/recipes/{name}.yaml" for name in recipes.bundled()} <= set(names)


def test_settings_of_a_run_are_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What --print_config tells, and a run's run.yaml: less the folders and the machine."""
    with pytest.raises(SystemExit):
        main(["train", "--lr=5e-6", "--clean=a", "--model.hidden=16", "--print_config"])
    printed = capsys.readouterr().out
    for machine in ("output", "resume", "release", "device", "cache_dir", "tensorboard", "card"):
        assert machine not in printed
    file = tmp_path / "mine.yaml"
    file.write_text(printed + "output: null\nresume: false\ndevice: cuda:1\ncard_samples: true\n")
    expected = Recipe(lr=5e-6, model=replace(Recipe().model, hidden=16))
    assert recipes.load(file) == expected
    plan = Plan(expected, ("a",), {"degraded": "b"}, None, None, "rrdb.pth")
    plan.write(tmp_path / "run.yaml")
    assert "encoder_weights" in (tmp_path / "run.yaml").read_text()
    assert recipes.load(tmp_path / "run.yaml") == expected
