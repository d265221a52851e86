"""One place for converting images.

Inside the library an image is a float32 tensor of shape (B, 3, H, W) with values in [0, 1].
Outside it is whatever the user has: `unpack` turns a PIL image, a NumPy array or a tensor into
that form, and the object it returns knows how to turn results back into what came in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

__all__ = ["UnpackedImage", "check_shape", "unpack"]

Array: TypeAlias = npt.NDArray[Any]
Picture: TypeAlias = Image.Image | Array | Tensor

# The stored value that means 1.0, for every dtype that is accepted.
_FULL_SCALE = {"uint8": 255.0, "uint16": 65535.0}
_FULL_SCALE |= dict.fromkeys(("float16", "bfloat16", "float32", "float64"), 1.0)

SIXTEEN_BIT_GREY = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
_PREMULTIPLIED = frozenset({"La", "RGBa"})
# Colour spaces that Pillow converts to and from RGB in 8 bits.
_THROUGH_RGB = frozenset({"YCbCr", "HSV", "LAB"})
# Read straight from their stored bands. "RGBX" has a padding band, which is carried like alpha.
_DIRECT = frozenset({"L", "LA", "RGB", "RGBA", "RGBX", "CMYK", "I", "F"})
_CARRIED = _DIRECT | SIXTEEN_BIT_GREY | _PREMULTIPLIED | _THROUGH_RGB
# A palette or a colour key cannot survive a change of colours, so these modes change.
_CHANGED_MODE = {"1": ("L", "LA"), "L": ("L", "LA"), "P": ("RGB", "RGBA"), "RGB": ("RGB", "RGBA")}


class _Carrier(Protocol):
    """Rebuilds the caller's kind of image from colours of shape (N, B, 3, H, W) in [0, 1]."""

    def build(self, samples: Tensor) -> Any: ...


@dataclass(frozen=True, eq=False)
class UnpackedImage:
    """An image as the library sees it, and the way back.

    pixels: float32 (B, 3, H, W) in [0, 1], contiguous, on the input's device (CPU for PIL images
        and arrays). It shares no memory with the input.
    """

    pixels: Tensor
    _carrier: _Carrier = field(repr=False)

    def pack(self, samples: Tensor, stack: bool = False) -> Any:
        """Turn samples into the kind of image that came in.

        samples: floats of shape (N, B, 3, H, W), on any device; values are clamped to [0, 1] and
            rounded to the nearest value the output can hold.
        stack: False returns one image like the input, and N must be 1. True returns a list of N
            images for a PIL input, and an array or tensor with N as a new first axis otherwise.

        Type, dtype, size and device are those of the input, and a tensor keeps its memory format.
        Alpha is that of the input, bit for bit. Grey images take the BT.601 luma of the sample.

        Raises TypeError for samples that are no float tensor, and ValueError for a wrong shape,
        for N other than 1 without stack, and for samples that are not finite.
        """
        if not isinstance(samples, Tensor) or not samples.is_floating_point():
            given = f"a {samples.dtype} tensor" if isinstance(samples, Tensor) else type(samples)
            raise TypeError(f"samples must be a float tensor with values in [0, 1], got {given}")
        expected = tuple(self.pixels.shape)
        if samples.ndim != 5 or tuple(samples.shape[1:]) != expected or len(samples) == 0:
            raise ValueError(
                f"samples must have shape (N, B, 3, H, W) = (N, {', '.join(map(str, expected))}) "
                f"with N at least 1, got {tuple(samples.shape)}"
            )
        if not stack and len(samples) != 1:
            raise ValueError(
                f"stack=False returns one image, got {len(samples)} samples; pass stack=True for "
                f"all of them, or samples[:1] for the first"
            )
        # Tensors made in inference mode could not be trained on, so what is returned is not.
        with torch.inference_mode(False), torch.no_grad():
            samples = samples.detach().to(torch.float32)
            # NaN would otherwise become an arbitrary integer without a word.
            if not bool(torch.isfinite(samples).all()):
                raise ValueError("samples must be finite, got NaN or infinity")
            built = self._carrier.build(samples.clamp(0, 1))
            result = built if stack else built[0]
        # Last, for an item of a torchvision image is a plain tensor.
        kind = getattr(self._carrier, "kind", Tensor)
        return result if kind is Tensor else result.as_subclass(kind)


