"""Learned, stochastic image degradations: DeFlow (CVPR 2021).

from deflow_aug import DeFlowDegrader

degrader = DeFlowDegrader.from_pretrained()
noisy = degrader.degrade(photo, temperature=1.0, n_samples=3, seed=0)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["DeFlowDegrader", "__version__"]

if TYPE_CHECKING:
    from deflow_aug.degrader import DeFlowDegrader


def __getattr__(name: str) -> Any:
    # Lazily, so that importing the package does not import torch.
    if name == "DeFlowDegrader":
        from deflow_aug.degrader import DeFlowDegrader

        return DeFlowDegrader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
