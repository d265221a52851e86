"""One place for reading and writing image files."""

from __future__ import annotations

import io
import math
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError, features

from deflow_aug.images import SIXTEEN_BIT_GREY, Array, check_shape

# What each file format holds without loss of bands or depth, as Pillow modes. Pillow itself
# would drop or squeeze the rest without a word in some formats.
_GREY_AND_RGB = frozenset({"1", "L", "RGB"})
_MODES = {
    "BMP": _GREY_AND_RGB | {"P"},
    "GIF": frozenset({"1", "L", "P"}),
    "JPEG": frozenset({"L", "RGB", "CMYK", "YCbCr"}),
    "PNG": _GREY_AND_RGB | {"LA", "P", "RGBA", "I;16"},
    "PPM": _GREY_AND_RGB,
    "PGM": frozenset({"1", "L", "I;16"}),
    "TIFF": _GREY_AND_RGB
    | {"LA", "P", "PA", "RGBA", "I", "I;16", "I;16B", "F", "CMYK", "YCbCr", "LAB"},
    "WEBP": _GREY_AND_RGB | {"LA", "P", "RGBA"},
}
_FORMATS = dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG")
_FORMATS |= {".tif": "TIFF", ".tiff": "TIFF"}
_FORMATS |= {f".{name.lower()}": name for name in _MODES if name not in _FORMATS.values()}
_OPTIONS: dict[str, dict[str, Any]] = {
    # Full chroma resolution: a re-encode must not wash out the degradation.
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
}
PNG_LEVEL = 3
"""Compression of PNG files. Noise hardly gets smaller at higher levels, it only takes longer."""

_KEEPS_PROFILE_AND_EXIF = frozenset({"JPEG", "PNG", "TIFF", "WEBP"})
_KEEPS_COLOUR_KEY = frozenset({"GIF", "PNG", "WEBP"})

# Read, but not written. Pillow before 11.3 does not know the name, later ones may be built without.
_AVIF = "avif" in features.modules and features.check("avif")
IMAGE_SUFFIXES: frozenset[str] = frozenset(_FORMATS) | ({".avif"} if _AVIF else set())
"""Suffixes of image files that are read here."""

