"""The layout of pictures inside the library: flat tiles and how many of them are real.

Tiles of a whole batch are in one array, as uint8 (N, T, T, 3) or normalised floats (N, H, W, 3) with an optional mask of
their pixels; the real ones come first. transformers' five-dimensional layout is turned into this one by `flat_tiles`, for
numpy and jax arrays alike, and nowhere else. Only this module decides which tiles are real, and whether tiles and image tokens
agree in number.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from .attention.forms import LARGE
from .config import SmolVLMConfig, SmolVLMVisionConfig
from .errors import InputError

__all__ = [
    "Tiles",
    "check_counts",
    "encoder_batch",
    "encoder_batches",
    "flat_tiles",
    "padded_tiles",
    "repeated_tiles",
    "tokens_of",
]


class Tiles(NamedTuple):
    """Flat tiles.

    Attributes:
        pixels: uint8 (N, T, T, 3) or normalised floats (N, H, W, 3).
        count: () or int, how many are real; they stand first.
        mask: (N, H, W), which pixels are real; None = all.
    """

    pixels: Any
    count: Any
    mask: Any = None


def _is_real(tiles):
    """Which float tiles (i, …) are real, bool (i,).

    An all-zero tile is padding, because a picture is not all zero after normalisation (no uint8 value normalises to 0). If all
    tiles are zero, the first one counts, as in the reference.
    """
    real = (tiles != 0).any(axis=tuple(range(1, tiles.ndim)))
    return real | ((np.arange(len(tiles)) == 0) & ~real.any())


def flat_tiles(config: SmolVLMConfig, pixel_values, pixel_attention_mask=None, num_tiles=None) -> Tiles:
    """Pictures in any layout that the model takes, as flat tiles; numpy arrays on the host, jax arrays on the device.

    Args:
        config: of the model.
        pixel_values: uint8 (N, T, T, 3) or normalised floats (N, H, W, 3), of which the first `num_tiles` are real; or floats
            (b, images, 3, H, W), transformers' layout, or (b, images, H, W, 3), in which all-zero pictures are padding.
        pixel_attention_mask: which pixels are real: (N, H, W), or (b, images, H, W) in transformers' layout.
        num_tiles: how many flat tiles are real. Default: all.

    Raises:
        InputError: for any other shape.
    """
    xp, shape = pixel_values.__array_namespace__(), pixel_values.shape
    mask = None if pixel_attention_mask is None else xp.asarray(pixel_attention_mask)
    if len(shape) == 4 and shape[-1] == config.vision_config.num_channels:
        if mask is not None and mask.shape != shape[:3]:
            raise InputError(f"tiles of shape {shape} want a pixel_attention_mask of shape {shape[:3]}, got {mask.shape}")
        return Tiles(pixel_values, shape[0] if num_tiles is None else num_tiles, mask)
    if pixel_values.dtype == np.uint8:
        raise InputError(f"uint8 tiles have shape (tiles, T, T, 3), got {shape}")
    if len(shape) != 5:
        raise InputError(
            f"float pixel_values have shape (tiles, height, width, 3) or (batch, images, 3, height, width), got {shape}"
        )
    if shape[2] != config.vision_config.num_channels and shape[-1] == config.vision_config.num_channels:
        pixel_values = xp.moveaxis(pixel_values, -1, 2)  # as the processor makes them with data_format="channels_last"
        shape = pixel_values.shape
    pixels = pixel_values.reshape(-1, *shape[2:])
    real = _is_real(pixels)
    order = xp.argsort(~real, stable=True)
    if mask is not None:
        mask = mask.reshape(-1, *mask.shape[2:])[order]
    return Tiles(xp.einsum("ichw->ihwc", pixels[order]), real.sum(), mask)


def encoder_batch(config: SmolVLMVisionConfig, *, cpu: bool) -> int:
    """How many tiles the encoder takes at once by default on a CPU or else, of each data shard: 16 fill a TPU.

    A CPU takes tiles of many patches one at a time: attention works through them so anyway, and the rest stays nearer in its
    caches. More small ones than four make it no faster.
    """
    if not cpu:
        return 16
    return 1 if config.num_patches**2 >= LARGE else 4


def encoder_batches(count: int, sizes: Sequence[int]) -> Iterator[int]:
    """Sizes of the batches in which `count` tiles are encoded, the largest first: only the last may be larger than what is
    left.

    Args:
        count: how many tiles there are.
        sizes: what there are programs for, descending.
    """
    while count > 0:
        size = next((size for size in sizes if size <= count), sizes[-1])
        yield size
        count -= size


def padded_tiles(tiles: Tiles, size: int) -> dict[str, np.ndarray]:
    """Arguments of the model for the real ones of numpy's `tiles`, padded to `size` tiles.

    A mask that admits every pixel is left out, so that all pictures share one program.
    """
    count = int(tiles.count)
    pad = lambda x, value: np.concatenate([x[:count], np.full((size - count, *x.shape[1:]), value, x.dtype)])
    given = {"pixel_values": pad(tiles.pixels, 0), "num_tiles": np.asarray(count, np.int32)}
    if tiles.mask is not None and not tiles.mask[:count].all():
        given["pixel_attention_mask"] = pad(tiles.mask, 1)
    return given


def repeated_tiles(config: SmolVLMConfig, input_ids: np.ndarray, pictures: Any, times: int) -> np.ndarray:
    """Which tiles, or features of tiles, a batch needs in which each row of ids is repeated.

    Args:
        config: of the model.
        input_ids: int (b, t), before they are repeated; padding must not look like an image token.
        pictures: flat tiles (N, H, W, 3) or features (N, tokens, d), as many real ones as the ids have room for.
        times: how often each row stands in the batch, one after the other.

    Returns:
        int (n,), places among the N.
    """
    counts = (input_ids == config.image_token_id).sum(axis=1) // tokens_of(config, pictures)
    ends = np.cumsum(counts)
    rows = [np.arange(end - count, end) for count, end in zip(counts, ends, strict=True) for _ in range(times)]
    return np.concatenate(rows) if rows else np.arange(0)


def tokens_of(config: SmolVLMConfig, pictures: Any) -> int:
    """Image tokens of each of flat tiles (N, H, W, 3) or features (N, tokens, d)."""
    if len(pictures.shape) != 4:
        return pictures.shape[1]
    side = config.vision_config.patch_size * config.scale_factor
    return (pictures.shape[1] // side) * (pictures.shape[2] // side)


def check_counts(config: SmolVLMConfig, input_ids, pictures, count=None) -> None:
    """Check that every tile has its image tokens, as far as the values are known.

    Says nothing about traced values, nor about prompts given as embeddings.

    Args:
        config: of the model.
        input_ids: int, any shape: the ids of the whole batch; or None.
        pictures: flat tiles (N, H, W, 3), or features (N, tokens, d).
        count: how many of them are real. Default: all.

    Raises:
        InputError: if there are more or fewer image tokens than the tiles make.
    """
    if input_ids is None or any(isinstance(value, jax.core.Tracer) for value in (input_ids, pictures, count)):
        return
    tokens = tokens_of(config, pictures)
    slots = int((np.asarray(input_ids) == config.image_token_id).sum())
    tiles = len(pictures) if count is None else int(count)
    if slots != tiles * tokens:
        raise InputError(
            f"{tiles} tiles make {tiles * tokens} image features ({tokens} each), but the prompt has {slots} image tokens "
            f"(id {config.image_token_id}): pass the pictures that the prompt was made with"
        )
