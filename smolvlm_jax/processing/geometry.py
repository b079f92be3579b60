"""Sizes only: how a picture of height × width becomes a grid of tiles. No pixel is touched here.

The arithmetic is Python float64 with truncation, exactly as the reference has it. An exact rational version is
*wrong*: 445×512 at longest edge 1536 gives height 1334 in floats and 1336 in fractions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import InputError

# Whatever `size` asks for, no side of a picture grows beyond this.
MAX_IMAGE_SIZE = 4096


def longest_edge_size(height: int, width: int, longest_edge: int) -> tuple[int, int]:
    """(height, width) with the long side equal to `longest_edge`, the short one truncated and then made even.

    Up or down alike. Both sides are at least 1, so a side of one pixel stays odd.
    """
    ratio = width / height
    if width >= height:
        width = longest_edge
        height = int(width / ratio)
        height += height % 2
    else:
        height = longest_edge
        width = int(height * ratio)
        width += width % 2
    return max(height, 1), max(width, 1)


def capped_size(height: int, width: int, limit: int = MAX_IMAGE_SIZE) -> tuple[int, int]:
    """(height, width) with the long side at most `limit`; the short side is truncated and not made even."""
    ratio = width / height
    if width >= height and width > limit:
        width = limit
        height = int(width / ratio)
    elif height > width and height > limit:
        height = limit
        width = int(height * ratio)
    return max(height, 1), max(width, 1)


def tiled_size(height: int, width: int, tile: int) -> tuple[int, int]:
    """(height, width) rounded up to whole tiles, the long side first. The picture is stretched to it."""
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / ratio) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * ratio) / tile) * tile
    # A side that truncates to nothing (a line of one pixel and thousands long) still takes one tile.
    return max(height, tile), max(width, tile)


def normalize_size(size, name: str = "size") -> dict[str, int]:
    """The dictionary form of a `size` argument: {"longest_edge"} or {"height", "width"}.

    An int is a square, a pair is (height, width). Raises InputError for any other form ("shortest_edge" included:
    the picture could then have any number of tiles).
    """
    if isinstance(size, bool) or size is None:
        raise InputError(f"{name} is {size!r}; pass {{'longest_edge': n}} or {{'height': h, 'width': w}}")
    if isinstance(size, int):
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


def tile_edge(max_image_size) -> int:
    """The side T of a tile from `max_image_size`, which has to be {"longest_edge": T}."""
    edge = max_image_size.get("longest_edge") if isinstance(max_image_size, Mapping) else None
    if isinstance(edge, bool) or not isinstance(edge, (int, float)) or edge < 1:
        raise InputError(f"max_image_size is {max_image_size!r}; it needs the form {{'longest_edge': tile side}}")
    return int(edge)


@dataclass(frozen=True)
class TilePlan:
    """What happens to one picture.

    sizes: the whole-picture resizes in order, as (height, width); the last is the grid (or the one tile) itself.
    rows, cols: the grid, 0 and 0 for a picture that stays one tile.
    tile: side T of every tile.
    """

    sizes: tuple[tuple[int, int], ...]
    rows: int
    cols: int
    tile: int

    @property
    def num_tiles(self) -> int:
        """Tiles the vision encoder sees: the grid and the global view, or the single tile."""
        return self.rows * self.cols + 1


def plan_tiles(
    height: int,
    width: int,
    *,
    size,
    max_image_size,
    do_resize: bool = True,
    do_image_splitting: bool = True,
    max_tiles: int | None = None,
    do_upscale: bool = True,
) -> TilePlan:
    """The TilePlan of a picture of `height` × `width` pixels.

    size, max_image_size, do_resize, do_image_splitting: as in SmolVLMImageProcessor.
    max_tiles: at most so many tiles, the global view included: the longest edge shrinks tile by tile until they fit.
    do_upscale: False leaves a picture whose long side is not above size["longest_edge"] at its own resolution before
        it is stretched to whole tiles, as do_resize=False would.
    Raises InputError for a picture without pixels or arguments without sense.
    """
    if height < 1 or width < 1:
        raise InputError(f"a picture of {width}×{height} pixels (width × height) has nothing in it")
    tile = tile_edge(max_image_size)
    if max_tiles is not None and (isinstance(max_tiles, bool) or max_tiles < 1):
        raise InputError(f"max_tiles is {max_tiles!r}; it needs at least 1")
    sizes = []
    if do_resize:
        wanted = normalize_size(size)
        if "longest_edge" not in wanted:
            sizes.append((wanted["height"], wanted["width"]))
        elif do_upscale or max(height, width) > wanted["longest_edge"]:
            sizes.append(capped_size(*longest_edge_size(height, width, wanted["longest_edge"])))
    plan = _finish(height, width, sizes, tile, do_image_splitting)
    if max_tiles is None or plan.num_tiles <= max_tiles:
        return plan
    # Give up one tile of the long side at a time. Starting again from the picture keeps it to one resize more or less.
    for count in range(max(plan.rows, plan.cols) - 1, 0, -1):
        plan = _finish(height, width, [longest_edge_size(height, width, count * tile)], tile, True)
        if plan.num_tiles <= max_tiles:
            return plan
    return _finish(height, width, [], tile, False)


def _finish(height, width, sizes, tile, do_image_splitting) -> TilePlan:
    if not do_image_splitting:
        return TilePlan((*sizes, (tile, tile)), 0, 0, tile)
    grid = tiled_size(*(sizes[-1] if sizes else (height, width)), tile)
    rows, cols = grid[0] // tile, grid[1] // tile
    if rows == cols == 1:
        rows = cols = 0
    return TilePlan((*sizes, grid), rows, cols, tile)