RAW_SUFFIXES = frozenset(
    (
        *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf"),
        *(".iiq", ".kdc", ".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf"),
        *(".pef", ".raf", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"),
    )
)
"""Of what cameras store before it is a picture."""

UNREAD_SUFFIXES = (
    RAW_SUFFIXES | {".avif", ".heic", ".heif", ".hif", ".j2k", ".jp2", ".jxl"}
) - IMAGE_SUFFIXES
"""Of photographs that are not read here."""


class UnreadableImageError(OSError):
    """The file exists but is no image that can be decoded in full."""


class TooLargeError(UnreadableImageError):
    """The image has more pixels than Pillow decodes at once."""


LEFT_OUT = (
    UnreadableImageError,
    FileNotFoundError,
    PermissionError,
    ImportError,  # OpenCV, which some formats need
    ValueError,
)
"""What reading and unpacking raise where one file is at fault, or cannot be read here; others can.

Not so memory and disk errors, which concern all files.
"""


def read_image(path: str | os.PathLike[str]) -> Image.Image | Array:
    """Read an image file, upright: its EXIF orientation is applied and dropped.

    Returns a fully loaded PIL image; the file is closed. Pillow holds colour in 8 bits only, so
    PNG, TIFF and PPM files with 16-bit RGB, and PNG with 16-bit grey and alpha, come back as a
    uint16 array (H, W, 2, 3 or 4), grey and alpha, RGB or RGBA, without profile or EXIF data;
    this needs OpenCV. Of animations and multi-page files the first image is read.

    Raises UnreadableImageError for a file that is no image, truncated, damaged, or larger than
    Pillow's limit against decompression bombs; ImportError if OpenCV is needed and missing; and
    OSError, such as FileNotFoundError, if the file cannot be read at all.
    """
    path = Path(path)
    _check_kind(path)
    return decoded(path.read_bytes(), path)


def decoded(data: bytes, path: Path) -> Image.Image | Array:
    """What `read_image` returns, of a file's contents; raises as that does."""
    if not data:
        raise UnreadableImageError(f"cannot read image {path}: the file is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data)) as img:
            full_scale = _deep_colour(img, data)
            # Also for deep colour: of a truncated file OpenCV returns what is there, without error.
            img.load()
            if full_scale is None:
                return _upright(img)
            return _read_deep(data, full_scale, orientation(img))
    except (ImportError, MemoryError):
        raise  # nothing is wrong with the file
    except UnidentifiedImageError as error:
        reason = _unknown(path, io.BytesIO(data))
        raise UnreadableImageError(f"cannot read image {path}: {reason}") from error
    except Image.DecompressionBombError as error:
        raise too_large(path, BY_HAND) from error
    except Exception as error:  # decoders meet damaged files with exceptions of many kinds
        raise UnreadableImageError(f"cannot read image {path}: {error}") from error


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Height and width by the file's header, without decoding the picture.

    They are those of the stored picture: an EXIF orientation may swap them in `read_image`. What
    follows the header may still be damaged. Raises as `read_image` does.
    """
    path = Path(path)
    _check_kind(path)
    try:
        with open(path, "rb") as file, Image.open(file) as img:
            return img.height, img.width
    except Image.DecompressionBombError as error:
        raise too_large(path, BY_HAND) from error
    except UnidentifiedImageError as error:
        reason = "the file is empty (0 bytes)"
        if path.stat().st_size:
            with open(path, "rb") as file:
                reason = _unknown(path, file)
        raise UnreadableImageError(f"cannot read image {path}: {reason}") from error
    except MemoryError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise  # of the file system, not of the decoder
        raise UnreadableImageError(f"cannot read image {path}: {error}") from error
    except Exception as error:
        raise UnreadableImageError(f"cannot read image {path}: {error}") from error


def _check_kind(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise UnreadableImageError(
            f"cannot read image {path}: it is a link to {os.readlink(path)}, which leads nowhere"
        )
    # Opening a pipe would wait for somebody to write into it, for ever.
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UnreadableImageError(f"cannot read image {path}: it is no regular file")
    # Pillow takes some of them for TIFF files, and the small preview in them for the picture.
    if path.suffix.lower() in RAW_SUFFIXES and path.is_file():
        raise UnreadableImageError(
            f"cannot read image {path}: camera raw is not read; develop it into a PNG or TIFF file"
        )


def _unknown(path: Path, file: BinaryIO) -> str:
    """Why Pillow knows no format for a file that is not empty."""
    if (suffix := path.suffix.lower()) in UNREAD_SUFFIXES:
        return f"{suffix} files are not read; convert it to PNG first"
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
        file.seek(tags.next)
        tags.load(file)
        channels = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))[0]
        kind = tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0]
    except Exception:  # it is no TIFF file, or damaged
        bits, kind = 0, 0
    if bits > 16 or kind == 3:
        numbers = "floating-point numbers" if kind == 3 else "integers"
        return (
            f"a TIFF file with {channels} channels of {bits}-bit {numbers}, which Pillow does not "
            "know; make it an image of 8 or 16 bits first"
        )
    return "not an image, damaged at its beginning, or of a format that Pillow does not know"


BY_HAND = "cut it into parts, or, if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS before"


def too_large(path: Path, remedy: str) -> TooLargeError:
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
    return TooLargeError(
        f"cannot read image {path}: it has more than {limit:.3g} megapixels, Pillow's limit "
        f"against decompression bombs, files made to fill the memory; {remedy}"
    )


# Damaged EXIF data raise exceptions of several kinds in Pillow, when read and when written. The
# picture itself is sound, so they are dropped.


def _upright(img: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(img)
    except Exception:
        copy = img.copy()
        copy.info.pop("exif", None)
        return copy


def orientation(img: Image.Image) -> int:
    try:
        return int(img.getexif().get(0x0112, 1))
    except Exception:
        return 1


def _is_sound(exif: bytes) -> bool:
    try:
        Image.Exif().load(exif)
    except Exception:
        return False
    return True


def _deep_colour(img: Image.Image, data: bytes) -> int | None:
    """The stored value of white if `img`, not yet loaded, has more than 8 bits of colour."""
    if img.format == "PNG":
        # In the header chunk: bits a sample, then 2 for RGB, 4 for grey and alpha, 6 for RGBA.
        return 65535 if data[24] == 16 and data[25] in (2, 4, 6) else None
    if img.format == "TIFF":
        bits = getattr(img, "tag_v2", {}).get(TiffImagePlugin.BITSPERSAMPLE, ())
        return 65535 if img.mode in ("RGB", "RGBA") and set(bits) == {16} else None
    if img.format == "PPM" and img.mode == "RGB":
        args = getattr(img, "tile", [(None, None, None, ())])[0][3]
        if isinstance(args, tuple) and isinstance(args[-1], int) and args[-1] > 255:
            return args[-1]
    return None


def _read_deep(data: bytes, full_scale: int, orientation: int) -> Array:
    cv2 = _opencv()
    decoded: Array | None = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.dtype != np.uint16 or decoded.ndim != 3:
        raise ValueError("OpenCV cannot decode its 16-bit colours")
    if data[:4] == b"\x89PNG" and data[25] == 4:
        array = decoded[..., [0, 3]]  # grey, which OpenCV repeats, and alpha
    else:
        array = decoded[..., [2, 1, 0, 3][: decoded.shape[-1]]]
    if full_scale != 65535:
        array = np.rint(array * (65535 / full_scale)).astype(np.uint16)
    # TIFF orientations never get here: both Pillow and OpenCV apply them while decoding.
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def _opencv() -> Any:
    try:
        import cv2
    except Exception as error:  # broken installations fail in other ways than ImportError too
        raise ImportError(
            f"16-bit colour images need OpenCV, which cannot be imported ({error}); "
            f"pip install opencv-python-headless"
        ) from error
    return cv2


def write_image(image: Image.Image | Array, path: str | os.PathLike[str]) -> None:
    """Write a PIL image, or a uint8 or uint16 array (H, W) or (H, W, C), C from 1 to 4.

    The suffix sets the format. WebP is written lossless, JPEG at quality 95 with full chroma
    resolution. The colour profile, EXIF data and resolution of a PIL image are kept where the
    format takes them. 16-bit colour goes to PNG, TIFF or (RGB) PPM and needs OpenCV; 16-bit grey
    with alpha is written as RGBA. The file appears under its name complete or not at all, and
    takes the place of an older one.

    Raises TypeError for another type or dtype, ValueError for a wrong shape, an unknown suffix
    or one whose format cannot hold the image, ImportError if OpenCV is needed and missing, and
    OSError, such as FileNotFoundError, if the folder cannot be written to.
    """
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(
            f"cannot write {path}: unknown suffix {path.suffix!r}, use one of "
            f"{', '.join(sorted(_FORMATS))}"
        )
    data = encoded(image, path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: its folder does not exist; create it first")
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file's name; the file takes the place of `path` at the end, if all goes well."""
    # A name of its own in the same folder, since only there os.replace is atomic. Unlike one from
    # the tempfile module it gets the permissions that the user's other new files get.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def encoded(image: Image.Image | Array, path: Path, png_level: int = PNG_LEVEL) -> bytes:
    """The contents of the file that `write_image` writes; raises as that does.

    png_level: compression of PNG files, 0 (none) to 9.
    """
    if isinstance(image, np.ndarray):
        if image.dtype.name not in ("uint8", "uint16"):
            raise TypeError(
                f"cannot write {path}: arrays must be uint8 or uint16, got {image.dtype}; floats "
                f"in [0, 1] become uint8 by (image * 255).round().astype(np.uint8)"
            )
        layout = "an array (H, W) or (H, W, C)"
        if image.ndim not in (2, 3):
            raise ValueError(f"cannot write {path}: expected {layout}, got shape {image.shape}")
        channels = 1 if image.ndim == 2 else image.shape[-1]
        check_shape(image.shape, channels, layout, f"; cannot write {path}")
        if channels == 1:
            image = image.reshape(image.shape[:2])
        elif image.dtype.name == "uint16":
            return _encoded_deep(image, path, png_level)
        image = Image.fromarray(image.astype(image.dtype.newbyteorder("=")))
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"cannot write {path}: expected a PIL image or a NumPy array, got "
            f"{type(image).__qualname__}"
        )
    name = _FORMATS[path.suffix.lower()]
    if image.mode not in _MODES[name] and "I;16" in _MODES[name]:
        image = _sixteen_bit_grey(image)
    if image.mode not in _MODES[name]:
        raise ValueError(
            f"{path.suffix} files cannot hold mode {image.mode} ({path}); use another suffix, or "
            f"convert the image first (modes for {path.suffix}: {', '.join(sorted(_MODES[name]))})"
        )
    if "transparency" in image.info and name not in _KEEPS_COLOUR_KEY:
        raise ValueError(
            f"{path.suffix} files cannot hold the transparent colour of this {image.mode} image "
            f'({path}); use .png, or convert the image with image.convert("RGBA")'
        )
    options = dict(_OPTIONS.get(name, {}))
    if name == "PNG":
        options["compress_level"] = png_level
    if name in _KEEPS_PROFILE_AND_EXIF:
        if profile := image.info.get("icc_profile"):
            options["icc_profile"] = profile
        if (exif := image.info.get("exif")) and _is_sound(exif):
            options["exif"] = exif
    dpi = image.info.get("dpi")
    if name != "WEBP" and dpi and all(math.isfinite(float(d)) and float(d) > 0 for d in dpi):
        options["dpi"] = tuple(float(d) for d in dpi)
    buffer = io.BytesIO()
    image.save(buffer, "PPM" if name == "PGM" else name, **options)
    return buffer.getvalue()


def _sixteen_bit_grey(image: Image.Image) -> Image.Image:
    """The image in mode "I;16" if it is grey of another integer mode and fits, or unchanged."""
    if image.mode not in SIXTEEN_BIT_GREY | {"I"}:
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        return image
    converted = Image.fromarray(values.astype(np.uint16))
    converted.info.update(image.info)
    return converted


def _encoded_deep(image: Array, path: Path, png_level: int) -> bytes:
    """Encode uint16 (H, W, 2, 3 or 4)."""
    channels, suffix = image.shape[-1], path.suffix.lower()
    suffixes = (".png", ".tif", ".tiff") + ((".ppm",) if channels == 3 else ())
    if suffix not in suffixes:
        raise ValueError(
            f"{path.suffix} files cannot hold 16-bit colour with {channels} channels ({path}); "
            f"use one of {', '.join(suffixes)}, or convert to uint8"
        )
    cv2 = _opencv()
    order = {2: [0, 0, 0, 1], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
    native = np.ascontiguousarray(image[..., order], np.uint16)
    flags = [cv2.IMWRITE_PNG_COMPRESSION, png_level] if suffix == ".png" else []
    done, data = cv2.imencode(suffix, native, flags)
    if not done:
        raise OSError(f"OpenCV cannot encode {path}")
    encoded: bytes = data.tobytes()
    return encoded
