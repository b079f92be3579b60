"""One picture cut into tiles."""

import hashlib
from dataclasses import dataclass

import numpy as np

from .geometry import TilePlan
from .pixels import Picture


@dataclass(frozen=True)
class Tiles:
    """The tiles of one picture: uint8 (n, T, T, channels), the global view last, and the grid they came from.

    scaled, global_scaled: their 0..255 stand for 0..1 (float pictures only; see pixels.py).
    """

    pixels: np.ndarray
    rows: int
    cols: int
    scaled: bool = False
    global_scaled: bool = False

    def digest(self) -> str:
        """128 bits of BLAKE2 over shape and contents, in hexadecimal."""
        head = f"{self.pixels.shape} {self.rows} {self.cols} {self.scaled} {self.global_scaled}"
        return hashlib.blake2b(np.ascontiguousarray(self.pixels), digest_size=16, key=head.encode()[:64]).hexdigest()


def cut_tiles(picture: Picture, plan: TilePlan, resample: int) -> Tiles:
    """Carry out `plan` on `picture`. Up to three successive resizes, each rounded to uint8: the global view is made
    from the *stretched* picture, so doing it in one pass would be wrong."""
    for size in plan.sizes:
        picture = picture.resize(size, resample)
    tile = plan.tile
    if not plan.rows:
        return Tiles(picture.pixels()[None], 0, 0, picture.scaled, picture.scaled)
    overview = picture.resize((tile, tile), resample)
    last = overview.pixels()
    tiles = np.empty((plan.num_tiles, *last.shape), np.uint8)
    width = plan.cols * tile
    for row in range(plan.rows):
        # A band at a time: the array form of the whole stretched picture would cost as much memory as the tiles.
        band = picture.image.crop((0, row * tile, width, (row + 1) * tile))
        band = np.asarray(band).reshape(tile, plan.cols, tile, -1)
        tiles[row * plan.cols : (row + 1) * plan.cols] = band.swapaxes(0, 1)
    tiles[-1] = last
    return Tiles(tiles, plan.rows, plan.cols, picture.scaled, overview.scaled)
