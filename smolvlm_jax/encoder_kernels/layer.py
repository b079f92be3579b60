"""When a layer of the encoder is computed by the kernels, and how: on one device, on a mesh, differentiated, tried.

The kernels are for programs that only read the encoder. A program that differentiates the layer, in either direction, computes
it, and what it keeps for the gradient, as the modules do. With weights in 8 bits the kernels multiply int8 where the chip does
so twice as fast; everything else computes with what these weights stand for.
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
from ..quantization import SCALE, dequantized, quantize
from ..sharding import partition_spec
from .attention_block import attention_block
from .formula import layer_in_8_bits
from .mlp_block import mlp_block
from .shape import INT8_CHIPS, LayerShape, blocks_for, chip_of

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


def _with_scales(axes: dict[str, Any]) -> dict[str, Any]:
    """The same of parameters in 8 bits: a scale is split as what it belongs to, along dimensions that it does not span."""
    deeper = {name: _with_scales(node) if isinstance(node, dict) else node for name, node in axes.items()}
    return {**deeper, f"kernel{SCALE}": axes["kernel"]} if "kernel" in axes else deeper


_AXES_IN_8_BITS = _with_scales(_AXES)
_is_axes = lambda node: isinstance(node, tuple)

Layer = Callable[[jax.Array, Any], jax.Array]


def layer_kernels(module: nn.Module, x: jax.Array, params: Any) -> Layer | None:
    """The layer as a function of x and its parameters that takes the kernels in programs for TPUs, or None if they do not fit.

    Args:
        module: the layer outside of any other module, with an encoder's config and an execution; its method `plain` computes it
            without kernels.
        x: what the layer will be given, (i, p, d).
        params: the layer's parameters, in floats or in 8 bits. With others than those of a plain layer, adapters for example,
            nothing fits.
    """
    config, execution = module.config, module.execution
    floats = functools.partial(dequantized, dtype=execution.dtype)
    known = _keys(params, scales=False) == _keys(_AXES)
    meant = execution.attention == "auto" and execution.dtype == jnp.bfloat16 and config.hidden_act == "gelu_pytorch_tanh"
    if not (known and meant) or pallas_tpu() is None:
        return None
    chip = chip_of(jax.tree.leaves(params)[0])
    patches = x.shape[1]
    if blocks_for(_local(_shape(config, patches), params), chip) is None:
        return None
    in_8_bits = _multiplied_as_int8(params, chip) and trusted(_example(module, patches, True))
    if not in_8_bits and not trusted(_example(module, patches, False)):
        return None
    plain = lambda x, params: _plain(module, x, floats(params))

    @jax.custom_jvp
    def layer(x, params):
        kernels = lambda x, params: on_each_device(config, chip, x, params if in_8_bits else floats(params))
        return jax.lax.platform_dependent(x, params, tpu=kernels, default=plain)

    layer.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return layer


def _multiplied_as_int8(params: Any, chip: str) -> bool:
    """Whether the kernels are meant to multiply a layer's parameters as int8."""
    return chip in INT8_CHIPS and _keys(params) == _keys(_AXES_IN_8_BITS)


def try_layer(module: nn.Module, patches: int, *, quantized: bool = False) -> None:
    """Run the trial of the kernels for a layer, with weights in 8 bits or in floats, and tiles of so many patches; see
    `attention.try_kernels`."""
    if jax.default_backend() == "tpu" and module.execution.dtype == jnp.bfloat16 and module.execution.attention == "auto":
        trusted(_example(module, patches, quantized and chip_of(jnp.zeros(())) in INT8_CHIPS))


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
    names = _AXES_IN_8_BITS if _keys(params) == _keys(_AXES_IN_8_BITS) else _AXES
    return jax.tree.map(lambda axes, leaf: partition_spec(axes, leaf.shape, mesh, quiet=True), names, params, is_leaf=_is_axes)


def _local(shape: LayerShape, params: Any) -> LayerShape:
    """The shape of one device's part of a layer, on the mesh in scope."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return shape
    ways = lambda spec: mesh.shape[spec[0]] if len(spec) else 1
    specs = _specs(params, mesh)
    heads, mlp = ways(specs["self_attn"]["out_proj"]["kernel"]), ways(specs["mlp"]["fc2"]["kernel"])
    return dataclasses.replace(shape, heads=shape.heads // heads, mlp=shape.mlp // mlp)


def _keys(tree: Any, *, scales: bool = True) -> Any:
    """The names of a tree of dicts, without its leaves, and on request without scales."""
    if not hasattr(tree, "items"):
        return None
    return {name: _keys(node, scales=scales) for name, node in tree.items() if scales or not name.endswith(SCALE)}


def _plain(module: nn.Module, x: jax.Array, params: Any) -> jax.Array:
    """The layer without kernels."""
    out: Any = module.apply({"params": params}, x, mask=None, method="plain")
    return out.output


def _in_8_bits(params: Any) -> Any:
    """A layer's parameters with its matrices in 8 bits."""
    tree: dict[str, Any] = {}
    for name, node in params.items():
        if "kernel" in node:
            values, scale = quantize(node["kernel"], (0, 1) if name == "out_proj" else (0,))
            tree[name] = {**node, "kernel": values, f"kernel{SCALE}": scale}
        else:
            tree[name] = _in_8_bits(node) if name in ("self_attn", "mlp") else node
    return tree


@functools.cache
def _example(module: nn.Module, patches: int, in_8_bits: bool) -> Callable[[], tuple[jax.Array, jax.Array]]:
    """For the trial: what the layer adds to one tile, by the kernels and by the formula: the modules in float32, or
    for weights in 8 bits `layer_in_8_bits`."""

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
        if in_8_bits:
            shape = _shape(module.config, patches)
            blocks = blocks_for(shape, chip)
            assert blocks is not None
            params = _in_8_bits(params)
            wanted = layer_in_8_bits(x, params, shape, blocks).astype(jnp.float32)
        else:
            wanted = _plain(exact, x.astype(jnp.float32), params)
        ours = on_each_device(module.config, chip, x, params)
        return ours.astype(jnp.float32) - x, wanted - x

    if in_8_bits:
        encoder_example.__name__ = "encoder_int8_example"
    return encoder_example
