"""Deterministic weights for the published layout, so that no checkpoint has to be shipped.

Every tensor is a function of its name, its shape and a seed.
"""

import re
import zlib
from collections.abc import Sequence

import numpy as np


def tensor_for(name: str, shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """The test weights of the published tensor ``name``, float32 of that shape."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    shape = tuple(shape)

    def draw(std: float) -> np.ndarray:
        return (std * rng.standard_normal(shape)).astype(np.float32)

    leaf = name.rsplit(".", 1)[-1]
    if leaf == "I":
        return np.eye(shape[0], dtype=np.float32)
    if leaf == "p":
        return np.eye(shape[0], dtype=np.float32)[rng.permutation(shape[0])]
    if leaf == "sign_s":
        return rng.choice(np.array([-1.0, 1.0], dtype=np.float32), size=shape)
    if leaf == "weight":
        fan_in = int(np.prod(shape[1:]))
        last = re.search(r"(fAffine\.4|fFeatures\.4|layers\.\d+\.conv)\.weight$", name)
        return draw((0.1 if last else 0.5) / fan_in**0.5)
    if re.search(r"layers\.\d+\.actnorm\.logs$", name):
        return draw(0.02) - np.float32(0.21)
    std = {
        "l": 0.15 / shape[0] ** 0.5,
        "u": 0.15 / shape[0] ** 0.5,
        "log_s": 0.05,
        "mean_shift": 0.3,
        "cov_shift": 0.3 / shape[0] ** 0.5,
        "logs": 0.05,
        "bias": 0.02,
    }
    return draw(std[leaf])
