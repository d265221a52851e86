"""Pictures of one scene are not independent: what is counted, drawn or held out is the scene."""

from __future__ import annotations

import re


def scene_of(name: str, pattern: str | None) -> str:
    """The name of the scene that a picture shows.

    Args:
        name: of the picture, or its path.
        pattern: a regular expression; pictures in whose names its first group (or all of it,
            without one) matches the same text show one scene. None: each shows its own.

    Raises:
        ValueError: if it does not match, or is no regular expression.
    """
    if pattern is None:
        return name
    try:
        match = re.search(pattern, name)
    except re.error as error:
        raise ValueError(f"{pattern!r} for scenes is no regular expression: {error}") from error
    if match is None:
        raise ValueError(f"the expression {pattern!r} for scenes does not match {name}")
    return str(match.group(1) if match.re.groups else match.group())
