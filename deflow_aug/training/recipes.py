"""Recipes as YAML files: those that come with the library, and anyone's own. No torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from deflow_aug.config import ConfigError, from_dict, to_dict
from deflow_aug.training.recipe import Recipe

FOLDER = Path(__file__).parents[1] / "recipes"


def bundled() -> dict[str, Path]:
    """The recipes that come with the library: file by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def find(name: str | os.PathLike[str]) -> Path:
    """The file of a recipe.

    Args:
        name: a path, or the name of a bundled recipe. A file in the working directory goes first.

    Raises:
        ConfigError: if it is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    found = bundled().get(os.fspath(name))
    if found is None:
        raise ConfigError(
            f"no recipe {os.fspath(name)!r}: it is no file, and the bundled recipes are "
            f"{', '.join(bundled())}"
        )
    return found


OTHERS = (
    *("clean", "degraded", "paired", "from", "encoder_weights"),
    *("output", "resume", "release", "device", "cache_dir", "tensorboard", "card_samples"),
)
"""What settings files of ``deflow-aug train`` may hold besides: folders, weights, the machine."""


def load(name: str | os.PathLike[str]) -> Recipe:
    """The settings of a recipe, read as ``deflow-aug train --config`` reads them.

    What the file does not set has the default of :class:`Recipe`. ``OTHERS``, as a run's
    ``run.yaml`` and the output of ``--print_config`` have them, are passed over.

    Raises:
        ConfigError: if there is no such recipe, or it has an unknown or impossible setting.
    """
    path = find(name)
    parser = _parser()
    for other in OTHERS:
        parser.add_argument(f"--{other}", type=Any)
    try:
        values = parser.parse_path(path).as_dict()
        return from_dict(Recipe, {key: values[key] for key in values.keys() - {*OTHERS}})
    except (ArgumentError, ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def dump(recipe: Recipe) -> str:
    """The settings as YAML: :func:`load` reads them back."""
    return _parser().dump(_parser().parse_object(to_dict(recipe)))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, nested_key=None)
    return parser
