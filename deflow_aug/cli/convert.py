"""Convert a published DeFlow checkpoint (.pth) to a folder that from_pretrained loads."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from deflow_aug.cli.places import existing_file, output_folder
from deflow_aug.config import ChannelStatistics

if TYPE_CHECKING:
    from deflow_aug.model import DeFlow


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=str, help="the .pth file")
    parser.add_argument("--output", type=str, required=True, help="folder for the weights")
    parser.add_argument(
        "--scale",
        type=int | None,
        default=None,
        help="downsampling factor of h(x), where the tensors do not tell: 2 looks like 4",
    )
    parser.add_argument(
        "--statistics",
        type=str | None,
        default=None,
        metavar="FILE",
        help="the YAML file that came with a checkpoint trained with channel statistics (AIM's)",
    )
    for field in fields(ChannelStatistics):
        domain, _, moment = field.name.partition("_")
        parser.add_argument(
            f"--{field.name}",
            nargs=3,
            type=float,
            metavar=("R", "G", "B"),
            help=f"in place of --statistics: {moment} of {domain} images in [0, 1]",
        )


def run(arguments: Namespace) -> int:
    output = output_folder("--output", arguments.output)
    checkpoint = existing_file("CHECKPOINT", arguments.checkpoint, "a .pth or .safetensors file")
    if (output / "config.json").exists():
        raise FileExistsError(f"{output} holds weights already; choose another --output folder")

    from deflow_aug import hub
    from deflow_aug.convert import convert_published, load_checkpoint
    from deflow_aug.degrader import DeFlowDegrader

    statistics = _statistics(arguments)
    converted = convert_published(
        load_checkpoint(checkpoint), scale=arguments.scale, statistics=statistics
    )
    model = hub.build(converted.config, converted.state, checkpoint)
    training = {"notes": _notes(model), "converted_from": checkpoint.name}
    DeFlowDegrader(model, training=training, device="cpu").save_pretrained(output)
    dropped = ", ".join(converted.dropped) or "none"
    print(f"tensors that play no part and were left out: {dropped}")
    print(f"weights in {output}: DeFlowDegrader.from_pretrained({str(output)!r})")
    return 0


def _statistics(arguments: Namespace) -> ChannelStatistics | None:
    """From the file or the four flags, whichever is given; None if none is."""
    from deflow_aug.convert import published_statistics

    names = [field.name for field in fields(ChannelStatistics)]
    given = {name: tuple(arguments[name]) for name in names if arguments[name] is not None}
    flags = ", ".join(f"--{name}" for name in names)
    if arguments.statistics is not None:
        if given:
            raise ValueError(f"give --statistics, or {flags}, not both")
        file = existing_file("--statistics", arguments.statistics, "a YAML file")
        return published_statistics(file)
    if given and len(given) < len(names):
        missing = ", ".join(f"--{name}" for name in names if name not in given)
        raise ValueError(f"{flags} belong together; missing: {missing}")
    return ChannelStatistics(**given) if given else None


def _notes(model: DeFlow) -> str:
    """What a user must know of this very checkpoint, for its card."""
    from deflow_aug.latent import ShiftHealth

    origin = "Converted from a checkpoint of the published implementation."
    healths = [ShiftHealth.of(shift, 1) for shift in model.domain_shifts()]
    largest = ", ".join(f"{health.eigenvalues[0]:.3g}" for health in healths)
    spectrum = f"largest eigenvalue of Sigma = M M^T in each latent: {largest}"
    if all(health.collapsed for health in healths):
        exactly = all(health.eigenvalues[0] == 0 for health in healths)
        return (
            f"{origin} Its M is {'zero' if exactly else f'nearly zero ({spectrum})'}: the "
            "latents of every image are shifted by the same amount, and samples of one image "
            "differ only by dequantisation noise, which "
            "`DeFlowDegrader.from_pretrained(..., dequantize=True)` and "
            "`deflow-aug degrade --dequantize` switch on."
        )
    return f"{origin} Its M is not zero ({spectrum}): its latent shift is random by itself."
