"""Learned, stochastic image degradations: DeFlow (CVPR 2021).

from deflow_aug import DeFlowDegrader

degrader = DeFlowDegrader.from_pretrained()
noisy = degrader.degrade(photo, temperature=1.0, n_samples=3, seed=0)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "CleanCrops",
    "DeFlowDegrader",
    "DegradedPairs",
    "DegradingLoader",
    "MixedDegradation",
    "RandomDeFlow",
    "StreamedPairs",
    "__version__",
]

if TYPE_CHECKING:
    from deflow_aug.degrader import DeFlowDegrader
    from deflow_aug.pairs.dataset import CleanCrops, DegradedPairs
    from deflow_aug.pairs.loader import DegradingLoader
    from deflow_aug.pairs.streams import StreamedPairs
    from deflow_aug.transforms import MixedDegradation, RandomDeFlow

_MODULES = {
    "CleanCrops": "deflow_aug.pairs.dataset",
    "DeFlowDegrader": "deflow_aug.degrader",
    "DegradedPairs": "deflow_aug.pairs.dataset",
    "DegradingLoader": "deflow_aug.pairs.loader",
    "MixedDegradation": "deflow_aug.transforms",
    "RandomDeFlow": "deflow_aug.transforms",
    "StreamedPairs": "deflow_aug.pairs.streams",
}


def __getattr__(name: str) -> Any:
    # Lazily, so that importing the package does not import torch.
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
