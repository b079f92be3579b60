"""Projection, norms, activations, rotary embedding, and how a stack of layers is run.

The alphabet of dimensions, used in every einsum equation and shape comment of the library:
b batch, i image/tile, p patch, t query position, s key position, n query head, k key/value head, g query heads per
key/value head, h head dim, d model width, f mlp width, v vocabulary, l layer, r low rank.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from .attention import LayerCache, check_form
from .config import SmolVLMTextConfig, SmolVLMVisionConfig
from .errors import ConfigError
from .precision import matmul_precision
from .quantization import SCALE, dequantize
from .sharding import Dimension, constrain, is_declaring, parameter
from .text_families import RopeScaling

# What letters of the alphabet stand for in parameters: the field of a config that says how many, and the logical axis.
_LETTERS = {
    "d": ("hidden_size", "embed"),
    "n": ("num_attention_heads", "heads"),
    "k": ("num_key_value_heads", "kv_heads"),
    "h": ("head_dim", None),
    "f": ("intermediate_size", "mlp"),
    "v": ("vocab_size", "vocab"),
}


@lru_cache(maxsize=64)
def dimensions(config: SmolVLMVisionConfig | SmolVLMTextConfig) -> dict[str, Dimension]:
    """The dimensions of an encoder's or a decoder's parameters, by letter."""
    return {
        letter: Dimension(getattr(config, field), axis) for letter, (field, axis) in _LETTERS.items() if hasattr(config, field)
    }


@dataclass(frozen=True)
class Execution:
    """How a model is computed; none of it changes what the parameters are.

    Attributes:
        dtype: of activations and matrix products. Parameters keep their own and are cast where they are used.
        remat: what the backward pass computes again instead of keeping it. False or "none": nothing. True or "full":
            all but the input of each layer. "dots": all but the results of matrix products with weights.
        scan_layers: run the layers in a loop over their stacked weights, where only the last hidden states are asked for.
        attention: "auto", or the form of attention to use wherever it fits (see `attention.dispatch`).
    """

    dtype: Any = jnp.float32
    remat: bool | str = False
    scan_layers: bool = False
    attention: str = "auto"

    def __post_init__(self) -> None:
        check_form(self.attention)

    @property
    def remat_policy(self) -> tuple[bool, Callable[..., Any] | None]:
        """Whether to rematerialise, and jax's policy for it. Raises ConfigError if `remat` is no known name."""
        policies = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
        name = self.remat if isinstance(self.remat, str) else "full" if self.remat else "none"
        if name == "none":
            return False, None
        if name not in policies:
            raise ConfigError(f"remat {self.remat!r} is none of none, {', '.join(policies)}")
        return True, policies[name]


class StackOutput(NamedTuple):
    """What a stack of layers returns.

    Attributes:
        hidden: output of the last layer, (b, t, d).
        inputs: the input of each layer; empty if the layers ran in a loop.
        keys_values: of each layer of the decoder, empty if the layers ran in a loop: without a cache its keys and values
            (b, k, t, h), with one the updated buffers.
        weights: attention weights of each layer, or None if they were not asked for.
    """

    hidden: jax.Array
    inputs: tuple[jax.Array, ...] = ()
    keys_values: tuple[Any, ...] = ()
    weights: tuple[jax.Array, ...] | None = None


def run_layers(
    stack: nn.Module,
    layer: type[nn.Module],
    x: jax.Array,
    *,
    caches: Sequence[LayerCache] | None = None,
    last_only: bool = False,
    return_weights: bool = False,
    **shared: Any,
) -> StackOutput:
    """Run the layers "layers_0", "layers_1", … of a stack, one after the other or in a loop.

    Unrolled layers are faster on CPU, TPU and GPU, and the only ones that can update a cache in place. With
    `Execution.scan_layers` and `last_only`, a loop runs over the stacked weights, which each device stacks for its part of
    them: on TPU unrolled layers are scheduled into each other, so that the activations of several exist at a time (figures
    in docs/design.md), and a loop also compiles faster. Layers whose weights differ in shape, because only some carry
    adapters, are always unrolled.

    Args:
        stack: the module whose compact method calls this, with the fields `config` and `execution`.
        layer: the class of the layers, with the fields `config`, `execution` and `return_weights`. A layer returns what its
            attention returns, with its own output (b, t, d).
        x: input of the first layer (b, t, d).
        caches: each layer's part of a cache, which the layer takes as `cache`.
        last_only: whether nothing but the last hidden states is needed.
        return_weights: whether to return attention weights.
        **shared: keyword arguments of all layers.
    """
    config, execution = stack.config, stack.execution
    rematerialize, policy = execution.remat_policy
    if execution.scan_layers and last_only and not return_weights and not stack.is_initializing():
        params = {name: tree for name, tree in stack.variables["params"].items() if name.startswith("layers_")}
        if _alike(params.values()):
            one = layer(config, execution, parent=None)

            def step(x, weights):
                out: Any = one.apply({"params": weights}, x, **shared)
                return out.output, None

            if rematerialize:
                step = jax.checkpoint(step, policy=policy, prevent_cse=False)
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[f"layers_{l}"] for l in range(len(params))))
            return StackOutput(jax.lax.scan(step, x, stacked)[0])
    weights = _weights_of(stack)
    # Traced once for all layers; the compiler inlines the calls. Not where nothing is traced: there each layer would become a
    # program of its own.
    apply: Any = None
    if isinstance(x, jax.core.Tracer) and not rematerialize and weights is not None:
        alone = layer(config, execution, return_weights, parent=None)
        apply = jax.jit(lambda weights, x, given: alone.apply({"params": weights}, x, **given))
    layer = nn.remat(layer, policy=policy) if rematerialize else layer
    inputs: list[jax.Array] = []
    outputs: list[Any] = []
    for l in range(config.num_hidden_layers):
        if l and stack.is_initializing() and is_declaring():
            stack.put_variable("params", f"layers_{l}", stack.variables["params"]["layers_0"])
            continue
        inputs.append(x)
        own = {} if caches is None else {"cache": caches[l]}
        if apply is not None and weights is not None:
            out = apply(weights[l], x, {**shared, **own})
        else:
            out = layer(config, execution, return_weights, name=f"layers_{l}")(x, **shared, **own)
        outputs.append(out)
        x = out.output
    keys_values = tuple(out.keys_values for out in outputs if out.keys_values is not None)
    attended = tuple(out.weights for out in outputs) if return_weights else None
    return StackOutput(x, tuple(inputs), keys_values, attended)


