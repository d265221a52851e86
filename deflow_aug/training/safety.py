"""What a run does about bad steps: skip them, and go back if they do not end."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

HISTORY = 100
"""Gradient norms that an outlier is told by."""

ENOUGH = 20
"""Norms that must be known before any is called an outlier."""

IN_A_ROW = 10
"""Bad steps in a row after which a run goes back."""

WINDOW, IN_WINDOW = 100, 30
"""So many bad ones among the last ``WINDOW`` steps send a run back as well."""

ROLLBACKS = 5
"""Returns to a checkpoint, each halving the learning rate, before a run is given up."""


class Verdict(Enum):
    """What a step's loss and gradient are worth."""

    GOOD = "good"
    NOT_FINITE = "not finite"
    OUTLIER = "outlier"


@dataclass
class Safety:
    """The judge of steps: counts the bad ones and says when to go back.

    A step is bad if its loss or gradient is not finite, or if its gradient norm is more than
    ``outlier_factor`` times the median of the last ``HISTORY`` finite ones (outliers included, so
    that gradients which have grown for good are outliers only until the median has followed).

    Args:
        outlier_factor: 0 calls nothing an outlier.
        norms: the last finite gradient norms.
        bad: of each of the last ``WINDOW`` steps, whether it was bad.
        skipped: bad steps of the whole run.
        outliers: those of them that were outliers.
        rollbacks: how often the run went back.
    """

    outlier_factor: float
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    bad: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))
    skipped: int = 0
    outliers: int = 0
    rollbacks: int = 0

    @property
    def lr_factor(self) -> float:
        """What the recipe's learning rate is multiplied by."""
        return 0.5**self.rollbacks

    def judge(self, bits: Sequence[float], norm: float) -> Verdict:
        """Judge a step and count it.

        Args:
            bits: the loss of every item.
            norm: of the gradient, before clipping.
        """
        verdict = Verdict.GOOD
        if not math.isfinite(norm) or not all(map(math.isfinite, bits)):
            verdict = Verdict.NOT_FINITE
        else:
            known = len(self.norms) >= ENOUGH
            if (
                self.outlier_factor
                and known
                and norm > self.outlier_factor * statistics.median(self.norms)
            ):
                verdict = Verdict.OUTLIER
                self.outliers += 1
            self.norms.append(norm)
        self.bad.append(verdict is not Verdict.GOOD)
        self.skipped += self.bad[-1]
        return verdict

    @property
    def lost(self) -> bool:
        """Skipping does not help any more: go back."""
        return sum(self.bad) >= IN_WINDOW or (
            len(self.bad) >= IN_A_ROW and all(list(self.bad)[-IN_A_ROW:])
        )

    @property
    def calm(self) -> bool:
        """The last steps were all good: a checkpoint of now is one to go back to."""
        return not any(list(self.bad)[-IN_A_ROW:])

    @property
    def mostly_good(self) -> bool:
        """At least half of the last steps were good, if there were any."""
        last = list(self.bad)[-IN_A_ROW:]
        return 2 * sum(last) <= len(last)

    def go_back(self, norms: Sequence[float]) -> None:
        """Count a rollback to a state that had these norms, and start watching anew."""
        self.rollbacks += 1
        self.norms = deque(norms, HISTORY)
        self.bad.clear()

    def state(self) -> dict[str, Any]:
        """JSON-ready; :meth:`restore` takes it back."""
        return {
            "norms": list(self.norms),
            "bad": [int(value) for value in self.bad],
            "skipped": self.skipped,
            "outliers": self.outliers,
            "rollbacks": self.rollbacks,
        }

    @classmethod
    def restore(cls, outlier_factor: float, state: dict[str, Any]) -> Safety:
        """What :meth:`state` told, in a run with this ``outlier_factor``."""
        return cls(
            outlier_factor,
            deque(state["norms"], HISTORY),
            deque(map(bool, state["bad"]), WINDOW),
            state["skipped"],
            state["outliers"],
            state["rollbacks"],
        )
