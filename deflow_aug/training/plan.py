"""What a run was asked for: its settings, its folders, and what it starts from. No torch."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from deflow_aug.config import ConfigError, ModelConfig, from_dict, to_dict
from deflow_aug.training.recipe import Recipe, differences

FILE = "run.yaml"
"""Name of the file in a run's folder that keeps its plan; ``--config`` takes it."""

HEAD = "# What this run was asked for; 'deflow-aug train --resume' goes on with it.\n"


@dataclass(frozen=True)
class Plan:
    """A run, but for its output folder and the machine that it runs on.

    Args:
        recipe: the settings.
        clean: folders of clean images.
        degraded: a folder of degraded images by domain.
        paired: a folder of pairs by domain.
        start: weights that it fine-tunes.
        encoder: file of the weights that the conditioning network starts from.
    """

    recipe: Recipe
    clean: tuple[str, ...] = ()
    degraded: Mapping[str, str] | None = None
    paired: Mapping[str, str] | None = None
    start: str | None = None
    encoder: str | None = None

    def __post_init__(self) -> None:
        if self.degraded and not self.clean and self.recipe.degraded_as_clean < 2:
            raise ConfigError(
                "--degraded needs --clean: a folder of clean images like them; or "
                "--degraded_as_clean 4, say, for the degraded ones downscaled by 4 as clean ones"
            )
        if self.clean and not self.degraded:
            raise ConfigError(
                "--clean needs --degraded: without it the clean images teach no degradation"
            )
        if not self.degraded and not self.paired:
            raise ConfigError(
                "nothing to train on: give --clean DIR and --degraded DIR, or --paired DIR, or all"
            )
        if len(set(map(_place, self.clean))) < len(self.clean):
            raise ConfigError(f"--clean names a folder twice: {', '.join(self.clean)}")
        if both := set(map(_place, self.clean)) & set(map(_place, (self.degraded or {}).values())):
            raise ConfigError(
                f"the same folder is given to --clean and --degraded: {both.pop()}. If its images "
                "shall be the clean ones too when downscaled, leave out --clean and give "
                "--degraded_as_clean 4, say"
            )
        given = {*(self.degraded or ()), *(self.paired or ())}
        if missing := [name for name in self.recipe.model.domains if name not in given]:
            raise ConfigError(
                f"no folder is given for {', '.join(missing)} of model.domains; add --degraded "
                f"{missing[0]}=DIR"
            )

    def write(self, path: Path) -> None:
        """Write it as YAML that ``--config`` takes, whole or not at all; folders become absolute.

        The folder is made if need be.
        """

        def absolute(folder: str) -> str:
            return str(Path(folder).resolve())

        values: dict[str, Any] = {
            "clean": [absolute(folder) for folder in self.clean] or None,
            "degraded": _words(self.degraded, absolute),
            "paired": _words(self.paired, absolute),
            "from": absolute(self.start)
            if self.start and Path(self.start).is_dir()
            else self.start,
            "encoder_weights": absolute(self.encoder) if self.encoder else None,
            **to_dict(self.recipe),
        }
        parser = ArgumentParser()
        add_arguments(parser)
        kept = {key: value for key, value in values.items() if value is not None}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial")
        try:
            text = parser.dump(parser.parse_object(kept), skip_none=True)
            temporary.write_text(HEAD + text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def add_arguments(parser: ArgumentParser) -> None:
    """What a plan is made of, as arguments."""
    folders = list[str] | str | None
    parser.add_argument(
        "--clean",
        type=folders,
        default=None,
        metavar="DIR",
        help="folder of clean images, searched recursively; may be given again for more of them",
    )
    parser.add_argument(
        "--degraded",
        type=folders,
        default=None,
        metavar="[NAME=]DIR",
        help="folder of degraded images, of other scenes; with names, one for each kind of "
        "degradation: --degraded low=DIR1 --degraded vintage=DIR2",
    )
    parser.add_argument(
        "--paired",
        type=folders,
        default=None,
        metavar="[NAME=]DIR",
        help="folder of pairs: DIR/clean and DIR/degraded with files of the same names, or "
        "NAME_clean.* and NAME_degraded.* in DIR; alone, or with the folders above",
    )
    parser.add_argument(
        "--from",
        type=str | None,
        default=None,
        metavar="W",
        help="weights to fine-tune: bundled, a folder, or a Hugging Face Hub id. The model is "
        "theirs, whatever the settings say; domains that they do not have, and those whose M is "
        "zero, start with M at model.shift_init",
    )
    parser.add_argument(
        "--encoder-weights",
        type=str | None,
        default=None,
        metavar="FILE",
        help="RRDB (ESRGAN) weights, .pth or .safetensors, that the conditioning network of a new "
        "run starts from; model.encoder must have their channels, growth and blocks",
    )
    parser.add_class_arguments(Recipe, nested_key=None)


def make(values: Mapping[str, Any], start: ModelConfig | None = None) -> Plan:
    """The plan that arguments ask for; folders' names become the model's domains.

    Args:
        values: of the arguments above, by name.
        start: architecture of the weights that ``from`` names: the model's, but for the domains
            if they are named, and ``shift_init``.

    Raises:
        ConfigError: if settings and folders do not fit together.
    """
    recipe = from_dict(Recipe, {key: values[key] for key in asdict(Recipe())})
    if recipe.blur_kernels is not None:
        recipe = replace(recipe, blur_kernels=str(Path(recipe.blur_kernels).resolve()))
    degraded = _named(_list(values["degraded"]), "--degraded")
    paired = _named(_list(values["paired"]), "--paired")
    names = tuple(dict.fromkeys([*degraded, *paired]))
    model = recipe.model
    if start is not None:
        model = replace(start, shift_init=model.shift_init)
        _tell_ignored(recipe.model, model)
    if "" in names:
        if len(names) > 1:
            raise ConfigError(
                "some folders have names and some have none; give all of them: --degraded "
                "NAME=DIR, --paired NAME=DIR"
            )
        if len(model.domains) > 1:
            raise ConfigError(
                f"which of the domains {', '.join(model.domains)} is it? Say so: --degraded "
                f"{model.domains[0]}=DIR"
            )
        degraded, paired = (
            dict.fromkeys(model.domains, f[""]) if f else {} for f in (degraded, paired)
        )
    elif names and set(names) != set(model.domains):
        if start is None and model.domains != ModelConfig().domains:
            raise ConfigError(
                f"model.domains are {', '.join(model.domains)}, but folders are given for "
                f"{', '.join(names)}"
            )
        statistics = {k: v for k, v in (model.statistics or {}).items() if k in names}
        model = replace(model, domains=names, statistics=statistics or None)
    return Plan(
        replace(recipe, model=model),
        tuple(_list(values["clean"])),
        degraded,
        paired,
        values["from"],
        values["encoder_weights"],
    )


def read(path: Path) -> dict[str, Any]:
    """The arguments in a file that :meth:`Plan.write` wrote.

    Raises:
        ConfigError: if it is not such a file.
    """
    parser = ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    try:
        return parser.parse_path(path).as_dict()
    except (ArgumentError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _tell_ignored(asked: ModelConfig, model: ModelConfig) -> None:
    """Settings that someone chose, and that those of the weights stand in for."""
    chosen = {name for name, *_ in differences(to_dict(asked), to_dict(Recipe().model))}
    ignored = [
        f"model.{name} {value} (theirs is {theirs})"
        for name, value, theirs in differences(to_dict(asked), to_dict(model))
        if name in chosen and name != "domains"
    ]
    if ignored:
        warnings.warn(
            "the model is that of the weights to fine-tune; these settings are ignored: "
            + ", ".join(ignored),
            stacklevel=3,
        )


def same_place(one: str | None, other: str | None) -> bool:
    """Whether two names are of the same file or folder, or of the same weights elsewhere."""
    if one is None or other is None:
        return one == other
    return one == other or Path(one).resolve() == Path(other).resolve()


def same_folders(some: Any, others: Any) -> bool:
    """Whether two lists of [NAME=]DIR have the same folders."""

    def places(value: Any) -> list[Path]:
        return [Path(folder).resolve() for folder in _folders(value)]

    return places(some) == places(others)


def _place(folder: str) -> Path:
    return Path(folder).resolve()


def _folders(value: Any) -> list[str]:
    return [folder for word in _list(value) for folder in _named([word], "").values()]


def _named(words: Sequence[str], flag: str) -> dict[str, str]:
    """Folder by name; the name of one that has none is empty."""
    result: dict[str, str] = {}
    for word in words:
        match = re.fullmatch(r"([A-Za-z0-9_-]+)=(.+)", word)
        # A folder whose own name has an equals sign is meant as it is.
        name, folder = match.groups() if match and not Path(word).is_dir() else ("", word)
        if name in result:
            raise ConfigError(
                f"{flag} is given twice for {name}"
                if name
                else f"{flag} is given twice: name what each folder's images suffer from, such as "
                f"{flag} low=DIR1 {flag} vintage=DIR2"
            )
        result[name] = folder
    return result


def _words(folders: Mapping[str, str] | None, absolute: Any) -> list[str] | None:
    return [f"{name}={absolute(folder)}" for name, folder in (folders or {}).items()] or None


def _list(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
