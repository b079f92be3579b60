"""`SmolVLMVisionTransformer`: the SigLIP-style image encoder, and its position ids (REFERENCE: transformers 5)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from .attention.dispatch import attention
from .config import SmolVLMVisionConfig
from .errors import ConfigError
from .layers import Embedding, LayerNorm, Projection, activation, rematerialized, scan_layers, stackable
from .precision import matmul_precision
from .sharding import constrain, parameter

__all__ = ["POSITION_RULES", "SmolVLMVisionTransformer", "normalize_tiles", "patch_mask", "position_buckets"]

POSITION_RULES = ("intended", "transformers-4.56")


def normalize_tiles(tiles: jax.Array, dtype) -> jax.Array:
    """uint8 pixels to the values the reference's processor makes: v/255, then (x - 0.5) / 0.5.

    Bit-equal to the reference on CPU in float32 (a table of 256 entries, made as the reference makes them: a float64
    product rounded to float32, then float32 arithmetic). Elsewhere arithmetic, because a TPU gathers from a table tens of
    thousands of times slower: within 6e-8 in float32, equal for all 256 values once rounded to bfloat16.
    """
    values = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    table = (values - np.float32(0.5)) / np.float32(0.5)

    def by_table(x):
        return jnp.take(jnp.asarray(table), x, axis=0, mode="clip")

    def by_arithmetic(x):
        return (x.astype(jnp.float32) - np.float32(127.5)) * np.float32(1 / 127.5)

    if jnp.dtype(dtype) != jnp.float32:
        return by_arithmetic(tiles).astype(dtype)
    return jax.lax.platform_dependent(tiles, cpu=by_table, default=by_arithmetic)


def position_buckets(side: int, patches: int, rule: str = "intended", dtype=np.float32) -> np.ndarray:
    """Row of the position table for patch i of an axis with n valid patches: int32 (patches + 1, patches), indexed [n, i].

    `side` is the side P of the table, `patches` the number of patches along the axis, of which the first n are valid.
    The intended rule is floor(i·P/n), which for a full axis of P patches is the identity. "transformers-4.56" is what
    versions 4.56 and 4.57 compute: the fraction i/n is scaled by (1 - 1e-6) and rounded to the pixel dtype at every step,
    so that in float32 patches 0 and 1 share a row and the last row is never used. Only parity with those versions needs it.
    """
    n = np.arange(patches + 1)[:, None]
    i = np.arange(patches)[None, :]
    if rule == "intended":
        return np.minimum(i * side // np.maximum(n, 1), side - 1).astype(np.int32)
    if rule != "transformers-4.56":
        raise ConfigError(f"position_ids {rule!r} is none of {', '.join(POSITION_RULES)}")
    dtype = np.dtype(dtype)
    fraction = (i.astype(np.float32) / np.maximum(n, 1).astype(np.float32)).astype(dtype).astype(np.float32)
    fraction = (fraction * np.float32(1 - 1e-6)).astype(dtype).astype(np.float32)
    count = int(np.ceil((1.0 - 1 / side) * side))
    boundaries = (1 / side + np.arange(count) / side).astype(np.float32)
    boundaries = boundaries[boundaries < 1.0] if side > 1 else boundaries[:0]
    return np.searchsorted(boundaries, fraction, side="right").astype(np.int32)


def patch_mask(pixel_attention_mask: jax.Array, patch_size: int) -> jax.Array:
    """(i, H, W) pixels that are real -> bool (i, rows, columns): a patch counts when any of its pixels is real."""
    i, height, width = pixel_attention_mask.shape
    rows, columns = height // patch_size, width // patch_size
    cropped = pixel_attention_mask[:, : rows * patch_size, : columns * patch_size].astype(bool)
    return cropped.reshape(i, rows, patch_size, columns, patch_size).any(axis=(2, 4))


class PatchEmbedding(nn.Module):
    """The convolution with kernel = stride = patch, without padding, as the matrix product it is."""

    config: SmolVLMVisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """(i, H, W, 3) -> (i, rows, columns, d); pixels beyond the last whole patch are not read."""
        c, d = self.config.num_channels, self.config.hidden_size
        p = self.config.patch_size
        init = nn.initializers.normal(self.config.initializer_range)
        kernel = parameter(self, "kernel", init, (p, p, c, d), (None, None, None, "embed")).astype(self.dtype)
        bias = parameter(self, "bias", nn.initializers.zeros, (d,), (None,)).astype(self.dtype)
        i, height, width, _ = pixel_values.shape
        rows, columns = height // p, width // p
        x = pixel_values[:, : rows * p, : columns * p].reshape(i, rows, p, columns, p, c)
        return jnp.einsum("iypxqc,pqcd->iyxd", x, kernel, precision=matmul_precision(self.dtype)) + bias


class SmolVLMVisionEmbeddings(nn.Module):
    config: SmolVLMVisionConfig
    dtype: Any = jnp.float32
    position_ids: str = "intended"

    @nn.compact
    def __call__(self, pixel_values: jax.Array, patch_attention_mask: jax.Array | None) -> jax.Array:
        """pixels (i, H, W, 3), mask bool (i, rows, columns) or None -> (i, p, d), patches row-major."""
        config = self.config
        x = PatchEmbedding(config, self.dtype, name="patch_embedding")(pixel_values)
        i, rows, columns, d = x.shape
        side = config.num_patches_per_side
        tables = [position_buckets(side, m, self.position_ids, jnp.dtype(self.dtype)) for m in (rows, columns)]
        if patch_attention_mask is None:
            ids = jnp.asarray(tables[0][rows][:, None] * side + tables[1][columns][None, :])[None]
        else:
            # The number of valid patches is read off the first column and the first row, as the reference does.
            valid_rows = patch_attention_mask[:, :, 0].sum(1)
            valid_columns = patch_attention_mask[:, 0, :].sum(1)
            row = jnp.asarray(tables[0])[valid_rows]
            column = jnp.asarray(tables[1])[valid_columns]
            ids = jnp.where(patch_attention_mask, row[:, :, None] * side + column[:, None, :], 0)
        table = Embedding(
            config.num_patches, d, (None, "embed"), config.initializer_range, self.dtype, name="position_embedding"
        )
        return (x + table(ids)).reshape(i, rows * columns, d)


class SmolVLMVisionAttention(nn.Module):
    config: SmolVLMVisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, return_weights: bool):
        d, n, h = self.config.hidden_size, self.config.num_attention_heads, self.config.head_dim
        shared = dict(use_bias=True, initializer_range=self.config.initializer_range, dtype=self.dtype)
        axes = ("embed", "heads", None)
        q = Projection("ipd,dnh->inph", (d, n, h), axes, name="q_proj", **shared)(x)
        k = Projection("ipd,dnh->inph", (d, n, h), axes, name="k_proj", **shared)(x)
        v = Projection("ipd,dnh->inph", (d, n, h), axes, name="v_proj", **shared)(x)
        q, k, v = (constrain(y, "tile", "act_heads", None, None) for y in (q, k, v))
        out, weights = attention(q, k, v, mask, return_weights=return_weights)
        out = Projection("inph,nhd->ipd", (n, h, d), ("heads", None, "embed"), name="out_proj", **shared)(out)
        return out, weights


class SmolVLMVisionMLP(nn.Module):
    config: SmolVLMVisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d, f = self.config.hidden_size, self.config.intermediate_size
        shared = dict(use_bias=True, initializer_range=self.config.initializer_range, dtype=self.dtype)
        x = Projection("ipd,df->ipf", (d, f), ("embed", "mlp"), name="fc1", **shared)(x)
        x = constrain(activation(self.config.hidden_act)(x), "tile", None, "act_mlp")
        return Projection("ipf,fd->ipd", (f, d), ("mlp", "embed"), name="fc2", **shared)(x)


class SmolVLMEncoderLayer(nn.Module):
    config: SmolVLMVisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, return_weights: bool):
        d, eps = self.config.hidden_size, self.config.layer_norm_eps
        normed = LayerNorm(d, eps, self.dtype, name="layer_norm1")(x)
        out, weights = SmolVLMVisionAttention(self.config, self.dtype, name="self_attn")(normed, mask, return_weights)
        x = constrain(x + out, "tile", None, None)
        normed = LayerNorm(d, eps, self.dtype, name="layer_norm2")(x)
        x = x + SmolVLMVisionMLP(self.config, self.dtype, name="mlp")(normed)
        return constrain(x, "tile", None, None), weights


class SmolVLMEncoder(nn.Module):
    """The layers, unrolled: on CPU, TPU and GPU faster than a scan, and compiled once. For training there is `scan_layers`."""

    config: SmolVLMVisionConfig
    dtype: Any = jnp.float32
    remat: bool | str = False
    scan_layers: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, return_weights: bool):
        weights = self.variables.get("params", {})
        if self.scan_layers and not return_weights and not self.is_initializing() and stackable(weights):
            layer = SmolVLMEncoderLayer(self.config, self.dtype, parent=None)
            return scan_layers(layer, weights, self.remat, x, mask, False), None, None
        layer = rematerialized(SmolVLMEncoderLayer, self.remat, static_argnums=(3,))
        states, attentions = [x], []
        for l in range(self.config.num_hidden_layers):
            x, weights = layer(self.config, self.dtype, name=f"layers_{l}")(x, mask, return_weights)
            states.append(x)
            attentions.append(weights)
        return x, tuple(states), tuple(attentions)


class SmolVLMVisionTransformer(nn.Module):
    """Tiles to patch features."""

    config: SmolVLMVisionConfig
    dtype: Any = jnp.float32
    position_ids: str = "intended"
    remat: bool | str = False
    scan_layers: bool = False

    @nn.compact
    def __call__(
        self,
        pixel_values: jax.Array,
        patch_attention_mask: jax.Array | None = None,
        output_attentions: bool = False,
    ) -> dict[str, Any]:
        """Encode tiles.

        pixel_values: normalised floats (i, H, W, 3). patch_attention_mask: bool (i, rows, columns); a masked patch is no
        key for anyone, yet still a query and still in the output. Returns a mapping with `last_hidden_state` (i, p, d)
        after the final norm, `hidden_states` (embeddings, then each layer) and `attentions` (i, n, p, p) per layer.
        """
        pixel_values = constrain(pixel_values.astype(self.dtype), "tile", None, None, None)
        x = SmolVLMVisionEmbeddings(self.config, self.dtype, self.position_ids, name="embeddings")(
            pixel_values, patch_attention_mask
        )
        x = constrain(x, "tile", None, None)
        mask = None
        if patch_attention_mask is not None:
            mask = patch_attention_mask.reshape(x.shape[0], 1, -1)
        x, states, attentions = SmolVLMEncoder(self.config, self.dtype, self.remat, self.scan_layers, name="encoder")(
            x, mask, output_attentions
        )
        x = LayerNorm(self.config.hidden_size, self.config.layer_norm_eps, self.dtype, name="post_layernorm")(x)
        return {
            "last_hidden_state": x,
            "hidden_states": states,
            "attentions": attentions if output_attentions else None,
        }
