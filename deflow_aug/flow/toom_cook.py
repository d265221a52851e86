"""The matrices of Winograd's F(4x4, 3x3), as Toom and Cook have them.

They evaluate polynomials at the points 0, 1, infinity, p, -p and -1, and interpolate them again.

Where pixels are repeated (nearest-neighbour upsampling) a tile holds fewer: d = (a, b, b, c, c, d)
in each direction if each stands twice, of whose transform the term of the point -1 is nothing for
every p: 25 products are left of the 36. If each stands four times, d = (a, b, b, b, b, c), the
terms of p and -p are nothing either: 9 are left.

In float32 the results differ from exact ones by 2e-6 of their standard deviation (root mean
square, 320 channels), those of a direct convolution by 2e-7. Of the values of p tried 5/8 rounds
least; 1/2 and 2 lose twice as much at worst.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

_P = 5 / 8
_POINTS = (0.0, 1.0, math.inf, _P, -_P, -1.0)
TERMS = {1: 6, 2: 5, 4: 3}
"""How many of them, the first ones, tiles need whose pixels stand once, twice, four times."""

MOST_REPEATS = max(TERMS)

# Products of two terms, such that those come first that repeated pixels take part in.
_ORDER = sorted(
    range(36), key=lambda ij: min(n for n in TERMS.values() if ij // 6 < n and ij % 6 < n)
)
ALL_ONES = _ORDER.index(7)
"""A^T of this one is 1 everywhere in the tile: what is added to it is a bias."""


def products(repeats: int) -> int:
    """How many products a tile takes whose pixels stand ``repeats`` times."""
    return TERMS[repeats] ** 2


@cache
def matrix(name: str, dtype: torch.dtype, repeats: int = 1) -> Tensor:
    """Of a two-dimensional transform, with the products in their order."""
    with torch.inference_mode(False):  # used later wherever
        if name == "result":
            one = _result()
            square = torch.kron(one, one)[:, _ORDER]
        else:
            one = _data() @ _repeated(repeats) if name == "data" else _kernel()
            square = torch.kron(one, one)[_ORDER[: products(repeats)]]
        return square.to(dtype).contiguous()


def _data() -> Tensor:
    """B^T: row j has the coefficients of the product of x - k over all points k but its own."""
    rows = []
    for point in _POINTS:
        row = _float64([1])
        for other in _POINTS:
            if other not in (point, math.inf):
                row = F.pad(row, (1, 0)) - other * F.pad(row, (0, 1))
        rows.append(F.pad(row, (0, 6 - len(row))))
    return torch.stack(rows)


def _kernel() -> Tensor:
    """G: values of a quadratic polynomial at the points, over the products of differences."""
    rows = []
    for point in _POINTS:
        if point == math.inf:
            rows.append(_float64([0, 0, 1]))
        else:
            others = (other for other in _POINTS if other not in (point, math.inf))
            divisor = math.prod(point - other for other in others)
            rows.append(_float64([1, point, point**2]) / divisor)
    return torch.stack(rows)


def _result() -> Tensor:
    """A^T: powers of the points."""
    columns = [[0, 0, 0, 1] if p == math.inf else [p**i for i in range(4)] for p in _POINTS]
    return _float64(columns).T


def _repeated(repeats: int) -> Tensor:
    """Which pixel of a tile stands where, [6, 4 / repeats + 2]: the tile starts one before it."""
    stands = [-(-i // repeats) if i < 5 else 4 // repeats + 1 for i in range(6)]
    return torch.eye(4 // repeats + 2, dtype=torch.float64)[stands]


def _float64(values: Sequence[object]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
