"""The command line, ``deflow-aug``: a module a command, with ``add_arguments`` and ``run``.

The module of a command is imported when the command is given, so that ``--help`` need not wait
for PyTorch. A module may also have ``arrange``, which puts the command's words into the order in
which they are to be read.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from jsonargparse import ArgumentParser

import deflow_aug

COMMANDS = {
    "degrade": "Degrade photographs: files, or whole folders whose tree is kept.",
    "train": "Train on folders of your own: clean and degraded images, unpaired, paired, or both.",
    "adapt": "Add a camera to trained weights from a few degraded photographs, without training.",
    "suggest": "Suggest s, the downsampling factor of the conditioning, for two folders.",
    "evaluate": "Measure how real degradations are: on pairs, or against real photographs without ground truth.",  # noqa: E501
    "info": "Tell what weights are: settings, size, training data, health of the latent shift.",
    "convert": "Convert a published DeFlow checkpoint (.pth) to a folder that from_pretrained loads.",  # noqa: E501
}
"""What each command does: the first line of its module, ``deflow_aug.cli.<name>``."""

SHARE_CORES = {"degrade"}
"""Commands that many processes of one machine run at once."""


def parser(command: str | None = None) -> ArgumentParser:
    """The parser of all commands; if one is named, only that one's arguments are in it."""
    top = ArgumentParser(
        prog="deflow-aug",
        description="Learned, stochastic image degradations.",
        version=deflow_aug.__version__,
    )
    commands = top.add_subcommands(dest="command")
    for name, description in COMMANDS.items():
        sub = ArgumentParser(description=description)
        if command in (None, name):
            module(name).add_arguments(sub)
        commands.add_subcommand(name, sub, help=description)
    return top


def module(command: str) -> ModuleType:
    """The module of a command."""
    return import_module(f"deflow_aug.cli.{command}")


def sleep_while_waiting() -> None:
    """Makes threads of PyTorch that wait for each other sleep soon, unless the user decided that.

    GNU's OpenMP lets them spin for milliseconds. Beside another process on the same cores they
    wait thousands of times for a thread that cannot run meanwhile: without this, two processes on
    two cores took 2 to 6 times as long. It has to be said before PyTorch is loaded.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = "1000"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0 if all of it was done, 1 if some of it, 2 if none."""
    words = list(sys.argv[1:] if argv is None else argv)
    # The top parser has no options with values: the first bare word is the command.
    command = next((word for word in words if not word.startswith("-")), "")
    if command in SHARE_CORES and "torch" not in sys.modules:
        sleep_while_waiting()
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        if command in COMMANDS and hasattr(module(command), "arrange"):
            words = module(command).arrange(words)
        arguments = parser(command).parse_args(words)
        status: int = module(command).run(arguments[command])
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        # What a user can mend, missing packages of extras too; anything else is a bug and keeps
        # its traceback.
        print(f"deflow-aug {command}: {told(error)}", file=sys.stderr)
        return 2


def told(error: Exception) -> str:
    """An error in words: the system's own without their number."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)
