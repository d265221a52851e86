"""Settings that every test shares."""

import os

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