def _weights_of(stack: nn.Module) -> list[Any] | None:
    """The parameters of each layer of a stack; None where some are missing, or are being made."""
    found = {} if stack.is_initializing() else stack.variables.get("params", {})
    names = [f"layers_{l}" for l in range(stack.config.num_hidden_layers)]
    return [found[name] for name in names] if all(name in found for name in names) else None


def _alike(trees) -> bool:
    """Whether trees have leaves of the same shapes and dtypes."""
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in trees]
    return all(shape == shapes[0] for shape in shapes)


class Projection(nn.Module):
    """A linear map, written as the einsum it is: y = einsum(equation, x, kernel) (+ bias).

    The letters of the equation are all that is said about the kernel: `dimensions` gives the size and the axis of each. The
    letters that the kernel shares with x stand first in it and are summed over; the others are dimensions of the result, where
    they stand last, and of the bias.

    Attributes:
        equation: like "btd,dnh->bnth".
        dimensions: letter -> Dimension, at least for the kernel's letters.
        use_bias: whether there is a bias.
        initializer_range: standard deviation of the kernel at initialisation.
        dtype: to compute in.
    """

    equation: str
    dimensions: Mapping[str, Dimension]
    use_bias: bool = False
    initializer_range: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs, output = self.equation.split("->")
        given, letters = inputs.split(",")
        summed = "".join(c for c in letters if c in given)
        free = "".join(c for c in given if c not in letters)
        out = "".join(c for c in letters if c not in given)
        kernel = self._declare("kernel", nn.initializers.normal(self.initializer_range), letters, summed=len(summed))
        # A product of two plain matrices, with the activations transposed around it. For btd,dnh->bnth or bnth,nhd->btd
        # as an einsum, XLA's CPU backend computes the transposed product, and copies every kernel on every call.
        x = jnp.einsum(f"{given}->{free}{summed}", x.astype(self.dtype))
        kernel = kernel.astype(self.dtype)
        if len(summed) > 1:
            x = x.reshape(*x.shape[: len(free)], -1)
            kernel = kernel.reshape(x.shape[-1], *kernel.shape[len(summed) :])
        product = partial(jnp.tensordot, axes=1, precision=matmul_precision(self.dtype))
        y = times_scale(product(x, kernel), self.get_variable("params", f"kernel{SCALE}"), kernel.shape[1:])
        if self.has_variable("params", "lora_a"):  # only in trees that an adapter has been put into (train/lora.py)
            a: jax.Array = self.get_variable("params", "lora_a").astype(self.dtype)
            b: jax.Array = self.get_variable("params", "lora_b").astype(self.dtype)
            y = y + product(product(x, a.reshape(x.shape[-1], -1)), b)
        if self.use_bias:
            y = y + self._declare("bias", nn.initializers.zeros, out).astype(self.dtype)
        return jnp.einsum(f"{free}{out}->{output}", y)

    def _declare(self, name: str, init, letters: str, summed: int | None = None) -> jax.Array:
        """A parameter whose dimensions are `letters`."""
        return parameter(self, name, init, *(self.dimensions[letter] for letter in letters), summed=summed)


