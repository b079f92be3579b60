"""The parameter tree as a contract: abstract shapes, logical axes and random initial values, all derived from the model."""

import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .dtypes import dtype_name
from .field_types import check_kind
from .habits import named_arguments
from .model import SmolVLMForConditionalGeneration
from .quantization import SCALE, quantize, scale_shape
from .sharding import Declared, declaring, parameter_shardings

__all__ = [
    "abstract_params",
    "flatten_params",
    "for_lookups",
    "flat_scales",
    "fused",
    "init_params",
    "laid_out",
    "logical_axes",
    "quantize_params",
    "spanned_dimensions",
    "summed_dimensions",
    "with_scales",
    "unflatten_params",
]


def _declared(model: SmolVLMForConditionalGeneration) -> Any:
    """The tree of `Declared` parameters with abstract values, for which nothing but the class and the config matters."""
    return _declared_by(type(model)(model.config))


@functools.lru_cache(maxsize=32)
def _declared_by(model: SmolVLMForConditionalGeneration) -> Any:
    with declaring():
        return jax.eval_shape(model.init, jax.random.key(0))["params"]


def _is_declared(x: Any) -> bool:
    return isinstance(x, Declared)


def abstract_params(model: SmolVLMForConditionalGeneration, dtype: Any = None) -> Any:
    """The shapes of a model's parameters. Nothing is allocated.

    Args:
        model: whose parameters.
        dtype: of the parameters, as in `load`. Default: float32.

    Returns:
        The tree of parameters, a nested dict, with a ShapeDtypeStruct in place of each array.
    """
    tree = nn.unbox(_declared(model))
    if dtype is None:
        return tree
    kind = jnp.dtype(dtype_name(dtype))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, kind), tree)


def logical_axes(model: SmolVLMForConditionalGeneration) -> Any:
    """The logical axes of a model's parameters.

    Args:
        model: whose parameters.

    Returns:
        The tree of parameters with a tuple in place of each array: the name of each dimension's axis, None = never sharded.
    """
    return jax.tree.map(lambda declared: AxisNames(declared.names), _declared(model), is_leaf=_is_declared)


def summed_dimensions(model: SmolVLMForConditionalGeneration) -> dict[str, int]:
    """For the path of each projection's kernel, how many leading dimensions the projection sums over."""
    leaves = jax.tree_util.tree_flatten_with_path(_declared(model), is_leaf=_is_declared)[0]
    return {_joined(path): declared.summed for path, declared in leaves if declared.summed is not None}


def spanned_dimensions(model: SmolVLMForConditionalGeneration) -> dict[str, tuple[int, ...]]:
    """For the path of each parameter that is stored in 8 bits when weights are, the dimensions that its scale spans: what a
    projection sums over, and the width of the table of tokens."""
    kernels = {path: tuple(range(summed)) for path, summed in summed_dimensions(model).items()}
    return {**kernels, "model/text_model/embed_tokens/embedding": (1,)}


def with_scales(model: SmolVLMForConditionalGeneration, tree: Any, only: Collection[str] | None = None) -> Any:
    """A tree of abstract parameters, or of logical axes, of a model whose weights are in 8 bits.

    Args:
        model: whose tree it is.
        tree: of ShapeDtypeStructs or AxisNames, whole or a part.
        only: paths of those in 8 bits. Default: all that `spanned_dimensions` names.

    Returns:
        The same tree with scales, and with int8 in place of the dtype of what they belong to.
    """
    spanned, flat = spanned_dimensions(model), flatten_params(tree)
    out: dict[str, Any] = {}
    for path, leaf in flat.items():
        out[path] = leaf
        if path not in spanned or not (only is None or path in only):
            continue
        if isinstance(leaf, AxisNames):
            names = enumerate(leaf)
            out[path + SCALE] = AxisNames(None if axis in spanned[path] else name for axis, name in names)
        else:
            out[path] = jax.ShapeDtypeStruct(leaf.shape, jnp.int8)
            out[path + SCALE] = jax.ShapeDtypeStruct(scale_shape(leaf.shape, spanned[path]), jnp.float32)
    return unflatten_params(out)


def quantize_params(model: SmolVLMForConditionalGeneration, params: Any) -> Any:
    """Parameters, whole or a part, with the matrices of projections and the table of tokens in 8 bits (see `quantization`).

    What is in 8 bits already stays as it is. Arrays keep their devices and shardings.
    """
    spanned = spanned_dimensions(model)
    out: dict[str, Any] = {}
    for path, leaf in flatten_params(params).items():
        out[path] = leaf
        if path in spanned and leaf.dtype != jnp.int8:
            out[path], out[path + SCALE] = jax.jit(quantize, static_argnums=1)(leaf, spanned[path])
    return unflatten_params(out)


class AxisNames(tuple):
    """A tuple of axis names that jax treats as a leaf, because it is not exactly `tuple`."""

    __slots__ = ()


