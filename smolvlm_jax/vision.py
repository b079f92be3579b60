"""`SmolVLMVisionTransformer`: the SigLIP-style image encoder, its position ids, and the normalisation of uint8 pixels."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from .activations import activation
from .attention import Attended, attention
from .config import SmolVLMVisionConfig
from .encoder_kernels import layer_kernels, try_layer
from .errors import ConfigError, InputError
from .layers import Embedding, Execution, LayerNorm, Part, StackOutput, dimensions, run_layers
from .outputs import ModelOutput
from .precision import matmul_precision
from .sharding import Dimension, constrain, parameter
from .unbound import says_what_to_type

__all__ = [
    "POSITION_RULES",
    "SmolVLMVisionOutput",
    "SmolVLMVisionTransformer",
    "normalize_tiles",
    "patch_mask",
    "position_buckets",
    "try_encoder",
]

POSITION_RULES = ("intended", "transformers-4.56")


def normalize_tiles(tiles: jax.Array, dtype: Any) -> jax.Array:
    """uint8 pixels to the values that the reference's processor makes: v/255, then (x - 0.5) / 0.5.

    In float32 on CPU the values equal the reference's bit for bit: they come from a table of 256 entries, made as the
    reference makes them, a float64 product rounded to float32, then float32 arithmetic. Elsewhere they are computed, because a
    TPU gathers from a table tens of thousands of times slower: within 6e-8 in float32, equal for all 256 values once rounded
    to bfloat16.

    Args:
        tiles: uint8, any shape.
        dtype: of the result.

    Returns:
        The same shape, values from -1 to 1.
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