def unpack(img: Picture) -> UnpackedImage:
    """Read an image of any supported kind; the input is never modified.

    PIL images of these modes come back in the same mode: L, LA, La, RGB, RGBA, RGBa, RGBX, CMYK,
    I;16 in every byte order, I, F, YCbCr, HSV and LAB. "I" is read as [0, 65535] and "F" as
    [0, 1]. YCbCr, HSV and LAB go through 8-bit RGB, but pixels whose RGB value does not change
    keep their bytes. CMYK is read without its profile, and keeps its black ink where the new
    colour allows it. Modes that cannot hold the result change: 1 becomes L, P becomes RGB or
    RGBA, PA becomes RGBA, and L or RGB with a transparent colour (a colour key) become LA or
    RGBA. The colour profile, EXIF data and resolution are kept. Pixels are taken as they are
    stored: an EXIF orientation is neither applied nor dropped here (`read_image` applies it).

    NumPy arrays are (H, W), (H, W, C) or (B, H, W, C), tensors are (C, H, W) or (B, C, H, W),
    with C = 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA. They hold uint8, uint16, or floats in
    [0, 1] (float16, bfloat16, float32, or float64, which is worked on in float32). Floats may
    leave [0, 1] by up to 0.001, and are then clamped.

    Raises TypeError for another type or dtype, and ValueError for a wrong shape, an empty image,
    an unsupported mode, or colours that are not finite or out of range.
    """
    if isinstance(img, Image.Image):
        return _unpack_pil(img)
    if isinstance(img, np.ndarray):
        return _unpack_array(img)
    if isinstance(img, Tensor):
        return _unpack_tensor(img)
    raise TypeError(
        f"expected a PIL image, a NumPy array or a torch tensor, got {type(img).__qualname__}; "
        f"read a file with read_image first"
    )


# -- values: stored numbers to [0, 1] and back -----------------------------------------------


def _full_scale(dtype: str) -> float:
    if dtype not in _FULL_SCALE:
        raise TypeError(
            f"image dtype must be one of {', '.join(_FULL_SCALE)}, got {dtype}; convert it first "
            f"(masks with values 0 and 1, for example, to uint8 times 255)"
        )
    return _FULL_SCALE[dtype]


def _pixels(bands: Tensor, scale: float) -> Tensor:
    """Colours of stored bands (B, C, H, W) as new float32 (B, 3, H, W) in [0, 1]; no alpha."""
    colour = bands[:, : 3 if bands.shape[1] >= 3 else 1].to(torch.float32) / scale
    if scale == 1.0:
        _check_unit_range(colour)
    return colour.clamp_(0, 1).expand(-1, 3, -1, -1).contiguous()


def _check_unit_range(colour: Tensor) -> None:
    low, high = (bound.item() for bound in torch.aminmax(colour))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("float images must be finite, got NaN or infinity; replace these values")
    if low >= -1e-3 and high <= 1 + 1e-3:
        return
    if high > 2:
        hint = f"divide by {255 if high <= 256 else 65535}, or pass integers as uint8 or uint16"
        if low < -1e-3:
            hint = "undo the normalisation first"
    elif low < -0.5:
        hint = "undo the normalisation first; from [-1, 1] that is (image + 1) / 2"
    else:
        hint = "clamp to [0, 1] first (resizing with bicubic or Lanczos filters overshoots)"
    raise ValueError(f"float images must lie in [0, 1], got [{low:.6g}, {high:.6g}]; {hint}")


def _stored(samples: Tensor, channels: int, scale: float) -> Tensor:
    """Samples (N, B, 3, H, W) as float32 numbers to store, (N, B, 1 or 3, H, W); no alpha."""
    if channels < 3:
        red, green, blue = torch.split(samples, 1, dim=2)
        # BT.601 luma, written so that equal channels give back exactly their value.
        samples = green + 0.299 * (red - green) + 0.114 * (blue - green)
        samples = samples.clamp(0, 1)
    return samples if scale == 1.0 else (samples * scale).round_()


def check_shape(shape: Sequence[int], channels: int, layout: str, hint: str) -> None:
    if 0 in shape:
        raise ValueError(f"the image is empty: shape {tuple(shape)}")
    if channels not in (1, 2, 3, 4):
        raise ValueError(
            f"expected {layout} with C = 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA), "
            f"got shape {tuple(shape)}{hint}"
        )


