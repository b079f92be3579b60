"""When a layer of the encoder is computed by the kernels, and how: on one device, on a mesh, differentiated, tried.

The kernels are for programs that only read the encoder. A program that differentiates the layer, in either direction, computes
it, and what it keeps for the gradient, as the modules do.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType

from ..attention.pallas import pallas_tpu
from ..attention.trial import trusted
from ..sharding import partition_spec
from .attention_block import attention_block
from .mlp_block import mlp_block
from .shape import LayerShape, blocks_for, chip_of

__all__ = ["layer_kernels", "on_each_device", "try_layer"]

# The parameters that the kernels take, and which of their dimensions a mesh may split.
_NORM: dict[str, tuple] = {"scale": (None,), "bias": (None,)}
_HEADS: dict[str, tuple] = {"kernel": (None, "act_heads", None), "bias": ("act_heads", None)}
_AXES: dict[str, dict[str, Any]] = {
    "layer_norm1": _NORM,
    "self_attn": {
        "q_proj": _HEADS,
        "k_proj": _HEADS,
        "v_proj": _HEADS,
        "out_proj": {"kernel": ("act_heads", None, None), "bias": (None,)},
    },
    "layer_norm2": _NORM,
    "mlp": {
        "fc1": {"kernel": (None, "act_mlp"), "bias": ("act_mlp",)},
        "fc2": {"kernel": ("act_mlp", None), "bias": (None,)},
    },
}
_is_axes = lambda node: isinstance(node, tuple)

Layer = Callable[[jax.Array, Any], jax.Array]


def layer_kernels(module: nn.Module, x: jax.Array, params: Any) -> Layer | None:
    """The layer as a function of x and its parameters that takes the kernels in programs for TPUs, or None if they do not fit.

    Args:
        module: the layer outside of any other module, with an encoder's config and an execution; its method `plain` computes it
            without kernels.
        x: what the layer will be given, (i, p, d).
        params: the layer's parameters. With others than those of a plain layer, adapters for example, nothing fits.
    """
    config, execution = module.config, module.execution
    known = _keys(params) == _keys(_AXES)
    meant = execution.attention == "auto" and execution.dtype == jnp.bfloat16 and config.hidden_act == "gelu_pytorch_tanh"
    if not (known and meant) or pallas_tpu() is None:
        return None
    chip = chip_of(jax.tree.leaves(params)[0])
    if blocks_for(_local(_shape(config, x.shape[1]), params), chip) is None or not trusted(_example(module, x.shape[1])):
        return None
    plain = functools.partial(_plain, module)

    @jax.custom_jvp
    def layer(x, params):
        kernels = functools.partial(on_each_device, config, chip)
        return jax.lax.platform_dependent(x, params, tpu=kernels, default=plain)

    layer.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return layer


def try_layer(module: nn.Module, patches: int) -> None:
    """Run the trial of the kernels for a layer and tiles of so many patches; see `attention.try_kernels`."""
    if jax.default_backend() == "tpu" and module.execution.dtype == jnp.bfloat16 and module.execution.attention == "auto":
        trusted(_example(module, patches))


def on_each_device(config: Any, chip: str, x: jax.Array, params: Any, *, interpret: bool = False) -> jax.Array:
    """The layer by the kernels. On a mesh every device takes its tiles, and its heads and columns of the MLP where they divide.

    Args:
        config: of the encoder.
        chip: as `shape.chip_of` names it.
        x: (i, p, d).
        params: the layer's parameters.
        interpret: run the kernels in Python, where there is no TPU.

    Returns:
        (i, p, d).
    """
    function = functools.partial(_one_device, config, chip, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return function(x, params)
    rows = partition_spec(("tile", None, None), x.shape, mesh, quiet=True)
    specs = _specs(params, mesh)
    split = specs["self_attn"]["out_proj"]["kernel"], specs["mlp"]["fc2"]["kernel"]
    function = functools.partial(function, axes=tuple(spec[0] if len(spec) else None for spec in split))
    return jax.shard_map(function, mesh=mesh, in_specs=(rows, specs), out_specs=rows, check_vma=False)(x, params)


def _one_device(config, chip, x, params, *, axes=(None, None), interpret):
    """The layer on one device's part of the arrays; `axes` are the mesh axes that split heads and columns of the MLP."""
    heads, mlp = params["self_attn"]["q_proj"]["bias"].shape[0], params["mlp"]["fc1"]["bias"].shape[0]
    shape = dataclasses.replace(_shape(config, x.shape[1]), heads=heads, mlp=mlp)
    blocks = blocks_for(shape, chip)
    assert blocks is not None  # `layer_kernels` asked
    biases = params["self_attn"]["out_proj"]["bias"], params["mlp"]["fc2"]["bias"]
    for block, axis, bias in zip((attention_block, mlp_block), axes, biases, strict=True):
        y = block(x, params, shape, blocks, whole=axis is None, interpret=interpret)
        x = y if axis is None else x + (jax.lax.psum(y, axis) + bias.astype(x.dtype))
    return x