@named_arguments
def init_params(
    model: SmolVLMForConditionalGeneration, seed: int = 0, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> Any:
    """Random parameters, which need nothing but the model's config.

    Args:
        model: whose parameters to make.
        seed: of the random numbers.
        dtype: of the parameters, as in `load`.
        mesh: make each device's part there, as the logical axes say. Default: on the default device.

    Returns:
        The tree of parameters, a nested dict of arrays.

    Raises:
        InputError: `model` is no model.
    """
    check_kind("model", model, nn.Module, "a description, such as SmolVLMForConditionalGeneration(published_config(NAME))")
    kind = jnp.dtype(dtype_name(dtype))

    def make(key):
        return jax.tree.map(lambda x: x.astype(kind), nn.unbox(model.init(key)["params"]))

    shardings = None if mesh is None else parameter_shardings(abstract_params(model), logical_axes(model), mesh)
    return jax.jit(make, out_shardings=shardings)(jax.random.key(seed))


def for_lookups(params: Any, platform: str = "tpu") -> Any:
    """Parameters whose embedding table has its rows one after the other in memory, as looking them up needs it.

    Where the width of a table is no multiple of 128, TPUs keep it by columns, and each program that looks up rows would lay out
    the whole table first: 0.8 of the 13 million cycles of the 256M's prefill of 2,048 tokens on v5e. The values are the same.

    Args:
        params: arrays, or ShapeDtypeStructs with shardings, of which a program is to be made for such arrays.
        platform: of the devices whose tables are laid out; others keep theirs.
    """

    def lay_out(path: tuple[Any, ...], x: Any) -> Any:
        if not _joined(path).endswith("embed_tokens/embedding") or x.sharding is None:
            return x
        if next(iter(x.sharding.device_set)).platform != platform:
            return x
        by_rows = Format(Layout((0, 1)), x.sharding)
        return (
            jax.device_put(x, by_rows) if isinstance(x, jax.Array) else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_rows)
        )

    return jax.tree_util.tree_map_with_path(lay_out, params)


def laid_out(params: Any) -> Any:
    """Parameters as the engine's programs read them on their devices: `for_lookups`, `fused`, and `flat_scales`."""
    return flat_scales(fused(for_lookups(params)))


# Projections of the decoder's layers that have one input, and what they are called as one. Side by side along the second
# dimension stand the kernels, (d, heads, h) or (d, f), and the scales of those in 8 bits, (1, heads, h) or (1, f).
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def fused(params: Any, platforms: Collection[str] = ("tpu", "gpu")) -> Any:
    """Parameters in which the decoder's projections of one input are one.

    On a TPU one product, and the rotary embedding of its heads together, cost less than three (figures in docs/design.md). A
    GPU's compiler merges such products by itself, but not large ones, and for cuBLAS by copying their weights in each step.

    The tree of a model keeps its paths everywhere else: this one is for running it only. Projections whose heads or columns are
    divided between devices stay as they are, and so do those that are more than a kernel. What is joined is copied: a caller
    that keeps its own tree holds both.

    Args:
        params: arrays, or ShapeDtypeStructs with shardings, of which a program is to be made for such arrays.
        platforms: of the devices whose kernels are joined; those of others stay apart.
    """
    if not isinstance(params, dict):
        return params
    tree = {name: fused(part, platforms) for name, part in params.items()}
    for name, parts in _FUSED.items():
        if all(part in tree for part in parts) and _can_join([tree[part] for part in parts], platforms):
            joined = [tree.pop(part) for part in parts]
            tree[name] = {leaf: _side_by_side([part[leaf] for part in joined]) for leaf in joined[0]}
    return tree


def _can_join(parts: list[Any], platforms: Collection[str]) -> bool:
    """Whether projections are kernels of one dtype, with scales or without, and nothing else, on devices of these platforms,
    undivided along their columns."""
    leaves = parts[0].keys()
    if leaves not in ({"kernel"}, {"kernel", f"kernel{SCALE}"}) or any(part.keys() != leaves for part in parts):
        return False
    kernels = [part["kernel"] for part in parts]
    shardings = [kernel.sharding for kernel in kernels]
    if any(sharding is None or next(iter(sharding.device_set)).platform not in platforms for sharding in shardings):
        return False
    whole = all(sharding.shard_shape(x.shape)[1:] == x.shape[1:] for sharding, x in zip(shardings, kernels, strict=True))
    return whole and len({x.dtype for x in kernels}) == 1


def _side_by_side(parts: list[Any]) -> Any:
    """Kernels (d, …), or scales, one after the other along their second dimension, placed as the first."""
    first = parts[0]
    if isinstance(first, jax.Array):
        return jax.jit(lambda *x: jnp.concatenate(x, 1), out_shardings=first.sharding)(*parts)
    shape = (first.shape[0], sum(x.shape[1] for x in parts), *first.shape[2:])
    return jax.ShapeDtypeStruct(shape, first.dtype, sharding=first.sharding)


def flat_scales(params: Any, platform: str = "tpu") -> Any:
    """Parameters in which scales of the decoder and its head that are a row, (1, d), are a vector.

    TPUs store the two differently, and each step of decoding would copy the rows of all layers: 5 of 93 thousand cycles a layer
    of the 256M on v5e. Scales that are divided between devices stay as they are.

    Args:
        params: arrays, or ShapeDtypeStructs with shardings, of which a program is to be made for such arrays.
        platform: of the devices whose scales become vectors; others keep theirs.
    """

    def flat(path: tuple[Any, ...], x: Any) -> Any:
        name, place = _joined(path), x.sharding
        if not name.endswith(f"/kernel{SCALE}") or not ("/text_model/" in name or name.startswith("lm_head/")):
            return x
        if x.size != x.shape[-1] or place is None or not place.is_fully_replicated:
            return x
        if next(iter(place.device_set)).platform != platform:
            return x
        place = NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else place
        if isinstance(x, jax.Array):
            return jax.device_put(x.reshape(-1), place)
        return jax.ShapeDtypeStruct((x.size,), x.dtype, sharding=place)

    return jax.tree_util.tree_map_with_path(flat, params)


def _joined(path: tuple[Any, ...]) -> str:
    """A path of jax's as "model/text_model/…/kernel"."""
    return "/".join(key.key for key in path)


def flatten_params(tree: Any) -> dict[str, Any]:
    """A nested dict of parameters as a flat one.

    Args:
        tree: the parameters.

    Returns:
        {"model/text_model/…/kernel": leaf}.
    """
    return {_joined(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def unflatten_params(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten_params`.

    Args:
        flat: paths and leaves.

    Returns:
        The nested dict.
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