# -- tensors -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _TensorCarrier:
    kind: type[Tensor]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    alpha: Tensor | None  # (B, 1, H, W) or (1, H, W)

    def build(self, samples: Tensor) -> Tensor:
        channels, n = self.shape[-3], len(samples)
        colour = _stored(samples.to(self.device), channels, _FULL_SCALE[_name(self.dtype)])
        out = torch.empty_strided(
            (n, *self.shape),
            (math.prod(self.shape), *self.strides),
            dtype=self.dtype,
            device=self.device,
        )
        bands = colour.shape[2]
        out[..., :bands, :, :] = colour.reshape(n, *self.shape[:-3], bands, *self.shape[-2:])
        if self.alpha is not None:
            out[..., bands:, :, :] = self.alpha
        return out


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unpack_tensor(img: Tensor) -> UnpackedImage:
    # Subclasses such as torchvision's images come back as they were, parameters as plain tensors.
    kind = Tensor if isinstance(img, torch.nn.Parameter) else type(img)
    img = img.detach().as_subclass(Tensor)
    if img.ndim not in (3, 4):
        hint = "; add the channel axis with img[None]" if img.ndim == 2 else ""
        raise ValueError(
            f"expected a tensor (C, H, W) or (B, C, H, W), got shape {tuple(img.shape)}{hint}"
        )
    hint = ""
    if img.shape[-1] in (1, 2, 3, 4):
        order = "2, 0, 1" if img.ndim == 3 else "0, 3, 1, 2"
        hint = f"; channels look to be last, so pass img.permute({order})"
    check_shape(img.shape, img.shape[-3], "a tensor (C, H, W) or (B, C, H, W)", hint)
    scale = _full_scale(_name(img.dtype))
    alpha = img[..., -1:, :, :].clone() if img.shape[-3] in (2, 4) else None
    # A meta tensor works out the strides of a dense tensor in this memory format, for free.
    strides = torch.empty_like(img, device="meta").stride()
    carrier = _TensorCarrier(kind, tuple(img.shape), strides, img.dtype, img.device, alpha)
    return UnpackedImage(_pixels(img if img.ndim == 4 else img[None], scale), carrier)


# -- arrays ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _ArrayCarrier:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    alpha: Array | None  # (B, H, W, 1)

    def build(self, samples: Tensor) -> Array:
        n, b, _, h, w = samples.shape
        channels = 1 if len(self.shape) == 2 else self.shape[-1]
        colour = _stored(samples, channels, _FULL_SCALE[self.dtype.name]).cpu().numpy()
        out = np.empty((n, b, h, w, channels), self.dtype)
        out[..., : colour.shape[2]] = np.moveaxis(colour, 2, -1)
        if self.alpha is not None:
            out[..., -1:] = self.alpha
        return out.reshape(n, *self.shape)


def _unpack_array(img: Array) -> UnpackedImage:
    scale = _full_scale(img.dtype.name)
    layout = "an array (H, W), (H, W, C) or (B, H, W, C)"
    if img.ndim not in (2, 3, 4):
        raise ValueError(f"expected {layout}, got shape {img.shape}")
    channels = 1 if img.ndim == 2 else img.shape[-1]
    hint = ""
    if img.ndim > 2 and img.shape[-3] in (1, 2, 3, 4):
        hint = "; channels look to be first, so pass np.moveaxis(img, -3, -1)"
    check_shape(img.shape, channels, layout, hint)
    bands = img.reshape(-1, *(img.shape[:2] if img.ndim == 2 else img.shape[-3:-1]), channels)
    alpha = bands[..., -1:].copy() if channels in (2, 4) else None
    # Torch knows neither foreign byte orders nor negative strides: astype settles both.
    colour = torch.from_numpy(bands.astype(np.float32, order="C")).permute(0, 3, 1, 2)
    return UnpackedImage(_pixels(colour, scale), _ArrayCarrier(img.shape, img.dtype, alpha))


