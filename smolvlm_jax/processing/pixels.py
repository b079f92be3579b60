"""One picture on its way from whatever the caller has to uint8 pixels that Pillow resizes.

The reference keeps float arrays in 0..1 as floats, but each of its resizes goes through uint8. So a picture here is always
uint8, with a flag that says whether the values stand for 0..255 or for 0..1; what the reference does to floats between two
resizes is a map of 256 values to 256 values.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, TypeGuard

import numpy as np
from PIL import Image, ImageColor

from ..errors import InputError
from .choices import one_of
from .orientation import upright

_log = logging.getLogger(__name__)
_WHITE = (255, 255, 255)
# Transparent pictures are laid over white this many rows at a time: in one step a whole picture would exist four times.
_STRIP = 128

# From uint8 to the float32 the reference holds after resizing a picture in 0..1 …
_SCALED = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
# … and to the uint8 it is truncated to before the next resize. Not the identity: k/255·255 can fall just below k.
_REQUANTIZED = (_SCALED.astype(np.float64) * 255).astype(np.float32).astype(np.uint8)


def is_array(value: object) -> TypeGuard[np.ndarray]:
    """Whether `value` is a numpy array, or an object that becomes one (a torch or jax array)."""
    return isinstance(value, np.ndarray) or (hasattr(value, "__array__") and hasattr(value, "ndim"))


def channel_axis(shape: Sequence[int], *, input_data_format: object = None, channels: Sequence[int] = (1, 3, 4)) -> int:
    """Which axis of a picture holds its channels, 0 or 2. A shape that allows both counts as channels first.

    Args:
        shape: the picture's shape.
        input_data_format: "channels_first" or "channels_last" where the caller knows it.
        channels: the numbers of channels a picture may have.

    Raises:
        InputError: the shape is not three-dimensional, or neither end is one of `channels`.
    """
    if len(shape) != 3:
        raise InputError(
            f"a picture array of shape {tuple(shape)}; it needs three dimensions: (height, width, channels) or "
            "(channels, height, width)"
        )
    if input_data_format is not None:
        name = one_of("input_data_format", input_data_format, ("channels_first", "channels_last"))
        return 0 if name == "channels_first" else 2
    if shape[0] in channels:
        return 0
    if shape[2] in channels:
        return 2
    raise InputError(
        f"a picture array of shape {tuple(shape)} has {' or '.join(map(str, channels))} channels neither first nor last"
    )


def as_colour(value: Any) -> tuple[int, int, int]:
    """A colour as three numbers 0..255: such numbers, or text that Pillow knows ("white", "#ffffff"). Raises InputError."""
    try:
        found = ImageColor.getrgb(value)[:3] if isinstance(value, str) else tuple(int(part) for part in value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{value!r} is no colour; pass a name, '#rrggbb', or three numbers from 0 to 255") from error
    if len(found) != 3 or not all(0 <= part <= 255 for part in found):
        raise InputError(f"{value!r} is no colour; pass a name, '#rrggbb', or three numbers from 0 to 255")
    return found


def has_alpha(image: Image.Image) -> bool:
    """Whether `image` may have transparent parts."""
    return any(band in ("A", "a") for band in image.getbands()) or image.info.get("transparency") is not None


def reduce_16bit(image: Image.Image) -> Image.Image:
    """A picture with 16-bit greys with these divided by 257; any other picture as it is."""
    if image.mode == "I":  # Pillow has 16-bit greys of some files in 32 bits
        values = np.asarray(image)
        if image.format != "PPM" and values.max(initial=0) <= 255:
            return image
        return Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8))
    return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)) if image.mode.startswith("I;16") else image


def flatten_alpha(image: Image.Image, background: Any = _WHITE) -> Image.Image:
    """`image` in RGB, from any mode of Pillow, with what is transparent laid over a colour (see `as_colour`)."""
    colour = (*as_colour(background), 255)
    premultiplied = {"RGBa": "RGBA", "La": "LA"}.get(image.mode)
    if premultiplied:  # Pillow converts these to nothing else
        image = image.convert(premultiplied)
    if not has_alpha(image):
        return image if image.mode == "RGB" else image.convert("RGB")
    width, height = image.size
    out = Image.new("RGB", image.size)
    for top in range(0, height, _STRIP):
        strip = image.crop((0, top, width, min(height, top + _STRIP))).convert("RGBA")
        out.paste(Image.alpha_composite(Image.new("RGBA", strip.size, colour), strip).convert("RGB"), (0, top))
    return out


def to_rgb(array: np.ndarray, background: Any = _WHITE) -> np.ndarray:
    """From (h, w, 1|3|4) to (h, w, 3) of the same dtype, with alpha laid over a colour."""
    channels = array.shape[-1]
    if channels == 1:
        return np.repeat(array, 3, axis=-1)
    if channels != 4:
        return array
    if np.issubdtype(array.dtype, np.floating) and array.size and (array.min() < 0 or array.max() > 1):
        raise InputError(f"a float picture with alpha has values from {array.min()} to {array.max()}; it needs 0 to 1")
    white = 255 if np.issubdtype(array.dtype, np.integer) else 1.0
    alpha = array[..., 3:4] / white
    under = (np.asarray(as_colour(background)) * (white / 255)).astype(alpha.dtype)
    blended = alpha * array[..., :3] + (1 - alpha) * under
    return (np.round(blended) if white == 255 else blended).astype(array.dtype)


def _to_uint8(array: np.ndarray) -> tuple[np.ndarray, bool]:
    """(uint8 array, whether its 0..255 stand for 0..1), by the reference's rule for the values of an array."""
    if array.dtype in (np.uint8, np.bool_):
        return array.astype(np.uint8, copy=False), False
    if not (np.issubdtype(array.dtype, np.number) and not np.issubdtype(array.dtype, np.complexfloating)):
        raise InputError(f"a picture array of dtype {array.dtype}; it needs numbers")
    if not np.isfinite(array).all():
        raise InputError("a picture array holds NaN or infinity")
    low, high = array.min(), array.max()
    whole = not np.issubdtype(array.dtype, np.floating)
    if whole or np.allclose(array, array.astype(np.int64)):
        if low >= 0 and high <= 255:
            return array.astype(np.uint8), False
        raise InputError(f"a picture array has values from {low} to {high}; whole numbers need 0 to 255 (uint8)")
    if low >= 0 and high <= 1:
        return (array.astype(np.float64) * 255).astype(np.float32).astype(np.uint8), True
    raise InputError(f"a picture array has values from {low} to {high}; fractions need 0 to 1, or uint8 from 0 to 255")


