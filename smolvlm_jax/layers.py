"""Projection, norms, activations and rotary embedding.

The alphabet of dimensions, used in every einsum equation and shape comment of the library:
b batch, i image/tile, p patch, t query position, s key position, n query head, k key/value head, g query heads per
key/value head, h head dim, d model width, f mlp width, v vocabulary, l layer, r low rank.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from .errors import ConfigError
from .precision import matmul_precision
from .sharding import constrain, parameter

__all__ = [
    "Embedding",
    "LayerNorm",
    "Projection",
    "RMSNorm",
    "activation",
    "apply_rotary",
    "rematerialized",
    "rotary_tables",
    "scan_layers",
    "stackable",
]


def _remat_policy(remat: bool | str):
    """(whether to rematerialise, jax's policy). Raises ConfigError."""
    policies = {
        "full": None,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }
    name = {False: "none", True: "full"}.get(remat, remat)
    if name == "none":
        return False, None
    if name not in policies:
        raise ConfigError(f"remat {remat!r} is none of none, {', '.join(policies)}")
    return True, policies[name]


def rematerialized(layer: type[nn.Module], remat: bool | str, static_argnums: tuple[int, ...]) -> type[nn.Module]:
    """A layer that keeps little for the backward pass. remat: False or "none" keeps everything, True or "full" only the
    layer's input, "dots" the results of matrix products with weights too, but not of attention's."""
    asked, policy = _remat_policy(remat)
    return nn.remat(layer, static_argnums=static_argnums, policy=policy) if asked else layer


def stackable(params: Mapping[str, Any]) -> bool:
    """Whether layers have the same weights of the same shapes: not so where only some carry adapters."""
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in params.values()]
    return all(shape == shapes[0] for shape in shapes)


def scan_layers(layer: nn.Module, params: Mapping[str, Any], remat: bool | str, x: jax.Array, *rest) -> jax.Array:
    """x through the layers of params, {"layers_0": …}, in a loop: layer(x, *rest) with the weights of each in turn.

    The weights are stacked here, each device its part of them. On TPU unrolled layers are scheduled into each other, and the
    activations of several exist at a time (figures in docs/design.md); a loop takes one after the other, and compiles faster.
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[f"layers_{l}"] for l in range(len(params))))

    def one(x, weights):
        return layer.apply({"params": weights}, x, *rest)[0], None

    asked, policy = _remat_policy(remat)
    if asked:
        one = jax.checkpoint(one, policy=policy, prevent_cse=False)
    return jax.lax.scan(one, x, stacked)[0]


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """transformers' `hidden_act` names. `gelu_pytorch_tanh` is the tanh approximation, `gelu` the exact one."""
    table = {
        "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "silu": jax.nn.silu,
        "relu": jax.nn.relu,
    }
    if name not in table:
        raise ConfigError(f"hidden_act {name!r} is none of {', '.join(sorted(table))}")
    return table[name]


class Projection(nn.Module):
    """A linear map, written as the einsum it is: y = einsum(equation, x, kernel) (+ bias).

    The bias has the kernel's output dimensions, which stand last in the result.
    """

    equation: str
    shape: Sequence[int]
    axes: Sequence[str | None]
    use_bias: bool = False
    initializer_range: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs, output = self.equation.split("->")
        given, letters = inputs.split(",")
        kernel = parameter(self, "kernel", nn.initializers.normal(self.initializer_range), self.shape, self.axes)
        # A product of two plain matrices, with the activations transposed around it. From btd,dnh->bnth or bnth,nhd->btd
        # itself XLA's CPU backend makes W'x', and copies every kernel on every call.
        summed = "".join(c for c in letters if c in given)
        free = "".join(c for c in given if c not in letters)
        out = "".join(c for c in letters if c not in given)
        x = jnp.einsum(f"{given}->{free}{summed}", x.astype(self.dtype))
        kernel = kernel.astype(self.dtype)
        if len(summed) > 1:
            x = x.reshape(*x.shape[: len(free)], -1)
            kernel = kernel.reshape(x.shape[-1], *kernel.shape[len(summed) :])
        y = jnp.tensordot(x, kernel, 1, precision=matmul_precision(self.dtype))
        if self.has_variable("params", "lora_a"):  # only in trees that an adapter has been put into (train/lora.py)
            a, b = (self.get_variable("params", name).astype(self.dtype) for name in ("lora_a", "lora_b"))
            low = jnp.tensordot(x, a.reshape(x.shape[-1], -1), 1, precision=matmul_precision(self.dtype))
            y = y + jnp.tensordot(low, b, 1, precision=matmul_precision(self.dtype))
        if self.use_bias:
            shape, axes = zip(*((self.shape[letters.index(c)], self.axes[letters.index(c)]) for c in out), strict=True)
            y = y + parameter(self, "bias", nn.initializers.zeros, shape, axes).astype(self.dtype)
        return jnp.einsum(f"{free}{out}->{output}", y)


class LayerNorm(nn.Module):
    """Mean and variance in float32, rounded once at the end, as torch does it."""

    size: int
    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, (self.size,), (None,)).astype(jnp.float32)
        bias = parameter(self, "bias", nn.initializers.zeros, (self.size,), (None,)).astype(jnp.float32)
        x = x.astype(jnp.float32)
        mean = x.mean(-1, keepdims=True)
        x = x - mean
        variance = jnp.square(x).mean(-1, keepdims=True)
        return (x * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """Llama's: normalise in float32, round to the input dtype, then multiply by the weight."""

    size: int
    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, (self.size,), (None,)).astype(self.dtype)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return wide.astype(self.dtype) * scale


class Embedding(nn.Module):
    """A table of rows; `attend` uses it as an output projection when the head is tied."""

    rows: int
    size: int
    axes: Sequence[str | None]
    initializer_range: float = 0.02
    dtype: Any = jnp.float32

    def setup(self):
        init = nn.initializers.normal(self.initializer_range)
        self.embedding = parameter(self, "embedding", init, (self.rows, self.size), self.axes)

    def __call__(self, ids: jax.Array) -> jax.Array:
        # Rows whole before they are looked up: a table split along its width would have its rows split by width over the
        # axis that the batch is split over, and the compiler falls back to copying the result to every device.
        table = constrain(self.embedding, "act_vocab", None)
        return jnp.take(table, ids, axis=0, mode="clip").astype(self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        table = self.embedding.astype(self.dtype)
        return jnp.einsum("btd,vd->btv", x.astype(self.dtype), table, precision=matmul_precision(self.dtype))


def rotary_tables(position_ids: jax.Array, head_dim: int, theta: float, dtype) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary angles, (b, 1, t, h/2), for one forward pass; built once and shared by all layers.

    Angles are products of float32 positions and float32 frequencies (theta^(-2j/h)) whatever the model dtype: in bf16 the
    cosine at position 8,191 would be wrong by more than 1.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    inverse_frequency = 1.0 / (jnp.float32(theta) ** exponents)
    angles = position_ids[:, None, :, None].astype(jnp.float32) * inverse_frequency
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def apply_rotary(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate (b, heads, t, h); the first half of a head pairs with the second half, not even with odd."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
