"""Files and folders that commands are given, looked at before anything takes long."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def output_folder(flag: str, text: str) -> Path:
    """A folder for results. It need not be there yet, and is not made here.

    Raises:
        ValueError: if nothing is given.
        NotADirectoryError: if it, or a part of its path, is a file.
        OSError: if nothing can be written there.
    """
    if not text:
        raise ValueError(f"{flag} is empty; '.' is this folder")
    folder = Path(text)
    there = next((p for p in (folder, *folder.parents) if os.path.lexists(p)), Path())
    if not there.is_dir():
        raise NotADirectoryError(
            f"{flag} must be a folder, but {there} is a file; choose another name"
        )
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(
            f"{flag}: nothing can be written to {there} ({error.strerror}); choose a folder that "
            "you may write to"
        ) from error
    return folder


def existing_file(flag: str, text: str, expected: str) -> Path:
    """A file to read.

    Raises:
        FileNotFoundError, IsADirectoryError: unless it is one.
    """
    file = Path(text)
    if file.is_dir():
        raise IsADirectoryError(f"{flag} must be {expected}, but {text} is a folder")
    if not file.exists():
        raise FileNotFoundError(f"{flag} must be {expected}, but there is no {text}")
    return file
