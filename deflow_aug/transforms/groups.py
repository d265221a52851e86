"""Images of a batch that are changed in different ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

Params: TypeAlias = dict[str, Any]


def by_group(
    pixels: Tensor, groups: Mapping[Any, list[int]], change: Any, params: Sequence[Params]
) -> Tensor:
    """``change(name, pixels of the group, params of the group)`` for each group of images.

    Images in no group stay as they are, and an empty group is left out.
    """
    groups = {name: chosen for name, chosen in groups.items() if chosen}
    if not groups:
        return pixels
    if len(params) != len(pixels):
        raise ValueError(f"{len(pixels)} images need as many draws, got {len(params)}")
    if [len(chosen) for chosen in groups.values()] == [len(pixels)]:
        (name,) = groups
        changed: Tensor = change(name, pixels, params)
        return changed
    result = pixels.clone()
    parts = {
        name: change(name, pixels[chosen], [params[i] for i in chosen])
        for name, chosen in groups.items()
    }
    sizes = {tuple(part.shape[-2:]) for part in parts.values()}
    if sum(map(len, groups.values())) < len(pixels):
        sizes.add(tuple(pixels.shape[-2:]))
    if len(sizes) > 1:
        raise ValueError(
            f"the images of a batch would come out in different sizes, {sorted(sizes)}: resize "
            f"all of them, or transform images one at a time"
        )
    for name, part in parts.items():
        if part.shape[-2:] != result.shape[-2:]:
            result = part.new_empty((len(pixels), *part.shape[1:]))
        result[groups[name]] = part
    return result