def _shape(config: Any, patches: int) -> LayerShape:
    """The shape of a whole layer."""
    return LayerShape(
        patches=patches,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        head_size=config.head_dim,
        mlp=config.intermediate_size,
        eps=config.layer_norm_eps,
    )


def _specs(params: Any, mesh) -> Any:
    """How the parameters are split over a mesh: by heads and by columns of the MLP, where they divide."""
    return jax.tree.map(lambda axes, leaf: partition_spec(axes, leaf.shape, mesh, quiet=True), _AXES, params, is_leaf=_is_axes)


def _local(shape: LayerShape, params: Any) -> LayerShape:
    """The shape of one device's part of a layer, on the mesh in scope."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return shape
    ways = lambda spec: mesh.shape[spec[0]] if len(spec) else 1
    specs = _specs(params, mesh)
    heads, mlp = ways(specs["self_attn"]["out_proj"]["kernel"]), ways(specs["mlp"]["fc2"]["kernel"])
    return dataclasses.replace(shape, heads=shape.heads // heads, mlp=shape.mlp // mlp)


def _keys(tree: Any) -> Any:
    """The names of a tree of dicts, without its leaves."""
    return {name: _keys(node) for name, node in tree.items()} if hasattr(tree, "items") else None


def _plain(module: nn.Module, x: jax.Array, params: Any) -> jax.Array:
    """The layer without kernels."""
    out: Any = module.apply({"params": params}, x, mask=None, method="plain")
    return out.output


@functools.cache
def _example(module: nn.Module, patches: int) -> Callable[[], tuple[jax.Array, jax.Array]]:
    """For the trial: what the layer adds to one tile, by the kernels and by the formula in float32."""

    def encoder_example() -> tuple[jax.Array, jax.Array]:
        exact = module.clone(execution=dataclasses.replace(module.execution, dtype=jnp.float32))
        width = module.config.hidden_size
        x = jax.random.normal(jax.random.key(0), (1, patches, width), jnp.bfloat16)
        shapes = nn.meta.unbox(jax.eval_shape(functools.partial(exact.init, mask=None), jax.random.key(0), x)["params"])
        # Not as at initialisation, where scores are flat, biases zero, and what the layer adds so small beside x that the
        # rounding of the sum to bfloat16 is most of the difference.
        numbers = itertools.count(1)

        def draw(path, leaf):
            noise = 1.5 * width**-0.5 * jax.random.normal(jax.random.key(next(numbers)), leaf.shape)
            return (noise + (path[-1].key == "scale")).astype(x.dtype)

        params = jax.tree.map_with_path(draw, shapes)
        chip = chip_of(x)
        ours, wanted = on_each_device(module.config, chip, x, params), _plain(exact, x.astype(jnp.float32), params)
        return ours.astype(jnp.float32) - x, wanted - x

    return encoder_example
