"""What people degrade images with today, each with the face of ``DeFlowDegrader.degrade``.

from deflow_aug.baselines import fit_all

baselines = fit_all(photographs, seed=0)  # uint8 [H, W, 3] each, unpaired
noisy = baselines["noise patches"].degrade(clean, seed=1)
"""

from __future__ import annotations

from collections.abc import Sequence

from deflow_aug.baselines.base import Baseline, Nothing
from deflow_aug.baselines.chain import ClassicalChain
from deflow_aug.baselines.gaussian import SignalDependentNoise, WhiteNoise
from deflow_aug.baselines.patches import NoisePatches
from deflow_aug.flat import Image8, NoFlatAreasError

__all__ = [
    "Baseline",
    "ClassicalChain",
    "NoFlatAreasError",
    "NoisePatches",
    "Nothing",
    "SignalDependentNoise",
    "WhiteNoise",
    "fit_all",
]


def fit_all(
    degraded: Sequence[Image8], clean: Sequence[Image8] | None = None, *, seed: int = 0
) -> dict[str, Baseline]:
    """All baselines by name, in the order of tables, fitted where their methods fit anything.

    Args:
        degraded: degraded photographs, uint8 [H, W, 3] each, of any sizes.
        clean: clean photographs, for callers that have both domains at hand. None of these methods
            looks at them.
        seed: of what is drawn while fitting.

    Raises:
        TypeError, ValueError: for photographs of another kind, or none.
        NoFlatAreasError: (a ValueError) if they have no areas to measure noise in.
    """
    each: list[Baseline] = [
        Nothing(),
        WhiteNoise.fit(degraded, seed=seed),
        SignalDependentNoise.fit(degraded, seed=seed),
        NoisePatches.fit(degraded, seed=seed),
        ClassicalChain(),
    ]
    return {one.name: one for one in each}
