"""Degrade photographs: files, or whole folders whose tree is kept."""

from __future__ import annotations

import os
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from PIL import Image
from tqdm import tqdm

from deflow_aug.cli.places import output_folder
from deflow_aug.cli.progress_bar import warnings_above
from deflow_aug.cli.temperature import checked
from deflow_aug.hub import DEFAULT_WEIGHTS
from deflow_aug.image_files import UnreadableImageError
from deflow_aug.image_folders import find_images

if TYPE_CHECKING:
    from deflow_aug.degrader import DeFlowDegrader

SMALL = 128
"""Sides of tiles below which it is worth asking how wide the model's halo is: it takes seconds."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("photos", nargs="+", type=str, help="image files and folders of them")
    parser.add_argument("--output", type=str, required=True, help="folder for the results")
    parser.add_argument(
        "--weights",
        type=str,
        default=DEFAULT_WEIGHTS,
        help="name of bundled weights, a folder, or a Hugging Face Hub id",
    )
    parser.add_argument("--samples", type=int, default=1, help="degraded versions of each photo")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="strength; 0 adds no degradation"
    )
    parser.add_argument(
        "--domain",
        type=str | None,
        default=None,
        help="which of the model's degraded domains, if it has several: a name; 'random', one for "
        "each photo and sample; or a mix of them, as in low=0.5,vintage=0.5",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives a photo the same result"
    )
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="add seeded dequantisation noise before encoding: the randomness of published models",
    )
    parser.add_argument(
        "--tile",
        type=str,
        default="auto",
        help="side of the tiles that a photo is computed in, in pixels; 0: at once; auto: in "
        "tiles if it has more than half a megapixel or would take more than 2.8 GB of memory; on a "
        "GPU, more than half of what is free",
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")


def run(arguments: Namespace) -> int:
    if arguments.samples < 1:
        raise ValueError(f"--samples must be at least 1, got {arguments.samples}")
    if arguments.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {arguments.seed}")
    temperature = checked(arguments.temperature)
    if "" in arguments.photos:
        raise ValueError("one of the photos is empty; '.' is this folder")
    domain, tile = _domain(arguments.domain), _tile(arguments.tile)
    output = output_folder("--output", arguments.output)
    jobs, lost = _jobs([Path(photo) for photo in arguments.photos])
    if not jobs:
        raise FileNotFoundError("\n".join(lost))
    _check_targets(jobs, output, arguments.samples)

    from deflow_aug.degrader import DeFlowDegrader

    degrader = DeFlowDegrader.from_pretrained(
        arguments.weights, device=arguments.device, dequantize=arguments.dequantize
    )
    degrader.check_domain(domain)
    _tell_of_small_tiles(degrader, tile)
    for reason in lost:
        print(f"skipped: {reason}", file=sys.stderr)
    failed = len(lost)
    for source, relative in tqdm(jobs, desc="degrading", unit="photo"):
        try:
            with _warnings_of(source):
                degrader.degrade_file(
                    source,
                    _targets(output, relative, arguments.samples),
                    temperature,
                    seed=_seed(arguments.seed, relative),
                    domain=domain,
                    tile=tile,
                )
        except (UnreadableImageError, ValueError, RuntimeError, MemoryError) as error:
            # RuntimeError is what torch raises when memory runs out: a smaller photo may still fit.
            # Other OSErrors come from writing (a full disk) and concern all photos.
            failed += 1
            reason = str(error).removeprefix(f"cannot read image {source}: ")
            tqdm.write(f"skipped {source}: {reason}", file=sys.stderr)
    total = len(jobs) + len(lost)
    done = total - failed
    print(f"{done} of {total} photos degraded into {output}" + f", {failed} skipped" * bool(failed))
    return 0 if not failed else 1 if done else 2


@contextmanager
def _warnings_of(photo: Path) -> Iterator[None]:
    """Warnings name the photo, each in one line."""

    def told(message: str) -> str:
        return f"{photo}: {' '.join(message.split())}"

    with warnings.catch_warnings(), warnings_above(told):
        # That a photo is large enough to be malicious; these are the user's own.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _domain(text: str | None) -> str | dict[str, float] | None:
    """A name as it is, and NAME=WEIGHT,... as weights by name."""
    if text is None or "=" not in text:
        return text
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        name = name.strip()
        try:
            value = float(weight)
        except ValueError:
            raise ValueError(
                f"--domain takes a name, 'random', or a mix such as low=0.5,vintage=0.5; {part!r} "
                "is no NAME=WEIGHT"
            ) from None
        if name in weights:
            raise ValueError(f"--domain names {name!r} twice")
        weights[name] = value
    return weights


def _tile(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"--tile takes auto or a number of pixels, got {text!r}")
    return int(text)


def _tell_of_small_tiles(degrader: DeFlowDegrader, tile: int | str) -> None:
    """They are right, but slow: what is computed around each of them is more than itself."""
    if not isinstance(tile, int) or not 0 < tile < SMALL:
        return
    from deflow_aug.tiling import padded

    side, halo = padded(tile, degrader.model.config.size_multiple), degrader.halo()
    if side < 2 * halo:
        warnings.warn(
            f"--tile {tile}: each tile of {side} pixels is computed with {halo} pixels around it, "
            f"{(1 + 2 * halo / side) ** 2:.0f} times the work of a photo at once, and results are "
            f"the same; {4 * halo} or more, or auto, is quicker",
            stacklevel=2,
        )


def _jobs(photos: list[Path]) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Each input file with the path of its result under the output folder, suffix still its own.

    And why there are none of some photos and folders: the others can be degraded all the same.
    """
    jobs: list[tuple[Path, Path]] = []
    lost: list[str] = []

    def refused(error: OSError) -> None:
        lost.append(f"cannot search the folder {error.filename}: {error.strerror}")

    for photo in photos:
        before = len(lost)
        try:
            if photo.is_dir():
                files = find_images(photo, refused)
                jobs += [(file, file.relative_to(photo)) for file in files]
                if not files and len(lost) == before:
                    lost.append(f"no image files in {photo}")
            elif photo.exists():
                jobs.append((photo, Path(photo.name)))
            else:
                lost.append(f"no file or folder {photo}")
        except OSError as error:
            lost.append(str(error))
    return jobs, lost


