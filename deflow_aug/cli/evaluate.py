"""Measure how real degradations are: on pairs, or against real photographs without ground truth.

Prints tables; --report writes them as one HTML page, with plots and samples. On two cores: minutes.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

import deflow_aug
from deflow_aug.baselines import Baseline, Nothing, WhiteNoise, fit_all
from deflow_aug.cli.places import output_folder
from deflow_aug.cli.temperature import checked
from deflow_aug.degrader import DeFlowDegrader
from deflow_aug.evaluation import compare, figures, html_report, noise, photographs, unpaired
from deflow_aug.evaluation.degraders import Degrader, OfDomain
from deflow_aug.evaluation.page import Section
from deflow_aug.evaluation.plots import INSTALL
from deflow_aug.evaluation.tables import Table
from deflow_aug.hub import DEFAULT_WEIGHTS
from deflow_aug.image_files import replacing

TUNED = "white, tuned here"
"""Name of the white noise whose level is the best one for the very pairs that are evaluated."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        type=str,
        nargs="+",
        action="extend",
        default=[],
        help="name of bundled weights, a folder, or a Hugging Face Hub id (default: "
        f"{DEFAULT_WEIGHTS}); several, as they are or as NAME=WEIGHTS, are compared with the first",
    )
    parser.add_argument(
        "--pairs",
        type=str,
        nargs="+",
        action="extend",
        default=[],
        help="folders of pairs NAME_clean.*, NAME_degraded.*; each is evaluated by itself",
    )
    parser.add_argument(
        "--degraded",
        type=str,
        default=None,
        help="folder of real degraded photographs, of other scenes than the pairs, that the "
        "baselines are fitted on; without it only 'nothing' and the best white noise are compared",
    )
    parser.add_argument(
        "--clean",
        type=str,
        default=None,
        help="folder of clean photographs: degraded by everything that is evaluated, they are "
        "compared with those of --degraded without ground truth",
    )
    parser.add_argument(
        "--domain",
        type=str | None,
        default=None,
        help="which of the weights' degraded domains, if they have several",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="of all samples")
    parser.add_argument("--draws", type=int, default=4, help="samples of each clean picture")
    parser.add_argument(
        "--dequantize", action="store_true", help="with dequantisation noise at inference"
    )
    parser.add_argument(
        "--plain_conditioning", action="store_true", help="without noise on h(x) at inference"
    )
    parser.add_argument(
        "--scenes",
        type=str,
        default=None,
        help="regular expression on the names of pairs: those for which it (its first group) "
        r"matches the same text show one scene; for kitchen_1_clean.png, kitchen_2_clean.png: "
        r"'^(.*)_\d+'",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same figures")
    parser.add_argument("--report", type=str, default=None, help="folder for report.html and PNGs")
    parser.add_argument("--json", type=str, default=None, help="file for all figures")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")


def run(arguments: Namespace) -> int:
    _check(arguments)
    pairs = {title(Path(folder)): noise.load_pairs(folder) for folder in arguments.pairs}
    read = {
        folder: photographs.load(folder, arguments.seed)
        for folder in (arguments.degraded, arguments.clean)
        if folder is not None
    }
    notes = [note for _, left_out in read.values() for note in left_out]
    degraded = read[arguments.degraded][0] if arguments.degraded is not None else []
    models = _models(arguments)
    fitted: dict[str, Baseline] = {Nothing.name: Nothing()}
    if degraded:
        fitted = fit_all(degraded, seed=arguments.seed)
    if names := models.keys() & {*fitted, TUNED}:
        raise ValueError(f"--weights may not have a baseline's name: {', '.join(sorted(names))}")
    common: dict[str, Any] = {"temperature": arguments.temperature, "seed": arguments.seed}
    common["progress"] = True
    sections: list[Section] = []
    results: dict[str, Any] = {}
    for name, some in pairs.items():
        white = WhiteNoise(noise.best_white_noise(some, arguments.seed).sigma_mean)
        methods: dict[str, Degrader] = {
            **models,
            **(fitted or {Nothing.name: Nothing()}),
            TUNED: white,
        }
        evaluation = compare.evaluate(
            some, methods, draws=arguments.draws, scenes=arguments.scenes, **common
        )
        _print(name, figures.tables(evaluation))
        results[name] = figures.to_dict(evaluation)
        if arguments.report is not None:
            sections.append(html_report.paired_section(name, evaluation, models))
    if arguments.clean is not None:
        name = f"{title(Path(arguments.clean))} against {title(Path(arguments.degraded))}"
        real = unpaired.pieces(degraded)
        clean = unpaired.pieces(read[arguments.clean][0])
        fakes = unpaired.degraded(clean, {**models, **fitted}, **common)
        tables = unpaired.tables(real, fakes, seed=arguments.seed)
        _print(name, tables)
        results[name] = [asdict(table) for table in tables]
        if arguments.report is not None:
            sections.append(html_report.unpaired_section(name, tables, real, clean, fakes))
    settings = _settings(arguments, fitted, notes)
    _print("Settings", [settings])
    if arguments.json is not None:
        data = json.dumps(
            {"settings": {row[0]: row[1] for row in settings.rows}, **results},
            indent=1,
            allow_nan=False,
        )
        with replacing(Path(arguments.json)) as temporary:
            temporary.write_text(data + "\n", encoding="utf-8")
    if arguments.report is not None:
        sections.append(Section("Settings", [settings]))
        html_report.write(Path(arguments.report), sections)
        print(f"report    {Path(arguments.report) / html_report.FILE}")
    return 0


def title(folder: Path) -> str:
    """The last two parts of a folder's path: the last alone is often just "validation"."""
    return "/".join(folder.resolve().parts[-2:])


def _check(arguments: Namespace) -> None:
    if not arguments.pairs and arguments.clean is None:
        raise ValueError(
            "nothing to evaluate on: give --pairs DIR, or --clean DIR and --degraded DIR"
        )
    if arguments.clean is not None and arguments.degraded is None:
        raise ValueError("--clean is compared with the photographs of --degraded: give both")
    for name, least in (("draws", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    checked(arguments.temperature)
    titles = [title(Path(folder)) for folder in arguments.pairs]
    if twice := sorted({name for name in titles if titles.count(name) > 1}):
        raise ValueError(f"--pairs names {', '.join(twice)} twice")
    if arguments.report is not None:
        output_folder("--report", arguments.report)
    if arguments.report is not None and find_spec("matplotlib") is None:
        raise ImportError(INSTALL)
    if arguments.json is not None:  # all is computed before it is written
        if Path(arguments.json).is_dir():
            raise IsADirectoryError(f"--json must be a file, but {arguments.json} is a folder")
        folder = output_folder("the place of --json", str(Path(arguments.json).parent))
        folder.mkdir(parents=True, exist_ok=True)


def _models(arguments: Namespace) -> dict[str, OfDomain]:
    """The models that are evaluated, by name: as given, or the last part of their path."""
    found: dict[str, OfDomain] = {}
    for text in arguments.weights or [DEFAULT_WEIGHTS]:
        name, equals, weights = text.partition("=")
        if not equals:
            name, weights = Path(text).name, text
        if not name or not weights or name in found:
            raise ValueError(
                f"--weights takes NAME=WEIGHTS, or weights alone, each name once, got {text!r}"
            )
        degrader = DeFlowDegrader.from_pretrained(
            weights,
            device=arguments.device,
            dequantize=arguments.dequantize,
            conditioning_noise=not arguments.plain_conditioning,
        )
        found[name] = OfDomain(degrader, arguments.domain)
    return found


def _print(heading: str, tables: Sequence[Table]) -> None:
    print("\n".join([f"## {heading}\n", *(table.to_markdown() for table in tables)]), flush=True)


def _settings(arguments: Namespace, fitted: Mapping[str, Baseline], notes: Sequence[str]) -> Table:
    """What was asked for, what the baselines came to, and with which versions."""
    asked = {
        name: value
        for name, value in arguments.as_dict().items()
        if name not in ("report", "json") and value is not False and value not in (None, [])
    }
    asked["weights"] = arguments.weights or [DEFAULT_WEIGHTS]
    rows = [
        (f"--{name}", " ".join(value) if isinstance(value, list) else str(value))
        for name, value in asked.items()
    ]
    rows += [(name, _told(baseline.describe())) for name, baseline in fitted.items()]
    rows += [
        ("deflow-aug", deflow_aug.__version__),
        *((name, version(name)) for name in ("torch", "numpy")),
        ("Python", platform.python_version()),
    ]
    return Table("", ("setting", "value"), tuple(rows), tuple(notes), align="ll")


def _told(value: Any) -> str:
    """What was fitted, in words: "sigma 4.21", numbers rounded to four digits."""
    if isinstance(value, dict):
        parts = [
            f"{k} ({_told(v)})" if isinstance(v, dict) else f"{k} {_told(v)}"
            for k, v in value.items()
        ]
        return ", ".join(parts) or "-"
    if isinstance(value, (list, tuple)):
        return " to ".join(map(_told, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
