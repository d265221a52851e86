"""Clean images in an LMDB."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

from deflow_aug.data.pictures import DataError
from deflow_aug.pairs.pictures import Picture, decode, extra, report

# A line of BasicSR's meta_info.txt: "name.png (height,width,channels) compression level".
_META_LINE = re.compile(r"(?P<name>.+) \((?P<height>\d+),(?P<width>\d+),\d+\) \d+")


class LmdbImages:
    """Encoded images in an LMDB folder as BasicSR lays it out, with its ``meta_info.txt``."""

    def __init__(self, folder: Path, patch: int = 1) -> None:
        extra("lmdb", "lmdb")  # say so now if it is missing
        index = folder / "meta_info.txt"
        if not index.is_file():
            raise DataError(
                f"no LMDB with images at {folder}: expected data.mdb, and meta_info.txt with lines "
                f"like 'name.png (480,480,3) 1' (as BasicSR's create_lmdb writes them)"
            )
        self.folder, self.keys = folder, list[str]()
        small = []
        for line in index.read_text("utf-8").splitlines():
            match = _META_LINE.fullmatch(line.strip())
            if match is None:
                raise DataError(f"{index}: expected 'name.png (480,480,3) 1', got {line!r}")
            key = os.path.splitext(match["name"])[0]
            if min(int(match["height"]), int(match["width"])) < patch:
                small.append(key)
            else:
                self.keys.append(key)
        report([], small, patch, len(self.keys), folder)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> Picture:
        key = self.keys[index]
        data = _stored(self.folder, key)
        if data is None:
            raise DataError(f"{self.folder} has no key {key!r}, though meta_info.txt names it")
        return decode(data, self.name(index))

    def name(self, index: int) -> str:
        return self.keys[index]


# The open LMDBs, by their true paths: a process may open each only once, whatever its threads do.
_ENVIRONMENTS: dict[Path, Any] = {}
_LOCK = threading.Lock()


def _stored(folder: Path, key: str) -> bytes | None:
    """What an LMDB holds under this key.

    Raises:
        DataError: if the LMDB cannot be opened or read.
    """
    lmdb = extra("lmdb", "lmdb")
    path = folder.resolve()
    try:
        with _LOCK:
            if path not in _ENVIRONMENTS:
                _ENVIRONMENTS[path] = lmdb.open(
                    str(path), readonly=True, lock=False, readahead=False, meminit=False
                )
            with _ENVIRONMENTS[path].begin(write=False) as transaction:
                data = transaction.get(key.encode())
                return None if data is None else bytes(data)
    except lmdb.Error as error:
        raise DataError(
            f"cannot read the LMDB {folder} ({error}): it needs its data.mdb, whole, and no other "
            f"part of this process may have it open"
        ) from error


def _before_fork() -> None:
    # A fork must not use its parent's LMDB, nor may it open one that its parent had open.
    _LOCK.acquire()
    _ENVIRONMENTS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_LOCK.release, after_in_child=_LOCK.release
    )
