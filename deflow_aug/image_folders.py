"""The image files of a folder, and a word on the photographs in it that are not read."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from deflow_aug.image_files import IMAGE_SUFFIXES, UNREAD_SUFFIXES, UnreadableImageError


def find_images(
    folder: str | os.PathLike[str], refused: Callable[[OSError], None] | None = None
) -> list[Path]:
    """All files under `folder` with one of IMAGE_SUFFIXES, in any case, sorted by path.

    Files and folders whose name starts with a dot are left out. Links to folders are followed, and
    each folder is searched once, however many links lead to it. The list may be empty. Photographs
    of kinds that are not read (UNREAD_SUFFIXES) are passed over with one warning that counts them.

    refused: called for each folder that cannot be searched, instead of an OSError.

    Raises FileNotFoundError or NotADirectoryError if `folder` is no folder, OSError if a folder in
    it cannot be read, and UnreadableImageError if it has nothing but such photographs.
    """
    root = Path(folder)
    if not root.exists():
        raise FileNotFoundError(f"no such folder: {root}")
    if not root.is_dir():
        raise NotADirectoryError(f"expected a folder of images, got a file: {root}")

    def fail(error: OSError) -> None:  # os.walk would skip the folder
        raise OSError(
            f"cannot search the folder {error.filename}: {error.strerror}; make it readable, or "
            f"move it out of {root}"
        ) from error

    found: list[Path] = []
    unread: Counter[str] = Counter()
    seen: set[str] = set()
    for parent, folders, names in os.walk(root, onerror=refused or fail, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
        suffixes = (path.suffix.lower() for path in paths)
        unread.update(suffix for suffix in suffixes if suffix in UNREAD_SUFFIXES)
    if unread:
        kinds = ", ".join(f"{kind} {count}" for kind, count in unread.most_common())
        if not found:
            raise UnreadableImageError(
                f"no image file in {root} can be read: it has only photographs of kinds that are "
                f"not read ({kinds}); convert them to PNG first"
            )
        warnings.warn(
            f"passed over {unread.total()} files in {root} of kinds that are not read: {kinds}; "
            "convert them to PNG first",
            stacklevel=1,  # told once, however many callers search the folder
        )
    return sorted(found, key=lambda path: path.relative_to(root).parts)
