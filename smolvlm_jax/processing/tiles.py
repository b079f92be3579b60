"""One picture cut into tiles."""

import hashlib
from dataclasses import dataclass

import numpy as np

from .geometry import TilePlan
from .pixels import Picture


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The tiles of one picture and the grid they came from.

    Attributes:
        pixels: uint8 (n, T, T, channels), the global view where the plan says.
        rows: rows of the grid; 0 for a picture that is not split.
        cols: columns of the grid; 0 for a picture that is not split.
        scaled: the values 0..255 of the grid's tiles stand for 0..1 (float pictures only; see pixels.py).
        global_scaled: those of the global view do.
    """

    pixels: np.ndarray
    rows: int
    cols: int
    scaled: bool
    global_scaled: bool

    def digest(self) -> str:
        """128 bits of BLAKE2 over shape and contents, as 32 hexadecimal digits."""
        head = f"{self.pixels.shape} {self.rows} {self.cols} {self.scaled} {self.global_scaled}"
        return hashlib.blake2b(np.ascontiguousarray(self.pixels), digest_size=16, key=head.encode()[:64]).hexdigest()


def cut_tiles(picture: Picture, plan: TilePlan, resample: int) -> Tiles:
    """Carry out `plan` on `picture`.

    There are up to three successive resizes, each rounded to uint8, as in the reference. They cannot be merged into
    one: the global view is made from the stretched picture.

    Args:
        picture: the decoded picture.
        plan: its resizes and its grid.
        resample: Pillow's filter, 0 to 5.
    """
    for size in plan.sizes:
        picture = picture.resize(size, resample)
    tile = plan.tile
    if not plan.rows:
        return Tiles(pixels=picture.pixels()[None], rows=0, cols=0, scaled=picture.scaled, global_scaled=picture.scaled)
    overview = picture.resize((tile, tile), resample if plan.overview_filter is None else plan.overview_filter)
    whole = overview.pixels()
    tiles = np.empty((plan.num_tiles, *whole.shape), np.uint8)
    width, first = plan.cols * tile, int(plan.overview == "first")
    for row in range(plan.rows):
        # One row of tiles at a time: the array of the whole stretched picture would need as much memory as the tiles.
        band = np.asarray(picture.image.crop((0, row * tile, width, (row + 1) * tile)))
        start = first + row * plan.cols
        tiles[start : start + plan.cols] = band.reshape(tile, plan.cols, tile, -1).swapaxes(0, 1)
    if plan.overview != "none":
        tiles[0 if first else -1] = whole
    return Tiles(pixels=tiles, rows=plan.rows, cols=plan.cols, scaled=picture.scaled, global_scaled=overview.scaled)
