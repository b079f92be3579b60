"""Sizes of an encoder's layer, what its kernels take at a time on which chip, and whether they fit there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["INT8_CHIPS", "Blocks", "LayerShape", "blocks_for", "chip_of", "norm", "resident", "starts"]

# A tile of memory in bfloat16.
_SUBLANES, _LANES = 16, 128
_MEGABYTE = 2**20
# Memory of a core for a kernel's blocks and scratch on the chips that have enough; those before v5 have 16 MB, and none of
# these kernels fits. The rest is left to XLA, which fetches the next kernel's weights into it.
_ROOMY = 48 * _MEGABYTE
_CHIPS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "7x",
}
# Those on which the kernels multiply weights in 8 bits as int8. A v6e, too, multiplies these twice as fast as bfloat16, but
# there the vector unit decides, which has more to do with them (figures in docs/design.md).
INT8_CHIPS = ("v5e", "v5p")
# Fewest patches for which the kernels are used: fewer fill no block of queries.
_FEWEST_PATCHES = 256


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Sizes of a layer on one device.

    Attributes:
        patches: of a tile, p.
        width: d.
        heads: n, on this device.
        head_size: h.
        mlp: f, on this device.
        eps: of the norms.
    """

    patches: int
    width: int
    heads: int
    head_size: int
    mlp: int
    eps: float

    @property
    def block_patches(self) -> int:
        """Patches rounded up to whole tiles of memory where they are rows."""
        return _up(self.patches, _SUBLANES)

    @property
    def padded_patches(self) -> int:
        """Patches rounded up to whole tiles of memory where they are columns."""
        return _up(self.patches, _LANES)

    @property
    def value_rows(self) -> int:
        """Rows of a head's values, and at least one more for the ones."""
        return _up(self.head_size + 1, _SUBLANES)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """What the kernels take at a time.

    Attributes:
        heads: heads whose queries, keys and values exist at a time.
        queries: queries whose scores exist at a time.
        keys: patches that a product of the attention kernel takes.
        rows: patches that norm and output projection take.
        mlp_rows: patches of a step of the MLP kernel.
        mlp_columns: columns of the MLP's width that exist at a time.
        narrow: whether the activation is computed in bfloat16, on chips whose vector unit does.
        memory: bytes of a core's memory that a kernel may use.
    """

    heads: int
    queries: int
    keys: int
    rows: int
    mlp_rows: int
    mlp_columns: int
    narrow: bool
    memory: int


def blocks_for(shape: LayerShape, chip: str) -> Blocks | None:
    """What the kernels take at a time for a layer on a chip, or None if they are not meant for it, or do not fit.

    Args:
        shape: of the layer on one device.
        chip: as `chip_of` names it.
    """
    p, h = shape.patches, shape.head_size
    regular = shape.width % _LANES == 0 and h % 8 == 0 and h <= _LANES and shape.mlp % _SUBLANES == 0
    if chip == "other" or not regular or p < _FEWEST_PATCHES:
        return None
    large = chip in ("v6e", "7x")
    most_heads = 4 if large else 2
    blocks = Blocks(
        heads=max(n for n in range(1, most_heads + 1) if shape.heads % n == 0),
        queries=_even(shape.padded_patches, 512),
        keys=_even(shape.block_patches, 512),
        rows=256,
        mlp_rows=_even(p, 768 if large else 512, _SUBLANES),
        mlp_columns=_even(shape.mlp, 512, 256) if large else _even(shape.mlp, 640),  # matrix units are 256 or 128 wide
        narrow=large,
        memory=_ROOMY,
    )
    return blocks if _need(shape, blocks) <= blocks.memory else None


def _need(shape: LayerShape, blocks: Blocks) -> int:
    """Bytes of a core's memory that the larger of the two kernels takes: an estimate, rather too large than too small."""
    p, d, columns = shape.block_patches, shape.width, shape.heads * shape.head_size
    tiles = 4 * 2 * p * d  # input and output, each twice: one is copied while the other is used
    scores = 3 * 4 * p * blocks.queries + 3 * 4 * p * _LANES * blocks.heads
    attention = 8 * d * columns + tiles + 2 * p * (d + columns + 3 * _LANES * blocks.heads) + scores
    rows = blocks.mlp_rows
    mlp = 4 * d * _up(shape.mlp, _LANES) + (8 + 2 + 8) * rows * d + 14 * rows * blocks.mlp_columns
    return max(attention, mlp)


def chip_of(leaf: Any) -> str:
    """The chip that a program being traced is for: "v5e", "v5p", "v6e", "7x", or "other" for any other that is known.

    It is that of the mesh in scope, or of the mesh that `leaf`, an input of the program, is placed on, or of this process. A
    program that is lowered for no chip in particular is taken to be for the smallest that the kernels are meant for.
    """
    for mesh in (jax.sharding.get_abstract_mesh(), getattr(jax.typeof(leaf).sharding, "mesh", None)):
        device = getattr(mesh, "abstract_device", None)
        if device is not None and device.platform == "tpu":
            return _CHIPS.get(device.device_kind, "other")
    if jax.default_backend() == "tpu":
        return _CHIPS.get(jax.devices()[0].device_kind, "other")
    return "v5e"


def norm(x: jax.Array, scale: jax.Array, shift: jax.Array, eps: float) -> jax.Array:
    """Layer norm of rows (r, d), float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * scale + shift


def starts(total: int, size: int) -> list[tuple[int, int]]:
    """Start and length of the pieces of `total`, `size` each but the last."""
    return [(start, min(size, total - start)) for start in range(0, total, size)]


def resident(pallas, shape: Sequence[int]):
    """The block of an input that every step of a grid reads whole: it is copied once, and has no second buffer."""
    zeros = (0,) * len(shape)
    return pallas.BlockSpec(tuple(shape), lambda *_: zeros, pipeline_mode=pallas.Buffered(1))


def _up(n: int, unit: int) -> int:
    """n rounded up to a multiple of `unit`."""
    return -(-n // unit) * unit


def _even(total: int, most: int, unit: int = _LANES) -> int:
    """The size, a multiple of `unit`, of the pieces when `total` is cut into as few as possible of at most `most`, evenly."""
    pieces = -(-total // most)
    return _up(-(-total // pieces), unit)
