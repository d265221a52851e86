"""Settings that every test shares."""

import os
from pathlib import Path

import pytest

# pytest-xdist runs one process a core, so each (and what it starts) computes on one thread.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    import torch

    torch.set_num_threads(1)


@pytest.fixture(params=["by matrix products", "by convolutions"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tiles sum over channels, in either way: which one is taken depends on the CPU."""
    from deflow_aug.flow import products

    by_mkl = request.param == "by matrix products"
    monkeypatch.setattr(products, "_mkl_is_as_wide", lambda: by_mkl)


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of this name cannot be searched, by an administrator neither."""
    honest = os.scandir

    def scandir(folder: str) -> object:
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return honest(folder)

    monkeypatch.setattr(os, "scandir", scandir)
