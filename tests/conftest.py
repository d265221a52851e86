"""Settings that every test shares."""

import os

# pytest-xdist runs one process a core, so each (and what it starts) computes on one thread.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    import torch

    torch.set_num_threads(1)
