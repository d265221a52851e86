"""Less memory in training: intermediate results are computed again when gradients need them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")

LEAST_SAVED = 64 * 2**20
"""Bytes below which activations are kept anyway: small models would lose a fifth of their time for
memory that nobody misses."""

_KEPT = ContextVar("activations are kept", default=False)


@contextmanager
def keeping_activations(keep: bool = True) -> Iterator[None]:
    """Within it nothing is computed so that it will be computed again: less time, more memory."""
    token = _KEPT.set(keep)
    try:
        yield
    finally:
        _KEPT.reset(token)


def activations_kept() -> bool:
    """Whether within :func:`keeping_activations`."""
    return _KEPT.get()


def worthwhile(saves: int) -> bool:
    """Whether to compute again what takes so many bytes."""
    return not activations_kept() and saves >= LEAST_SAVED


def recomputed(function: Callable[..., T], *args: Any) -> T:
    """``function(*args)``, of which the backward pass keeps only the arguments.

    The gradients are those of the plain call, at the cost of a second forward pass. Nothing in
    this library draws random numbers in a forward pass, so none are restored.
    """
    if not torch.is_grad_enabled() or activations_kept():
        return function(*args)
    result: T = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return result


def recomputed_whole(
    function: Callable[..., tuple[Tensor, ...]],
    parameters: Iterable[Tensor],
    *tensors: Tensor,
    saves: int,
) -> tuple[Tensor, ...]:
    """:func:`recomputed` at less cost for many small operations, of which it keeps no account.

    Not under autocast, which the second pass would not know of. Gradients of the gradients are
    refused.

    Args:
        function: of the tensors.
        parameters: all else that may need a gradient.
        saves: bytes, or so, that the backward pass would keep of this and all such calls.
    """
    if not torch.is_grad_enabled() or not worthwhile(saves):
        return function(*tensors)
    result: tuple[Tensor, ...] = _Recomputed.apply(  # type: ignore[no-untyped-call]
        function, len(tensors), *tensors, *parameters
    )
    return result


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., tuple[Tensor, ...]], count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.function, ctx.count = function, count
        return function(*tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        saved = ctx.saved_tensors
        inputs = [
            tensor.detach().requires_grad_(need)
            for tensor, need in zip(saved[: ctx.count], needed, strict=False)
        ]
        with torch.enable_grad():
            results = ctx.function(*inputs)
        leaves = [*inputs, *saved[ctx.count :]]
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
        through = [(r, g) for r, g in zip(results, grads, strict=True) if r.requires_grad]
        outputs, gradients = zip(*through, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
        return (None, None, *(next(found) if need else None for need in needed))
