"""Train on two folders of your own: clean images and degraded ones, unpaired."""

from __future__ import annotations

import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # type: ignore[attr-defined]
from tqdm import tqdm

from deflow_aug.config import CLEAN, from_dict, to_dict
from deflow_aug.training.recipe import Recipe

if TYPE_CHECKING:
    from deflow_aug.training.loop import Progress, Trainer


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--clean", type=str, required=True, help="folder of clean images")
    parser.add_argument("--degraded", type=str, required=True, help="folder of degraded images")
    parser.add_argument(
        "--output", type=str, required=True, help="folder for weights, checkpoints and samples"
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in --output"
    )
    parser.add_argument(
        "--encoder-weights",
        type=str | None,
        default=None,
        metavar="FILE",
        help="RRDB (ESRGAN) weights, .pth or .safetensors, that the conditioning network of a new "
        "run starts from; model.encoder must have their channels, growth and blocks",
    )
    parser.add_argument(
        "--from",
        type=str | None,
        default=None,
        metavar="W",
        help="weights to fine-tune: bundled, a folder, or a Hugging Face Hub id. The model is "
        "theirs, whatever the settings say; only M starts anew, at model.shift_init",
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of settings")
    parser.add_class_arguments(Recipe, nested_key=None)


def run(arguments: Namespace) -> int:
    values = arguments.as_dict()
    recipe = from_dict(Recipe, {field.name: values[field.name] for field in fields(Recipe)})
    start = None
    if arguments["from"] is not None:
        from deflow_aug import hub

        start = hub.load(*hub.find_weights(arguments["from"])).model
        model = replace(start.config, shift_init=recipe.model.shift_init)
        recipe = replace(recipe, model=model)
    clean, degraded = Path(arguments.clean), Path(arguments.degraded)
    output = Path(arguments.output)
    if len(recipe.model.domains) != 1:
        raise ValueError(
            f"one degraded domain can be trained so far, got model.domains {recipe.model.domains}"
        )
    if clean.resolve() == degraded.resolve():
        raise ValueError(f"--clean and --degraded are the same folder, {clean}")

    from deflow_aug.data.unpaired import CropFolder, UnpairedBatches
    from deflow_aug.devices import resolve
    from deflow_aug.training.checkpoints import latest
    from deflow_aug.training.loop import Trainer
    from deflow_aug.training.samples import SampleSheet

    device = resolve(arguments.device)
    found = latest(output / "checkpoints")
    if found is None and (output / "config.json").exists():
        raise FileExistsError(f"{output} holds weights already; choose another --output folder")
    if found is not None and not arguments.resume:
        raise FileExistsError(
            f"{output} holds a checkpoint ({found.name}); give --resume to go on from it, or "
            "another --output folder"
        )
    if found is None and arguments.resume:
        warnings.warn(f"no checkpoint in {output}: starting anew", stacklevel=1)
    names = (CLEAN, *recipe.model.domains)
    domains = {
        name: CropFolder(folder, recipe.crop, recipe.model.scale)
        for name, folder in zip(names, (clean, degraded), strict=True)
    }
    for name, crops in domains.items():
        print(f"{name}: {len(crops.files)} images")
    batches = UnpairedBatches(domains, recipe.batch_size, recipe.seed)
    encoder = None if arguments.encoder_weights is None else Path(arguments.encoder_weights)
    trainer = Trainer(recipe, batches, output, device, encoder, start)
    if trainer.step:
        print(f"resumed at step {trainer.step}")
    sheet = SampleSheet(domains, recipe.seed)

    with tqdm(total=recipe.steps, initial=trainer.step, desc="training", unit="step") as bar:

        def show(progress: Progress) -> None:
            bar.update()
            bits = {name: f"{value:.3f}" for name, value in progress.bits.items()}
            bar.set_postfix(bits, skipped=progress.skipped, refresh=False)
            if progress.step % recipe.sample_every == 0 or progress.step == recipe.steps:
                sheet.write(trainer.average, output / "samples" / f"step-{progress.step:08d}.png")

        trainer.run(show)

    _release(trainer, domains, output, arguments["from"])
    print(f"weights in {output}: DeFlowDegrader.from_pretrained({str(output)!r})")
    return 0


def _release(
    trainer: Trainer, domains: dict[str, Any], output: Path, fine_tuned: str | None
) -> None:
    """Write the averaged weights, in float16, as a folder that from_pretrained loads."""
    from deflow_aug.degrader import DeFlowDegrader

    recipe = to_dict(trainer.recipe)
    del recipe["model"]  # it stands in config.json already
    training: dict[str, Any] = {
        "data": {
            name: {"folder": crops.folder.name, "images": len(crops.files), "pixels": crops.pixels}
            for name, crops in domains.items()
        },
        "recipe": recipe,
    }
    if fine_tuned is not None:
        training["fine_tuned_from"] = fine_tuned
    if trainer.encoder is not None:
        training["encoder_weights"] = trainer.encoder
    degrader = DeFlowDegrader(trainer.average, training=training, device="cpu")
    # The moving average knows its weights no better than float16 does.
    degrader.save_pretrained(output, half=True)
    # Written anew: one that is there comes from before this run was resumed.
    degrader.generate_model_card().save(output / "README.md")
