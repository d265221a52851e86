"""The PNG format, as far as it takes to cut a picture into bands of rows and to join them again.

Some rows of a picture make a PNG file of their own. Whatever the picture may be (palettes, 16 bits,
transparency, profiles), Pillow or OpenCV read and write such files; only the filters, by which a
row is told from the one above it, are undone here.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image

from deflow_aug.images import Array

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type: grey, RGB, palette, with alpha
_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # of 8-bit pixels, by their bytes


class FormatError(ValueError):
    """The file is no PNG file, or damaged."""


@dataclass(frozen=True)
class Header:
    """What the first chunk tells."""

    width: int
    height: int
    depth: int
    colour_type: int
    interlaced: int = 0

    @classmethod
    def of(cls, chunk: Chunk) -> Header:
        if (chunk.name, chunk.length) != (b"IHDR", 13):
            raise FormatError("it has no header")
        width, height, depth, colour_type, _, _, interlaced = struct.unpack(">IIBBBBB", chunk.data)
        if colour_type not in _CHANNELS or not width or not height:
            raise FormatError("its header makes no sense")
        return cls(width, height, depth, colour_type, interlaced)

    def packed(self, height: int) -> bytes:
        """The chunk, for a picture of another height."""
        numbers = self.width, height, self.depth, self.colour_type, 0, 0, self.interlaced
        return pack(b"IHDR", struct.pack(">IIBBBBB", *numbers))

    @property
    def row(self) -> int:
        """Bytes of a row, without its filter's."""
        return -(-self.width * self.depth * _CHANNELS[self.colour_type] // 8)

    @property
    def pixel(self) -> int:
        """Bytes of a pixel, at least one: how far filters look to the left."""
        return max(1, self.depth * _CHANNELS[self.colour_type] // 8)


@dataclass(frozen=True)
class Chunk:
    """A chunk, whose data begin at ``place`` in ``file``."""

    file: BinaryIO
    name: bytes
    place: int
    length: int

    @property
    def data(self) -> bytes:
        """Its data, checked."""
        whole = self.whole
        if pack(self.name, whole[8:-4]) != whole:
            raise FormatError(f"its chunk {self.name!r} is damaged")
        return whole[8:-4]

    @property
    def whole(self) -> bytes:
        """Its data with what is around them in the file."""
        self.file.seek(self.place - 8)
        whole = self.file.read(self.length + 12)
        if len(whole) < self.length + 12:
            raise FormatError("it is truncated")
        return whole


def chunks(file: BinaryIO) -> Iterator[Chunk]:
    """All chunks up to the last, which is left out.

    Raises:
        FormatError: where the file is none of chunks, or ends too early.
    """
    file.seek(0)
    if file.read(len(SIGNATURE)) != SIGNATURE:
        raise FormatError("it is no PNG file")
    place = len(SIGNATURE)
    while True:
        file.seek(place)
        head = file.read(8)
        if len(head) < 8:
            raise FormatError("it is truncated")
        length, name = struct.unpack(">I4s", head)
        if name == b"IEND":
            return
        yield Chunk(file, name, place + 8, length)
        place += length + 12


def pack(name: bytes, data: bytes) -> bytes:
    """A chunk as it is stored."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def picture(header: Header, more: bytes, filtered: Array) -> bytes:
    """A PNG file.

    Args:
        header: whose height does not matter.
        more: further chunks.
        filtered: its rows, uint8 [rows, 1 + bytes], each one's filter first.
    """
    data = zlib.compress(np.ascontiguousarray(filtered).data, 0)
    head = SIGNATURE + header.packed(len(filtered)) + more
    return head + pack(b"IDAT", data) + pack(b"IEND", b"")


def unfiltered(filtered: Array, above: Array, pixel: int) -> Array:
    """The bytes of rows, uint8 [rows, bytes], whose filters are undone.

    Filters know of bytes, and how many make a pixel, but not what they mean: rows may pass for
    8-bit grey, grey and alpha, RGB or RGBA, or for two such pictures whose pixels alternate.

    Args:
        filtered: uint8 [rows, 1 + bytes], each row's filter first.
        above: uint8 [bytes], the row before the first.
        pixel: bytes of a pixel.

    Raises:
        OSError: (Pillow's) for filters that there are not.
    """
    rows, pictures = len(filtered) + 1, 1 if pixel <= 4 else 2
    each = pixel // pictures
    filters = np.zeros((rows, 1), np.uint8)
    filters[1:, 0] = filtered[:, 0]
    data = np.concatenate([above[None], filtered[:, 1:]]).reshape(rows, -1, pictures, each)
    header = Header(data.shape[1], rows, 8, _COLOUR_TYPES[each])
    result = np.empty_like(data)
    for i in range(pictures):
        part = np.concatenate([filters, data[:, :, i].reshape(rows, -1)], 1)
        with Image.open(io.BytesIO(picture(header, b"", part))) as image:
            result[:, :, i] = np.asarray(image).reshape(rows, -1, each)
    return result.reshape(rows, -1)[1:]