class Part(nn.Module):
    """A part of the encoder's or the decoder's layers: the fields of all of them, and how they declare their projections."""

    config: Any
    execution: Execution = Execution()
    return_weights: bool = False
    use_bias = False

    def project(self, equation: str, name: str) -> Projection:
        """A projection, written in the letters of `dimensions`."""
        init, dtype = self.config.initializer_range, self.execution.dtype
        return Projection(equation, dimensions(self.config), self.use_bias, initializer_range=init, dtype=dtype, name=name)

    def fused(self, x: jax.Array, name: str) -> jax.Array | None:
        """x (b, t, d) times the kernels that `parameters.fused` has put side by side under this name; None in other trees."""
        if not self.has_variable("params", name):
            return None
        dtype = self.execution.dtype
        joined: dict[str, jax.Array] = self.get_variable("params", name)
        kernel = joined["kernel"].astype(dtype)
        flat = jnp.tensordot(x.astype(dtype), kernel.reshape(kernel.shape[0], -1), axes=1, precision=matmul_precision(dtype))
        return times_scale(flat.reshape(*x.shape[:2], *kernel.shape[1:]), joined.get(f"kernel{SCALE}"), kernel.shape[1:])


class LayerNorm(nn.Module):
    """Layer norm with mean and variance in float32, rounded once at the end, as torch does it."""

    size: int
    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, Dimension(self.size)).astype(jnp.float32)
        bias = parameter(self, "bias", nn.initializers.zeros, Dimension(self.size)).astype(jnp.float32)
        x = x.astype(jnp.float32)
        mean = x.mean(-1, keepdims=True)
        x = x - mean
        variance = jnp.square(x).mean(-1, keepdims=True)
        return (x * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """Llama's norm: normalise in float32, round to the input dtype, then multiply by the weight."""

    size: int
    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, Dimension(self.size)).astype(self.dtype)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return wide.astype(self.dtype) * scale


class Embedding(nn.Module):
    """A table of rows; `attend` uses it as the output projection where the head is tied.

    Attributes:
        rows: number of rows.
        width: length of a row.
        initializer_range: standard deviation at initialisation.
        dtype: to compute in.
    """

    rows: Dimension
    width: Dimension
    initializer_range: float = 0.02
    dtype: Any = jnp.float32

    def setup(self) -> None:
        init = nn.initializers.normal(self.initializer_range)
        self.embedding = parameter(self, "embedding", init, self.rows, self.width)
        self.scale: jax.Array | None = self.get_variable("params", f"embedding{SCALE}")  # of a table in 8 bits

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Look up rows: int (…) -> (…, width)."""
        # Rows are made whole before they are looked up. In a table split along its width the result would be split by width
        # over the mesh axis that the batch is split over, and the compiler would copy it whole to every device.
        rows = lambda table: jnp.take(constrain(table, "act_vocab", None), ids, axis=0, mode="clip")
        found = rows(self.embedding)
        return (found if self.scale is None else dequantize(found, rows(self.scale))).astype(self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """Products with every row: (b, t, d) -> (b, t, v)."""
        table = self.embedding.astype(self.dtype)
        products = jnp.einsum("btd,vd->btv", x.astype(self.dtype), table, precision=matmul_precision(self.dtype))
        return times_scale(products, self.scale, table.shape[:1])


def times_scale(products: jax.Array, scale: jax.Array | None, columns: tuple[int, ...]) -> jax.Array:
    """Products (…, *columns) with a parameter in 8 bits, times the scale of its columns; with any other, as they are."""
    return products if scale is None else (products * scale.reshape(columns)).astype(products.dtype)


def scaled(x: jax.Array, multiplier: float) -> jax.Array:
    """`x` times a constant of the program, rounded once to x's dtype; a multiplier of 1 is no part of the program."""
    return x if multiplier == 1 else (x.astype(jnp.float32) * multiplier).astype(x.dtype)


def rotary_tables(
    position_ids: jax.Array, head_dim: int, theta: float, dtype: Any, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary angles for one forward pass; made once and shared by all layers.

    Angles are products of float32 positions and float32 frequencies theta^(-2j/h), whatever the model computes in: in
    bfloat16 the cosine at position 8,191 would be wrong by more than 1.

    Args:
        position_ids: int (b, t).
        head_dim: h.
        theta: base of the frequencies.
        dtype: of the result.
        scaling: how the frequencies were stretched.

    Returns:
        Cosine and sine, (b, 1, t, h/2) each.
    """
    # In double precision and rounded once: a compiler's power is off by some last bits, which positions multiply.
    inverse_frequency = jnp.asarray(np.float64(theta) ** -(np.arange(0, head_dim, 2) / head_dim), jnp.float32)
    if scaling is not None:
        inverse_frequency = _stretched(inverse_frequency, scaling)
    angles = position_ids[:, None, :, None].astype(jnp.float32) * inverse_frequency
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def _stretched(frequency: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Frequencies, float32 (h/2,), as they are after `scaling`, with transformers' arithmetic."""
    slow = frequency / scaling.factor
    if scaling.rope_type == "linear":
        return slow
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    wave = 2 * math.pi / frequency
    share = (context / wave - low) / (high - low)
    between = (1 - share) * slow + share * frequency
    return jnp.where(wave > context / low, slow, jnp.where(wave < context / high, frequency, between))


def apply_rotary(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate (b, heads, t, h) by tables of `rotary_tables`; the first half of a head pairs with the second half."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
