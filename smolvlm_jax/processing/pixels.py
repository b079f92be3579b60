"""One picture on its way from whatever the caller has to uint8 pixels that Pillow resizes.

The reference keeps float arrays in [0, 1] as floats, but every resize goes through uint8. So a picture here is always
uint8, with a note whether the values stand for 0..255 or for 0..1; what the reference does to floats between two
resizes is a map of 256 values to 256 values.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError

_WHITE = (255, 255, 255, 255)

# uint8 → the float32 the reference holds after resizing a picture in [0, 1] …
_SCALED = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
# … → the uint8 it is truncated to before the next resize. Not the identity: k/255·255 can fall just below k.
_REQUANTIZED = (_SCALED.astype(np.float64) * 255).astype(np.float32).astype(np.uint8)


def is_array(value) -> bool:
    """Whether `value` is a numpy array or something that turns into one (a torch or jax array)."""
    return isinstance(value, np.ndarray) or (hasattr(value, "__array__") and hasattr(value, "ndim"))


def channel_axis(shape: tuple[int, ...], input_data_format=None, channels=(1, 3, 4)) -> int:
    """Where the channels of a picture of `shape` are: 0 or 2. Ambiguous shapes count as channels first.

    Raises InputError when neither end has 1, 3 or 4 entries, or the picture is not three-dimensional.
    """
    if len(shape) != 3:
        raise InputError(
            f"a picture array of shape {tuple(shape)}; it needs three dimensions: (height, width, channels) or "
            "(channels, height, width)"
        )
    if input_data_format is not None:
        name = str(getattr(input_data_format, "value", input_data_format))
        if name not in ("channels_first", "channels_last"):
            raise InputError(f"input_data_format is {name!r}; it is 'channels_first' or 'channels_last'")
        return 0 if name == "channels_first" else 2
    if shape[0] in channels:
        return 0
    if shape[2] in channels:
        return 2
    raise InputError(
        f"a picture array of shape {tuple(shape)} has {' or '.join(map(str, channels))} channels neither first nor last"
    )


# Rows that are laid over white at a time: a whole picture would exist four times over.
_STRIP = 128


def flatten_alpha(image: Image.Image) -> Image.Image:
    """RGB from any Pillow mode, what is transparent laid over white."""
    premultiplied = {"RGBa": "RGBA", "La": "LA"}.get(image.mode)
    if premultiplied:  # Pillow converts these to nothing else
        image = image.convert(premultiplied)
    if not ("A" in image.getbands() or image.info.get("transparency") is not None):
        return image if image.mode == "RGB" else image.convert("RGB")
    width, height = image.size
    out = Image.new("RGB", image.size)
    for top in range(0, height, _STRIP):
        strip = image.crop((0, top, width, min(height, top + _STRIP))).convert("RGBA")
        out.paste(Image.alpha_composite(Image.new("RGBA", strip.size, _WHITE), strip).convert("RGB"), (0, top))
    return out


def _array_to_rgb(array: np.ndarray) -> np.ndarray:
    """(h, w, 1|3|4) → (h, w, 3) of the same dtype, alpha laid over white."""
    channels = array.shape[-1]
    if channels == 1:
        return np.repeat(array, 3, axis=-1)
    if channels != 4:
        return array
    if np.issubdtype(array.dtype, np.floating) and array.size and (array.min() < 0 or array.max() > 1):
        raise InputError(f"a float picture with alpha has values from {array.min()} to {array.max()}; it needs 0 to 1")
    white = 255 if np.issubdtype(array.dtype, np.integer) else 1.0
    alpha = array[..., 3:4] / white
    blended = alpha * array[..., :3] + (1 - alpha) * white
    return (np.round(blended) if white == 255 else blended).astype(array.dtype)


def _to_uint8(array: np.ndarray) -> tuple[np.ndarray, bool]:
    """(uint8 array, whether its 0..255 stand for 0..1), by the reference's rule for what an array may hold."""
    if array.dtype == np.uint8:
        return array, False
    if array.dtype == np.bool_:
        return array.astype(np.uint8), False
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

    image: a Pillow image of a uint8 mode, RGB unless the caller switched the conversion off.
    scaled: its 0..255 stand for 0..1.
    resized: it has been through a resize, so that a scaled one is truncated once more before the next.
    """

    image: Image.Image
    scaled: bool = False
    resized: bool = False

    def resize(self, size: tuple[int, int], resample: int) -> "Picture":
        """The picture at `size` (height, width), by Pillow, uint8 in and out."""
        source = self
        if self.scaled and self.resized:
            source = self._requantize()
        height, width = size
        image = source.image
        if image.size != (width, height):
            image = image.resize((width, height), resample=resample)
        return Picture(image, source.scaled, True)

    def _requantize(self) -> "Picture":
        values = np.asarray(self.image)
        if ((values == 0) | (values == 255)).all():
            # Zeros and ones are whole numbers: from here on the reference takes them for uint8 near-black.
            return Picture(Image.fromarray((values // 255).astype(np.uint8), mode=None), False, True)
        return replace(self, image=Image.fromarray(_REQUANTIZED[values]))

    def pixels(self) -> np.ndarray:
        """uint8 (height, width, channels)."""
        array = np.asarray(self.image)
        return array if array.ndim == 3 else array[..., None]


def to_picture(
    value, do_convert_rgb: bool = True, input_data_format=None, *, exif_transpose: bool = False, full_16bit: bool = False
) -> Picture:
    """A Picture from a Pillow image of any mode or an array (h, w, c) or (c, h, w) with c in 1, 3, 4.

    Arrays: uint8, or whole numbers 0..255 of any dtype, or fractions 0..1. Raises InputError for anything else.
    exif_transpose: turn a Pillow image as its EXIF orientation says (a path is always turned; a Pillow image never
        is, unless asked). full_16bit: divide 16-bit greys by 257 instead of saturating them at 255.
    """
    if isinstance(value, Image.Image):
        if exif_transpose:
            value = ImageOps.exif_transpose(value)
        if full_16bit and value.mode.startswith("I;16"):
            value = Image.fromarray((np.asarray(value) // 257).astype(np.uint8))
        if do_convert_rgb:
            return Picture(flatten_alpha(value))
        array = np.array(value)
        array = array[..., None] if array.ndim == 2 else array
    elif is_array(value):
        array = np.asarray(value)
        if channel_axis(array.shape, input_data_format) == 0:
            array = np.moveaxis(array, 0, -1)
        if do_convert_rgb:
            array = _array_to_rgb(array)
    else:
        raise InputError(f"a picture of type {type(value).__name__}; pass a Pillow image, an array, a path or a URL")
    if not array.size:
        raise InputError(f"a picture array of shape {array.shape} has no pixels")
    array, scaled = _to_uint8(array)
    squeezed = array[..., 0] if array.shape[-1] == 1 else array
    return Picture(Image.fromarray(np.ascontiguousarray(squeezed)), scaled)


def pixel_table(
    channels: int, scaled: bool, do_rescale: bool, rescale_factor: float, do_normalize: bool, image_mean, image_std
) -> np.ndarray:
    """What each uint8 value becomes, per channel: (channels, 256), float32 (uint8 if nothing is to be done).

    Rescaling multiplies in float64 and rounds to float32; normalising is (x − mean) / std in float32. A table makes
    that bit-equal for every pixel by construction.
    """
    values = _SCALED if scaled else np.arange(256, dtype=np.uint8)
    if do_rescale:
        values = (values.astype(np.float64) * rescale_factor).astype(np.float32)
    values = np.broadcast_to(values, (channels, 256))
    if do_normalize:
        mean, std = (_per_channel(v, channels, n) for v, n in ((image_mean, "image_mean"), (image_std, "image_std")))
        values = (values.astype(np.float32) - mean[:, None]) / std[:, None]
    return np.ascontiguousarray(values)


def _per_channel(value, channels: int, name: str) -> np.ndarray:
    array = np.asarray(value, np.float32)
    if array.ndim == 0:
        return np.full(channels, array)
    if array.shape != (channels,):
        raise InputError(f"{name} has {array.size} entries, the pictures have {channels} channels")
    return array
