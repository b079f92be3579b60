"""From the tiles of many pictures to the arrays of one batch."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .batch import BatchFeature
from .choices import one_of
from .pixels import PixelRule
from .threads import map_threads
from .tiles import Tiles

PIXEL_FORMATS = ("float32", "uint8")
DATA_FORMATS = ("channels_first", "channels_last")


def spread(pixels: np.ndarray, table: np.ndarray, *, out: np.ndarray) -> None:
    """table[c][pixels[..., c]] for every channel c: uint8 (T, T, c) into out (c, T, T)."""
    for channel, values in enumerate(table):
        # A uint8 is never outside a table of 256; with mode="clip" numpy skips a check and a copy.
        np.take(values, pixels[..., channel], out=out[channel], mode="clip")


def flat_uint8(tiles: Sequence[np.ndarray], rule: PixelRule) -> BatchFeature:
    """The tiles of all pictures or videos in one uint8 array, for the device to rescale and normalise.

    Args:
        tiles: uint8 (n, T, T, 3) of each picture or video.
        rule: what the call asks for; it has to be what the device does.

    Returns:
        pixel_values, uint8 (N, T, T, 3), and num_tiles = N, an int32 scalar.

    Raises:
        InputError: the rule is not that of the published checkpoints, which is the only one the device knows.
    """
    table, stock = rule.table(3), PixelRule().table(3)
    if table.dtype != stock.dtype or not np.array_equal(table, stock):
        raise InputError(
            "pixel_format='uint8' leaves rescaling by 1/255 and normalising by mean 0.5 and std 0.5 to the device; with "
            "other values of do_rescale, rescale_factor, do_normalize, image_mean or image_std use pixel_format='float32'"
        )
    pixels = np.ascontiguousarray(tiles[0]) if len(tiles) == 1 else np.concatenate(tiles)
    return BatchFeature(pixel_values=pixels, num_tiles=np.int32(len(pixels)))


def arrange(batch: BatchFeature, data_format: object) -> BatchFeature:
    """Put the channels of the reference's layout where they are asked for, in place.

    Args:
        batch: with pixel_values (b, n, c, T, T), or a list of lists of tiles (c, T, T).
        data_format: "channels_last", or "channels_first" or None for no change.

    Raises:
        InputError: it is neither.
    """
    if data_format is None or one_of("data_format", data_format, DATA_FORMATS) == "channels_first":
        return batch

    def last(pixels: Any) -> Any:
        if isinstance(pixels, list) or pixels.dtype == object:
            moved = [last(entry) for entry in pixels]
            if isinstance(pixels, list):
                return moved
            pixels = pixels.copy()
            pixels[:] = moved
            return pixels
        return np.ascontiguousarray(np.moveaxis(pixels, -3, -1))

    batch["pixel_values"] = last(batch["pixel_values"])
    return batch


def flat_pictures(pictures: list[Tiles], rule: PixelRule) -> BatchFeature:
    """`flat_uint8` of pictures. Raises InputError for a float picture in 0..1 and for one that is not RGB."""
    for picture in pictures:
        if picture.scaled or picture.global_scaled:
            raise InputError(
                "a float picture in 0..1 cannot travel as uint8 tiles: multiply it by 255 and make it uint8, or pass "
                "do_rescale=False with pixel_format='float32'"
            )
        if picture.pixels.shape[-1] != 3:
            raise InputError(f"uint8 tiles need RGB; a picture has {picture.pixels.shape[-1]} channels")
    return flat_uint8([picture.pixels for picture in pictures], rule)


def reference_layout(
    samples: list[list[Tiles]],
    rule: PixelRule,
    *,
    do_pad: bool,
    padding: type[np.generic] = np.float32,
    return_tensors: str | None = None,
    num_threads: int | None = None,
) -> BatchFeature:
    """The arrays of a batch of pictures in the reference's layout.

    Args:
        samples: the pictures of each sample.
        rule: what becomes of uint8 values.
        do_pad: fill samples that have fewer tiles than others with all-zero tiles.
        padding: the dtype of those.
        return_tensors: without do_pad and with unequal numbers of tiles, None gives a list of lists of tiles, "np" an
            array of arrays.
        num_threads: pictures worked on at once.

    Returns:
        pixel_values, float32 (b, n, c, T, T); with do_pad also pixel_attention_mask, int64 (b, n, T, T), 1 for real
        tiles and 0 for padding.

    Raises:
        InputError: the pictures have different numbers of channels, or the frames different sizes.
    """
    counts = [sum(len(picture.pixels) for picture in sample) for sample in samples]
    shapes = {picture.pixels.shape[1:] for sample in samples for picture in sample}
    if len(shapes) > 1:
        raise InputError(
            f"tiles of different heights, widths or channels in one batch: {sorted(shapes)}; leave do_resize and "
            "do_convert_rgb on"
        )
    ((height, width, channels),) = shapes
    kinds = {kind for sample in samples for picture in sample for kind in (picture.scaled, picture.global_scaled)}
    tables = {kind: rule.table(channels, scaled=kind) for kind in kinds}
    padded = len(set(counts)) > 1
    # Without rescaling and normalising the tiles stay uint8, but the reference's padding of pictures is float32 and decides.
    dtype = np.result_type(*tables.values(), *([padding] if padded and do_pad else []))
    tables = {kind: table.astype(dtype) for kind, table in tables.items()}

    def tiles_of(sample: list[Tiles]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for picture in sample:
            yield from ((pixels, tables[picture.scaled]) for pixels in picture.pixels[:-1])
            yield picture.pixels[-1], tables[picture.global_scaled]

    shape = (channels, height, width)
    ragged = padded and not do_pad
    pixels = np.zeros((0 if ragged else len(samples), max(counts), *shape), dtype)
    rows = [np.empty((count, *shape), dtype) for count in counts] if ragged else list(pixels)
    tiles = [
        (out, *tile)
        for row, sample in zip(rows, samples, strict=True)
        for out, tile in zip(row, tiles_of(sample), strict=False)
    ]
    map_threads(lambda tile: spread(tile[1], tile[2], out=tile[0]), tiles, num_threads)
    if ragged and return_tensors is None:
        return BatchFeature(pixel_values=[list(row) for row in rows])
    if ragged:
        pixels = np.empty(len(rows), object)
        pixels[:] = rows
    if not do_pad:
        return BatchFeature(pixel_values=pixels)
    mask = np.zeros((len(samples), max(counts), height, width), np.int64)
    for row, count in enumerate(counts):
        mask[row, :count] = 1
    return BatchFeature(pixel_values=pixels, pixel_attention_mask=mask)


def video_layout(videos: list[np.ndarray], rule: PixelRule, *, do_pad: bool) -> BatchFeature:
    """The arrays of a batch of videos in the reference's layout.

    Args:
        videos: uint8 (frames, T, T, c) of each video.
        rule: what becomes of uint8 values.
        do_pad: fill shorter videos with all-zero frames.

    Returns:
        pixel_values, float32 (videos, frames, c, T, T); with do_pad also pixel_attention_mask, int64
        (videos, frames, T, T).

    Raises:
        InputError: the frames have different sizes, or without do_pad the videos different lengths.
    """
    if not do_pad and len({len(frames) for frames in videos}) > 1:
        raise InputError("videos of different lengths do not make one array; leave do_pad on")
    samples = [[Tiles(pixels=frames, rows=0, cols=0, scaled=False, global_scaled=False)] for frames in videos]
    batch = reference_layout(samples, rule, do_pad=do_pad, padding=np.uint8, num_threads=1)
    if do_pad:
        # Ones for padding frames too, as in the reference: the model recognises those by their zeros.
        batch["pixel_attention_mask"][:] = 1
    return batch
