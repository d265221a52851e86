"""Tiles of 4 x 4 results that cover maps (:mod:`deflow_aug.flow.winograd`), and parts of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

BAND = 512
"""Tiles whose products are computed at once: what fits into a core's cache."""


@dataclass(frozen=True)
class Grid:
    """The tiles of maps [batch, height, width], all of them in the order of memory."""

    batch: int
    height: int
    width: int

    @classmethod
    def over(cls, pixels: Tensor, repeats: int) -> Grid:
        """Of maps [B, H, W, C] whose pixels stand so often in both directions."""
        batch, height, width, _ = pixels.shape
        return cls(batch, height * repeats, width * repeats)

    @property
    def rows(self) -> int:
        return -(-self.height // 4)

    @property
    def columns(self) -> int:
        return -(-self.width // 4)

    @property
    def tiles(self) -> int:
        return self.batch * self.rows * self.columns

    @property
    def rows_together(self) -> int:
        """Of how many rows the tiles are computed together."""
        return min(self.batch * self.rows, max(1, BAND // self.columns))

    @property
    def tiles_together(self) -> int:
        return self.rows_together * self.columns

    @property
    def whole(self) -> Region:
        """All of them."""
        return Region(slice(0, self.batch), slice(0, self.rows), self.columns)

    def padded(self, like: Tensor, channels: int) -> Tensor:
        """Zeros for maps with the border that tiles need, [B, 4 rows + 2, 4 columns + 2, C]."""
        return like.new_zeros(self.batch, 4 * self.rows + 2, 4 * self.columns + 2, channels)

    def images_together(self, most: int = BAND) -> list[slice]:
        """Images after images that have about so many tiles, or one at a time."""
        each = max(1, most // (self.rows * self.columns))
        return [slice(i, min(i + each, self.batch)) for i in range(0, self.batch, each)]

    def regions(self, most: int = BAND) -> list[Region]:
        """Parts of about so many tiles, from top to bottom, one image after the other."""
        together = self.images_together(most)
        several = self.rows * self.columns <= most // 2
        parts = 1 if several else -(-self.rows // max(1, most // self.columns))
        rows = -(-self.rows // parts)
        return [
            Region(images, slice(top, min(top + rows, self.rows)), self.columns)
            for images in together
            for top in range(0, self.rows, rows)
        ]

    def of(self, region: Region) -> Grid:
        """Its tiles alone, as maps of their own."""
        images, rows = region.images, region.rows
        height = min(4 * rows.stop, self.height) - 4 * rows.start
        return Grid(images.stop - images.start, height, self.width)


@dataclass(frozen=True)
class Region:
    """Some rows of tiles of some images."""

    images: slice
    rows: slice
    columns: int

    @property
    def tiles(self) -> int:
        images, rows = self.images, self.rows
        return (images.stop - images.start) * (rows.stop - rows.start) * self.columns

    def own(self, pixels: Tensor) -> Tensor:
        """Its tiles' pixels of maps [B, H, W, C]."""
        return pixels[self.images, 4 * self.rows.start : 4 * self.rows.stop]

    def seen(self, repeats: int) -> slice:
        """The rows that its tiles see of maps whose pixels stand so often: from one above."""
        stride = 4 // repeats
        return slice(stride * self.rows.start - 1, stride * self.rows.stop + 1)

    def windows(self, padded: Tensor) -> Tensor:
        """All that its tiles see of a map with their border."""
        return padded[self.images, 4 * self.rows.start : 4 * self.rows.stop + 2]

    def pixels(self, padded: Tensor) -> Tensor:
        """Its tiles' own pixels in such a map, [images, rows, columns, 4, 4, C]."""
        own = padded[self.images, 1 + 4 * self.rows.start : 1 + 4 * self.rows.stop, 1:-1]
        return own.unflatten(2, (-1, 4)).unflatten(1, (-1, 4)).transpose(2, 3)
