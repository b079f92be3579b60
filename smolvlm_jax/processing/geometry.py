"""Sizes only: how a picture of height × width becomes a grid of tiles. No pixel is touched here.

The arithmetic is Python's float64 with truncation, exactly as in the reference. Exact rational numbers would be wrong:
445×512 at longest edge 1536 gives height 1334 in floats and 1336 in fractions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import InputError
from ..habits import no_attribute
from .choices import one_of

# How a picture becomes tiles: SmolVLM's way, nanoVLM's, and nanoVLM's from before it showed the whole picture too.
TILINGS = ("smolvlm", "nanovlm", "nanovlm-grid")
_BILINEAR = 2  # Pillow's
# Whatever `size` asks for, no side of a picture grows beyond this.
MAX_IMAGE_SIZE = 4096

Size = tuple[int, int]
"""(height, width) in pixels."""
# The arguments of processors that are sizes in words.
SIZES = ("size", "max_image_size")


class Sides(dict[str, int]):
    """A size in words, {"longest_edge"} or {"height", "width"}, whose keys are attributes too, as in transformers: None for
    those that it does not have."""

    def __getattr__(self, name: str) -> int | None:
        if name in _SIDES:
            return self.get(name)
        raise no_attribute(self, name)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *_SIDES]

    def __missing__(self, name: str) -> None:
        if name not in _SIDES:
            raise KeyError(name)


_SIDES = ("height", "width", "longest_edge", "shortest_edge", "max_height", "max_width", "min_pixels", "max_pixels")


def _scaled(size: Size, long_side: int) -> Size:
    """`size` with its long side (the width of a square) equal to `long_side`; the short side is truncated."""
    height, width = size
    ratio = width / height
    return (int(long_side / ratio), long_side) if width >= height else (long_side, int(long_side * ratio))


def longest_edge_size(size: Size, longest_edge: int) -> Size:
    """`size` scaled up or down so that its long side equals `longest_edge`.

    The short side is truncated and then made even. Both sides are at least 1, so a side of one pixel stays odd.
    """
    height, width = _scaled(size, longest_edge)
    if size[1] >= size[0]:
        height += height % 2
    else:
        width += width % 2
    return max(height, 1), max(width, 1)


def capped_size(size: Size, limit: int = MAX_IMAGE_SIZE) -> Size:
    """`size` with its long side at most `limit`; the short side is truncated and not made even."""
    if max(size) <= limit:
        return size
    height, width = _scaled(size, limit)
    return max(height, 1), max(width, 1)


def tiled_size(size: Size, tile: int) -> Size:
    """`size` rounded up to whole tiles, the long side first. The picture is stretched to it."""
    height, width = (math.ceil(side / tile) * tile for side in _scaled(size, math.ceil(max(size) / tile) * tile))
    # A side that truncates to nothing (of a line one pixel wide and thousands long) still takes one tile.
    return max(height, tile), max(width, tile)


def normalize_size(size: object, name: str = "size") -> dict[str, int]:
    """The dictionary form of a `size` argument: {"longest_edge"} or {"height", "width"}.

    Args:
        size: such a dictionary, an int for a square, or a pair (height, width).
        name: what a message calls the argument.

    Raises:
        InputError: any other form. "shortest_edge" is one: the picture could then have any number of tiles.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        size = {"height": size, "width": size}
    elif isinstance(size, (list, tuple)) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    if not isinstance(size, Mapping):
        raise InputError(f"{name} is {size!r}; pass {{'longest_edge': n}} or {{'height': h, 'width': w}}")
    given = {key: value for key, value in size.items() if value is not None}
    wanted = ["longest_edge"] if given.get("longest_edge") else ["height", "width"]
    unknown = set(given) - {"longest_edge", "height", "width", "shortest_edge"}
    if unknown or any(key not in given for key in wanted):
        raise InputError(f"{name} has the keys {sorted(given)}; it needs 'longest_edge', or 'height' and 'width'")
    for key in wanted:
        if isinstance(given[key], bool) or not isinstance(given[key], (int, float)) or given[key] < 1:
            raise InputError(f"{name}[{key!r}] is {given[key]!r}; it needs a positive whole number")
    return {key: int(given[key]) for key in wanted}


def tile_edge(max_image_size: object) -> int:
    """The side T of a tile in pixels. Raises InputError unless `max_image_size` is {"longest_edge": T} or T."""
    if isinstance(max_image_size, int) and not isinstance(max_image_size, bool):
        max_image_size = {"longest_edge": max_image_size}
    size = normalize_size(max_image_size, "max_image_size")
    if "longest_edge" not in size:
        raise InputError(f"max_image_size is {max_image_size!r}; it needs the form {{'longest_edge': tile side}}")
    return size["longest_edge"]