def _targets(output: Path, relative: Path, samples: int) -> list[Path]:
    """Where a photo's results are written."""
    numbers = [""] if samples == 1 else [f"_{number + 1}" for number in range(samples)]
    # Always PNG: a lossy format would degrade the result once more.
    return [output / relative.with_name(f"{relative.stem}{number}.png") for number in numbers]


def _check_targets(jobs: list[tuple[Path, Path]], output: Path, samples: int) -> None:
    """No result may overwrite a photo or another result."""
    # Not Path.resolve, which some versions of Python let fail where links lead in a circle.
    inputs = {Path(os.path.realpath(source)) for source, _ in jobs}
    folders = {path.parent for path in inputs}
    owners: dict[Path, list[Path]] = {}
    for source, relative in jobs:
        for target in _targets(output, relative, samples):
            # A file of that name beside the photos is taken for a photo too.
            place = Path(os.path.realpath(target))
            if place in inputs or (place.parent in folders and place.exists()):
                raise ValueError(
                    f"{target} would overwrite an input; choose another --output folder"
                )
            owners.setdefault(target, []).append(source)
    shared = {target: sources for target, sources in owners.items() if len(set(sources)) > 1}
    if shared:
        lines = [f"{target}: {', '.join(map(str, own))}" for target, own in shared.items()]
        raise ValueError(
            "several photos would be written to the same file; rename them, or degrade them into "
            "folders of their own:\n" + "\n".join(lines)
        )


def _seed(seed: int, relative: Path) -> int:
    """A seed of its own for each photo, the same whatever else is in the folder."""
    return (seed << 32) + zlib.crc32(relative.as_posix().encode())
