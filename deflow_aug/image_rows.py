"""Image files by bands of rows, so that a picture need not fit into memory.

Pillow and OpenCV decode and encode whole pictures. A PNG file is read and written here band by
band, each by way of a small file in memory (:mod:`deflow_aug.png_format`); files of other formats
are decoded whole.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image

from deflow_aug.image_files import (
    PNG_LEVEL,
    TooLargeError,
    UnreadableImageError,
    decoded,
    encoded,
    orientation,
    read_image,
    replacing,
    too_large,
)
from deflow_aug.images import Array
from deflow_aug.pieces import Box, cut, extent
from deflow_aug.png_format import SIGNATURE, FormatError, Header, chunks, pack, picture, unfiltered

Band = Image.Image | Array

_READ = 2**14
"""Compressed bytes read at once; decompressed they are at most a thousand times as many."""

_BLOCK = 2**20
"""Bytes of rows whose filters are undone at once."""


class Rows(Protocol):
    """A picture that is read by bands from top to bottom."""

    height: int
    width: int

    def read(self, rows: slice) -> Band:
        """These rows, as ``read_image`` returns them; none may begin above the last ones.

        Raises UnreadableImageError for files that changed since they were opened.
        """


def open_rows(path: str | os.PathLike[str], files: ExitStack) -> Rows:
    """An image file, upright, in a form that PNG files can hold: CMYK, YCbCr and LAB come as RGB.

    PNG files, of any size, are read while their rows are asked for, unless they are interlaced,
    animated, or turned by EXIF data. All others are decoded here.

    Args:
        path: of the file.
        files: what closes it.

    Raises:
        UnreadableImageError: if it cannot be read, whatever the reason.
    """
    path = Path(path)
    reason = ""
    try:
        if path.is_file():
            file = files.enter_context(path.open("rb"))
            try:
                return _PngRows(path, file)
            except (FormatError, UnreadableImageError) as error:
                reason = str(error)  # there are no rows to read; or read_image knows what is wrong
        image = read_image(path)
    except TooLargeError as error:
        raise too_large(
            path,
            f"PNG files are read part by part, whatever their size, but not this one: {reason}. "
            "Cut it into parts, or save it anew as PNG, upright, neither interlaced nor animated",
        ) from error
    except UnreadableImageError:
        raise
    except (OSError, ImportError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnreadableImageError(f"cannot read image {path}: {reason}") from error
    if isinstance(image, Image.Image) and image.mode == "F":
        raise UnreadableImageError(
            f"{path} has floating-point pixels, which PNG files cannot hold; make it an image of "
            f"8 or 16 bits first"
        )
    return _WholeImage(image)


class _WholeImage:
    def __init__(self, image: Band) -> None:
        if isinstance(image, Image.Image) and image.mode in ("CMYK", "YCbCr", "LAB"):
            image = image.convert("RGB")
        self.image = image
        _, self.height, self.width = extent(image)

    def read(self, rows: slice) -> Band:
        piece = cut(self.image, Box(slice(0, 1), rows, slice(0, self.width)))
        assert isinstance(piece, (Image.Image, np.ndarray))
        return piece


class _PngRows:
    """Keeps the bytes of the rows that were asked for last."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.more = path, b""
        header, *others = chunks(file)
        self.header = Header.of(header)
        self.height, self.width = self.header.height, self.header.width
        self.data = [chunk for chunk in others if chunk.name == b"IDAT"]
        if self.header.interlaced or any(chunk.name == b"acTL" for chunk in others):
            raise FormatError("its rows are not stored one after another")
        self.more = b"".join(chunk.whole for chunk in others if chunk.name != b"IDAT")
        # Once to the end: damage is to be found before anything is computed.
        if sum(map(len, self._decompressed())) < self.height * (1 + self.header.row):
            raise FormatError("it is truncated")
        self.blocks = self._blocks()
        self.first, self.bytes = 0, np.empty((0, self.header.row), np.uint8)
        self.read(slice(0, 1))
        with Image.open(io.BytesIO(self._picture(self.bytes[:1]))) as image:
            if orientation(image) != 1:
                raise FormatError("its rows are not those of the upright picture")

    def read(self, rows: slice) -> Band:
        kept = self.bytes[max(0, rows.start - self.first) :]
        blocks, self.first = [kept], self.first + len(self.bytes) - len(kept)
        try:
            while sum(map(len, blocks)) < rows.stop - self.first:
                blocks.append(next(self.blocks))
        except (StopIteration, FormatError, OSError) as error:
            raise UnreadableImageError(f"cannot read image {self.path}: {error}") from error
        self.bytes = np.concatenate(blocks)
        some = slice(rows.start - self.first, rows.stop - self.first)
        try:
            return decoded(self._picture(self.bytes[some]), self.path)
        except TooLargeError as error:
            remedy = f"{rows.stop - rows.start} rows of it do, too: compute it in smaller tiles"
            raise too_large(self.path, remedy) from error

    def _picture(self, rows: Array) -> bytes:
        return picture(self.header, self.more, np.pad(rows, ((0, 0), (1, 0))))

    def _blocks(self) -> Iterator[Array]:
        """The bytes of some rows after the other, [rows, bytes]."""
        length = 1 + self.header.row
        most = max(1, _BLOCK // length)
        ends = [*range(most, self.height, most), self.height]
        start, above, data = 0, np.zeros(self.header.row, np.uint8), bytearray()
        for piece in self._decompressed():
            data += piece
            while ends and len(data) >= (ends[0] - start) * length:
                count = (ends[0] - start) * length
                filtered = np.frombuffer(bytes(data[:count]), np.uint8).reshape(-1, length)
                del data[:count]
                start = ends.pop(0)
                rows = unfiltered(filtered, above, self.header.pixel)
                above = rows[-1]
                yield rows

    def _decompressed(self) -> Iterator[bytes]:
        stream = zlib.decompressobj()
        for chunk in self.data:
            for start in range(0, chunk.length, _READ):
                chunk.file.seek(chunk.place + start)
                piece = chunk.file.read(min(_READ, chunk.length - start))
                try:
                    yield stream.decompress(piece)
                except zlib.error as error:
                    raise FormatError(f"its data are damaged ({error})") from error


@contextmanager
def png_writer(path: str | os.PathLike[str], height: int) -> Iterator[Callable[[Band], None]]:
    """A PNG file written by bands, from top to bottom; it appears whole or not at all.

    The function takes the next rows, all in the same mode or with the same channels. What the file
    holds is what ``write_image`` would write, with the metadata of the first band.

    Args:
        path: of the file, whose folder is made if need be; it takes the place of an older one.
        height: rows of the picture.

    Raises:
        Exception: the function, as ``write_image`` does; ValueError at the end, if there were more
            or fewer rows.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        writer = _PngWriter(path, file, height)
        yield writer.write
        writer.finish()


class _PngWriter:
    def __init__(self, path: Path, file: BinaryIO, height: int) -> None:
        self.path, self.file, self.height, self.rows = path, file, height, 0
        # The strategy is for what filters leave.
        self.stream = zlib.compressobj(PNG_LEVEL, strategy=zlib.Z_FILTERED)

    def write(self, band: Band) -> None:
        content = encoded(band, self.path, png_level=0)
        first, *others = chunks(io.BytesIO(content))
        header = Header.of(first)
        data = zlib.decompress(b"".join(chunk.data for chunk in others if chunk.name == b"IDAT"))
        filtered = np.frombuffer(data, np.uint8).reshape(header.height, -1).copy()
        # The first was told from zeros above it, where now there is another row.
        above = np.zeros(header.row, np.uint8)
        filtered[0, 1:] = unfiltered(filtered[:1], above, header.pixel)
        filtered[0, 0] = 0
        if not self.rows:
            more = b"".join(chunk.whole for chunk in others if chunk.name != b"IDAT")
            self.file.write(SIGNATURE + header.packed(self.height) + more)
        self.rows += header.height
        self.file.write(pack(b"IDAT", self.stream.compress(filtered.data)))

    def finish(self) -> None:
        if self.rows != self.height:
            raise ValueError(f"{self.path} has {self.height} rows, but {self.rows} were written")
        self.file.write(pack(b"IDAT", self.stream.flush()) + pack(b"IEND", b""))
