"""Where to compute."""

from __future__ import annotations

import torch
from torch import Tensor


def resolve(name: str | torch.device) -> torch.device:
    """The device of this name; "auto" is a CUDA GPU if there is one, else the CPU.

    Raises:
        ValueError: if there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"no device {name!r}: use auto, cpu, cuda, cuda:1, ...") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"no device {str(device)!r}: PyTorch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA GPUs; use cpu, or install a CUDA build of PyTorch"
        )
    return device


def full_precision(x: Tensor) -> torch.autocast:
    """A context without autocast on the device of ``x``, whatever surrounds it."""
    return torch.autocast(x.device.type, enabled=False)