# -- PIL images --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _PilCarrier:
    mode: str
    size: tuple[int, int]
    info: dict[str, Any]
    bands: _ArrayCarrier  # how the mode's bands, or RGB on the way to it, are stored
    raw: Array  # the input's bands in that mode, (H, W) or (H, W, C)

    def build(self, samples: Tensor) -> list[Image.Image]:
        if self.mode == "CMYK":
            return [self._image(_cmyk(sample[0], self.raw)) for sample in samples]
        if self.mode in _PREMULTIPLIED:
            alpha = torch.from_numpy(self.raw[..., -1].astype(np.float32)) / 255
            samples = samples * alpha.to(samples.device)
        stored = self.bands.build(samples)
        if self.mode in _THROUGH_RGB:
            return [self._image(self._from_rgb(rgb)) for rgb in stored]
        return [self._image(one.astype(self.raw.dtype)) for one in stored]

    def _from_rgb(self, rgb: Array) -> Array:
        before = Image.frombytes(self.mode, self.size, self.raw.tobytes())
        unchanged = (rgb == np.asarray(_converted(before, "RGB"))).all(axis=-1, keepdims=True)
        return np.where(
            unchanged, self.raw, np.asarray(_converted(Image.fromarray(rgb), self.mode))
        )

    def _image(self, stored: Array) -> Image.Image:
        image = Image.frombytes(self.mode, self.size, stored.tobytes())
        image.info.update(self.info)
        return image


def _unpack_pil(img: Image.Image) -> UnpackedImage:
    if 0 in img.size:
        raise ValueError(f"the image is empty: size {img.size[0]}x{img.size[1]}")
    info: dict[str, Any] = {
        key: img.info[key] for key in ("icc_profile", "exif", "dpi") if key in img.info
    }
    if img.mode == "PA":
        img = img.convert("RGBA")
    elif img.mode in ("1", "P") or (img.mode in _CHANGED_MODE and "transparency" in img.info):
        img = img.convert(_CHANGED_MODE[img.mode][img.has_transparency_data])
    elif img.mode not in _CARRIED:
        raise ValueError(
            f"PIL mode {img.mode!r} is not supported; convert the image first, for example with "
            f'img.convert("RGB")'
        )
    mode, raw = img.mode, np.array(img)
    bands = raw
    if mode == "I":
        if raw.min() < 0 or raw.max() > 65535:
            raise ValueError(
                f'PIL images of mode "I" must hold 16-bit values in [0, 65535], got '
                f"[{raw.min()}, {raw.max()}]; rescale the image, or pass a float array in [0, 1]"
            )
        bands = raw.astype(np.uint16)
    elif mode in _PREMULTIPLIED:
        opaque = raw[..., :-1] / np.maximum(raw[..., -1:], np.uint8(1))
        bands = np.minimum(opaque, 1).astype(np.float32)
    elif mode == "CMYK":
        paper = 1 - raw.astype(np.float32) / 255
        bands = paper[..., :3] * paper[..., 3:]
    elif mode in _THROUGH_RGB:
        bands = np.asarray(_converted(img, "RGB"))
    unpacked = _unpack_array(bands)
    carrier = unpacked._carrier
    assert isinstance(carrier, _ArrayCarrier)
    if mode in _PREMULTIPLIED:
        carrier = _ArrayCarrier(raw.shape, raw.dtype, raw[None, ..., -1:])
    return UnpackedImage(unpacked.pixels, _PilCarrier(mode, img.size, info, carrier, raw))


def _converted(img: Image.Image, mode: str) -> Image.Image:
    """`img.convert(mode)`, also from and to LAB, for which Pillow needs colour management."""
    if "LAB" not in (img.mode, mode):
        return img.convert(mode)
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    source, target = (lab, srgb) if img.mode == "LAB" else (srgb, lab)
    converted = ImageCms.profileToProfile(img, source, target, outputMode=mode)
    assert converted is not None  # None is for inPlace=True
    return converted


def _cmyk(sample: Tensor, before: Array) -> Array:
    """Inks, uint8 (H, W, 4), that print `sample`, (3, H, W), starting from the inks `before`."""
    rgb = np.moveaxis(sample.cpu().numpy(), 0, -1).astype(np.float64) * 255
    # Black ink is kept unless the new colour is too bright for it. The small allowance is for
    # float32 rounding, which must not take a level of ink from an unchanged pixel.
    black = np.minimum(before[..., 3:], np.floor(255.01 - rgb.max(axis=-1, keepdims=True)))
    paper = 255 - black
    inks = np.rint(255 - 255 * rgb / np.maximum(paper, 1)).clip(0, 255)
    # Under full black the other inks cannot be seen, so they stay as they were.
    inks = np.where(paper == 0, before[..., :3], inks)
    return np.concatenate([inks, black], axis=-1).astype(np.uint8)
