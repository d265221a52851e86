"""Checkpoints of a run: safetensors, written whole or not at all."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

KEPT = 2


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why and what to do."""


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    recipe: Mapping[str, object],
    start: str | None = None,
) -> Path:
    """Write ``step-XXXXXXXX.safetensors`` under a temporary name, rename it, drop older ones.

    Args:
        start: name of the weights that the run started from, if it did.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    temporary = path.with_suffix(".partial")
    metadata = {"step": str(step), "recipe": json.dumps(recipe, sort_keys=True)}
    if start is not None:
        metadata["start"] = start
    try:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary, metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for old in _all(folder)[:-KEPT]:
        old.unlink()
    return path


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder."""
    found = _all(folder)
    return found[-1] if found else None


def load(path: Path) -> tuple[int, dict[str, Tensor], dict[str, object], str | None]:
    """Step, tensors, recipe and start of a checkpoint, as :func:`save` got them.

    Raises:
        CheckpointError: if the file is not a checkpoint that :func:`save` wrote.
    """
    try:
        tensors = load_file(path)
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            metadata = json.loads(file.read(length))["__metadata__"]
        step, recipe = int(metadata["step"]), json.loads(metadata["recipe"])
        return step, tensors, recipe, metadata.get("start")
    except (SafetensorError, KeyError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path} is not a usable checkpoint ({error}); remove it to go on from the one before"
        ) from error


def pack_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> dict[str, Tensor]:
    """The optimiser's state as named tensors."""
    return {
        f"optimizer.{key}.{names[parameter]}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]
) -> None:
    """Restore what :func:`pack_optimizer` gave."""
    for parameter, name in names.items():
        state = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            saved = tensors.get(f"optimizer.{key}.{name}")
            if saved is not None:
                # Adam keeps its step count on the CPU.
                state[key] = saved if key == "step" else saved.to(parameter.device)
        if state:
            optimizer.state[parameter] = state


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"))
