"""Less memory in training: intermediate results are computed again when gradients need them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def recomputed(function: Callable[..., T], *args: Any) -> T:
    """``function(*args)``, of which the backward pass keeps only the arguments.

    The gradients are those of the plain call, at the cost of a second forward pass. Nothing in
    this library draws random numbers in a forward pass, so none are restored.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    result: T = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return result