@dataclass(frozen=True, kw_only=True)
class TilePlan:
    """What happens to one picture.

    Attributes:
        sizes: the resizes of the whole picture in order; the last is the size of the grid, or of the one tile.
        rows: rows of the grid; 0 for a picture that stays one tile.
        cols: columns of the grid; 0 for a picture that stays one tile.
        tile: side of every tile in pixels.
        overview: where the global view stands beside a grid: "last", "first", or "none".
        overview_filter: Pillow's filter for it; None for that of the other resizes.
    """

    sizes: tuple[Size, ...]
    rows: int
    cols: int
    tile: int
    overview: str = "last"
    overview_filter: int | None = None

    @property
    def num_tiles(self) -> int:
        """Tiles that the vision encoder sees: the grid and the global view, or the single tile."""
        return self.rows * self.cols + (1 if not self.rows or self.overview != "none" else 0)


def plan_tiles(
    height: int,
    width: int,
    *,
    size: object,
    max_image_size: object,
    do_resize: bool = True,
    do_image_splitting: bool = True,
    max_tiles: int | None = None,
    do_upscale: bool = True,
    tiling: str = "smolvlm",
) -> TilePlan:
    """The TilePlan of a picture of `height` × `width` pixels.

    Args:
        height: in pixels.
        width: in pixels.
        size: as in SmolVLMImageProcessor, like the next three.
        max_image_size: see there.
        do_resize: see there.
        do_image_splitting: see there.
        max_tiles: at most so many tiles, the global view included: the long side shrinks by a tile at a time until they
            fit. None for no bound.
        do_upscale: False leaves a picture whose long side is not above size["longest_edge"] at its own resolution before
            it is stretched to whole tiles, as do_resize=False does for every picture.
        tiling: one of TILINGS.

    Raises:
        InputError: a picture without pixels, or arguments that make no sense.
    """
    if height < 1 or width < 1:
        raise InputError(f"a picture of {width}×{height} pixels (width × height) has nothing in it")
    picture, tile = (height, width), tile_edge(max_image_size)
    if max_tiles is not None and (isinstance(max_tiles, bool) or max_tiles < 1):
        raise InputError(f"max_tiles is {max_tiles!r}; it needs at least 1")
    one_of("tiling", tiling, TILINGS)
    if tiling != "smolvlm" and do_image_splitting:
        longest = normalize_size(size).get("longest_edge") if do_resize else math.ceil(max(picture) / tile) * tile
        if longest is None or longest % tile:
            raise InputError(
                f"tiling {tiling!r} needs a size of the form {{'longest_edge': a multiple of {tile}}}, got {size!r}"
            )
        longest = longest if do_upscale else min(longest, math.ceil(max(picture) / tile) * tile)
        plans = (_stretched(picture, count * tile, tile, tiling) for count in range(longest // tile, 0, -1))
        return next(
            (plan for plan in plans if max_tiles is None or plan.num_tiles <= max_tiles), _stretched((1, 1), tile, tile, tiling)
        )
    sizes: list[Size] = []
    if do_resize:
        wanted = normalize_size(size)
        if "longest_edge" not in wanted:
            sizes.append((wanted["height"], wanted["width"]))
        elif do_upscale or max(picture) > wanted["longest_edge"]:
            sizes.append(capped_size(longest_edge_size(picture, wanted["longest_edge"])))
    plan = _finish(picture, sizes, tile, split=do_image_splitting)
    if max_tiles is None or plan.num_tiles <= max_tiles:
        return plan
    # Shorten the long side by one tile at a time. Each attempt starts from the picture, so that it is resized once.
    for count in range(max(plan.rows, plan.cols) - 1, 0, -1):
        plan = _finish(picture, [longest_edge_size(picture, count * tile)], tile, split=True)
        if plan.num_tiles <= max_tiles:
            return plan
    return _finish(picture, [], tile, split=False)


def _stretched(picture: Size, long_side: int, tile: int, tiling: str) -> TilePlan:
    """nanoVLM's plan: one resize to whole tiles, the long side to `long_side` and the short one up to the next whole tile."""
    height, width = picture
    scale = long_side / max(picture)
    short_side = max(math.ceil(min(picture) * scale / tile) * tile, tile)
    grid = (short_side, long_side) if width >= height else (long_side, short_side)
    rows, cols = grid[0] // tile, grid[1] // tile
    if rows == cols == 1:
        rows = cols = 0
    overview = "first" if tiling == "nanovlm" else "none"
    return TilePlan(sizes=(grid,), rows=rows, cols=cols, tile=tile, overview=overview, overview_filter=_BILINEAR)


def _finish(picture: Size, sizes: list[Size], tile: int, *, split: bool) -> TilePlan:
    """The plan of a picture that is first resized to each of `sizes`."""
    if not split:
        return TilePlan(sizes=(*sizes, (tile, tile)), rows=0, cols=0, tile=tile)
    grid = tiled_size(sizes[-1] if sizes else picture, tile)
    rows, cols = grid[0] // tile, grid[1] // tile
    if rows == cols == 1:
        rows = cols = 0
    return TilePlan(sizes=(*sizes, grid), rows=rows, cols=cols, tile=tile)
