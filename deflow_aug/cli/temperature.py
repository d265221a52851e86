"""The strength of degradations, as commands take it."""

from __future__ import annotations

import math
import warnings

HIGHEST = 3.0
"""Of the default weights at 3 the noise is 7 times as strong as at 1, and an eighth of all values
is clipped; at 5 it is a quarter."""


def checked(temperature: float) -> float:
    """A temperature that there can be; one that makes little sense is told of.

    Raises:
        ValueError: if it is negative or not finite.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"--temperature must be at least 0, got {temperature}")
    if temperature > HIGHEST:
        warnings.warn(
            f"--temperature {temperature:g} makes the latent shift {temperature:g} times what was "
            f"learned (1: as learned, 0: none). Above {HIGHEST:g} or so it is far outside of what "
            "training saw, and results are clipped and discoloured rather than noisier",
            stacklevel=2,
        )
    return temperature
