"""What is computed of parameters alone, once as long as they stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Folding(nn.Module):
    """A module that folds its parameters into fewer operations than they stand for.

    In evaluation mode without gradients what was folded is kept until a parameter or buffer is
    written to or replaced (writing to ``parameter.data`` goes unnoticed, as it does by autograd).
    It is no part of the state, nor of copies of the module.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, tuple[list[tuple[Tensor, int]], Any]] = {}

    def folded_once(self, name: str, fold: Callable[[], T]) -> T:
        """``fold()``, or what it returned the last time."""
        if self.training or torch.is_grad_enabled():
            return fold()
        state = [*self.parameters(), *self.buffers()]
        if any(tensor.is_inference() for tensor in state):  # these do not count what is written
            return fold()
        versions, value = self._kept.get(name, ([], None))
        if len(versions) != len(state) or not all(
            known.data_ptr() == tensor.data_ptr() and version == tensor._version
            for (known, version), tensor in zip(versions, state, strict=True)
        ):
            # Not made of inference tensors: they would be refused where others need gradients.
            with torch.inference_mode(False), torch.no_grad():
                value = fold()
                # Held, so that no other tensor can come to lie at the same address.
                versions = [(tensor.detach(), tensor._version) for tensor in state]
            self._kept[name] = versions, value
        return cast(T, value)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._kept.clear()  # moved to another device, it would hold the memory of this one
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}
