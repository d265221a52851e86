"""Add a camera to trained weights from a few degraded photographs, without training."""

from __future__ import annotations

import time
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

from deflow_aug.cli.places import output_folder
from deflow_aug.hub import DEFAULT_WEIGHTS
from deflow_aug.image_folders import find_images


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "weights",
        nargs="?",
        type=str,
        default=DEFAULT_WEIGHTS,
        help="name of bundled weights, a folder, or a Hugging Face Hub id",
    )
    parser.add_argument(
        "--degraded", type=str, required=True, help="folder of photographs of the new camera"
    )
    parser.add_argument("--name", type=str, required=True, help="of the new domain")
    parser.add_argument("--output", type=str, required=True, help="folder for the new weights")
    parser.add_argument(
        "--clean",
        type=str | None,
        default=None,
        help="folder of clean images of like content; without, clean latents count as N(0, I)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=0,
        help="steps of maximum likelihood on the new domain's M after the closed form; without "
        "--clean the closed form is the maximum already",
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=2.0,
        help="a photograph whose noise is above this many times the median counts as that noisy; "
        "0: no limit",
    )
    parser.add_argument(
        "--photographs", type=int, default=64, help="of a larger folder, this many are drawn"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise and of what is drawn")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")


def run(arguments: Namespace) -> int:
    output = output_folder("--output", arguments.output)
    if (output / "config.json").exists():
        raise FileExistsError(f"{output} holds weights already; choose another --output folder")
    if arguments.clean is not None:
        folders = Path(arguments.clean).resolve(), Path(arguments.degraded).resolve()
        if folders[0] == folders[1]:
            raise ValueError(f"--clean and --degraded are the same folder, {arguments.clean}")
        find_images(arguments.clean)  # what is wrong with it is found before it is its turn

    from deflow_aug.adaptation import adapt
    from deflow_aug.degrader import DeFlowDegrader

    degrader = DeFlowDegrader.from_pretrained(arguments.weights, device=arguments.device)
    started = time.perf_counter()
    with tqdm(desc="photographs", unit="photo") as bar:

        def show(side: str, count: int) -> None:
            bar.set_postfix_str(side, refresh=False)
            bar.update()

        adapted = adapt(
            degrader,
            arguments.degraded,
            name=arguments.name,
            clean=arguments.clean,
            steps=arguments.steps,
            limit=arguments.limit or None,
            photographs=arguments.photographs,
            seed=arguments.seed,
            progress=show,
        )
    seconds = time.perf_counter() - started
    facts = adapted.training_info["adapted"][arguments.name]
    local = Path(arguments.weights)
    facts["from"] = local.resolve().name if local.is_dir() else arguments.weights
    adapted.save_pretrained(output)
    used, levels = facts["degraded"], facts["noise_levels"]
    print(
        f"{arguments.name}: fitted to {used['images']} photographs in {seconds:.0f} s"
        + f", {used['left_out']} left out" * bool(used["left_out"])
    )
    print(
        f"noise of the photographs (variance that it adds to the latents): median "
        f"{levels['median']:.2f}, from {levels['lowest']:.2f} to {levels['highest']:.2f}"
        + f"; {levels['scaled_down']} scaled down to {arguments.limit:g} times the median"
        * bool(levels["scaled_down"])
    )
    print(
        f"weights in {output}: DeFlowDegrader.from_pretrained({str(output)!r})"
        f".degrade(image, domain={arguments.name!r})"
    )
    return 0
