"""A layer with weights in 8 bits without kernels: in plain operations what the kernels compute.

For the trial and the tests. Nothing else computes a layer so: without matrix units for int8 it has only disadvantages.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ..quantization import SCALE
from .int8 import in_8_bits, int8_product
from .mlp_block import gelu
from .shape import Blocks, LayerShape, norm, starts

__all__ = ["layer_in_8_bits"]


def layer_in_8_bits(x: jax.Array, weights: Any, shape: LayerShape, blocks: Blocks) -> jax.Array:
    """The layer on one device.

    Args:
        x: (i, p, d) in bfloat16.
        weights: the layer's parameters in 8 bits.
        shape: of the layer.
        blocks: what the kernels take at a time: the MLP's intermediate has a scale for each block of columns.

    Returns:
        (i, p, d).
    """
    normed = lambda x, name: norm(x, weights[name]["scale"], weights[name]["bias"], shape.eps)
    parts, heads = weights["self_attn"], (*x.shape[:2], shape.heads, shape.head_size)
    given = normed(x, "layer_norm1")
    q, k, v = (_projected(given, parts[name]).reshape(heads) for name in ("q_proj", "k_proj", "v_proj"))
    q, k, v = ((y * factor).astype(x.dtype) for y, factor in ((q, shape.head_size**-0.5 * math.log2(math.e)), (k, 1), (v, 1)))
    scores = jnp.einsum("iqnh,iknh->inqk", q, k, preferred_element_type=jnp.float32)
    weights_of = jnp.exp2(scores - scores.max(-1, keepdims=True)).astype(x.dtype)
    sums = jnp.einsum("inqk->iqn", weights_of, preferred_element_type=jnp.float32)[..., None]
    attended = jnp.einsum("inqk,iknh->iqnh", weights_of, v, preferred_element_type=jnp.float32) / sums
    mixed = _projected(attended.astype(x.dtype).astype(jnp.float32).reshape(*x.shape[:2], -1), parts["out_proj"])
    x = (x.astype(jnp.float32) + mixed).astype(x.dtype)

    first, second = weights["mlp"]["fc1"], weights["mlp"]["fc2"]
    wide = gelu(_projected(normed(x, "layer_norm2"), first))
    total: Any = 0.0
    for start, count in starts(shape.mlp, blocks.mlp_columns):
        values, step = in_8_bits(wide[..., start : start + count])
        total = total + int8_product(values, second["kernel"][start : start + count]) * step
    total = total * second[f"kernel{SCALE}"].reshape(-1) + second["bias"].astype(jnp.float32)
    return (x.astype(jnp.float32) + total).astype(x.dtype)


def _projected(x: jax.Array, part: Any) -> jax.Array:
    """Rows (…, k), float32, times a projection's weights in 8 bits -> (…, m), float32."""
    values, step = in_8_bits(x)
    flat = lambda leaf: leaf.astype(jnp.float32).reshape(-1)
    product = int8_product(values, part["kernel"].reshape(x.shape[-1], -1))
    return product * step * flat(part[f"kernel{SCALE}"]) + flat(part["bias"])
