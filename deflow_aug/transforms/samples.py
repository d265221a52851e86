"""Which entries of a sample are images, and how many images one of them is."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_flatten_with_path

_DTYPES = frozenset({"uint8", "uint16", "float16", "bfloat16", "float32", "float64"})


# The last word of a key under which images are kept: "image", "left_img", "gt", "000123.png".
_NAMES = frozenset(
    {"image", "images", "img", "imgs", "picture", "photo", "frame", "rgb", "grey", "gray"}
    | {"pixels", "input", "inputs", "x", "gt", "hq", "hr", "lq", "lr", "sr", "clean", "degraded"}
    | {"png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff"}
)

# Of a pair for super-resolution or restoration: what a network sees, and what it is to return.
_SEEN = frozenset({"lq", "lr", "input", "inputs", "degraded"})
_TARGETS = frozenset({"gt", "hq", "hr", "target", "clean"})


def leaves_of(sample: Any) -> tuple[list[Any], TreeSpec, list[bool]]:
    """What a sample holds, how it is put together, and which of it are images."""
    leaves, structure = tree_flatten(sample)
    try:
        paths = [path for path, _ in tree_flatten_with_path(sample)[0]]
    except ValueError:  # classes of others, registered without names for what they hold
        paths = [()] * len(leaves)
    return leaves, structure, which_are_images(leaves, [_name(path) for path in paths])


def which_are_images(leaves: Sequence[Any], names: Sequence[str | None]) -> list[bool]:
    """Which of the leaves of a sample, with their names if they have some, are transformed.

    PIL images, ``tv_tensors.Image`` and ``tv_tensors.Video`` are, all of them, and nothing else
    where there is one: that is torchvision's rule. Only without these, one plain tensor or array
    is (torchvision takes the first whatever it is, and never an array), the first of

    1. those with 3 or 4 channels and an image's name (``image``, ``img``, ``gt``, ``hq``, ``lq``,
       ``lr``, ``hr``, ``input``, ..., or such a word at the end of the name: ``left_image``);
    2. those with 3 or 4 channels;
    3. those with an image's name: grey ones (1 channel, or an array (H, W)), grey and alpha;
    4. those of these kinds without any name, but only if nothing else could be an image: the
       sample itself, or (image, label).

    Of a pair, where a word of one image's name is ``lq``, ``lr``, ``input`` or ``degraded``, those
    of ``gt``, ``hq``, ``hr``, ``target`` or ``clean`` are left as they are, whatever they are.

    Masks, depth maps, matrices, boxes and points of other names are none, whatever comes first.
    Its dtype must be uint8, uint16 or float, and its shape (C, H, W) or (B, C, H, W), for arrays
    (H, W), (H, W, C) or (B, H, W, C). If there is no such thing, the first that has an image's
    name, or no name and 3 or 4 channels on the wrong side, is taken for an image with a mistake
    in its layout, and so is a sample that is itself a tensor or array: transforming it raises the
    error that tells what is wrong.
    """
    targets = _targets(leaves, names)
    explicit = [_is_explicit(leaf) and i not in targets for i, leaf in enumerate(leaves)]
    if any(explicit):
        return explicit
    plain = [i for i, leaf in enumerate(leaves) if _is_plain(leaf) and i not in targets]
    if len(leaves) > 1 or (names and names[0] is not None):
        plain = [i for i in plain if _has_dtype_and_axes(leaves[i])]
        colour = [i for i in plain if _channels(leaves[i]) in (3, 4)]
        grey = [i for i in plain if _channels(leaves[i]) in (1, 2)]
        named = [i for i in plain if _is_images(names[i])]
        alone = [i for i in grey if names[i] is None and len(plain) == 1]
        plain = (
            [i for i in colour if i in named]
            or colour
            or [i for i in grey if i in named]
            or alone
            or [i for i in plain if i in named or (names[i] is None and _is_swapped(leaves[i]))]
        )
    return [i in plain[:1] for i in range(len(leaves))]


def count_images(image: Any) -> int:
    """The length of a batch; 1 for a single image, and for a video, whose frames share a draw."""
    if isinstance(image, (Image.Image, *_tv_tensors("Video"))):
        return 1
    return len(image) if image.ndim == 4 else 1


def _name(path: Sequence[Any]) -> str | None:
    """The innermost name on the way to a leaf: a key of a dict or a field; None without any."""
    for step in reversed(path):
        name = getattr(step, "key", getattr(step, "name", None))
        if isinstance(name, str):
            return name
    return None


def _is_images(name: str | None) -> bool:
    words = _words(name)
    return bool(words) and words[-1] in _NAMES


def _targets(leaves: Sequence[Any], names: Sequence[str | None]) -> set[int]:
    """Which are the targets of a pair; none where no image is what a network sees."""
    words = [frozenset(_words(name)) for name in names]
    seen = any(
        own & _SEEN and (_is_explicit(leaf) or (_is_plain(leaf) and _has_dtype_and_axes(leaf)))
        for own, leaf in zip(words, leaves, strict=True)
    )
    return {i for i, own in enumerate(words) if seen and own & _TARGETS and not own & _SEEN}


def _words(name: str | None) -> list[str]:
    words: list[str] = re.findall("[a-z]+", (name or "").lower())
    return words


def _is_swapped(leaf: Tensor | np.ndarray[Any, Any]) -> bool:
    """Whether 3 or 4 channels are where they are in an image of the other kind."""
    other = -1 if isinstance(leaf, Tensor) else -3
    return leaf.ndim >= 3 and leaf.shape[other] in (3, 4)


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
    places = torch.arange(after, dtype=torch.float64, device="cpu")
    return ((places + 0.5) * before / after).long()