def position_buckets(side: int, patches: int, rule: str = "intended", dtype: Any = np.float32) -> np.ndarray:
    """Row of the position table for patch i of an axis with n valid patches.

    The intended rule is floor(i·P/n), which for a full axis of P patches is the identity. "transformers-4.56" is what
    versions 4.56 and 4.57 compute: the fraction i/n is scaled by (1 - 1e-6) and rounded to the pixel dtype at every step,
    so that in float32 patches 0 and 1 share a row and the last row is never used. It is needed only for parity with those
    versions.

    Args:
        side: side P of the position table.
        patches: patches along the axis, of which the first n are valid.
        rule: one of POSITION_RULES.
        dtype: of the pixels; only "transformers-4.56" depends on it.

    Returns:
        int32 (patches + 1, patches), indexed [n, i].

    Raises:
        ConfigError: if the rule has another name.
    """
    n = np.arange(patches + 1)[:, None]
    i = np.arange(patches)[None, :]
    if rule == "intended":
        return np.minimum(i * side // np.maximum(n, 1), side - 1).astype(np.int32)
    if rule != "transformers-4.56":
        raise ConfigError(f"vision_position_ids {rule!r} is none of {', '.join(POSITION_RULES)}")
    dtype = np.dtype(dtype)
    fraction = (i.astype(np.float32) / np.maximum(n, 1).astype(np.float32)).astype(dtype).astype(np.float32)
    fraction = (fraction * np.float32(1 - 1e-6)).astype(dtype).astype(np.float32)
    count = int(np.ceil((1.0 - 1 / side) * side))
    boundaries = (1 / side + np.arange(count) / side).astype(np.float32)
    boundaries = boundaries[boundaries < 1.0] if side > 1 else boundaries[:0]
    return np.searchsorted(boundaries, fraction, side="right").astype(np.int32)


def patch_mask(pixel_attention_mask: jax.Array, patch_size: int) -> jax.Array:
    """Real pixels (i, H, W) -> bool (i, rows, columns): a patch counts when any of its pixels is real."""
    i, height, width = pixel_attention_mask.shape
    rows, columns = height // patch_size, width // patch_size
    cropped = pixel_attention_mask[:, : rows * patch_size, : columns * patch_size].astype(bool)
    return cropped.reshape(i, rows, patch_size, columns, patch_size).any(axis=(2, 4))


class _Part(Part):
    """A part of the encoder's layers, whose projections have biases."""

    use_bias = True


class PatchEmbedding(nn.Module):
    """The convolution with kernel = stride = patch and no padding, which is a matrix product."""

    config: SmolVLMVisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """(i, H, W, 3) -> (i, rows, columns, d); pixels beyond the last whole patch are not read."""
        c, p, d = self.config.num_channels, self.config.patch_size, dimensions(self.config)["d"]
        init = nn.initializers.normal(self.config.initializer_range)
        kernel = parameter(self, "kernel", init, Dimension(p), Dimension(p), Dimension(c), d).astype(self.dtype)
        bias = parameter(self, "bias", nn.initializers.zeros, Dimension(d.size)).astype(self.dtype)
        _, height, width, _ = pixel_values.shape
        x = pixel_values[:, : height // p * p, : width // p * p]
        if self.dtype != jnp.bfloat16:
            return _patches_by_product(x, kernel) + bias
        return jax.lax.platform_dependent(x, kernel, tpu=_patches_by_rows, default=_patches_by_product) + bias


def _patches_by_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Whole patches of pixels (i, H, W, c) times a kernel (p, p, c, d) -> (i, rows, columns, d)."""
    p, _, c, _ = kernel.shape
    i, height, width, _ = x.shape
    x = x.reshape(i, height // p, p, width // p, p, c)
    return jnp.einsum("iypxqc,pqcd->iyxd", x, kernel, precision=matmul_precision(kernel.dtype))


def _patches_by_rows(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same as a convolution along x, of which the pixels of a patch's column are the channels.

    A TPU stores a row of pixels along its lanes. The product would split it into pieces of p, each padded to 128 lanes: eight
    times the memory of the pixels.
    """
    p, _, c, d = kernel.shape
    i, height, width, _ = x.shape
    x = jnp.einsum("iypwc->iywpc", x.reshape(i, height // p, p, width, c)).reshape(i, height // p, width, p * c)
    kernel = jnp.einsum("pqcd->qpcd", kernel).reshape(1, p, p * c, d)
    return jax.lax.conv_general_dilated(x, kernel, (1, p), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


class SmolVLMVisionEmbeddings(nn.Module):
    """Patches and their positions."""

    config: SmolVLMVisionConfig
    dtype: Any = jnp.float32
    position_rule: str = "intended"

    @nn.compact
    def __call__(self, pixel_values: jax.Array, *, patch_attention_mask: jax.Array | None) -> jax.Array:
        """pixels (i, H, W, 3), mask bool (i, rows, columns) or None -> (i, p, d), patches row-major."""
        config = self.config
        x = PatchEmbedding(config, self.dtype, name="patch_embedding")(pixel_values)
        i, rows, columns, d = x.shape
        side = config.num_patches_per_side
        buckets = partial(position_buckets, side, rule=self.position_rule, dtype=jnp.dtype(self.dtype))
        row_table, column_table = buckets(patches=rows), buckets(patches=columns)
        if patch_attention_mask is None:
            ids = jnp.asarray(row_table[rows][:, None] * side + column_table[columns][None, :])[None]
        else:
            # The number of valid patches is that of the first column and the first row, as in the reference.
            row = jnp.asarray(row_table)[patch_attention_mask[:, :, 0].sum(1)]
            column = jnp.asarray(column_table)[patch_attention_mask[:, 0, :].sum(1)]
            ids = jnp.where(patch_attention_mask, row[:, :, None] * side + column[:, None, :], 0)
        width = dimensions(config)["d"]
        table = Embedding(Dimension(config.num_patches), width, config.initializer_range, self.dtype, name="position_embedding")
        return (x + table(ids)).reshape(i, rows * columns, d)


class SmolVLMVisionAttention(_Part):
    """Every patch attends to every patch of its tile that the mask admits."""

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None) -> Attended:
        """x (i, p, d), mask bool (i, 1, p) or None."""
        q, k, v = (self.project("ipd,dnh->inph", name)(x) for name in ("q_proj", "k_proj", "v_proj"))
        q, k, v = (constrain(y, "tile", "act_heads", None, None) for y in (q, k, v))
        found = attention(q, k, v, mask, form=self.execution.attention, return_weights=self.return_weights)
        return found._replace(output=self.project("inph,nhd->ipd", "out_proj")(found.output))


class SmolVLMVisionMLP(_Part):
    """Two projections with an activation in between."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.project("ipd,df->ipf", "fc1")(x)
        x = constrain(activation(self.config.hidden_act)(x), "tile", None, "act_mlp")
        return self.project("ipf,fd->ipd", "fc2")(x)


class SmolVLMEncoderLayer(_Part):
    """Attention and MLP, each after a norm and added to its input."""

    def __call__(self, x: jax.Array, *, mask: jax.Array | None) -> Attended:
        """x (i, p, d), mask bool (i, 1, p) or None."""
        if mask is None and not self.return_weights and not self.is_initializing():
            alone = SmolVLMEncoderLayer(self.config, self.execution, parent=None)
            params = nn.meta.unbox(self.variables.get("params", {}))
            layer = layer_kernels(alone, x, params)
            if layer is not None:
                return Attended(layer(x, params))
        return self.plain(x, mask=mask)

    @nn.compact
    def plain(self, x: jax.Array, *, mask: jax.Array | None) -> Attended:
        """The layer without kernels for the whole of it; arguments as above."""
        norm = partial(LayerNorm, self.config.hidden_size, self.config.layer_norm_eps, self.execution.dtype)
        attend = SmolVLMVisionAttention(self.config, self.execution, self.return_weights, name="self_attn")
        attended = attend(norm(name="layer_norm1")(x), mask=mask)
        x = constrain(x + attended.output, "tile", None, None)
        x = x + SmolVLMVisionMLP(self.config, self.execution, name="mlp")(norm(name="layer_norm2")(x))
        return attended._replace(output=constrain(x, "tile", None, None))


def try_encoder(config: SmolVLMVisionConfig, execution: Execution, *, quantized: bool = False) -> None:
    """Run the trial of the kernels for an encoder's layers, as `attention.try_kernels` does for those of attention, with
    weights in 8 bits or in floats."""
    try_layer(SmolVLMEncoderLayer(config, execution, parent=None), config.num_patches, quantized=quantized)


class SmolVLMEncoder(_Part):
    """The layers of the encoder."""

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None) -> StackOutput:
        """x (i, p, d), mask bool (i, 1, p) or None."""
        return run_layers(self, SmolVLMEncoderLayer, x, last_only=True, return_weights=self.return_weights, mask=mask)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SmolVLMVisionOutput(ModelOutput):
    """What the encoder returns.

    Attributes:
        last_hidden_state: (i, p, d) after the final norm.
        hidden_states: the embeddings, then the output of each layer; None if the layers ran in a loop.
        attentions: (i, n, p, p) per layer, if they were asked for.
    """

    last_hidden_state: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


def _channels_last(pixels: jax.Array, channels: int, data_format: str) -> jax.Array:
    """Pixels (i, H, W, c), wherever their channels are said to be. Raises InputError for another shape or format."""
    if data_format not in ("channels_last", "channels_first"):
        raise InputError(f"data_format is {data_format!r}; it is 'channels_last' or 'channels_first'")
    last = data_format == "channels_last"
    if pixels.ndim != 4 or pixels.shape[3 if last else 1] != channels:
        wanted = f"(tiles, height, width, {channels})" if last else f"(tiles, {channels}, height, width)"
        first = last and pixels.ndim == 4 and pixels.shape[1] == channels
        advice = "; for (tiles, channels, height, width) pass data_format='channels_first'" if first else ""
        raise InputError(f"the encoder takes pixel_values {wanted}, got {pixels.shape}{advice}")
    return pixels if last else jnp.einsum("ichw->ihwc", pixels)


@says_what_to_type
class SmolVLMVisionTransformer(nn.Module):
    """Tiles to patch features.

    Attributes:
        config: of the encoder.
        execution: how it is computed.
        position_rule: one of POSITION_RULES (see `position_buckets`).
    """

    config: SmolVLMVisionConfig
    execution: Execution = Execution()
    position_rule: str = "intended"

    @nn.compact
    def __call__(
        self,
        pixel_values: jax.Array,
        *,
        patch_attention_mask: jax.Array | None = None,
        output_attentions: bool = False,
        data_format: str = "channels_last",
    ) -> SmolVLMVisionOutput:
        """Encode tiles.

        Args:
            pixel_values: normalised floats (i, H, W, 3), or (i, 3, H, W) with data_format="channels_first".
            patch_attention_mask: bool (i, rows, columns). A masked patch is a key for no query, but still a query and part of
                the output.
            output_attentions: also return attention weights.
            data_format: where the channels of the pixels are.

        Returns:
            Patch features (i, p, d), and what was asked for besides.

        Raises:
            InputError: the pixels have another shape.
        """
        pixel_values = _channels_last(pixel_values, self.config.num_channels, data_format)
        dtype = self.execution.dtype
        pixel_values = constrain(pixel_values.astype(dtype), "tile", None, None, None)
        embeddings = SmolVLMVisionEmbeddings(self.config, dtype, self.position_rule, name="embeddings")
        x = constrain(embeddings(pixel_values, patch_attention_mask=patch_attention_mask), "tile", None, None)
        mask = None
        if patch_attention_mask is not None:
            mask = patch_attention_mask.reshape(x.shape[0], 1, -1)
        out = SmolVLMEncoder(self.config, self.execution, output_attentions, name="encoder")(x, mask=mask)
        norm = LayerNorm(self.config.hidden_size, self.config.layer_norm_eps, dtype, name="post_layernorm")
        states = (*out.inputs, out.hidden) if out.inputs else None
        return SmolVLMVisionOutput(norm(out.hidden), states, out.weights)
