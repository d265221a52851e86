"""The command line, ``deflow-aug``: a module a command, with ``add_arguments`` and ``run``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from jsonargparse import ArgumentParser

import deflow_aug
from deflow_aug.cli import convert, degrade, info, train

COMMANDS = {"degrade": degrade, "train": train, "info": info, "convert": convert}


def parser() -> ArgumentParser:
    """The parser of all commands."""
    top = ArgumentParser(
        prog="deflow-aug",
        description="Learned, stochastic image degradations.",
        version=f"deflow-aug {deflow_aug.__version__}",
    )
    commands = top.add_subcommands(dest="command")
    for name, module in COMMANDS.items():
        description = (module.__doc__ or "").strip().splitlines()[0]
        sub = ArgumentParser(description=description)
        module.add_arguments(sub)
        commands.add_subcommand(name, sub, help=description)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0 if all of it was done, 1 if some of it, 2 if none."""
    arguments = parser().parse_args(argv)
    command = arguments["command"]
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        return COMMANDS[command].run(arguments[command])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        # What a user can mend; anything else is a bug and keeps its traceback.
        print(f"deflow-aug {command}: {error}", file=sys.stderr)
        return 2
