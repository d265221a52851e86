"""Suggest s, the downsampling factor of the conditioning, for two folders.

Small classifiers try to tell h(clean) from h(degraded) on images that they were not trained on;
the smallest s at which they cannot is recommended. On two cores: minutes.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from deflow_aug.cli.places import output_folder

MARKDOWN, FIGURES, PLOT = "suggest.md", "suggest.json", "suggest.png"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--clean", type=str, required=True, help="folder of clean images")
    parser.add_argument("--degraded", type=str, required=True, help="folder of degraded images")
    parser.add_argument(
        "--output", type=str, default=None, help=f"folder for {MARKDOWN}, {FIGURES} and {PLOT}"
    )
    parser.add_argument(
        "--scales", type=int, nargs="+", default=[2, 4, 8, 16], help="downsampling factors s to try"
    )
    parser.add_argument(
        "--noises",
        type=float,
        nargs="+",
        default=[0.0, 0.03, 0.06],
        help="standard deviations of the noise on h to try, of images in [0, 1]; paper: 0.03",
    )
    parser.add_argument(
        "--match_brightness",
        action="store_true",
        help="weight the crops of both domains to the same mean colours: what is left is texture",
    )
    parser.add_argument(
        "--scenes",
        type=str,
        default=None,
        help="regular expression on file paths: images for which it (its first group) matches the "
        "same text show one scene, and are not split into trained on and held out; "
        r"for kitchen_1.png, kitchen_2.png: '^(.*)_\d+'",
    )
    parser.add_argument(
        "--crop",
        type=int,
        default=None,
        help="side of the crops in pixels, a multiple of all scales; default: 256, or what most "
        "images have",
    )
    parser.add_argument("--images", type=int, default=64, help="most images to use of each folder")
    parser.add_argument("--steps", type=int, default=100, help="training steps of each classifier")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same figures")


def run(arguments: Namespace) -> int:
    _check(arguments)
    output = None if arguments.output is None else output_folder("--output", arguments.output)

    from deflow_aug.evaluation import crops, leak, leak_report

    loaded = crops.load(
        Path(arguments.clean),
        Path(arguments.degraded),
        arguments.scales,
        crop=arguments.crop,
        images=arguments.images,
        scenes=arguments.scenes,
        seed=arguments.seed,
    )
    matched = arguments.match_brightness
    sweep = leak.sweep(
        loaded,
        arguments.scales,
        arguments.noises,
        match_brightness=matched,
        steps=arguments.steps,
        seed=arguments.seed,
    )
    text = leak_report.to_markdown(sweep, matched)
    print(text, end="")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        _write(output / MARKDOWN, text)
        figures = leak_report.to_dict(sweep, matched)
        _write(output / FIGURES, json.dumps(figures, indent=2, allow_nan=False) + "\n")
        try:
            leak_report.plot(sweep, matched, output / PLOT)
        except ImportError as error:
            print(f"no plot: {error}; pip install 'deflow-aug[plots]'")
    return 0


def _check(arguments: Namespace) -> None:
    scales, noises = arguments.scales, arguments.noises
    if not scales or min(scales) < 1:
        raise ValueError(f"--scales must be 1 or more, got {scales}")
    if not noises or not all(0 <= noise <= 1 for noise in noises):
        raise ValueError(f"--noises must be between 0 and 1, got {noises}")
    for name, least in (("crop", 8), ("images", 4), ("steps", 2), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if arguments.scenes is not None:
        try:
            re.compile(arguments.scenes)
        except re.error as error:
            raise ValueError(f"--scenes is no regular expression: {error}") from error


def _write(path: Path, text: str) -> None:
    # Under a name of its own first: the file is there complete or not at all.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
