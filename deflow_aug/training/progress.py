"""What a run tells of its steps, and the log that it is written to."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

SMOOTHING = 0.99
"""What a running mean keeps of itself with each further value."""


@dataclass(frozen=True)
class Progress:
    """What one step did.

    Args:
        step: counted from 1.
        bits: bits per dimension by domain, over all processes; of pairs, under
            ``"<domain>|clean"``, of the degraded image given the clean one.
        gradient_norm: before clipping.
        lr: the learning rate.
        skipped: steps so far that changed nothing, the outliers among them.
        outliers: steps so far that were skipped for their gradient's norm.
        rolled_back: how often the run went back to an earlier state so far.
        seconds: of the whole step.
        waiting: seconds of these in which the step waited for its data.
    """

    step: int
    bits: Mapping[str, float]
    gradient_norm: float
    lr: float
    skipped: int
    outliers: int
    rolled_back: int
    seconds: float
    waiting: float


@dataclass
class Smoothed:
    """A running mean whose memory fades over a hundred values or so."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> None:
        self.total += (value - self.total) * (1 - SMOOTHING)
        self.weight += (1 - self.weight) * (1 - SMOOTHING)

    @property
    def value(self) -> float | None:
        """None before the first value."""
        return self.total / self.weight if self.weight else None

    @property
    def state(self) -> tuple[float, float]:
        return self.total, self.weight


def means(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """The mean of the values of each name, in the order in which they first come."""
    chosen: dict[str, list[float]] = {}
    for name, value in zip(names, values, strict=True):
        chosen.setdefault(name, []).append(value)
    return {name: sum(all_) / len(all_) for name, all_ in chosen.items()}


class Log:
    """A file of JSON lines, one a step: a :class:`Progress`, with null for what is not finite.

    Args:
        path: the file; what it has of steps after ``step``, and a line cut short, are dropped.
        step: the step that a run is at.
    """

    def __init__(self, path: Path, step: int) -> None:
        if path.exists():
            kept = [line for line in path.read_bytes().splitlines() if _step(line) <= step]
            temporary = path.with_suffix(".partial")
            temporary.write_bytes(b"".join(line + b"\n" for line in kept))
            os.replace(temporary, path)
        # Line by line, so that a run that is killed has told all it did.
        self.file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.file.close()

    def write(self, progress: Progress) -> None:
        self.file.write(json.dumps(_finite(asdict(progress)), allow_nan=False) + "\n")

    def sync(self) -> None:
        """Force it to the disk: a checkpoint must not be ahead of the log."""
        self.file.flush()
        os.fsync(self.file.fileno())


def _step(line: bytes) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
