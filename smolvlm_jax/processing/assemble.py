"""From the tiles of many pictures to the arrays of one batch."""

import numpy as np

from ..errors import InputError
from .batch import BatchFeature
from .pixels import pixel_table
from .threads import map_threads
from .tiles import Tiles

STANDARD_MEAN = (0.5, 0.5, 0.5)
STANDARD_STD = (0.5, 0.5, 0.5)


def check_return_tensors(return_tensors):
    """None and "np" are what there is; the arrays are numpy in either case."""
    if return_tensors is not None and str(getattr(return_tensors, "value", return_tensors)) != "np":
        raise InputError(f"return_tensors is {return_tensors!r}; pass 'np' and hand the arrays to jax.numpy.asarray")


def table_for(options: dict, channels: int, scaled: bool) -> np.ndarray:
    """pixel_table for the arguments of one call."""
    names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    return pixel_table(channels, scaled, **{name: options[name] for name in names})


def check_stock_pixels(options: dict):
    """Raise InputError unless pixels are to be rescaled by 1/255 and normalised by 0.5 and 0.5: uint8 tiles leave
    that to the device, which knows these numbers only."""
    table = table_for(options, 3, False)
    stock = pixel_table(3, False, True, 1 / 255, True, STANDARD_MEAN, STANDARD_STD)
    if table.dtype != stock.dtype or not np.array_equal(table, stock):
        raise InputError(
            "pixel_format='uint8' leaves rescaling by 1/255 and normalising by mean 0.5 and std 0.5 to the device; with "
            "other values of do_rescale, rescale_factor, do_normalize, image_mean or image_std use pixel_format='float32'"
        )


def spread(pixels: np.ndarray, table: np.ndarray, out: np.ndarray):
    """table[c][pixels[..., c]] for every channel c: uint8 (T, T, c) into out (c, T, T)."""
    for channel, values in enumerate(table):
        # "clip" is never needed for uint8 and a table of 256, but spares numpy a check and a copy
        np.take(values, pixels[..., channel], out=out[channel], mode="clip")


def flat_uint8(pictures: list[Tiles], options: dict) -> BatchFeature:
    """uint8 (N, T, T, 3), the tiles of all `pictures` one after the other, and num_tiles = N."""
    check_stock_pixels(options)
    if not pictures:
        raise InputError("no pictures in the whole batch; leave images out")
    for picture in pictures:
        if picture.scaled or picture.global_scaled:
            raise InputError(
                "a float picture in 0..1 cannot travel as uint8 tiles: multiply it by 255 and make it uint8, or pass "
                "do_rescale=False with pixel_format='float32'"
            )
        if picture.pixels.shape[-1] != 3:
            raise InputError(f"uint8 tiles need RGB; a picture has {picture.pixels.shape[-1]} channels")
    if len(pictures) == 1:
        pixels = np.ascontiguousarray(pictures[0].pixels)
    else:
        pixels = np.concatenate([picture.pixels for picture in pictures])
    return BatchFeature(pixel_values=pixels, num_tiles=np.int32(len(pixels)))


def reference_layout(samples: list[list[Tiles]], options: dict, return_tensors=None, num_threads=None) -> BatchFeature:
    """float32 (b, n, c, T, T) and int64 masks (b, n, T, T); samples with fewer tiles are filled with zeros."""
    counts = [sum(len(picture.pixels) for picture in sample) for sample in samples]
    shapes = {picture.pixels.shape[1:] for sample in samples for picture in sample}
    if not shapes:
        raise InputError("no pictures in the whole batch; leave images out")
    if len(shapes) > 1:
        raise InputError(f"pictures of different channel counts in one batch: {sorted(shape[-1] for shape in shapes)}")
    ((height, width, channels),) = shapes
    kinds = {kind for sample in samples for picture in sample for kind in (picture.scaled, picture.global_scaled)}
    tables = {kind: table_for(options, channels, kind) for kind in kinds}
    padded = len(set(counts)) > 1
    # Without rescaling and normalising the tiles stay uint8, but padding pictures are float32 and win.
    dtype = np.result_type(*tables.values(), *([np.float32] if padded and options["do_pad"] else []))
    tables = {kind: table.astype(dtype) for kind, table in tables.items()}

    def fill(item):
        out, picture = item
        for tile, pixels in enumerate(picture.pixels):
            last = tile == len(picture.pixels) - 1
            spread(pixels, tables[picture.global_scaled if last else picture.scaled], out[tile])

    def fill_all(rows):
        items = []
        for out, sample in zip(rows, samples, strict=True):
            start = 0
            for picture in sample:
                items.append((out[start:], picture))
                start += len(picture.pixels)
        map_threads(fill, items, num_threads)

    shape = (channels, height, width)
    if not options["do_pad"] and padded:
        ragged = [np.empty((count, *shape), dtype) for count in counts]
        fill_all(ragged)
        if return_tensors is None:
            return BatchFeature(pixel_values=[list(sample) for sample in ragged])
        pixels = np.empty(len(ragged), object)
        pixels[:] = ragged
        return BatchFeature(pixel_values=pixels)
    pixels = np.zeros((len(samples), max(counts), *shape), dtype)
    fill_all(pixels)
    if not options["do_pad"]:
        return BatchFeature(pixel_values=pixels)
    mask = np.zeros((len(samples), max(counts), height, width), np.int64)
    for row, count in enumerate(counts):
        mask[row, :count] = 1
    return BatchFeature(pixel_values=pixels, pixel_attention_mask=mask)


def video_layout(videos: list[np.ndarray], options: dict) -> BatchFeature:
    """float32 (videos, frames, c, T, T) and int64 masks; shorter videos are filled with frames of zeros."""
    shapes = {frames.shape[1:] for frames in videos}
    if len(shapes) > 1:
        raise InputError(f"videos of different frame sizes in one batch: {sorted(shapes)}; leave do_resize on")
    ((height, width, channels),) = shapes
    most = max(map(len, videos))
    table = table_for(options, channels, False)
    if not options["do_pad"] and len({len(frames) for frames in videos}) > 1:
        raise InputError("videos of different lengths do not make one array; leave do_pad on")
    pixels = np.zeros((len(videos), most, channels, height, width), table.dtype)
    for out, frames in zip(pixels, videos, strict=True):
        for target, frame in zip(out, frames, strict=False):
            spread(frame, table, target)
    batch = BatchFeature(pixel_values=pixels)
    if options["do_pad"]:
        # Ones for padding frames too: the model knows those by their zeros.
        batch["pixel_attention_mask"] = np.ones((len(videos), most, height, width), np.int64)
    return batch
