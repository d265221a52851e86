"""Which entries of a sample are images, and how many images one of them is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_DTYPES = frozenset({"uint8", "uint16", "float16", "bfloat16", "float32", "float64"})


def which_are_images(leaves: Sequence[Any]) -> list[bool]:
    """Which of the leaves of a sample are transformed; the rule is torchvision's.

    - PIL images, ``tv_tensors.Image`` and ``tv_tensors.Video`` always are, all of them.
    - Only if there is none of these: the first plain tensor or array that can be an image.
    - Nothing else is: no masks, boxes, numbers or strings.

    A tensor or array can be an image if its dtype is uint8, uint16 or float, and its shape is
    (C, H, W) or (B, C, H, W), for arrays (H, W), (H, W, C) or (B, H, W, C), with 1 to 4 channels.
    (torchvision takes the first plain tensor whatever it is, and never an array.) If there are
    only some with another number of channels, the first is taken for an image with a mistake in
    its layout, and so is a lone tensor or array of any kind: transforming it raises the error that
    tells what is wrong.
    """
    explicit = [_is_explicit(leaf) for leaf in leaves]
    if any(explicit):
        return explicit
    plain = [i for i, leaf in enumerate(leaves) if _is_plain(leaf)]
    if len(leaves) > 1:
        plain = [i for i in plain if _has_dtype_and_axes(leaves[i])]
        plain = [i for i in plain if _channels(leaves[i]) in (1, 2, 3, 4)] or plain
    return [i in plain[:1] for i in range(len(leaves))]


def count_images(image: Any) -> int:
    """The length of a batch; 1 for a single image, and for a video, whose frames share a draw."""
    if isinstance(image, (Image.Image, *_tv_tensors("Video"))):
        return 1
    return len(image) if image.ndim == 4 else 1


def _is_explicit(leaf: Any) -> bool:
    return isinstance(leaf, (Image.Image, *_tv_tensors("Image", "Video")))


def _is_plain(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return not isinstance(leaf, _tv_tensors("TVTensor"))
    return isinstance(leaf, np.ndarray)


def _has_dtype_and_axes(leaf: Tensor | np.ndarray[Any, Any]) -> bool:
    axes = (3, 4) if isinstance(leaf, Tensor) else (2, 3, 4)
    return leaf.ndim in axes and str(leaf.dtype).removeprefix("torch.") in _DTYPES


def _channels(leaf: Tensor | np.ndarray[Any, Any]) -> int:
    if isinstance(leaf, Tensor):
        return leaf.shape[-3]
    return 1 if leaf.ndim == 2 else leaf.shape[-1]


def _tv_tensors(*names: str) -> tuple[type, ...]:
    """These classes of torchvision; none as long as nobody has imported it."""
    module = sys.modules.get("torchvision.tv_tensors")
    return tuple(kind for name in names if (kind := getattr(module, name, None)) is not None)


def resized_like(image: Any, height: int, width: int) -> Any:
    """An image of the same kind with this many pixels, the nearest of the old ones."""
    if isinstance(image, Image.Image):
        return image.resize((width, height), Image.Resampling.NEAREST)
    if isinstance(image, np.ndarray):
        axis = 0 if image.ndim == 2 else image.ndim - 3
        rows, columns = _nearest(image.shape[axis], height), _nearest(image.shape[axis + 1], width)
        return image.take(rows.numpy(), axis).take(columns.numpy(), axis + 1)
    kind, image = type(image), image.detach().as_subclass(Tensor)
    rows = _nearest(image.shape[-2], height).to(image.device)
    columns = _nearest(image.shape[-1], width).to(image.device)
    small = image.index_select(-2, rows).index_select(-1, columns)
    return small if kind in (Tensor, torch.nn.Parameter) else small.as_subclass(kind)


def _nearest(before: int, after: int) -> Tensor:
    return ((torch.arange(after, dtype=torch.float64) + 0.5) * before / after).long()