@dataclass(frozen=True)
class Picture:
    """Pixels ready to be resized.

    Attributes:
        image: a Pillow image of a uint8 mode, RGB unless the caller switched the conversion off.
        scaled: its values 0..255 stand for 0..1.
        resized: it has been resized before, so that a scaled picture is truncated once more before the next resize.
    """

    image: Image.Image
    _: KW_ONLY
    scaled: bool = False
    resized: bool = False

    def resize(self, size: tuple[int, int], resample: int) -> "Picture":
        """The picture at `size` = (height, width) with Pillow's filter `resample`, uint8 before and after."""
        source = self._requantize() if self.scaled and self.resized else self
        width_height = size[::-1]
        image = source.image if source.image.size == width_height else source.image.resize(width_height, resample=resample)
        return Picture(image, scaled=source.scaled, resized=True)

    def _requantize(self) -> "Picture":
        values = np.asarray(self.image)
        if ((values == 0) | (values == 255)).all():
            # Only zeros and ones: the reference takes them for whole numbers from here on, so for a nearly black picture.
            return Picture(Image.fromarray((values // 255).astype(np.uint8)), resized=True)
        return replace(self, image=Image.fromarray(_REQUANTIZED[values]))

    def pixels(self) -> np.ndarray:
        """The pixels as uint8 (height, width, channels)."""
        return np.atleast_3d(np.asarray(self.image))


def to_picture(
    value: Any,
    *,
    do_convert_rgb: bool = True,
    input_data_format: object = None,
    exif_transpose: bool = False,
    full_16bit: bool = False,
    background: Any = _WHITE,
) -> Picture:
    """A Picture from what a caller may pass.

    Args:
        value: a Pillow image of any mode, or an array (h, w, c) or (c, h, w) with c in 1, 3, 4: uint8, or whole numbers
            0..255 of any dtype, or fractions 0..1.
        do_convert_rgb: convert to RGB, with what is transparent laid over `background`.
        input_data_format: which of the two layouts an array has; None decides by its shape.
        exif_transpose: turn a Pillow image as its EXIF orientation says. Files are always turned; Pillow images only here.
        full_16bit: divide 16-bit greys by 257, and arrays of uint16; without it greys saturate at 255, and such arrays may
            hold 0 to 255 only.
        background: a colour as in `as_colour`.

    Raises:
        InputError: any other type, shape or range of values.
    """
    if isinstance(value, Image.Image):
        if exif_transpose:
            value = upright(value)
        if full_16bit:
            value = reduce_16bit(value)
        if do_convert_rgb:
            return Picture(flatten_alpha(value, background))
        array = np.atleast_3d(np.array(value))
    elif is_array(value):
        array = np.asarray(value)
        if full_16bit and array.dtype.kind == "u" and array.dtype.itemsize == 2:
            array = (array // 257).astype(np.uint8)
        if channel_axis(array.shape, input_data_format=input_data_format) == 0:
            array = np.moveaxis(array, 0, -1)
        if do_convert_rgb:
            array = to_rgb(array, background)
    else:
        raise InputError(f"a picture of type {type(value).__name__}; pass a Pillow image, an array, a path or a URL")
    if not array.size:
        raise InputError(f"a picture array of shape {array.shape} has no pixels")
    array, scaled = _to_uint8(array)
    squeezed = array[..., 0] if array.shape[-1] == 1 else array
    return Picture(Image.fromarray(np.ascontiguousarray(squeezed)), scaled=scaled)


@dataclass(kw_only=True)
class PixelRule:
    """How uint8 values become what the model reads. The defaults are those of the published checkpoints.

    A base of the image and video processors, whose arguments these are.

    Attributes:
        do_rescale: multiply by `rescale_factor`.
        rescale_factor: 1/255 takes 0..255 to 0..1.
        do_normalize: subtract `image_mean`, then divide by `image_std`.
        image_mean: one number, or one for each channel.
        image_std: one number, or one for each channel.
    """

    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: float | Sequence[float] = (0.5, 0.5, 0.5)
    image_std: float | Sequence[float] = (0.5, 0.5, 0.5)

    def table(self, channels: int, *, scaled: bool = False) -> np.ndarray:
        """What each uint8 value becomes, per channel.

        Rescaling multiplies in float64 and rounds to float32, normalising is (x − mean) / std in float32, as in the
        reference. Since every pixel is looked up, all results equal the reference's bit for bit.

        Args:
            channels: channels of the pictures.
            scaled: the values 0..255 stand for 0..1.

        Returns:
            (channels, 256), float32; uint8 if nothing is to be done.

        Raises:
            InputError: image_mean or image_std has another number of entries than there are channels.
        """
        values: np.ndarray = _SCALED if scaled else np.arange(256, dtype=np.uint8)
        if self.do_rescale:
            if scaled:
                _announce_rescaling()
            values = (values.astype(np.float64) * self.rescale_factor).astype(np.float32)
        values = np.broadcast_to(values, (channels, 256))
        if self.do_normalize:
            mean = _per_channel("image_mean", self.image_mean, channels)
            std = _per_channel("image_std", self.image_std, channels)
            values = (values.astype(np.float32) - mean[:, None]) / std[:, None]
        return np.ascontiguousarray(values)


@functools.cache
def _announce_rescaling() -> None:
    """Say once in a process what the reference warns of."""
    _log.warning(
        "a picture array with values from 0 to 1 is rescaled again; pass do_rescale=False, or uint8 (this is said once)"
    )


def _per_channel(name: str, value: float | Sequence[float], channels: int) -> np.ndarray:
    array = np.asarray(value, np.float32)
    if array.ndim == 0:
        return np.full(channels, array)
    if array.shape != (channels,):
        raise InputError(f"{name} has {array.size} entries, the pictures have {channels} channels")
    return array
