"""The second half of an encoder's layer in one kernel: norm, both projections with the activation between them, residual.

The intermediate, four times as wide as the layer, never leaves the core: some of its columns exist at a time, and the first
product of the next columns is issued before the activation of these, so that the matrix unit has work meanwhile.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from ..attention.pallas import pallas_tpu
from ..quantization import SCALE
from .int8 import in_8_bits, int8_product
from .shape import Blocks, LayerShape, norm, resident, starts

__all__ = ["gelu", "mlp_block"]


def mlp_block(
    x: jax.Array, weights: dict[str, Any], shape: LayerShape, blocks: Blocks, *, whole: bool = True, interpret: bool = False
) -> jax.Array:
    """x + fc2(gelu(fc1(norm(x)))) on one device, with gelu's tanh form.

    Args:
        x: (i, p, d) in bfloat16.
        weights: the layer's parameters `layer_norm2` and `mlp`, of the columns that `shape` counts, in floats or in 8 bits.
        shape: of the layer.
        blocks: what the kernel takes at a time.
        whole: whether these are all columns. If not, the result is their part of fc2's product, without its bias and x.
        interpret: run the kernel in Python, where there is no TPU.

    Returns:
        (i, p, d).
    """
    pallas, tpu = pallas_tpu()
    i, p, d = x.shape
    first, second = weights["mlp"]["fc1"], weights["mlp"]["fc2"]
    flat = lambda leaf: leaf.astype(jnp.float32).reshape(1, -1)
    quantized = f"kernel{SCALE}" in first
    body, dtype = (_kernel_int8, jnp.int8) if quantized else (_kernel, x.dtype)
    inputs = [
        *(flat(weights["layer_norm2"][name]) for name in ("scale", "bias")),
        first["kernel"].astype(dtype),
        flat(first["bias"]),
        second["kernel"].astype(dtype),
        flat(second["bias"]),
        *(flat(part[f"kernel{SCALE}"]) for part in (first, second) if quantized),
    ]
    rows = pallas.BlockSpec((1, blocks.mlp_rows, d), lambda i, j: (i, j, 0))
    return pallas.pallas_call(
        functools.partial(body, shape=shape, blocks=blocks, whole=whole),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(i, pallas.cdiv(p, blocks.mlp_rows)),
        in_specs=[rows, *(resident(pallas, leaf.shape) for leaf in inputs)],
        out_specs=rows,
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=blocks.memory),
        cost_estimate=pallas.CostEstimate(
            flops=4 * x.size * shape.mlp,
            transcendentals=i * p * shape.mlp,
            bytes_accessed=2 * 2 * x.size + 2 * d * shape.mlp * jnp.dtype(dtype).itemsize,
        ),
        interpret=interpret,
        name="encoder_mlp",
    )(x, *inputs)


def _kernel(x, scale, shift, w1, b1, w2, b2, out, *, shape: LayerShape, blocks: Blocks, whole: bool) -> None:
    """A block of patches: x and out (1, r, d), w1 (d, f), b1 (1, f), w2 (f, d), b2 (1, d)."""
    normed = norm(x[0], scale[...], shift[...], shape.eps).astype(x.dtype)
    chunks = [slice(start, start + count) for start, count in starts(shape.mlp, blocks.mlp_columns)]
    wide = lambda columns: jnp.dot(normed, w1[:, columns], preferred_element_type=jnp.float32) + b1[:, columns]
    total: Any = x[0].astype(jnp.float32) + b2[...] if whole else None
    following = wide(chunks[0])
    for columns, after in zip(chunks, [*chunks[1:], None], strict=True):
        now = following
        if after is not None:
            following = wide(after)
        activated = gelu(now.astype(x.dtype) if blocks.narrow else now).astype(x.dtype)
        part = jnp.dot(activated, w2[columns], preferred_element_type=jnp.float32)
        total = part if total is None else total + part
    out[0] = total.astype(out.dtype)


def _kernel_int8(x, scale, shift, w1, b1, w2, b2, s1, s2, out, *, shape: LayerShape, blocks: Blocks, whole: bool) -> None:
    """The same with int8 w1 and w2, and their scales: s1 (1, f), s2 (1, d)."""
    normed, step = in_8_bits(norm(x[0], scale[...], shift[...], shape.eps))
    chunks = [slice(start, start + count) for start, count in starts(shape.mlp, blocks.mlp_columns)]
    wide = lambda columns: int8_product(normed, w1[:, columns])
    total: Any = None
    following = wide(chunks[0])
    for columns, after in zip(chunks, [*chunks[1:], None], strict=True):
        now = following * step * s1[:, columns] + b1[:, columns]
        if after is not None:
            following = wide(after)
        values, its = in_8_bits(gelu(now))
        part = int8_product(values, w2[columns]) * its
        total = part if total is None else total + part
    total = total * s2[...]
    out[0] = (total + (x[0].astype(jnp.float32) + b2[...]) if whole else total).astype(out.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """gelu's tanh form, in the fewest operations."""
    root, half = math.sqrt(2 / math.pi), 0.5 * x
    return half + half * jnp.tanh(x * (root + 0.044715 * root * (x * x)))
