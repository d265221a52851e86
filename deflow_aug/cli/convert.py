"""Convert a published DeFlow checkpoint (.pth) to a folder that from_pretrained loads."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=str, help="the .pth file")
    parser.add_argument("--output", type=str, required=True, help="folder for the weights")
    parser.add_argument(
        "--scale",
        type=int | None,
        default=None,
        help="downsampling factor of h(x), where the tensors do not tell: 2 looks like 4",
    )


def run(arguments: Namespace) -> int:
    checkpoint, output = Path(arguments.checkpoint), Path(arguments.output)
    if (output / "config.json").exists():
        raise FileExistsError(f"{output} holds weights already; choose another --output folder")

    from deflow_aug import hub
    from deflow_aug.convert import convert_published, load_checkpoint
    from deflow_aug.degrader import DeFlowDegrader

    converted = convert_published(load_checkpoint(checkpoint), scale=arguments.scale)
    training = {
        "notes": "Converted from a checkpoint of the published implementation. Its M is zero "
        "unless it was trained with another start: samples of one image then differ only by "
        "dequantisation noise, which `from_pretrained(..., dequantize=True)` switches on.",
        "converted_from": checkpoint.name,
    }
    model = hub.build(converted.config, converted.state, checkpoint)
    DeFlowDegrader(model, training=training, device="cpu").save_pretrained(output)
    dropped = ", ".join(converted.dropped) or "none"
    print(f"tensors that play no part and were left out: {dropped}")
    print(f"weights in {output}: DeFlowDegrader.from_pretrained({str(output)!r})")
    return 0
