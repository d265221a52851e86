"""torchmetrics, where a torchvision is installed that cannot be imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from lightning_utilities.core.imports import RequirementCache


@contextmanager
def without_torchvision() -> Iterator[pytest.MonkeyPatch]:
    """What is imported within it takes torchvision for missing; what it patches is undone.

    torchmetrics imports torchvision wherever that is installed, but PyPI's build of it cannot be
    imported beside a CPU build of PyTorch. PSNR and SSIM need none of it.
    """
    there = RequirementCache.__bool__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            RequirementCache,
            "__bool__",
            lambda self: "torchvision" not in str(self.requirement) and there(self),
        )
        yield patch
