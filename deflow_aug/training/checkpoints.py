"""Checkpoints of a run: safetensors, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

BEST = "best.safetensors"
"""Name of the checkpoint with the lowest smoothed loss."""

CHUNK = 2**24
"""Bytes written at a time."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used or written; the message says why and what to do."""


class DamagedError(CheckpointError):
    """The file was read, and is not what :func:`save` wrote."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after ``step`` steps.

    Args:
        tensors: of the model, its average and the optimiser, on the CPU.
        recipe: the settings, as plain values.
        state: all else that the run needs to go on as if it had never stopped; JSON values.
    """

    step: int
    tensors: Mapping[str, Tensor]
    recipe: Mapping[str, Any]
    state: Mapping[str, Any]


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step-{step:08d}.safetensors"


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write ``step-XXXXXXXX.safetensors``: under another name first, which is then changed.

    A reader, and a run that is killed at any moment, finds the whole file or none.

    Raises:
        CheckpointError: if it cannot be written, as on a full disk; nothing of it is left, and
            what was there before is untouched.
    """
    path = path_of(folder, checkpoint.step)
    tensors = {name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}
    metadata = {
        "step": str(checkpoint.step),
        "recipe": json.dumps(checkpoint.recipe, sort_keys=True),
        "state": json.dumps(checkpoint.state, sort_keys=True),
    }
    metadata["crc32"] = _checksum(metadata, tensors)
    # Not save_file: killed, it leaves a temporary file with a name that nobody knows.
    data = safetensors.torch.save(tensors, metadata)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        before = latest(folder)
        kept = "there is none before it" if before is None else f"{before.name} is untouched"
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror or error}; it takes "
            f"{len(data) / 2**20:.1f} MiB); {kept}. Make room and go on with --resume"
        ) from error
    return path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, force it to the disk, and rename it."""
    temporary = path.with_suffix(".partial")
    try:
        with open(temporary, "wb") as file:
            for start in range(0, len(data), CHUNK):
                file.write(data[start : start + CHUNK])
            file.flush()
            os.fsync(file.fileno())
        _rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def keep_best(folder: Path, step: int) -> None:
    """Keep the checkpoint of this step under the name ``BEST``, whatever becomes of the others."""
    _copy(path_of(folder, step), folder / BEST)


def _copy(path: Path, to: Path) -> None:
    """Give a checkpoint a second name."""
    temporary = to.with_suffix(".partial")
    temporary.unlink(missing_ok=True)
    try:
        try:
            # A second name of the same file takes no room.
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        _rename(temporary, to)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be kept as {to.name} as well ({error.strerror or error})"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def tidy(folder: Path, keep: int, every: int) -> None:
    """Remove what a killed run left half-written, and old checkpoints.

    The newest is kept, and the last ``keep`` that are good (see :func:`good`) and at multiples of
    ``every`` steps: a run goes back to no other, so that it does not depend on where it was
    stopped.
    """
    for partial in folder.glob("*.partial"):
        partial.unlink()
    found = steps(folder)
    for step in set(found) - set(found[-1:]) - set(good(folder, every)[-keep:]):
        path_of(folder, step).unlink()


def steps(folder: Path) -> list[int]:
    """The steps that checkpoints are of, in order."""
    names = (path.stem.removeprefix("step-") for path in folder.glob("step-*.safetensors"))
    return sorted(int(name) for name in names if name.isdecimal())


def good(folder: Path, every: int) -> list[int]:
    """The steps, multiples of ``every``, of checkpoints whose state has a true ``"good"``."""
    return [s for s in steps(folder) if s % every == 0 and _state(path_of(folder, s)).get("good")]


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a folder, whatever state it is in; for want of any, the best one."""
    found = steps(folder)
    path = path_of(folder, found[-1]) if found else folder / BEST
    return path if path.exists() else None


def damaged(folder: Path) -> list[Path]:
    """What :func:`load_newest` has set aside."""
    return sorted(folder.glob("*.damaged"))


def load(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        DamagedError: if the file is not as :func:`save` wrote it, down to the last bit.
        CheckpointError: if it cannot be read.
    """
    try:
        metadata = _metadata(path)
        step = int(metadata["step"])
        recipe, state = json.loads(metadata["recipe"]), json.loads(metadata["state"])
        tensors = safetensors.torch.load_file(path)
        # Those of earlier versions have none.
        if metadata.get("crc32") not in (None, _checksum(metadata, tensors)):
            raise ValueError("its checksum is not that of its contents")
        return Checkpoint(step, tensors, recipe, state)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}); see to it, and try again"
        ) from error
    except (SafetensorError, KeyError, ValueError, TypeError, struct.error) as error:
        raise DamagedError(f"{path} is not a usable checkpoint ({error!r})") from error


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that can be loaded, or None in a folder without any.

    One that is damaged is renamed, with a warning, and the one before it is taken; at last the
    best one, which then goes by the name of its step as well.

    Raises:
        CheckpointError: if one cannot be read, or all that there are, or were, are damaged.
    """
    for path in (*(path_of(folder, step) for step in reversed(steps(folder))), folder / BEST):
        if not path.exists():
            continue
        try:
            found = load(path)
        except DamagedError as error:
            aside = path.with_suffix(".damaged")
            path.rename(aside)
            warnings.warn(
                f"{error}; it is set aside as {aside.name}, and the one before is used, if any",
                stacklevel=2,
            )
            continue
        if path.name == BEST:
            warnings.warn(
                f"no other checkpoint in {folder} can be used: going on from {BEST}, of step "
                f"{found.step}",
                stacklevel=2,
            )
            _copy(path, path_of(folder, found.step))
        return found
    if aside_ones := damaged(folder):
        raise CheckpointError(
            f"none of the {len(aside_ones)} checkpoints in {folder} can be loaded "
            f"({', '.join(path.name for path in aside_ones)}); choose another output folder, or "
            "remove them and the log to start anew"
        )
    return None


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
    optimizer.state.clear()
    for parameter, name in names.items():
        state = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            saved = tensors.get(f"optimizer.{key}.{name}")
            if saved is not None:
                # Of memory of its own: Adam writes to all of these in place.
                like = saved if key == "step" else parameter
                state[key] = torch.empty_like(like, device=parameter.device).copy_(saved)
        if state:
            optimizer.state[parameter] = state


def _state(path: Path) -> Mapping[str, Any]:
    """The state alone, without reading the tensors; empty if the file is damaged."""
    try:
        state: Mapping[str, Any] = json.loads(_metadata(path)["state"])
        return state
    except (OSError, KeyError, ValueError, TypeError, struct.error):
        return {}


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """CRC-32, as hex digits, of all that a checkpoint holds."""
    value = 0
    for key in ("step", "recipe", "state"):
        value = zlib.crc32(metadata[key].encode(), value)
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _metadata(path: Path) -> dict[str, str]:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        header: dict[str, Any] = json.loads(file.read(length))
    metadata: dict[str, str] = header["__metadata__"]
    return metadata


def _rename(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    if os.name == "posix":
        # The new name itself is on the disk when its folder is.
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
