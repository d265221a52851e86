"""Train on folders of your own: clean and degraded images, unpaired, paired, or both."""

from __future__ import annotations

import json
import os
import sys
import warnings
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # type: ignore[attr-defined]
from tqdm import tqdm

from deflow_aug.cli.places import existing_file, output_folder
from deflow_aug.cli.progress_bar import warnings_above
from deflow_aug.config import ConfigError
from deflow_aug.training import plan as plans
from deflow_aug.training import recipes

if TYPE_CHECKING:
    from deflow_aug.training.loop import Progress, Trainer
    from deflow_aug.training.tracking import Watch

FOLDERS = ("--clean", "--degraded", "--paired")
"""Flags that may be given again."""

UNSET: dict[str, Any] = {
    "output": None,
    "resume": False,
    "release": None,
    "device": "auto",
    "cache_dir": None,
    "tensorboard": False,
    "card_samples": True,
}
"""What flags that are no part of a plan are when they are not given."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        metavar="RECIPE",
        help=f"settings: a YAML file, or one of {', '.join(recipes.bundled())}; flags win, "
        "wherever they stand, and so does a later --config over an earlier one",
    )
    # Of this machine and this call: without values here, they stay out of --print_config.
    parser.add_argument(
        "--output",
        type=str | None,
        default=SUPPRESS,
        help="folder for weights, checkpoints and pictures (required)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        default=SUPPRESS,
        help="go on from the last checkpoint in --output, with the settings and folders of that "
        "run: no other flag is needed",
    )
    parser.add_argument(
        "--release",
        type=str | int | None,
        default=SUPPRESS,
        metavar="best|last|STEP",
        help="train nothing: write the weights and the card of a checkpoint of the run in --output",
    )
    parser.add_argument(
        "--device", type=str, default=SUPPRESS, help="auto (default), cpu, cuda, cuda:1, ..."
    )
    parser.add_argument(
        "--cache-dir",
        type=str | None,
        default=SUPPRESS,
        metavar="DIR",
        help="keep decoded images in this folder, not in memory; runs may share it",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        default=SUPPRESS,
        help="write OUTPUT/tensorboard as well",
    )
    parser.add_argument(
        "--card-samples",
        type=bool,
        default=SUPPRESS,
        help="whether the model card shows samples, which are pieces of your photographs "
        "(default: true)",
    )
    plans.add_arguments(parser)


def arrange(words: Sequence[str]) -> list[str]:
    """The words of the command in the order in which they are to be read.

    Settings files first, that of a run that is resumed before the others, so that flags win;
    the folders of a flag that is given again in one list.

    Raises:
        ConfigError: if there is no recipe of a name.
    """
    values: dict[str, list[str]] = {flag: [] for flag in ("--config", "--output", *FOLDERS)}
    command, *waiting = words
    rest = []
    while waiting:
        flag, equals, value = waiting.pop(0).partition("=")
        if flag not in values:
            rest.append(flag + equals + value)
        elif equals:
            values[flag].append(value)
        elif waiting and not waiting[0].startswith("-"):
            values[flag].append(waiting.pop(0))
        else:
            rest.append(flag)
    configs = [str(recipes.find(name)) for name in values["--config"]]
    if "--resume" in rest and values["--output"]:
        started = Path(values["--output"][-1]) / plans.FILE
        if started.exists():
            configs.insert(0, str(started))
    return [
        command,
        *(word for path in configs for word in ("--config", path)),
        *(f"--output={value}" for value in values["--output"]),
        *(f"{flag}={json.dumps(values[flag])}" for flag in FOLDERS if values[flag]),
        *rest,
    ]


def run(arguments: Namespace) -> int:
    values = UNSET | arguments.as_dict()
    if values["output"] is None:
        raise ConfigError("--output DIR is missing: the folder for weights and checkpoints")
    output = Path(values["output"])
    if values["release"] is not None:
        return _release_checkpoint(output, str(values["release"]), values["card_samples"])
    from deflow_aug.training.processes import sigterm_interrupts

    with sigterm_interrupts():
        return _train_and_release(values, output)


def _train_and_release(values: Mapping[str, Any], output: Path) -> int:
    """All of a run, or what is left of it."""
    main = int(os.environ.get("RANK", "0")) == 0
    if not main:  # one process of several speaks for all
        warnings.simplefilter("ignore")

    from deflow_aug import hub
    from deflow_aug.devices import resolve
    from deflow_aug.training import checkpoints, processes
    from deflow_aug.training.loop import Trainer
    from deflow_aug.training.release import Outcome, is_released, release
    from deflow_aug.training.samples import SampleSheet
    from deflow_aug.training.sources import open_sources
    from deflow_aug.training.tracking import Watch, require_tensorboard

    if values["tensorboard"]:
        require_tensorboard()
    _check_places(values)
    newest = checkpoints.latest(output / "checkpoints")
    if main:
        _check_output(output, newest, values["resume"])
    start = None
    if newest is not None:
        _check_start(output / plans.FILE, values)
    # A run that is taken up has its model; one from before plans were kept has it from W.
    if values["from"] is not None and (newest is None or not (output / plans.FILE).exists()):
        start = hub.load(*hub.find_weights(values["from"])).model
    plan = plans.make(values, None if start is None else start.config)
    recipe, cache = plan.recipe, values["cache_dir"]
    sources = open_sources(
        plan, int(os.environ.get("WORLD_SIZE", "1")), None if cache is None else Path(cache)
    )
    several = processes.launched()
    device = None if several and values["device"] == "auto" else resolve(values["device"])
    trainer = Trainer(
        recipe,
        sources.unpaired,
        output,
        accelerator=device,
        encoder=None if plan.encoder is None else Path(plan.encoder),
        start=start,
        paired=sources.paired,
    )
    if not main:
        finished = trainer.run(lambda progress: None)
        return 130 if not finished else 0 if trainer.state.wrecked is None else 1
    done = trainer.step == recipe.steps and trainer.state.finished
    if done and is_released(output, trainer.step):
        print(f"all {trainer.step} steps were taken before, and nothing is changed: {output}")
        return 0

    if trainer.step < recipe.steps or not (output / plans.FILE).exists():
        plan.write(output / plans.FILE)
    print(f"data: {sources}")
    if start is not None:
        _tell_domains(start.config.domains, recipe.model.domains)
    if newest is not None:
        print(f"resumed at step {trainer.step}")
    sheet = SampleSheet(sources.crops(recipe.model.domains, recipe.seed), recipe.seed)
    watch = Watch(trainer, sheet, tensorboard=values["tensorboard"])
    try:
        try:
            finished = _train(trainer, watch)
            picture = watch.finish() if finished else None
        finally:
            watch.close()
        wrecked = finished and trainer.state.wrecked is not None
        if finished and not wrecked:
            release(Outcome.of(trainer), plan.start, picture if values["card_samples"] else None)
    except KeyboardInterrupt:
        finished = False
    if not finished:
        _tell_stopped(trainer, output)
        return 130
    if wrecked:
        _tell_wrecked(trainer, output)
        return 1
    _tell_noise(watch, picture)
    print(f"weights in {output}: DeFlowDegrader.from_pretrained({str(output)!r})")
    print(
        f"to share them: .push_to_hub('you/name'), which sends weights and facts alone. {output} "
        "itself holds pieces of your photographs, in samples/"
        + " and in the card's samples.png"
        * values["card_samples"]
    )
    return 0


def _train(trainer: Trainer, watch: Watch) -> bool:
    """Run to the end, with a progress bar; False if it was stopped."""
    bits: dict[str, str] = {}
    with tqdm(
        total=trainer.recipe.steps, initial=trainer.step, desc="training", unit="step"
    ) as bar:

        def show(progress: Progress) -> None:
            bar.update()
            # Names stay in their places though not every step has all of them.
            bits.update({name: f"{value:.3f}" for name, value in progress.bits.items()})
            bar.set_postfix(bits, skipped=progress.skipped, refresh=False)
            watch(progress)

        with warnings_above():
            return trainer.run(show)


def _tell_stopped(trainer: Trainer, output: Path) -> None:
    """What there is of a run that was stopped, and how it goes on."""
    from deflow_aug.training import checkpoints

    saved = checkpoints.steps(trainer.folder)
    told, steps = "stopped before the first checkpoint", trainer.recipe.steps
    if saved:
        told = f"stopped at step {saved[-1]} of {steps}"
        if saved[-1] == steps:
            told = f"stopped after all {steps} steps, before the release was complete"
        told += f"; checkpoint {checkpoints.path_of(trainer.folder, saved[-1])}"
        if trainer.step > saved[-1]:
            told += f" (interrupted at step {trainer.step}: those since are taken again)"
    print(f"{told}\ngo on with: deflow-aug train --resume --output {output}")


def _tell_noise(watch: Watch, picture: Path | None) -> None:
    """What noise samples have, and whether it is that of the photographs."""
    for domain, one in watch.compared.items():
        print(
            f"noise in flat areas of samples in {domain}: {one.samples}, of its photographs: "
            f"{one.photographs} (standard deviation in 1/255, correlation of neighbours)"
        )
        if one.far_apart:
            look = "" if picture is None else f" Look at {picture}."
            warnings.warn(
                f"the noise of samples in {domain} is far from that of its photographs: do not "
                f"train on these weights yet.{look} {watch.steps} steps may be too few: --resume "
                "--steps N goes on. If more change nothing, the folders differ in more than their "
                "noise ('Your own camera' in the README tells what must match)",
                stacklevel=1,
            )


def _tell_wrecked(trainer: Trainer, output: Path) -> None:
    """Why there are no weights, and what can be done."""
    from deflow_aug.training.checkpoints import BEST

    recipe, before = trainer.recipe, (output / "config.json").exists()
    best = "best" if (trainer.folder / BEST).exists() else "STEP"
    print(
        f"no weights are released: {trainer.state.wrecked}. The training has failed, though all "
        f"{trainer.step} steps were taken; see {output}/log.jsonl. What to do: train anew, in "
        f"another --output folder, with a lower --lr (it was {recipe.lr:g}) or a longer --warmup "
        f"(it was {recipe.warmup}). The checkpoints are kept: 'deflow-aug train --output {output} "
        f"--release {best}' writes the weights of one, and --resume --steps N goes on"
        + "; the weights that are there are those of an earlier end"
        * before,
        file=sys.stderr,
    )


def _release_checkpoint(output: Path, which: str, samples: bool) -> int:
    """Write weights and card of a checkpoint, in place of those that the folder may have."""
    from deflow_aug.training.release import UNCORRECTED, Outcome, release

    outcome = Outcome.at(output, which)
    plan = output / plans.FILE
    start = plans.read(plan)["from"] if plan.exists() else None
    release(outcome, start, outcome.sheet if samples else None)
    note = f" (the shifts are {UNCORRECTED})" * outcome.uncorrected
    print(f"weights of step {outcome.step} of {outcome.recipe.steps} in {output}{note}")
    return 0


def _check_places(values: Mapping[str, Any]) -> None:
    """What is wrong with them shall be told before the data are looked through."""
    output = output_folder("--output", values["output"])
    if values["cache_dir"] is not None:
        output_folder("--cache-dir", values["cache_dir"])
    # Of a run that goes on, the file is no longer needed.
    if values["encoder_weights"] is not None and not (output / plans.FILE).exists():
        expected = "RRDB (ESRGAN) weights, a .pth or .safetensors file"
        existing_file("--encoder-weights", values["encoder_weights"], expected)


def _check_output(output: Path, newest: Path | None, resume: bool) -> None:
    """Nobody's weights may be overwritten, nor what is left of a run."""
    from deflow_aug.training.resuming import refuse_anew

    if newest is None and (output / "config.json").exists():
        raise FileExistsError(f"{output} holds weights already; choose another --output folder")
    if newest is not None and not resume:
        raise FileExistsError(
            f"{output} holds a checkpoint ({newest.name}); give --resume to go on from it, or "
            "another --output folder"
        )
    if newest is None:
        refuse_anew(output)
    if newest is None and resume:
        warnings.warn(f"no checkpoint in {output}: starting anew", stacklevel=1)


def _check_start(file: Path, values: Mapping[str, Any]) -> None:
    """What a resumed run started from stays; folders may have moved, which is told."""
    if not file.exists():
        return
    before = plans.read(file)
    for name in ("from", "encoder_weights"):
        if not plans.same_place(values[name], before[name]):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"this run started with {flag} {before[name]}, not {values[name]}; leave the flag "
                "out, or choose another --output folder"
            )
    for flag in FOLDERS:
        name = flag.strip("-")
        if not plans.same_folders(values[name], before[name]):
            warnings.warn(
                f"the run started with {flag} {before[name]} and goes on with {values[name]}",
                stacklevel=1,
            )


def _tell_domains(before: Sequence[str], now: Sequence[str]) -> None:
    """Which shifts a fine-tuned model keeps."""
    for text, names in (
        ("new domains, with a shift of their own", [name for name in now if name not in before]),
        ("domains of the weights without data, left out", [n for n in before if n not in now]),
    ):
        if names:
            print(f"{text}: {', '.join(names)}")
