"""Words of a command beside its progress bar."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


@contextmanager
def warnings_above(told: Callable[[str], str] = str) -> Iterator[None]:
    """Warnings in lines of their own, not at the end of the progress bar's.

    Args:
        told: what is told of a message.
    """
    shown = warnings.showwarning

    def write(message: Warning | str, *_: Any, **__: Any) -> None:
        tqdm.write(f"warning: {told(str(message))}", file=sys.stderr)

    warnings.showwarning = write
    try:
        yield
    finally:
        warnings.showwarning = shown
